"""`UMIL` against the same training written out by hand, and what it refuses."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from plain import Batches, same, trainer
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_methods.callbacks import UMIL
from lightning_methods.functional import confidence_split, umil_detector_loss, umil_invariance_loss
from lightning_methods.modules import ClusterHead

V, K, D, H = 6, 4, 3, 5
FEATURES = torch.randn(V, K, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([1, 0, 2, 0, 1, 1])


class Detector(LightningModule):
    """Two logits a snippet, and the cross-entropy of the highest one of each bag."""

    outputs = 2

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(D, H), nn.Tanh()).double()
        self.head = nn.Linear(H, self.outputs).double()

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.encoder(features))

    def bag_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        rows = torch.arange(len(logits))
        highest = logits[rows, (logits[..., 1] - logits[..., 0]).argmax(1)]
        return F.cross_entropy(highest, (labels > 0).long())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.bag_loss(self(batch["features"]), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def batch(*ids: int) -> dict[str, Tensor]:
    rows = torch.tensor(ids)
    return {"features": FEATURES[rows], "label": LABELS[rows], "vid": rows}


BATCHES = [batch(0, 1, 2), batch(3, 4, 5)]
SETTINGS: dict[str, Any] = {
    "features": "module.encoder",
    "in_features": H,
    "num_videos": V,
    "start_epoch": 2,
    "history_warmup": 2,
    "ratio": 0.5,
    "similarity_threshold": 0.3,
}


def fit(method: Any, module: Any = None, batches: Any = BATCHES, epochs: int = 4, **settings: Any) -> Any:
    module = Detector() if module is None else module
    callbacks, ckpt_path = settings.pop("callbacks", []), settings.pop("ckpt_path", None)
    loader = Batches(batches) if isinstance(batches, list) else batches
    run = trainer(*([method] if method else []), *callbacks, max_epochs=epochs, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, loader, ckpt_path=ckpt_path)
    return run


class ClusterSeed(UMIL):
    """The same cluster head as `by_hand` has."""

    def helpers(self) -> dict[str, nn.Module]:
        return {"cluster_head": cluster_head()}


def cluster_head() -> nn.Module:
    torch.manual_seed(2)
    return ClusterHead(H).double()


WEIGHTS = {
    "weight_cluster": 0.7,
    "weight_compat": 1.3,
    "weight_compat_confident": 0.4,
    "weight_confident": 0.9,
    "weight_variance": 0.6,
}


def by_hand(epochs: int, *, history: str, ramp: int, start: int = 2, remembered: int = 0) -> tuple[Any, Any]:
    """Everything that the callback does, for the settings of this file; returns the module and the last division."""
    module, head = Detector(), cluster_head()
    optimizer = torch.optim.SGD([*module.parameters(), *head.parameters()], lr=0.3)
    table: list[Tensor] = []
    split = None
    for epoch in range(epochs):
        scores = torch.zeros(V, K, dtype=torch.float64)
        for one in BATCHES:
            z = module.encoder(one["features"])
            logits = module.head(z)
            loss = module.bag_loss(logits, one["label"])
            scores[one["vid"]] = logits.detach().softmax(-1)[..., 1]
            if split is not None and epoch >= start:
                ambiguous = ~split.confident.view(V, K)[one["vid"]]
                labels = split.pseudo_labels.view(V, K)[one["vid"]]
                added = umil_invariance_loss(
                    logits, head(z), z, ambiguous, labels, similarity_threshold=0.3, **WEIGHTS
                ).total
                loss = loss + min(1.0, (epoch - start + 1) / max(ramp, 1)) * added
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if history == "pass":
            with torch.no_grad():
                scores = module(FEATURES).softmax(-1)[..., 1]
        if epoch >= remembered:
            table.append(scores.flatten())
        if len(table) > 1:
            split = confidence_split(torch.stack(table), LABELS.repeat_interleave(K), ratio=0.5)
    return module, split


@pytest.mark.parametrize("ramp", [0, 3])
@pytest.mark.parametrize("history", ["train", "pass"])
def test_training_by_hand(history: str, ramp: int) -> None:
    method = ClusterSeed(**SETTINGS, **WEIGHTS, history=history, ramp_epochs=ramp)
    module = Detector()
    fit(method, module, epochs=5)
    expected, split = by_hand(5, history=history, ramp=ramp)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, msg=name)
    assert torch.equal(method._division.ambiguous, ~split.confident)
    assert 0 < method._division.ambiguous.sum() < V * K
    confident = split.confident
    assert torch.equal(method._division.pseudo_labels[confident], split.pseudo_labels[confident])


def test_the_first_epochs_are_not_remembered() -> None:
    method = ClusterSeed(**{**SETTINGS, "start_epoch": 4, "history_warmup": 3}, **WEIGHTS)
    module = Detector()
    fit(method, module, epochs=6)
    expected, _ = by_hand(6, history="train", ramp=0, start=4, remembered=1)
    torch.testing.assert_close(module.head.weight, expected.head.weight)
    assert method._division.history.count.tolist() == [5.0] * (V * K)


def test_before_it_acts_training_is_that_of_the_module_alone() -> None:
    plain, attached = Detector(), Detector()
    fit(None, plain, epochs=2)
    fit(UMIL(**SETTINGS), attached, epochs=2)
    assert same(plain, attached)


# --- forms of values ---------------------------------------------------------------------------------


class OneLogit(Detector):
    """One logit x a snippet, which is two logits (0, x)."""

    outputs = 1
    form = staticmethod(lambda x: x)

    def forward(self, features: Tensor) -> Tensor:
        self.out = self.head(self.encoder(features))
        return self.form(self.out)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self(batch["features"])
        return self.bag_loss(F.pad(self.out, (1, 0)), batch["label"])


FORMS = {
    "(B, K, 1)": (lambda x: x, False),
    "(B, K)": (lambda x: x.squeeze(-1), False),
    "(B * K, 1)": (lambda x: x.flatten(0, 1), False),
    "(B * K,)": (lambda x: x.flatten(), False),
    "(B, K, 2)": (lambda x: F.pad(x, (1, 0)), False),
    "(B * K, 2)": (lambda x: F.pad(x, (1, 0)).flatten(0, 1), False),
    "probabilities (B, K)": (lambda x: x.squeeze(-1).sigmoid(), True),
    "probabilities (B, K, 2)": (lambda x: F.pad(x, (1, 0)).softmax(-1), True),
}


@pytest.mark.parametrize("form", FORMS)
def test_outputs_in_any_form_are_the_same(form: str) -> None:
    reference, module = OneLogit(), OneLogit()
    fit(ClusterSeed(**SETTINGS), reference)
    module.form, probabilities = FORMS[form]
    fit(ClusterSeed(**SETTINGS, logits_are_probabilities=probabilities), module)
    torch.testing.assert_close(module.head.weight, reference.head.weight)
    untouched = OneLogit()
    fit(None, untouched)
    assert not torch.allclose(module.head.weight, untouched.head.weight)


def test_probabilities_of_exactly_0_and_1() -> None:
    class Sure(OneLogit):
        form = staticmethod(lambda x: (1e4 * x).sigmoid().squeeze(-1))

    module = Sure()
    fit(UMIL(**SETTINGS, logits_are_probabilities=True), module)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_flat_features() -> None:
    reference, flat = Detector(), Detector()
    fit(ClusterSeed(**SETTINGS), reference)
    settings = {**SETTINGS, "features": lambda step: step.module.encoder(step.batch["features"]).flatten(0, 1)}
    fit(ClusterSeed(**settings), flat)
    torch.testing.assert_close(flat.head.weight, reference.head.weight)


@pytest.mark.parametrize("stored", [lambda y: y[:, None], lambda y: y.float(), lambda y: y > 0])
def test_labels_as_columns_floats_or_booleans(stored: Any) -> None:
    reference, module = Detector(), Detector()
    fit(ClusterSeed(**SETTINGS), reference)
    others = [{**one, "y": stored(one["label"])} for one in BATCHES]
    fit(ClusterSeed(**SETTINGS, bag_labels="batch.y"), module, others)
    assert torch.equal(module.head.weight, reference.head.weight)


def test_cells_from_frames() -> None:
    """Snippets in another order in every batch, told apart by their frames."""
    reference, module = Detector(), Detector()
    fit(ClusterSeed(**SETTINGS), reference)
    batches = []
    for shift, one in enumerate(BATCHES, 1):
        order = (torch.arange(K) + shift) % K
        total = torch.full((3,), 10 * K)
        frames = (10 * order + 3).expand(3, -1)
        batches.append({**one, "features": one["features"][:, order], "frame": frames, "total": total})
    settings = {**SETTINGS, "frame_index": "batch.frame", "total_frames": "batch.total"}
    method = ClusterSeed(**settings)
    fit(method, module, batches)
    torch.testing.assert_close(module.head.weight, reference.head.weight)
    # Two cells a video: each has the mean score of two snippets, and frames beyond the end are of the last cell.
    batches[0]["frame"] = batches[0]["frame"] + 10
    coarse = ClusterSeed(**settings, cells_per_video=2)
    fit(coarse, Detector(), batches)
    assert coarse._division.history.count.tolist() == [4.0] * (2 * V)


def test_videos_of_several_lengths() -> None:
    batches = [{**one, "frame": 7 * torch.arange(K).repeat(3, 1), "total": torch.full((3,), 30)} for one in BATCHES]
    cells = [1, 2, 3, 4, 5, 6]
    method = UMIL(
        **{**SETTINGS, "num_videos": None},
        cells_per_video=torch.tensor(cells),
        frame_index="batch.frame",
        total_frames="batch.total",
    )
    assert "cells_per_video=[1, 2, 3, 4, 5, 6]" in repr(method)
    fit(method, Detector(), batches)
    expected = [len({7 * k * n // 30 for k in range(K)}) for n in cells]
    seen = method._division.history.count > 0
    assert [int(part.sum()) for part in seen.split(cells)] == expected


# --- heads only, detector terms, bags of one kind ------------------------------------------------------


def test_a_cosine_head_trains_and_its_prototypes_stay() -> None:
    method, module, plain = UMIL(**SETTINGS, cluster_head="cosine"), Detector(), Detector()
    before = copy.deepcopy(method._built_helpers()["cluster_head"].state_dict())
    fit(method, module)
    fit(None, plain)
    after = method._helpers["cluster_head"].state_dict()
    assert torch.equal(after["prototypes"], before["prototypes"])
    assert not torch.equal(after["linear.weight"], before["linear.weight"])
    assert not same(module, plain)


def test_heads_only_leaves_the_encoder_alone() -> None:
    plain, joint, heads = Detector(), Detector(), Detector()
    # One acting step: later ones would reach the encoder through the changed head and the module's own loss.
    short = {"epochs": 3, "max_steps": 5}
    fit(None, plain, **short)
    fit(ClusterSeed(**SETTINGS), joint, **short)
    method = ClusterSeed(**SETTINGS, update="heads", head="module.head")
    fit(method, heads, **short)
    assert torch.equal(heads.encoder[0].weight, plain.encoder[0].weight)
    assert not torch.equal(joint.encoder[0].weight, plain.encoder[0].weight)
    torch.testing.assert_close(heads.head.weight, joint.head.weight)
    assert not torch.equal(method._helpers["cluster_head"].linear.weight, cluster_head().linear.weight)


def test_a_head_given_as_a_function() -> None:
    first, second = Detector(), Detector()
    fit(ClusterSeed(**SETTINGS, update="heads", head="module.head"), first)
    fit(ClusterSeed(**SETTINGS, update="heads", head=lambda step: step.module.head), second)
    assert same(first, second)


class TwoViews(Detector):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        strong = self(batch["features"].flip(0) * 0.5)
        return super().training_step(batch, batch_idx) + 0 * strong.sum()


def test_detector_terms_act_from_the_first_step_whatever_the_ramp() -> None:
    weights = {
        "weight_margin": 0.3,
        "weight_consistency": 0.5,
        "weight_cluster_consistency": 0.7,
        "weight_smooth": 0.2,
        "weight_sparse": 0.1,
        "weight_detector_cluster": 0.4,
    }
    views = {
        "features": "module.encoder#1",
        "logits": "module#1",
        "strong_features": "module.encoder#0",
        "strong_logits": "module#0",
    }
    method = ClusterSeed(
        **{**SETTINGS, **views}, **weights, add_detector_terms=True, threshold=0.5, cluster_threshold=0.6, ramp_epochs=9
    )
    module = TwoViews()
    run = fit(method, module, epochs=1, max_steps=1)
    hand, head = TwoViews(), cluster_head()
    one = BATCHES[0]
    z = torch.stack([hand.encoder(one["features"]), hand.encoder(one["features"].flip(0) * 0.5)], 1)
    logits = hand.head(z)
    parts = umil_detector_loss(
        logits, head(z), z, one["label"], threshold=0.5, cluster_threshold=0.6, similarity_threshold=0.3
    )
    loss = hand.bag_loss(logits[:, 0], one["label"])
    for name, weight in weights.items():
        loss = loss + weight * getattr(parts, name.removeprefix("weight_").removeprefix("detector_"))
    loss.backward()
    for name, parameter in hand.named_parameters():
        torch.testing.assert_close(module.get_parameter(name), parameter - 0.3 * parameter.grad, msg=name)
    assert {"umil/margin", "umil/detector_cluster", "umil/loss"} <= run.callback_metrics.keys()


@pytest.mark.parametrize("ids", [(1, 3), (0, 2)], ids=["normal", "abnormal"])
def test_batches_of_one_kind_of_bag(ids: tuple[int, int]) -> None:
    module = Detector()
    method = UMIL(**SETTINGS, weight_variance=1.0, add_detector_terms=True, weight_margin=0.0)
    fit(method, module, [batch(*ids), batch(4)])
    assert all(parameter.isfinite().all() for parameter in module.parameters())


# --- logs and warnings ---------------------------------------------------------------------------------


def test_logs() -> None:
    run = fit(ClusterSeed(**SETTINGS, ramp_epochs=4), epochs=4)
    logged = {key: float(value) for key, value in run.callback_metrics.items()}
    terms = {"cluster", "compat", "compat_confident", "confident", "variance"}
    figures = {"ambiguous_fraction", "pseudo_abnormal_fraction", "threshold_normal", "threshold_abnormal"}
    assert set(logged) == {f"umil/{name}" for name in {*terms, *figures, "loss", "ramp", "similar_pairs"}}
    assert logged["umil/ramp"] == 0.5
    assert logged["umil/loss"] == pytest.approx(0.5 * sum(logged[f"umil/{name}"] for name in terms - {"variance"}))
    assert 0 < logged["umil/ambiguous_fraction"] < 1


def test_similar_pairs_are_told_from_the_first_step() -> None:
    run = fit(UMIL(**SETTINGS), Detector(), epochs=1, max_steps=1)
    z = Detector().encoder(BATCHES[0]["features"]).flatten(0, 1)
    cosine = F.cosine_similarity(z[:, None], z[None], dim=-1)
    pairs = [float(cosine[i, j] > 0.3) for i in range(len(z)) for j in range(len(z)) if i != j]
    assert float(run.callback_metrics["umil/similar_pairs"]) == pytest.approx(sum(pairs) / len(pairs))
    silent = fit(UMIL(**SETTINGS, log=False), Detector())
    assert not silent.callback_metrics


def warnings_of(method: UMIL, epochs: int) -> list[str]:
    run = trainer(method, max_epochs=epochs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Detector(), Batches(BATCHES))
    return [str(one.message) for one in caught if "UMIL" in str(one.message)]


def test_too_short_a_training_is_told_once() -> None:
    (message,) = warnings_of(UMIL(**{**SETTINGS, "start_epoch": 3}), 3)
    assert "would start in epoch 3, counted from 0, but the Trainer has max_epochs=3" in message
    (message,) = warnings_of(UMIL(**{**SETTINGS, "start_epoch": 0}), 2)
    assert "would start in epoch 2" in message
    assert not warnings_of(UMIL(**SETTINGS), 3)


# --- state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", ["train", "pass"])
def test_resuming_anywhere_gives_the_same_divisions(history: str, tmp_path: Any) -> None:
    settings = {**SETTINGS, "start_epoch": 3, "history_warmup": 3, "history": history}
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    unbroken, whole = Detector(), ClusterSeed(**settings)
    fit(whole, unbroken, Resumable(BATCHES), epochs=5, callbacks=[saves], enable_checkpointing=True)
    expected = whole.state_dict()["division"]
    for step in (1, 2, 3, 6, 7):
        resumed, method = Detector(), ClusterSeed(**settings)
        fit(method, resumed, Resumable(BATCHES), epochs=5, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert same(resumed, unbroken)
        found = method.state_dict()["division"]
        assert all(torch.equal(found[name], value) for name, value in expected.items())


class Resumable(Batches):
    """Goes on where a checkpoint says."""

    position = 0

    def __iter__(self) -> Any:
        self.position %= len(self.batches)
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Save(Callback):
    """Saves the method's state on every rank, in mid-epoch and at the end."""

    def __init__(self, folder: Any) -> None:
        self.folder = folder

    def _save(self, trainer: Any, when: str) -> None:
        torch.save(trainer.callbacks[0].state_dict()["division"], self.folder / f"{trainer.global_rank}-{when}.pt")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 2 and batch_idx == 0:
            self._save(trainer, "middle")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._save(trainer, "end")


class Shared(Batches):
    """Each rank gets half of every batch, and both get its first bag, as samplers repeat to fill up."""

    def __iter__(self) -> Any:
        if not torch.distributed.is_initialized():
            yield from self.batches
            return
        rank = torch.distributed.get_rank()
        for one in self.batches:
            rows = [0, 1] if rank == 0 else [0, 2]
            yield {name: value[rows] for name, value in one.items()}


@pytest.mark.parametrize("history", ["train", "pass"])
def test_ranks_share_one_history_in_which_a_repeated_bag_counts_once(history: str, tmp_path: Any) -> None:
    frozen = {**SETTINGS, "start_epoch": 9, "history_warmup": 9, "history": history}
    one, two = UMIL(**frozen), UMIL(**frozen)

    class Still(Detector):  # the same scores however the bags are shared out
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    reference, module = Still(), Still()
    for model in (reference, module):
        model.encoder[0].bias.data += 0.1
    fit(one, reference, epochs=3)
    ddp = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    fit(two, module, Shared(BATCHES), epochs=3, callbacks=[Save(tmp_path)], **ddp)
    expected = one.state_dict()["division"]
    for rank in range(2):
        end = torch.load(tmp_path / f"{rank}-end.pt")
        for name, value in expected.items():
            torch.testing.assert_close(end[name], value, msg=name, atol=1e-15, rtol=1e-12)
        if history == "train":
            middle = torch.load(tmp_path / f"{rank}-middle.pt")
            assert middle["history.open_count"].view(V, K)[:3].tolist() == [[2.0] * K, [1.0] * K, [1.0] * K]


def test_a_bag_repeated_in_an_epoch_counts_once() -> None:
    method = UMIL(**SETTINGS)
    fit(method, Detector(), [batch(0, 1, 2, 0), batch(3, 4, 5, 1)], epochs=3)
    assert method._division.history.count.tolist() == [3.0] * (V * K)


def test_videos_that_are_never_seen_are_in_neither_set() -> None:
    method = UMIL(**{**SETTINGS, "num_videos": V + 2})
    fit(method, Detector(), epochs=3)
    assert method._division.pseudo_labels[V * K :].tolist() == [-1] * (2 * K)
    assert not method._division.ambiguous[V * K :].any()


class Bags(Dataset):
    def __len__(self) -> int:
        return V

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"features": FEATURES[index], "label": LABELS[index], "vid": torch.tensor(index)}


def test_the_number_of_videos_is_that_of_the_dataset() -> None:
    method = UMIL(**{**SETTINGS, "num_videos": None})
    fit(method, Detector(), DataLoader(Bags(), batch_size=3, shuffle=True))
    assert len(method._division.history.num_cells) == V
    with pytest.raises(ValueError, match="Expected `num_videos`, since the training dataloader has no dataset"):
        fit(UMIL(**{**SETTINGS, "num_videos": None}), Detector())


def test_a_pass_scores_in_eval_mode() -> None:
    class Dropping(Detector):
        def __init__(self) -> None:
            super().__init__()
            self.encoder.append(nn.Dropout(0.9))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    scores = {}
    for history in ("train", "pass"):
        module, method = Dropping(), UMIL(**SETTINGS, history=history)
        fit(method, module, epochs=2)
        scores[history] = method._division.history
    assert not scores["pass"].m2.any()
    assert (scores["train"].m2 > 0).any()
    expected = Dropping().eval()(FEATURES).softmax(-1)[..., 1].flatten()
    torch.testing.assert_close(scores["pass"].mean, expected)


# --- errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"features": "batch.features"},
            r"`features` at 'batch\.features' .* D = 5 as `in_features` says.*\[3, 4, 3\]",
        ),
        ({"features": lambda step: torch.zeros(2, K, H)}, r"`features` at <.*> .* B = 3 bags"),
        ({"features": lambda step: torch.zeros(7, H)}, r"`features` at"),
        ({"features": "batch.vid"}, "`features` at 'batch.vid'"),
        (
            {"logits": lambda step: step["module.encoder"][:, 1:]},
            r"`logits` at <.*>, for `features` at 'module\.encoder', .*K = 4",
        ),
        ({"logits": lambda step: step["module.encoder"].repeat(1, 1, 2)}, "`logits` at"),
        ({"logits": "output"}, "`logits` at 'output'"),
        ({"logits": "batch.vid"}, "`logits` at 'batch.vid'"),
        ({"bag_labels": "batch.features"}, r"`bag_labels` at 'batch\.features' to be one number a bag"),
        ({"bag_labels": lambda step: 3}, "`bag_labels` at .* an int"),
        ({"bag_ids": lambda step: torch.arange(2)}, r"`bag_ids` at <.*> .* each of the 3 bags of `bag_labels`"),
        ({"bag_ids": lambda step: torch.rand(3)}, "`bag_ids` at .* to be an integer"),
        ({"bag_ids": lambda step: torch.tensor([0, 1, V])}, r"`bag_ids` at <.*>: `video` must lie in \[0, 6\)"),
        ({"bag_ids": lambda step: torch.tensor([0, 1, -1])}, "`bag_ids` at .* got values from -1 to 1"),
        ({"bag_ids": "batch.id"}, r"'batch\.id': batch is a dict of 3"),
        ({"history": "pass", "inputs": "batch.clips", "start_epoch": 9}, r"'batch\.clips': batch is a dict of 3"),
        ({"cells_per_video": 3}, r"Expected 3 snippets a bag at 'module\.encoder', .* but got 4.*`frame_index`"),
        ({"cells_per_video": [4, 4, 4, 4, 4, 5]}, "Expected as many snippets a bag"),
        (
            {"frame_index": lambda step: torch.zeros(3, 2).long(), "total_frames": lambda step: torch.ones(3).long()},
            r"`frame_index` at <.*> to be \[3, 4\], .* got \[3, 2\]",
        ),
        (
            {"strong_features": lambda step: step["module.encoder"][:, :2], "strong_logits": "module"},
            r"`strong_features` at <.*> to be of the shape of `features`",
        ),
        ({"strong_features": "module.encoder", "strong_logits": "batch.vid"}, "`strong_logits` at 'batch.vid'"),
    ],
)
def test_errors_at_the_first_step_leave_the_module_alone(settings: dict[str, Any], message: str) -> None:
    module = Detector()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        fit(UMIL(**{**SETTINGS, **settings}), module)
    assert "training_step" not in vars(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_another_number_of_snippets_later() -> None:
    short = {**batch(3, 4, 5), "features": FEATURES[3:, :2]}
    with pytest.raises(ValueError, match=r"Expected 4 snippets a bag .* but got 2"):
        fit(UMIL(**SETTINGS), Detector(), [BATCHES[0], short])


def test_one_bag_with_two_labels() -> None:
    other = {**batch(0, 1, 3), "label": torch.tensor([1, 1, 0])}
    message = (
        r"`bag_ids` at 'batch\.vid', `bag_labels` at 'batch\.label': video 1 has come with a normal and with an abn"
    )
    with pytest.raises(ValueError, match=message):
        fit(UMIL(**SETTINGS), Detector(), [BATCHES[0], other])


def test_a_head_that_is_no_module() -> None:
    with pytest.raises(ValueError, match=r"`head` at 'module\.head\.weight' to be a module, but it is a Tensor"):
        fit(UMIL(**SETTINGS, update="heads", head="module.head.weight"))
    method = UMIL(**{**SETTINGS, "features": "batch.features", "in_features": D}, update="heads", head="module.encoder")
    with pytest.raises(ValueError, match=r"what `head` at 'module\.encoder' makes of `features` at 'batch\.features'"):
        fit(method)


def test_restoring_with_another_number_of_videos() -> None:
    method = UMIL(**SETTINGS)
    fit(method, Detector(), epochs=1)
    with pytest.raises(ValueError, match="Expected `num_videos` as in the run that is restored, 6"):
        UMIL(**{**SETTINGS, "num_videos": 7}).load_state_dict(method.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"history": "none"}, "`history` must be one of"),
        ({"update": "all"}, "`update` must be one of"),
        ({"update": "heads"}, "Expected `head`"),
        ({"mode": "dot"}, "`mode`"),
        ({"start_epoch": -1}, "`start_epoch`"),
        ({"history_warmup": -1}, "`history_warmup`"),
        ({"ramp_epochs": -1}, "`ramp_epochs`"),
        ({"ratio": 1.0}, r"`ratio` must lie in \[0, 1\)"),
        ({"similarity_threshold": 1.1}, "`similarity_threshold`"),
        ({"threshold": 2.0}, "`threshold`"),
        ({"cluster_threshold": 2.0}, "`cluster_threshold`"),
        ({"weight_compat": -1.0}, "compat weight"),
        ({"weight_smooth": -1.0, "add_detector_terms": True}, "smooth weight"),
        ({"frame_index": "batch.f"}, "`frame_index` and `total_frames` both or neither, but got 'batch.f' and None"),
        ({"strong_logits": "module"}, "`strong_features` and `strong_logits` both or neither"),
        ({"cells_per_video": [4, 4]}, "a number for each of `num_videos`, 6, but it has 2"),
        ({"logits": "modul"}, "Did you mean 'module'"),
        ({"in_features": 0}, "`in_features`"),
        ({"cluster_head": "mlp"}, "`cluster_head`"),
    ],
)
def test_errors_where_the_method_is_written_down(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UMIL(**{**SETTINGS, **settings})

"""`EqSim` against its objective written out by hand, pair by pair."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lightning_methods.callbacks import EqSim
from lightning_methods.functional import eqsim_all_pairs_loss, eqsim_close_far_loss, eqsim_sample_close
from lightning_methods.testing._case import Batches

G = 5
CLOSE = torch.tensor([[1, 4, 2, 1], [0, 3, 3, 0], [3, 4, 0, 1], [2, 4, 1, 0], [3, 3, 2, 0]])  # one partner twice
BATCHES = [
    dict(zip(("image", "text"), torch.randn(2, G, 3, generator=torch.Generator().manual_seed(seed)), strict=True))
    | {"id": torch.tensor([7, 8, 7, 9, 10])}
    for seed in range(2)
]
ONE = BATCHES[:1]
EMBEDDINGS = {"image": "output.image", "text": "output.text"}
SCALED = {**EMBEDDINGS, "logit_scale": "module.logit_scale", "log_scale": True}
SCORES = [f"output.{name}" for name in ("s00", "s01", "s10", "s11")]


class Dual(LightningModule):
    """Two encoders and a task loss that is a mean over pairs; `task` 0 leaves the training to the method."""

    def __init__(self, task: float = 1.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.image_encoder, self.text_encoder = nn.Linear(3, 4).double(), nn.Linear(3, 4).double()
        self.logit_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.task = task

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.image_encoder(batch["image"].double()), self.text_encoder(batch["text"].double())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        image, text = self(batch)
        own = (self.logit_scale.exp() * (image - text).square().sum(1)).mean()
        dots = image @ text.T
        return {
            "loss": self.task * own,
            "image": image,
            "text": text,
            "dots": dots,
            "wide": torch.cat([dots, dots], 1),
            "s00": dots.diagonal(),
            **{f"s{name}": dots[:, shift : shift + 2] for name, shift in (("01", 0), ("10", 1), ("11", 2))},
            "tokens": image[:, None],
            "fewer": text[:-1],
        }

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02)


class Given(EqSim):
    """With partners that are given instead of drawn: each rank its own."""

    partners = (CLOSE,)

    def _draw(self, step: Any, logits: Tensor, anchors: int, exclude: Any) -> Tensor:
        return self.partners[step.trainer.global_rank]


def fit(
    method: Any,
    module: Any = None,
    batches: Any = BATCHES,
    epochs: int = 1,
    seed: int = 1,
    ckpt_path: Any = None,
    **settings: Any,
) -> Trainer:
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": epochs,
            "callbacks": [method] if method else [],
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            **settings,
        }
    )
    loader = Batches(batches, share_out=trainer.world_size > 1)
    trainer.fit(Dual() if module is None else module, loader, ckpt_path=ckpt_path)
    return trainer


def logged(method: EqSim, batches: Any = ONE, **settings: Any) -> dict[str, float]:
    return {name: value.item() for name, value in fit(method, batches=batches, **settings).callback_metrics.items()}


# --- by hand --------------------------------------------------------------------------------------------


def unit(rows: Tensor) -> Tensor:
    return torch.stack([row / row.square().sum().sqrt() for row in rows])


def softmax_of_rows(logits: Tensor) -> Tensor:
    return torch.stack([row.exp() / row.exp().sum() for row in logits])


def criterion(scores: Tensor, pairs: list[tuple[int, int]], margin: float) -> Tensor:
    """Both sides, hinge of the mean."""
    text, image = [], []
    for i, j in pairs:
        a, b = scores[i, i] - scores[i, j], scores[j, j] - scores[j, i]
        c, d = scores[i, i] - scores[j, i], scores[j, j] - scores[i, j]
        text.append((a - b) ** 2)
        image.append((c - d) ** 2)
    return sum(torch.relu(sum(side) / len(side) - margin) for side in (text, image))


def far(scores: Tensor, close: Tensor, not_far: set[tuple[int, int]] = frozenset()) -> Tensor:
    masked = {(i, int(j)) for i, row in enumerate(close) for j in row} | not_far
    pairs = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if not {(i, j), (j, i)} & masked]
    return sum((scores[i, j] - scores[j, i]) ** 2 for i, j in pairs) / len(scores) ** 2 + 0 * scores.sum()


def close_pairs(close: Tensor) -> list[tuple[int, int]]:
    return [(i, int(j)) for i, row in enumerate(close) for j in row]


ALL = list(itertools.combinations(range(G), 2))


def scores_by_hand(module: Dual, image: Tensor, text: Tensor, activation: str | None) -> Tensor:
    cosines = unit(image) @ unit(text).T
    return softmax_of_rows(module.logit_scale.exp() * cosines) if activation else cosines


def mean_square(difference: Tensor) -> Tensor:
    return difference.square().sum() / difference.numel() * len(difference)


HAND = {
    "close_far": lambda s, i, t: 3 * criterion(s, close_pairs(CLOSE), 0.001) + 3 / 2 * torch.relu(far(s, CLOSE) - 1e-4),
    "close_only": lambda s, i, t: 3 * criterion(s, close_pairs(CLOSE), 0.001),
    "all_pairs": lambda s, i, t: 3 * criterion(s, ALL, 0.001),
    "cross_modal": lambda s, i, t: 3 * mean_square(i @ t.T - t @ i.T),
    "in_modal": lambda s, i, t: 3 * mean_square(i @ i.T - t @ t.T),
    "cyclic": lambda s, i, t: 3 * mean_square(i @ t.T - t @ i.T) + 3 * mean_square(i @ i.T - t @ t.T),
}


@pytest.mark.parametrize("activation", ["softmax", None])
@pytest.mark.parametrize("mode", HAND)
def test_two_epochs_by_hand(mode: str, activation: str | None) -> None:
    method = Given(
        **SCALED, mode=mode, activation=activation, weight=3.0, margin=0.001, far_margin=1e-4, far_scale=2.0,
        task_weight=0.5,
    )  # fmt: skip
    module, hand = Dual(), Dual()
    fit(method, module, epochs=2)
    optimizer = hand.configure_optimizers()
    for batch in BATCHES * 2:
        image, text = hand(batch)
        term = HAND[mode](scores_by_hand(hand, image, text, activation), unit(image), unit(text))
        assert term > 0
        optimizer.zero_grad()
        (0.5 * hand.training_step(batch, 0)["loss"] + term).backward()
        optimizer.step()
    torch.testing.assert_close(module.state_dict(), hand.state_dict())


def test_match_scores_by_hand() -> None:
    module, hand = Dual(), Dual()
    fit(EqSim(scores=SCORES, mode="itm", activation="sigmoid", margin=0.0, weight=3.0), module)
    optimizer = hand.configure_optimizers()
    for batch in BATCHES:
        output = hand.training_step(batch, 0)
        s00, s01, s10, s11 = (1 / (1 + (-output[name[7:]]).exp()) for name in SCORES)
        squares = [
            ((s00[n] - s01[n, m]) - (s11[n, m] - s10[n, m])) ** 2
            + ((s00[n] - s10[n, m]) - (s11[n, m] - s01[n, m])) ** 2
            for n in range(G)
            for m in range(2)
        ]
        optimizer.zero_grad()
        (output["loss"] + 3 * sum(squares) / len(squares)).backward()
        optimizer.step()
    torch.testing.assert_close(module.state_dict(), hand.state_dict())


def test_a_matrix_is_taken_as_it_is() -> None:
    dots = Dual().training_step(ONE[0], 0)["dots"].detach()
    for settings in ({"activation": None}, {"activation": "softmax"}):
        found = logged(Given(similarity="output.dots", margin=0.0, **settings))
        expected = eqsim_close_far_loss(dots, CLOSE, margin=0.0, weight=0.5, **settings)
        assert found["eqsim/loss"] == pytest.approx(expected.total.item(), rel=1e-5)
    found = logged(EqSim(similarity="output.wide", mode="all_pairs", margin=0.0))["eqsim/loss"]
    assert found == pytest.approx(eqsim_all_pairs_loss(torch.cat([dots, dots], 1), margin=0.0).item(), rel=1e-5)
    found = logged(EqSim(similarity="output.dots", mode="cross_modal", weight=2.0))["eqsim/loss"]
    assert found == pytest.approx(2 * mean_square(dots - dots.T).item(), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"relative": True},
        {"positive_reg": True},
        {"relative": True, "positive_reg": True, "eps": 0.1},
        {"hinge": "pair", "group_side": True, "text_side": False},
    ],
    ids=str,
)
def test_the_weighted_sum_is_the_functions_total(options: dict[str, Any]) -> None:
    found = logged(Given(**EMBEDDINGS, logit_scale=4.0, weight=3.0, margin=0.0, **options))
    image, text = Dual()(ONE[0])
    logits = 4.0 * unit(image) @ unit(text).T
    expected = eqsim_close_far_loss(logits, CLOSE, weight=3.0, margin=0.0, **options)
    assert found["eqsim/loss"] == pytest.approx(expected.total.item(), rel=1e-5)
    raw = 3.0 if options.get("positive_reg") else 1.0
    assert found["eqsim/far"] == pytest.approx(expected.far.item() / 3.0 * raw, rel=1e-5)


def test_logs_the_terms_and_the_gap() -> None:
    found = logged(Given(**SCALED, weight=3.0, margin=0.0))
    module = Dual()
    scores = scores_by_hand(module, *module(ONE[0]), "softmax")
    gaps = []
    for i, j in close_pairs(CLOSE):
        a, b = scores[i, i] - scores[i, j], scores[j, j] - scores[j, i]
        c, d = scores[i, i] - scores[j, i], scores[j, j] - scores[i, j]
        gaps.append(abs(a - b) + abs(c - d))
    expected = {
        "eqsim/close": criterion(scores, close_pairs(CLOSE), 0.0),
        "eqsim/far": far(scores, CLOSE),
        "eqsim/gap": sum(gaps) / len(gaps),
    }
    expected["eqsim/loss"] = 3 * (expected["eqsim/close"] + expected["eqsim/far"])
    assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)
    assert logged(Given(**SCALED, log=False)) == {}


def test_warm_up_in_steps() -> None:
    assert logged(EqSim(**SCALED, warmup_steps=4), batches=BATCHES)["eqsim/ramp"] == 0.5
    assert "eqsim/ramp" not in logged(EqSim(**SCALED))


def test_an_embedding_without_normalisation_is_a_dot_product() -> None:
    dots = Dual().training_step(ONE[0], 0)["dots"].detach()
    found = logged(EqSim(**EMBEDDINGS, mode="all_pairs", normalize=False, activation=None, margin=0.0))["eqsim/loss"]
    assert found == pytest.approx(eqsim_all_pairs_loss(dots, activation=None, margin=0.0).item(), rel=1e-5)


# --- draws ----------------------------------------------------------------------------------------------


class Watched(EqSim):
    """Keeps what was drawn."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.drawn: list[Tensor] = []

    def _draw(self, *arguments: Any) -> Tensor:
        self.drawn.append(super()._draw(*arguments))
        return self.drawn[-1]


def drawn(seed: int = 1, **settings: Any) -> Tensor:
    method = Watched(**{**EMBEDDINGS, "logit_scale": 1.0, "num_samples": 2, **settings})
    fit(method, batches=ONE * 3, seed=seed)
    return torch.stack(method.drawn)


def test_partners_are_drawn_by_the_logits_also_for_cosines() -> None:
    image, text = Dual()(ONE[0])
    hardest = (unit(image) @ unit(text).T).detach().masked_fill(torch.eye(G, dtype=torch.bool), -math.inf)
    expected = torch.stack([hardest.argmax(0), hardest.argmax(1)], 1)
    for activation in ("softmax", None):
        found = drawn(logit_scale=1e6, num_samples=1, activation=activation)[0]
        assert torch.equal(found, expected)
    assert not torch.equal(drawn(logit_scale=1e-6, num_samples=1)[0], expected)


def test_draws_follow_the_seed_and_differ_from_step_to_step() -> None:
    first = drawn()
    assert torch.equal(drawn(), first)
    assert not torch.equal(drawn(seed=2), first)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], drawn(seed=2)[0])  # nor is one seed the other, shifted


def test_the_modules_random_numbers_are_those_without_the_method() -> None:
    class Noisy(Dual):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen = [*getattr(self, "seen", ()), torch.rand(()).item()]
            return super().training_step(batch, batch_idx)

    with_method, without = Noisy(), Noisy()
    fit(EqSim(**SCALED), with_method)
    fit(None, without)
    assert with_method.seen == without.seen


def test_a_small_batch_takes_what_it_has_and_warns_once() -> None:
    with pytest.warns(UserWarning, match=r"a batch of 5 has 4 other samples, fewer than num_samples=9; 4 are") as found:
        assert drawn(num_samples=9).shape == (3, G, 8)
    assert len([one for one in found if "other samples" in str(one.message)]) == 1


@pytest.mark.filterwarnings("ignore:.*other samples")
@pytest.mark.parametrize("mode", ["close_far", "close_only", "all_pairs"])
def test_a_batch_of_one_pair_adds_nothing(mode: str) -> None:
    alone = [{name: value[:1] for name, value in ONE[0].items()}]
    module, plain = Dual(), Dual()
    found = fit(EqSim(**SCALED, mode=mode, weight=5.0), module, alone).callback_metrics
    fit(None, plain, alone)
    assert found["eqsim/loss"] == 0
    torch.testing.assert_close(module.state_dict(), plain.state_dict())


def test_samples_of_one_id_are_no_mismatch() -> None:
    found = drawn(ids="batch.id", num_samples=4, logit_scale=1e-3)
    for i, row in itertools.product((0, 2), found):
        assert 2 - i not in row[i].tolist()
    equal = {(0, 2), (2, 0)}
    module = Dual()
    scores = scores_by_hand(module, *module(ONE[0]), "softmax")
    expected = far(scores, CLOSE[:, :1], equal)
    Given.partners = (CLOSE[:, :1],)
    try:
        assert logged(Given(**SCALED, ids="batch.id"))["eqsim/far"] == pytest.approx(expected.item(), rel=1e-5)
    finally:
        Given.partners = (CLOSE,)
    expected = criterion(scores, [pair for pair in ALL if pair != (0, 2)], 0.0)
    found = logged(EqSim(**SCALED, ids="batch.id", mode="all_pairs", margin=0.0))["eqsim/all_pairs"]
    assert found == pytest.approx(expected.item(), rel=1e-5)


# --- several processes ----------------------------------------------------------------------------------

PARTNERS = (torch.tensor([[1, 4], [0, 3], [3, 4]]), torch.tensor([[2, 1], [4, 0]]))  # in each rank's own order
ORDERS = ([0, 1, 2, 3, 4], [3, 4, 0, 1, 2])


def on_two(method: EqSim) -> Dual:
    module = Dual(task=0.0)
    fit(method, module, ONE, strategy="ddp_fork", devices=2, use_distributed_sampler=False)
    return module


def changes(module: Dual) -> dict[str, Tensor]:
    before = Dual().state_dict()
    return {name: value - before[name] for name, value in module.state_dict().items()}


@pytest.mark.parametrize("activation", ["softmax", None])
def test_each_rank_compares_its_own_anchors_with_all(activation: str | None) -> None:
    """On batches of 3 and 2: the mean over the ranks of what each sees, its own samples first."""
    method = Given(**SCALED, weight=5.0, margin=0.0, activation=activation)
    method.partners = PARTNERS
    module, hand = on_two(method), Dual()
    losses = []
    for close, order in zip(PARTNERS, ORDERS, strict=True):
        image, text = (rows[order] for rows in hand(ONE[0]))
        scores = scores_by_hand(hand, image, text, activation)
        losses.append(5 * (criterion(scores, close_pairs(close), 0.0) + far(scores, close)))
    optimizer = hand.configure_optimizers()
    (sum(losses) / 2).backward()
    optimizer.step()
    torch.testing.assert_close(module.state_dict(), hand.state_dict())


@pytest.mark.parametrize("mode", ["all_pairs", "cyclic"])
def test_two_processes_do_what_one_does_with_the_joined_batch(mode: str) -> None:
    one, settings = Dual(task=0.0), {**SCALED, "mode": mode, "weight": 5.0, "margin": 0.0}
    fit(EqSim(**settings), one, ONE)
    torch.testing.assert_close(on_two(EqSim(**settings)).state_dict(), one.state_dict())
    assert max(change.abs().max() for change in changes(one).values()) > 1e-3


def test_as_released_the_encoders_get_half_of_the_gradient() -> None:
    settings = {**SCALED, "mode": "cyclic", "weight": 5.0}
    one = Dual(task=0.0)
    fit(EqSim(**settings), one, ONE)
    half = {name: change / 2 for name, change in changes(one).items()}
    torch.testing.assert_close(changes(on_two(EqSim(**settings, gather_grad=False))), half)


@pytest.mark.parametrize("gather", [True, False])
def test_pairs_of_the_own_batch(gather: bool) -> None:
    """As released: other ranks' texts in the softmax alone, and without gradient; or not at all."""
    settings = {"gather_grad": False} if gather else {"gather": False}
    module, hand = on_two(EqSim(**SCALED, mode="all_pairs", weight=5.0, margin=0.0, **settings)), Dual()
    losses = []
    for order, size in zip(ORDERS, (3, 2), strict=True):
        image, text = (rows[order] for rows in hand(ONE[0]))
        text = torch.cat([text[:size], text[size:].detach()]) if gather else text[:size]
        scores = scores_by_hand(hand, image[:size], text, "softmax")
        losses.append(5 * criterion(scores, list(itertools.combinations(range(size), 2)), 0.0))
    optimizer = hand.configure_optimizers()
    (sum(losses) / 2).backward()
    optimizer.step()
    torch.testing.assert_close(module.state_dict(), hand.state_dict())


class Save(Callback):
    def __init__(self, folder: Any) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(trainer.callbacks[0].drawn, self.folder / f"{trainer.global_rank}.pt")


def test_ranks_draw_for_themselves(tmp_path: Any) -> None:
    same = [{name: torch.cat([value[:2], value[:2]]) for name, value in ONE[0].items() if name != "id"}]
    method = Watched(**EMBEDDINGS, logit_scale=1e-3, num_samples=2)
    fit(method, None, same * 4, strategy="ddp_fork", devices=2, use_distributed_sampler=False, callbacks=[
        method, Save(tmp_path),
    ])  # fmt: skip
    first, second = (torch.stack(torch.load(tmp_path / f"{rank}.pt")) for rank in range(2))
    assert first.shape == second.shape == (4, 2, 4)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("settings", "exact"),
    [
        ({**EMBEDDINGS}, False),
        ({**EMBEDDINGS, "mode": "close_only"}, False),
        ({**EMBEDDINGS, "mode": "all_pairs"}, True),
        ({**EMBEDDINGS, "mode": "all_pairs", "gather": False}, False),
        ({**EMBEDDINGS, "mode": "all_pairs", "gather_grad": False}, False),
        ({**EMBEDDINGS, "mode": "in_modal"}, True),
        ({"similarity": "output.dots", "mode": "all_pairs"}, False),
        ({"scores": SCORES, "mode": "itm"}, False),
        ({"scores": SCORES, "mode": "itm", "margin": 0.0}, True),
        ({"scores": SCORES, "mode": "itm", "hinge": "pair"}, True),
        ({"scores": SCORES, "mode": "itm", "margin": 0.0, "activation": "linear"}, False),
    ],
)
def test_says_whether_the_number_of_processes_matters(settings: dict[str, Any], exact: bool) -> None:
    assert EqSim(**settings).exact_over_ranks == exact


# --- what can go wrong ----------------------------------------------------------------------------------


def test_embeddings_of_length_0_stay_finite() -> None:
    for mode in ("close_far", "all_pairs", "cyclic"):
        module = Dual(task=0.0)
        with torch.no_grad():
            module.image_encoder.bias.zero_()
        dead = [{**ONE[0], "image": ONE[0]["image"] * (torch.arange(G) != 2)[:, None]}]
        found = fit(EqSim(**SCALED, mode=mode, margin=0.0), module, dead).callback_metrics
        assert math.isfinite(found["eqsim/loss"])
        assert found["eqsim/loss"] > 0
        assert all(value.isfinite().all() and value.abs().max() < 10 for value in module.state_dict().values())


def test_without_a_scale_there_is_a_warning_and_clips_default() -> None:
    for settings in ({}, {"activation": None}, {"mode": "all_pairs"}):
        method = Given(**EMBEDDINGS, margin=0.0, **settings)
        with pytest.warns(UserWarning, match=r"EqSim|Given.*has no `logit_scale`.*1/0\.07"):
            found = logged(method)["eqsim/loss"]
        assert found == pytest.approx(
            logged(Given(**EMBEDDINGS, margin=0.0, logit_scale=1 / 0.07, **settings))["eqsim/loss"]
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*logit_scale")
        for settings in ({"mode": "all_pairs", "activation": None}, {"mode": "cyclic"}, {"logit_scale": 1.0}):
            logged(Given(**EMBEDDINGS, **settings))


@pytest.mark.parametrize("scale", [math.log(7.0), "module.logit_scale", lambda step: torch.tensor([math.log(7.0)])])
def test_scales_as_numbers_parameters_and_functions(scale: Any) -> None:
    class Seven(Dual):
        def __init__(self) -> None:
            super().__init__()
            nn.init.constant_(self.logit_scale, math.log(7.0))

    method = EqSim(**EMBEDDINGS, mode="all_pairs", margin=0.0, logit_scale=scale, log_scale=True)
    found = fit(method, Seven(), ONE).callback_metrics["eqsim/loss"].item()
    assert found == pytest.approx(
        logged(EqSim(**EMBEDDINGS, mode="all_pairs", margin=0.0, logit_scale=7.0))["eqsim/loss"]
    )


def test_resuming_with_other_settings_is_said(tmp_path: Any) -> None:
    path = tmp_path / "last.ckpt"
    fit(EqSim(**SCALED), enable_checkpointing=True, default_root_dir=tmp_path).save_checkpoint(path)
    with pytest.warns(
        UserWarning, match=r"Resuming with EqSim\(.*margin=0\.3.*but the checkpoint was written with EqSim"
    ):
        fit(EqSim(**SCALED, margin=0.3), epochs=2, ckpt_path=path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Resuming with")
        fit(EqSim(**SCALED), epochs=2, ckpt_path=path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": "output.tokens"}, r"`image` at 'output\.tokens' to be embeddings \(B, D\).*\[5, 1, 4\]"),
        ({"text": "batch.id"}, r"`text` at 'batch\.id' to be embeddings"),
        ({"text": "output.fewer"}, r"`image` at 'output\.image' is \[5, 4\] and `text` at 'output\.fewer' is \[4, 4\]"),
        ({"text": "output.wide"}, r"is \[5, 4\] and `text` at 'output\.wide' is \[5, 10\]"),
        ({"text": "output.txt"}, "output.txt"),
        ({"logit_scale": "module.image_encoder.bias"}, r"`logit_scale` at 'module\.image_encoder\.bias'.*\[4\]"),
        ({"ids": "batch.image"}, r"`ids` at 'batch\.image' to be integers \(5,\)"),
        ({"ids": "output.fewer"}, r"`ids` at 'output\.fewer'"),
    ],
)
def test_errors_at_the_first_step_name_the_address(settings: dict[str, Any], message: str) -> None:
    module = Dual()
    with pytest.raises(ValueError, match=message):
        fit(EqSim(**{**SCALED, **settings}), module)
    assert "training_step" not in vars(module)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"similarity": "output.wide"}, r"`similarity` at 'output\.wide' to be \(B, B\).*\[5, 10\]"),
        ({"similarity": "output.s00"}, r"`similarity` at 'output\.s00' to be a matrix.*\[5\]"),
        (
            {"similarity": lambda step: step["output.wide"].T, "mode": "all_pairs"},
            r"\(B, G\) with more texts.*\[10, 5\]",
        ),
        ({"scores": [SCORES[0], SCORES[0], *SCORES[2:]], "mode": "itm"}, r"`scores` to be s00 \(N,\).*'output\.s11'"),
        ({"scores": SCORES[1:] + SCORES[:1], "mode": "itm"}, r"`scores` to be s00 \(N,\)"),
        ({"scores": ["batch.id"] * 4, "mode": "itm"}, r"`scores` to be s00 \(N,\)"),
    ],
)
def test_errors_of_matrices_and_scores(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(EqSim(**settings))


@pytest.mark.parametrize("mode", ["close_far", "all_pairs"])
def test_probabilities_are_not_taken_for_logits(mode: Any) -> None:
    def probabilities(step: Any) -> Tensor:
        return step["output.dots"].softmax(1)

    module = Dual()
    with pytest.raises(ValueError, match=r"logits as `similarity` at .*these are probabilities.*activation=None"):
        fit(EqSim(similarity=probabilities, mode=mode), module)
    assert "training_step" not in vars(module)
    torch.testing.assert_close(module.state_dict(), Dual().state_dict(), rtol=0, atol=0)
    # Their logarithms are logits; and where no softmax is taken, probabilities are scores like others.
    fit(EqSim(similarity=lambda step: probabilities(step).log(), mode=mode))
    fit(EqSim(similarity=probabilities, mode=mode, activation=None))
    fit(EqSim(similarity=probabilities, mode="cross_modal"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"`image` and `text`, or `similarity`, or `scores`, but got none of them"),
        ({"image": "batch.0"}, r"but got `image`\."),
        ({"text": "batch.0"}, r"but got `text`\."),
        ({**EMBEDDINGS, "similarity": "output"}, r"but got `image` and `text` and `similarity`"),
        ({"scores": SCORES}, r"`scores` with mode 'itm'.*'close_far'"),
        ({**EMBEDDINGS, "mode": "itm"}, r"`scores` with mode 'itm'"),
        ({"scores": SCORES[:3], "mode": "itm"}, "four addresses as `scores`"),
        ({"similarity": "output", "mode": "cyclic"}, r"`mode` 'cyclic' compares images with images"),
        ({**EMBEDDINGS, "mode": "cyclic", "ids": "batch.id"}, r"'cyclic' makes no use of `ids`"),
        ({"similarity": "output", "logit_scale": 3.0}, "`logit_scale` multiplies cosines"),
        ({**EMBEDDINGS, "logit_scale": 0.0}, r"`logit_scale` to be positive, but got 0\.0"),
        ({**EMBEDDINGS, "log_scale": True}, "there is no `logit_scale`"),
        ({**EMBEDDINGS, "mode": "hard_itc"}, "`mode` must be one of.*'hard_itc'"),
        ({**EMBEDDINGS, "activation": "sigmoid"}, r"`activation` must be one of \('softmax',\)"),
        ({"scores": SCORES, "mode": "itm", "activation": "tanh"}, "`activation` must be one of.*'linear'"),
        ({**EMBEDDINGS, "num_samples": 0}, "`num_samples`"),
        ({**EMBEDDINGS, "margin": -1.0}, "`margin`"),
        ({**EMBEDDINGS, "far_margin": -1.0}, "`far_margin`"),
        ({**EMBEDDINGS, "far_scale": 0.0}, "`far_scale`"),
        ({**EMBEDDINGS, "weight": -1.0}, "weight"),
        ({**EMBEDDINGS, "weight": -1.0, "positive_reg": True}, "weight"),
        ({**EMBEDDINGS, "hinge": "max"}, "`hinge`"),
        ({**EMBEDDINGS, "text_side": False, "image_side": False}, "at least one of"),
        ({**EMBEDDINGS, "warmup_steps": -1}, "length"),
        ({**EMBEDDINGS, "text": "outptu.text"}, "Did you mean 'output'"),
    ],
)
def test_errors_where_the_method_is_written_down(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EqSim(**settings)


def test_it_draws_as_the_function_does() -> None:
    """The method's own generator, and nothing else, stands between it and `eqsim_sample_close`."""
    image, text = Dual()(ONE[0])
    logits = unit(image) @ unit(text).T
    seed_everything(1, verbose=False)
    generator = torch.Generator().manual_seed(torch.initial_seed() * 2**20)
    assert torch.equal(drawn()[0], eqsim_sample_close(logits, num_samples=2, generator=generator))

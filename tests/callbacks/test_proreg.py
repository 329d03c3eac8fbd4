"""`ProReg` against its objective written out by hand, and what it says about its prompts."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods.attach import computed
from lightning_methods.callbacks import ProReg
from lightning_methods.testing._case import Batches

K, D = 4, 5
_GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 6, generator=_GENERATOR, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 3] * 3)
PROMPTS = 2 * torch.randn(12, K, generator=_GENERATOR, dtype=torch.float64) + 2 * F.one_hot(Y, K)
TEXT = torch.randn(K, D, generator=_GENERATOR, dtype=torch.float64)
ROWS = [slice(6), slice(6, 12)]
SCALE = 4.0


def batches(target: Tensor = Y) -> list[dict[str, Tensor]]:
    return [{"image": X[rows], "label": target[rows], "prompt_logits": PROMPTS[rows]} for rows in ROWS]


class Student(LightningModule):
    """An encoder under a cosine head that begins as the text features."""

    def __init__(self, penalty: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.visual = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, D)).double()
        self.head = nn.Parameter(TEXT.clone())
        self.penalty = penalty

    def forward(self, x: Tensor) -> Tensor:
        return SCALE * F.normalize(self.visual(x), dim=1) @ F.normalize(self.head, dim=1).T

    def own_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.numel() == len(target):
            target = target.flatten().long()
        return F.cross_entropy(logits, target) + self.penalty * self.head.square().sum()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.own_loss(self(batch["image"]), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def proreg(**settings: Any) -> ProReg:
    if "snapshot" not in settings:
        settings = {"prompt": "batch.prompt_logits", **settings}
    return ProReg(**{"target": "batch.label", **settings})


QUIET = {
    "max_epochs": 2,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}


def fit(method: Any, module: Any = None, data: Any = None, **settings: Any) -> Any:
    """Fits for two epochs; anything but Lightning's own advice is an error."""
    trainer = Trainer(**{**QUIET, "callbacks": [method] if method else [], **settings.pop("trainer", {})})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ProReg")
        trainer.fit(module or Student(), Batches(batches() if data is None else data), **settings)
    return trainer


def plain_loss(
    logits: Tensor, prompts: Tensor, target: Tensor, weighting: str, alpha: float, temperature: float
) -> Tensor:
    """The objective, one sample at a time, with torch's own losses."""
    total: Any = 0.0
    for z, m, y in zip(logits, prompts.detach(), target, strict=True):
        ce, pe = F.cross_entropy(z, y), F.cross_entropy(m, y)
        p, q = (-ce).exp().item(), (-pe).exp().item()
        w = {
            "probability": q / (p + q + 1e-5),
            "loss": ce.item() / (ce.item() + pe.item() + 1e-5),
            "constant": 0.5,
        }[weighting]
        kl = temperature**2 * F.cross_entropy(z / temperature, (m / temperature).softmax(0))
        total = total + (1 - w) * ce + alpha * w * kl
    return total / len(logits)


def by_hand(prompts_of: Any, weighting: str = "probability", alpha: float = 1.0, temperature: float = 1.0) -> Student:
    module = Student()
    optimizer = module.configure_optimizers()
    for _ in range(2):
        for rows in ROWS:
            loss = plain_loss(module(X[rows]), prompts_of(rows), Y[rows], weighting, alpha, temperature)
            loss = loss + module.penalty * module.head.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return module


def assert_same(first: nn.Module, second: nn.Module, **tolerance: float) -> None:
    for (name, value), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("weighting", ["probability", "loss", "constant"])
@pytest.mark.parametrize("loss", ["replace", "add"])
def test_two_epochs_by_hand(loss: str, weighting: str, temperature: float) -> None:
    module = Student()
    fit(proreg(loss=loss, weighting=weighting, temperature=temperature, alpha=1.7), module)
    assert_same(module, by_hand(PROMPTS.__getitem__, weighting, 1.7, temperature))


def test_add_keeps_the_other_terms_and_replace_drops_them_with_a_warning() -> None:
    kept, replaced, plain = Student(penalty=0.1), Student(penalty=0.1), Student()
    fit(proreg(loss="add"), kept)
    with pytest.warns(UserWarning, match=r"replaces the module's loss, .*loss='add' keeps it"):
        Trainer(**QUIET, callbacks=[proreg()]).fit(replaced, Batches(batches()))
    fit(proreg(), plain)
    assert_same(replaced, plain)
    hand = Student(penalty=0.1)
    optimizer = hand.configure_optimizers()
    for _ in range(2):
        for rows in ROWS:
            loss = plain_loss(hand(X[rows]), PROMPTS[rows], Y[rows], "probability", 1.0, 1.0)
            optimizer.zero_grad()
            (loss + 0.1 * hand.head.square().sum()).backward()
            optimizer.step()
    assert_same(kept, hand)


def test_add_is_replace_where_samples_are_ignored() -> None:
    target = Y.clone()
    target[[1, 4, 7]] = -100
    modules = Student(), Student()
    for module, loss in zip(modules, ("replace", "add"), strict=True):
        fit(proreg(loss=loss), module, batches(target))
    assert_same(*modules)
    kept = [row for row in range(6) if target[row] >= 0]
    first, hand = Student(), Student()
    fit(proreg(), first, batches(target), trainer={"max_steps": 1})
    optimizer = hand.configure_optimizers()
    plain_loss(hand(X[kept]), PROMPTS[kept], Y[kept], "probability", 1.0, 1.0).backward()
    optimizer.step()
    assert_same(first, hand)


# --- where prompt logits come from ------------------------------------------------------------------


def zero_shot(start: Student) -> Any:
    frozen = copy.deepcopy(start)
    return lambda x: frozen(x)


SOURCES = {
    "text features": lambda: proreg(snapshot="module.visual", text_features=TEXT, logit_scale=SCALE),
    "their address": lambda: proreg(snapshot="module.visual", text_features="module.head", logit_scale=SCALE),
    "the whole model": lambda: proreg(snapshot="module"),
    "a module": lambda: proreg(prompt=Student(), inputs="batch.image"),
    "a function": lambda: proreg(prompt=zero_shot(Student()), inputs="batch.image"),
    "an address of its own": lambda: proreg(prompt=lambda x: Student()(x).detach(), inputs="module@input"),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=list(SOURCES))
def test_prompt_logits_are_those_of_the_starting_model(source: Any) -> None:
    module, start = Student(), Student()
    fit(source(), module)
    assert_same(module, by_hand(lambda rows: start(X[rows])))
    assert (module.head - start.head).abs().max() > 0.01


def test_prompt_logits_with_a_gradient_are_detached() -> None:
    class Both(Student):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "zero_shot": self.scale * batch["prompt_logits"]}

    module = Both()
    fit(proreg(prompt="output.zero_shot"), module)
    assert module.scale == 1
    assert_same(module.visual, by_hand(PROMPTS.__getitem__).visual)


def test_a_snapshot_sees_what_its_submodule_sees_and_never_trains() -> None:
    class Noisy(Student):
        """Augments in its step, normalises by batches and drops features."""

        def __init__(self) -> None:
            super().__init__()
            self.visual = nn.Sequential(self.visual, nn.BatchNorm1d(D).double(), nn.Dropout(0.5))
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x + torch.randn_like(x))
            return super().forward(self.seen[-1])

    method, module, start = proreg(snapshot="module.visual", text_features=TEXT), Noisy(), Noisy().eval()
    asked: list[Tensor] = []
    told: list[Tensor] = []

    def listen(_module: Any, args: Any, output: Tensor) -> None:
        asked.append(args[0])
        told.append(output)

    class Listen(ProReg):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            self.teacher.network.train()
            self.handle = self.teacher.network.register_forward_hook(listen)

    method.__class__ = Listen
    fit(method, module)
    assert len(asked) == 4
    assert all(torch.equal(one, other) for one, other in zip(asked, module.seen, strict=True))
    cosines = [100 * F.normalize(start.visual(x), dim=1) @ F.normalize(TEXT, dim=1).T for x in asked]
    torch.testing.assert_close(told, [value.detach() for value in cosines])
    assert not any(value.requires_grad for value in told)


class Wrapped(nn.Module):
    """Takes named arguments and returns several things, as in transformers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *, pixels: Tensor, gain: float) -> dict[str, Tensor]:
        return {"hidden": pixels, "embeds": gain * self.net(pixels)}


class Named(Student):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Wrapped(self.visual)

    def forward(self, x: Tensor) -> Tensor:
        features = self.visual(pixels=x, gain=2.0)["embeds"]
        return SCALE * F.normalize(features, dim=1) @ F.normalize(self.head, dim=1).T


def test_a_snapshot_takes_named_arguments_and_gives_an_item() -> None:
    module, start = Named(), Student()
    fit(proreg(snapshot="module.visual:embeds", text_features=TEXT, logit_scale=SCALE), module)
    hand = by_hand(lambda rows: start(X[rows]))
    torch.testing.assert_close(module.head, hand.head)
    torch.testing.assert_close(module.visual.net[0].weight, hand.visual[0].weight)


class Loaded(Student):
    """Gets its pretrained weights in `setup`, which runs after the callbacks' own."""

    def setup(self, stage: str) -> None:
        torch.manual_seed(7)
        for parameter in self.visual.parameters():
            nn.init.normal_(parameter)


@pytest.mark.parametrize("kind", [Student, Loaded])
def test_a_resumed_run_keeps_the_snapshot_of_the_first(kind: Any, tmp_path: Any) -> None:
    def build() -> ProReg:
        return proreg(snapshot="module.visual", text_features="module.head")

    start = kind()
    if kind is Loaded:
        start.setup("fit")
    unbroken, module = build(), kind()
    fit(unbroken, module)
    assert_same(unbroken.teacher.network.encoder.source, start.visual)

    half, tuned = build(), kind()
    fit(half, tuned, trainer={"max_epochs": 1}).save_checkpoint(tmp_path / "half.ckpt")
    resumed, again = build(), kind()
    again.head.data.fill_(9.0)  # the address is read before the checkpoint is: the saved one must win
    fit(resumed, again, ckpt_path=tmp_path / "half.ckpt")
    assert_same(resumed.teacher.network, unbroken.teacher.network, rtol=0, atol=0)
    assert_same(again, module, rtol=0, atol=0)
    assert (tuned.visual[0].weight - start.visual[0].weight).abs().max() > 0.01


def test_a_snapshot_outlives_its_run() -> None:
    method, module, start = proreg(snapshot="module"), Student(), Student()
    fit(method, module)
    fit(method, module)
    assert_same(method.teacher.network.source, start)


def test_a_checkpoint_without_a_snapshot(tmp_path: Any) -> None:
    """It is restored after `setup`: what was copied there is untouched, what is copied later deserves a warning."""
    fit(None, Loaded(), trainer={"max_epochs": 1}).save_checkpoint(tmp_path / "plain.ckpt")
    method = proreg(snapshot="module.visual", text_features=TEXT)
    fit(method, Student(), ckpt_path=tmp_path / "plain.ckpt")
    assert_same(method.teacher.network.encoder.source, Student().visual)
    with pytest.raises(UserWarning, match=r"copies 'module\.visual' after .*plain\.ckpt was restored"):
        fit(proreg(snapshot="module.visual", text_features=TEXT), Loaded(), ckpt_path=tmp_path / "plain.ckpt")


def test_a_snapshot_that_does_not_fit_the_module_any_more(tmp_path: Any) -> None:
    fit(proreg(snapshot="module"), trainer={"max_epochs": 1}).save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match=r"(?s)snapshot does not fit what `snapshot` names now.*encoder"):
        fit(proreg(snapshot="module.visual", text_features=TEXT), ckpt_path=tmp_path / "half.ckpt")


def classifier(seed: int = 3, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, K)).to(dtype)


@pytest.mark.filterwarnings("ignore:.*worse than chance")
def test_another_classifier_on_resuming_is_noticed(tmp_path: Any) -> None:
    def build(**other: Any) -> ProReg:
        return proreg(prompt=classifier(**other), inputs="batch.image", name="tuning")

    def resume(method: ProReg) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = Trainer(**QUIET, callbacks=[method])
            trainer.fit(Student(), Batches(batches()), ckpt_path=tmp_path / "half.ckpt")
        return [str(one.message) for one in caught if "another prompt classifier" in str(one.message)]

    trainer = Trainer(**{**QUIET, "max_epochs": 1}, callbacks=[build()])
    trainer.fit(Student(), Batches(batches()))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["ProReg[tuning]"]
    assert state["snapshot"] is None
    assert state["fingerprint"][0] == sum(value.numel() for value in classifier().state_dict().values())
    assert not resume(build())
    assert len(resume(build(seed=4))) == 1
    moved = build()
    moved.teacher.network[1].running_mean += 1  # buffers count
    assert len(resume(moved)) == 1
    assert not resume(proreg(name="tuning"))  # precomputed logits have none


# --- what it says -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["replace", "add"])
def test_logs(loss: str) -> None:
    logged = fit(proreg(loss=loss, alpha=2.0, log="epoch"), trainer={"max_steps": 1}).callback_metrics
    module, rows = Student(), ROWS[0]
    logits, prompts, target = module(X[rows]), PROMPTS[rows], Y[rows]
    ce = F.cross_entropy(logits, target, reduction="none").detach()
    p, q = (value.softmax(1)[range(6), target].detach() for value in (logits, prompts))
    w = q / (p + q + 1e-5)
    label = ((1 - w if loss == "replace" else -w) * ce).mean()
    prompt = (w * F.cross_entropy(logits, prompts.softmax(1), reduction="none").detach()).mean()
    expected = {
        "label": label,
        "prompt": prompt,
        "loss": label + 2 * prompt,
        "cross_entropy": ce.mean(),
        "weight": w.mean(),
        "prompt_accuracy": (prompts.argmax(1) == target).double().mean(),
    }
    assert 0 < expected["prompt_accuracy"] < 1
    found = {name.removeprefix("proreg/"): value for name, value in logged.items() if name.count("/") == 1}
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6, msg=name)


def permuted(step: Any) -> Tensor:
    prompts: Tensor = step["batch.prompt_logits"]
    return prompts.roll(1, dims=1)


def test_prompts_in_another_order_are_noticed() -> None:
    with pytest.raises(UserWarning, match=r"right on \d of 12 samples .*worse than chance with 4 classes"):
        fit(proreg(prompt=computed(permuted)))


def test_chance_is_counted_over_the_epoch_and_without_ignored_samples() -> None:
    right = F.one_hot(Y, K).double()
    none = right.roll(1, dims=1)

    def data(prompts: Tensor, target: Tensor = Y) -> list[dict[str, Tensor]]:
        return [{"image": X[r], "label": target[r], "prompt_logits": 3 * prompts[r]} for r in ROWS]

    half = torch.cat([none[:6], right[6:9], none[9:]])
    fit(proreg(), data=data(half))  # none of 6, then 3 of 6: 3 of 12 is chance
    some = torch.cat([none[:6], right[6:8], none[8:]])
    with pytest.raises(UserWarning, match="right on 2 of 12"):
        fit(proreg(), data=data(some))
    ignored = Y.clone()
    ignored[8:] = -100
    fit(proreg(), data=data(some, ignored))  # 2 of 8
    fit(proreg(), data=data(half, F.one_hot(Y, K).double()))  # soft labels
    with pytest.raises(UserWarning, match="right on 2 of 12"):
        fit(proreg(), data=data(some, F.one_hot(Y, K).double()))


# --- targets, errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored",
    [lambda y: y[:, None], lambda y: y.double(), lambda y: y.to(torch.int32), lambda y: F.one_hot(y, K).double()],
    ids=["column", "float", "int32", "soft"],
)
def test_targets_as_they_come(stored: Any) -> None:
    module = Student()
    fit(proreg(), module, [{**batch, "label": stored(batch["label"])} for batch in batches()])
    assert_same(module, by_hand(PROMPTS.__getitem__))


def probabilities(step: Any) -> Tensor:
    logits: Tensor = step["module"]
    return logits.softmax(1)


def changed(**values: Any) -> list[dict[str, Any]]:
    return [{**batch, **{name: change(batch) for name, change in values.items()}} for batch in batches()]


AT_THE_FIRST_STEP = {
    "probabilities as prompts": (
        {},
        changed(prompt_logits=lambda batch: batch["prompt_logits"].softmax(1).to(torch.bfloat16)),
        r"Expected logits as `prompt` .*sums to 1: these are probabilities",
    ),
    "probabilities as logits": (
        {"logits": computed(probabilities, "module")},
        None,
        "Expected logits as `logits`",
    ),
    "other classes": (
        {},
        changed(prompt_logits=lambda batch: batch["prompt_logits"][:, :3]),
        r"`logits` at 'module' are \[6, 4\] and `prompt` at 'batch\.prompt_logits' are \[6, 3\]",
    ),
    "other samples": (
        {},
        changed(prompt_logits=lambda batch: batch["prompt_logits"][:3]),
        r"`logits` at 'module' are \[6, 4\] and `prompt` at 'batch\.prompt_logits' are \[3, 4\]",
    ),
    "another classifier": (
        {"prompt": nn.Linear(6, 9).double(), "inputs": "batch.image"},
        None,
        r"\[6, 4\] and `prompt` at 'teacher' are \[6, 9\]",
    ),
    "no logits": ({"logits": "output"}, None, r"`logits` at 'output' to be floating logits .*shape \[\]"),
    "indices as prompts": ({"prompt": "batch.label"}, None, r"`prompt` at 'batch\.label' to be floating logits"),
    "image as target": (
        {"target": "batch.image"},
        None,
        r"`target` at 'batch\.image' .*\[6\] or soft labels .*\[6, 4\]",
    ),
    "one-hot integers": (
        {"target": lambda step: F.one_hot(step.batch["label"], K)},
        None,
        "class indices of shape .* or soft labels",
    ),
    "class out of range": ({"target": lambda step: step.batch["label"] + 1}, None, r"`target` .*\[0, 4\), got 4"),
    "no such key": ({"prompt": "batch.prompts"}, None, r"'batch\.prompts': batch is a dict of 3.*'prompt_logits'"),
}


@pytest.mark.parametrize(("settings", "data", "message"), AT_THE_FIRST_STEP.values(), ids=list(AT_THE_FIRST_STEP))
def test_errors_at_the_first_step_leave_the_module_alone(settings: Any, data: Any, message: str) -> None:
    module = Student()
    with pytest.raises(ValueError, match=message):
        fit(proreg(**settings), module, data)
    assert "training_step" not in vars(module)
    assert_same(module, Student(), rtol=0, atol=0)


def test_rows_that_only_sum_to_one_are_logits() -> None:
    def shift(batch: Any) -> Tensor:
        prompts = batch["prompt_logits"]
        return prompts - (prompts.sum(1, keepdim=True) - 1) / K

    module = Student()
    fit(proreg(), module, changed(prompt_logits=shift))
    assert_same(module, by_hand(PROMPTS.__getitem__))


WHERE_IT_IS_WRITTEN_DOWN = {
    "no prompts": ({"prompt": None}, "either `prompt` or `snapshot`"),
    "two": ({"snapshot": "module", "prompt": "batch.2"}, "either `prompt` or `snapshot`"),
    "features of a classifier": ({"text_features": TEXT}, "`text_features` only with `snapshot`"),
    "a snapshot of the batch": ({"snapshot": "batch.image"}, r"`snapshot` to name a submodule.*'batch\.image'"),
    "a snapshot of an input": ({"snapshot": "module.visual@input"}, "`snapshot` to name a submodule"),
    "features in the batch": ({"snapshot": "module", "text_features": "batch.0"}, "`text_features` to be a Tensor, or"),
    "loss": ({"loss": "both"}, "`loss`"),
    "weighting": ({"weighting": "entropy"}, "`weighting`"),
    "alpha": ({"alpha": -1.0}, "`alpha`"),
    "gamma": ({"gamma": 0.0}, "`gamma`"),
    "prompt_power": ({"prompt_power": -1.0}, "`prompt_power`"),
    "temperature": ({"temperature": 0.0}, "`temperature`"),
    "constant_weight": ({"constant_weight": 1.5}, "`constant_weight`"),
    "eps": ({"eps": -1e-5}, "`eps`"),
    "logit_scale": ({"logit_scale": 0.0}, "`logit_scale`"),
    "an address": ({"logits": "modul"}, "Did you mean 'module'"),
}


@pytest.mark.parametrize(("settings", "message"), WHERE_IT_IS_WRITTEN_DOWN.values(), ids=list(WHERE_IT_IS_WRITTEN_DOWN))
def test_errors_where_the_method_is_written_down(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        proreg(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"snapshot": "module.visal"}, "Did you mean 'visual'"),
        ({"snapshot": "module.head"}, "`snapshot` to name a submodule, but 'module.head' is a Tensor|a Parameter"),
        ({"snapshot": "module.visual", "text_features": "module.visual"}, "`text_features` to name a parameter"),
        ({"snapshot": "module.visual", "text_features": TEXT[:, :3]}, "number of columns .* 5 .* got 3"),
        ({"snapshot": "module.visual", "text_features": TEXT[0]}, r"`features` must be .*\(K, D\)"),
    ],
)
def test_errors_of_a_snapshot_leave_the_module_alone(settings: dict[str, Any], message: str) -> None:
    module = Student()
    with pytest.raises(ValueError, match=message):
        fit(proreg(**settings), module)
    assert "training_step" not in vars(module)
    assert_same(module, Student(), rtol=0, atol=0)


def test_reads_like_the_constructor_call() -> None:
    method = proreg(snapshot="module.visual", text_features=TEXT, alpha=2.0)
    text = (
        "ProReg(target='batch.label', inputs='module.visual@input', snapshot='module.visual', "
        "text_features=Tensor(4, 5), alpha=2.0)"
    )
    assert repr(method) == text
    fit(method)
    assert repr(method) == text
    assert repr(proreg(prompt=nn.Linear(2, 2))) == "ProReg(target='batch.label', prompt=Linear(...), inputs='batch.0')"

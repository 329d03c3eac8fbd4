"""Where ProReg's prompt logits come from, and what is kept of it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from proreg_student import PROMPTS, QUIET, SCALE, TEXT, D, K, Student, X, assert_same, batches, by_hand, fit, proreg
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods.callbacks import ProReg
from lightning_methods.testing._case import Batches


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
    with pytest.raises(ValueError, match=r"(?s)snapshot does not fit what `snapshot` or `prompt` is now.*encoder"):
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


@pytest.mark.filterwarnings("ignore:.*worse than chance")
def test_a_classifier_is_saved_if_asked(tmp_path: Any) -> None:
    def build(seed: int) -> ProReg:
        return proreg(prompt=classifier(seed), inputs="batch.image", save_teacher=True, alpha=2.0)

    def run(method: ProReg, module: Student, **settings: Any) -> Trainer:
        trainer = Trainer(**QUIET | settings.pop("trainer", {}), callbacks=[method])
        trainer.fit(module, Batches(batches()), **settings)
        return trainer

    unbroken, whole = build(3), Student()
    run(unbroken, whole)
    run(build(3), Student(), trainer={"max_epochs": 1}).save_checkpoint(tmp_path / "half.ckpt")
    resumed, again = build(4), Student()  # of other weights: the saved ones win
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Resuming with|.*another prompt classifier")
        run(resumed, again, ckpt_path=tmp_path / "half.ckpt")
    assert_same(resumed.teacher.network, classifier(3), rtol=0, atol=0)
    assert_same(again, whole, rtol=0, atol=0)


def test_resuming_with_other_settings_is_said(tmp_path: Any) -> None:
    fit(proreg(), trainer={"max_epochs": 1}).save_checkpoint(tmp_path / "half.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Resuming with")
        fit(proreg(), ckpt_path=tmp_path / "half.ckpt")
    with pytest.warns(
        UserWarning, match=r"Resuming with ProReg\(.*alpha=2\.0\), but the checkpoint was written with ProReg"
    ):
        Trainer(**QUIET, callbacks=[proreg(alpha=2.0)]).fit(
            Student(), Batches(batches()), ckpt_path=tmp_path / "half.ckpt"
        )


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

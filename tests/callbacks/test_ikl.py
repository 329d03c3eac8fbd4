"""`IKLDistillation` against its objective written out by hand."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods.callbacks import IKLDistillation
from lightning_methods.testing._case import Batches

C = 4
X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3] * 3)
BATCHES = [(X[:6], Y[:6]), (X[6:], Y[6:])]


class Student(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Linear(6, C).double()
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.double())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1].long().flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def teacher() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, C)).double()


def double(x: Tensor) -> Tensor:
    return x.double()


def fit(method: Any, module: Any = None, batches: Any = BATCHES, epochs: int = 2, **settings: Any) -> Any:
    module = Student() if module is None else module
    flavour = lightning.pytorch if isinstance(module, lightning.pytorch.LightningModule) else pytorch_lightning
    trainer = flavour.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": epochs,
            "callbacks": [method],
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            **settings,
        }
    )
    trainer.fit(module, Batches(batches, share_out=trainer.world_size > 1))
    return trainer


def plain_objective(
    student: Tensor, teacher: Tensor, weight: Tensor, temperature: float, wmse: float, ce: float, normaliser: Any
) -> Tensor:
    """The objective over all pairs of classes, one sample at a time."""
    pairwise = torch.zeros((), dtype=student.dtype)
    for m, n, w in zip(teacher, student, weight, strict=True):
        for j in range(C):
            for k in range(C):
                pairwise = pairwise + w[j] * w[k] * ((m[j] - m[k]) - (n[j] - n[k])) ** 2 / 4
    soft = -(F.softmax(teacher / temperature, -1) * F.log_softmax(student / temperature, -1)).sum(-1).mean()
    return wmse * pairwise / normaliser + ce * soft


@pytest.mark.parametrize("class_wise", [True, False])
@pytest.mark.parametrize("variant", ["ikl", "gkl"])
def test_two_epochs_by_hand(variant: str, class_wise: bool) -> None:
    gamma = 0.5 if variant == "gkl" else 1.0
    method = IKLDistillation(
        teacher(), variant=variant, class_wise=class_wise, gamma=gamma, wmse_weight=3.0, ce_weight=2.0,
        temperature=4.0, weight_temperature=2.0, warmup_epochs=2, task_weight=0.5, teacher_transform=double,
    )  # fmt: skip
    module = Student()
    fit(method, module)

    hand, frozen = Student(), teacher()
    optimizer = torch.optim.SGD(hand.parameters(), lr=0.5)
    probs = torch.full((C, C), 1 / C, dtype=torch.float64)
    for epoch in (1, 2):
        sums = torch.zeros(C, C, dtype=torch.float64)
        for x, y in BATCHES:
            with torch.no_grad():
                m = frozen(x.double())
            n = hand(x)
            weight = (probs[y] if class_wise else F.softmax(m / 2.0, -1)) ** gamma
            normaliser = (weight.sum(-1) ** 2).sum() if variant == "gkl" else len(y)
            term = plain_objective(n, m, weight, 4.0, 3.0, 2.0, normaliser)
            for label, row in zip(y, m, strict=True):
                sums[label] += F.softmax(row / 2.0, -1)
            optimizer.zero_grad()
            (0.5 * F.cross_entropy(n, y) + min(epoch / 2, 1) * term).backward()
            optimizer.step()
        probs = sums / sums.sum(-1, keepdim=True)
    torch.testing.assert_close(module.net.weight, hand.net.weight, rtol=1e-6, atol=1e-8)  # class means are float32
    if class_wise:
        torch.testing.assert_close(method._loss.class_probs.double(), probs, rtol=1e-6, atol=1e-7)


def test_dkl_has_the_gradient_of_kl() -> None:
    module = Student()
    fit(IKLDistillation(teacher(), variant="dkl", wmse_weight=7.0, teacher_transform=double), module)
    hand, frozen = Student(), teacher()
    optimizer = torch.optim.SGD(hand.parameters(), lr=0.5)
    for _ in range(2):
        for x, y in BATCHES:
            n = hand(x)
            with torch.no_grad():
                target = F.log_softmax(frozen(x.double()), -1)
            kl = F.kl_div(F.log_softmax(n, -1), target, log_target=True, reduction="batchmean")
            optimizer.zero_grad()
            (F.cross_entropy(n, y) + kl).backward()
            optimizer.step()
    torch.testing.assert_close(module.net.weight, hand.net.weight)


def test_logs_raw_terms_weighted_sum_and_ramp() -> None:
    method = IKLDistillation(teacher(), wmse_weight=3.0, ce_weight=2.0, warmup_epochs=4, teacher_transform=double)
    logged = {key: value.item() for key, value in fit(method, epochs=2).callback_metrics.items()}
    assert logged.keys() == {"ikl/wmse", "ikl/soft_ce", "ikl/loss", "ikl/ramp"}
    assert logged["ikl/ramp"] == 0.5
    assert logged["ikl/loss"] == pytest.approx(0.5 * (3 * logged["ikl/wmse"] + 2 * logged["ikl/soft_ce"]))


def test_warm_up_as_a_share_of_training() -> None:
    method = IKLDistillation(teacher(), warmup_epochs=0.5, teacher_transform=double)
    assert fit(method, epochs=4, max_epochs=1).callback_metrics["ikl/ramp"] == 1.0
    assert fit(method, max_epochs=8, max_steps=2).callback_metrics["ikl/ramp"] == 0.25
    module = Student()
    with pytest.raises(ValueError, match="max_epochs=-1"):
        fit(method, module, max_epochs=-1, max_steps=2)
    assert "training_step" not in vars(module)


class Segmenter(Student):
    """Logits (B, C, H) for a target (B, H)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.double()).unsqueeze(-1).expand(-1, -1, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1][:, None].expand(-1, 3))


def test_dense_logits_equal_flattened_ones() -> None:
    class Dense(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.double()).unsqueeze(-1).expand(-1, -1, 3)

    torch.manual_seed(2)
    dense = Dense(nn.Linear(6, C)).double()
    plain, spread = Student(), Segmenter()
    fit(IKLDistillation(teacher(), teacher_transform=double), plain)
    fit(IKLDistillation(dense, target=lambda step: step.batch[1][:, None].expand(-1, 3)), spread)
    torch.testing.assert_close(plain.net.weight, spread.net.weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("stored", [lambda y: y[:, None], lambda y: y.float(), lambda y: y.to(torch.int32)])
def test_class_indices_as_columns_or_floats(stored: Any) -> None:
    plain, other = Student(), Student()
    fit(IKLDistillation(teacher(), teacher_transform=double), plain)
    fit(IKLDistillation(teacher(), teacher_transform=double), other, [(x, stored(y)) for x, y in BATCHES])
    assert torch.equal(plain.net.weight, other.net.weight)


def wide_teacher() -> nn.Module:
    return nn.Linear(6, C + 1).double()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"teacher": wide_teacher()},
            r"`student_logits` at 'module' are \[6, 4\] and `teacher_logits` at 'teacher' .*5",
        ),
        ({"target": "batch.0"}, r"`target` at 'batch\.0' .*class_wise=False needs no target"),
        ({"target": "batch.2"}, r"'batch\.2': batch is a tuple of 2"),
        ({"num_classes": 9}, "Expected 9 classes at 'module'"),
        ({"student_logits": "output"}, "`student_logits` at 'output' .*Tensor of shape \\[\\]"),
    ],
)
def test_errors_at_the_first_step_leave_the_module_alone(settings: dict[str, Any], message: str) -> None:
    module = Student()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        fit(IKLDistillation(**{"teacher": teacher(), "teacher_transform": double, **settings}), module)
    assert "training_step" not in vars(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "kl"}, "`variant`"),
        ({"gamma": 0.5}, "`gamma`"),
        ({"variant": "gkl", "gamma": -1.0}, "gamma"),
        ({"temperature": 0.0}, "`temperature`"),
        ({"weight_temperature": -1.0}, "`weight_temperature`"),
        ({"class_momentum": 1.5}, "`class_momentum`"),
        ({"wmse_weight": -1.0}, "wmse"),
        ({"warmup_epochs": -1}, "length"),
        ({"class_probs_init": torch.ones(2, 3)}, "`class_probs_init`"),
        ({"student_logits": "modul"}, "Did you mean 'module'"),
        ({"teacher": "resnet18"}, "timm:NAME"),
    ],
)
def test_errors_where_the_method_is_written_down(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IKLDistillation(**{"teacher": teacher(), **settings})


def test_teacher_must_not_be_the_student_or_share_with_it() -> None:
    module = Student()
    for source in (module, module.net):
        with pytest.raises(ValueError, match="student itself"):
            fit(IKLDistillation(source), module)
    tied = nn.Linear(6, C).double()
    tied.weight = module.net.weight
    with pytest.raises(ValueError, match="shares its parameter 'weight'"):
        fit(IKLDistillation(tied), module)


def test_class_means_are_those_of_all_ranks(tmp_path: Any) -> None:
    one, two = (IKLDistillation(teacher(), teacher_transform=double, num_classes=C) for _ in range(2))
    fit(one, epochs=1)
    fit(two, epochs=1, strategy="ddp_fork", devices=2, use_distributed_sampler=False, callbacks=[two, Save(tmp_path)])
    for rank in range(2):
        middle, end = torch.load(tmp_path / f"{rank}-0.pt"), torch.load(tmp_path / f"{rank}-end.pt")
        # A checkpoint in mid-epoch holds the sums of both ranks, each of which has seen half of the first batch.
        assert middle["class_sums"].sum() == pytest.approx(6, abs=1e-4)
        torch.testing.assert_close(end["class_probs"], one._loss.class_probs)
        assert not end["class_sums"].any()


class Save(pytorch_lightning.Callback):
    """Saves the method's state on every rank."""

    def __init__(self, folder: Any) -> None:
        self.folder = folder

    def _save(self, trainer: Any, when: str) -> None:
        torch.save(trainer.callbacks[0].state_dict()["class_means"], self.folder / f"{trainer.global_rank}-{when}.pt")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._save(trainer, str(batch_idx))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._save(trainer, "end")


def test_a_module_of_the_other_lightning() -> None:
    class Other(lightning.pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.net = nn.Linear(6, C).double()

        forward = Student.forward
        training_step = Student.training_step
        configure_optimizers = Student.configure_optimizers

    first, second = Student(), Other()
    fit(IKLDistillation(teacher(), teacher_transform=double), first)
    fit(IKLDistillation(teacher(), teacher_transform=double), second)
    assert torch.equal(first.net.weight, second.net.weight)

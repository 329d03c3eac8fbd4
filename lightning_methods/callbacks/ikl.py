"""Distillation with the decoupled, improved and generalised Kullback-Leibler losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, distributed, nn

from lightning_methods.attach import AddressLike, Method, Ramp, Step, Teacher, address
from lightning_methods.attach._lightning import LightningModule, Trainer
from lightning_methods.attach.address import describe
from lightning_methods.modules import IKLLoss

Variant = Literal["ikl", "gkl", "dkl"]


class IKLDistillation(Method):
    r"""Distils a frozen teacher into the module it is attached to.

    Adds, after the module's own step, `r(e) · (wmse_weight · wMSE + ce_weight · SCE)` to `task_weight` times
    its loss: a pairwise weighted MSE on logit differences, which the plain KL term keeps from the student, and
    a cross-entropy with the teacher's tempered distribution. The maths is in
    `lightning_methods.functional.ikl_terms`. Logs `ikl/wmse`, `ikl/soft_ce` (raw), `ikl/loss` (weighted) and
    `ikl/ramp`.

    Args:
        teacher: A module, a function that returns one, or `"timm:NAME"`; it is frozen and in eval mode, and in
            none of the module's parameters or checkpoints.
        student_logits: Address of the student's logits, (B, C) or (B, C, d1, ...).
        teacher_logits: Address of the teacher's, same shape; `"teacher:0"` where it returns a tuple.
        inputs: Address of what the teacher is called with. `"module@input"` if the module augments in its step.
        target: Address of the class indices, (B,) or (B, d1, ...); read only if `class_wise`.
        num_classes: C; taken from the first logits if None.
        variant: `"ikl"`; `"gkl"`: flattened weights (`gamma`) and their batch normaliser; `"dkl"`: the gradients
            of plain KL, for comparison (its wMSE does not reach the student).
        class_wise: Weights are the mean teacher prediction of the sample's class, of the previous epoch (paper:
            "global information"). False: the teacher's prediction for the sample. The published CIFAR-100 runs
            use False with `weight_temperature=100`.
        wmse_weight: Weight of the wMSE (the paper's α; the authors' code calls it beta).
        ce_weight: Weight of the soft cross-entropy (the paper's β; the authors' code calls it alpha).
        gamma: Exponent of the weights, `"gkl"` only; 0 is uniform, 1 is IKL.
        temperature: Of the soft cross-entropy. There is no T² factor.
        weight_temperature: Of the teacher's predictions that make the weights.
        class_momentum: Share of the new class means at an epoch's end.
        class_probs_init: `"uniform"`, or class means (C, C), one row a class.
        warmup_epochs: Epochs until full weight, `min(epoch / warmup_epochs, 1)` counted from 1. Between 0 and 1: a
            share of `Trainer(max_epochs=...)`.
        task_weight: Weight of the module's own loss.
        teacher_checkpoint: File with the teacher's weights: a Lightning checkpoint, `{"model": ...}` or a bare
            state dict.
        teacher_key: Prefix that selects the teacher among the checkpoint's keys.
        teacher_transform: Applied to the inputs before the teacher, e.g. another normalisation.
        log: `True`, `"epoch"` (means over steps too) or `False`.
        name: Prefix in logs and key in checkpoints.

    Raises:
        ValueError: If an argument is out of its range, at the first step if shapes disagree.

    Source:
        Cui et al., "Decoupled Kullback-Leibler Divergence Loss", NeurIPS 2024 (arXiv 2305.13948). GKL and the
        epoch delay of the class means are known from the authors' code only.

    Example:
        >>> from torch import nn
        >>> IKLDistillation(nn.Linear(8, 4), class_wise=False, weight_temperature=100.0, temperature=4.0)
        IKLDistillation(teacher=Linear(...), class_wise=False, temperature=4.0, weight_temperature=100.0)
    """

    teacher: Teacher

    def __init__(
        self,
        teacher: nn.Module | str | Callable[[], nn.Module],
        *,
        student_logits: AddressLike = "module",
        teacher_logits: AddressLike = "teacher",
        inputs: AddressLike = "batch.0",
        target: AddressLike = "batch.1",
        num_classes: int | None = None,
        variant: Variant = "ikl",
        class_wise: bool = True,
        wmse_weight: float = 1.0,
        ce_weight: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        weight_temperature: float = 1.0,
        class_momentum: float = 1.0,
        class_probs_init: Literal["uniform"] | Tensor = "uniform",
        warmup_epochs: float = 1,
        task_weight: float = 1.0,
        teacher_checkpoint: str | Path | None = None,
        teacher_key: str | None = None,
        teacher_transform: Callable[[Any], Any] | None = None,
        log: bool | Literal["epoch"] = True,
        name: str = "ikl",
    ) -> None:
        super().__init__(
            name=name,
            weights={"wmse": wmse_weight, "soft_ce": ce_weight},
            ramp=Ramp(warmup_epochs),
            task_weight=task_weight,
            log=log,
        )
        if variant not in ("ikl", "gkl", "dkl"):
            raise ValueError(f"Expected `variant` to be 'ikl', 'gkl' or 'dkl', but got {variant!r}.")
        if gamma != 1.0 and variant != "gkl":
            raise ValueError(f"Expected `gamma` only with variant='gkl', but got gamma={gamma} with {variant!r}.")
        self.teacher = Teacher(
            teacher,
            inputs=inputs,
            checkpoint=teacher_checkpoint,
            key=teacher_key,
            transform=teacher_transform,
        )
        self.student_logits = address(student_logits)
        self.teacher_logits = address(teacher_logits)
        self.target = address(target)
        self.variant = variant
        # DKL's weights are the sample's own tempered prediction, by definition.
        self.class_wise = class_wise and variant != "dkl"
        self.gamma = gamma
        self.temperature = temperature
        self.weight_temperature = weight_temperature
        self.class_momentum = class_momentum
        self.class_probs_init = class_probs_init
        self.num_classes = num_classes
        # The batch normaliser of GKL is taken on each rank alone, as the authors' code does.
        self.exact_over_ranks = variant != "gkl"
        self._loss = self._new_loss()

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """The wMSE and the soft cross-entropy of this step's logits."""
        student, teacher = step[self.student_logits], step[self.teacher_logits]
        self._check_logits(student, teacher)
        target = self._class_indices(step[self.target], student) if self.class_wise else None
        terms = self._loss.terms(student, teacher, target)
        wmse = terms.wmse.detach() if self.variant == "dkl" else terms.wmse
        return {"wmse": wmse, "soft_ce": terms.soft_ce}

    def end_epoch(self) -> None:
        """The epoch's class means become the weights of the next."""
        self._loss.end_epoch()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called before the optimizers are made: attaches, and moves the class means to the device."""
        super().setup(trainer, pl_module, stage)
        self._loss.to(trainer.strategy.root_device)

    def state_dict(self) -> dict[str, Any]:
        """The class means and the sums of this epoch over all ranks, so that an interrupted epoch continues."""
        means = {name: value.clone() for name, value in self._loss.state_dict().items()}
        if distributed.is_available() and distributed.is_initialized() and means:
            distributed.all_reduce(means["class_sums"])  # Lightning asks every rank, and rank 0 writes
        return {**super().state_dict(), "class_means": means}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave; the sums of all ranks go to one of them."""
        super().load_state_dict(state_dict)
        device = self._loss.class_probs.device
        self._loss = self._new_loss()  # the state may be one from before the number of classes was known
        self._loss.load_state_dict(state_dict["class_means"])
        self._loss.to(device)
        if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0:
            self._loss.class_sums.zero_()

    def _new_loss(self) -> IKLLoss:
        given = self.class_probs_init if isinstance(self.class_probs_init, Tensor) else None
        loss = IKLLoss(
            self.num_classes if given is None else len(given),
            class_wise=self.class_wise,
            normalization="weight" if self.variant == "gkl" else "batch",
            gamma=self.gamma,
            temperature=self.temperature,
            weight_temperature=self.weight_temperature,
            class_momentum=self.class_momentum,
        )
        if given is not None:
            if given.shape != (len(given), len(given)):
                raise ValueError(f"Expected `class_probs_init` to be (C, C), but got {describe(given)}.")
            if self.class_wise:
                loss.class_probs.copy_(given)
        return loss

    def _check_logits(self, student: Any, teacher: Any) -> None:
        for argument, value in (("student_logits", student), ("teacher_logits", teacher)):
            if not isinstance(value, Tensor) or value.ndim < 2 or not value.is_floating_point():
                raise ValueError(
                    f"Expected `{argument}` at {getattr(self, argument)!r} to be floating logits (B, C) or "
                    f"(B, C, d1, ...), but got {describe(value)}."
                )
        if student.shape != teacher.shape:
            raise ValueError(
                f"Expected logits of one shape, but `student_logits` at {self.student_logits!r} are "
                f"{list(student.shape)} and `teacher_logits` at {self.teacher_logits!r} are {list(teacher.shape)} "
                f"(classes are in dimension 1)."
            )
        if self._loss.num_classes not in (None, student.shape[1]):
            raise ValueError(
                f"Expected {self._loss.num_classes} classes at {self.student_logits!r}, as `num_classes` or the "
                f"restored class means say, but got {student.shape[1]}."
            )

    def _class_indices(self, target: Any, logits: Tensor) -> Tensor:
        """Class indices of the logits' samples; columns (B, 1) and indices stored as floats are common."""
        expected = (logits.shape[0], *logits.shape[2:])
        if isinstance(target, Tensor) and target.ndim == 2 and target.shape == (*expected, 1):
            target = target.squeeze(1)
        if not isinstance(target, Tensor) or target.shape != expected:
            raise ValueError(
                f"Expected `target` at {self.target!r} to be class indices of shape {list(expected)}, one for each "
                f"row of `student_logits` at {self.student_logits!r}, but got {describe(target)}. "
                f"If the module sees several views, name the logits of one; class_wise=False needs no target."
            )
        return target.long()

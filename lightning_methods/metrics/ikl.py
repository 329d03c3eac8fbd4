"""What distillation and long-tailed recognition are judged by: agreement, class margins, accuracy by shots."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_methods.functional import accumulate_class_probs
from lightning_methods.functional._logits import check_logits, check_range, check_target, rows_of_target


class TeacherAgreement(Metric):
    """Share of positions at which student and teacher predict the same class; NaN before the first one.

    Example:
        >>> import torch
        >>> metric = TeacherAgreement()
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [2.0, 1.0]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    agreeing: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("agreeing", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, student_logits: Tensor, teacher_logits: Tensor) -> None:
        """Count a batch of logits, both (N, C) or (N, C, d1, ...)."""
        check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
        same = student_logits.argmax(1) == teacher_logits.argmax(1)
        self.agreeing += same.sum()
        self.total += same.numel()

    def compute(self) -> Tensor:
        """The share, in [0, 1]."""
        return self.agreeing / self.total


class ClassMargin(Metric):
    """By how much the mean prediction of a class prefers that class to the next (IKL paper, equation 11).

    For class y with mean prediction P[y] over its samples: P[y, y] − max over k ≠ y of P[y, k], in [−1, 1].

    Args:
        num_classes: C, at least 2.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If there are fewer than 2 classes, or logits and target do not fit.

    Example:
        >>> import torch
        >>> metric = ClassMargin(num_classes=3)
        >>> metric.update(torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]).log(), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor([ 0.2000, -0.4000,     nan])
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    class_sums: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_range("num_classes", num_classes, 2, math.inf)
        self.add_state("class_sums", torch.zeros(num_classes, num_classes, dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count a batch: logits (N, C) or (N, C, d1, ...), class indices (N[, d1, ...])."""
        self.class_sums = accumulate_class_probs(self.class_sums, logits, target)

    def compute(self) -> Tensor:
        """The margins (C,); NaN for a class without a sample."""
        probs = self.class_sums / self.class_sums.sum(1, keepdim=True)
        own = torch.eye(len(probs), dtype=torch.bool, device=probs.device)
        return probs.diagonal() - probs.masked_fill(own, -math.inf).amax(1)


class ShotScores(NamedTuple):
    """Mean accuracy over the classes with many, a medium number of and few training samples."""

    many: Tensor
    medium: Tensor
    few: Tensor


class ShotAccuracy(Metric):
    """Accuracy of frequent, medium and rare classes, for long-tailed data.

    A group's score is the mean, over those of its classes that occur in the evaluated data, of the class's
    accuracy; 0 for a group without such a class, as in the authors' code.

    Args:
        train_counts: Training samples of each class, (C,).
        many: Classes with more training samples than this are frequent.
        few: Classes with fewer are rare; the others are medium.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If `train_counts` has not one dimension, `many` < `few`, or logits and target do not fit.

    Example:
        >>> import torch
        >>> metric = ShotAccuracy([500, 50, 5])
        >>> metric.update(torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 0, 2]))
        >>> metric.compute()
        ShotScores(many=tensor(0.5000), medium=tensor(1.), few=tensor(1.))
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    train_counts: Tensor
    correct: Tensor
    total: Tensor

    def __init__(self, train_counts: Tensor | Sequence[int], many: int = 100, few: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        counts = torch.as_tensor(train_counts)
        if counts.ndim != 1:
            raise ValueError(f"`train_counts` must have shape (C,), got {tuple(counts.shape)}")
        if many < few:
            raise ValueError(f"`many` must be at least `few`, got {many} and {few}")
        self.many = many
        self.few = few
        self.register_buffer("train_counts", counts, persistent=False)
        self.add_state("correct", torch.zeros(len(counts), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(len(counts), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count a batch: logits (N, C) or (N, C, d1, ...), class indices (N[, d1, ...])."""
        check_logits(logits=logits)
        check_target(target, logits)
        if logits.shape[1] != len(self.total):
            expected = f"{len(self.total)} classes, one for each of `train_counts`"
            raise ValueError(f"`logits` must have {expected}, got shape {tuple(logits.shape)}")
        rows_of_target(self.total, target)  # for its error
        classes = target.flatten().long()
        hits = (logits.argmax(1) == target).flatten()
        self.correct = self.correct.index_add(0, classes, hits.long())
        self.total = self.total.index_add(0, classes, torch.ones_like(classes))

    def compute(self) -> ShotScores:
        """The scores, each in [0, 1]."""
        many, few = self.train_counts > self.many, self.train_counts < self.few
        return ShotScores(self._score(many), self._score(~many & ~few), self._score(few))

    def _score(self, group: Tensor) -> Tensor:
        occurring = group & (self.total > 0)
        accuracies = torch.where(occurring, self.correct / self.total, 0.0)
        return accuracies.sum() / occurring.sum().clamp_min(1)

"""Accuracy by groups of samples: by domain or context, and in and out of the training distribution."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_methods.functional._index import check_integer
from lightning_methods.functional._logits import check_range


class GroupAccuracies(NamedTuple):
    """Of all samples, the mean and the worst of the groups, and each group's, (num_groups,)."""

    overall: Tensor
    mean: Tensor
    worst: Tensor
    per_group: Tensor


class ShiftScores(NamedTuple):
    """Accuracy where the data is as in training and where it is not, and the harmonic mean of the two."""

    in_distribution: Tensor
    out_of_distribution: Tensor
    harmonic_mean: Tensor


class _GroupCounts(Metric):
    """How many samples of each group there were, and how many were right."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, num_groups: int, ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_range("num_groups", num_groups, 1, math.inf)
        self.ignore_index = ignore_index
        for name in ("correct", "total"):
            self.add_state(name, torch.zeros(num_groups, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, group: Tensor | int) -> None:
        """Count a batch.

        Args:
            preds: Logits (N, K), floating, or class indices (N,).
            target: Class indices (N,).
            group: Group of each sample (N,), or one for all, such as the number of the dataloader.

        Raises:
            ValueError: If shapes or dtypes do not fit, or (on a CPU) if a group leaves [0, num_groups).
        """
        hits = self._hits(preds, target)
        if isinstance(group, int):
            group = torch.full_like(target, group)
        check_integer("group", group)
        if group.shape != target.shape:
            raise ValueError(f"`group` must have the shape {tuple(target.shape)} of `target`, got {tuple(group.shape)}")
        kept = target != self.ignore_index
        groups = torch.where(kept, group, 0).long()
        self.correct = self._added(self.correct, groups, hits & kept)
        self.total = self._added(self.total, groups, kept)

    @staticmethod
    def _hits(preds: Tensor, target: Tensor) -> Tensor:
        check_integer("target", target)
        if preds.ndim == 2 and preds.is_floating_point():
            preds = preds.argmax(1)
        if target.ndim != 1 or preds.shape != target.shape or preds.is_floating_point():
            found = f"{tuple(preds.shape)} of {preds.dtype} and {tuple(target.shape)}"
            raise ValueError(f"`preds` must be logits (N, K) or class indices (N,), and `target` (N,), got {found}")
        return preds == target

    @staticmethod
    def _added(counts: Tensor, groups: Tensor, ones: Tensor) -> Tensor:
        try:
            return counts.index_add(0, groups, ones.long())
        except (IndexError, RuntimeError):  # a CPU tells; reading the values first would make a device wait
            low, high = int(groups.min()), int(groups.max())
            if low >= 0 and high < len(counts):
                raise
            raise ValueError(f"`group` must lie in [0, {len(counts)}), got values from {low} to {high}") from None


class GroupAccuracy(_GroupCounts):
    """Accuracy of each group: domains, contexts, or combinations of class and context.

    Args:
        num_groups: G; groups are 0 … G − 1.
        ignore_index: Class index of samples to leave out.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If `num_groups` is below 1.

    Example:
        >>> import torch
        >>> metric = GroupAccuracy(num_groups=3)
        >>> metric.update(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 2, 2]))
        >>> overall, mean, worst, per_group = metric.compute()
        >>> overall, worst, per_group
        (tensor(0.7500), tensor(0.5000), tensor([1.0000,    nan, 0.5000]))
    """

    def compute(self) -> GroupAccuracies:
        """The accuracies, in [0, 1]; a group without samples is NaN, and neither in the mean nor the worst."""
        per_group = self.correct / self.total
        seen = self.total > 0
        worst = torch.where(seen, per_group, math.inf).amin()
        return GroupAccuracies(
            self.correct.sum() / self.total.sum(),
            per_group.nanmean(),
            torch.where(seen.any(), worst, math.nan),
            per_group,
        )


class ShiftAccuracy(_GroupCounts):
    """What robustness costs and gains: accuracy in distribution, out of it, and their harmonic mean.

    The group of a sample is 0 if it is distributed as the training data, and 1 if it is not.

    Args:
        ignore_index: Class index of samples to leave out.
        kwargs: Of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = ShiftAccuracy()
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]), 0)
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([1, 1]), 1)
        >>> metric.compute()
        ShiftScores(in_distribution=tensor(1.), out_of_distribution=tensor(0.5000), harmonic_mean=tensor(0.6667))
    """

    def __init__(self, ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(2, ignore_index, **kwargs)

    def compute(self) -> ShiftScores:
        """The scores, in [0, 1]; NaN for a group without samples, 0 for the mean of two zeros."""
        inside, outside = self.correct / self.total
        total = inside + outside
        return ShiftScores(inside, outside, torch.where(total == 0, 0.0, 2 * inside * outside / total))

r"""Which snippets of the training videos have a label that can be trusted: those with a steady prediction.

Each cell (a snippet of a training video) is scored after every epoch. Cells of normal videos are normal. A cell of an
abnormal video is confident if its score has varied less than that of most cells with the same prediction; the rest are
ambiguous.

Source: the code of Lv et al., "Unbiased Multiple Instance Learning for Weakly Supervised Video Anomaly Detection", CVPR
2023, arXiv 2303.12369. Ours: a prediction that no cell has leaves no cell confident (the code fails there).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_methods.functional._bags import abnormal_bags
from lightning_methods.functional._logits import upcast


class ConfidenceSplit(NamedTuple):
    """The division of N cells.

    Attributes:
        confident: Boolean (N,).
        pseudo_labels: int64 (N,), 1 where the mean score of a cell of an abnormal video is above 0.5.
        variance: (N,), of the scores over the epochs.
        thresholds: (2,), of the variance, for cells predicted normal and abnormal; 0 where there are none.
    """

    confident: Tensor
    pseudo_labels: Tensor
    variance: Tensor
    thresholds: Tensor


@torch.no_grad()
def confidence_split(history: Tensor, bag_labels: Tensor, *, ratio: float = 0.3) -> ConfidenceSplit:
    """`confidence_split_from_moments` of the mean and the variance (divided by T) over the rows of a history.

    Args:
        history: Abnormal probabilities, floating, (T, N), T ≥ 2 epochs.
        bag_labels: (N,), above 0 for cells of abnormal videos.
        ratio: As below.

    Raises:
        ValueError: If shapes or dtypes do not fit, or `ratio` is out of its range.

    Example:
        >>> import torch
        >>> history = torch.tensor([[0.9, 0.2, 0.5, 0.9], [0.9, 0.9, 0.7, 0.1]])
        >>> confidence_split(history, torch.tensor([1, 1, 1, 0]), ratio=0.5).confident
        tensor([ True, False, False,  True])
    """
    if history.ndim != 2 or not history.is_floating_point():
        found = f"{tuple(history.shape)} of {history.dtype}"
        raise ValueError(f"`history` must be floating and of shape (T, N), got {found}")
    if len(history) < 2:
        raise ValueError(f"`history` must have at least 2 rows: one score has no variance; got {len(history)}")
    (history,) = upcast(history)
    # Seen from the first epoch, a score that never changes has a variance of exactly 0, and a mean that is itself.
    change = history - history[0]
    mean = history[0] + change.mean(0)
    return confidence_split_from_moments(mean, change.var(0, correction=0), bag_labels, ratio=ratio)


@torch.no_grad()
def confidence_split_from_moments(
    mean: Tensor, variance: Tensor, bag_labels: Tensor, *, ratio: float = 0.3
) -> ConfidenceSplit:
    r"""The division by running moments, which do not grow with the number of epochs.

    Among the M cells of abnormal videos that are predicted c, the threshold τ_c is entry ⌊M · ratio⌋ of their variances
    in ascending order, counted from 0. A cell is confident if its variance is below τ of its prediction, strictly: with
    ties fewer are, and of cells that never change none.

    Args:
        mean: Floating, (N,), over the epochs.
        variance: Floating, (N,).
        bag_labels: (N,), above 0 for cells of abnormal videos. All cells of the others are confident, with label 0, and
            take no part in the thresholds.
        ratio: Share of the cells of each prediction that is confident, in [0, 1). The paper's ablation finds 0.3 best.

    Raises:
        ValueError: If shapes or dtypes do not fit, or `ratio` is out of its range.

    Example:
        >>> import torch
        >>> mean, variance = torch.tensor([0.9, 0.8, 0.1]), torch.tensor([0.01, 0.09, 0.02])
        >>> split = confidence_split_from_moments(mean, variance, torch.tensor([1, 1, 1]), ratio=0.5)
        >>> split.confident, split.thresholds
        (tensor([ True, False, False]), tensor([0.0200, 0.0900]))
    """
    for name, values in (("mean", mean), ("variance", variance)):
        if values.ndim != 1 or values.shape != mean.shape or not values.is_floating_point():
            found = f"{tuple(values.shape)} of {values.dtype}"
            raise ValueError(f"`{name}` must be floating and of shape (N,) as the mean is, got {found}")
    if not 0 <= ratio < 1:
        raise ValueError(f"`ratio` must lie in [0, 1), got {ratio}: of M cells, entry M is beyond the last")
    abnormal = abnormal_bags(bag_labels, len(mean))
    mean, variance = upcast(mean, variance)
    predicted = (mean > 0.5) & abnormal
    groups = (abnormal & ~predicted, predicted)
    thresholds = torch.stack([_quantile(variance[group], ratio) for group in groups])
    confident = ~abnormal | (variance < torch.where(predicted, thresholds[1], thresholds[0]))
    return ConfidenceSplit(confident, predicted.long(), variance, thresholds)


def _quantile(values: Tensor, ratio: float) -> Tensor:
    """Entry ⌊M · ratio⌋ in ascending order; 0, below which no variance is, if there are none."""
    return values.sort().values[int(len(values) * ratio)] if len(values) else values.new_zeros(())

r"""Multiple-instance losses for weakly supervised anomaly detection: a bag is abnormal if one of its instances is.

`umil_mil_loss` is the base loss of UMIL. `mil_topk_loss` and `mil_ranking_loss` are the two most common others. All of
them learn from the highest scores of a bag, which context that often comes with anomalies can earn as well.

Sources: `umil_mil_loss` and the two priors are those of the code of Lv et al., "Unbiased Multiple Instance Learning for
Weakly Supervised Video Anomaly Detection", CVPR 2023, arXiv 2303.12369. The ranking loss is that of Sultani et al.,
"Real-world Anomaly Detection in Surveillance Videos", CVPR 2018, arXiv 1801.04264.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_methods.functional._bags import abnormal_bags, as_views
from lightning_methods.functional._logits import check_range, upcast


class MILLoss(NamedTuple):
    """The two parts, scalars; `margin` is 0 if it was not asked for."""

    mil: Tensor
    margin: Tensor


def umil_mil_loss(logits: Tensor, bag_labels: Tensor, *, margin: bool = True, detach_weight: bool = False) -> MILLoss:
    r"""Cross-entropy of the most abnormal instance of each bag, weighed by its own confidence.

    With abnormal probabilities s, k* their argmax and w the larger probability of k*, per bag and view:

    - mil: w times the cross-entropy at k* with the bag's label;
    - margin: w times the binary cross-entropy of $\max_k s_k - \min_k s_k$ with the bag's label. It does not know which
      class is which: from a small initialisation it often settles with all scores inverted. Leave it out unless the
      detector starts from a good one.

    Args:
        logits: Floating, (B, V, K, 2) or (B, K, 2); class 1 is abnormal.
        bag_labels: (B,), above 0 for abnormal.
        margin: Whether to compute the second part.
        detach_weight: No gradient through w. The authors' code lets it through.

    Returns:
        Means over bags and views, in float32 at least.

    Raises:
        ValueError: If shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> umil_mil_loss(torch.zeros(1, 3, 2), torch.tensor([1]), margin=False)
        MILLoss(mil=tensor(0.3466), margin=tensor(0.))
    """
    views = as_views("logits", logits, classes=2)
    abnormal = abnormal_bags(bag_labels, len(views))
    probabilities = views.softmax(-1)
    # max(dim) rather than amax: of equal scores the first alone gets the gradient.
    highest, instance = probabilities[..., 1].max(-1)
    at_highest = instance[..., None, None].expand(-1, -1, 1, 2)
    weight = probabilities.gather(2, at_highest).squeeze(2).max(-1).values
    if detach_weight:
        weight = weight.detach()
    target = abnormal[:, None].expand_as(highest)
    chosen = views.gather(2, at_highest).squeeze(2)
    mil = weight * F.cross_entropy(chosen.movedim(-1, 1), target.long(), reduction="none")
    if not margin:
        return MILLoss(mil.mean(), views.sum() * 0)
    spread = highest - probabilities[..., 1].min(-1).values
    with torch.autocast(spread.device.type, enabled=False):  # which refuses this loss
        of_margin = weight * F.binary_cross_entropy(spread, target.to(spread.dtype), reduction="none")
    return MILLoss(mil.mean(), of_margin.mean())


def mil_topk_loss(logits: Tensor, bag_labels: Tensor, *, k: int) -> Tensor:
    """Cross-entropy of the mean abnormal probability of the k most abnormal instances of each bag.

    Args:
        logits: Floating, (B, V, K, 2) or (B, K, 2); class 1 is abnormal.
        bag_labels: (B,), above 0 for abnormal.
        k: In [1, K].

    Returns:
        Mean over bags and views, in float32 at least.

    Raises:
        ValueError: If shapes or dtypes do not fit, or `k` is out of its range.

    Example:
        >>> import torch
        >>> mil_topk_loss(torch.zeros(1, 3, 2), torch.tensor([1]), k=2)
        tensor(0.6931)
    """
    views = as_views("logits", logits, classes=2)
    abnormal = abnormal_bags(bag_labels, len(views))
    check_range("k", k, 1, views.shape[2])
    mean = views.softmax(-1)[..., 1].topk(k).values.mean(-1)
    with torch.autocast(mean.device.type, enabled=False):
        return F.binary_cross_entropy(mean.clamp_max(1), abnormal[:, None].expand_as(mean).to(mean.dtype))


def mil_ranking_loss(scores: Tensor, bag_labels: Tensor, *, margin: float = 1.0) -> Tensor:
    r"""Asks the highest score of each abnormal bag to exceed that of each normal bag by a margin.

    The mean of $\max(0, m - \max_k s_k + \max_k s'_k)$ over all pairs of an abnormal bag s and a normal bag s'. Sultani
    et al. add `temporal_smoothness` and `temporal_sparsity` of the abnormal bags, each with weight 8e-5.

    Args:
        scores: Floating, (B, K).
        bag_labels: (B,), above 0 for abnormal.
        margin: m ≥ 0.

    Returns:
        In float32 at least; 0 if all bags are normal, or all abnormal.

    Raises:
        ValueError: If shapes or dtypes do not fit, or `margin` is negative.

    Example:
        >>> import torch
        >>> mil_ranking_loss(torch.tensor([[0.1, 0.9], [0.3, 0.2]]), torch.tensor([1, 0]))
        tensor(0.4000)
    """
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(f"`scores` must be floating and of shape (B, K), got {tuple(scores.shape)} of {scores.dtype}")
    check_range("margin", margin, 0, math.inf)
    abnormal = abnormal_bags(bag_labels, len(scores))
    highest = upcast(scores)[0].max(-1).values
    pairs = abnormal[:, None] & ~abnormal
    return ((margin - highest[:, None] + highest).relu() * pairs).sum() / pairs.sum().clamp_min(1)


def temporal_smoothness(scores: Tensor) -> Tensor:
    r"""$\sum_{k<K} (s_{k+1} - s_k)^2$, the mean of it over bags; 0 for K = 1.

    Args:
        scores: Floating, (..., K), instances in the order of time.

    Raises:
        ValueError: If the scores are not floating or have no dimension.

    Example:
        >>> import torch
        >>> temporal_smoothness(torch.tensor([0.0, 1.0, 0.5]))
        tensor(1.2500)
    """
    return _upcast_scores(scores).diff(dim=-1).square().sum(-1).mean()


def temporal_sparsity(scores: Tensor) -> Tensor:
    r"""$\sum_k s_k$, the mean of it over bags: anomalies are rare.

    Args:
        scores: Floating, non-negative, (..., K).

    Raises:
        ValueError: If the scores are not floating or have no dimension.

    Example:
        >>> import torch
        >>> temporal_sparsity(torch.tensor([[0.0, 1.0, 0.5], [0.5, 0.0, 0.0]]))
        tensor(1.)
    """
    return _upcast_scores(scores).sum(-1).mean()


def _upcast_scores(scores: Tensor) -> Tensor:
    if not scores.is_floating_point() or scores.ndim == 0:
        found = f"{tuple(scores.shape)} of {scores.dtype}"
        raise ValueError(f"`scores` must be floating and of shape (..., K), got {found}")
    return upcast(scores)[0]

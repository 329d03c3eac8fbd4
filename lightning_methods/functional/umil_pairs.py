r"""Clustering by pairs: two snippets should get the same prediction exactly if their features are alike.

No label takes part, so that it serves where none can be trusted. It cannot tell the classes apart: predictions that
swap them have the same loss.

All N² pairs are formed by products of (N, 1) with (1, N) and of one pair of matrices (for the cosines), and rows are
left out by zeros: shapes do not depend on values, and the device is never waited for.

Source: the code of Lv et al., "Unbiased Multiple Instance Learning for Weakly Supervised Video Anomaly Detection",
CVPR 2023, arXiv 2303.12369. The paper's own equations could not be read.
"""

from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_methods.functional._logits import Reduction, check_choice, check_positive, check_range, upcast

Similarity: TypeAlias = Literal["cosine", "rank"]

#: From this many rows on, pairs are gone through in blocks of as many rows, whose intermediate values are made anew in
#: the backward pass: N x N float32 matrices of N = 4096 take 64 MiB each.
_BLOCK = 4096


class PairwiseLoss(NamedTuple):
    """The loss, a scalar, and the similarity it was taken with, (N, N): 1 alike, -1 not alike, 0 left out."""

    loss: Tensor
    similarity: Tensor


@torch.no_grad()
def snippet_similarity(
    features: Tensor, *, mode: Similarity = "cosine", threshold: float = 0.7, topk: int = 2
) -> Tensor:
    """Which snippets count as alike, by their features; no gradient.

    Args:
        features: Floating, (N, D).
        mode: "cosine": alike if the cosine is above `threshold`. "rank": alike if the `topk` largest components are
            the same ones, in any order.
        threshold: In [-1, 1]. It has to fit the features: if nearly all pairs are alike, or none, nothing is learnt.
        topk: Number of components that "rank" compares, in [1, D].

    Returns:
        (N, N), 1 where alike and -1 elsewhere; the diagonal is 1.

    Raises:
        ValueError: If shape, dtype or options do not fit.

    Example:
        >>> import torch
        >>> snippet_similarity(torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]]))
        tensor([[ 1.,  1., -1.],
                [ 1.,  1., -1.],
                [-1., -1.,  1.]])
    """
    _check_matrix("features", features)
    check_choice("mode", mode, Similarity)
    check_range("threshold", threshold, -1, 1)
    (features,) = upcast(features)
    if mode == "cosine":
        unit = F.normalize(features, dim=1)
        with torch.autocast(features.device.type, enabled=False):
            alike = unit @ unit.T > threshold
    else:
        check_range("topk", topk, 1, features.shape[1])
        largest = features.topk(topk, dim=1).indices.sort(dim=1).values
        alike = (largest[:, None] == largest).all(2)
    # Of a vector of zeros the cosine with itself is 0.
    return _signs(alike.fill_diagonal_(True), features.dtype)


def label_similarity(labels: Tensor) -> Tensor:
    """Which snippets have the same label.

    Args:
        labels: (N,), of any dtype.

    Returns:
        (N, N), float32, 1 where the labels are equal and -1 elsewhere.

    Raises:
        ValueError: If the shape is another.

    Example:
        >>> import torch
        >>> label_similarity(torch.tensor([1, 0, 1]))
        tensor([[ 1., -1.,  1.],
                [-1.,  1., -1.],
                [ 1., -1.,  1.]])
    """
    if labels.ndim != 1:
        raise ValueError(f"`labels` must have shape (N,), got {tuple(labels.shape)}")
    return _signs(labels[:, None] == labels, torch.float32)


def pairwise_bce(
    prob1: Tensor, prob2: Tensor, similarity: Tensor, *, eps: float = 1e-7, reduction: Reduction = "mean"
) -> Tensor:
    r"""Binary cross-entropy between being alike and being predicted alike, over all pairs.

    With $P_{ij} = \sum_c \mathrm{prob1}_{ic} \mathrm{prob2}_{jc}$, the probability that i and j fall into one class, a
    pair costs $-\log(P_{ij} + \varepsilon)$ if it is alike and $-\log(1 - P_{ij} + \varepsilon)$ if not.

    Args:
        prob1: Probabilities, floating, (N, C).
        prob2: Probabilities, floating, (M, C).
        similarity: (N, M); positive: alike, negative: not alike, 0: left out. (The authors' code gives a pair with 0
            the constant −log ε instead; it never makes one.)
        eps: ε > 0. The cost of a pair is at most −log ε.
        reduction: "none" gives (N, M), with 0 for what is left out; "mean" is over the pairs that are not left out.

    Returns:
        In float32 at least; 0 if there is no pair.

    Raises:
        ValueError: If shapes, dtypes or options do not fit.

    Example:
        >>> import torch
        >>> sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> pairwise_bce(sure, sure, torch.tensor([[1.0, -1.0], [-1.0, 1.0]])) < 1e-6
        tensor(True)
    """
    _check_matrix("prob1", prob1)
    _check_matrix("prob2", prob2)
    if prob1.shape[1] != prob2.shape[1]:
        raise ValueError(f"`prob1` and `prob2` must have as many classes, got {prob1.shape[1]} and {prob2.shape[1]}")
    if similarity.shape != (len(prob1), len(prob2)):
        expected, found = (len(prob1), len(prob2)), tuple(similarity.shape)
        raise ValueError(f"`similarity` must have shape {expected}, a row for each of `prob1`, got {found}")
    check_positive(eps=eps)
    check_choice("reduction", reduction, Reduction)
    prob1, prob2 = upcast(prob1, prob2)
    if reduction == "none":
        return pair_losses(prob1, prob2, similarity, eps)
    total = pair_loss_sums(prob1, prob2, similarity, eps).sum()
    return total if reduction == "sum" else total / similarity.count_nonzero().clamp_min(1)


def pairwise_cluster_loss(
    features: Tensor,
    logits_weak: Tensor,
    logits_strong: Tensor,
    mask: Tensor | None = None,
    *,
    mode: Similarity = "cosine",
    threshold: float = 0.7,
    topk: int = 2,
    eps: float = 1e-7,
) -> PairwiseLoss:
    """Clusters snippets: `pairwise_bce` of the softmaxes, alike or not by their features.

    Args:
        features: Of the weak view, floating, (N, D); no gradient goes there.
        logits_weak: Floating, (N, C), of the weak view.
        logits_strong: Floating, (N, C), of the strong view; the same as the weak ones if there is one view.
        mask: Boolean (N,), snippets that take part; all if None.
        mode: As in `snippet_similarity`, like the next two.
        threshold: As above.
        topk: As above.
        eps: As in `pairwise_bce`.

    Returns:
        The mean over all pairs of snippets that take part, each with itself included, and the similarity, with 0 in
        rows and columns that do not. Without any snippet the loss is 0, with a gradient of 0.

    Raises:
        ValueError: If shapes, dtypes or options do not fit.

    Example:
        >>> import torch
        >>> features, logits = torch.eye(3), torch.zeros(3, 2)
        >>> loss, similarity = pairwise_cluster_loss(features, logits, logits, torch.tensor([True, True, False]))
        >>> loss
        tensor(0.6931)
        >>> similarity
        tensor([[ 1., -1.,  0.],
                [-1.,  1.,  0.],
                [ 0.,  0.,  0.]])
    """
    similarity = snippet_similarity(features, mode=mode, threshold=threshold, topk=topk)
    for name, logits in (("logits_weak", logits_weak), ("logits_strong", logits_strong)):
        _check_matrix(name, logits)
        if len(logits) != len(features):
            raise ValueError(f"`{name}` must have a row for each of `features`, {len(features)}, got {len(logits)}")
    if mask is not None:
        if mask.shape != features.shape[:1] or mask.dtype != torch.bool:
            found = f"{tuple(mask.shape)} of {mask.dtype}"
            raise ValueError(f"`mask` must be boolean and of shape {(len(features),)}, got {found}")
        similarity = similarity.masked_fill_(~pair_mask(mask), 0)
    weak, strong = upcast(logits_weak, logits_strong)
    return PairwiseLoss(pairwise_bce(weak.softmax(1), strong.softmax(1), similarity, eps=eps), similarity)


def pair_mask(members: Tensor) -> Tensor:
    """(N, N), True where both are members, for a boolean `members` (N,)."""
    return members[:, None] & members


def pair_losses(prob1: Tensor, prob2: Tensor, similarity: Tensor, eps: float) -> Tensor:
    """The cost of each pair, (N, M), 0 where `similarity` is 0; for probabilities in float32 at least."""
    # One class after the other: a matrix product may run in TF32 or under autocast, and the logarithm of 1 - P blows
    # up the error of P near 1. Rounding must not take P above 1 either.
    products = (a[:, None] * b for a, b in zip(prob1.unbind(1), prob2.unbind(1), strict=True))
    agreement = sum(products, start=prob1.new_zeros(())).clamp_max(1)
    likelihood = torch.where(similarity > 0, agreement, 1 - agreement)
    return -torch.where(similarity != 0, likelihood + eps, 1.0).log()


def pair_loss_sums(prob1: Tensor, prob2: Tensor, similarity: Tensor, eps: float) -> Tensor:
    """The row sums of `pair_losses`, (N,), with the memory of a block of rows only."""

    def block(rows: Tensor, alike: Tensor) -> Tensor:
        return pair_losses(rows, prob2, alike, eps).sum(1)

    if len(prob1) <= _BLOCK:
        return block(prob1, similarity)
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(prob1), _BLOCK)]
    sums = [
        checkpoint(block, prob1[rows], similarity[rows], use_reentrant=False, preserve_rng_state=False)
        for rows in blocks
    ]
    return torch.cat(sums)


def _signs(alike: Tensor, dtype: torch.dtype) -> Tensor:
    return alike.to(dtype).mul_(2).sub_(1)


def _check_matrix(name: str, values: Tensor) -> None:
    if not values.is_floating_point():
        raise ValueError(f"`{name}` must be floating, got {values.dtype}")
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"`{name}` must be a matrix with at least one column, got shape {tuple(values.shape)}")

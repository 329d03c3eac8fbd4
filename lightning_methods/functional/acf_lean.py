r"""Cluster attention for long sequences: no tensor of N x N stands in memory, forward or backward.

The cluster matrix is made where it is needed, from numbers of which each element has a few. Rows are worked on in
blocks, and a block is computed again in the backward pass. The results are those of `cluster_attention` up to rounding.

Without renormalisation $(\mathrm{softmax}(s) \odot C)\, v = \mathrm{softmax}(s + \log C)\, v \cdot
\exp(\mathrm{LSE}(s + \log C) - \mathrm{LSE}(s))$, row by row, with the logarithm LSE of the sum of exponentials. Where
log C is a difference of prefix sums, as in the neighbour form, a kernel that takes a bias by index and returns LSE
needs no blocks: PyTorch's flex attention.

Source: the methods are those of `span_cluster_matrix` and `neighbor_cluster_matrix`; these forms are ours.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_methods.functional._logits import check_choice, check_positive, check_range
from lightning_methods.functional._shapes import at_least_float32, check_floating, check_shape, no_autocast
from lightning_methods.functional.acf import (
    SpanScores,
    apply_weights,
    check_attention,
    cluster_weights,
    log_growth,
    logits_of_spans,
    prefix_sums,
)
from lightning_methods.functional.acf_neighbors import EPSILON

Kernel: TypeAlias = Literal["blocks", "flex"]


class NeighborLinks(NamedTuple):
    """Probabilities of `neighbor_cluster_matrix`: a_ii (B, N), and a_{i,i+1} (B, N - 1)."""

    own: Tensor
    ahead: Tensor


def span_cluster_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Sequence[SpanScores],
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    normalize: bool = False,
    block_size: int = 128,
) -> Tensor:
    """`cluster_attention` with the matrix of `span_cluster_matrix`, in memory that grows with N instead of N².

    Between layers the scores are carried, two numbers an element and layer, instead of log(1 - M).

    Args:
        query: (B, H, N, d).
        key: (B, H, N, d).
        value: (B, H, N, d).
        scores: `span_scores` of the layers whose clusters have grown into this one's, its own last.
        key_mask: True at real elements, (B, N); padding is attended to by itself alone.
        is_causal: Attend to nothing behind, and compute nothing there.
        dropout_p: As in `cluster_attention`.
        scale: As in `cluster_attention`.
        normalize: As in `cluster_attention`.
        block_size: Rows that stand in memory at a time, at least 1.

    Raises:
        ValueError: If shapes do not fit or `scores` is empty.

    Example:
        >>> import torch
        >>> from lightning_methods.functional import cluster_attention, span_cluster_matrix, span_scores
        >>> x, weight, q = torch.randn(1, 9, 4), torch.randn(1, 8), torch.randn(1, 2, 9, 3)
        >>> lean = span_cluster_attention(q, q, q, [span_scores(x, weight)], block_size=4)
        >>> torch.allclose(lean, cluster_attention(q, q, q, span_cluster_matrix(x, weight).matrix), atol=1e-6)
        True
    """
    batch, length = _check_attention(query, key, value, key_mask, block_size)
    if not scores:
        raise ValueError("`scores` must hold those of this layer at least, got none")
    for layer in scores:
        for name, tensor in zip(layer._fields, layer, strict=True):
            check_shape(f"scores.{name}", tensor, "B, N", (batch, length))
    sums = [prefix_sums(layer) for layer in scores]

    def log_probs(starts: range, ends: range) -> Tensor:
        gap: Tensor | None = None
        for layer, layer_sums in zip(scores, sums, strict=True):
            result, gap = log_growth(logits_of_spans(layer, layer_sums, starts, ends), gap)
        return result

    def rows(block: range, before: Tensor) -> tuple[Tensor, Tensor]:
        """C of some rows, and for all starts up to the block's end the sum of log M over the span up to there.

        `before` is that sum of the starts before the block, up to the block.
        """
        size, start = len(block), block.start
        with no_autocast(query):
            behind = log_probs(range(start), block).cumsum(-1) + before.unsqueeze(-1)
            stop = block.stop if is_causal else length
            closed = torch.ones(size, stop - start, dtype=torch.bool, device=query.device).tril(-1)
            ahead = log_probs(block, range(start, stop)).masked_fill(closed, 0).cumsum(-1)
            carried = torch.cat([behind[..., -1], ahead[..., size - 1]], -1)
            upper = ahead.exp().triu(1)
            square = upper[..., :size] + upper[..., :size].mT + torch.eye(size, dtype=upper.dtype, device=upper.device)
            return torch.cat([behind.exp().mT, square, upper[..., size:]], -1), carried

    attend = _row_attention(query, key, value, key_mask, is_causal, dropout_p, scale, normalize)

    def step(block: range, before: Tensor) -> tuple[Tensor, Tensor]:
        cluster, carried = rows(block, before)
        return attend(block, cluster), carried

    carried = scores[-1].own.new_zeros(batch, 0)
    outputs = []
    for start in range(0, length, block_size):
        output, carried = _recomputed(step, range(start, min(start + block_size, length)), carried)
        outputs.append(output)
    return torch.cat(outputs, 2)


def neighbor_links(
    query: Tensor,
    key: Tensor,
    prior: NeighborLinks | None = None,
    *,
    mask: Tensor | None = None,
    scale: float = 256.0,
) -> NeighborLinks:
    """The probabilities of `neighbor_cluster_matrix` that its matrix is made of, in O(ND).

    Args:
        query: (B, N, D).
        key: (B, N, D).
        prior: Those of the layer before; None: 0.
        mask: As in `neighbor_cluster_matrix`.
        scale: As in `neighbor_cluster_matrix`.

    Raises:
        ValueError: If shapes do not fit or `scale` is not positive.

    Example:
        >>> import torch
        >>> neighbor_links(*torch.zeros(2, 1, 3, 4)).ahead
        tensor([[0.7071, 0.7071]])
    """
    check_floating(query=query, key=key)
    check_shape("query", query, "B, N, D", (None,) * 3)
    batch, length, _ = query.shape
    check_shape("key", key, "B, N, D", query.shape)
    check_positive(scale=scale)
    dtype = at_least_float32(query, key)
    query, key = query.to(dtype), key.to(dtype)
    with no_autocast(query):
        ahead, behind = (query[:, :-1] * key[:, 1:]).sum(-1), (query[:, 1:] * key[:, :-1]).sum(-1)
        logits = torch.stack([F.pad(behind, (1, 0)), F.pad(ahead, (0, 1))], -1) / scale
        inside = query.new_ones(batch, length - 1, dtype=torch.bool)
        lower = upper = inside
        if mask is not None:
            square = (mask != 0).expand(batch, length, length)
            lower, upper = square.diagonal(-1, -2, -1), square.diagonal(1, -2, -1)
        allowed = torch.stack([F.pad(lower, (1, 0), value=False), F.pad(upper, (0, 1), value=False)], -1)
        some = allowed.any(-1, keepdim=True)
        attention = logits.masked_fill(~allowed, torch.finfo(dtype).min).softmax(-1)
        attention = torch.where(some, attention, 1 / length)
        itself = torch.where(some.squeeze(-1), query.new_zeros(()), 1 / length)
        links = NeighborLinks(
            (itself.square() + EPSILON).sqrt(), (attention[:, :-1, 1] * attention[:, 1:, 0] + EPSILON).sqrt()
        )
        if prior is None:
            return links
        return NeighborLinks(*(old + (1 - old) * new for old, new in zip(prior, links, strict=True)))


def neighbor_cluster_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    links: NeighborLinks,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    normalize: bool = False,
    block_size: int = 128,
    kernel: Kernel = "blocks",
) -> Tensor:
    """`cluster_attention` with the matrix of `neighbor_cluster_matrix`, in memory that grows with N instead of N².

    Args:
        query: (B, H, N, d).
        key: (B, H, N, d).
        value: (B, H, N, d).
        links: Of `neighbor_links`.
        key_mask: True at real elements, (B, N); padding is attended to by itself alone.
        is_causal: Attend to nothing behind.
        dropout_p: As in `cluster_attention`; "blocks" only.
        scale: As in `cluster_attention`.
        normalize: As in `cluster_attention`.
        block_size: Rows that "blocks" keeps in memory at a time, at least 1.
        kernel: "blocks" runs everywhere. "flex" is PyTorch's flex attention, compiled on a GPU (on a CPU it runs
            forward only, and not lean).

    Raises:
        ValueError: If shapes do not fit, or "flex" is to do dropout.

    Example:
        >>> import torch
        >>> links = neighbor_links(*torch.randn(2, 1, 9, 4))
        >>> neighbor_cluster_attention(*torch.randn(3, 1, 2, 9, 3), links, block_size=4).shape
        torch.Size([1, 2, 9, 3])
    """
    batch, length = _check_attention(query, key, value, key_mask, block_size)
    check_choice("kernel", kernel, Kernel)
    check_shape("links.own", links.own, "B, N", (batch, length))
    check_shape("links.ahead", links.ahead, "B, N - 1", (batch, length - 1))
    sums = F.pad((links.ahead + EPSILON).log().cumsum(-1), (1, 0))
    if kernel == "flex":
        if dropout_p:
            raise ValueError(f"`kernel` 'flex' has no dropout, got dropout_p {dropout_p}")
        return _flex(query, key, value, links.own, sums, key_mask, is_causal, scale, normalize)
    attend = _row_attention(query, key, value, key_mask, is_causal, dropout_p, scale, normalize)
    index = torch.arange(length, device=query.device)

    def step(block: range) -> Tensor:
        stop = block.stop if is_causal else length
        row, column = index[block.start : block.stop, None], index[:stop]
        difference = sums[:, None, :stop] - sums[:, block.start : block.stop, None]
        products = torch.where(column > row, difference, -difference).masked_fill(row == column, 0).exp() + EPSILON
        return attend(block, torch.where(row == column, links.own[:, block.start : block.stop, None], products))

    blocks = [range(start, min(start + block_size, length)) for start in range(0, length, block_size)]
    return torch.cat([_recomputed(step, block) for block in blocks], 2)


def _row_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
    normalize: bool,
) -> Callable[[range, Tensor], Tensor]:
    """The attention of some rows with their part of C."""
    index = torch.arange(query.shape[2], device=query.device)

    def attend(block: range, cluster: Tensor) -> Tensor:
        row, column = index[block.start : block.stop, None], index[: cluster.shape[-1]]
        allowed = column <= row if is_causal else None
        if key_mask is not None:
            real = key_mask[:, None, None, : len(column)].bool() | (row == column)
            allowed = real if allowed is None else real & allowed
        weights = cluster_weights(
            query[:, :, block.start : block.stop],
            key[:, :, : len(column)],
            cluster,
            attn_mask=allowed,
            scale=scale,
            normalize=normalize,
        )
        return apply_weights(weights, value[:, :, : len(column)], dropout_p)

    return attend


def _recomputed(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False) if torch.is_grad_enabled() else function(*args)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own: Tensor,
    sums: Tensor,
    key_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    normalize: bool,
) -> Tensor:
    from torch.nn.attention import flex_attention as flex  # not in torch 2.4

    # torch 2.9 has renamed how LSE is asked for
    lse = {"return_aux": flex.AuxRequest(lse=True)} if hasattr(flex, "AuxRequest") else {"return_lse": True}
    attention: Any = torch.compile(flex.flex_attention) if query.is_cuda else flex.flex_attention

    def attend(score_mod: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        result, extra = attention(query, key, value, score_mod=score_mod, scale=scale, **lse)
        return result, extra if isinstance(extra, Tensor) else extra.lse

    def open_only(score: Tensor, b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        allowed = j <= i if is_causal else j >= 0
        if key_mask is not None:
            allowed = allowed & (key_mask[b, j].bool() | (i == j))
        return torch.where(allowed, score, -math.inf)

    def clustered(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        difference = torch.where(j > i, sums[b, j] - sums[b, i], sums[b, i] - sums[b, j])
        cluster = torch.where(i == j, own[b, i], difference.exp() + EPSILON)
        return open_only(score + cluster.log(), b, h, i, j)

    result, inside = attend(clustered)
    if normalize:
        return result
    _, total = attend(open_only)
    return result * (inside - total).exp().unsqueeze(-1).to(result.dtype)


def _check_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, block_size: int
) -> tuple[int, int]:
    batch, _, length = check_attention(query, key, value)
    if key_mask is not None:
        check_shape("key_mask", key_mask, "B, N", (batch, length))
    check_range("block_size", block_size, 1, math.inf)
    return batch, length

r"""ACF, or Ada-ClustFormer: attention whose window is learned, soft, and grows from layer to layer.

Every attention weight from i to j is multiplied by C_ij in (0, 1], the probability that the elements i to j are one
cluster. C is a running product over neighbouring elements, so that one unlikely element closes the window.

Letters: B samples, N elements, D width, H heads, d = D / H; i is the start of a span and j its end.

Everything about clusters is computed in float32 at least, without autocast.

Sources: Wang et al., "Adaptively Clustering Neighbor Elements for Image-Text Generation", IEEE Transactions on
Multimedia 2024, arXiv 2301.01955, and the authors' code (ZihuaEvan/ACFModel), whose formulas and results these are
(the paper's body could not be read). The linear-time form of the logits and the logarithmic forms are ours.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_methods.functional._shapes import at_least_float32, check_floating, check_shape, no_autocast

#: Least logit: the logarithms of smaller probabilities and of their complements leave float32.
_LEAST_LOGIT = -80.0


class ClusterResult(NamedTuple):
    """C, symmetric with unit diagonal, and log(1 - M), 0 below the diagonal, for the next layer; (..., N, N) both."""

    matrix: Tensor
    log_gap: Tensor


class SpanScores(NamedTuple):
    """What the logits of all spans are made of: an element's own share and its share in the means, (B, N) both."""

    own: Tensor
    mean: Tensor


def span_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Logits that element j continues the cluster which starts at i.

    $z_{ij} = w_a \cdot x_j + w_m \cdot \mathrm{mean}(x_i, \dots, x_j) + b$ for i ≤ j, both ends included; 0 below the
    diagonal. As z is linear in x, the means are differences of prefix sums of $w_m \cdot x$: O(ND + N²).

    Args:
        x: Normalised elements, (B, N, D).
        weight: $[w_a; w_m]$, (1, 2D).
        bias: b, (1,), or None.

    Returns:
        (B, N, N), float32 at least.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> import torch
        >>> span_logits(torch.tensor([[[1.0], [3.0]]]), torch.tensor([[1.0, 10.0]]))
        tensor([[[11., 23.],
                 [ 0., 33.]]])
    """
    return logits_of_scores(span_scores(x, weight, bias))


def cluster_from_logits(logits: Tensor, log_gap: Tensor | None = None) -> ClusterResult:
    r"""Cluster matrix of span logits, grown from that of the layer before.

    With σ = sigmoid(z), the probabilities $M = M' + (1 - M') \sigma$ grow over the layers, and

    $C_{ij} = \prod_{k=i}^{j} M_{ik}$ for i < j, $C_{ji} = C_{ij}$, $C_{ii} = 1$.

    The product contains k = i although $C_{ii}$ is 1. $C_{ij}$ depends on the elements from i to j only, so that a
    causal layer stays causal. Carried is g = log(1 - M), which grows by logsigmoid(-z) a layer.

    Args:
        logits: z, (..., N, N); what is below the diagonal is not read. Logits below -80 count as -80.
        log_gap: g of the layer before; None for the first one, whose M' is 0.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> import torch
        >>> first = cluster_from_logits(torch.zeros(3, 3))
        >>> first.matrix
        tensor([[1.0000, 0.2500, 0.1250],
                [0.2500, 1.0000, 0.2500],
                [0.1250, 0.2500, 1.0000]])
        >>> cluster_from_logits(torch.zeros(3, 3), first.log_gap).matrix[0]
        tensor([1.0000, 0.5625, 0.4219])
    """
    log_probs, log_gap = grow(logits, log_gap)
    with no_autocast(log_probs):
        upper = log_probs.cumsum(-1).exp().triu(1)
        matrix = upper + upper.mT + torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    return ClusterResult(matrix, log_gap)


def span_cluster_matrix(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, log_gap: Tensor | None = None
) -> ClusterResult:
    """`cluster_from_logits` of the `span_logits`.

    Args:
        x: Normalised elements, (B, N, D).
        weight: (1, 2D).
        bias: (1,), or None.
        log_gap: Of the layer before, (B, N, N); None for the first.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> import torch
        >>> span_cluster_matrix(torch.randn(2, 5, 4), torch.zeros(1, 8), torch.full((1,), 6.0)).matrix[0, 0]
        tensor([1.0000, 0.9951, 0.9926, 0.9901, 0.9877])
    """
    return cluster_from_logits(span_logits(x, weight, bias), log_gap)


def cluster_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cluster: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    normalize: bool = False,
) -> Tensor:
    r"""Attention with weights multiplied by a cluster matrix after the softmax.

    $(\mathrm{softmax}(q k^\top / \sqrt d + \mathrm{mask}) \odot C)\, v$: the rows sum to less than 1, as in the
    authors' code. A row without an open key attends to all keys alike. Nothing is asked of C, which may be 0 or above 1
    (the grid's official layout); for long sequences see `span_cluster_attention`.

    Args:
        query: (B, H, N, d).
        key: (B, H, N, d).
        value: (B, H, N, d).
        cluster: C, (B, N, N) for all heads, or (B, H, N, N).
        attn_mask: Bool, True where attention is allowed, or added to the logits; broadcastable to (B, H, N, N).
        dropout_p: Dropout probability on the products of weights and C.
        scale: Of the logits; None: 1/√d.
        normalize: Divide the rows by their sums (ours).

    Returns:
        (B, H, N, d) in the dtype of `value`; the softmax is computed in float32 at least.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> import torch
        >>> q = k = torch.zeros(1, 1, 2, 1)
        >>> v = torch.tensor([[[[1.0], [5.0]]]])
        >>> cluster = torch.tensor([[[1.0, 0.5], [0.5, 1.0]]])
        >>> cluster_attention(q, k, v, cluster).squeeze()
        tensor([1.7500, 2.7500])
        >>> cluster_attention(q, k, v, cluster, normalize=True).squeeze()
        tensor([2.3333, 3.6667])
    """
    check_floating(cluster=cluster)
    batch, heads, length = check_attention(query, key, value)
    if cluster.shape not in ((batch, length, length), (batch, heads, length, length)):
        expected = f"(B, N, N) = {(batch, length, length)} or (B, H, N, N)"
        raise ValueError(f"`cluster` must have shape {expected}, got {tuple(cluster.shape)}")
    weights = cluster_weights(query, key, cluster, attn_mask=attn_mask, scale=scale, normalize=normalize)
    return apply_weights(weights, value, dropout_p)


def check_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int, int]:
    """B, H and N of what attends, (B, H, N, d), where values may have a width of their own."""
    check_floating(query=query, key=key, value=value)
    check_shape("query", query, "B, H, N, d", (None,) * 4)
    batch, heads, length, _ = query.shape
    check_shape("key", key, "B, H, N, d", query.shape)
    check_shape("value", value, "B, H, N, d", (batch, heads, length, None))
    return batch, heads, length


def apply_weights(weights: Tensor, value: Tensor, dropout_p: float) -> Tensor:
    """Dropout acts on the products of weights and clusters."""
    if dropout_p:
        weights = F.dropout(weights, dropout_p)
    return weights.to(value.dtype) @ value


def cluster_weights(
    query: Tensor,
    key: Tensor,
    cluster: Tensor,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
) -> Tensor:
    """What `cluster_attention` multiplies the values by, (B, H, queries, keys), float32 at least."""
    logits = query @ key.mT
    logits = logits.to(at_least_float32(logits)) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    weights = masked_logits(logits, attn_mask).softmax(-1) * (cluster if cluster.ndim == 4 else cluster.unsqueeze(1))
    if normalize:
        total = weights.sum(-1, keepdim=True)
        weights = weights / total.masked_fill(total == 0, 1)
    return weights


def masked_logits(logits: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Logits with a finite number where attention is not allowed: a row without an open key has a softmax, too."""
    if attn_mask is None:
        return logits
    least = torch.finfo(logits.dtype).min
    if attn_mask.dtype == torch.bool:
        return logits.masked_fill(~attn_mask, least)
    return (logits + attn_mask).clamp_min(least)


def span_scores(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> SpanScores:
    r"""The two numbers of an element that `span_logits` are made of: $w_a \cdot x + b$ and $w_m \cdot x$.

    The mean of the second over the sequence is moved to the first, which changes no logit and keeps the prefix sums of
    long sequences small.

    Args:
        x: Normalised elements, (B, N, D).
        weight: $[w_a; w_m]$, (1, 2D).
        bias: b, (1,), or None.

    Returns:
        Two tensors (B, N), float32 at least.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> import torch
        >>> span_scores(torch.tensor([[[1.0], [3.0]]]), torch.tensor([[1.0, 10.0]]))
        SpanScores(own=tensor([[21., 23.]]), mean=tensor([[-10.,  10.]]))
    """
    check_floating(x=x, weight=weight, bias=bias)
    check_shape("x", x, "B, N, D", (None,) * 3)
    check_shape("weight", weight, "1, 2D", (1, 2 * x.shape[2]))
    dtype = at_least_float32(x, weight)
    with no_autocast(x):
        own, mean = F.linear(x.to(dtype), weight.to(dtype).view(2, -1)).unbind(-1)
        if bias is not None:
            check_shape("bias", bias, "1", (1,))
            own = own + bias.to(dtype)
        level = mean.mean(-1, keepdim=True)
        return SpanScores(own + level, mean - level)


def logits_of_scores(scores: SpanScores) -> Tensor:
    """(..., N) to (..., N, N), 0 below the diagonal."""
    every = range(scores.own.shape[-1])
    return logits_of_spans(scores, prefix_sums(scores), every, every).triu()


def prefix_sums(scores: SpanScores) -> Tensor:
    """Of the shares in the means, (..., N) to (..., N + 1)."""
    return F.pad(scores.mean.cumsum(-1), (1, 0))


def logits_of_spans(scores: SpanScores, sums: Tensor, starts: range, ends: range) -> Tensor:
    """Logits of the spans from some starts to some ends, (..., starts, ends); meaningless where the end is earlier."""
    first, last = (torch.arange(part.start, part.stop, device=sums.device) for part in (starts, ends))
    count = (last - first[:, None] + 1).clamp_min(1)
    upto, before = sums[..., ends.start + 1 : ends.stop + 1], sums[..., starts.start : starts.stop]
    means = (upto.unsqueeze(-2) - before.unsqueeze(-1)) / count
    return scores.own[..., ends.start : ends.stop].unsqueeze(-2) + means


def grow(logits: Tensor, log_gap: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log M and log(1 - M), both 0 below the diagonal."""
    check_floating(logits=logits, log_gap=log_gap)
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"`logits` must have shape (..., N, N), got {tuple(logits.shape)}")
    if log_gap is not None and log_gap.shape != logits.shape:
        raise ValueError(
            f"`log_gap` must have the shape {tuple(logits.shape)} of the logits, got {tuple(log_gap.shape)}"
        )
    dtype = at_least_float32(logits)
    with no_autocast(logits):
        closed = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril(-1)
        logits = logits.to(dtype).masked_fill(closed, 0)
        log_probs, gap = log_growth(logits, None if log_gap is None else log_gap.to(dtype))
        return log_probs.masked_fill(closed, 0), gap.masked_fill(closed, 0)


def log_growth(logits: Tensor, log_gap: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log M and log(1 - M), element by element."""
    logits = logits.clamp_min(_LEAST_LOGIT)
    gap = F.logsigmoid(-logits)
    if log_gap is None:
        return F.logsigmoid(logits), gap
    gap = gap + log_gap
    return torch.log(-torch.expm1(gap)), gap

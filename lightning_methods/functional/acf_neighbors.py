r"""Constituent attention of the Tree Transformer, which ACF descends from: clusters from scores of neighbours.

Source: Wang et al., "Tree Transformer: Integrating Tree Structures into Self-Attention", EMNLP 2019, arXiv 1909.06639,
and the authors' code.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_methods.functional._logits import check_positive
from lightning_methods.functional._shapes import at_least_float32, check_floating, check_shape, no_autocast

#: Keeps roots and logarithms off zero, and stands in the matrix beside the products; the authors' number.
EPSILON = 1e-9


class NeighborClusterResult(NamedTuple):
    """C, and the probabilities a that the next layer takes as its prior; (B, N, N) both."""

    matrix: Tensor
    probability: Tensor


def neighbor_cluster_matrix(
    query: Tensor, key: Tensor, prior: Tensor | None = None, *, mask: Tensor | None = None, scale: float = 256.0
) -> NeighborClusterResult:
    r"""Cluster matrix from the mutual attention of neighbours.

    With s the softmax of $q k^\top$ / scale over the one or two neighbours of an element,
    $\hat p_{ij} = \sqrt{s_{ij} s_{ji} + 10^{-9}}$ and $a = \mathrm{prior} + (1 - \mathrm{prior}) \hat p$:

    $C_{ij} = \prod_{k=i}^{j-1} (a_{k,k+1} + 10^{-9}) + 10^{-9}$ for i < j, $C_{ji} = C_{ij}$, and $C_{ii} = a_{ii}$,
    which is near the prior and not 1. Only neighbours are multiplied: O(ND + N²).

    Args:
        query: (B, N, D).
        key: (B, N, D).
        prior: The probability of the layer before, (B, N, N); None: 0.
        mask: True where attention is allowed, broadcastable to (B, N, N), such as (B, 1, N) for padding. A row that
            has no open neighbour spreads its attention over all elements.
        scale: Divides the products; 256 in the Tree Transformer, D in the code of ACF.

    Raises:
        ValueError: If shapes do not fit or `scale` is not positive.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 3, 2)
        >>> neighbor_cluster_matrix(x, x).matrix
        tensor([[[3.1623e-05, 7.0711e-01, 5.0000e-01],
                 [7.0711e-01, 3.1623e-05, 7.0711e-01],
                 [5.0000e-01, 7.0711e-01, 3.1623e-05]]])
    """
    check_floating(query=query, key=key, prior=prior)
    check_shape("query", query, "B, N, D", (None,) * 3)
    batch, length, _ = query.shape
    check_shape("key", key, "B, N, D", query.shape)
    if prior is not None:
        check_shape("prior", prior, "B, N, N", (batch, length, length))
    check_positive(scale=scale)
    dtype = at_least_float32(query, key)
    with no_autocast(query):
        attention = _neighbor_attention(query.to(dtype), key.to(dtype), mask, scale)
        probability = (attention * attention.mT + EPSILON).sqrt()
        if prior is not None:
            probability = prior + (1 - prior) * probability
        links = (probability.diagonal(1, -2, -1) + EPSILON).log()
        sums = F.pad(links.cumsum(-1), (1, 0))
        # From -inf below the diagonal the exponential is 0, with gradient 0; larger differences would overflow.
        lower = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        upper = (sums.unsqueeze(-2) - sums.unsqueeze(-1)).masked_fill(lower, float("-inf")).exp()
        own = torch.diag_embed(probability.diagonal(0, -2, -1) - EPSILON)
        return NeighborClusterResult(upper + upper.mT + own + EPSILON, probability)


def _neighbor_attention(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    ahead = torch.diag_embed((query[:, :-1] * key[:, 1:]).sum(-1), 1)
    behind = torch.diag_embed((query[:, 1:] * key[:, :-1]).sum(-1), -1)
    logits = (ahead + behind) / scale
    index = torch.arange(query.shape[1], device=query.device)
    allowed = (index - index[:, None]).abs() == 1
    if mask is not None:
        allowed = allowed & (mask != 0)
    return logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).softmax(-1)

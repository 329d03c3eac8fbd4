"""The draw of hard partners for EqSim's close pairs; the distribution is that of the authors' code."""

import math

import torch
from torch import Tensor

from lightning_methods.functional._eqsim_checks import check_exclude, check_square_matrix
from lightning_methods.functional._logits import check_range, upcast


@torch.no_grad()
def eqsim_sample_close(
    logits: Tensor,
    *,
    num_samples: int = 4,
    num_anchors: int | None = None,
    exclude: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw hard partners for each anchor; no gradient.

    For anchor i, K samples without replacement with probability ∝ softmax(L[:, i]), the images that its text takes for
    its own, and then K with probability ∝ softmax(L[i, :]), the texts that its image takes for its own; never i itself.
    The two halves may share samples. Drawn as the K largest of logit plus Gumbel noise, which is the same
    distribution and does not underflow.

    Args:
        logits: L, floating, (G, G); images are rows, matched pairs on the diagonal.
        num_samples: K of each half, 1 to G − 1.
        num_anchors: B, the first B samples are anchors; None: all G.
        exclude: Boolean (G, G); sample j is never drawn for anchor i if it is True at (i, j). Where fewer than K are
            left, the anchor itself fills the row, which `eqsim_close_far_loss` takes for a zero.
        generator: Of the device of the logits; None: the global one.

    Returns:
        Integers (B, 2K).

    Raises:
        ValueError: If shapes or dtypes do not fit or a number is out of its range.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[9.0, 1.0, 99.0], [99.0, 9.0, 1.0], [1.0, 99.0, 9.0]])
        >>> eqsim_sample_close(logits, num_samples=1)
        tensor([[1, 2],
                [2, 0],
                [0, 1]])
    """
    check_square_matrix("logits", logits)
    check_exclude(exclude, len(logits))
    size = len(logits)
    anchors = size if num_anchors is None else num_anchors
    check_range("num_anchors", anchors, 0, size)
    if not 1 <= num_samples <= size - 1:
        raise ValueError(f"`num_samples` must be at least 1 and less than the batch of {size}, got {num_samples}")
    blocked = torch.eye(size, dtype=torch.bool, device=logits.device)[:anchors]
    if exclude is not None:
        blocked = blocked | exclude[:anchors]
    (logits,) = upcast(logits)
    halves = [_draw(side, blocked, num_samples, generator) for side in (logits.T[:anchors], logits[:anchors])]
    return torch.cat(halves, 1)


def _draw(scores: Tensor, blocked: Tensor, number: int, generator: torch.Generator | None) -> Tensor:
    exponential = torch.empty_like(scores).exponential_(generator=generator)
    keys, index = (scores - exponential.log()).masked_fill(blocked, -math.inf).topk(number, 1)
    anchor = torch.arange(len(scores), device=scores.device)
    return torch.where(keys > -math.inf, index, anchor[:, None])

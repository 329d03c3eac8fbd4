"""How well a network tells motion from still evidence: accuracy on SCUBA and SCUFO clips, in pairs.

Source: Li, Liu, Zhang, Li, "Mitigating and Evaluating Static Bias of Action Representations in the Background and the
Foreground", ICCV 2023, arXiv 2211.12883. There is no public code of the contrasted accuracy: its definition is the one
that follow-up work restates.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from lightning_methods.functional._index import check_integer
from lightning_methods.functional._logits import upcast


class ContrastedResult(NamedTuple):
    """Shares of pairs, in [0, 1]: right on SCUBA, right on SCUFO, right on SCUBA and wrong on SCUFO."""

    scuba: Tensor
    scufo: Tensor
    contrasted: Tensor


def contrasted_accuracy(scuba_preds: Tensor, scufo_preds: Tensor, targets: Tensor) -> ContrastedResult:
    """Top-1 accuracy on SCUBA clips and on their SCUFO twins, and the share of pairs that only motion explains.

    A pair counts for `contrasted` if the network is right on the moving clip and wrong on the frozen frame of the same
    clip. Averages of each set alone cannot give it; they bound it: scuba − scufo ≤ contrasted ≤ min(scuba, 1 − scufo).

    Args:
        scuba_preds: Class indices (B,), or scores (B, K), of which the first of the largest counts.
        scufo_preds: The same of the twins, in the same order.
        targets: Class indices (B,).

    Returns:
        Three shares in [0, 1], (); NaN without a pair.

    Raises:
        ValueError: If shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> contrasted_accuracy(torch.tensor([0, 1, 2, 0]), torch.tensor([0, 2, 1, 0]), torch.tensor([0, 1, 2, 3]))
        ContrastedResult(scuba=tensor(0.7500), scufo=tensor(0.2500), contrasted=tensor(0.5000))
    """
    scuba = is_right("scuba_preds", scuba_preds, targets)
    scufo = is_right("scufo_preds", scufo_preds, targets)
    return ContrastedResult(*(hits.float().mean() for hits in (scuba, scufo, scuba & ~scufo)))


def is_right(name: str, preds: Tensor, targets: Tensor) -> Tensor:
    """Boolean (B,): whether the predictions, an argument called `name`, are the targets."""
    check_integer("targets", targets)
    if targets.ndim != 1:
        raise ValueError(f"`targets` must have shape (B,), got {tuple(targets.shape)}")
    if preds.ndim not in (1, 2) or len(preds) != len(targets) or (preds.ndim == 2 and preds.shape[1] == 0):
        expected = f"({len(targets)},) or ({len(targets)}, K)"
        raise ValueError(f"`{name}` must have shape {expected}, got {tuple(preds.shape)}")
    if preds.ndim == 1:
        check_integer(name, preds)
        return preds == targets
    return preds.argmax(1) == targets


def average_views(logits: Tensor) -> Tensor:
    """Mean over the views of a sample, crops and clips, of the softmax.

    Args:
        logits: (B, V, K), floating.

    Returns:
        Probabilities (B, K), in float32 at least.

    Raises:
        ValueError: If shape or dtype do not fit.

    Example:
        >>> import torch
        >>> average_views(torch.tensor([[[0.0, 100.0], [0.0, 0.0]]]))
        tensor([[0.2500, 0.7500]])
    """
    if not logits.is_floating_point() or logits.ndim != 3 or 0 in logits.shape[1:]:
        found = f"{tuple(logits.shape)} of {logits.dtype}"
        raise ValueError(f"`logits` must be floating and of shape (B, V, K), got {found}")
    (logits,) = upcast(logits)
    return F.softmax(logits, 2).mean(1)

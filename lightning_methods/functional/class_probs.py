"""Mean prediction of each class over an epoch: the class-wise weights of IKL.

Where they come from is the authors' code: the means of one epoch serve in the next, starting from uniform
rows. The paper defines them as the true means and does not mention the delay.
"""

import torch
from torch import Tensor

from lightning_methods.functional._logits import (
    check_logits,
    check_positive,
    check_range,
    check_square,
    check_target,
    rows_of_target,
    softmax,
    upcast,
)


def accumulate_class_probs(class_sums: Tensor, logits: Tensor, target: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Add each sample's prediction to the row of its class; no gradient.

    Args:
        class_sums: (C, C), the sums so far.
        logits: Teacher or clean logits, (N, C) or (N, C, d1, ...).
        target: Class indices (N[, d1, ...]).
        temperature: Temperature > 0 of the predictions.

    Returns:
        A new tensor (C, C): class_sums + Σ_i e_{target_i} softmax(logits_i / temperature)ᵀ.

    Raises:
        ValueError: If shapes or dtypes do not fit, or (on a CPU) if `target` leaves [0, C).

    Example:
        >>> import torch
        >>> accumulate_class_probs(torch.zeros(2, 2), torch.zeros(3, 2), torch.tensor([1, 1, 0]))
        tensor([[0.5000, 0.5000],
                [1.0000, 1.0000]])
    """
    return accumulate_class_probs_(class_sums.detach().clone(), logits, target, temperature)


@torch.no_grad()
def normalize_class_probs(class_sums: Tensor, previous: Tensor, *, momentum: float = 1.0) -> Tensor:
    """Turn an epoch's sums into the class means for the next epoch; no gradient.

    A class without a sample keeps its row of `previous` (the authors' code divides by zero there).

    Args:
        class_sums: (C, C), from `accumulate_class_probs`.
        previous: (C, C), the class means so far.
        momentum: Share of the new means, in [0, 1]; the rest stays with `previous`.

    Returns:
        A new tensor (C, C) with rows that sum to one if those of `previous` do.

    Raises:
        ValueError: If the shapes differ or `momentum` lies outside [0, 1].

    Example:
        >>> import torch
        >>> normalize_class_probs(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.full((2, 2), 0.5))
        tensor([[0.2500, 0.7500],
                [0.5000, 0.5000]])
    """
    if class_sums.ndim != 2 or class_sums.shape[0] != class_sums.shape[1]:
        raise ValueError(f"`class_sums` must have shape (C, C), got {tuple(class_sums.shape)}")
    if previous.shape != class_sums.shape:
        expected, found = tuple(class_sums.shape), tuple(previous.shape)
        raise ValueError(f"`previous` must have the shape of `class_sums`, {expected}, got {found}")
    check_range("momentum", momentum, 0, 1)
    total = class_sums.sum(1, keepdim=True)
    # lerp keeps the rows of absent classes to the last bit, which a weighted sum would not.
    return torch.lerp(previous, torch.where(total > 0, class_sums / total, previous), momentum)


def accumulate_class_probs_(class_sums: Tensor, logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """`accumulate_class_probs` in place, so that a training step does not copy C² numbers."""
    check_logits(logits=logits)
    check_target(target, logits)
    check_square("class_sums", class_sums, logits)
    check_positive(temperature=temperature)
    rows_of_target(class_sums[:, 0], target)  # for its error: index_add_ raises one that says less
    probs = softmax(upcast(logits)[0], temperature).movedim(1, -1).reshape(-1, logits.shape[1])
    return class_sums.index_add_(0, target.reshape(-1).long(), probs.to(class_sums.dtype))

"""The consistency penalties that EqSim is compared with, in the manner of CyCLIP; formulas from EqSim's code."""

from torch import Tensor

from lightning_methods.functional._eqsim_checks import check_square_matrix
from lightning_methods.functional._logits import check_positive, upcast


def cross_modal_consistency_loss(logits: Tensor, *, logit_scale: float | Tensor, weight: float = 1.0) -> Tensor:
    r"""Mismatched similarities should not depend on which side is the image: $w\,\mathrm{mean}[((L - L^T) / s)^2]\,G$.

    Args:
        logits: L, floating, (G, G), images as rows.
        logit_scale: s > 0, the multiplier that made the logits from cosines; a number, or a tensor with gradient.
        weight: w.

    Raises:
        ValueError: If `logits` is not a square matrix or a number `logit_scale` is not positive.

    Example:
        >>> import torch
        >>> cross_modal_consistency_loss(torch.tensor([[9.0, 1.0], [3.0, 9.0]]), logit_scale=10.0)
        tensor(0.0400)
    """
    check_square_matrix("logits", logits)
    return _consistency(logits, logits.T, logit_scale, weight)


def in_modal_consistency_loss(
    image_logits: Tensor, text_logits: Tensor, *, logit_scale: float | Tensor, weight: float = 1.0
) -> Tensor:
    r"""Two images should be as similar as their texts: $w\,\mathrm{mean}[((L_{ii} - L_{tt}) / s)^2]\,G$.

    Args:
        image_logits: L_ii, scaled similarities among images, floating, (G, G).
        text_logits: L_tt, the same among texts. The diagonals take part.
        logit_scale: s > 0, as in `cross_modal_consistency_loss`.
        weight: w.

    Raises:
        ValueError: If the logits are not square matrices of one size or a number `logit_scale` is not positive.

    Example:
        >>> import torch
        >>> in_modal_consistency_loss(torch.eye(2), torch.ones(2, 2), logit_scale=1.0)
        tensor(1.)
    """
    check_square_matrix("image_logits", image_logits)
    check_square_matrix("text_logits", text_logits)
    if image_logits.shape != text_logits.shape:
        expected, found = tuple(image_logits.shape), tuple(text_logits.shape)
        raise ValueError(f"`text_logits` must have the shape of `image_logits` {expected}, got {found}")
    return _consistency(image_logits, text_logits, logit_scale, weight)


def _consistency(first: Tensor, second: Tensor, logit_scale: float | Tensor, weight: float) -> Tensor:
    if not isinstance(logit_scale, Tensor):
        check_positive(logit_scale=logit_scale)
    first, second = upcast(first, second)
    return weight * len(first) * ((first - second) / logit_scale).square().mean()

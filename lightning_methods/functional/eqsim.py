r"""EqSim: ask opposite changes of an image-text pair to move the similarity by the same amount.

Two matched pairs (image i, text i) and (image j, text j) give four similarities, written with the image first:
s00 = S[i, i], s01 = S[i, j] (image i with text j), s10 = S[j, i] (image j with text i), s11 = S[j, j]. Changing the
text under a fixed image changes the similarity by a = s00 − s01 or b = s11 − s10; changing the image under a fixed
text, by c = s00 − s10 or d = s11 − s01. The criterion compares

- text side: a with b;
- image side: c with d;
- group side: c with a, and b with d.

For a batch, S is the matrix of similarities with images as rows, or the softmax of its rows. The text-to-image
softmax plays no part, so that images and texts do not stand alike. Gradients reach S everywhere; only the draw of
the close pairs has none.

Equal similarities everywhere fulfil the criterion: these losses regularise a retrieval loss and cannot replace it.

Everything is computed in float32 at least and without waiting for the device. Inside CUDA kernels an index out of
range is a device-side assertion; on a CPU it is a ValueError.

Source: Wang et al., "Equivariant Similarity for Vision-Language Foundation Models", ICCV 2023, arXiv 2303.14465. Only
the paper's abstract could be read: all formulas are those of the authors' code. `exclude` is not in it, and the closed
form over all pairs is our own derivation.
"""

import math
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_methods.functional._eqsim_checks import (
    check_exclude,
    check_floating,
    check_matrix,
    check_same_shape,
    check_square_matrix,
)
from lightning_methods.functional._eqsim_criterion import CloseAndFar, Criterion, Hinge
from lightning_methods.functional._index import check_integer, pick
from lightning_methods.functional._logits import Reduction, check_choice, check_positive, check_range, reduce, upcast

Activation: TypeAlias = Literal["softmax"]
ItmActivation: TypeAlias = Literal["linear", "sigmoid", "softmax"]


class EqSimTerms(NamedTuple):
    """`total` = `close` + `far`; both are weighted already, and all three are scalars with gradients."""

    total: Tensor
    close: Tensor
    far: Tensor


def eqsim_quad_loss(
    s00: Tensor,
    s01: Tensor,
    s10: Tensor,
    s11: Tensor,
    *,
    text_side: bool = True,
    image_side: bool = True,
    group_side: bool = False,
    margin: float = 0.0,
    weight: float = 1.0,
    hinge: Hinge = "mean",
    positive_reg: bool = False,
    relative: bool = False,
    eps: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The criterion on given quadruples: the sum of the sides that are on.

    For each two changes x and y that a side compares (see the top of this module):

    - hinge "mean": $w \max(\mathrm{mean}[(x - y)^2] - m, 0)$, the mean over all quadruples. Below the margin there is
      no gradient at all. This is what the authors use.
    - hinge "pair": $w\,\mathrm{mean}[\max((x - y)^2 - m, 0)]$. It is in the authors' code too, but nothing there uses
      it, and two of its branches forget the mean.

    Args:
        s00: Image i with text i, floating, broadcastable to the others.
        s01: Image i with text j.
        s10: Image j with text i, same shape as `s01`.
        s11: Image j with text j, same shape as `s01`.
        text_side: Compare the changes of the text.
        image_side: Compare the changes of the image.
        group_side: Compare the changes of the text with those of the image; this is twice the hinge of the mean of
            (s01 − s10)² without `relative`.
        margin: m ≥ 0, in units of squared similarity.
        weight: w. As in the authors' code it has no effect with `relative`.
        hinge: Before ("pair") or after ("mean") the mean.
        positive_reg: For every side that is on, add the mean of max(−x, 0) over the changes it compares, unweighted
            and never relative: a mismatch should lower the similarity.
        relative: Divide a and c by |s00|, b and d by |s11|. It explodes where these are near zero.
        eps: Added to these divisors, ≥ 0. The authors have none.
        reduction: "none" (the sum of the sides of each quadruple) and "sum" go with hinge "pair" only.

    Returns:
        A scalar, zero if there is no quadruple; with "none", of the shape of `s01`.

    Raises:
        ValueError: If shapes, dtypes or options do not fit, or no side is on.

    Example:
        >>> import torch
        >>> s00, s01, s10, s11 = torch.tensor([[0.9], [0.5], [0.6], [0.8]])
        >>> eqsim_quad_loss(s00, s01, s10, s11, image_side=False)  # (0.4 - 0.2)²
        tensor(0.0400)
    """
    criterion = Criterion(text_side, image_side, group_side, margin, weight, hinge, positive_reg, relative, eps).check()
    check_choice("reduction", reduction, Reduction)
    if hinge == "mean" and reduction != "mean":
        raise ValueError(f"`reduction` must be 'mean' with hinge 'mean', got {reduction!r}; hinge 'pair' takes all")
    check_same_shape(s01=s01, s10=s10, s11=s11)
    check_floating("s00", s00)
    sizes = zip(reversed(s00.shape), reversed(s01.shape), strict=False)
    if s00.ndim > s01.ndim or any(found not in (1, size) for found, size in sizes):
        raise ValueError(f"`s00` must be broadcastable to `s01` {tuple(s01.shape)}, got {tuple(s00.shape)}")
    quads = upcast(s00.expand_as(s01), s01, s10, s11)
    return criterion.mean_loss(quads) if reduction == "mean" else reduce(criterion.quad_losses(quads), reduction)


def eqsim_all_pairs_loss(
    logits: Tensor,
    *,
    activation: Activation | None = "softmax",
    text_side: bool = True,
    image_side: bool = True,
    group_side: bool = False,
    margin: float = 0.1,
    weight: float = 0.5,
    hinge: Hinge = "mean",
    positive_reg: bool = False,
    relative: bool = False,
    eps: float = 0.0,
    exclude: Tensor | None = None,
) -> Tensor:
    r"""The criterion over all B(B − 1)/2 pairs of the first B samples.

    With p = s00 − s11 and e = s01 − s10 the compared changes differ by p − e (text), p + e (image) and ±e (group), and
    the means of p², e² and pe over all pairs follow from the diagonal and from S − Sᵀ: O(B²) without any list of pairs.
    It serves the released options; the others, and `exclude`, go through the list.

    Args:
        logits: L, floating, (B, G) with G ≥ B; images are rows, matched pairs on the diagonal.
        activation: "softmax" makes S the softmax of each row of L over all G columns; None takes S = L, for cosines.
        text_side: As in `eqsim_quad_loss`, like all arguments below but the last.
        image_side: As above.
        group_side: As above.
        margin: As above.
        weight: As above.
        hinge: As above.
        positive_reg: As above.
        relative: As above.
        eps: As above.
        exclude: Boolean (B, B); samples i and j do not make a pair if it is True at (i, j) or (j, i), and the means run
            over the pairs that are left. For batches in which several texts belong to one image.

    Returns:
        A scalar, zero if there is no pair.

    Raises:
        ValueError: If shapes, dtypes or options do not fit, or no side is on.

    Example:
        >>> import torch
        >>> cosines = torch.tensor([[0.9, 0.5], [0.6, 0.8]])
        >>> eqsim_all_pairs_loss(cosines, activation=None, image_side=False, margin=0.0, weight=1.0)
        tensor(0.0400)
    """
    criterion = Criterion(text_side, image_side, group_side, margin, weight, hinge, positive_reg, relative, eps).check()
    check_matrix("logits", logits)
    rows, columns = logits.shape
    if columns < rows:
        raise ValueError(f"`logits` must have at least as many columns as rows, got {rows} x {columns}")
    check_exclude(exclude, rows)
    scores = _activate(logits, activation)[:, :rows]
    if rows < 2:
        return scores.sum() * 0
    if hinge == "mean" and exclude is None and not (positive_reg or relative):
        return criterion.all_pairs_loss(scores)
    first, second = torch.triu_indices(rows, rows, 1, device=logits.device)
    matched = scores.diagonal()
    keep = None if exclude is None else ~(exclude | exclude.T)[first, second]
    quads = [matched[first], scores[first, second], scores[second, first], matched[second]]
    return criterion.mean_loss(quads, keep)


def eqsim_close_far_loss(
    logits: Tensor,
    close_index: Tensor,
    *,
    activation: Activation | None = "softmax",
    text_side: bool = True,
    image_side: bool = True,
    group_side: bool = False,
    margin: float = 0.1,
    weight: float = 0.5,
    far_margin: float = 0.0,
    far_scale: float = 1.0,
    hinge: Hinge = "mean",
    positive_reg: bool = False,
    relative: bool = False,
    eps: float = 0.0,
    exclude: Tensor | None = None,
) -> EqSimTerms:
    r"""The criterion on hard pairs, and symmetric mismatched scores on all others: the variant that was released.

    - close: the criterion over the quadruples of each anchor i with each j in `close_index[i]`. An index that appears
      twice counts twice.
    - far: $w / s \cdot \max(\mathrm{mean}[((S - S^T) \circ M)^2] - m_\mathrm{far}, 0)$, where M is 0 at the close pairs
      (in both orders) and 1 elsewhere. The mean runs over all G² entries, those that are 0 included.

    When each rank has anchors of its own in a gathered batch, the close pairs of the other ranks' anchors are far here.

    Args:
        logits: L, floating, (G, G); images are rows, matched pairs on the diagonal, the anchors are the first B.
        close_index: Integers (B, K') in [0, G), B ≤ G, e.g. from `eqsim_sample_close`. The anchor itself is allowed and
            adds a zero to the mean.
        activation: As in `eqsim_all_pairs_loss`.
        text_side: As in `eqsim_quad_loss`, like the next two and the four from `hinge` on.
        image_side: As above.
        group_side: As above.
        margin: m ≥ 0 of the close part.
        weight: w of both parts; with `relative` of the far part only.
        far_margin: m_far ≥ 0.
        far_scale: s > 0.
        hinge: As above.
        positive_reg: As above.
        relative: As above, the far part is never relative.
        eps: As above.
        exclude: Boolean (G, G); samples i and j are not a far pair if it is True at (i, j) or (j, i).

    Raises:
        ValueError: If shapes, dtypes or options do not fit, no side is on, or (on a CPU) an index leaves [0, G).

    Example:
        >>> import torch
        >>> cosines = torch.tensor([[0.9, 0.5, 0.1], [0.6, 0.8, 0.2], [0.4, 0.2, 0.9]])
        >>> terms = eqsim_close_far_loss(
        ...     cosines, torch.tensor([[1], [0], [0]]), activation=None, margin=0.0, weight=1.0
        ... )
        >>> [round(term.item(), 4) for term in terms]
        [0.0867, 0.0867, 0.0]
    """
    criterion = Criterion(text_side, image_side, group_side, margin, weight, hinge, positive_reg, relative, eps).check()
    check_range("far_margin", far_margin, 0, math.inf)
    check_positive(far_scale=far_scale)
    check_square_matrix("logits", logits)
    size = len(logits)
    _check_close_index(close_index, size)
    check_exclude(exclude, size)
    scores = _activate(logits, activation)
    close_index = close_index.long()
    pick("close_index", close_index, scores.detach()[: len(close_index)])  # for its error
    quads, squares = CloseAndFar.apply(scores, close_index, exclude)
    close = criterion.mean_loss(quads.unbind())
    far = weight / far_scale * (squares / max(scores.numel(), 1) - far_margin).clamp_min(0)
    return EqSimTerms(close + far, close, far)


def eqsim_itm_loss(
    s00: Tensor,
    s01: Tensor,
    s10: Tensor,
    s11: Tensor,
    *,
    activation: ItmActivation | None = None,
    text_side: bool = True,
    image_side: bool = True,
    group_side: bool = False,
    margin: float = 0.0,
    weight: float = 1.0,
    hinge: Hinge = "mean",
    positive_reg: bool = False,
    relative: bool = False,
    eps: float = 0.0,
) -> Tensor:
    r"""The criterion on the match scores of a fusion model, which scores an image and a text together.

    For each anchor and each of its M hard negatives (one sample, used for its image and for its text) the model
    gives four scores. `activation` maps them before the criterion:

    - "linear": (x − min)/(max − min) over all scores, with gradients through both ends;
    - "sigmoid";
    - "softmax": over the four scores of each quadruple. The criterion then runs over the N anchors of one negative at
      a time, and the mean over the negatives is taken last;
    - None: the scores as they are.

    Args:
        s00: Scores of the anchors, floating, (N,).
        s01: The anchor's image with the negative's text, (N, M), or (N,) for M = 1.
        s10: The negative's image with the anchor's text, same shape.
        s11: The negative's image with its text, same shape.
        activation: See above.
        text_side: As in `eqsim_quad_loss`, like all that follow.
        image_side: As above.
        group_side: As above.
        margin: As above.
        weight: As above.
        hinge: As above.
        positive_reg: As above.
        relative: As above.
        eps: As above.

    Returns:
        A scalar, zero if there is no quadruple.

    Raises:
        ValueError: If shapes, dtypes or options do not fit, or no side is on.

    Example:
        >>> import torch
        >>> s00, s01, s10, s11 = torch.tensor([[3.0], [0.0], [1.0], [2.0]])
        >>> eqsim_itm_loss(s00, s01, s10, s11, activation="linear", image_side=False)  # (3/3 - 1/3)²
        tensor(0.4444)
    """
    criterion = Criterion(text_side, image_side, group_side, margin, weight, hinge, positive_reg, relative, eps).check()
    if activation is not None:
        check_choice("activation", activation, ItmActivation)
    check_same_shape(s01=s01, s10=s10, s11=s11)
    check_floating("s00", s00)
    if s00.ndim != 1 or s01.ndim not in (1, 2) or s01.shape[:1] != s00.shape:
        found = f"`s00` {tuple(s00.shape)} and `s01` {tuple(s01.shape)}"
        raise ValueError(f"`s00` must have shape (N,) and the other scores (N, M), got {found}")
    if s01.ndim == 1:
        s01, s10, s11 = s01[:, None], s10[:, None], s11[:, None]
    quads = torch.stack(upcast(s00[:, None].expand_as(s01), s01, s10, s11))  # (4, N, M)
    if activation == "softmax" and quads.numel():
        return torch.stack([criterion.mean_loss(negative.unbind()) for negative in quads.softmax(0).unbind(2)]).mean()
    if activation == "linear" and quads.numel():
        low, high = quads.amin(), quads.amax()
        quads = (quads - low) / (high - low).clamp_min(torch.finfo(quads.dtype).tiny)  # equal scores make zeros
    elif activation == "sigmoid":
        quads = quads.sigmoid()
    return criterion.mean_loss(quads.unbind())


def _activate(logits: Tensor, activation: Activation | None) -> Tensor:
    if activation is None:
        return upcast(logits)[0]
    check_choice("activation", activation, Activation)
    return upcast(logits)[0].softmax(1)


def _check_close_index(close_index: Tensor, size: int) -> None:
    check_integer("close_index", close_index)
    if close_index.ndim != 2 or len(close_index) > size:
        raise ValueError(f"`close_index` must have shape (B, K) with B <= {size}, got {tuple(close_index.shape)}")

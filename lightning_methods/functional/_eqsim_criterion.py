"""The criterion that all variants of EqSim share, on quadruples of scores; its formulas are in `eqsim_quad_loss`."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_methods.functional._logits import check_choice, check_range

Hinge: TypeAlias = Literal["mean", "pair"]


class Criterion(NamedTuple):
    """Settings, in the order of the arguments of `eqsim_quad_loss`."""

    text_side: bool
    image_side: bool
    group_side: bool
    margin: float
    weight: float
    hinge: Hinge
    positive_reg: bool
    relative: bool
    eps: float

    def check(self) -> "Criterion":
        if not (self.text_side or self.image_side or self.group_side):
            raise ValueError("at least one of `text_side`, `image_side` and `group_side` must be on, got none")
        check_range("margin", self.margin, 0, math.inf)
        check_range("eps", self.eps, 0, math.inf)
        check_choice("hinge", self.hinge, Hinge)
        return self

    def hinged(self, error: Tensor) -> Tensor:
        excess = (error - self.margin).clamp_min(0)
        return excess if self.relative else self.weight * excess

    def quad_losses(self, quads: Sequence[Tensor]) -> Tensor:
        """Hinge "pair": the sum of the sides for each quadruple (s00, s01, s10, s11)."""
        losses = self.hinged(self._errors(quads))
        return (losses + self._negative(quads) if self.positive_reg else losses).sum(0)

    def mean_loss(self, quads: Sequence[Tensor], keep: Tensor | None = None) -> Tensor:
        """The sum of the sides, each a mean over the quadruples, or over those at which `keep` is True."""
        if not quads[1].numel():
            return torch.stack([score.sum() for score in quads]).sum()  # a zero with a graph, not the mean of nothing
        errors = self._errors(quads)
        losses = self.hinged(_means(errors, keep)) if self.hinge == "mean" else _means(self.hinged(errors), keep)
        return (losses + _means(self._negative(quads), keep) if self.positive_reg else losses).sum()

    def all_pairs_loss(self, scores: Tensor) -> Tensor:
        """`mean_loss` over all pairs of a square matrix, in closed form: hinge "mean" of absolute changes only."""
        size = len(scores)
        pairs = size * (size - 1) / 2
        matched = scores.diagonal()
        matched = matched - matched.mean()  # Σ_{i<j} (x_i − x_j)² is then size · Σ x_i²
        mismatched = scores - scores.T.contiguous()  # the copy reads faster than the view
        p_squared = size * matched.square().sum() / pairs
        e_squared = mismatched.square().sum() / (2 * pairs)
        p_times_e = (matched * mismatched.sum(1)).sum() / pairs
        losses = []
        if self.text_side:
            losses.append(self.hinged(p_squared + e_squared - 2 * p_times_e))
        if self.image_side:
            losses.append(self.hinged(p_squared + e_squared + 2 * p_times_e))
        if self.group_side:
            losses.append(2 * self.hinged(e_squared))
        return torch.stack(losses).sum()

    def _errors(self, quads: Sequence[Tensor]) -> Tensor:
        """For each two changes that are compared, in dim 0, their squared difference."""
        s00, s01, s10, s11 = quads
        if self.relative:
            i, j = s00.abs() + self.eps, s11.abs() + self.eps
            a, b, c, d = ((s00 - s01) / i, (s11 - s10) / j, (s00 - s10) / i, (s11 - s01) / j)
            return self._of_sides([a - b], [c - d], [c - a, b - d]).square()
        p, e = s00 - s11, s01 - s10  # of which all differences are made: half of the operations
        return self._of_sides([p - e], [p + e], [e, e]).square()

    def _negative(self, quads: Sequence[Tensor]) -> Tensor:
        """For each two changes that are compared, in dim 0, the penalty of `positive_reg` for negative ones."""
        s00, s01, s10, s11 = quads
        a, b, c, d = ((-change).relu() for change in (s00 - s01, s11 - s10, s00 - s10, s11 - s01))
        return self._of_sides([a + b], [c + d], [c + a, b + d])

    def _of_sides(self, text: list[Tensor], image: list[Tensor], group: list[Tensor]) -> Tensor:
        return torch.stack(self.text_side * text + self.image_side * image + self.group_side * group)


def _means(values: Tensor, keep: Tensor | None) -> Tensor:
    """Over all dimensions but the first, or where `keep` is True."""
    if keep is not None:
        return torch.where(keep, values, 0).flatten(1).sum(1) / keep.sum().clamp_min(1)
    return values.reshape(len(values), -1).mean(1)


class CloseAndFar(torch.autograd.Function):
    """What the variant that was released needs of a square matrix S.

    The scores (s00, s01, s10, s11) of anchors with their close partners, (4, B, K); and the sum of the squares of
    S − Sᵀ without the close pairs and the excluded ones. The gradient of the latter is 4 times what is squared, and
    those of the former are added in place: three passes over the matrix are left where autograd makes nine, some of
    them over a transposed one.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, close_index: Tensor, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        size, anchors = len(scores), len(close_index)
        i, j = torch.arange(anchors, device=scores.device)[:, None].expand_as(close_index), close_index
        places = torch.stack([i * (size + 1), i * size + j, j * size + i, j * (size + 1)])
        asymmetry = scores - scores.T.contiguous()
        for side in (asymmetry, asymmetry.T):  # only the pairs are written; a mask would cost a pass over the matrix
            side[:anchors].scatter_(1, close_index, 0)
        if exclude is not None:
            asymmetry.masked_fill_(exclude | exclude.T, 0)
        ctx.save_for_backward(places, asymmetry)
        return scores.take(places), asymmetry.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, quads: Tensor, squares: Tensor) -> tuple[Tensor, None, None]:
        places, asymmetry = ctx.saved_tensors
        return (4 * squares * asymmetry).put_(places, quads, accumulate=True), None, None

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
        return torch.stack([self.hinged(error) + below for error, below in self._comparisons(quads)]).sum(0)

    def mean_loss(self, quads: Sequence[Tensor], keep: Tensor | None = None) -> Tensor:
        """The sum of the sides, each a mean over the quadruples, or over those at which `keep` is True."""
        if not quads[1].numel():
            return torch.stack([score.sum() for score in quads]).sum()  # a zero with a graph, not the mean of nothing
        losses = []
        for error, below in self._comparisons(quads):
            if self.hinge == "mean":
                losses.append(self.hinged(_mean(error, keep)) + _mean(below, keep))
            else:
                losses.append(_mean(self.hinged(error) + below, keep))
        return torch.stack(losses).sum()

    def all_pairs_loss(self, scores: Tensor) -> Tensor:
        """`mean_loss` over all pairs of a square matrix, in closed form: hinge "mean" of absolute changes only."""
        size = len(scores)
        pairs = size * (size - 1) / 2
        matched = scores.diagonal()
        matched = matched - matched.mean()  # Σ_{i<j} (x_i − x_j)² is then size · Σ x_i²
        mismatched = scores - scores.T
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

    def _comparisons(self, quads: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """For each two changes that are compared, their squared difference and the penalty for negative ones."""
        s00, s01, s10, s11 = quads
        changes = (s00 - s01, s11 - s10, s00 - s10, s11 - s01)
        compared: Sequence[Tensor] = changes
        if self.relative:
            compared = [x / (s.abs() + self.eps) for x, s in zip(changes, (s00, s11, s00, s11), strict=True)]
        text, image, group = [(0, 1)], [(2, 3)], [(2, 0), (1, 3)]
        sides = self.text_side * text + self.image_side * image + self.group_side * group
        nothing = s01.new_zeros(())
        return [
            (
                (compared[x] - compared[y]).square(),
                (-changes[x]).relu() + (-changes[y]).relu() if self.positive_reg else nothing,
            )
            for x, y in sides
        ]


def _mean(values: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None or not values.ndim:
        return values.mean()
    return torch.where(keep, values, 0).sum() / keep.sum().clamp_min(1)


class SquaredAsymmetry(torch.autograd.Function):
    """The sum of the squares of S − Sᵀ of a square matrix S, without the close pairs and the excluded ones.

    What is summed is antisymmetric, so its gradient is 4 times itself: one pass where autograd makes five, two of them
    over a transposed matrix. On one CPU thread the far part of 512 samples takes a fifth of the time.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, close_index: Tensor, exclude: Tensor | None) -> Tensor:
        asymmetry = scores - scores.T.contiguous()
        for side in (asymmetry, asymmetry.T):  # only the pairs are written; a mask would cost a pass over the matrix
            side[: len(close_index)].scatter_(1, close_index, 0)
        if exclude is not None:
            asymmetry.masked_fill_(exclude | exclude.T, 0)
        ctx.save_for_backward(asymmetry)
        return asymmetry.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (asymmetry,) = ctx.saved_tensors
        return 4 * gradient * asymmetry, None, None

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
        return torch.stack([self.hinged(error) for error in self._errors(quads)] + self._negative(quads)).sum(0)

    def mean_loss(self, quads: Sequence[Tensor], keep: Tensor | None = None) -> Tensor:
        """The sum of the sides, each a mean over the quadruples, or over those at which `keep` is True."""
        if not quads[1].numel():
            return torch.stack([score.sum() for score in quads]).sum()  # a zero with a graph, not the mean of nothing
        errors = self._errors(quads)
        if self.hinge == "mean":
            losses = [self.hinged(_mean(error, keep)) for error in errors]
        else:
            losses = [_mean(self.hinged(error), keep) for error in errors]
        return torch.stack(losses + [_mean(negative, keep) for negative in self._negative(quads)]).sum()

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

    def _errors(self, quads: Sequence[Tensor]) -> list[Tensor]:
        """For each two changes that are compared, their squared difference."""
        s00, s01, s10, s11 = quads
        if self.relative:
            i, j = s00.abs() + self.eps, s11.abs() + self.eps
            a, b, c, d = ((s00 - s01) / i, (s11 - s10) / j, (s00 - s10) / i, (s11 - s01) / j)
            text, image, group = [a - b], [c - d], [c - a, b - d]
        else:
            p, e = s00 - s11, s01 - s10  # of which all differences are made: half of the operations
            text, image, group = [p - e], [p + e], [e, e]
        return [error.square() for error in self._sides_of(text, image, group)]

    def _negative(self, quads: Sequence[Tensor]) -> list[Tensor]:
        """With `positive_reg`, for each two changes that are compared, the penalty for negative ones."""
        if not self.positive_reg:
            return []
        s00, s01, s10, s11 = quads
        a, b, c, d = ((-change).relu() for change in (s00 - s01, s11 - s10, s00 - s10, s11 - s01))
        return self._sides_of([a + b], [c + d], [c + a, b + d])

    def _sides_of(self, text: list[Tensor], image: list[Tensor], group: list[Tensor]) -> list[Tensor]:
        return self.text_side * text + self.image_side * image + self.group_side * group


def _mean(values: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
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

"""What EqSim's losses, scores and metrics share: checks, and what counts as a hit."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_floating(name: str, values: Tensor) -> None:
    if not values.is_floating_point():
        raise ValueError(f"`{name}` must be floating, got {values.dtype}")


def check_matrix(name: str, matrix: Tensor) -> None:
    check_floating(name, matrix)
    if matrix.ndim != 2:
        raise ValueError(f"`{name}` must be a matrix, got shape {tuple(matrix.shape)}")


def check_square_matrix(name: str, matrix: Tensor) -> None:
    check_matrix(name, matrix)
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"`{name}` must be square, got {matrix.shape[0]} x {matrix.shape[1]}")


def check_same_shape(**named: Tensor) -> None:
    for name, scores in named.items():
        check_floating(name, scores)
    if len({scores.shape for scores in named.values()}) > 1:
        found = " and ".join(f"`{name}` {tuple(scores.shape)}" for name, scores in named.items())
        raise ValueError(f"the scores must have the same shape, got {found}")


def check_exclude(exclude: Tensor | None, size: int) -> None:
    if exclude is not None and (exclude.dtype != torch.bool or exclude.shape != (size, size)):
        found = f"{tuple(exclude.shape)} of {exclude.dtype}"
        raise ValueError(f"`exclude` must be boolean and of shape {(size, size)}, got {found}")


def group_hits(s00: Tensor, s01: Tensor, s10: Tensor, s11: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    text = (s00 > s01) & (s11 > s10)
    image = (s00 > s10) & (s11 > s01)
    return text, image, text & image


def check_numbers(name: str, numbers: Tensor, stop: int) -> None:
    outside = numbers[(numbers < 0) | (numbers >= stop)]
    if len(outside):
        raise ValueError(f"`{name}` must lie in [0, {stop}), got {int(outside[0])}")


def check_sizes(k: Sequence[int], chunk: int) -> None:
    if not k or min(k) < 1:
        raise ValueError(f"`k` must hold numbers of at least 1, got {tuple(k)}")
    if chunk < 1:
        raise ValueError(f"`chunk` must be at least 1, got {chunk}")

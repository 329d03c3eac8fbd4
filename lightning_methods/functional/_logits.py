"""Checks and formats that losses on logits share: classes in dim 1, as in `F.cross_entropy`."""

from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction: TypeAlias = Literal["none", "mean", "sum"]


def check_choice(name: str, value: str, options: object) -> None:
    """`options` is the Literal type of the argument."""
    if value not in get_args(options):
        raise ValueError(f"`{name}` must be one of {get_args(options)}, got {value!r}")


def check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"`{name}` must be positive, got {value}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"`{name}` must lie in [{low}, {high}], got {value}")


def check_logits(**named: Tensor) -> None:
    """Floating, (N, C) or (N, C, d1, ...), and all of one shape."""
    for name, logits in named.items():
        if not logits.is_floating_point():
            raise ValueError(f"`{name}` must be floating, got {logits.dtype}")
        if logits.ndim < 2 or logits.shape[1] == 0:
            raise ValueError(f"`{name}` must have shape (N, C) or (N, C, d1, ...), got {tuple(logits.shape)}")
    if len({logits.shape for logits in named.values()}) > 1:
        found = " and ".join(f"`{name}` {tuple(logits.shape)}" for name, logits in named.items())
        raise ValueError(f"the logits must have the same shape, got {found}")


def check_target(target: Tensor, logits: Tensor) -> None:
    """Integers of the logits' shape without the class dimension; their values are not read."""
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"`target` must hold integer class indices, got {target.dtype}")
    expected = logits.shape[:1] + logits.shape[2:]
    if target.shape != expected:
        raise ValueError(f"`target` must have shape {tuple(expected)}, got {tuple(target.shape)}")


def check_square(name: str, matrix: Tensor, logits: Tensor) -> None:
    """Floating, (C, C) for the C classes of the logits."""
    classes = logits.shape[1]
    if matrix.shape != (classes, classes) or not matrix.is_floating_point():
        found = f"{tuple(matrix.shape)} of {matrix.dtype}"
        raise ValueError(f"`{name}` must be floating and of shape {(classes, classes)}, got {found}")


def rows_of_target(matrix: Tensor, target: Tensor) -> Tensor:
    """`matrix[target]` for a target of any shape, flattened to (positions, ...).

    On a CPU the look-up itself finds indices outside the matrix, so that no value has to be read before; on
    CUDA it is a device-side assertion, as in `F.cross_entropy`.
    """
    try:
        return matrix.index_select(0, target.reshape(-1).long())
    except IndexError:
        low, high = int(target.min()), int(target.max())
        expected = f"class indices in [0, {len(matrix)})"
        raise ValueError(f"`target` must hold {expected}, got values from {low} to {high}") from None


def upcast(*logits: Tensor) -> list[Tensor]:
    """All in one dtype, float32 at least: differences of half-precision logits lose their last digits."""
    dtype = torch.float32
    for tensor in logits:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in logits]


def tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def softmax(logits: Tensor, temperature: float) -> Tensor:
    """Detached probabilities."""
    return F.softmax(tempered(logits.detach(), temperature), 1)


def reduce(value: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return value
    return value.mean() if reduction == "mean" else value.sum()


def sum_to_one(rows: Tensor) -> Tensor:
    """Whether rows look like probabilities; the tolerance is that of bfloat16."""
    return (rows >= 0).all() & ((rows.float().sum(1) - 1).abs() < 1e-2).all()

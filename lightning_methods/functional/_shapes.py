"""Shapes of arguments, and the precision that attention weights and losses are computed in."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, names: str, sizes: Sequence[int | None]) -> None:
    """One size for each of the dimensions that `names` lists, as "B, N, D"; None for any."""
    fits = tensor.ndim == len(sizes) and all(
        wanted in (None, found) for wanted, found in zip(sizes, tensor.shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"`{name}` must have shape ({names}) = ({expected}), got {tuple(tensor.shape)}")


def check_floating(**named: Tensor | None) -> None:
    for name, tensor in named.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"`{name}` must be floating, got {tensor.dtype}")


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """The dtype that all can be computed in without losing half precision's missing digits."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def no_autocast(like: Tensor) -> AbstractContextManager[object]:
    """For what has to stay in the precision that it was brought to."""
    return torch.autocast(like.device.type, enabled=False)

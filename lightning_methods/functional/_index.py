"""Look-ups by index that say what is wrong with an index."""

import torch
from torch import Tensor


def check_integer(name: str, index: Tensor) -> None:
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise ValueError(f"`{name}` must hold integers, got {index.dtype}")


def pick(name: str, index: Tensor, values: Tensor) -> Tensor:
    """`values.gather(1, index)` for `index` (N, M), an argument called `name`, and `values` (N, C).

    On a CPU the look-up itself finds indices outside [0, C), so that no value has to be read before; on CUDA it is
    a device-side assertion, as in `F.cross_entropy`.
    """
    try:
        return values.gather(1, index)
    except RuntimeError:
        size = values.shape[1]
        outside = index[(index < 0) | (index >= size)]
        if not len(outside):
            raise
        raise ValueError(f"`{name}` must hold indices in [0, {size}), got {int(outside[0])}") from None

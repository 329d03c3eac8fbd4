"""What the callbacks that replace attention modules share: telling which kind of attention stands at a path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def replaced_attention(
    path: str, part: nn.Module, multihead: Callable[[Any], nn.Module], timm: Callable[[Any], nn.Module]
) -> nn.Module:
    """What `multihead` makes of torch's attention, or `timm` of timm's.

    Raises:
        TypeError: If the part is neither; the message has its path and its class.
        ValueError: If it is one that cannot be replaced, for example because keys have another width.
    """
    make = multihead if isinstance(part, nn.MultiheadAttention) else timm
    try:
        return make(part)
    except TypeError as error:
        raise TypeError(
            f"'module.{path}' is a {type(part).__name__}, which cannot be replaced: known are "
            f"torch.nn.MultiheadAttention and timm's Attention, with the parts that it has ({error})."
        ) from None
    except ValueError as error:
        raise ValueError(f"'module.{path}', a {type(part).__name__}, cannot be replaced: {error}.") from None

"""Checks and formats that losses on bags of instances share: B bags, V views of each, K instances, C classes."""

import torch
from torch import Tensor


def as_views(name: str, values: Tensor, classes: int | None = None) -> Tensor:
    """(B, V, K, C) in float32 at least, of (B, V, K, C) or, for one view, (B, K, C)."""
    if not values.is_floating_point():
        raise ValueError(f"`{name}` must be floating, got {values.dtype}")
    if values.ndim not in (3, 4) or 0 in values.shape or (classes is not None and values.shape[-1] != classes):
        width = "C" if classes is None else classes
        raise ValueError(f"`{name}` must have shape (B, V, K, {width}) or (B, K, {width}), got {tuple(values.shape)}")
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values.unsqueeze(1) if values.ndim == 3 else values


def check_same_bags(**named: Tensor) -> None:
    """All of one B, V and K."""
    if len({values.shape[:3] for values in named.values()}) > 1:
        found = ", ".join(f"`{name}` {tuple(values.shape[:3])}" for name, values in named.items())
        raise ValueError(f"bags, views and instances (B, V, K) must agree, got {found}")


def abnormal_bags(bag_labels: Tensor, bags: int) -> Tensor:
    """Boolean (B,): which bags are abnormal, labels of any positive kind."""
    if bag_labels.shape != (bags,) or bag_labels.is_complex():
        found = f"{tuple(bag_labels.shape)} of {bag_labels.dtype}"
        raise ValueError(f"`bag_labels` must have shape {(bags,)}, one real number a bag, got {found}")
    return bag_labels > 0

"""What augmentations of video batches share: layouts, checks, and the operations applied to chosen samples only.

A layout spells the dimensions of a batch: b samples, n clips of a sample, c channels, t frames, h and w pixels.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_methods.functional._index import check_integer
from lightning_methods.functional._logits import check_choice, check_range

Layout: TypeAlias = Literal["btchw", "bcthw", "bncthw"]


def sample_beta(
    alpha: float,
    beta: float,
    shape: tuple[int, ...] = (),
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws from Beta(alpha, beta), on the generator's device."""
    source = device if generator is None else generator.device
    # torch.distributions takes no generator; this is the function that its Beta calls.
    concentration = torch.stack([torch.full(shape, float(value), device=source) for value in (alpha, beta)], -1)
    return torch._sample_dirichlet(concentration, generator)[..., 0]


def moved(drawn: Tensor, device: torch.device | str) -> Tensor:
    """A draw on another device, without waiting for it."""
    # Only a copy from the host may run behind the host's back: one to the host could be read too early.
    return drawn.to(device, non_blocking=drawn.device.type == "cpu")


def check_videos(videos: Tensor, layout: Layout | None = None) -> None:
    """Floating and of the layout's dimensions; without a layout, of any layout's."""
    if layout is not None:
        check_choice("layout", layout, Layout)
    if not videos.is_floating_point():
        raise ValueError(f"`videos` must be floating, got {videos.dtype}: normalise the clips first")
    dims = (5, 6) if layout is None else (len(layout),)
    if videos.ndim not in dims:
        expected = "(B, ..., H, W) with 5 or 6 dimensions" if layout is None else f"({', '.join(layout.upper())})"
        raise ValueError(f"`videos` must have shape {expected}, got {tuple(videos.shape)}")


def check_lam(lam: float | Tensor, videos: Tensor) -> None:
    """A number in [0, 1], or a floating tensor of one or B values, which are not read."""
    if not isinstance(lam, Tensor):
        check_range("lam", lam, 0, 1)
    elif not lam.is_floating_point() or lam.shape not in ((), (1,), videos.shape[:1]):
        found = f"{tuple(lam.shape)} of {lam.dtype}"
        raise ValueError(f"`lam` must be floating and of shape (), (1,) or {(len(videos),)}, got {found}")


def check_apply(apply: Tensor | None, videos: Tensor) -> None:
    if apply is not None and (apply.dtype != torch.bool or apply.shape != videos.shape[:1]):
        found = f"{tuple(apply.shape)} of {apply.dtype}"
        raise ValueError(f"`apply` must be boolean and of shape {(len(videos),)}, got {found}")


def check_permutation(perm: Tensor, videos: Tensor) -> None:
    check_integer("perm", perm)
    if perm.shape != videos.shape[:1]:
        raise ValueError(f"`perm` must have shape {(len(videos),)}, got {tuple(perm.shape)}")


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """One value, or (B,), with as many dimensions as `like`, to broadcast over a sample."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def permuted(values: Tensor, perm: Tensor) -> Tensor:
    """`values[perm]`; on a CPU the look-up itself finds indices outside the batch."""
    try:
        return values.index_select(0, perm.long())
    except IndexError:
        found = f"values from {int(perm.min())} to {int(perm.max())}"
        raise ValueError(f"`perm` must hold indices in [0, {len(values)}), got {found}") from None


def blend(
    values: Tensor, other: Tensor, weight: float | Tensor, apply: Tensor | None, *, inplace: bool = False
) -> Tensor:
    """For the samples in `apply` weight · values + (1 − weight) · other, for the rest the values themselves.

    The rest has weight 1, for which `torch.lerp` returns the values bit for bit (as long as `other` is finite), so
    that no tensor is indexed and nothing waits for the device.
    """
    if isinstance(weight, Tensor):
        weight = weight.to(values)
    else:
        weight = torch.full((), weight, dtype=values.dtype, device=values.device)
    if apply is not None:
        weight = torch.where(apply, weight, 1.0)
    weight = per_sample(weight, values)
    return values.lerp_(other, 1 - weight) if inplace else torch.lerp(other, values, weight)


def one_frame(videos: Tensor, frame_index: int | Tensor, layout: Layout) -> Tensor:
    """One frame of each clip, with a time dimension of 1; `frame_index` is one number, (B,) or, with clips, (B, N)."""
    time = layout.index("t")
    length = videos.shape[time]
    if not isinstance(frame_index, Tensor):
        if not 0 <= frame_index < length:
            raise ValueError(f"`frame_index` must lie in [0, {length}), got {frame_index}")
        return videos.narrow(time, frame_index, 1)
    check_integer("frame_index", frame_index)
    clips = videos.shape[: len(layout) - 4]
    if frame_index.shape not in (clips, clips[:1], ()):
        raise ValueError(f"`frame_index` must have shape {tuple(clips)}, got {tuple(frame_index.shape)}")
    index = frame_index.long().reshape(*frame_index.shape, *[1] * (videos.ndim - frame_index.ndim))
    shape = [1 if dim == time else size for dim, size in enumerate(videos.shape)]
    try:
        return videos.gather(time, index.expand(shape))
    except RuntimeError:
        low, high = int(frame_index.min()), int(frame_index.max())
        if low >= 0 and high < length:
            raise
        raise ValueError(f"`frame_index` must lie in [0, {length}), got values from {low} to {high}") from None


def broadcast_masks(masks: Tensor, videos: Tensor, layout: Layout) -> Tensor:
    """Boolean masks with one channel or none, and with or without time, in the dimensions of the videos."""
    channel, time = layout.index("c"), layout.index("t")
    moving = videos.shape[:channel] + videos.shape[channel + 1 :]
    still = tuple(size for dim, size in enumerate(videos.shape) if dim not in (channel, time))
    given = masks.shape
    if masks.ndim == videos.ndim and masks.shape[channel] == 1:
        masks = masks.squeeze(channel)
    if masks.dtype != torch.bool or masks.shape not in (moving, still):
        found = f"{tuple(given)} of {masks.dtype}"
        raise ValueError(f"`masks` must be boolean and of shape {still} or {tuple(moving)}, got {found}")
    if masks.shape == still:
        masks = masks.unsqueeze(-3)
    return masks.unsqueeze(channel)


def soft_targets(targets: Tensor, num_classes: int | None, videos: Tensor) -> Tensor:
    """Floating (B, K) targets as they are; class indices (B,) one-hot, in float32 at least."""
    batch = len(videos)
    if targets.is_floating_point():
        expected = (batch, targets.shape[-1] if num_classes is None else num_classes)
        if targets.shape != expected:
            raise ValueError(f"soft `targets` must have shape (B, K) {expected}, got {tuple(targets.shape)}")
        return targets
    check_integer("targets", targets)
    if targets.shape != (batch,):
        raise ValueError(f"`targets` of class indices must have shape {(batch,)}, got {tuple(targets.shape)}")
    if num_classes is None:
        raise ValueError("`num_classes` is missing: `targets` of class indices become soft targets (B, num_classes)")
    dtype = torch.promote_types(torch.float32, videos.dtype)
    zeros = torch.zeros(batch, num_classes, dtype=dtype, device=targets.device)
    try:
        return zeros.scatter_(1, targets.long()[:, None], 1.0)
    except RuntimeError:
        found = f"values from {int(targets.min())} to {int(targets.max())}"
        raise ValueError(f"`targets` must hold class indices in [0, {num_classes}), got {found}") from None

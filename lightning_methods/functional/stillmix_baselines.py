r"""The augmentations that StillMix is compared with: Mixup, VideoMix, Background Erasing, FAME, ActorCutMix.

All take their random numbers from outside, return new tensors in the order of the batch, leave samples not in `apply`
as they are, clip and label, and never wait for the device. "partner" is the sample that a clip is mixed with.

Sources: the formulas are those of the StillMix authors' comparison code (see `lightning_methods.functional.stillmix`),
which differ in details from the methods' own papers: Zhang et al., "mixup", ICLR 2018; Yun et al., "VideoMix", 2020;
Wang et al., "Removing the Background by Adding the Background", CVPR 2021 (BE); Ding et al., "Motion-aware Contrastive
Video Representation Learning via Foreground-background Merging", CVPR 2022 (FAME); Zou et al., "Learning
Representational Invariances for Data-Efficient Action Recognition", 2021 (ActorCutMix).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_methods.functional._index import check_integer
from lightning_methods.functional._logits import check_positive, check_range
from lightning_methods.functional._video import (
    Layout,
    blend,
    broadcast_masks,
    check_apply,
    check_lam,
    check_permutation,
    check_videos,
    one_frame,
    per_sample,
    permuted,
    soft_targets,
)


class Mixed(NamedTuple):
    """Mixed clips and their soft targets (B, K)."""

    videos: Tensor
    targets: Tensor


class VideoMixBox(NamedTuple):
    """A box x1, y1, x2, y2 (upper ends excluded) and the share of the image outside of it."""

    box: Tensor
    lam: Tensor


def mixup_videos(
    videos: Tensor,
    targets: Tensor,
    perm: Tensor,
    lam: float | Tensor,
    apply: Tensor | None = None,
    *,
    num_classes: int | None = None,
) -> Mixed:
    r"""Mixup: $\tilde x = \lambda x + (1 - \lambda) x_\pi$, and the targets likewise.

    Args:
        videos: x, floating, of any layout that starts with the batch.
        targets: Soft (B, K), or class indices (B,) together with `num_classes`.
        perm: π, the partner of each sample, integers (B,).
        lam: λ in [0, 1], a number or a tensor of one value or (B,). The comparison draws one λ ~ Beta(0.2, 0.2)
            for a batch.
        apply: Which samples to mix, boolean (B,); None: all.
        num_classes: K, needed for class indices.

    Raises:
        ValueError: If shapes, dtypes or ranges do not fit.

    Example:
        >>> import torch
        >>> videos = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1, 1)
        >>> mixed = mixup_videos(videos, torch.tensor([0, 1]), torch.tensor([1, 0]), 0.75, num_classes=2)
        >>> mixed.videos.flatten(), mixed.targets
        (tensor([0.2500, 0.7500]), tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]]))
    """
    check_videos(videos)
    check_permutation(perm, videos)
    check_lam(lam, videos)
    check_apply(apply, videos)
    targets = soft_targets(targets, num_classes, videos)
    return Mixed(
        blend(videos, permuted(videos, perm), lam, apply),
        blend(targets, permuted(targets, perm), lam, apply),
    )


def videomix_box(*, lam: float | Tensor, cx: int | Tensor, cy: int | Tensor, height: int, width: int) -> VideoMixBox:
    r"""The box of VideoMix: $\sqrt{1 - \lambda}$ of each side, around a centre, cut off at the borders.

    Args:
        lam: λ in [0, 1], a number or a 0-d tensor; the comparison draws it from Beta(1, 1).
        cx: Column of the centre, uniform in [0, W).
        cy: Row of the centre, uniform in [0, H).
        height: H.
        width: W.

    Returns:
        Box and lam' = 1 − area / (HW), which differs from λ by truncation and borders.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> videomix_box(lam=0.75, cx=1, cy=4, height=8, width=8)
        VideoMixBox(box=tensor([0, 2, 3, 6]), lam=tensor(0.8125))
    """
    check_positive(height=height, width=width)
    if not isinstance(lam, Tensor):
        check_range("lam", lam, 0, 1)
    ratio = (1 - torch.as_tensor(lam, dtype=torch.float64)).sqrt()
    half_width, half_height = ((size * ratio).long() // 2 for size in (width, height))
    left, right = (cx - half_width).clamp(0, width), (cx + half_width).clamp(0, width)
    top, bottom = (cy - half_height).clamp(0, height), (cy + half_height).clamp(0, height)
    outside = 1 - (right - left) * (bottom - top) / (height * width)
    return VideoMixBox(torch.stack([left, top, right, bottom]), outside)


def videomix(
    videos: Tensor,
    targets: Tensor,
    perm: Tensor,
    box: Tensor,
    apply: Tensor | None = None,
    *,
    num_classes: int | None = None,
) -> Mixed:
    """VideoMix: paste a box of the partner into all frames; targets mix by the areas.

    Args:
        videos: Floating, (B, ..., H, W).
        targets: Soft (B, K), or class indices (B,) together with `num_classes`.
        perm: The partner of each sample, integers (B,).
        box: x1, y1, x2, y2 as `videomix_box` returns it, integers (4,) on the videos' device.
        apply: Which samples to mix, boolean (B,); None: all.
        num_classes: K, needed for class indices.

    Raises:
        ValueError: If shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> videos = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1, 1).expand(2, 1, 1, 2, 2)
        >>> box = torch.tensor([0, 0, 1, 2])
        >>> videomix(videos, torch.eye(2), torch.tensor([1, 0]), box).videos[0, 0, 0]
        tensor([[1., 0.],
                [1., 0.]])
    """
    check_videos(videos)
    check_permutation(perm, videos)
    check_integer("box", box)
    if box.shape != (4,):
        raise ValueError(f"`box` must have shape (4,), got {tuple(box.shape)}")
    check_apply(apply, videos)
    targets = soft_targets(targets, num_classes, videos)
    height, width = videos.shape[-2:]
    left, top, right, bottom = box.unbind()
    x, y = torch.arange(width, device=videos.device), torch.arange(height, device=videos.device)[:, None]
    inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
    pasted = inside if apply is None else inside & per_sample(apply, videos)
    outside = 1 - inside.to(targets.dtype).mean()
    return Mixed(
        torch.where(pasted, permuted(videos, perm), videos),
        blend(targets, permuted(targets, perm), outside, apply),
    )


def background_erase(
    videos: Tensor,
    frame_index: int | Tensor,
    lam: float | Tensor,
    apply: Tensor | None = None,
    *,
    layout: Layout = "bcthw",
) -> Tensor:
    r"""BE: $\tilde x = (1 - \lambda) x + \lambda\, \mathrm{repeat}_T(x_t)$ with a frame of the same clip.

    Here λ weighs the still frame. Labels stay as they are.

    Args:
        videos: x, floating, of shape `layout`.
        frame_index: t, one number for all, or integers (B,), or (B, N) for the layout "bncthw".
        lam: λ in [0, 1], a number or a tensor of one value or (B,). The comparison draws 0.3 · Beta(1, 1) once for
            a batch.
        apply: Which samples to mix, boolean (B,); None: all.
        layout: "btchw", "bcthw" or "bncthw".

    Raises:
        ValueError: If shapes, dtypes, ranges or options do not fit.

    Example:
        >>> import torch
        >>> background_erase(torch.tensor([0.0, 1.0, 2.0]).reshape(1, 1, 3, 1, 1), 2, 0.25).flatten()
        tensor([0.5000, 1.2500, 2.0000])
    """
    check_videos(videos, layout)
    check_lam(lam, videos)
    check_apply(apply, videos)
    return blend(videos, one_frame(videos, frame_index, layout), 1 - lam, apply)


def fame(
    videos: Tensor,
    masks: Tensor,
    perm: Tensor,
    apply: Tensor | None = None,
    *,
    layout: Layout = "bcthw",
) -> Tensor:
    """FAME: keep the foreground, take the background from the partner. Labels stay as they are.

    Args:
        videos: Floating, of shape `layout`.
        masks: True in the foreground, as `fame_foreground_mask` returns them: (B, H, W), or (B, N, H, W) for the
            layout "bncthw"; or one for each frame, the videos' shape without channels or with a single one.
        perm: The partner of each sample, integers (B,); its clip may be the sample's own.
        apply: Which samples to mix, boolean (B,); None: all.
        layout: "btchw", "bcthw" or "bncthw".

    Raises:
        ValueError: If shapes, dtypes or options do not fit.

    Example:
        >>> import torch
        >>> videos = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(2, 1, 1, 1, 2)
        >>> masks = torch.tensor([[[True, False]], [[False, True]]])
        >>> fame(videos, masks, torch.tensor([1, 0])).flatten(1)
        tensor([[1., 4.],
                [1., 4.]])
    """
    check_videos(videos, layout)
    check_permutation(perm, videos)
    check_apply(apply, videos)
    keep = broadcast_masks(masks, videos, layout)
    if apply is not None:
        keep = keep | per_sample(~apply, videos)
    return torch.where(keep, videos, permuted(videos, perm))


def actor_cutmix(
    videos: Tensor,
    targets: Tensor,
    masks: Tensor,
    apply: Tensor | None = None,
    *,
    layout: Layout = "bcthw",
    num_classes: int | None = None,
) -> Mixed:
    r"""ActorCutMix: keep the actors, take the background from the sample at the mirrored place of the batch.

    $\tilde x_i = m_i x_i + (1 - m_i)(1 - m_j) x_j$ with j = B − 1 − i: black where the partner's actors were. Targets
    $w_i y_i + (1 - w_i) y_j$ with $w_i = 1 - (1 - \rho_i)^4$ and ρ the share of the mask.

    A sample whose mask is empty counts as all foreground, like one whose mask is full: it stays untouched, and as a
    partner it gives a black background, while its label keeps its share. The middle sample of an odd batch is its own
    partner and stays untouched too.

    Args:
        videos: x, floating, of shape `layout`.
        targets: y, soft (B, K), or class indices (B,) together with `num_classes`.
        masks: m, True on actors, shaped as in `fame`. The comparison makes them from person boxes with a detection
            score above 0.4.
        apply: Which samples to mix, boolean (B,); None: all. Samples that are left out still serve as partners.
        layout: "btchw", "bcthw" or "bncthw".
        num_classes: K, needed for class indices.

    Raises:
        ValueError: If shapes, dtypes or options do not fit.

    Example:
        >>> import torch
        >>> videos = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(2, 1, 1, 1, 2)
        >>> masks = torch.tensor([[[True, False]], [[True, False]]])
        >>> mixed = actor_cutmix(videos, torch.eye(2), masks)
        >>> mixed.videos.flatten(1), mixed.targets[0]
        (tensor([[1., 4.],
                [3., 2.]]), tensor([0.9375, 0.0625]))
    """
    check_videos(videos, layout)
    check_apply(apply, videos)
    targets = soft_targets(targets, num_classes, videos)
    actor = broadcast_masks(masks, videos, layout)
    flat = masks.flatten(1)
    empty = ~flat.any(1)
    actor = actor | per_sample(empty, videos)
    background = videos.flip(0).masked_fill(actor.flip(0), 0.0)
    share = flat.to(targets.dtype).mean(1).masked_fill(empty, 1.0)
    keep = actor if apply is None else actor | per_sample(~apply, videos)
    return Mixed(
        torch.where(keep, videos, background),
        blend(targets, targets.flip(0), 1 - (1 - share) ** 4, apply),
    )

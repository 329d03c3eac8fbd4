"""Test videos whose still evidence is swapped (SCUBA), frozen (SCUFO) or contradicted, and masks to make them from.

SCUBA keeps the moving foreground of a video and replaces its background by one still image. SCUFO freezes one frame
of a SCUBA clip, so that no motion is left. Networks that recognise motion are right on the first and wrong on the
second.

Source: Li, Liu, Zhang, Li, "Mitigating and Evaluating Static Bias of Action Representations in the Background and the
Foreground", ICCV 2023, arXiv 2211.12883; the formulas were read in the authors' code.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_methods.functional._logits import check_positive, check_range
from lightning_methods.functional._video import Layout, check_videos, one_frame


class FgValid(NamedTuple):
    """Whether a foreground is large enough: () for the video and (T,) for its frames, boolean."""

    video: Tensor
    frames: Tensor


def still_video(videos: Tensor, frame_index: int | Tensor, *, layout: Layout = "bcthw") -> Tensor:
    """SCUFO: one frame of each clip, repeated over its length.

    Draw the index from a seeded generator: other frames are other test sets. All crops and views of a clip take the
    same one.

    Args:
        videos: Clips as the network is fed them, floating, of shape `layout`.
        frame_index: Number of the frame among the T of the clip: one for all, (B,), or, for the layout "bncthw",
            (B, N).
        layout: "btchw", "bcthw" or "bncthw".

    Returns:
        A view of the videos' shape whose frames share their memory; clone it before writing into it.

    Raises:
        ValueError: If shapes, dtypes or options do not fit, or an index lies outside the clip.

    Example:
        >>> import torch
        >>> still_video(torch.tensor([0.0, 1.0, 2.0]).reshape(1, 1, 3, 1, 1), 1).flatten()
        tensor([1., 1., 1.])
    """
    check_videos(videos, layout)
    return one_frame(videos, frame_index, layout).expand_as(videos)


def replace_background(frames: Tensor, masks: Tensor, background: Tensor) -> Tensor:
    r"""SCUBA: $m_t x_t + (1 - m_t)\, b$ in 0 … 255, truncated to whole numbers.

    Args:
        frames: x, RGB, uint8 (T, 3, H, W).
        masks: m, 1 in the foreground, (T, H, W), boolean or in [0, 1].
        background: b, RGB, uint8 (3, h, w); resized to (H, W), bicubic, its proportions not kept.

    Returns:
        uint8 (T, 3, H, W).

    Raises:
        ValueError: If shapes, dtypes or the masks' values do not fit.

    Example:
        >>> import torch
        >>> frames = torch.full((1, 3, 1, 3), 100, dtype=torch.uint8)
        >>> masks = torch.tensor([[[1.0, 0.5, 0.0]]])
        >>> replace_background(frames, masks, torch.full((3, 1, 3), 31, dtype=torch.uint8))[0, 0]
        tensor([[100,  65,  31]], dtype=torch.uint8)
    """
    _check_frames(frames)
    return _truncated(_over(frames, _mask("masks", masks, frames[:, 0]), _resized("background", background, frames)))


def conflicting_foreground(
    frames: Tensor, masks: Tensor, still_frame: Tensor, still_mask: Tensor, background: Tensor
) -> Tensor:
    r"""A moving foreground over the frozen foreground of another video: $m_t x_t + (1 - m_t)(m' z' + (1 - m')\, b)$.

    The label is that of the moving one. The authors' generator is not public; that the moving foreground lies on top
    is a choice made here.

    Args:
        frames: x, RGB, uint8 (T, 3, H, W).
        masks: m, 1 in the foreground, (T, H, W), boolean or in [0, 1].
        still_frame: z', a frame of the other video, uint8 (3, h, w), resized like the background.
        still_mask: m', its foreground, (h, w), boolean or in [0, 1]; resized to the nearest pixel.
        background: b, RGB, uint8 (3, h, w), resized to (H, W).

    Returns:
        uint8 (T, 3, H, W).

    Raises:
        ValueError: If shapes, dtypes or the masks' values do not fit.

    Example:
        >>> import torch
        >>> frames, still, ground = (torch.full((1, 3, 1, 3), grey, dtype=torch.uint8) for grey in (100, 50, 9))
        >>> moving, frozen = torch.tensor([[[True, False, False]]]), torch.tensor([[True, True, False]])
        >>> conflicting_foreground(frames, moving, still[0], frozen, ground[0])[0, 0]
        tensor([[100,  50,   9]], dtype=torch.uint8)
    """
    _check_frames(frames)
    _check_image("still_frame", still_frame)
    moving = _mask("masks", masks, frames[:, 0])
    frozen = _mask("still_mask", still_mask, still_frame[0])[None]
    if frozen.shape[1:] != frames.shape[2:]:
        frozen = F.interpolate(frozen[None].double(), frames.shape[2:], mode="nearest")[0].to(frozen.dtype)
    still = _resized("still_frame", still_frame, frames)
    ground = _over(still[None], frozen, _resized("background", background, frames))
    return _truncated(_over(frames, moving, ground))


def merge_foreground_masks(human: Tensor, saliency: Tensor | None = None, *, window: int = 1) -> Tensor:
    """What is human or salient in a frame or its neighbours.

    Args:
        human: Where a segmentation found people, boolean (T, H, W).
        saliency: Where a salient object is, boolean (T, H, W).
        window: Neighbours on each side whose masks are added; masks of single frames flicker.

    Returns:
        Boolean (T, H, W).

    Raises:
        ValueError: If shapes or dtypes do not fit, or `window` is negative.

    Example:
        >>> import torch
        >>> merge_foreground_masks(torch.tensor([True, False, False]).reshape(3, 1, 1)).flatten()
        tensor([ True,  True, False])
    """
    for name, masks in (("human", human), ("saliency", saliency)):
        if masks is not None and (masks.dtype != torch.bool or masks.ndim != 3 or masks.shape != human.shape):
            expected = f"boolean and of shape {tuple(human.shape) if human.ndim == 3 else '(T, H, W)'}"
            raise ValueError(f"`{name}` must be {expected}, got {tuple(masks.shape)} of {masks.dtype}")
    check_range("window", window, 0, float("inf"))
    union = human if saliency is None else human | saliency
    merged = union.clone()
    for shift in range(1, min(window, len(union) - 1) + 1):
        merged[shift:] |= union[:-shift]
        merged[:-shift] |= union[shift:]
    return merged


def boxes_to_masks(boxes: Tensor, *, num_frames: int, height: int, width: int, every_box: bool = False) -> Tensor:
    """Masks that are True inside boxes around actors. A frame without a box is all background.

    Args:
        boxes: (n, 5), each row frame, x1, y1, x2, y2: the frame counted from 0, pixels cut down to whole numbers, x2
            and y2 no longer inside. Parts outside the frame are cut off.
        num_frames: T.
        height: H.
        width: W.
        every_box: Use all boxes of a frame. The authors' test sets use the first one only.

    Returns:
        Boolean (T, H, W).

    Raises:
        ValueError: If shapes or sizes do not fit, or a frame is outside the video.

    Example:
        >>> import torch
        >>> boxes_to_masks(torch.tensor([[1, 0.0, 0.0, 2.9, 1.0]]), num_frames=2, height=1, width=4)
        tensor([[[False, False, False, False]],
        <BLANKLINE>
                [[ True,  True, False, False]]])
    """
    check_positive(num_frames=num_frames, height=height, width=width)
    if boxes.ndim != 2 or boxes.shape[1] != 5:
        raise ValueError(f"`boxes` must have shape (n, 5), got {tuple(boxes.shape)}")
    boxes = boxes.trunc().long() if boxes.is_floating_point() else boxes.long()
    of_frame: dict[int, list[int]] = {}
    for row, frame in enumerate(boxes[:, 0].tolist()):
        if not 0 <= frame < num_frames:
            raise ValueError(f"`boxes` must have frames in [0, {num_frames}), got {frame}")
        of_frame.setdefault(frame, []).append(row)
    masks = torch.zeros(num_frames, height, width, dtype=torch.bool, device=boxes.device)
    for frame, rows in of_frame.items():
        for row in rows if every_box else rows[:1]:
            left, top, right, bottom = boxes[row, 1:].clamp(min=0).tolist()
            masks[frame, top:bottom, left:right] = True
    return masks


def foreground_valid(masks: Tensor, *, min_area: float = 0.1, min_frames: float = 0.9) -> FgValid:
    """Whether a foreground is large enough for a test video.

    Args:
        masks: (T, H, W), boolean or in [0, 1].
        min_area: Share of a frame that its foreground must reach.
        min_frames: Share of frames that must reach it, for the video to be used.

    Returns:
        `video` (), `frames` (T,), boolean.

    Raises:
        ValueError: If shapes, the masks' values or the shares do not fit.

    Example:
        >>> import torch
        >>> foreground_valid(torch.eye(4).reshape(2, 2, 4) > 0, min_frames=0.5)
        FgValid(video=tensor(True), frames=tensor([True, True]))
    """
    check_range("min_area", min_area, 0, 1)
    check_range("min_frames", min_frames, 0, 1)
    if masks.ndim != 3 or not masks.numel():
        raise ValueError(f"`masks` must have shape (T, H, W), got {tuple(masks.shape)}")
    # Counts over counts, in double precision: a share that is exactly the bound must not fall below it.
    area = _mask("masks", masks, masks).double().sum((1, 2)) / masks[0].numel()
    frames = area >= min_area
    return FgValid(frames.sum().double() / len(frames) >= min_frames, frames)


def _check_frames(frames: Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
        raise ValueError(f"`frames` must be uint8 of shape (T, 3, H, W), got {tuple(frames.shape)} of {frames.dtype}")


def _check_image(name: str, image: Tensor) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"`{name}` must be uint8 of shape (3, h, w), got {tuple(image.shape)} of {image.dtype}")


def _mask(name: str, mask: Tensor, like: Tensor) -> Tensor:
    """The mask after checks, boolean as it is, others in double precision."""
    if mask.shape != like.shape:
        raise ValueError(f"`{name}` must have shape {tuple(like.shape)}, got {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        return mask
    mask = mask.double()
    if mask.numel() and not 0 <= mask.min() <= mask.max() <= 1:
        found = f"{float(mask.min()):g} to {float(mask.max()):g}"
        raise ValueError(f"`{name}` must lie in [0, 1], got values from {found}")
    return mask


def _over(images: Tensor, mask: Tensor, ground: Tensor) -> Tensor:
    """(T, 3, H, W): images where the mask (T, H, W) is 1, the ground where it is 0."""
    weight = mask[:, None]
    if mask.dtype == torch.bool:
        return torch.where(weight, images, ground)  # whole videos in double precision would fill the memory
    return weight * images + (1 - weight) * ground


def _truncated(images: Tensor) -> Tensor:
    return images.to(torch.uint8)


def _resized(name: str, image: Tensor, frames: Tensor) -> Tensor:
    """An image (3, h, w) in the size of the frames."""
    _check_image(name, image)
    height, width = frames.shape[2:]
    if image.shape[1:] == (height, width):
        return image
    import numpy as np
    from PIL import Image

    pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    resized = np.array(pixels.resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(resized).permute(2, 0, 1).to(image.device)

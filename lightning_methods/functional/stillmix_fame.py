"""FAME's foreground mask: motion proposes seeds, their colours decide."""

import math

import torch
from torch import Tensor

from lightning_methods.functional._logits import check_range, upcast
from lightning_methods.functional._video import Layout, check_videos

_EPS = 1e-8
_BINS = 10


@torch.no_grad()
def fame_foreground_mask(
    videos: Tensor,
    *,
    beta: float = 0.5,
    kernel_size: int | None = None,
    layout: Layout = "bcthw",
) -> Tensor:
    r"""The share `beta` of a clip's pixels that most likely is foreground; no gradient, no training, no masks needed.

    1. Motion: the mean absolute difference of neighbouring frames, summed over colours, blurred, scaled to [0, 1].
       Its ½HW largest pixels are foreground seeds, its HW/10 smallest background seeds.
    2. Colour: the pixels of the mean frame fall into bins of hue, saturation and brightness. With F and Q the bins'
       frequencies among the two kinds of seeds (Q after adding one to each count), a pixel scores F / (F + Q).
    3. The scores are blurred and scaled again; the mask holds the `beta` · HW largest.

    The bins multiply a hue in radians by 2π once more, an error of the method's original code that is kept for
    parity. Colours near the border of a bin change it with the last digit of the input. A clip without motion has
    arbitrary seeds.

    Args:
        videos: RGB in [0, 1] (undo the normalisation first), floating, at least two frames, of shape `layout`.
        beta: Share of foreground, in [0, 1].
        kernel_size: Odd size k of the Gaussian blur, whose deviation is k/3; None: a tenth of the smaller side,
            made odd.
        layout: "btchw", "bcthw" or "bncthw".

    Returns:
        Boolean (B, H, W); (B, N, H, W), a mask for each clip, for the layout "bncthw".

    Raises:
        ValueError: If shapes, dtypes, ranges or options do not fit.

    Source: Ding et al., CVPR 2022 (FAME), as in the StillMix authors' code.

    Example:
        >>> import torch
        >>> videos = torch.full((1, 3, 2, 4, 4), 0.2)
        >>> videos[:, 0, 0, :, :2] = 1.0
        >>> fame_foreground_mask(videos)[0, 0]
        tensor([ True,  True, False, False])
    """
    check_videos(videos, layout)
    check_range("beta", beta, 0, 1)
    clips = _clips(videos, layout)
    _, channels, frames, height, width = clips.shape
    if channels != 3 or frames < 2:
        raise ValueError(f"`videos` must have 3 colours and at least 2 frames, got {channels} and {frames}")
    if kernel_size is None:
        kernel_size = int(0.1 * min(height, width)) // 2 * 2 + 1
    if kernel_size % 2 == 0 or not 0 < kernel_size < 2 * min(height, width):
        limit = 2 * min(height, width)
        raise ValueError(f"`kernel_size` must be odd, positive and below {limit}, got {kernel_size}")

    motion = (clips[:, :, :-1] - clips[:, :, 1:]).abs().sum(1).mean(1)
    motion = _scaled(_blurred(motion, kernel_size)).flatten(1)
    codes = _colour_codes(clips.mean(2)).flatten(1)
    pixels = height * width
    foreground = _frequencies(codes, motion.topk(int(0.5 * pixels)).indices, 0, clips.dtype)
    background = _frequencies(codes, motion.topk(int(0.1 * pixels), largest=False).indices, 1, clips.dtype)
    score = (foreground / (foreground + background)).gather(1, codes)
    score = _scaled(_blurred(score.reshape(-1, height, width), kernel_size)).flatten(1)
    chosen = score.topk(int(beta * pixels)).indices
    mask = torch.zeros_like(score, dtype=torch.bool).scatter_(1, chosen, True)
    return mask.reshape(*videos.shape[: videos.ndim - 4], height, width)


def _clips(videos: Tensor, layout: Layout) -> Tensor:
    """(clips, C, T, H, W), in float32 at least."""
    (videos,) = upcast(videos)
    if layout == "btchw":
        return videos.transpose(1, 2)
    return videos.flatten(0, 1) if layout == "bncthw" else videos


def _blurred(maps: Tensor, kernel_size: int) -> Tensor:
    """Gaussian blur of (n, H, W). `gaussian_blur2d` of kornia reads the deviation back from a tensor."""
    from kornia.filters import filter2d_separable

    offset = torch.arange(kernel_size, dtype=maps.dtype, device=maps.device) - kernel_size // 2
    weight = torch.exp(-(offset**2) / (2 * (kernel_size / 3) ** 2))
    kernel = (weight / weight.sum())[None]
    blurred: Tensor = filter2d_separable(maps[:, None], kernel, kernel, "reflect")
    return blurred[:, 0]


def _scaled(maps: Tensor) -> Tensor:
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (maps.amax((1, 2), keepdim=True) + _EPS)


def _colour_codes(images: Tensor) -> Tensor:
    """The bin of each pixel of (n, 3, H, W), integers below 1000."""
    from kornia.color import rgb_to_hsv

    hue, saturation, value = rgb_to_hsv(images).unbind(1)
    angle = 2 * math.pi * hue
    across, along = ((saturation * part + 1) / 2 for part in (angle.cos(), angle.sin()))
    first, second, third = (torch.round((_BINS - 1) * part + 1) for part in (across, along, value))
    return (first + _BINS * (second - 1) + _BINS**2 * (third - 1)).long()


def _frequencies(codes: Tensor, seeds: Tensor, added: int, dtype: torch.dtype) -> Tensor:
    """(n, bins): the share of each colour among the seeds, after adding so many to each count."""
    found = codes.gather(1, seeds)
    counts = torch.full((len(codes), _BINS**3), added, dtype=dtype, device=codes.device)
    counts.scatter_add_(1, found, torch.ones_like(found, dtype=dtype))
    return counts / (counts.sum(1, keepdim=True) + _EPS)

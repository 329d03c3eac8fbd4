"""Crops of video clips: drawn apart from being cut, so that all frames of a clip share one.

Frames are uint8 (T, 3, H, W); what is cut out is floating, in 0 … 255. Resizing is bilinear without smoothing, as in
the code of most video benchmarks.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

RandomCrop: TypeAlias = Literal["multiscale", "resized"]

_SCALES = (1.0, 0.875, 0.75, 0.66)
# Of the crop's corner, in quarters of the room that there is across and down.
_PLACES = ((0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3))
_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10


class Crop(NamedTuple):
    """A rectangle, in pixels."""

    top: int
    left: int
    height: int
    width: int


def resize_short_side(frames: Tensor, size: int) -> Tensor:
    """Frames whose shorter side is `size`, floating; the other side in proportion, rounded."""
    height, width = frames.shape[-2:]
    short = min(height, width)
    return resized(frames, *(int(side * size / short + 0.5) for side in (height, width)))


def resized(frames: Tensor, height: int, width: int) -> Tensor:
    """Frames of this size, in float32."""
    if frames.shape[-2:] == (height, width):
        return frames.float()
    return F.interpolate(frames.float(), (height, width), mode="bilinear", align_corners=False)


def cut(frames: Tensor, crop: Crop) -> Tensor:
    """The part of the frames that lies in the crop."""
    return frames[..., crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]


def draw_crop(kind: RandomCrop, height: int, width: int, generator: torch.Generator | None = None) -> Crop:
    """A crop for training: that of temporal segment networks, or one of random area and shape.

    "multiscale": sides of 1, 0.875, 0.75 and 0.66 of the shorter side, the two at most one step apart, at one of 13
    fixed places. "resized": 8 % to 100 % of the area, a shape between 3:4 and 4:3, anywhere; the largest square in
    the middle if ten draws do not fit.
    """
    if kind == "multiscale":
        return _draw_multiscale(height, width, generator)
    return _draw_resized(height, width, generator)


def _draw_multiscale(height: int, width: int, generator: torch.Generator | None) -> Crop:
    sides = [int(min(height, width) * scale) for scale in _SCALES]
    pairs = [(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1]
    crop_height, crop_width = pairs[_below(len(pairs), generator)]
    across, down = _PLACES[_below(len(_PLACES), generator)]
    top, left = down * ((height - crop_height) // 4), across * ((width - crop_width) // 4)
    return Crop(top, left, crop_height, crop_width)


def _draw_resized(height: int, width: int, generator: torch.Generator | None) -> Crop:
    draws = torch.rand(_ATTEMPTS, 2, generator=generator, dtype=torch.float64).tolist()
    for first, second in draws:
        area = height * width * (_AREA[0] + first * (_AREA[1] - _AREA[0]))
        low, high = (math.log(bound) for bound in _RATIO)
        ratio = math.exp(low + second * (high - low))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = _below(height - crop_height + 1, generator)
            return Crop(top, _below(width - crop_width + 1, generator), crop_height, crop_width)
    (square,) = even_crops(height, width, min(height, width), 1)
    return square


def even_crops(height: int, width: int, size: int, count: int) -> list[Crop]:
    """Squares for evaluation: one in the middle, or three along the longer side, first, last and middle.

    Raises:
        ValueError: The frames are smaller than the crop.
    """
    if size > min(height, width):
        raise ValueError(f"a crop of {size} does not fit into frames of {height} × {width}")
    down, across = (height - size) // 2, (width - size) // 2
    middle = Crop(down, across, size, size)
    if count == 1:
        return [middle]
    if width >= height:
        return [Crop(down, 0, size, size), Crop(down, 2 * across, size, size), middle]
    return [Crop(0, across, size, size), Crop(2 * down, across, size, size), middle]


def normalised(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x − mean) / std by colour; frames (..., 3, H, W) in 0 … 255."""
    shift, scale = (torch.tensor(values, dtype=frames.dtype)[:, None, None] for values in (mean, std))
    return (frames - shift) / scale


def coin(generator: torch.Generator | None = None) -> bool:
    """True half of the time."""
    return _below(2, generator) == 1


def _below(limit: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(limit, (), generator=generator))

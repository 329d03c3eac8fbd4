"""Two views of the frames of a video: one as for evaluation, and a strongly augmented one.

Sizes, probabilities and strengths are those of the code of Lv et al., CVPR 2023. Colours, RandAugment and its
operations are kornia's: their strengths follow kornia's scale, which is not Pillow's to the letter.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from kornia.augmentation import ColorJitter, RandomGrayscale
from kornia.augmentation.auto import RandAugment
from kornia.augmentation.container.params import ParamItem
from kornia.enhance import normalize
from kornia.geometry.transform import resize
from torch import Tensor

SIZE = 224
_SHORTER_SIDE = 256
_MEAN = torch.tensor((123.675, 116.28, 103.53)) / 255
_STD = torch.tensor((58.395, 57.12, 57.375)) / 255
_SCALES = (1.0, 0.875, 0.75, 0.66)


def shrink(frames: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) to float32 in [0, 1] with the shorter side at 256, where both views begin."""
    resized: Tensor = resize(frames.float() / 255, _SHORTER_SIDE, side="short")
    return resized


def weak_view(frames: Tensor) -> Tensor:
    """The centre of shrunken frames, normalised: (N, 3, 224, 224)."""
    height, width = frames.shape[-2:]
    top, left = (height - SIZE) // 2, (width - SIZE) // 2
    return _normalized(frames[..., top : top + SIZE, left : left + SIZE])


class StrongView:
    """Crops, colours and two operations of RandAugment, all drawn once for all frames of a video."""

    def __init__(self) -> None:
        self.jitter = ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8, same_on_batch=True)
        self.grey = RandomGrayscale(p=0.2, same_on_batch=True)
        self.operations: Any = RandAugment(n=2, m=10)  # its m may have a fraction

    @torch.no_grad()  # kornia's operations have parameters
    def __call__(self, frames: Tensor) -> Tensor:
        """Shrunken frames to normalised ones, (N, 3, 224, 224)."""
        frames = self.grey(self.jitter(multi_scale_crop(frames)))
        # kornia draws the operations once for a batch, but the signs of rotations and the like for each image.
        self.operations.m = 10 + 0.5 * torch.randn(()).item()
        drawn = self.operations.forward_parameters(torch.Size([1, *frames.shape[1:]]))
        frames = self.operations(frames, params=_repeated(drawn, len(frames)))
        return _normalized(frames.clamp(0, 1))


def multi_scale_crop(frames: Tensor) -> Tensor:
    """A crop of one of four scales of the shorter side, at a corner or the centre, resized to 224.

    Height and width are at most one step of the scales apart.
    """
    height, width = frames.shape[-2:]
    sizes = [int(min(height, width) * scale) for scale in _SCALES]
    pairs = [(h, w) for i, h in enumerate(sizes) for j, w in enumerate(sizes) if abs(i - j) <= 1]
    crop_height, crop_width = pairs[int(torch.randint(len(pairs), ()))]
    down, right = height - crop_height, width - crop_width
    places = [(0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)]
    top, left = places[int(torch.randint(len(places), ()))]
    crop = frames[..., top : top + crop_height, left : left + crop_width]
    return F.interpolate(crop, (SIZE, SIZE), mode="bilinear", align_corners=False)


def _repeated(items: Sequence[Any], count: int) -> list[ParamItem]:
    """The parameters of kornia for one image as those of `count` images."""
    return [ParamItem(item.name, _repeated_values(item.data, count)) for item in items]


def _repeated_values(data: Any, count: int) -> Any:
    if isinstance(data, list):
        return _repeated(data, count)
    values = {key: value.expand(count, *value.shape[1:]) for key, value in data.items() if key != "forward_input_shape"}
    return values | {"forward_input_shape": torch.tensor([count, *data["forward_input_shape"][1:]])}


def _normalized(frames: Tensor) -> Tensor:
    normal: Tensor = normalize(frames, _MEAN, _STD)
    return normal

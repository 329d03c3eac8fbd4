"""What SCUBA videos are put together from: foreground masks and backgrounds."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lightning_methods.datamodules._video_files import VideoError, open_video
from lightning_methods.datamodules._video_lists import VideoFinder
from lightning_methods.functional.stillmix_fame import fame_foreground_mask
from lightning_methods.functional.stillmix_stripes import sample_stripes, sinusoidal_stripes

MaskReader: TypeAlias = Callable[[str, Tensor], Tensor]

_FAME_FRAMES = 16
_GREY = ("1", "L", "LA", "I", "I;16", "F")
_STRIPES_SIZE = 256


def fame_masks(name: str, frames: Tensor) -> Tensor:
    """Boolean masks (T, H, W) of what moves, by `functional.fame_foreground_mask`: one for every 16 frames.

    Raises:
        VideoError: There is only one frame, in which nothing can move.
    """
    if len(frames) < 2:
        raise VideoError(f"{name}: has one frame, and masks from motion need two")
    starts = list(range(0, len(frames) - 1, _FAME_FRAMES))  # a last stretch has at least two frames
    parts = [frames[start:end] for start, end in zip(starts, [*starts[1:], len(frames)], strict=True)]
    masks = [fame_foreground_mask(part[None].float() / 255, layout="btchw").expand(len(part), -1, -1) for part in parts]
    return torch.cat(masks)


class MaskFiles:
    """Reads boolean masks (T, H, W) from files named like the videos.

    A folder, ZIP or video file of as many pictures as the video has frames, white in the foreground; or, as JHMDB
    stores its puppets, a folder with a `puppet_mask.mat` whose `part_mask` is (H, W, T).

    Args:
        root: Where they are.

    Raises:
        VideoError: From a call: no mask for a video, or not as many as it has frames.
        ModuleNotFoundError: From a call: `puppet_mask.mat` without SciPy, which comes with the extra `demos`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._finder = VideoFinder(root, "auto")

    def __call__(self, name: str, frames: Tensor) -> Tensor:
        path = self._finder.find(name) or self._finder.find(str(Path(name).with_suffix("")))
        if path is None:
            raise VideoError(f"{self.root}: has no masks of {name}")
        puppets = path / "puppet_mask.mat"
        masks = _puppets(puppets) if puppets.is_file() else _pictures(path)
        if len(masks) != len(frames):
            raise VideoError(f"{path}: has {len(masks)} masks for the {len(frames)} frames of {name}")
        if masks.shape[1:] == frames.shape[2:]:
            return masks
        return F.interpolate(masks[:, None].float(), frames.shape[2:], mode="nearest")[:, 0] > 0


def _pictures(path: Path) -> Tensor:
    with open_video(path) as source:
        return torch.stack([picture.float().mean(0) > 127 for picture in source.frames()])


def _puppets(path: Path) -> Tensor:
    try:
        from scipy.io import loadmat  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{path} is read with SciPy, which is not installed: pip install "lightning-methods[demos]"'
        ) from error
    return torch.from_numpy(np.ascontiguousarray(loadmat(path)["part_mask"].transpose(2, 0, 1) > 0))


class Backgrounds(Protocol):
    """Draws still backgrounds."""

    def draw(self, rng: np.random.Generator) -> tuple[Tensor, Any]:
        """A background, uint8 (3, h, w), and what the manifest says of it."""


class Stripes:
    """Sinusoidal stripes of random colours and shapes."""

    def draw(self, rng: np.random.Generator) -> tuple[Tensor, Mapping[str, Any]]:
        """A background of 256 × 256 and its parameters."""
        draw = sample_stripes(generator=torch.Generator().manual_seed(int(rng.integers(2**63))))._asdict()
        return sinusoidal_stripes(**draw, size=_STRIPES_SIZE), draw


class ImageFolder:
    """Colour images of a folder and its subfolders. Grey ones are drawn anew, transparency is dropped.

    Args:
        root: The folder.

    Raises:
        VideoError: It has no images, or, from `draw`, none in colour; or one cannot be decoded.
    """

    _attempts = 100

    def __init__(self, root: Path) -> None:
        self.root = root
        suffixes = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
        found = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
        self.names = sorted(str(path.relative_to(root)) for path in found if path.suffix.lower() in suffixes)
        if not self.names:
            raise VideoError(f"{root}: has no background images")

    def draw(self, rng: np.random.Generator) -> tuple[Tensor, str]:
        """An image and its name in the folder."""
        for _ in range(self._attempts):
            name = self.names[int(rng.integers(len(self.names)))]
            try:
                with Image.open(self.root / name) as image:
                    if image.mode not in _GREY:
                        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1), name
            except (OSError, SyntaxError) as error:  # Pillow reports some broken headers as SyntaxError
                raise VideoError(f"{self.root / name}: cannot be decoded ({error})") from error
        raise VideoError(f"{self.root}: {self._attempts} images drawn from it are all grey")


def background_source(backgrounds: Literal["stripes"] | str | Path) -> Backgrounds:
    """Stripes, or the images of a folder."""
    return Stripes() if backgrounds == "stripes" else ImageFolder(Path(backgrounds))


def mask_reader(masks: str | Path | MaskReader | None) -> tuple[MaskReader, str]:
    """What reads the masks, and its name in the manifest."""
    if masks is None:
        return fame_masks, "fame"
    if callable(masks):
        return masks, getattr(masks, "__name__", type(masks).__name__)
    return MaskFiles(Path(masks)), str(masks)

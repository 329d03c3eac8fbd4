"""Frames of videos on disk: a folder of images, one ZIP of them, an array, or a video file.

Example:
    >>> with open_video("v_Archery_g01_c01.avi") as video:  # doctest: +SKIP
    ...     clip = video.read([0, 8, 16])
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from string import Formatter
from typing import IO, Literal, TypeAlias, get_args
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_methods.datamodules._frame_source import FrameSource as FrameSource
from lightning_methods.datamodules._frame_source import VideoError as VideoError
from lightning_methods.datamodules._pyav import VideoFile
from lightning_methods.datamodules._pyav import write_video as write_video

VideoKind: TypeAlias = Literal["auto", "frames", "zip", "video"]

_IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")


def open_video(path: str | Path, *, kind: VideoKind = "auto", template: str | None = None) -> FrameSource:
    """Opens a video in one of the forms in which data sets store them.

    Args:
        path: A folder of images or a single image ("frames"), a ZIP of images ("zip"), a video file ("video"), or a
            .npy file of frames (T, H, W, 3), RGB, uint8.
        kind: Which of these it is; "auto" looks at the path, and knows .npy files by their suffix.
        template: Name of a frame by its number, such as "img_{:05}.jpg". Images with other names are ignored, the
            smallest number is frame 0, and the numbers must not have gaps. None: all images, in natural order
            (img_2 before img_10).

    Returns:
        The open video, to be used in a `with` statement.

    Raises:
        VideoError: There is nothing at the path, it is not of that kind, it is damaged or has no frames.
        ModuleNotFoundError: It is a video file and PyAV, the extra `video`, is not installed.
        ValueError: `kind` is unknown, or `template` has not exactly one place for a number.
    """
    path = Path(path)
    if kind not in get_args(VideoKind):
        raise ValueError(f"`kind` must be one of {get_args(VideoKind)}, got {kind!r}")
    number = None if template is None else _number_reader(template)
    if not path.exists():
        raise VideoError(f"{path}: there is no such file or folder")
    if kind == "auto":
        if path.suffix.lower() == ".npy":
            return _Array(path)
        kind = _kind_of(path)
    if kind == "frames":
        return _open_folder(path, number)
    return _open_zip(path, number) if kind == "zip" else VideoFile(path)


def _kind_of(path: Path) -> VideoKind:
    if path.is_dir() or path.suffix.lower() in _IMAGES:
        return "frames"
    return "zip" if is_zipfile(path) else "video"


class _Images(FrameSource):
    """Images with ordered names, from a folder or an archive."""

    def __init__(
        self, path: Path, names: Sequence[str], opened: Callable[[str], IO[bytes]], archive: ZipFile | None = None
    ) -> None:
        self.path = path
        self.num_frames = len(names)
        self.names = [_base(name) for name in names]
        self._names = names
        self._open = opened
        self._archive = archive

    def frames(self) -> Iterator[Tensor]:
        return map(self._image, self._names)

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()

    def _decode(self, wanted: Sequence[int]) -> dict[int, Tensor]:
        return {index: self._image(self._names[index]) for index in wanted}

    def _image(self, name: str) -> Tensor:
        try:
            with self._open(name) as file, Image.open(file) as image:
                pixels = np.array(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, BadZipFile) as error:  # Pillow reports broken headers as SyntaxError
            raise VideoError(f"{self.path}: frame {name} cannot be decoded ({error})") from error
        return torch.from_numpy(pixels).permute(2, 0, 1)


class _Array(FrameSource):
    """Frames in a .npy file, of which no more is read than is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._frames = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise VideoError(f"{path}: cannot be read as a .npy file ({error})") from error
        shape, dtype = self._frames.shape, self._frames.dtype
        if len(shape) != 4 or shape[3] != 3 or not shape[0] or dtype != np.uint8:
            raise VideoError(f"{path}: must hold frames (T, H, W, 3), uint8, found {shape}, {dtype}")
        self.num_frames = len(self._frames)

    def frames(self) -> Iterator[Tensor]:
        return map(self._pixels, range(self.num_frames))

    def _decode(self, wanted: Sequence[int]) -> dict[int, Tensor]:
        return {index: self._pixels(index) for index in wanted}

    def _pixels(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self._frames[index])).permute(2, 0, 1)


def _open_folder(path: Path, number: Callable[[str], int | None] | None) -> FrameSource:
    if path.is_file():
        return _Images(path.parent, [path.name], lambda name: (path.parent / name).open("rb"))
    if not path.is_dir():
        raise VideoError(f"{path}: must be a folder of images or an image")
    names = _ordered(path, (entry.name for entry in path.iterdir()), number)
    return _Images(path, names, lambda name: (path / name).open("rb"))


def _open_zip(path: Path, number: Callable[[str], int | None] | None) -> FrameSource:
    try:
        archive = ZipFile(path)
    except (BadZipFile, OSError) as error:
        raise VideoError(f"{path}: cannot be read as a ZIP file ({error})") from error
    try:
        names = _ordered(path, archive.namelist(), number)
    except VideoError:
        archive.close()
        raise
    return _Images(path, names, partial(archive.open, mode="r"), archive)


def _ordered(path: Path, names: Iterable[str], number: Callable[[str], int | None] | None) -> list[str]:
    """The names of the frames among `names`, in order."""
    # Archivers on a Mac add a hidden file for each file.
    images = [name for name in names if name.lower().endswith(_IMAGES) and not _base(name).startswith(".")]
    if number is None:
        found = sorted(images, key=_natural)
    else:
        numbered = {value: name for name in images if (value := number(_base(name))) is not None}
        found = [numbered[value] for value in sorted(numbered)]
        if found and len(found) != max(numbered) - min(numbered) + 1:
            missing = next(value for value in count(min(numbered)) if value not in numbered)
            raise VideoError(f"{path}: frame number {missing} is missing, but there are later ones")
    if not found:
        what = "no images" if number is None else f"no images named by the template, only {sorted(images)[:3]}"
        raise VideoError(f"{path}: has {what}")
    return found


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _natural(name: str) -> list[str | int]:
    """Digits compare as numbers: odd places of the split hold them."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))]


def _number_reader(template: str) -> Callable[[str], int | None]:
    """From a file's name to the number that the template was filled with; None if it was not made by it."""
    pieces = list(Formatter().parse(template))
    if sum(field is not None for _, field, _, _ in pieces) != 1:
        raise ValueError(f"`template` must have one place for a number, such as img_{{:05}}.jpg, got {template!r}")
    pattern = re.compile("".join(re.escape(text) + ("" if field is None else r"(\d+)") for text, field, _, _ in pieces))

    def number(name: str) -> int | None:
        match = pattern.fullmatch(name)
        value = int(match[1]) if match else None
        return value if value is not None and template.format(value) == name else None

    return number

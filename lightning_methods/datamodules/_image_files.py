"""Images as files: class folders, lists of paths with labels, and ImageNet's usual transforms."""

import os
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_methods.datamodules._base import LightningDataModule

Transform = Callable[[Image.Image], Tensor]
Entry = TypeVar("Entry")

_EXTENSIONS = (".jpeg", ".jpg", ".png")

IMAGENET_LAYOUT = (
    "Expected layout: <root>/train/<wnid>/*.JPEG and <root>/val/<wnid>/*.JPEG, as made from "
    "ILSVRC2012_img_{train,val}.tar of https://image-net.org (free, after registration); the "
    "validation images have to be sorted into one folder per class"
)


def train_transform() -> Transform:
    """Random area (8-100 %) and aspect ratio (3/4-4/3) resized to 224, random flip, ImageNet mean and std."""
    no_jitter: Any = None  # which timm understands, though its signature does not say so
    return cast(Transform, create_transform(224, is_training=True, color_jitter=no_jitter))


def eval_transform() -> Transform:
    """Shorter side to 256, centre crop of 224, ImageNet mean and std."""
    return cast(Transform, create_transform(224, crop_pct=224 / 256))


def read_rgb(path: str, content: bytes | None = None) -> Image.Image:
    """Decodes an image file, or `content` under its name, in RGB whatever its own mode is.

    Raises:
        ValueError: It cannot be decoded.
    """
    try:
        with Image.open(path if content is None else BytesIO(content)) as file:
            image: Image.Image = file.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow reports some broken headers as SyntaxError
        raise ValueError(f"image {path} cannot be decoded: {error}") from error
    return image


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Images read from disk when they are asked for.

    Args:
        samples: (path, label) of each image.
        transform: From an RGB image to what the network is fed.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], transform: Transform) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.transform(read_rgb(path)), label


class ImageFilesDataModule(LightningDataModule):
    """Loaders over `ImageFiles`; subclasses fill `datasets` in `setup`.

    Args:
        root: Folder of the images.
        batch_size: Samples per batch and process, at least 1.
        num_workers: Processes that decode images, per loader.
        num_classes: Number of classes that the files must have.

    Raises:
        ValueError: `batch_size` or `num_classes` is below 1, or `num_workers` below 0.
    """

    drop_last = False  # whether an incomplete last batch of training samples is left out

    def __init__(self, root: str | Path, batch_size: int, num_workers: int, num_classes: int) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("num_classes", num_classes, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.root = Path(root).expanduser()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.num_classes = num_classes
        self.datasets: dict[str, Dataset[Any]] = {}

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of augmented training images."""
        return self._loader("train", shuffle=True, drop_last=self.drop_last)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of the validation images, in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test images, in order."""
        return self._loader("test")

    def _loader(self, split: str, *, shuffle: bool = False, drop_last: bool = False) -> DataLoader[Any]:
        return DataLoader(
            self.datasets[split],
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def scan_class_folders(folder: Path, num_classes: int) -> tuple[list[str], list[tuple[str, int]]]:
    """Images in one folder per class; the label is the place of the folder's name in sorted order.

    Returns:
        Names of the classes, and (path, label) of each image.

    Raises:
        FileNotFoundError: The folder is missing, or a class folder holds no image.
        ValueError: There are not `num_classes` class folders.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} is missing. {IMAGENET_LAYOUT}")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if len(classes) != num_classes:
        raise ValueError(
            f"{folder} holds {len(classes)} class folders, expected num_classes={num_classes}. {IMAGENET_LAYOUT}"
        )
    samples = [(path, label) for label, name in enumerate(classes) for path in sorted(_image_paths(folder / name))]
    empty = sorted(set(range(num_classes)) - {label for _, label in samples})
    if empty:
        raise FileNotFoundError(
            f"{len(empty)} of {num_classes} class folders in {folder} hold no image; "
            f"first: {classes[empty[0]]}. {IMAGENET_LAYOUT}"
        )
    return classes, samples


def read_image_list(path: Path, num_classes: int) -> list[tuple[str, int]]:
    """Lines "relative/path.JPEG label" of a text file; the images themselves are not looked at.

    Returns:
        (relative path, label) of each line, in order.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It is empty, or a line has no label or one outside 0 … num_classes - 1. The message counts
            such lines and shows the first.
    """
    return read_list(
        path,
        lambda line: parse_entry(line, num_classes),
        "relative/path.JPEG label",
        "Expected ImageNet_LT_{train,val,test}.txt, the lists of "
        "https://github.com/zhmiao/OpenLongTailRecognition-OLTR, in the folder given as `lists`",
    )


def read_list(path: Path, parse: Callable[[str], Entry], line: str, where_from: str) -> list[Entry]:
    """What `parse` makes of each line of a text file.

    Args:
        path: The file.
        parse: Raises ValueError, with the line and what is wrong with it.
        line: What a line should look like, for the message.
        where_from: Where the file comes from, for the message if it is missing.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It is empty, or `parse` refuses lines. The message counts these and shows the first.
    """
    if not path.is_file():
        raise FileNotFoundError(f"list {path} is missing. {where_from}")
    # A path may hold bytes that are no UTF-8; they are kept as the file system writes them.
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").rstrip().splitlines()
    if not lines:
        raise ValueError(f'{path} is empty; expected lines "{line}"')
    entries, problems = [], []
    for number, text in enumerate(lines, start=1):
        try:
            entries.append(parse(text))
        except ValueError as error:
            problems.append(f"line {number}, {error}")
    if problems:
        raise ValueError(f'{path}: {len(problems)} of {len(lines)} lines are not "{line}"; first: {problems[0]}')
    return entries


def parse_entry(line: str, num_classes: int, first: int = 0) -> tuple[str, int]:
    """Path and label, counted from 0, of a line whose labels are counted from `first`."""
    parts = line.rsplit(maxsplit=1)
    if len(parts) != 2 or not parts[1].lstrip("-").isdecimal():
        raise ValueError(f"{line!r}: no label")
    name, label = parts[0], int(parts[1]) - first
    if not 0 <= label < num_classes:
        raise ValueError(f"{line!r}: the label is outside {first} … {num_classes - 1 + first}")
    return name, label


def locate_images(
    entries: Sequence[tuple[str, int]], root: Path, path: Path, layout: str = IMAGENET_LAYOUT
) -> list[tuple[str, int]]:
    """The entries of the list `path` with the full path of each image, all known to exist.

    Raises:
        FileNotFoundError: Images are missing. The message counts them and gives the line of the first.
    """
    # One listing per folder instead of one look-up per image, which network disks answer slowly.
    folders = {folder: _file_names(root / folder) for folder in {_folder(name) for name, _ in entries}}
    missing = [
        number
        for number, (name, _) in enumerate(entries, start=1)
        if name.rpartition("/")[2] not in folders[_folder(name)]
    ]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(entries)} images of {path} are not under {root}; "
            f"first: line {missing[0]}, {entries[missing[0] - 1][0]}. {layout}"
        )
    return [(f"{root}/{name}", label) for name, label in entries]


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _file_names(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()


def _image_paths(folder: Path) -> list[str]:
    return [entry.path for entry in os.scandir(folder) if entry.name.lower().endswith(_EXTENSIONS)]

"""Samples of images and texts read from files, and how both become what a model is fed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_methods.datamodules._base import LightningDataModule
from lightning_methods.datamodules._image_files import read_rgb

ImageTransform: TypeAlias = Callable[[Image.Image], Any]
Tokenizer: TypeAlias = Callable[[list[str]], Any]
Batch: TypeAlias = dict[str, Any]

_LONGEST = 77  # CLIP's; other models take that much too
_TRANSFORMS = 'a function, an image size, "timm:NAME" or "transformers:NAME"'
_TOKENIZERS = 'None, a function or "transformers:NAME"'


@dataclass(frozen=True)
class Samples:
    """Samples as columns; all columns have the same length.

    Args:
        images: Paths, by the key in the batch.
        texts: Texts.
        numbers: Integers.
    """

    images: Mapping[str, Sequence[str]]
    texts: Mapping[str, Sequence[str]]
    numbers: Mapping[str, Sequence[int]]

    def __len__(self) -> int:
        return len(next(iter(self.numbers.values())))


class SampleFiles(Dataset[dict[str, Any]]):
    """Samples whose images are read when they are asked for.

    Args:
        samples: What to read.
        transform: From an RGB image to what the network is fed.
    """

    def __init__(self, samples: Samples, transform: ImageTransform) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        given = self.samples
        images = {key: self.transform(read_image(paths[index])) for key, paths in given.images.items()}
        others = {key: values[index] for part in (given.texts, given.numbers) for key, values in part.items()}
        return images | others


class Collate:
    """Makes a batch of samples: tensors are stacked, integers become a tensor, texts are tokenized.

    Args:
        tokenizer: From a list of texts to what the network is fed; None leaves them a list.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        return {key: self._join([sample[key] for sample in samples]) for key in samples[0]}

    def _join(self, values: list[Any]) -> Any:
        if isinstance(values[0], str):
            return values if self.tokenizer is None else self.tokenizer(values)
        if isinstance(values[0], Tensor):
            return torch.stack(values)
        return torch.tensor(values) if isinstance(values[0], int) else values


class TextImageDataModule(LightningDataModule):
    """Loaders over `SampleFiles`.

    Args:
        root: Folder of the images.
        transform: As `as_transform` takes it.
        tokenizer: As `as_tokenizer` takes it.
        batch_size: Samples per batch and process, at least 1.
        num_workers: Processes that decode images, per loader.

    Raises:
        ValueError: `batch_size` is below 1 or `num_workers` below 0, or `transform` or `tokenizer` is none of what
            they can be.
    """

    def __init__(
        self,
        root: str | Path,
        transform: int | ImageTransform | str,
        tokenizer: Tokenizer | str | None,
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        check_transform("transform", transform)
        check_tokenizer(tokenizer)
        self.root = Path(root).expanduser()
        self.transform = transform
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.num_workers = num_workers

    def _loader(self, dataset: SampleFiles, *, shuffle: bool = False, drop_last: bool = False) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            collate_fn=Collate(as_tokenizer(self.tokenizer)),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def read_image(path: str) -> Image.Image:
    """An RGB image from an image file, or from a .npy file that holds blue, green and red.

    Raises:
        ValueError: The file cannot be decoded, or the array is not uint8 of shape (H, W, 3).
    """
    if not path.lower().endswith(".npy"):
        return read_rgb(path)
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"image {path} must be uint8 of shape (H, W, 3), found {array.dtype} {array.shape}")
    return Image.fromarray(np.ascontiguousarray(array[:, :, ::-1]))


def check_transform(name: str, given: int | ImageTransform | str) -> None:
    """Whether `as_transform` will know what to do, as far as can be told without loading anything.

    Raises:
        ValueError: It will not.
    """
    is_size = isinstance(given, int) and not isinstance(given, bool) and given > 0
    is_name = isinstance(given, str) and given.startswith(("timm:", "transformers:"))
    if not (is_size or is_name or callable(given)):
        raise ValueError(f"{name} must be {_TRANSFORMS}, got {given!r}")


def as_transform(given: int | ImageTransform | str) -> ImageTransform:
    """What turns an RGB image into a network's input.

    Args:
        given: A function, taken as it is. An image size: the whole image squeezed into a square of that side
            (bicubic), with the mean and std of ImageNet. "timm:NAME": as that model's weights were evaluated.
            "transformers:NAME": the image processor of that name or folder.

    Raises:
        ValueError: timm does not know the name.
        ModuleNotFoundError: transformers is needed and not installed.
    """
    if isinstance(given, int):
        from timm.data.transforms_factory import create_transform

        size = (given, given)
        made = create_transform(size, crop_mode="squash", crop_pct=1.0, interpolation="bicubic")
        return cast(ImageTransform, made)
    if not isinstance(given, str):
        return given
    library, _, name = given.partition(":")
    return _timm_transform(name) if library == "timm" else _ProcessorTransform(name)


def check_tokenizer(given: Tokenizer | str | None) -> None:
    """Whether `as_tokenizer` will know what to do, as far as can be told without loading anything.

    Raises:
        ValueError: It will not.
    """
    is_name = isinstance(given, str) and given.startswith("transformers:")
    if not (given is None or is_name or callable(given)):
        raise ValueError(f"tokenizer must be {_TOKENIZERS}, got {given!r}")


def as_tokenizer(given: Tokenizer | str | None) -> Tokenizer | None:
    """What turns a list of texts into a network's input.

    Args:
        given: A function, taken as it is; "transformers:NAME", the tokenizer of that name or folder; None.

    Raises:
        ModuleNotFoundError: transformers is needed and not installed.
    """
    return _PretrainedTokenizer(given.partition(":")[2]) if isinstance(given, str) else given


def _timm_transform(name: str) -> ImageTransform:
    import timm

    try:
        config: Any = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the architecture is there, but not with these weights
        raise ValueError(f"timm has no {name!r}: {error}") from None
    if config is None:
        raise ValueError(f"timm has no model {name!r}; `timm.list_models()` lists what it has")
    data: Any = timm.data
    made: ImageTransform = data.create_transform(**data.resolve_data_config(pretrained_cfg=config.to_dict()))
    return made


class _ProcessorTransform:
    """An image processor of transformers, for one image."""

    def __init__(self, name: str) -> None:
        self.processor = _transformers("transform", name).AutoImageProcessor.from_pretrained(name)

    def __call__(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels


class _PretrainedTokenizer:
    """A tokenizer of transformers; all batches have one length, which suits compiled and static models."""

    def __init__(self, name: str) -> None:
        self.tokenizer = _transformers("tokenizer", name).AutoTokenizer.from_pretrained(name)
        self.length = min(self.tokenizer.model_max_length, _LONGEST)

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        encoded = self.tokenizer(
            texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return dict(encoded)


def _transformers(argument: str, name: str) -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{argument} "transformers:{name}" needs transformers, which is not installed: '
            'pip install "lightning-methods[text]"'
        ) from error
    return transformers

"""Captions of COCO with Karpathy's splits, on images or on features that a frozen network has made of them.

Settings are those of "Adaptively Clustering Neighbor Elements for Image-Text Generation" (arXiv 2301.01955) and of
its code, which follow ImageCaptioning.pytorch. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from lightning_methods.datamodules._annotations import Entry, locate_images, read_json
from lightning_methods.datamodules._base import LightningDataModule
from lightning_methods.datamodules._text_image import (
    Batch,
    Collate,
    ImageTransform,
    as_transform,
    check_transform,
    read_image,
)
from lightning_methods.datamodules._vocabulary import Vocabulary

_LAYOUT = (
    "Expected: dataset_coco.json of Karpathy's https://cs.stanford.edu/people/karpathy/deepimagesent/, and images as "
    "<image_dir>/{train2014,val2014}/*.jpg or features as <feature_dir>/<cocoid>.npz."
)
_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


class CaptionedFile(NamedTuple):
    """An image, by its file and its number, and its captions as lists of words."""

    name: str
    image_id: int
    captions: tuple[tuple[str, ...], ...]


class CaptionFiles(Dataset[dict[str, Any]]):
    """Images or features with captions.

    Args:
        images: What there is.
        read: From an image to its input.
        vocabulary: For training; None leaves the words out.
        captions_per_image: How many captions of an image make a sample in training.
        max_words: Words of a caption that are kept.
    """

    def __init__(
        self,
        images: Sequence[CaptionedFile],
        read: Callable[[CaptionedFile], dict[str, Any]],
        vocabulary: Vocabulary | None,
        captions_per_image: int,
        max_words: int,
    ) -> None:
        self.images, self.read, self.vocabulary = images, read, vocabulary
        self.captions_per_image, self.max_words = captions_per_image, max_words

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        sample = {**self.read(image), "image_id": image.image_id}
        if self.vocabulary is None:
            return sample | {"references": [" ".join(words) for words in image.captions]}
        rows = [caption_row(self.vocabulary, words, self.max_words) for words in self._drawn(image)]
        columns = (torch.tensor(column) for column in zip(*rows, strict=True))
        return sample | dict(zip(("input", "target", "mask"), columns, strict=True))

    def _drawn(self, image: CaptionedFile) -> list[tuple[str, ...]]:
        """A window of captions from a random place on; of an image with too few, draws with replacement."""
        there, wanted = len(image.captions), self.captions_per_image
        if there < wanted:
            return [image.captions[number] for number in torch.randint(there, (wanted,)).tolist()]
        first = int(torch.randint(there - wanted + 1, ()))
        return list(image.captions[first : first + wanted])


def caption_row(
    vocabulary: Vocabulary, words: Sequence[str], max_words: int
) -> tuple[list[int], list[int], list[bool]]:
    """What a decoder reads, what it is to say at each place, and which places count; each of `max_words` + 1.

    Example:
        >>> caption_row(Vocabulary([["a", "cat"]], min_count=1), ["a", "cat"], max_words=3)
        ([0, 1, 2, 0], [1, 2, 5, 0], [True, True, True, False])
    """
    numbers = vocabulary.encode(words[:max_words])
    rest = max_words - len(numbers)
    said = [*numbers, vocabulary.end]
    return (
        [vocabulary.start, *numbers, *[vocabulary.start] * rest],
        [*said, *[vocabulary.start] * rest],
        [True] * len(said) + [False] * rest,
    )


class CocoCaptionDataModule(LightningDataModule):
    """COCO captions, to train and evaluate image captioning.

    A training batch is {"features" (B, N, D) and "feature_mask" (B, N), or "image"; "input", "target", "mask",
    "image_id"}. Features are of grids or of regions: where images have different numbers of them, zeros follow, and the
    mask is True at features. "input", "target" and "mask" are (B, captions_per_image, max_words + 1): word numbers that
    a decoder reads (0 first), those it is to say (ending in `vocabulary.end`), and which of them count. Validation and
    testing give the images, "image_id" and "references", all captions of an image as a list of text. Training images
    are those of "train" and "restval".

    Args:
        annotation: `dataset_coco.json`.
        feature_dir: Folder of `<cocoid>.npz` with an array "feat" each, (N, D) or (H, W, D); rows of a grid follow each
            other.
        image_dir: Folder of the images, in place of `feature_dir`.
        transform: For images: a function, a size, "timm:NAME" or "transformers:NAME", as in `RetrievalDataModule`.
        min_count: How often a word must occur in the training captions to have a number of its own.
        max_words: Words of a caption that are kept.
        captions_per_image: Captions of an image in a training sample.
        batch_size: Images per batch and process.
        num_workers: Processes that read, per loader.

    Attributes:
        vocabulary: The words; there after `setup("fit")`.
        train_references: The training captions of each image as lists of words, for document frequencies.

    Raises:
        ValueError: An argument is none of what it can be. In `setup`: the annotation is damaged or lacks something (the
            message names file and entry). From a loader: a file cannot be read.
        FileNotFoundError: In `setup`: the annotation, images or features are missing; they are counted and the first is
            named.
    """

    def __init__(
        self,
        annotation: str | Path,
        feature_dir: str | Path | None = None,
        image_dir: str | Path | None = None,
        transform: int | ImageTransform | str = 384,
        min_count: int = 5,
        max_words: int = 16,
        captions_per_image: int = 5,
        batch_size: int = 40,
        num_workers: int = 8,
    ) -> None:
        super().__init__()
        if (feature_dir is None) == (image_dir is None):
            raise ValueError(f"give one of feature_dir and image_dir, got {feature_dir!r} and {image_dir!r}")
        numbers = {"min_count": min_count, "max_words": max_words, "captions_per_image": captions_per_image}
        for name, value, least in (*((n, v, 1) for n, v in numbers.items()), ("batch_size", batch_size, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        check_transform("transform", transform)
        self.annotation = Path(annotation).expanduser()
        self.feature_dir = None if feature_dir is None else Path(feature_dir).expanduser()
        self.image_dir = None if image_dir is None else Path(image_dir).expanduser()
        self.transform = transform
        self.min_count, self.max_words, self.captions_per_image = min_count, max_words, captions_per_image
        self.batch_size, self.num_workers = batch_size, num_workers
        self.vocabulary: Vocabulary
        self.train_references: list[list[tuple[str, ...]]] = []
        self.datasets: dict[str, CaptionFiles] = {}

    def setup(self, stage: str) -> None:
        """Reads the annotation, numbers the words, and looks for the files of the splits that the stage needs."""
        splits = _read_captions(self.annotation)
        self.train_references = [list(image.captions) for image in splits["train"]]
        captions = (words for image in self.train_references for words in image)
        self.vocabulary = Vocabulary(captions, self.min_count)
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",)):
            if not splits[split]:
                raise ValueError(f"{self.annotation}: split {split!r} has no images. {_LAYOUT}")
            vocabulary = self.vocabulary if split == "train" else None
            self.datasets[split] = CaptionFiles(
                splits[split], self._reader(splits[split]), vocabulary, self.captions_per_image, self.max_words
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches of images with captions as numbers."""
        return self._loader(self.datasets["train"], shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches of the validation images with their captions as text, in order."""
        return self._loader(self.datasets["val"])

    def test_dataloader(self) -> DataLoader[Batch]:
        """Batches of the test images with their captions as text, in order."""
        return self._loader(self.datasets["test"])

    def predict_dataloader(self) -> DataLoader[Batch]:
        """As `test_dataloader`."""
        return self.test_dataloader()

    def _reader(self, images: Sequence[CaptionedFile]) -> Callable[[CaptionedFile], dict[str, Any]]:
        if self.image_dir is not None:
            names = [image.name for image in images]
            return _ImageReader(
                locate_images(names, self.image_dir, self.annotation, _LAYOUT), as_transform(self.transform)
            )
        assert self.feature_dir is not None  # noqa: S101 - `__init__` has seen to it
        names = [f"{image.image_id}.npz" for image in images]
        return _FeatureReader(locate_images(names, self.feature_dir, self.annotation, _LAYOUT))

    def _loader(self, dataset: CaptionFiles, *, shuffle: bool = False) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            collate_fn=_Collate(None),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class _Collate(Collate):
    """Pads the features of images that have different numbers of them."""

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        batch = super().__call__([{key: sample[key] for key in sample if key != "features"} for sample in samples])
        if "features" in samples[0]:
            features = [sample["features"] for sample in samples]
            counts = torch.tensor([len(there) for there in features])
            batch["features"] = pad_sequence(features, batch_first=True)
            batch["feature_mask"] = torch.arange(batch["features"].shape[1]) < counts[:, None]
        return batch


class _ImageReader:
    def __init__(self, paths: dict[str, str], transform: ImageTransform) -> None:
        self.paths, self.transform = paths, transform

    def __call__(self, image: CaptionedFile) -> dict[str, Any]:
        return {"image": self.transform(read_image(self.paths[image.name]))}


class _FeatureReader:
    def __init__(self, paths: dict[str, str]) -> None:
        self.paths = paths

    def __call__(self, image: CaptionedFile) -> dict[str, Tensor]:
        path = self.paths[f"{image.image_id}.npz"]
        try:
            with np.load(path, allow_pickle=False) as file:
                features = file["feat"]
        except (OSError, ValueError, EOFError, BadZipFile, KeyError) as error:
            raise ValueError(f"features {path} cannot be read: {error}") from error
        if features.ndim not in (2, 3) or not np.issubdtype(features.dtype, np.floating):
            raise ValueError(
                f"features {path} must be floats of shape (N, D) or (H, W, D), found {features.dtype} {features.shape}"
            )
        return {"features": torch.from_numpy(features.reshape(-1, features.shape[-1])).float()}


def _read_captions(path: Path) -> dict[str, list[CaptionedFile]]:
    content = read_json(path, _LAYOUT)
    whole = Entry(path, "", content if isinstance(content, dict) else {})
    splits: dict[str, list[CaptionedFile]] = {split: [] for split in ("train", "val", "test")}
    for image in whole.items("images"):
        split = image.text("split")
        if split not in _SPLITS:
            raise image.error(f"'split' must be one of {', '.join(_SPLITS)}, found {split!r}")
        captions = tuple(_words(sentence) for sentence in image.items("sentences"))
        if not captions:
            raise image.error("'sentences' is empty")
        name = f"{image.text('filepath')}/{image.text('filename')}"
        splits[_SPLITS[split]].append(CaptionedFile(name, image.number("cocoid"), captions))
    return splits


def _words(sentence: Entry) -> tuple[str, ...]:
    words = sentence.content.get("tokens")
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise sentence.error("'tokens' must be a list of words that is not empty")
    return tuple(word.lower() for word in words)

"""What EqSim trains on and what image-text scorers are diagnosed with: retrieval captions, EqBen, Winoground, VALSE.

All of them read the files as published; nothing is downloaded. Layouts and settings are those of "Equivariant
Similarity for Vision-Language Foundation Models" (ICCV 2023, arXiv 2303.14465) and of its official code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_methods.datamodules._annotations import locate_images
from lightning_methods.datamodules._eqben_files import (
    EQBEN_LAYOUT,
    Pair,
    Quad,
    check_subsets,
    pairs_of,
    quads_of,
    read_eqben,
)
from lightning_methods.datamodules._karpathy import DATASETS, LAYOUTS, CaptionedDataset, CaptionedImage, read_karpathy
from lightning_methods.datamodules._text_image import (
    Batch,
    ImageTransform,
    SampleFiles,
    Samples,
    TextImageDataModule,
    Tokenizer,
    as_transform,
    check_transform,
)
from lightning_methods.datamodules._winoground_files import (
    VALSE_LAYOUT,
    WINOGROUND_LAYOUT,
    read_valse,
    read_winoground,
)

EqBenFormat: TypeAlias = Literal["auto", "flat", "quads"]


class _BenchmarkDataModule(TextImageDataModule):
    """One set of samples, never shuffled, for validation, testing and prediction alike; for training there is none."""

    def load_samples(self) -> Samples:
        """The samples, their images known to exist."""
        raise NotImplementedError

    @cached_property
    def dataset(self) -> SampleFiles:
        """What `load_samples` gave, loaded once, when first asked for."""
        return SampleFiles(self.load_samples(), as_transform(self.transform))

    def setup(self, stage: str) -> None:  # noqa: ARG002 - Lightning's signature
        """Reads the annotation and looks for the images, so that what is missing is reported before the first batch."""
        _ = self.dataset

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches in order."""
        return self._loader(self.dataset)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Batches in order."""
        return self._loader(self.dataset)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Batches in order."""
        return self._loader(self.dataset)


class EqBenDataModule(_BenchmarkDataModule):
    """EqBen: pairs of nearly identical images, each with its caption, in seven subsets.

    In format "quads" a batch is {"image0", "image1", "caption0", "caption1", "subset", "sample"}: two images and two
    captions give the four scores of a quadruple, with half of the decoding and encoding that four pairs take. In format
    "flat" it is {"image", "caption", "corner", "sample", "subset"}, one scored pair a sample, as the published
    annotation has them; without labels "corner" and "sample" are missing. "corner" is 2 · image + caption, that is 0 to
    3 for s00, s01, s10, s11; "subset" is a place in `subset_names`; captions are lists of text without a tokenizer.

    The annotation may be

    - the flat list `ann_json_finegrained_random.json`, with or without "private_info";
    - a list of quadruples with keys "image0" or "image_0", as are the 10 % subset and the mini set for multimodal LLMs;
    - one or more of the files of single subsets, in which lists stand within objects.

    Arrays (.npy) hold blue, green and red and are turned into RGB images. Where an annotated .png is missing, a .jpg of
    the same name is taken, and vice versa: the light version of the images goes with the same annotation.

    Args:
        root: Folder that holds one folder for each subset.
        annotation: JSON file, or several.
        transform: What the network is fed: a function of an RGB `PIL.Image`, whose tensors are stacked and whose other
            results are listed; an image size, for the whole image in a square of that side with ImageNet's mean and
            std; "timm:NAME" or "transformers:NAME", for what that model was evaluated with (NAME may be a folder for
            transformers).
        tokenizer: A function of a list of texts, "transformers:NAME", or None.
        subsets: Subsets to keep; None keeps all.
        format: "quads", "flat", or "auto" for that of the file.
        labels: Folder of `private_info.json` and `private_random_idx.json`, if the flat annotation has no labels.
        batch_size: Samples per batch and process.
        num_workers: Processes that decode images.

    Attributes:
        subset_names: The subsets kept, in the official order.

    Raises:
        ValueError: An argument is none of what it can be. In `setup`: an annotation is damaged or lacks something (the
            message names file and entry), or labels are needed. From a loader: an image cannot be decoded.
        FileNotFoundError: In `setup`: an annotation is missing, or images are; they are counted and the first is named.
        ModuleNotFoundError: transformers is needed and not installed.
    """

    def __init__(
        self,
        root: str | Path,
        annotation: str | Path | Sequence[str | Path],
        transform: int | ImageTransform | str,
        tokenizer: Tokenizer | str | None = None,
        subsets: Sequence[str] | None = None,
        format: EqBenFormat = "auto",  # noqa: A002 - the natural name, and nothing here formats
        labels: str | Path | None = None,
        batch_size: int = 64,
        num_workers: int = 8,
    ) -> None:
        super().__init__(root, transform, tokenizer, batch_size, num_workers)
        if format not in get_args(EqBenFormat):
            raise ValueError(f"format must be one of {', '.join(get_args(EqBenFormat))}, got {format!r}")
        self.subset_names = check_subsets(subsets)
        self.annotation = [Path(path).expanduser() for path in _listed(annotation)]
        self.labels = None if labels is None else Path(labels).expanduser()
        self.format = format

    @cached_property
    def entries(self) -> tuple[list[Quad] | list[Pair], Tensor]:
        """Samples in order, and of each the places of its scores in the annotation's order, (N, 4) or (N, 1).

        Places count the entries of the subsets that are kept; a quadruple in the annotation counts as four.
        """
        read = read_eqben(self.annotation, self.labels)
        kept = [entry for entry in read if entry.subset in self.subset_names]
        if not kept:
            raise ValueError(f"{self.annotation[0]} has no entries in the subsets {', '.join(self.subset_names)}")
        quads = [entry for entry in kept if isinstance(entry, Quad)]
        if quads and self.format != "flat":
            return quads, torch.arange(4 * len(quads)).view(-1, 4)
        pairs = pairs_of(quads) if quads else [entry for entry in kept if isinstance(entry, Pair)]
        if self.format != "quads":
            return pairs, torch.arange(len(pairs)).view(-1, 1)
        grouped, places = quads_of(pairs, self.annotation[0])
        return grouped, torch.tensor(places)

    def load_samples(self) -> Samples:
        """Columns of quadruples or pairs."""
        entries, _ = self.entries
        fields = Quad._fields if isinstance(entries[0], Quad) else Pair._fields
        columns = dict(zip(fields, map(list, zip(*entries, strict=True)), strict=True))
        images = {key: columns.pop(key) for key in fields if key.startswith("image")}
        texts = {key: columns.pop(key) for key in fields if key.startswith("caption")}
        numbers = columns | {"subset": [self.subset_names.index(name) for name in columns["subset"]]}
        if numbers["sample"][0] < 0:
            del numbers["sample"], numbers["corner"]
        return Samples(_located(images, self.root, self.annotation[0], EQBEN_LAYOUT), texts, numbers)


class WinogroundDataModule(_BenchmarkDataModule):
    """Winoground: 400 pairs of images with captions of the same words in another order.

    A batch is {"image0", "image1", "caption0", "caption1", "subset", "sample"}; "subset" is a place in `subset_names`,
    the tags Object, Relation and Both as far as they occur, and "sample" the example's id.

    Args:
        root: Folder of the images, `ex_<id>_img_{0,1}.png`.
        annotation: `examples.jsonl`.
        transform: As in `EqBenDataModule`.
        tokenizer: As in `EqBenDataModule`.
        batch_size: Samples per batch and process.
        num_workers: Processes that decode images.

    Raises:
        ValueError: As in `EqBenDataModule`.
        FileNotFoundError: As in `EqBenDataModule`.
        ModuleNotFoundError: transformers is needed and not installed.
    """

    def __init__(
        self,
        root: str | Path,
        annotation: str | Path,
        transform: int | ImageTransform | str,
        tokenizer: Tokenizer | str | None = None,
        batch_size: int = 64,
        num_workers: int = 8,
    ) -> None:
        super().__init__(root, transform, tokenizer, batch_size, num_workers)
        self.annotation = Path(annotation).expanduser()
        self.subset_names: tuple[str, ...] = ()

    def load_samples(self) -> Samples:
        """Columns of quadruples; also sets `subset_names`."""
        image0, image1, caption0, caption1, tags, numbers = zip(*read_winoground(self.annotation), strict=True)
        self.subset_names = tuple(sorted(set(tags)))
        images = {"image0": image0, "image1": image1}
        return Samples(
            _located(images, self.root, self.annotation, WINOGROUND_LAYOUT),
            {"caption0": caption0, "caption1": caption1},
            {"subset": [self.subset_names.index(tag) for tag in tags], "sample": numbers},
        )


class ValseDataModule(_BenchmarkDataModule):
    """VALSE: images with a caption and a foil, a caption that was made slightly wrong.

    A batch is {"image", "caption", "foil", "subset", "sample"}; "subset" is a place in `subset_names`, the linguistic
    phenomena as far as they occur, and "sample" the place among the items that are kept. Of VALSE's own files, those
    whose caption fewer than two of three annotators chose are left out. The list {image_0, caption_0, caption_1} of
    EqBen's authors is read too.

    Args:
        root: Folder of the images that this piece of VALSE uses; each piece takes those of another data set.
        annotation: The JSON file of the piece.
        transform: As in `EqBenDataModule`.
        tokenizer: As in `EqBenDataModule`.
        batch_size: Samples per batch and process.
        num_workers: Processes that decode images.

    Raises:
        ValueError: As in `EqBenDataModule`.
        FileNotFoundError: As in `EqBenDataModule`.
        ModuleNotFoundError: transformers is needed and not installed.
    """

    def __init__(
        self,
        root: str | Path,
        annotation: str | Path,
        transform: int | ImageTransform | str,
        tokenizer: Tokenizer | str | None = None,
        batch_size: int = 64,
        num_workers: int = 8,
    ) -> None:
        super().__init__(root, transform, tokenizer, batch_size, num_workers)
        self.annotation = Path(annotation).expanduser()
        self.subset_names: tuple[str, ...] = ()

    def load_samples(self) -> Samples:
        """Columns of images with caption and foil; also sets `subset_names`."""
        images, captions, foils, phenomena = zip(*read_valse(self.annotation), strict=True)
        self.subset_names = tuple(sorted(set(phenomena)))
        return Samples(
            _located({"image": images}, self.root, self.annotation, VALSE_LAYOUT),
            {"caption": captions, "foil": foils},
            {"subset": [self.subset_names.index(name) for name in phenomena], "sample": range(len(images))},
        )


class RetrievalDataModule(TextImageDataModule):
    """Flickr30K or COCO with Karpathy's splits, to train and evaluate image-text retrieval.

    In training every caption is a sample: {"image", "text", "image_id"}. Captions of an image that are equal count
    once. Two captions of one image may meet in a batch; "image_id" tells. Validation and testing have two loaders,
    {"image", "image_id"} with every image once, and {"text", "image_id", "text_id"} with every caption once.

    **By default the splits are what they are called.** EqSim's authors train on train and val, and choose their
    checkpoint on test; `official_splits=True` does that, and figures made with it are chosen on the reported set.

    Args:
        root: Folder that holds `flickr30k-images`, or `train2014` and `val2014`.
        annotation: `dataset_flickr30k.json` or `dataset_coco.json` of Karpathy's.
        dataset: "flickr30k" or "coco".
        transform: For evaluation, and for training too without `train_transform`; as in `EqBenDataModule`. The authors
            squeeze images into a square of side 288.
        tokenizer: As in `EqBenDataModule`.
        train_transform: For training; the authors add RandAugment(2, 7).
        official_splits: Train on train and val, validate on test.
        use_restval: Train on COCO's 30,504 "restval" images too; the authors do not.
        batch_size: Samples per batch and process; an incomplete last training batch is left out.
        num_workers: Processes that decode images, per loader.

    Raises:
        ValueError: An argument is none of what it can be. In `setup`: the annotation is damaged or lacks something,
            (the message names file and entry), or a split is empty. From a loader: an image cannot be decoded.
        FileNotFoundError: In `setup`: the annotation is missing, or images of the splits that the stage needs are; they
            are counted and the first is named.
        ModuleNotFoundError: transformers is needed and not installed.
    """

    def __init__(
        self,
        root: str | Path,
        annotation: str | Path,
        dataset: CaptionedDataset = "flickr30k",
        transform: int | ImageTransform | str = 288,
        tokenizer: Tokenizer | str | None = None,
        train_transform: int | ImageTransform | str | None = None,
        official_splits: bool = False,
        use_restval: bool = False,
        batch_size: int = 64,
        num_workers: int = 8,
    ) -> None:
        super().__init__(root, transform, tokenizer, batch_size, num_workers)
        if dataset not in DATASETS:
            raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}")
        if use_restval and dataset != "coco":
            raise ValueError(f"use_restval is for COCO; {dataset} has no such split")
        if train_transform is not None:
            check_transform("train_transform", train_transform)
        self.annotation = Path(annotation).expanduser()
        self.kind: CaptionedDataset = dataset
        self.train_transform = transform if train_transform is None else train_transform
        self.official_splits = official_splits
        self.use_restval = use_restval
        self.datasets: dict[str, list[SampleFiles]] = {}

    def setup(self, stage: str) -> None:
        """Reads the annotation and looks for the images of the splits that the stage needs."""
        splits = read_karpathy(self.annotation, self.kind)
        validation = "test" if self.official_splits else "val"
        if stage == "fit":
            restval = ["restval"] if self.use_restval else []
            names = ["train", *restval, *(["val"] if self.official_splits else [])]
            images = [image for name in names for image in splits[name]]
            self.datasets["train"] = [self._training(images, "train")]
        if stage in ("fit", "validate"):
            self.datasets["val"] = self._evaluation(splits[validation], validation)
        if stage in ("test", "predict"):
            self.datasets["test"] = self._evaluation(splits["test"], "test")

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches of captions with their images."""
        (dataset,) = self.datasets["train"]
        return self._loader(dataset, shuffle=True, drop_last=True)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """Batches of the validation images, and batches of their captions, both in order."""
        return [self._loader(dataset) for dataset in self.datasets["val"]]

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """Batches of the test images, and batches of their captions, both in order."""
        return [self._loader(dataset) for dataset in self.datasets["test"]]

    def predict_dataloader(self) -> list[DataLoader[Batch]]:
        """As `test_dataloader`."""
        return self.test_dataloader()

    def _training(self, images: Sequence[CaptionedImage], split: str) -> SampleFiles:
        texts, owners = self._captions(images, split)
        paths = self._paths([images[owner].name for owner in owners])
        numbers = {"image_id": [images[owner].image_id for owner in owners]}
        return SampleFiles(Samples(paths, {"text": texts}, numbers), as_transform(self.train_transform))

    def _evaluation(self, images: Sequence[CaptionedImage], split: str) -> list[SampleFiles]:
        texts, owners = self._captions(images, split)
        transform = as_transform(self.transform)
        ids = [image.image_id for image in images]
        of_texts = {"image_id": [ids[owner] for owner in owners], "text_id": range(len(texts))}
        return [
            SampleFiles(Samples(self._paths([image.name for image in images]), {}, {"image_id": ids}), transform),
            SampleFiles(Samples({}, {"text": texts}, of_texts), transform),
        ]

    def _captions(self, images: Sequence[CaptionedImage], split: str) -> tuple[list[str], list[int]]:
        pairs = [(text, owner) for owner, image in enumerate(images) for text in image.captions]
        if not pairs:
            raise ValueError(f"{self.annotation}: split {split!r} has no captions. {LAYOUTS[self.kind]}")
        texts, owners = zip(*pairs, strict=True)
        return list(texts), list(owners)

    def _paths(self, names: Sequence[str]) -> dict[str, list[str]]:
        return _located({"image": names}, self.root, self.annotation, LAYOUTS[self.kind])


def _listed(given: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [given] if isinstance(given, (str, Path)) else given


def _located(columns: Mapping[str, Sequence[str]], root: Path, annotation: Path, layout: str) -> dict[str, list[str]]:
    names_of_rows = (name for row in zip(*columns.values(), strict=True) for name in row)
    found = locate_images(names_of_rows, root, annotation, layout)
    return {key: [found[name] for name in names] for key, names in columns.items()}

"""Image sets with a shift between training and test on which ProReg was evaluated: BAR, NICO, PACS, DomainNet.

The authors read all of them from Arrow files of their own making, as `ArrowClassificationDataModule` does; the others
read the sets as they are published. Layouts that we could not look at are marked as such. Batches are
(image, label, group, index), and with precomputed prompt logits (image, label, group, index, prompt_logits).
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_methods.datamodules._image_files import (
    Transform,
    locate_images,
    parse_entry,
    read_list,
)
from lightning_methods.datamodules._prompt_images import (
    ArrowImages,
    PromptImageFiles,
    PromptImages,
    PromptImagesDataModule,
)
from lightning_methods.datamodules._tensors import rank_within_class

_HELD_OUT_SEED = 0
_LINE = "relative/path.jpg label"

_BAR_CLASSES = ("climbing", "diving", "fishing", "racing", "throwing", "vaulting")
_BAR_LAYOUT = "Expected layout: <root>/train/<class>_<n>.jpg and <root>/test/<class>_<n>.jpg, as in https://github.com/alinlab/BAR"


class BARDataModule(PromptImagesDataModule):
    """Biased Action Recognition: six actions, each in its usual place for training and elsewhere for testing.

    1,941 images for training and 654 for testing; the class is the file's name up to the last underscore. BAR has no
    validation split: a share of each class's training images is held out, the same ones every time. There is one group.

    Args:
        root: Folder that holds `train/*.jpg` and `test/*.jpg`.
        val_fraction: Share of each class's training images that is held out, in [0, 1).
        batch_size: Samples per batch and process.
        num_workers: Processes that decode images, per loader.
        prompt_logits: File made by `save_prompt_logits`: training batches then have `prompt_logits`, and training
            images are not augmented.

    Attributes:
        classes: The six names, in alphabetical order, which as the order of labels is our guess.

    Raises:
        ValueError: `val_fraction`, `batch_size` or `num_workers` is out of its range. In `setup`: a file of no known
            class, or prompt logits of another shape. From a loader: an image cannot be decoded.
        FileNotFoundError: In `setup`: a folder or its images are missing.
    """

    def __init__(
        self,
        root: str | Path,
        val_fraction: float = 0.1,
        batch_size: int = 64,
        num_workers: int = 8,
        prompt_logits: str | Path | None = None,
    ) -> None:
        super().__init__(root, batch_size, num_workers, len(_BAR_CLASSES), prompt_logits)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must lie in [0, 1), got {val_fraction}")
        self.val_fraction = val_fraction
        self.classes = list(_BAR_CLASSES)

    def dataset(self, split: str, transform: Transform) -> PromptImages:
        """The samples of "train", "val" or "test"."""
        samples = _bar_samples(self.root / ("test" if split == "test" else "train"))
        if split != "test":
            labels = torch.tensor([label for _, label, _ in samples])
            rank = rank_within_class(labels, torch.Generator().manual_seed(_HELD_OUT_SEED))
            held_out = rank < (self.val_fraction * labels.bincount()).round()[labels]
            samples = [
                sample for sample, out in zip(samples, held_out.tolist(), strict=True) if out == (split == "val")
            ]
        return PromptImageFiles(samples, transform)


def _bar_samples(folder: Path) -> list[tuple[str, int, int]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} is missing. {_BAR_LAYOUT}")
    paths = sorted(entry.path for entry in os.scandir(folder) if entry.name.lower().endswith((".jpg", ".jpeg", ".png")))
    if not paths:
        raise FileNotFoundError(f"folder {folder} holds no image. {_BAR_LAYOUT}")
    names = [Path(path).stem.rpartition("_")[0] for path in paths]
    # Its own statistics call the last class "pole vaulting".
    labels = {name: label for label, name in enumerate(_BAR_CLASSES)} | {"pole vaulting": 5}
    unknown = [path for path, name in zip(paths, names, strict=True) if name not in labels]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(paths)} images are of no known class; first: {unknown[0]}. {_BAR_LAYOUT}"
        )
    return [(path, labels[name], 0) for path, name in zip(paths, names, strict=True)]


_PACS_CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
_PACS_DOMAINS = ("photo", "art_painting", "cartoon", "sketch")
_PACS_LAYOUT = (
    "Expected layout: <root>/kfold/<domain>/<class>/*, and in the folder given as `lists` "
    '<domain>_{train,crossval,test}_kfold.txt with lines "<domain>/<class>/<image> label" and labels from 1'
)


class PACSDataModule(PromptImagesDataModule):
    """PACS: seven classes in photos, paintings, cartoons and sketches, one of which is kept for testing.

    Training images are those of the other three domains' `train` lists, validation images those of their `crossval`
    lists, test images those of the kept domain's `test` list. Reported is the mean over the four choices. The layout
    and the order of the classes are from memory.

    Args:
        root: Folder that holds `kfold/<domain>/<class>/*`.
        test_domain: The domain kept for testing: "photo", "art_painting", "cartoon" or "sketch".
        lists: Folder of `<domain>_{train,crossval,test}_kfold.txt`; None looks in `root`.
        batch_size: Samples per batch and process.
        num_workers: Processes that decode images, per loader.
        prompt_logits: File made by `save_prompt_logits`: training batches then have `prompt_logits`, and training
            images are not augmented.

    Attributes:
        classes: The seven names.
        domains: `domains[group]`, the same four for every choice.

    Raises:
        ValueError: `test_domain`, `batch_size` or `num_workers` is out of its range. In `setup`: lines without a label
            or with one out of range, or prompt logits of another shape. From a loader: an image cannot be decoded.
        FileNotFoundError: In `setup`: a list, or images that it names, are missing.
    """

    domains = _PACS_DOMAINS

    def __init__(
        self,
        root: str | Path,
        test_domain: str = "sketch",
        lists: str | Path | None = None,
        batch_size: int = 64,
        num_workers: int = 8,
        prompt_logits: str | Path | None = None,
    ) -> None:
        super().__init__(root, batch_size, num_workers, len(_PACS_CLASSES), prompt_logits)
        if test_domain not in _PACS_DOMAINS:
            raise ValueError(f"test_domain must be one of {', '.join(_PACS_DOMAINS)}, got {test_domain!r}")
        self.test_domain = test_domain
        self.lists = self.root if lists is None else Path(lists).expanduser()
        self.classes = list(_PACS_CLASSES)

    def dataset(self, split: str, transform: Transform) -> PromptImages:
        """The samples of "train", "val" or "test"."""
        kind = {"train": "train", "val": "crossval", "test": "test"}[split]
        samples = []
        for group, domain in enumerate(_PACS_DOMAINS):
            if (domain == self.test_domain) == (split == "test"):
                path = self.lists / f"{domain}_{kind}_kfold.txt"
                entries = read_list(path, lambda line: parse_entry(line, 7, first=1), _LINE, _PACS_LAYOUT)
                located = locate_images(entries, self.root / "kfold", path, _PACS_LAYOUT)
                samples += [(name, label, group) for name, label in located]
        return PromptImageFiles(samples, transform)


_DOMAINNET_LAYOUT = (
    "Expected layout: <root>/<domain>/<class>/*, and <root>/<domain>_{train,test}.txt with lines "
    '"<domain>/<class>/<image> label", as on http://ai.bu.edu/M3SDA'
)


class DomainNetDataModule(PromptImagesDataModule):
    """DomainNet: 345 classes, trained on one domain and tested on others.

    The defaults are those of the authors: sketches for training and, from that domain's `test` list, for validation,
    and the union of the `test` lists of clipart, paintings and photos for testing. Layout from memory.

    Args:
        root: Folder that holds `<domain>/<class>/*` and `<domain>_{train,test}.txt`.
        train_domain: The domain to train on.
        test_domains: The domains to test on.
        batch_size: Samples per batch and process.
        num_workers: Processes that decode images, per loader.
        num_classes: Labels are 0 … num_classes − 1; 345 but for subsets.
        prompt_logits: File made by `save_prompt_logits`: training batches then have `prompt_logits`, and training
            images are not augmented.

    Attributes:
        classes: After `setup`, the classes' names, taken from the folders that the lists name.
        domains: `domains[group]`: the training domain, then those for testing.

    Raises:
        ValueError: `batch_size`, `num_workers` or `num_classes` is out of its range. In `setup`: lines without a label
            or with one out of range, a label of two folders, or prompt logits of another shape. From a loader: an image
            cannot be decoded.
        FileNotFoundError: In `setup`: a list, or images that it names, are missing.
    """

    def __init__(
        self,
        root: str | Path,
        train_domain: str = "sketch",
        test_domains: Sequence[str] = ("clipart", "painting", "real"),
        batch_size: int = 64,
        num_workers: int = 8,
        num_classes: int = 345,
        prompt_logits: str | Path | None = None,
    ) -> None:
        super().__init__(root, batch_size, num_workers, num_classes, prompt_logits)
        self.domains = (train_domain, *test_domains)

    def dataset(self, split: str, transform: Transform) -> PromptImages:
        """The samples of "train", "val" or "test"."""
        samples = []
        groups = range(1, len(self.domains)) if split == "test" else (0,)
        for group in groups:
            path = self.root / f"{self.domains[group]}_{'train' if split == 'train' else 'test'}.txt"
            entries = read_list(path, lambda line: parse_entry(line, self.num_classes), _LINE, _DOMAINNET_LAYOUT)
            self.classes = _class_names(self.classes, entries, path, depth=1)
            located = locate_images(entries, self.root, path, _DOMAINNET_LAYOUT)
            samples += [(name, label, group) for name, label in located]
        return PromptImageFiles(samples, transform)


_NICO_CLASSES = {"Animal": 10, "Vehicle": 9}


class NICODataModule(PromptImagesDataModule):
    """NICO: animals or vehicles, each class in several contexts; some contexts are kept for testing.

    How the authors split the contexts is not known to us, so lists of yours say it: text files with lines
    "class/context/image.jpg label group", paths relative to `root/subset`. Layout from memory.

    Args:
        root: Folder that holds `{Animal,Vehicle}/<class>/<context>/*`.
        subset: "Animal" (10 classes) or "Vehicle" (9).
        train_list: List of the training images.
        val_list: List of the validation images.
        test_list: List of the test images.
        batch_size: Samples per batch and process.
        num_workers: Processes that decode images, per loader.
        prompt_logits: File made by `save_prompt_logits`: training batches then have `prompt_logits`, and training
            images are not augmented.

    Attributes:
        classes: After `setup`, the classes' names, taken from the folders that the lists name.

    Raises:
        ValueError: `subset`, `batch_size` or `num_workers` is out of its range. In `setup`: lines without label and
            group, or with a label out of range, a label of two folders, or prompt logits of another shape. From a
            loader: an image cannot be decoded.
        FileNotFoundError: In `setup`: a list, or images that it names, are missing.
    """

    def __init__(
        self,
        root: str | Path,
        subset: str,
        train_list: str | Path,
        val_list: str | Path,
        test_list: str | Path,
        batch_size: int = 64,
        num_workers: int = 8,
        prompt_logits: str | Path | None = None,
    ) -> None:
        if subset not in _NICO_CLASSES:
            raise ValueError(f"subset must be one of {', '.join(_NICO_CLASSES)}, got {subset!r}")
        super().__init__(root, batch_size, num_workers, _NICO_CLASSES[subset], prompt_logits)
        self.subset = subset
        lists = {"train": train_list, "val": val_list, "test": test_list}
        self.lists = {split: Path(path).expanduser() for split, path in lists.items()}

    def dataset(self, split: str, transform: Transform) -> PromptImages:
        """The samples of "train", "val" or "test"."""
        path, folder = self.lists[split], self.root / self.subset
        layout = f"Expected layout: {folder}/<class>/<context>/*, and lists of such images with labels and groups"
        lines = read_list(path, self._parse, "class/context/image.jpg label group", layout)
        entries = [(name, label) for name, label, _ in lines]
        self.classes = _class_names(self.classes, entries, path, depth=0)
        located = locate_images(entries, folder, path, layout)
        groups = [group for _, _, group in lines]
        return PromptImageFiles([(*entry, group) for entry, group in zip(located, groups, strict=True)], transform)

    def _parse(self, line: str) -> tuple[str, int, int]:
        rest, *group = line.rsplit(maxsplit=1)
        if not group or not group[0].isdecimal():
            raise ValueError(f"{line!r}: no group")
        return (*parse_entry(rest, self.num_classes), int(group[0]))


def _class_names(known: Sequence[str], entries: Sequence[tuple[str, int]], path: Path, depth: int) -> list[str]:
    """Names of the classes, which are the folders at `depth` in the images' paths; "" where no list has any."""
    names = {label: name for label, name in enumerate(known) if name}
    for image, label in entries:
        folder = image.split("/")[depth]
        if names.setdefault(label, folder) != folder:
            raise ValueError(f"{path}: label {label} is that of {names[label]!r} and of {folder!r}; first: {image}")
    return [names.get(label, "") for label in range(max(names) + 1)]


class ArrowClassificationDataModule(PromptImagesDataModule):
    """Classification out of Arrow files, in the form in which the authors of ProReg keep every set.

    Each file, in Arrow's IPC file format, has the columns `image` (an encoded image) and `label` (an integer). Those
    of a split follow one another, and the group of a sample is the number of its file. The authors' names: `bar_train`,
    `bar_val`; `nico_train`, `nico_val`, `nico_test`; PACS `<domain>_{train,crossval,test}`; DomainNet `sketch_train`,
    `sketch_test`, and `clipart_test`, `painting_test`, `real_test` to test on. Needs the extra `arrow`.

    Args:
        root: Folder of the files.
        train: Names of the training files, without `.arrow`.
        val: Names of the validation files.
        test: Names of the test files.
        num_classes: Labels are 0 … num_classes − 1.
        class_names: Text file with a name a line, in the order of the labels; None if they are not needed.
        batch_size: Samples per batch and process.
        num_workers: Processes that decode images, per loader.
        prompt_logits: File made by `save_prompt_logits`: training batches then have `prompt_logits`, and training
            images are not augmented.

    Attributes:
        classes: The names in `class_names`.

    Raises:
        ValueError: `batch_size`, `num_workers` or `num_classes` is out of its range. In `setup`: a file in another
            format, with other columns or with labels out of range, other than `num_classes` names, or prompt logits of
            another shape. From a loader: an image cannot be decoded.
        FileNotFoundError: In `setup`: a file is missing.
        ModuleNotFoundError: In `setup`: pyarrow is not installed.
    """

    def __init__(
        self,
        root: str | Path,
        train: Sequence[str],
        val: Sequence[str],
        test: Sequence[str],
        num_classes: int,
        class_names: str | Path | None = None,
        batch_size: int = 64,
        num_workers: int = 8,
        prompt_logits: str | Path | None = None,
    ) -> None:
        super().__init__(root, batch_size, num_workers, num_classes, prompt_logits)
        self.files = {"train": list(train), "val": list(val), "test": list(test)}
        self.class_names = None if class_names is None else Path(class_names).expanduser()

    def setup(self, stage: str) -> None:
        """Opens the files that the stage needs."""
        if self.class_names is not None:
            self.classes = read_list(self.class_names, str.strip, "class name", "It names the classes, one a line")
            if len(self.classes) != self.num_classes:
                found = f"{len(self.classes)} in {self.class_names}"
                raise ValueError(f"class_names must be {self.num_classes}, one for each class, got {found}")
        super().setup(stage)

    def dataset(self, split: str, transform: Transform) -> PromptImages:
        """The samples of "train", "val" or "test"."""
        return ArrowImages([self.root / f"{name}.arrow" for name in self.files[split]], self.num_classes, transform)

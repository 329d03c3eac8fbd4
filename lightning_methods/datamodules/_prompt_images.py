"""Images for models that are prompted: CLIP's transforms, groups, and prompt logits by the number of the sample."""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_methods.datamodules._image_files import ImageFilesDataModule, Transform, read_rgb


class PromptSample(NamedTuple):
    """One image, or a batch of them.

    `index` is its number in its split. `batch.0` and `batch.image` are the same, and `image, label, *_ = batch` works.
    """

    image: Any
    label: Any
    group: Any
    index: Any


class PromptSampleWithLogits(NamedTuple):
    """The same with the logits (K,) that the prompts give this image."""

    image: Any
    label: Any
    group: Any
    index: Any
    prompt_logits: Any


def clip_transform() -> Transform:
    """CLIP's own: shorter side to 224, bicubic, centre crop, and its mean and std."""
    return cast(
        Transform,
        create_transform(
            224, interpolation="bicubic", mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD, crop_pct=1.0, is_training=False
        ),
    )


class AugmentedClipTransform:
    """RandAugment with two operations at magnitude 9 of 30, then `clip_transform`.

    The list of operations is timm's, which lacks the cut-out of the one that the authors use.
    """

    def __init__(self) -> None:
        # timm counts magnitudes to 10, and applies each operation by half a chance unless told to.
        self.augment = rand_augment_transform("rand-m3-n2-p1", {})
        self.prepare = clip_transform()

    def __call__(self, image: Image.Image) -> Tensor:
        """A tensor (3, 224, 224) of an RGB image."""
        return self.prepare(self.augment(image))


class PromptImages(Dataset[Any]):
    """Samples with a label and a group; subclasses say where an image comes from.

    Args:
        labels: Class of each sample.
        groups: Group of each sample, such as its domain.
        transform: From an RGB image to what the network is fed.
        prompt_logits: (N, K), added to the samples by their number.
    """

    def __init__(
        self, labels: Sequence[int], groups: Sequence[int], transform: Transform, prompt_logits: Tensor | None = None
    ) -> None:
        self.labels = labels
        self.groups = groups
        self.transform = transform
        self.prompt_logits = prompt_logits

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        sample = PromptSample(self.transform(self.image(index)), self.labels[index], self.groups[index], index)
        if self.prompt_logits is None:
            return sample
        return PromptSampleWithLogits(*sample, self.prompt_logits[index])

    def image(self, index: int) -> Image.Image:
        """The image of a sample, RGB."""
        raise NotImplementedError


class PromptImageFiles(PromptImages):
    """Images read from disk when they are asked for; `samples` holds (path, label, group) of each."""

    def __init__(
        self, samples: Sequence[tuple[str, int, int]], transform: Transform, prompt_logits: Tensor | None = None
    ) -> None:
        labels, groups = [label for _, label, _ in samples], [group for _, _, group in samples]
        super().__init__(labels, groups, transform, prompt_logits)
        self.paths = [path for path, _, _ in samples]

    def image(self, index: int) -> Image.Image:
        """The image of a sample, RGB."""
        return read_rgb(self.paths[index])


class ArrowImages(PromptImages):
    """Images out of Arrow files, one after the other; the group of a sample is the number of its file.

    Args:
        paths: Files in Arrow's IPC file format with the columns `image` (an encoded image) and `label`.
        num_classes: Labels are 0 … num_classes − 1.
        transform: From an RGB image to what the network is fed.
        prompt_logits: (N, K), added to the samples by their number.

    Raises:
        FileNotFoundError: A file is missing.
        ModuleNotFoundError: pyarrow is not installed.
        ValueError: A file is in another format, has other columns, or labels that are out of range.
    """

    def __init__(
        self, paths: Sequence[Path], num_classes: int, transform: Transform, prompt_logits: Tensor | None = None
    ) -> None:
        self.paths = list(paths)
        of_files = [table["label"].to_pylist() for table in self.tables]
        for path, labels in zip(self.paths, of_files, strict=True):
            if outside := [label for label in labels if not 0 <= label < num_classes]:
                raise ValueError(f"{path}: the labels must lie in 0 … {num_classes - 1}, got {outside[0]}")
        groups = [number for number, labels in enumerate(of_files) for _ in labels]
        super().__init__(list(chain.from_iterable(of_files)), groups, transform, prompt_logits)
        self.starts = [0, *accumulate(map(len, of_files))]

    @cached_property
    def tables(self) -> list[Any]:
        """The files, mapped into memory when this process first asks for them."""
        return [_read_arrow(path) for path in self.paths]

    def image(self, index: int) -> Image.Image:
        """The image of a sample, RGB."""
        number = self.groups[index]
        row = index - self.starts[number]
        return read_rgb(f"{row} of {self.paths[number]}", self.tables[number]["image"][row].as_py())

    def __getstate__(self) -> dict[str, Any]:
        # A pickled table is a copy of its whole file; a worker maps the file itself.
        return {name: value for name, value in vars(self).items() if name != "tables"}


def _read_arrow(path: Path) -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Arrow files are read with pyarrow, which is not installed: pip install "lightning-methods[arrow]"'
        ) from error
    if not path.is_file():
        raise FileNotFoundError(f"file {path} is missing")
    try:
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not in Arrow's IPC file format: {error}") from error
    if missing := {"image", "label"} - set(table.column_names):
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}; it has {', '.join(table.column_names)}")
    return table


class PromptImagesDataModule(ImageFilesDataModule):
    """Loaders over `PromptImages`; subclasses give the datasets in `dataset`.

    Training images are augmented as in `AugmentedClipTransform`, the others prepared as in `clip_transform`. With
    `prompt_logits` training images are not augmented either: the logits must be of what the model sees.

    Args:
        root: Folder of the data.
        batch_size: Samples per batch and process.
        num_workers: Processes that decode images, per loader.
        num_classes: K.
        prompt_logits: File made by `save_prompt_logits`: training batches then have `prompt_logits`.

    Attributes:
        classes: After `setup`, the classes' names, where the data has them: `classes[label]`.

    Raises:
        ValueError: `batch_size` or `num_classes` is below 1, or `num_workers` below 0. In `setup`: the prompt logits
            are of another number of samples or classes. From a loader: an image cannot be decoded.
        FileNotFoundError: In `setup`: files are missing.
    """

    def __init__(
        self, root: str | Path, batch_size: int, num_workers: int, num_classes: int, prompt_logits: str | Path | None
    ) -> None:
        super().__init__(root, batch_size, num_workers, num_classes)
        self.prompt_logits = None if prompt_logits is None else Path(prompt_logits).expanduser()
        self.classes: list[str] = []

    def dataset(self, split: str, transform: Transform) -> PromptImages:
        """The samples of "train", "val" or "test"."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Finds the samples that the stage needs."""
        for split in ("train", "val") if stage == "fit" else ("val",) if stage == "validate" else ("test",):
            augmented = split == "train" and self.prompt_logits is None
            self.datasets[split] = self.dataset(split, AugmentedClipTransform() if augmented else clip_transform())
        if stage == "fit" and self.prompt_logits is not None:
            train = self.datasets["train"]
            assert isinstance(train, PromptImages)  # noqa: S101
            train.prompt_logits = self._read_prompt_logits(self.prompt_logits, len(train))

    def save_prompt_logits(
        self, classifier: Callable[[Tensor], Tensor], path: str | Path, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Asks a zero-shot classifier once for all training images, so that no step has to.

        Args:
            classifier: Gives logits (B, K) for images (B, 3, 224, 224), in eval mode and on the device.
            path: File to write; give it to the datamodule as `prompt_logits`.
            device: Where the images are put.

        Returns:
            What was written: (N, K), on the CPU, in the order of the samples' `index`.
        """
        images = self.dataset("train", clip_transform())
        loader = DataLoader(images, batch_size=self.batch_size, num_workers=self.num_workers)
        with torch.no_grad():
            logits = torch.cat([classifier(batch.image.to(device)).cpu() for batch in loader])
        torch.save(logits, path)
        return logits

    def _read_prompt_logits(self, path: Path, count: int) -> Tensor:
        if not path.is_file():
            raise FileNotFoundError(f"file {path} is missing; {type(self).__name__}.save_prompt_logits writes it")
        logits: Tensor = torch.load(path, map_location="cpu", weights_only=True)
        expected = (count, self.num_classes)
        if logits.shape != expected:
            raise ValueError(f"{path}: the prompt logits must have shape {expected}, got {tuple(logits.shape)}")
        return logits

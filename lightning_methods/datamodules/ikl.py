"""The image benchmarks on which IKL and GKL were distilled: CIFAR-100, ImageNet and ImageNet-LT.

Settings are those of "Decoupled Kullback-Leibler Divergence Loss" (NeurIPS 2024, arXiv 2305.13948) and of
its official code.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from kornia.augmentation import RandomCrop, RandomHorizontalFlip
from kornia.enhance import Normalize
from torch import Tensor, nn

from lightning_methods.datamodules._base import InMemoryDataModule
from lightning_methods.datamodules._cifar import NUM_CLASSES, read_class_names, read_split
from lightning_methods.datamodules._image_files import (
    ImageFiles,
    ImageFilesDataModule,
    eval_transform,
    locate_images,
    read_image_list,
    scan_class_folders,
    train_transform,
)
from lightning_methods.datamodules._tensors import rank_within_class

_CIFAR100_MEAN = (0.5071, 0.4867, 0.4408)
_CIFAR100_STD = (0.2675, 0.2565, 0.2761)
_HELD_OUT_SEED = 0


class CIFAR100DistillDataModule(InMemoryDataModule):
    """CIFAR-100 as distillation papers use it: crop with padding 4 and flip, batches of 64.

    Images stay in memory as uint8. Scaling to [0, 1], augmentation (training only) and normalisation happen a
    batch at a time on the device that trains, in `on_after_batch_transfer`. In a loop without Lightning use
    `datamodule.prepare(images, augment=True)`.

    CIFAR-100 has no validation split. **By default validation batches are the test images**, which is how
    the published numbers came about (best test epoch): a checkpoint chosen by them is chosen on the test set.
    Hold images out with `val_per_class` to choose honestly; 50 makes 45,000 / 5,000.

    The order of the images is fixed by `seed`; the augmentation draws from torch's global generator.

    Args:
        root: Folder that holds `cifar-100-python/{train,test,meta}`.
        batch_size: Samples per batch and process; the last training batch may be smaller.
        val_per_class: Images of each class moved from training to validation, the same for every `seed`.
        with_index: Training samples are (image, target, index) rather than (image, target); index is the
            place of the image in the file `train`. Validation and test samples never carry it, as in the
            official loaders.
        seed: Seed of the training order.

    Attributes:
        class_names: The 100 names, in label order.
        augment: The training augmentation, a module from (B, 3, 32, 32) in [0, 1] to the same.
        normalize: Channel-wise normalisation, a module.

    Raises:
        ValueError: `batch_size` is below 1, or `val_per_class` negative. In `setup`: a file is damaged, or
            `val_per_class` leaves a class without training images.
        FileNotFoundError: In `setup`: a file is missing.
    """

    num_classes = NUM_CLASSES

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 64,
        val_per_class: int = 0,
        with_index: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        if val_per_class < 0:
            raise ValueError(f"val_per_class must not be negative, got {val_per_class}")
        self.root = Path(root).expanduser()
        self.val_per_class = val_per_class
        self.with_index = with_index
        self.augment = nn.Sequential(RandomCrop((32, 32), padding=4), RandomHorizontalFlip())
        self.normalize = Normalize(torch.tensor(_CIFAR100_MEAN), torch.tensor(_CIFAR100_STD))

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes, in label order."""
        return read_class_names(self.root)

    def load_splits(self) -> dict[str, tuple[Tensor, ...]]:
        """Images (N, 3, 32, 32) uint8 and targets (N,); the training split has its index (N,) if asked for."""
        images, targets = read_split(self.root, "train")
        test = read_split(self.root, "test")
        held_out = self._held_out(targets)
        train: tuple[Tensor, ...] = (images[~held_out], targets[~held_out])
        if self.with_index:
            train = (*train, torch.nonzero(~held_out).flatten())
        val = (images[held_out], targets[held_out]) if self.val_per_class else test
        return {"train": train, "val": val, "test": test}

    def _held_out(self, targets: Tensor) -> Tensor:
        rarest = int(targets.bincount(minlength=NUM_CLASSES).min())
        if self.val_per_class > 0 and self.val_per_class >= rarest:
            raise ValueError(
                f"val_per_class must be below {rarest}, the images of the rarest class in {self.root}, "
                f"so that every class keeps some to train on; got {self.val_per_class}"
            )
        generator = torch.Generator().manual_seed(_HELD_OUT_SEED)
        return rank_within_class(targets, generator) < self.val_per_class

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ARG002
        """Once Lightning has moved a batch to its device: makes network inputs of the uint8 images."""
        images, *rest = batch
        trainer = self.trainer
        prepared = (self.prepare(images, augment=trainer is not None and trainer.training), *rest)
        # Lightning casts inputs for 16-true and 64-true before the transfer, when the images still are uint8.
        return prepared if trainer is None else trainer.precision_plugin.convert_input(prepared)

    def prepare(self, images: Tensor, *, augment: bool) -> Tensor:
        """Scales, augments and normalises.

        Args:
            images: uint8, (B, 3, 32, 32).
            augment: Whether to crop and flip at random.

        Returns:
            float32, same shape, on the same device.
        """
        scaled = images.float() / 255
        if augment:
            scaled = self.augment(scaled)
        normalized: Tensor = self.normalize.to(images.device)(scaled)
        return normalized


class ImageNetDataModule(ImageFilesDataModule):
    """ImageNet-1k (ILSVRC 2012) in its usual folders.

    Training images are cut at random (8-100 % of the area, aspect ratio 3/4-4/3), resized to 224 and flipped
    at random; evaluation resizes the shorter side to 256 and takes the centre 224. Both are normalised with
    the usual mean and std, which torchvision's V1 teachers expect. The label of a class is its place among the
    sorted wnids.

    The labels of ImageNet's test set are not public; as in the literature, test batches are the validation
    images, and a checkpoint chosen by them is chosen on the reported set.

    Args:
        root: Folder that holds `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`; `val` is enough for evaluation.
        batch_size: Samples per batch and process. The distillation runs use 512 in all, on 8 GPUs.
        num_workers: Processes that decode images, per loader.
        num_classes: Number of class folders; change it for subsets such as ImageNet-100.

    Attributes:
        classes: After `setup`, the sorted wnids: `classes[label]`.

    Raises:
        ValueError: `batch_size` or `num_classes` is below 1, or `num_workers` below 0.
            In `setup`: a wrong number of classes, or other classes in `train` than in `val`. From a loader:
            an image cannot be decoded.
        FileNotFoundError: In `setup`: a folder or its images are missing.
    """

    def __init__(self, root: str | Path, batch_size: int = 64, num_workers: int = 8, num_classes: int = 1000) -> None:
        super().__init__(root, batch_size, num_workers, num_classes)
        self.classes: list[str] = []

    def setup(self, stage: str) -> None:
        """Lists the images: those of `val`, and for fitting those of `train`."""
        self.classes, samples = scan_class_folders(self.root / "val", self.num_classes)
        self.datasets["val"] = self.datasets["test"] = ImageFiles(samples, eval_transform())
        if stage != "fit":
            return
        classes, samples = scan_class_folders(self.root / "train", self.num_classes)
        if classes != self.classes:
            other = sorted(set(classes) ^ set(self.classes))
            raise ValueError(
                f"{self.root / 'train'} and {self.root / 'val'} must hold the same class folders; "
                f"{len(other)} are in one of them only; first: {other[0]}"
            )
        self.datasets["train"] = ImageFiles(samples, train_transform())


class ImageNetLTDataModule(ImageFilesDataModule):
    """ImageNet-LT: a long-tailed selection of ImageNet's training images, 5 to 1,280 per class.

    The lists name images relative to the ImageNet folder, one "relative/path.JPEG label" per line: about
    116,000 to train on, 20,000 for validation, and the 50,000 validation images of ImageNet for testing.
    Transforms are those of `ImageNetDataModule`; an incomplete last training batch is dropped. The official
    code evaluates on the test list after every epoch; here validation batches come from the validation list.

    Args:
        root: The ImageNet folder, which holds `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`.
        lists: Folder of `ImageNet_LT_{train,val,test}.txt`; None looks in `root`.
        batch_size: Samples per batch and process; 128 in all in the distillation runs.
        num_workers: Processes that decode images, per loader.
        num_classes: Labels are 0 … num_classes - 1.

    Raises:
        ValueError: `batch_size` or `num_classes` is below 1, or `num_workers` below 0.
            In `setup`: lines without a label or with one out of range. From a loader: an image cannot be
            decoded.
        FileNotFoundError: In `setup`: a list, or images that it names, are missing.
    """

    drop_last = True

    def __init__(
        self,
        root: str | Path,
        lists: str | Path | None = None,
        batch_size: int = 128,
        num_workers: int = 8,
        num_classes: int = 1000,
    ) -> None:
        super().__init__(root, batch_size, num_workers, num_classes)
        self.lists = self.root if lists is None else Path(lists).expanduser()

    @cached_property
    def class_counts(self) -> Tensor:
        """Training images of each class, (num_classes,) int64; read from the list, before `setup` too."""
        labels = [label for _, label in read_image_list(self._list("train"), self.num_classes)]
        return torch.tensor(labels).bincount(minlength=self.num_classes)

    def setup(self, stage: str) -> None:
        """Reads the lists that the stage needs and checks that their images exist."""
        for split in ("train", "val") if stage == "fit" else ("val",) if stage == "validate" else ("test",):
            entries = read_image_list(self._list(split), self.num_classes)
            samples = locate_images(entries, self.root, self._list(split))
            self.datasets[split] = ImageFiles(samples, train_transform() if split == "train" else eval_transform())

    def _list(self, split: str) -> Path:
        return self.lists / f"ImageNet_LT_{split}.txt"

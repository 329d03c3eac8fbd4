"""What the datamodules share: which Lightning they extend, and splits held in memory."""

from functools import cached_property
from typing import ClassVar

from torch import Tensor

from lightning_methods.attach._lightning import LightningDataModule as LightningDataModule
from lightning_methods.datamodules._tensors import TensorLoader


class InMemoryDataModule(LightningDataModule):
    """Three splits, "train", "val" and "test", as tensors; training order and draws fixed by a seed.

    Subclasses give the tensors in `load_splits`. The tensors are also there without a Trainer:
    `datamodule.splits["train"]`.

    Args:
        batch_size: Samples per batch and process, at least 1.
        seed: Seed of the training order.

    Raises:
        ValueError: `batch_size` is below 1.
    """

    num_classes: int
    loader: ClassVar[type[TensorLoader]] = TensorLoader

    def __init__(self, batch_size: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.seed = seed

    def load_splits(self) -> dict[str, tuple[Tensor, ...]]:
        """Tensors of "train", "val" and "test"; those of one split agree in their first axis."""
        raise NotImplementedError

    @cached_property
    def splits(self) -> dict[str, tuple[Tensor, ...]]:
        """What `load_splits` gave, loaded once, when first asked for."""
        return self.load_splits()

    def setup(self, stage: str) -> None:  # noqa: ARG002 - Lightning's signature
        """Loads the splits here, so that bad files are reported before training starts."""
        _ = self.splits

    def train_dataloader(self) -> TensorLoader:
        """Shuffled batches of the training split."""
        return self._loader("train")

    def val_dataloader(self) -> TensorLoader:
        """Batches of the validation split, in order."""
        return self._loader("val")

    def test_dataloader(self) -> TensorLoader:
        """Batches of the test split, in order."""
        return self._loader("test")

    def _loader(self, split: str) -> TensorLoader:
        trainer = self.trainer
        return self.loader(
            *self.splits[split],
            batch_size=self.batch_size,
            shuffle=split == "train",
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )

    def __str__(self) -> str:
        # Lightning's own version asks each loader for its `dataset`.
        if "splits" not in self.__dict__:
            return f"{type(self).__name__}(not loaded yet)"
        sizes = ", ".join(f"{name}: {len(tensors[0])}" for name, tensors in self.splits.items())
        return f"{type(self).__name__}({sizes})"

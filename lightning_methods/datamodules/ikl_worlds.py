"""Small worlds for distillation on a laptop: scarce labels on real digits, and a synthetic class hierarchy.

Both live in memory and are the same for everyone who gives the same numbers: splits and worlds come from
generators of their own and leave torch's global generator alone.
"""

import torch
from torch import Tensor

from lightning_methods.datamodules._base import InMemoryDataModule
from lightning_methods.datamodules._tensors import rank_within_class

_DIGITS_SPLIT_SEED = 0


class DigitsDataModule(InMemoryDataModule):
    """Handwritten digits, the 1,797 8 × 8 scans that come with scikit-learn, with few labels to train on.

    The split is stratified by class and the same for every `seed`: 40 % test, 20 % validation and 40 % to draw
    training samples from. Samples are (image, target): image (1, 8, 8), float32 in [0, 1].

    scikit-learn's copy does not say who wrote which digit, so the same hand may be in several splits.

    Args:
        labels_per_class: Training samples of each class, drawn by `seed`; None takes all there are.
        batch_size: Samples per batch and process.
        seed: Seed of the draw and of the training order.

    Raises:
        ValueError: `labels_per_class` is below 1 or more than the rarest class has; `batch_size` is below 1.
        ModuleNotFoundError: scikit-learn is not installed.
    """

    num_classes = 10

    def __init__(self, labels_per_class: int | None = None, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__(batch_size, seed)
        if labels_per_class is not None and labels_per_class < 1:
            raise ValueError(f"labels_per_class must be at least 1 or None, got {labels_per_class}")
        self.labels_per_class = labels_per_class

    def load_splits(self) -> dict[str, tuple[Tensor, ...]]:
        """Images (N, 1, 8, 8) and targets (N,) of the three splits."""
        images, targets = _read_digits()
        rank = rank_within_class(targets, torch.Generator().manual_seed(_DIGITS_SPLIT_SEED))
        fifth = 5 * rank // targets.bincount()[targets]  # 0 … 4, each a fifth of every class
        test, val, train = fifth < 2, fifth == 2, fifth > 2
        train_images, train_targets = self._labelled(images[train], targets[train])
        return {
            "train": (train_images, train_targets),
            "val": (images[val], targets[val]),
            "test": (images[test], targets[test]),
        }

    def _labelled(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.labels_per_class is None:
            return images, targets
        rarest = int(targets.bincount().min())
        if self.labels_per_class > rarest:
            raise ValueError(
                f"labels_per_class must be at most {rarest}, the training samples of the rarest digit; "
                f"got {self.labels_per_class}"
            )
        rank = rank_within_class(targets, torch.Generator().manual_seed(self.seed))
        chosen = rank < self.labels_per_class
        return images[chosen], targets[chosen]


class SuperclassDataModule(InMemoryDataModule):
    """A controlled world in which classes resemble each other in groups: a teacher can tell more than labels do.

    20 classes are 5 super-classes of 4. Super-class centres are 2·N(0, I₁₂), class centres lie 0.9·N(0, I₁₂)
    off their super-class, a sample's latent is z = centre + 0.6·N(0, I₁₂), and what the network sees is
    x = 3·sin(1.5·z·W₁)·W₂ + 0.05·N(0, I₃₂), where W₁ (12, 64) ~ N(0, 1)/√12 and W₂ (64, 32) ~ N(0, 1)/8.
    Labels are drawn uniformly; class c belongs to super-class c // 4.

    A world holds 20,000 training samples (for a teacher; `train_size=None`), 5,000 for validation and 5,000
    for testing. A student gets `train_size` of the training samples. Settings chosen on some values of
    `world_seed` can be reported on others that played no part in the choice.

    Samples are (x, target): x (32,), float32.

    Args:
        train_size: Training samples, drawn by `seed` from the 20,000; None takes all.
        batch_size: Samples per batch and process.
        seed: Seed of the draw and of the training order.
        world_seed: Seed of the world: centres, W₁, W₂ and all its samples.

    Raises:
        ValueError: `train_size` is outside 1 … 20,000, or `batch_size` is below 1.

    Example:
        >>> world = SuperclassDataModule(train_size=1000)
        >>> x, target = next(iter(world.train_dataloader()))
        >>> x.shape, target.shape
        (torch.Size([64, 32]), torch.Size([64]))
    """

    num_classes = 20
    num_features = 32
    pool_size = 20_000
    eval_size = 5_000

    def __init__(self, train_size: int | None = 1000, batch_size: int = 64, seed: int = 0, world_seed: int = 0) -> None:
        super().__init__(batch_size, seed)
        if train_size is not None and not 1 <= train_size <= self.pool_size:
            raise ValueError(f"train_size must be None or in 1 … {self.pool_size}, got {train_size}")
        self.train_size = train_size
        self.world_seed = world_seed

    def load_splits(self) -> dict[str, tuple[Tensor, ...]]:
        """Inputs (N, 32) and targets (N,) of the three splits."""
        val_start, test_start = self.pool_size, self.pool_size + self.eval_size
        world = torch.Generator().manual_seed(self.world_seed)
        x, target = _superclass_samples(test_start + self.eval_size, world)
        draw = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(self.pool_size, generator=draw)[: self.train_size]
        return {
            "train": (x[chosen], target[chosen]),
            "val": (x[val_start:test_start], target[val_start:test_start]),
            "test": (x[test_start:], target[test_start:]),
        }


def _read_digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "DigitsDataModule reads the digits that come with scikit-learn, which is not installed: "
            'pip install "lightning-methods[demos]"'
        ) from error
    pixels, targets = load_digits(return_X_y=True)  # pixels are 0 … 16
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return images, torch.tensor(targets, dtype=torch.int64)


def _superclass_samples(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    w1, w2 = normal(12, 64) / 12**0.5, normal(64, 32) / 8
    centres = (2 * normal(5, 1, 12) + 0.9 * normal(5, 4, 12)).view(20, 12)
    target = torch.randint(20, (count,), generator=generator)
    z = centres[target] + 0.6 * normal(count, 12)
    return 3 * torch.sin(1.5 * z @ w1) @ w2 + 0.05 * normal(count, 32), target

"""A made world in which the context of obvious anomalies misleads a detector that learns from bags."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_methods.datamodules._base import InMemoryDataModule
from lightning_methods.datamodules._tensors import TensorLoader


class SnippetKind(NamedTuple):
    """How snippets of a kind are drawn.

    Args:
        name: The kind.
        per_bag: How many an abnormal bag has.
        abnormal: The snippet's label.
        strength: Mean and standard deviation of the cue's strength; None for uniform in [−0.1, 0.9].
        context: Mean and standard deviation of the context.
    """

    name: str
    per_bag: int
    abnormal: bool
    strength: tuple[float, float] | None
    context: tuple[float, float]


KINDS = (
    SnippetKind("plain", 4, False, None, (-1.0, 0.15)),
    SnippetKind("obvious anomaly", 2, True, None, (1.0, 0.15)),
    SnippetKind("subtle anomaly", 5, True, (1.0, 0.1), (-0.05, 0.3)),
    SnippetKind("context only", 5, False, (1.0, 0.1), (0.05, 0.3)),
)


class BagLoader(TensorLoader):
    """The batches of a `TensorLoader` by name."""

    names = ("features", "label", "vid", "snippet_label", "kind")

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]  # what a batch is made of
        for batch in super().__iter__():
            yield dict(zip(self.names, batch, strict=False))


class SyntheticBiasedBagsDataModule(InMemoryDataModule):
    """Bags of 16 snippets in which a context comes with the obvious anomalies, and hides the cue that makes them ones.

    A snippet with label a = ±1, strength m and context c has the features R · (2·a·m, 2·c, 0, …, 0) + noise, where R
    is a random rotation of 32 dimensions. Where the context is clear it tells the bag's label, and the strength of the
    cue is spread out; where the context is neutral the cue is clear. A normal bag has 16 plain snippets. An abnormal
    bag has 4 plain ones (c ≈ −1), 2 obvious anomalies (c ≈ 1), and, with c ≈ 0 and m ≈ 1, 5 subtle anomalies and 5
    normal snippets in a context that is a little more like that of an anomaly: "context only". They come in random
    order.

    A world has 160 training bags, 200 for validation and 200 for testing, half of each abnormal. Settings chosen on
    some values of `world_seed` can be reported on others that played no part in the choice.

    Training batches hold `features` (B, 16, 32), `label` (B,) and `vid` (B,), the number of the bag in the training
    data. Those for validation and testing also hold `snippet_label` and `kind`, both (B, 16), the latter an index into
    `kinds`.

    Args:
        noise: Standard deviation of the noise in every dimension.
        batch_size: Bags per batch and process.
        seed: Seed of the training order.
        world_seed: Seed of the world: its rotation and all its bags.

    Raises:
        ValueError: `noise` is negative, or `batch_size` is below 1.

    Example:
        >>> world = SyntheticBiasedBagsDataModule()
        >>> batch = next(iter(world.train_dataloader()))
        >>> {name: tuple(value.shape) for name, value in batch.items()}
        {'features': (16, 16, 32), 'label': (16,), 'vid': (16,)}
    """

    loader = BagLoader
    num_features = 32
    num_snippets = 16
    train_size = 160
    eval_size = 200
    kinds = tuple(kind.name for kind in KINDS)

    def __init__(self, noise: float = 0.15, batch_size: int = 16, seed: int = 0, world_seed: int = 0) -> None:
        super().__init__(batch_size, seed)
        if noise < 0:
            raise ValueError(f"noise must be at least 0, got {noise}")
        self.noise = noise
        self.world_seed = world_seed

    def axes(self) -> Tensor:
        """Directions of the cue and of the context in feature space, (2, 32), of unit length."""
        return self._rotation(torch.Generator().manual_seed(self.world_seed))[:2]

    def load_splits(self) -> dict[str, tuple[Tensor, ...]]:
        """Features, labels and numbers of the bags; but for training, labels and kinds of their snippets too."""
        world = torch.Generator().manual_seed(self.world_seed)
        rotation = self._rotation(world)
        return {
            "train": self._bags(self.train_size, rotation, world)[:3],
            "val": self._bags(self.eval_size, rotation, world),
            "test": self._bags(self.eval_size, rotation, world),
        }

    def _rotation(self, generator: torch.Generator) -> Tensor:
        directions = torch.randn(self.num_features, self.num_features, generator=generator)
        rotation: Tensor = torch.linalg.qr(directions).Q
        return rotation

    def _bags(self, count: int, rotation: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        shape = (count, self.num_snippets)
        label = torch.arange(count) % 2
        of_abnormal = torch.arange(len(KINDS)).repeat_interleave(torch.tensor([kind.per_bag for kind in KINDS]))
        order = torch.rand(shape, generator=generator).argsort(1)
        kind = of_abnormal[order] * label[:, None]  # kind 0 is plain
        uniform = torch.rand(shape, generator=generator) - 0.1
        drawn_strength, drawn_context = normal(*shape), normal(*shape)
        strength, context, abnormal = torch.empty(shape), torch.empty(shape), torch.empty(shape, dtype=torch.bool)
        for number, made in enumerate(KINDS):
            of_kind = kind == number
            centred = uniform if made.strength is None else made.strength[0] + made.strength[1] * drawn_strength
            strength = torch.where(of_kind, centred, strength)
            context = torch.where(of_kind, made.context[0] + made.context[1] * drawn_context, context)
            abnormal = torch.where(of_kind, made.abnormal, abnormal)
        signal = torch.stack([2 * (2 * abnormal - 1) * strength, 2 * context], -1)
        features = signal @ rotation[:2] + self.noise * normal(*shape, self.num_features)
        return features, label, torch.arange(count), abnormal.long(), kind

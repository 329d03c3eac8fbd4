"""A small world in which the context gives the class away: to pretrain on it, then to be misled by it.

Both parts live in memory, come from one seed, and leave torch's global generator alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_methods.datamodules._base import InMemoryDataModule


class _World(NamedTuple):
    """Prototypes, and the generator from which the samples are drawn next."""

    objects: Tensor
    contexts: Tensor
    rotation: Tensor
    generator: torch.Generator

    def samples(self, objects: Tensor, contexts: Tensor) -> Tensor:
        """What the network sees of objects in contexts, (N, 32)."""
        clean = torch.cat([self.objects[objects], self.contexts[contexts]], 1) @ self.rotation
        return clean + 0.7 * torch.randn(clean.shape, generator=self.generator)

    def labels(self, count: int) -> Tensor:
        return torch.randint(len(self.objects), (count,), generator=self.generator)


def _world(seed: int, part: int) -> _World:
    generator = torch.Generator().manual_seed(seed)

    def prototypes(norm: float) -> Tensor:
        return norm * torch.nn.functional.normalize(torch.randn(6, 16, generator=generator), dim=1)

    objects, contexts = prototypes(2.0), prototypes(3.2)
    rotation, _ = torch.linalg.qr(torch.randn(32, 32, generator=generator))
    # One stream for each part: how much is drawn for one leaves the other as it is.
    return _World(objects, contexts, rotation, torch.Generator().manual_seed(2 * seed + part))


class CaptionedContextsDataModule(InMemoryDataModule):
    """What a model sees before `BiasedContextsDataModule`: objects in any context, with words for both.

    Six objects and six contexts, drawn independently. Object o has the prototype U_o, a direction in 16 dimensions of
    norm 2, context c the prototype V_c of norm 3.2: the context is the louder one. x = [U_o, V_c]·R + 0.7·N(0, I₃₂)
    with a rotation R. Samples are (x, object, context): 6,000 for training, 2,000 each for validation and testing.

    Args:
        batch_size: Samples per batch and process.
        world_seed: Seed of prototypes, rotation and samples.
        seed: Seed of the training order.

    Raises:
        ValueError: `batch_size` is below 1.
    """

    num_classes = 6
    num_features = 32

    def __init__(self, batch_size: int = 64, world_seed: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size, seed)
        self.world_seed = world_seed

    def load_splits(self) -> dict[str, tuple[Tensor, ...]]:
        """Inputs (N, 32), objects (N,) and contexts (N,) of the three splits."""
        world = _world(self.world_seed, part=0)

        def split(count: int) -> tuple[Tensor, ...]:
            objects, contexts = world.labels(count), world.labels(count)
            return world.samples(objects, contexts), objects, contexts

        return {"train": split(6000), "val": split(2000), "test": split(2000)}


class BiasedContextsDataModule(InMemoryDataModule):
    """The world of `CaptionedContextsDataModule` with the object as the class, and contexts that mislead.

    In training, object o stands in context o with probability `bias`, and otherwise in any of the six. Validation and
    test data come in two groups: 0, with that same bias, and 1, where the context says nothing. Samples are
    (x, target, group). Validation: 2,000 of group 0 and 3,000 of group 1; testing: 4,000 and 6,000.

    Args:
        train_size: Training samples.
        bias: Probability in [0, 1].
        wrong_words: Two classes are badly named: the pretrained model knows each by the other's word.
        batch_size: Samples per batch and process.
        world_seed: Seed of prototypes, rotation and samples.
        seed: Seed of the training order.

    Attributes:
        words: For each class the object whose word names it.

    Raises:
        ValueError: `train_size` or `batch_size` is below 1, or `bias` outside [0, 1].

    Example:
        >>> world = BiasedContextsDataModule()
        >>> x, target, group = next(iter(world.train_dataloader()))
        >>> x.shape, target.shape, group.unique()
        (torch.Size([64, 32]), torch.Size([64]), tensor([0]))
    """

    num_classes = 6
    num_features = 32
    groups = ("in distribution", "out of distribution")

    def __init__(
        self,
        train_size: int = 300,
        bias: float = 0.95,
        wrong_words: bool = True,
        batch_size: int = 64,
        world_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        if train_size < 1:
            raise ValueError(f"train_size must be at least 1, got {train_size}")
        if not 0 <= bias <= 1:
            raise ValueError(f"bias must lie in [0, 1], got {bias}")
        self.train_size = train_size
        self.bias = bias
        self.wrong_words = wrong_words
        self.world_seed = world_seed
        self.words = (1, 0, 2, 3, 4, 5) if wrong_words else (0, 1, 2, 3, 4, 5)

    def load_splits(self) -> dict[str, tuple[Tensor, ...]]:
        """Inputs (N, 32), targets (N,) and groups (N,) of the three splits."""
        world = _world(self.world_seed, part=1)

        def group(number: int, count: int) -> tuple[Tensor, ...]:
            target, context = world.labels(count), world.labels(count)
            bias = self.bias if number == 0 else 0.0
            biased = torch.rand(count, generator=world.generator) < bias
            context = torch.where(biased, target, context)
            return world.samples(target, context), target, torch.full_like(target, number)

        def split(biased: int, shifted: int) -> tuple[Tensor, ...]:
            return tuple(torch.cat(pair) for pair in zip(group(0, biased), group(1, shifted), strict=True))

        # Testing and validation first: they are the same for every `train_size`.
        test, val = split(4000, 6000), split(2000, 3000)
        return {"train": group(0, self.train_size), "val": val, "test": test}

"""A small world of images and texts for a laptop, in which the smallest changes are hard to tell."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_methods.datamodules._base import InMemoryDataModule
from lightning_methods.datamodules._tensors import TensorLoader


class MinimalChangeDataModule(InMemoryDataModule):
    """Pairs of made-up images and texts about scenes with an attribute, and quadruples that differ in that alone.

    What a pair is about is one of 40 scenes, drawn uniformly, and one of 4 attributes, drawn with probabilities .70,
    .15, .10, .05. Image and text have codes of their own for them and do not share anything else. In each modality,
    with scene codes N(0, I₁₆), attribute codes 0.3·N(0, I₁₆) and nuisance n = 0.6·N(0, I₁₆) for every single image and
    text, z = [scene + attribute, n]·M and what the network sees is x = z + tanh(z)·N, where M (32, 64) ~ N(0, 1)/4 and
    N (64, 64) ~ N(0, 1)/8.

    Training batches are (image, text), both (B, 64). Validation and testing have two loaders: 2,000 quadruples, batches
    (images, texts), both (B, 2, 64), in which two images of one scene and one nuisance differ in the attribute, uniform
    over unequal attributes, and so do their texts; and 500 fresh pairs for retrieval, batches (image, text, number).

    Args:
        train_size: Training pairs, at least 1.
        batch_size: Samples per batch and process.
        seed: Seed of the training order.
        world_seed: Seed of the world: codes, M, N and all its samples.

    Raises:
        ValueError: `train_size` or `batch_size` is below 1.

    Example:
        >>> world = MinimalChangeDataModule()
        >>> image, text = next(iter(world.train_dataloader()))
        >>> image.shape, text.shape
        (torch.Size([64, 64]), torch.Size([64, 64]))
        >>> [len(loader) for loader in world.val_dataloader()]
        [32, 8]
    """

    num_features = 64
    eval_quads = 2_000
    eval_pairs = 500

    def __init__(self, train_size: int = 1500, batch_size: int = 64, seed: int = 0, world_seed: int = 0) -> None:
        super().__init__(batch_size, seed)
        if train_size < 1:
            raise ValueError(f"train_size must be at least 1, got {train_size}")
        self.train_size = train_size
        self.world_seed = world_seed

    def load_splits(self) -> dict[str, tuple[Tensor, ...]]:
        """The training pairs, and for each of "val" and "test" the quadruples and the pairs ("val_pairs")."""
        draw = torch.Generator().manual_seed(self.world_seed)
        world = _World(_modality(draw), _modality(draw))
        # Evaluation first: it is the same whatever the number of training pairs.
        splits: dict[str, tuple[Tensor, ...]] = {}
        for split in ("val", "test"):
            splits[split] = world.quads(self.eval_quads, draw)
            splits[f"{split}_pairs"] = (*world.pairs(self.eval_pairs, draw), torch.arange(self.eval_pairs))
        return {"train": world.pairs(self.train_size, draw), **splits}

    def val_dataloader(self) -> list[TensorLoader]:  # type: ignore[override]
        """Batches of the validation quadruples and of the validation pairs, in order."""
        return [self._loader("val"), self._loader("val_pairs")]

    def test_dataloader(self) -> list[TensorLoader]:  # type: ignore[override]
        """Batches of the test quadruples and of the test pairs, in order."""
        return [self._loader("test"), self._loader("test_pairs")]


_SCENES, _SIZE = 40, 16
_PRIOR = (0.70, 0.15, 0.10, 0.05)


class _Modality(NamedTuple):
    """How images, or texts, come about."""

    scenes: Tensor
    attributes: Tensor
    mix: Tensor
    bend: Tensor

    def render(self, scene: Tensor, attribute: Tensor, nuisance: Tensor) -> Tensor:
        content = self.scenes[scene] + self.attributes[attribute]
        z = torch.cat([content, nuisance], -1) @ self.mix
        return z + z.tanh() @ self.bend


def _modality(draw: torch.Generator) -> _Modality:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    return _Modality(
        normal(_SCENES, _SIZE), 0.3 * normal(len(_PRIOR), _SIZE), normal(2 * _SIZE, 64) / 4, normal(64, 64) / 8
    )


class _World(NamedTuple):
    image: _Modality
    text: _Modality

    def pairs(self, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        scene = torch.randint(_SCENES, (count,), generator=draw)
        attribute = torch.multinomial(torch.tensor(_PRIOR), count, replacement=True, generator=draw)
        image, text = (
            modality.render(scene, attribute, 0.6 * torch.randn(count, _SIZE, generator=draw)) for modality in self
        )
        return image, text

    def quads(self, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        scene = torch.randint(_SCENES, (count, 1), generator=draw).expand(-1, 2)
        first = torch.randint(len(_PRIOR), (count,), generator=draw)
        other = (first + torch.randint(1, len(_PRIOR), (count,), generator=draw)) % len(_PRIOR)
        attribute = torch.stack([first, other], 1)
        images, texts = (
            modality.render(scene, attribute, 0.6 * torch.randn(count, 1, _SIZE, generator=draw).expand(-1, 2, -1))
            for modality in self
        )
        return images, texts

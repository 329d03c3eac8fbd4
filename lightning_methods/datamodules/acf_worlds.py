"""A world of phrases: tokens that can only be told by their neighbours, and only by the right ones."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_methods.datamodules._base import InMemoryDataModule


class PhrasesDataModule(InMemoryDataModule):
    """Sequences of phrases of unknown length; every token is to be given the class of its phrase.

    A sequence is cut into phrases whose lengths are uniform in 1 … `max_phrase` (the last one is cut off at the end).
    A phrase has one of 6 classes. Each token shows the class of its phrase with probability ½, else a random one, in
    the first 6 channels (one-hot); the seventh channel is 1 at the first token of a phrase. Noise 0.15·N(0, 1) lies on
    all channels. So a token is best told by a vote in its own phrase, and tokens of other phrases mislead.

    Samples are (x, target, phrase): x (N, 7) float32, target (N,) classes, phrase (N,) the number of the phrase in its
    sequence, for measuring only.

    Args:
        train_size: Training sequences, drawn by `seed`.
        batch_size: Sequences per batch and process.
        length: N, tokens in a sequence.
        max_phrase: Longest phrase.
        seed: Seed of the training sequences and their order. Validation and test sequences (1,000 each) are the same
            for every seed.

    Raises:
        ValueError: A size is below 1.

    Example:
        >>> world = PhrasesDataModule(train_size=64)
        >>> x, target, phrase = next(iter(world.train_dataloader()))
        >>> x.shape, target.shape
        (torch.Size([64, 24, 7]), torch.Size([64, 24]))
    """

    num_classes = 6
    num_features = 7
    eval_size = 1000

    def __init__(
        self, train_size: int = 512, batch_size: int = 64, *, length: int = 24, max_phrase: int = 8, seed: int = 0
    ) -> None:
        super().__init__(batch_size, seed)
        for name, value in (("train_size", train_size), ("length", length), ("max_phrase", max_phrase)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.train_size, self.length, self.max_phrase = train_size, length, max_phrase

    def load_splits(self) -> dict[str, tuple[Tensor, ...]]:
        """Tokens (S, N, 7), classes (S, N) and phrase numbers (S, N) of the three splits."""
        # Seeds of training draws are even, so they never meet those of the fixed splits.
        return {
            "train": self._sequences(self.train_size, 2 * self.seed),
            "val": self._sequences(self.eval_size, 1),
            "test": self._sequences(self.eval_size, 3),
        }

    def _sequences(self, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, self.max_phrase + 1, (count, self.length), generator=generator)
        position = torch.arange(self.length)
        phrase = (position[None, :, None] >= lengths.cumsum(1)[:, None, :]).sum(2)  # phrases that have ended before
        first = torch.diff(phrase, dim=1, prepend=phrase.new_full((count, 1), -1)) > 0
        of_phrase = torch.randint(self.num_classes, (count, self.length), generator=generator)
        target = of_phrase.gather(1, phrase)
        other = torch.randint(self.num_classes, (count, self.length), generator=generator)
        honest = torch.rand(count, self.length, generator=generator) < 0.5
        shown = torch.where(honest, target, other)
        clean = torch.cat([torch.eye(self.num_classes)[shown], first[..., None].float()], dim=2)
        return clean + 0.15 * torch.randn(clean.shape, generator=generator), target, phrase


def phrase_vote(x: Tensor, phrase: Tensor) -> Tensor:
    """Majority vote over the true phrases: what a model could reach that knew where phrases begin.

    Args:
        x: Tokens (S, N, 7).
        phrase: Number of each token's phrase (S, N).

    Returns:
        Predicted classes (S, N).
    """
    same = (phrase[:, :, None] == phrase[:, None, :]).float()
    prediction: Tensor = (same @ x[..., :6]).argmax(2)
    return prediction

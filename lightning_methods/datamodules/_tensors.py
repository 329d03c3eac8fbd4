"""Batches cut straight out of tensors, in an order that a seed fixes and a checkpoint can resume."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler, TensorDataset

# torch's sampler seeds epoch e with `seed + e`. Spaced out, two runs with neighbouring seeds never share the
# order of an epoch.
_SEED_SPACING = 2**20


class TensorLoader:
    """Iterates over batches of tensors held in memory; a dataloader to Lightning.

    A batch is one indexing operation per tensor rather than one Python call per sample. The order of pass
    `e` depends on `seed` and `e` alone. Passes count themselves, and Lightning sets their number to its
    epoch's. Lightning stores `state_dict()` in its checkpoints, so that a run that was stopped in mid-epoch
    goes on with the very batch that would have come next.

    One pass at a time: two iterators of the same loader would share one position.

    Args:
        tensors: Tensors that agree in their first axis, the samples.
        batch_size: Samples per batch, at least 1; the last batch of a pass may be smaller.
        shuffle: Whether each pass has an order of its own.
        seed: Seed of the orders.
        rank: Number of this process among `world_size`.
        world_size: Processes that share the samples. Each sees its part, made equally long by repeating a few
            samples, as with torch's `DistributedSampler`.

    Raises:
        ValueError: The tensors are empty or differ in length, or `batch_size` is below 1.

    Example:
        >>> loader = TensorLoader(torch.arange(5), batch_size=2)
        >>> [batch.tolist() for (batch,) in loader]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        *tensors: Tensor,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        lengths = [len(tensor) for tensor in tensors]
        if not lengths or lengths[0] == 0 or len(set(lengths)) > 1:
            raise ValueError(f"tensors must hold the same number of samples, at least one; got {lengths}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.tensors = tensors
        self._sampler: DistributedSampler[int] = DistributedSampler(
            TensorDataset(*tensors), world_size, rank, shuffle=shuffle, seed=seed * _SEED_SPACING
        )
        # Under this name Lightning looks for a sampler whose epoch it can set.
        self.batch_sampler = BatchSampler(self._sampler, batch_size, drop_last=False)
        self._epoch = 0
        self._batch = 0  # batches of pass `_epoch` already handed out
        self._resuming = False

    def __len__(self) -> int:
        """Number of batches in a whole pass, also while a pass is being resumed."""
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        # A generator: nothing below runs before the first batch is asked for. Lightning makes its iterator
        # before it sets the epoch, and sometimes makes one that it never uses.
        self._begin_pass()
        for rows in islice(self.batch_sampler, self._batch, None):
            self._batch += 1  # before the batch leaves: a checkpoint written during its step counts it as done
            index = torch.tensor(rows)
            yield tuple(tensor[index] for tensor in self.tensors)

    def _begin_pass(self) -> None:
        if self._sampler.epoch != self._epoch:
            self._epoch, self._batch = self._sampler.epoch, 0
        elif self._batch == len(self) or (self._batch > 0 and not self._resuming):
            self._epoch, self._batch = self._epoch + 1, 0
            self._sampler.set_epoch(self._epoch)
        self._resuming = False

    def state_dict(self) -> dict[str, int]:
        """Position: the number of the pass and how many of its batches have been handed out."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """The next iteration goes on from this position."""
        self._epoch, self._batch = state_dict["epoch"], state_dict["batch"]
        self._sampler.set_epoch(self._epoch)
        self._resuming = True


def rank_within_class(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Random place of each sample among the samples of its class, counted from 0.

    `rank_within_class(labels, generator) < k` picks k samples of every class.

    Args:
        labels: Class indices, shape (N,).
        generator: Source of the random order.

    Returns:
        Shape (N,), int64. Over the n samples of one class it takes each of 0 … n-1 once.

    Example:
        >>> labels = torch.tensor([0, 1, 0, 1, 1])
        >>> rank = rank_within_class(labels, torch.Generator().manual_seed(0))
        >>> rank[labels == 0].sort().values, rank[labels == 1].sort().values
        (tensor([0, 1]), tensor([0, 1, 2]))
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(by_class)
    rank[by_class] = torch.arange(len(labels)) - first[labels[by_class]]
    return rank

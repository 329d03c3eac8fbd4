"""What AlignBeforeFuse keeps: what it trains beside the module, and queues of earlier batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Trained(nn.Module):
    """The learned temperature, and linear maps of both kinds of features if widths are given."""

    def __init__(self, temperature: float, widths: list[int] | None, embed_dim: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(temperature))
        self.maps = nn.ModuleList(nn.Linear(width, embed_dim) for width in widths or ())

    def forward(self, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return (self.maps[0](video), self.maps[1](text)) if len(self.maps) else (video, text)


class Queue:
    """The latest rows of several tensors, in a ring; it begins empty and grows to its size, unless it is filled first.

    Args:
        size: Most rows it holds.

    Example:
        >>> queue = Queue(3)
        >>> queue.push(torch.tensor([1, 2]))
        >>> queue.push(torch.tensor([3, 4]))
        >>> queue.rows(torch.empty(0))
        (tensor([4, 2, 3]),)
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0  # of all rows that have ever been pushed
        self._rings: tuple[Tensor, ...] = ()

    def rows(self, *like: Tensor) -> tuple[Tensor, ...]:
        """What is there, and while there is nothing, 0 rows like those given."""
        if not self._rings:
            return tuple(tensor[:0] for tensor in like)
        for ring, tensor in zip(self._rings, like, strict=True):
            if ring.shape[1:] != tensor.shape[1:] and tensor.numel():
                raise ValueError(
                    f"Expected rows of shape {list(ring.shape[1:])}, as in the batches before, but got "
                    f"{list(tensor.shape[1:])}; pad all batches to one length."
                )
        return tuple(ring[: min(self.count, self.size)].to(like[0].device) for ring in self._rings)

    def push(self, *rows: Tensor) -> None:
        """Puts rows in the place of the oldest; a queue of size 0 takes none.

        Raises:
            ValueError: If there are more rows than it holds.
        """
        if not self.size:
            return
        if len(rows[0]) > self.size:
            raise ValueError(
                f"Expected a queue to be at least as long as the batch of all ranks, {len(rows[0])}, or 0, but it is "
                f"{self.size}."
            )
        if not self._rings:
            self._rings = tuple(row.new_zeros(self.size, *row.shape[1:]) for row in rows)
        self._rings = tuple(ring.to(row.device) for ring, row in zip(self._rings, rows, strict=True))
        place = torch.arange(self.count, self.count + len(rows[0]), device=rows[0].device) % self.size
        for ring, row in zip(self._rings, rows, strict=True):
            ring.index_copy_(0, place, row.detach().to(ring.dtype))
        self.count += len(rows[0])

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"count": self.count, "rings": [ring.clone() for ring in self._rings]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.count, self._rings = state_dict["count"], tuple(ring.clone() for ring in state_dict["rings"])

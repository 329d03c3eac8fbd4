"""Which frames of a video become a bag, and which videos become a batch.

A snippet spans `span` frames, of which its clip shows every few: the settings of Lv et al., CVPR 2023, are 16 snippets
of 30 frames and clips of 5 frames, 6 apart. All formulas are those of the authors' code.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_methods.datamodules._video_sampling import Sampling, frame_indices, random_starts

#: A shorter cell at the end of a video is left out.
MIN_CELL = 5
# Spaced out, two runs with neighbouring seeds never share the order of an epoch.
_SEED_SPACING = 2**20


def training_offsets(num_frames: int, num_snippets: int, span: int, generator: torch.Generator | None = None) -> Tensor:
    """First frame of each snippet, (K,): a random place in each of K equal parts of the video.

    Videos with fewer places than snippets: random places in order if they are longer than both `num_snippets` and
    `span`, evenly spread ones if they are as long as a span at least (or one frame shorter), else all 0.
    """
    return random_starts(num_frames, Sampling(num_snippets, span), generator)


def fixed_offsets(num_frames: int, num_snippets: int, span: int) -> Tensor:
    """First frame of each snippet, (K,): the middle of each of K equal parts of the video; 0 in a shorter video."""
    steps = torch.arange(num_snippets)
    if num_frames < span:
        return torch.zeros_like(steps)
    part = (num_frames - span + 1) / num_snippets
    return (steps.double() * part + part / 2).long()


def clip_frames(offsets: Tensor, num_frames: int, clip_length: int, interval: int) -> Tensor:
    """Frames of the clips that begin at `offsets` (K,): (K, T), going on at the start when the video ends."""
    return frame_indices(offsets, num_frames, Sampling(1, clip_length, interval))


def middle_frame(frames: Tensor) -> Tensor:
    """The frame by which a clip is assigned to a cell: (K, T) -> (K,)."""
    return frames[:, frames.shape[1] // 2]


def num_cells(num_frames: int, span: int) -> int:
    """Cells of `span` frames that a video is scored in; a last one of fewer than 5 is left out, if not the only one."""
    whole, rest = divmod(num_frames, span)
    return max(whole + (rest >= MIN_CELL), 1)


def cell_clip(cell: int, num_frames: int, span: int, clip_length: int, interval: int) -> Tensor:
    """Frames of the clip that stands for a cell, (1, T), all of them inside the cell."""
    start = cell * span
    length = min(span, num_frames - start)
    return start + clip_frames(fixed_offsets(length, 1, span), length, clip_length, interval)


class BalancedBags(DistributedSampler[int]):
    """Normal and abnormal videos in turn, so that every batch of an even size has as many of either.

    In an epoch each video of the larger class comes once (a few twice, where the processes share them unevenly); those
    of the smaller class come again, in a new order, until there are as many.

    Args:
        labels: Class of each video, 0 for normal.
        seed: Seed of the orders. That of epoch e depends on `seed` and e alone.
        rank: Number of this process among `world_size`.
        world_size: Processes that share the videos.

    Raises:
        ValueError: Either class has no video.
    """

    def __init__(self, labels: Sequence[int], *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        # A DistributedSampler by name: Lightning then leaves it in place and sets its epoch.
        super().__init__(labels, world_size, rank, seed=seed * _SEED_SPACING)  # type: ignore[arg-type]  # only its length
        abnormal = torch.tensor(labels) > 0
        self.classes = [torch.nonzero(abnormal == kind).flatten() for kind in (True, False)]
        for name, members in zip(("abnormal", "normal"), self.classes, strict=True):
            if not len(members):
                raise ValueError(f"there are {len(labels)} training videos, but none is {name}; bags need both")
        self._pairs = math.ceil(max(map(len, self.classes)) / world_size)  # of this process

    def __len__(self) -> int:
        return 2 * self._pairs

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        total = self._pairs * self.num_replicas
        orders = [_endless(members, total, generator) for members in self.classes]
        pairs = torch.stack(orders, 1)[self.rank :: self.num_replicas]
        return iter(pairs.flatten().tolist())


def _endless(members: Tensor, total: int, generator: torch.Generator) -> Tensor:
    rounds = math.ceil(total / len(members))
    orders = [members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)]
    return torch.cat(orders)[:total]

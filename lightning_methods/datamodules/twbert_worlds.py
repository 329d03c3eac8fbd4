"""A world of short videos in which what matters is short in space and long in time."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_methods.datamodules._base import InMemoryDataModule

OBJECTS, STATES = 6, 4
FRAMES, PATCHES = 8, 16
WORDS = 4
#: Frames in which the object has the state asked for.
MAJORITY = 6


class ObjectStatesDataModule(InMemoryDataModule):
    """Videos as patches, a question that names an object, and the state that it has in most frames.

    A video has 8 frames of 16 patches. Each of 6 objects occupies one patch of every frame, at a random place. An
    object has one of 4 states in 6 of the frames and another one in the remaining two. A patch shows (object, state)
    as two one-hot codes, the empty ones show nothing, and noise N(0, `noise`²) lies on all. In one of the two frames of
    the other state a *burst* puts look-alikes (the object asked for, in the wrong state) into up to 10 empty patches.
    Counted in patches the wrong state can win; counted in frames it has two of eight.

    The question has 4 words: start, the object's name, "state", end. Samples are (video, text, target): video
    (128, 10) float32, patches frame by frame; text (4,) word numbers below 9; target () the state.

    Args:
        train_size: Training videos, drawn by `seed`; bursts of 0 … 10 patches.
        batch_size: Videos per batch and process.
        burst: Patches in the bursts of the test videos (validation: 0 … 10, as in training).
        noise: Standard deviation of the noise.
        seed: Seed of the training videos and their order. Validation and test videos (1,000 each) are the same for
            every seed.

    Raises:
        ValueError: `train_size` is below 1, or `burst` is outside 0 … 10.

    Example:
        >>> world = ObjectStatesDataModule(train_size=32, batch_size=8)
        >>> [part.shape for part in next(iter(world.train_dataloader()))]
        [torch.Size([8, 128, 10]), torch.Size([8, 4]), torch.Size([8])]
    """

    num_classes = STATES
    num_features = OBJECTS + STATES
    num_words = OBJECTS + 3
    eval_size = 1000
    max_burst = PATCHES - OBJECTS

    def __init__(
        self, train_size: int = 32_000, batch_size: int = 128, *, burst: int = 10, noise: float = 0.15, seed: int = 0
    ) -> None:
        super().__init__(batch_size, seed)
        if train_size < 1:
            raise ValueError(f"train_size must be at least 1, got {train_size}")
        if not 0 <= burst <= self.max_burst:
            raise ValueError(f"burst must be in 0 … {self.max_burst}, got {burst}")
        self.train_size, self.burst, self.noise = train_size, burst, noise

    def load_splits(self) -> dict[str, tuple[Tensor, ...]]:
        """Videos (S, 128, 10), texts (S, 4) and targets (S,) of the three splits."""
        # Seeds of training draws are even, so they never meet those of the fixed splits.
        return {
            "train": _videos(self.train_size, 2 * self.seed, None, self.noise),
            "val": _videos(self.eval_size, 1, None, self.noise),
            "test": _videos(self.eval_size, 3, self.burst, self.noise),
        }


def _videos(count: int, seed: int, burst: int | None, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    def shuffled(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).argsort(-1)

    state = draw(STATES, count, OBJECTS, 1)
    other = (state + 1 + draw(STATES - 1, count, OBJECTS, 1)) % STATES
    rank = shuffled(count, OBJECTS, FRAMES)  # the frames' places in a random order: the last two are the exceptions
    states = torch.where(rank < MAJORITY, state, other)

    asked = draw(OBJECTS, count)
    rows = torch.arange(count)
    burst_frame = rank[rows, asked].argmax(1)
    size = draw(PATCHES - OBJECTS + 1, count) if burst is None else torch.full((count,), burst)

    # What each of the 16 places of a frame holds, before the places are shuffled: the objects, then the look-alikes.
    codes = torch.zeros(count, FRAMES, PATCHES, OBJECTS + STATES)
    codes[:, :, :OBJECTS, :OBJECTS] = torch.eye(OBJECTS)
    codes[:, :, :OBJECTS, OBJECTS:] = torch.eye(STATES)[states].transpose(1, 2)
    look_alike = torch.cat([torch.eye(OBJECTS)[asked], torch.eye(STATES)[other[rows, asked, 0]]], dim=1)
    in_burst = torch.arange(PATCHES - OBJECTS) < size[:, None]
    codes[rows, burst_frame, OBJECTS:] = in_burst[..., None] * look_alike[:, None]

    place = shuffled(count, FRAMES, PATCHES)[..., None].expand_as(codes)
    video = codes.gather(2, place) + noise * torch.randn(codes.shape, generator=generator)
    start, word, end = (torch.full((count,), OBJECTS + k) for k in range(3))
    return video.flatten(1, 2), torch.stack([start, asked, word, end], dim=1), state[rows, asked, 0]

"""Which frames of a video make up its clips, in training and in evaluation.

N clips of L frames each, every s-th frame of a video of F frames: a clip spans L·s frames, and the first frame of a
clip has D = F − L·s + 1 places to go. With L = 1 the N clips are the segments of a temporal segment network; with
N = 1 it is dense sampling. A clip that reaches past the end goes on at the beginning of the video.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How many clips, of how many frames, how far apart.

    Args:
        clips: N.
        length: L, frames of a clip.
        step: s, a clip takes every s-th frame.

    Raises:
        ValueError: One of them is below 1.
    """

    clips: int = 1
    length: int = 1
    step: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")

    @property
    def span(self) -> int:
        """Frames from the start of one clip to where the next could start, L·s."""
        return self.length * self.step


def random_starts(num_frames: int, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Random first frames of the clips, (N,), ascending: one in each of N equal parts, if the video is long enough.

    With a = ⌊D / N⌋: i·a + U{0 … a−1} if a > 0; otherwise N sorted draws from U{0 … D−1} if F > max(N, L·s);
    otherwise i·D / N rounded, halves to even, if a = 0; otherwise 0.

    Example:
        >>> random_starts(3, Sampling(clips=4)).tolist()
        [0, 1, 2, 2]
    """
    clips = sampling.clips
    places = num_frames - sampling.span + 1
    apart = places // clips
    number = torch.arange(clips)
    if apart > 0:
        return number * apart + torch.randint(apart, (clips,), generator=generator)
    if num_frames > max(clips, sampling.span):
        return torch.randint(places, (clips,), generator=generator).sort().values
    if apart == 0:
        return torch.round(number.double() * places / clips).long()
    return torch.zeros(clips, dtype=torch.int64)


def even_starts(num_frames: int, sampling: Sampling) -> Tensor:
    """First frames of the clips, (N,): the middle of N equal parts, i·D / N + D / (2N) cut down; 0 in short videos.

    Example:
        >>> even_starts(20, Sampling(clips=4)).tolist()
        [2, 7, 12, 17]
    """
    number = torch.arange(sampling.clips)
    if num_frames < sampling.span:
        return torch.zeros_like(number)
    places = num_frames - sampling.span + 1
    return (2 * number + 1) * places // (2 * sampling.clips)


def frame_indices(starts: Tensor, num_frames: int, sampling: Sampling) -> Tensor:
    """Frames (N, L) of the clips with these starts (N,), counted from 0.

    Example:
        >>> frame_indices(torch.tensor([0, 2]), 5, Sampling(clips=2, length=3, step=2)).tolist()
        [[0, 2, 4], [2, 4, 1]]
    """
    return (starts[:, None] + sampling.step * torch.arange(sampling.length)) % num_frames

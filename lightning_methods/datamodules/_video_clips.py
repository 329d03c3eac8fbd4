"""Clips of listed videos, decoded when they are asked for."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lightning_methods.datamodules._video_files import FrameSource, VideoError, VideoKind, open_video
from lightning_methods.datamodules._video_lists import VideoEntry
from lightning_methods.datamodules._video_sampling import Sampling, even_starts, frame_indices, random_starts
from lightning_methods.datamodules._video_transforms import (
    RandomCrop,
    coin,
    cut,
    draw_crop,
    even_crops,
    normalised,
    resize_short_side,
    resized,
)

Layout: TypeAlias = Literal["btchw", "bcthw", "bncthw"]
OnError: TypeAlias = Literal["raise", "skip"]
Item: TypeAlias = tuple[Tensor, int, int]


@dataclass(frozen=True)
class ClipTransform:
    """From the frames of a video to what a network is fed.

    Args:
        sampling: The clips.
        layout: Of a batch: "btchw" joins the frames of all clips; "bcthw" and "bncthw" keep clips apart.
        size: Side of the square that is fed.
        short_side: Length to which the shorter side of the frames is brought before they are cropped.
        mean: Of each colour, in 0 … 255.
        std: Likewise.
        random_crop: In training, which random crops are drawn; None in evaluation.
        crops: In evaluation, 1 or 3 crops of each clip.
    """

    sampling: Sampling
    layout: Layout
    size: int
    short_side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    random_crop: RandomCrop | None = None
    crops: int = 1

    @property
    def clips_in_batch(self) -> int:
        """Clips of a sample that stay apart: clips times crops, or crops alone."""
        return self.crops if self.layout == "btchw" else self.crops * self.sampling.clips

    @property
    def length(self) -> int:
        """Frames of a clip."""
        return self.sampling.length * (self.sampling.clips if self.layout == "btchw" else 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        lead = (self.length, 3) if self.layout == "btchw" else (3, self.length)
        clip = (*lead, self.size, self.size)
        apart = self.layout == "bncthw" or self.clips_in_batch > 1
        return (self.clips_in_batch, *clip) if apart else clip

    def indices(self, num_frames: int) -> Tensor:
        """Frames (N, L) of the clips."""
        starts = even_starts if self.random_crop is None else random_starts
        return frame_indices(starts(num_frames, self.sampling), num_frames, self.sampling)

    def __call__(self, frames: Tensor) -> Tensor:
        """A sample of `shape` from the frames (N·L, 3, H, W), uint8, of all clips."""
        views = torch.stack([normalised(view, self.mean, self.std) for view in self._views(frames)])
        if self.layout != "btchw":
            views = views.reshape(self.crops, self.sampling.clips, self.sampling.length, *views.shape[2:])
            views = views.permute(1, 0, 3, 2, 4, 5)  # clip after clip, each with its crops
        return views.reshape(self.shape)

    def _views(self, frames: Tensor) -> list[Tensor]:
        frames = resize_short_side(frames, self.short_side)
        height, width = frames.shape[-2:]
        if self.random_crop is None:
            return [cut(frames, crop) for crop in even_crops(height, width, self.size, self.crops)]
        view = resized(cut(frames, draw_crop(self.random_crop, height, width)), self.size, self.size)
        return [view.flip(-1) if coin() else view]


class VideoClips(Dataset[Item | None]):
    """Samples (video, label, index) of a list; the index is the place in the list.

    Args:
        entries: The lines of the list.
        paths: Where each video is; None where it is missing.
        kind: Of the videos.
        template: Names of frames, see `open_video`.
        transform: Makes a sample.
        on_error: "raise", or "skip": a video that cannot be read gives None in evaluation; in training the next one
            in the list takes its place.

    Attributes:
        unreadable: (number of entries,), boolean, in memory that loader processes share: which could not be read.
    """

    def __init__(
        self,
        entries: Sequence[VideoEntry],
        paths: Sequence[Path | None],
        kind: VideoKind,
        template: str | None,
        transform: ClipTransform,
        on_error: OnError,
    ) -> None:
        self.entries = entries
        self.paths = paths
        self.kind: VideoKind = kind
        self.template = template
        self.transform = transform
        self.on_error = on_error
        missing = torch.tensor([path is None for path in paths])
        self.unreadable: Tensor = missing.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Item | None:
        if self.on_error == "raise":
            return self._item(index)
        for shift in range(len(self)):
            place = (index + shift) % len(self)
            try:
                if not self.unreadable[place]:
                    return self._item(place)
            except VideoError as error:
                self.unreadable[place] = True
                warnings.warn(f"skipped: {error}", stacklevel=2)
            if self.transform.random_crop is None:
                return None
        raise VideoError(f"none of the {len(self)} videos can be read; first: {self.paths[0]}")

    def _item(self, index: int) -> Item:
        entry, path = self.entries[index], self.paths[index]
        if path is None:
            raise VideoError(f"video {entry.name} is missing")
        with open_video(path, kind=self.kind, template=self.template) as source:
            frames = self._read(source, entry)
        return self.transform(frames), entry.label, index

    def _read(self, source: FrameSource, entry: VideoEntry) -> Tensor:
        return source.read(entry.start + self.transform.indices(entry.length(source.num_frames)).flatten())


@dataclass(frozen=True)
class Collate:
    """A batch of samples that could be read.

    Args:
        shape: Of a sample's video.
        twin_frame: From index to the frame of the clip that a SCUFO twin repeats; None: no twins.
    """

    shape: tuple[int, ...]
    twin_frame: Callable[[int], int] | None = None

    def __call__(self, items: Sequence[Item | None]) -> tuple[Tensor, ...]:
        """(video, label, index), and the frame of each twin if there are any; of size 0 if nothing could be read."""
        found = [item for item in items if item is not None]
        if not found:
            none = torch.zeros(0, dtype=torch.int64)
            return (torch.zeros(0, *self.shape), none, none, *([] if self.twin_frame is None else [none]))
        if self.twin_frame is None:
            return tuple(default_collate(found))
        return tuple(default_collate([(*item, self.twin_frame(item[2])) for item in found]))

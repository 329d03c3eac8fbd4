"""Bags of clips cut from videos on disk."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_methods.datamodules import _wsvad_sampling as sampling
from lightning_methods.datamodules._video_files import FrameSource, VideoKind, open_video
from lightning_methods.datamodules._wsvad_views import StrongView, shrink, weak_view
from lightning_methods.functional import VideoRecord

Bag = dict[str, Tensor]


class VideoFolder(NamedTuple):
    """Where videos are, and in which form.

    Attributes:
        root: What paths of records are relative to; where it has a folder `frames`, to that as well.
        kind: As in `open_video`.
        template: The same, for frames in folders.
    """

    root: Path
    kind: VideoKind
    template: str | None

    def locate(self, records: Sequence[VideoRecord]) -> list[Path]:
        """Path of each video, known to exist.

        Raises:
            FileNotFoundError: Videos are missing; the message counts them and shows the first.
        """
        bases = (self.root / "frames", self.root)
        found = [next((b / record.path for b in bases if (b / record.path).exists()), None) for record in records]
        missing = [record.path for record, path in zip(records, found, strict=True) if path is None]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(records)} videos are neither in {bases[0]} nor in {bases[1]}; "
                f"first: {missing[0]}"
            )
        return [path for path in found if path is not None]


class ClipShape(NamedTuple):
    """How many clips make a bag, of how many frames, and how far apart these are."""

    num_snippets: int
    clip_length: int
    interval: int

    @property
    def span(self) -> int:
        """Frames that a clip stands for."""
        return self.clip_length * self.interval


class _Clips(Dataset[Bag]):
    """Videos of records, opened when they are needed."""

    def __init__(self, records: Sequence[VideoRecord], folder: VideoFolder, shape: ClipShape) -> None:
        self.records = records
        self.paths = folder.locate(records)
        self.folder = folder
        self.shape = shape
        self._opened: tuple[tuple[int, int], FrameSource] | None = None

    def _bag(self, index: int, frames: Tensor) -> Bag:
        """What every bag says of its clips, of which `frames` (K, T) holds the frames."""
        record = self.records[index]
        return {
            "label": torch.tensor(record.label),
            "vid": torch.tensor(index),
            "frame_index": sampling.middle_frame(frames),
            "total_frames": torch.tensor(record.num_frames),
        }

    def _shrunken(self, index: int, frames: Tensor) -> Tensor:
        """Those frames (K, T), as (K * T, 3, h, w)."""
        return shrink(self._source(index).read(frames.flatten()))

    def _source(self, index: int) -> FrameSource:
        # Cells follow each other: the video that was read last is mostly the one that is read next. A forked worker
        # must not share the open file of its parent, whose position it would move.
        key = (os.getpid(), index)
        if self._opened is None or self._opened[0] != key:
            if self._opened is not None:
                self._opened[1].close()
            self._opened = (key, self._open(index))
        return self._opened[1]

    def _open(self, index: int) -> FrameSource:
        record, path = self.records[index], self.paths[index]
        source = open_video(path, kind=self.folder.kind, template=self.folder.template)
        if source.num_frames != record.num_frames:
            raise ValueError(
                f"{path} has {source.num_frames} frames, but the list says {record.num_frames}: "
                "its annotation would be out of step"
            )
        return source

    def _as_clips(self, frames: Tensor) -> Tensor:
        """(K * T, 3, H, W) to (K, 3, T, H, W)."""
        return frames.reshape(-1, self.shape.clip_length, *frames.shape[1:]).transpose(1, 2)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}  # an open file does not travel to a worker


class TrainingClips(_Clips):
    """Clips from random places of a video, with a strongly augmented view if asked for.

    Args:
        records: The videos.
        folder: Where they are.
        shape: Of a bag.
        strong_view: Whether to add `clips_strong`.
        resample_views: Whether the strong view has places of its own: it then shares with the weak one only which of
            the K parts of the video a clip is from.
    """

    def __init__(
        self,
        records: Sequence[VideoRecord],
        folder: VideoFolder,
        shape: ClipShape,
        strong_view: bool,
        resample_views: bool,
    ) -> None:
        super().__init__(records, folder, shape)
        self.strong_view = StrongView() if strong_view else None
        self.resample_views = resample_views

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Bag:
        frames = self._drawn(index)
        shrunken = self._shrunken(index, frames)
        bag = self._bag(index, frames) | {"clips": self._as_clips(weak_view(shrunken))}
        if self.strong_view is not None:
            if self.resample_views:
                shrunken = self._shrunken(index, self._drawn(index))
            bag["clips_strong"] = self._as_clips(self.strong_view(shrunken))
        return bag

    def _drawn(self, index: int) -> Tensor:
        length, shape = self.records[index].num_frames, self.shape
        offsets = sampling.training_offsets(length, shape.num_snippets, shape.span)
        return sampling.clip_frames(offsets, length, shape.clip_length, shape.interval)


class FixedClips(_Clips):
    """Clips from the middle of equal parts of a video: a fast look at all of it."""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Bag:
        length, shape = self.records[index].num_frames, self.shape
        offsets = sampling.fixed_offsets(length, shape.num_snippets, shape.span)
        frames = sampling.clip_frames(offsets, length, shape.clip_length, shape.interval)
        clips = self._as_clips(weak_view(self._shrunken(index, frames)))
        return self._bag(index, frames) | {"clips": clips, "snippet_index": torch.arange(shape.num_snippets)}


class CellClips(_Clips):
    """One clip for each cell of each video, a bag of its own: the whole video is scored."""

    def __init__(self, records: Sequence[VideoRecord], folder: VideoFolder, shape: ClipShape) -> None:
        super().__init__(records, folder, shape)
        counts = [sampling.num_cells(record.num_frames, shape.span) for record in records]
        self.cells = [(video, cell) for video, count in enumerate(counts) for cell in range(count)]

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, index: int) -> Bag:
        video, cell = self.cells[index]
        length, shape = self.records[video].num_frames, self.shape
        frames = sampling.cell_clip(cell, length, shape.span, shape.clip_length, shape.interval)
        clips = self._as_clips(weak_view(self._shrunken(video, frames)))
        return self._bag(video, frames) | {"clips": clips, "snippet_index": torch.tensor([cell])}

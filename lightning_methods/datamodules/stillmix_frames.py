"""Single frames of listed videos: to train StillMix's reference network, to be scored by it, to be read by key.

A frame's key is `"{video}/{file name}"` where frames are images, and `"{video}//{number from 0}"` in a video file, with
the video's name in the list: the keys of the authors' score files.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from lightning_methods.datamodules._video_clips import OnError
from lightning_methods.datamodules._video_files import FrameSource, VideoError, open_video
from lightning_methods.datamodules._video_lists import VideoEntry, VideoFinder, locate_videos
from lightning_methods.datamodules._video_transforms import resized
from lightning_methods.datamodules.stillmix import VideoSource
from lightning_methods.functional._logits import check_choice, check_positive
from lightning_methods.functional._seeds import seeded

#: Video files have many frames that are nearly the same; the authors score every 20th.
VIDEO_FILE_STRIDE = 20
_AT_ONCE = 32


@dataclass
class VideoFrameReader:
    """Reads frames by key, with their labels: what `modules.FrameBankSpec` asks for.

    The video that was read last stays open, so keys should come video by video.

    Args:
        source: The list on which the keys were made, and where its videos are.

    Raises:
        VideoError: When called, if the list has no video of a key's name, the video has no such frame, or it cannot be
            decoded.
    """

    source: VideoSource
    _last: tuple[str, FrameSource] | None = field(default=None, init=False, repr=False, compare=False)

    def __call__(self, key: str) -> tuple[Tensor, int]:
        """The frame, uint8 (3, H, W), and its label."""
        video, number, name = split_key(key)
        if video not in self._labels:
            raise VideoError(
                f"{self.source.list_file} has no video {video!r}, of which {key!r} should be a frame: "
                f"are the scores those of another data set?"
            )
        opened = self._opened(video)
        if number.isdecimal():
            index = int(number)
        else:
            names = opened.names or ()
            if name not in names:
                found = ", ".join(names[:3]) or "numbers"
                raise VideoError(f"{opened.path} has no frame {name or number!r}, only {found} ...")
            index = names.index(name)
        return opened.read([index])[0], self._labels[video]

    @cached_property
    def _labels(self) -> dict[str, int]:
        return {entry.name: entry.label for entry in self.source.entries()}

    @cached_property
    def _finder(self) -> VideoFinder:
        return VideoFinder(Path(self.source.root).expanduser(), self.source.kind)

    def _opened(self, video: str) -> FrameSource:
        if self._last is None or self._last[0] != video:
            if self._last is not None:
                self._last[1].close()
            path = self._finder.find(video)
            if path is None:
                raise VideoError(f"{self._finder.root} has no video {video!r}")
            self._last = video, open_video(path, kind=self.source.kind, template=self.source.template)
        return self._last[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None}  # an open file cannot be copied


def split_key(key: str) -> tuple[str, str, str]:
    """The video of a key, and the number of its frame in a video file or its name; "" for the other."""
    video, slash, number = key.partition("//")
    if slash:
        return video, number, ""
    video, _, name = key.rpartition("/")
    return video, "", name


class _Videos:
    """The videos of a source, found on disk."""

    def __init__(self, source: VideoSource, on_error: OnError) -> None:
        check_choice("on_error", on_error, OnError)
        self.source, self.on_error = source, on_error
        self.entries = source.entries()
        finder = VideoFinder(Path(source.root).expanduser(), source.kind)
        self.paths = locate_videos(self.entries, finder, Path(source.list_file), on_error)

    def __len__(self) -> int:
        return len(self.entries)

    def open(self, index: int) -> tuple[VideoEntry, FrameSource]:
        entry, path = self.entries[index], self.paths[index]
        if path is None:
            raise VideoError(f"video {entry.name} is missing")
        return entry, open_video(path, kind=self.source.kind, template=self.source.template)

    def excuse(self, error: VideoError) -> None:
        """Raises the error again, or warns and goes on."""
        if self.on_error == "raise":
            raise error
        warnings.warn(f"skipped: {error}", stacklevel=3)


def _frames_of(entry: VideoEntry, opened: FrameSource) -> range:
    stop = entry.start + entry.length(opened.num_frames)
    if not entry.start < stop <= opened.num_frames:
        raise VideoError(f"{opened.path} has {opened.num_frames} frames, but the list has {entry.start} … {stop - 1}")
    return range(entry.start, stop)


class RandomFrames(Dataset[tuple[Tensor, int]]):
    """One frame of each video, drawn uniformly: items (frame, label) by (epoch, index of the video).

    As in the authors' recipe the frame is resized to a square (the aspect ratio is not kept), flipped at random and
    cropped at random. All draws follow from seed, epoch and index.

    Args:
        source: The videos.
        resize: Side of the square.
        size: Side of the crop.
        seed: Of the draws.
        on_error: "raise" where a video cannot be read, or "skip": the next one in the list takes its place.

    Raises:
        ValueError: If the crop does not fit.
        FileNotFoundError: If the list or videos are missing.
    """

    def __init__(
        self,
        source: VideoSource,
        *,
        resize: int = 256,
        size: int = 224,
        seed: int = 0,
        on_error: OnError = "raise",
    ) -> None:
        check_positive(size=size)
        if size > resize:
            raise ValueError(f"`size` must be at most `resize`, got {size} and {resize}")
        self.videos = _Videos(source, on_error)
        self.resize, self.size, self.seed = resize, size, seed

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:
        """The frame, uint8 (3, size, size), and its label."""
        epoch, index = place
        for shift in range(len(self)):
            try:
                return self._draw(epoch, (index + shift) % len(self))
            except VideoError as error:
                self.videos.excuse(error)
        raise VideoError(f"none of the {len(self)} videos in {self.videos.source.list_file} can be read")

    def _draw(self, epoch: int, index: int) -> tuple[Tensor, int]:
        generator = seeded("frame", self.seed, epoch, index)
        entry, opened = self.videos.open(index)
        with opened:
            frames = _frames_of(entry, opened)
            frame = opened.read([frames[int(torch.randint(len(frames), (), generator=generator))]])
        frame = _to_bytes(resized(frame, self.resize, self.resize))[0]
        flip, top, left = torch.rand(3, generator=generator).tolist()
        room = self.resize - self.size + 1
        top, left = int(room * top), int(room * left)
        frame = frame[:, top : top + self.size, left : left + self.size]
        return frame.flip(-1) if flip < 0.5 else frame, entry.label


class _ShuffledPlaces(Sampler[tuple[int, int]]):
    """All videos in a new order each epoch; Lightning tells the epoch."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(self.count, generator=seeded("order", self.seed, self.epoch)).tolist()
        return ((self.epoch, index) for index in order)


def random_frame_loader(dataset: RandomFrames, *, batch_size: int, num_workers: int = 0) -> DataLoader[Any]:
    """Shuffled batches (frames, labels); an epoch is the same however often training was stopped before it."""
    sampler = _ShuffledPlaces(len(dataset), dataset.seed)
    return DataLoader(
        dataset, batch_size, sampler=sampler, num_workers=num_workers, pin_memory=torch.cuda.is_available()
    )


class AllFrames(Dataset[tuple[Tensor, Tensor, list[str]]]):
    """Every frame of a video, or every so many: items (frames, labels, keys) by the video's index.

    Args:
        source: The videos.
        size: Frames are resized to this square, without a crop; the aspect ratio is not kept.
        every: Take every so many frames; None: every 20th of a video file, and all images.
        on_error: "raise" where a video cannot be read, or "skip": it has no frames then.

    Raises:
        FileNotFoundError: If the list or videos are missing.
    """

    def __init__(
        self, source: VideoSource, *, size: int = 224, every: int | None = None, on_error: OnError = "raise"
    ) -> None:
        check_positive(size=size, every=1 if every is None else every)
        self.videos = _Videos(source, on_error)
        self.size, self.every = size, every

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, list[str]]:
        """Frames uint8 (n, 3, size, size), labels (n,) and n keys."""
        try:
            return self._all(index)
        except VideoError as error:
            self.videos.excuse(error)
        return torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8), torch.zeros(0, dtype=torch.long), []

    def _all(self, index: int) -> tuple[Tensor, Tensor, list[str]]:
        entry, opened = self.videos.open(index)
        with opened:
            stride = self.every or (1 if opened.names else VIDEO_FILE_STRIDE)
            frames = _frames_of(entry, opened)[::stride]
            # A few at a time: a long video in full size would not fit into memory.
            parts = [frames[place : place + _AT_ONCE] for place in range(0, len(frames), _AT_ONCE)]
            pixels = torch.cat([_to_bytes(resized(opened.read(part), self.size, self.size)) for part in parts])
        names = opened.names
        keys = [f"{entry.name}//{number}" if names is None else f"{entry.name}/{names[number]}" for number in frames]
        return pixels, torch.full((len(keys),), entry.label), keys


def frame_batches(dataset: AllFrames, videos: Sequence[int], *, batch_size: int, num_workers: int = 0) -> Iterator[Any]:
    """Batches (frames, labels, keys) of all frames of some videos, in order."""
    loader = DataLoader(dataset, batch_size=None, sampler=videos, num_workers=num_workers)
    waiting: list[tuple[Tensor, Tensor, str]] = []
    for frames, labels, keys in loader:
        waiting += zip(frames, labels, keys, strict=True)
        while len(waiting) >= batch_size:
            yield default_collate(waiting[:batch_size])
            waiting = waiting[batch_size:]
    if waiting:
        yield default_collate(waiting)


def _to_bytes(frames: Tensor) -> Tensor:
    return frames.round().clamp(0, 255).to(torch.uint8)

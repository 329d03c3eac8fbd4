"""Video classification from lists, and test sets that tell motion from still evidence (SCUBA, SCUFO)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.utilities import rank_zero_warn

from lightning_methods.datamodules._base import LightningDataModule
from lightning_methods.datamodules._video_clips import ClipTransform, Collate, Layout, OnError, VideoClips
from lightning_methods.datamodules._video_files import VideoKind
from lightning_methods.datamodules._video_lists import VideoEntry, VideoFinder, locate_videos, read_video_list
from lightning_methods.datamodules._video_sampling import Sampling
from lightning_methods.datamodules._video_transforms import RandomCrop
from lightning_methods.functional._logits import check_choice

Batch = tuple[Tensor, ...]

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class VideoSource:
    """A list of videos, where they are, and how many views of each are tested.

    Args:
        list_file: A text file, one video a line, fields separated by white space: `relative/path label` for video
            files, `folder num_frames label` for folders and ZIPs of frames. Labels count from 0; names must not
            contain spaces.
        root: The folder that the names are relative to. A ZIP or a single JPEG may lack its suffix in the list, and
            the list may have a class folder that is not on disk.
        kind: "frames", "zip", "video", or "auto", which looks at each path.
        template: Name of a frame by its number: "frame{:06d}.jpg" for HMDB51, UCF101 and the sets made from them,
            "{:06d}.jpg" for those made from Kinetics, "img_{:05}.jpg" for frames extracted with MMAction's tools.
            None: all images of the folder, in natural order.
        with_offset: Lines are `folder start num_frames label`.
        clips: Clips of a video in evaluation, where clips stay apart (layouts "bcthw" and "bncthw").
        crops: Crops of a clip in evaluation: 1, in the middle, or 3.

    Raises:
        ValueError: An option is none of these.
    """

    list_file: str | Path
    root: str | Path
    kind: VideoKind = "auto"
    template: str | None = None
    with_offset: bool = False
    clips: int = 1
    crops: Literal[1, 3] = 1

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, VideoKind)
        if self.clips < 1 or self.crops not in (1, 3):
            raise ValueError(f"`clips` must be at least 1 and `crops` 1 or 3, got {self.clips} and {self.crops}")

    def entries(self) -> list[VideoEntry]:
        """The lines of the list.

        Raises:
            FileNotFoundError: The list is missing.
            ValueError: A line does not have the fields.
        """
        return read_video_list(Path(self.list_file).expanduser(), self.kind, with_offset=self.with_offset)


class VideoListDataModule(LightningDataModule):
    """Clips of listed videos for training, and one loader for each test set.

    Batches are (video, label, index): the video normalised, float32, of shape `layout`; the index is the place in the
    list. In evaluation with several clips or crops of a video there is a dimension for these views after the first;
    `functional.average_views` joins their logits.

    The defaults are those of a temporal segment network (TSM): 8 segments of one frame. For networks on dense clips
    (Video Swin, SlowFast): `layout="bcthw", clips=1, clip_length=32, frame_step=2, random_crop="resized"`.

    Args:
        train: The training videos; None: nothing to fit.
        val: The validation videos; None: no validation.
        test: Test sets by name. Lightning numbers the loaders in this order; see `test_names`.
        batch_size: Videos per batch and process.
        num_workers: Processes that decode, per loader.
        layout: "btchw": the frames of all `clips` are one sequence. "bcthw", "bncthw": clips stay apart; with the
            latter there is a dimension for them even if there is one.
        clips: N in training, and for "btchw" in evaluation, too.
        clip_length: L, frames of a clip.
        frame_step: s, a clip takes every s-th frame.
        size: Side of the square that the network is fed in training.
        short_side: Shorter side of the frames before they are cropped, in training.
        random_crop: "multiscale" as temporal segment networks, or "resized": 8 % to 100 % of the area.
        test_size: Side of the square in evaluation; None: `size`.
        test_short_side: Shorter side in evaluation; None: `short_side`.
        mean: Of red, green and blue, in 0 … 255.
        std: Likewise.
        num_classes: If given, labels are checked against it.
        on_error: "raise" an error that names the file when a video is missing or cannot be decoded, or "skip" it: in
            training the next one in the list takes its place; in evaluation it is left out, so that a batch may even
            be empty. `skipped` counts, and the end of the stage warns.

    Raises:
        ValueError: An option is out of range. In `setup`: lines of a list that are not as expected, or labels out of
            range. From a loader: a video that cannot be decoded.
        FileNotFoundError: In `setup`: a list or videos are missing.
        ModuleNotFoundError: From a loader: a video file, and PyAV is not installed.
    """

    def __init__(
        self,
        train: VideoSource | None = None,
        val: VideoSource | None = None,
        test: Mapping[str, VideoSource] | None = None,
        *,
        batch_size: int = 16,
        num_workers: int = 4,
        layout: Layout = "btchw",
        clips: int = 8,
        clip_length: int = 1,
        frame_step: int = 1,
        size: int = 224,
        short_side: int = 256,
        random_crop: RandomCrop = "multiscale",
        test_size: int | None = None,
        test_short_side: int | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        num_classes: int | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__()
        test_size = test_size or size
        test_short_side = test_short_side or short_side
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("size", size, 1),
            ("test_size", test_size, 1),
            ("short_side", short_side, 1),
            ("test_short_side", test_short_side, test_size),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}")
        for name, choice, options in (
            ("layout", layout, Layout),
            ("random_crop", random_crop, RandomCrop),
            ("on_error", on_error, OnError),
        ):
            check_choice(name, choice, options)
        self.train = train
        self.val = val
        self.test = dict(test or {})
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.num_classes = num_classes
        self.on_error: OnError = on_error
        sampling = Sampling(clips, clip_length, frame_step)
        self.train_transform = ClipTransform(sampling, layout, size, short_side, mean, std, random_crop)
        self.test_transform = replace(
            self.train_transform, size=test_size, short_side=test_short_side, random_crop=None
        )
        self.datasets: dict[str, VideoClips] = {}

    @property
    def test_names(self) -> list[str]:
        """Names of the test sets, by the number of their loader."""
        return list(self.test)

    @property
    def skipped(self) -> dict[str, int]:
        """How many videos of each set could not be read so far."""
        return {name: int(dataset.unreadable.sum()) for name, dataset in self.datasets.items()}

    def setup(self, stage: str) -> None:
        """Reads the lists that the stage needs and looks for their videos."""
        if stage == "fit" and self.train is not None:
            self.datasets["train"] = self._dataset(self.train, self.train_transform)
        if stage in ("fit", "validate") and self.val is not None:
            self.datasets["val"] = self._dataset(self.val, self._evaluation(self.val))
        if stage == "test":
            for name, source in self._test_sources().items():
                self.datasets[f"test/{name}"] = self._dataset(source, self._evaluation(source))

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of random clips."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Batches of the validation videos, in order; none without such videos."""
        return self._loader("val") if "val" in self.datasets else []

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """A loader for each of `test_names`, in order."""
        return [self._loader(f"test/{name}") for name in self.test_names]

    def teardown(self, stage: str) -> None:  # noqa: ARG002 - Lightning's signature
        """Called at the end of a stage: warns of the videos that were skipped."""
        for name, count in self.skipped.items():
            if count:
                rank_zero_warn(
                    f"{count} of {len(self.datasets[name])} videos of {name!r} could not be read.", UserWarning
                )

    def _test_sources(self) -> dict[str, VideoSource]:
        return self.test

    def _collate(self, split: str) -> Collate:
        return Collate(self.datasets[split].transform.shape)

    def _evaluation(self, source: VideoSource) -> ClipTransform:
        transform = replace(self.test_transform, crops=source.crops)
        if transform.layout == "btchw":
            return transform
        return replace(transform, sampling=replace(transform.sampling, clips=source.clips))

    def _dataset(self, source: VideoSource, transform: ClipTransform) -> VideoClips:
        entries = source.entries()
        wrong = [entry for entry in entries if self.num_classes is not None and entry.label >= self.num_classes]
        if wrong:
            raise ValueError(
                f"{source.list_file}: {len(wrong)} of {len(entries)} labels are outside 0 … "
                f"{(self.num_classes or 0) - 1}; first: {wrong[0].label} of {wrong[0].name}"
            )
        finder = VideoFinder(Path(source.root).expanduser(), source.kind)
        paths = locate_videos(entries, finder, Path(source.list_file), self.on_error)
        return VideoClips(entries, paths, source.kind, source.template, transform, self.on_error)

    def _loader(self, split: str, *, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            self.datasets[split],
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=self._collate(split),
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class StaticBiasDataModule(VideoListDataModule):
    """`VideoListDataModule` with SCUBA test sets, whose batches say which frame makes the SCUFO twin of each clip.

    Loaders of `scuba` come after those of `test`. Their batches are (video, label, index, frame), and
    `functional.still_video(video, frame)` is the twin: one frame of the very clip, repeated. The frame is drawn from
    `seed` and the index, so that every run and every number of processes tests the same twins. A test step may read

        video, label, _, *frame = batch
        prediction = self(video)
        twin = self(still_video(video, *frame)) if frame else None
        report.update(name, prediction, twin, label)

    with a `metrics.StaticBiasReport(scuba, plain=test)`. Sets whose foregrounds conflict go into `test`.

    Args:
        train: As in `VideoListDataModule`.
        val: As in `VideoListDataModule`.
        test: As in `VideoListDataModule`.
        scuba: SCUBA sets by kind of background.
        seed: Of the frames that the twins repeat.
        options: The other options of `VideoListDataModule`.

    Raises:
        ValueError: A name is in both `test` and `scuba`; and as `VideoListDataModule`.
        FileNotFoundError: As `VideoListDataModule`.
        ModuleNotFoundError: As `VideoListDataModule`.
    """

    def __init__(
        self,
        train: VideoSource | None = None,
        val: VideoSource | None = None,
        test: Mapping[str, VideoSource] | None = None,
        scuba: Mapping[str, VideoSource] | None = None,
        *,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(train, val, test, **options)
        self.scuba = dict(scuba or {})
        self.seed = seed
        if both := sorted(self.test.keys() & self.scuba.keys()):
            raise ValueError(f"`test` and `scuba` must have different names, both have {both}")

    @property
    def test_names(self) -> list[str]:
        """Names of the test sets, by the number of their loader."""
        return [*self.test, *self.scuba]

    def _test_sources(self) -> dict[str, VideoSource]:
        return {**self.test, **self.scuba}

    def _collate(self, split: str) -> Collate:
        collate = super()._collate(split)
        if split not in {f"test/{name}" for name in self.scuba}:
            return collate
        return replace(collate, twin_frame=partial(twin_frame, self.seed, self.test_transform.length))


def twin_frame(seed: int, length: int, index: int) -> int:
    """Which of the `length` frames of a clip its SCUFO twin repeats; `index` is the clip's place in its list.

    Example:
        >>> [twin_frame(0, 8, index) for index in range(6)]
        [6, 4, 7, 4, 3, 5]
    """
    return int(np.random.default_rng((seed, index)).integers(length))

"""Weakly supervised video anomaly detection: UCF-Crime, TAD and lists of the same form, as clips or as features.

Videos to train on carry a label only; those to test on also say which frames are abnormal. A training sample is a bag:
some snippets of one video.

Settings are those of the code of Lv et al., "Unbiased Multiple Instance Learning for Weakly Supervised Video Anomaly
Detection", CVPR 2023, arXiv 2303.12369.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_methods.datamodules._base import LightningDataModule
from lightning_methods.datamodules._video_files import VideoKind
from lightning_methods.datamodules._wsvad_clips import CellClips, ClipShape, FixedClips, TrainingClips, VideoFolder
from lightning_methods.datamodules._wsvad_features import FeatureBags, FeatureLayout, check_file_name, find_features
from lightning_methods.datamodules._wsvad_lists import annotate
from lightning_methods.datamodules._wsvad_lists import read_temporal_annotations as read_temporal_annotations
from lightning_methods.datamodules._wsvad_lists import read_wsvad_list as read_wsvad_list
from lightning_methods.datamodules._wsvad_sampling import BalancedBags, num_cells
from lightning_methods.functional import VideoRecord as VideoRecord

Bag = dict[str, Tensor]
_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}


class _BagDataModule(LightningDataModule):
    """Lists, annotations and loaders; subclasses say what a split's bags are."""

    def __init__(
        self,
        root: str | Path,
        train_list: str | Path,
        test_list: str | Path,
        val_list: str | Path | None,
        annotations: str | Path | None,
        batch_size: int,
        num_snippets: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        if batch_size < 2 or batch_size % 2:
            raise ValueError(f"batch_size must be even and at least 2, for as many normal videos, got {batch_size}")
        if num_snippets < 1:
            raise ValueError(f"num_snippets must be at least 1, got {num_snippets}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        self.root = Path(root).expanduser()
        self.lists = {
            "train": Path(train_list).expanduser(),
            "val": Path(test_list if val_list is None else val_list).expanduser(),
            "test": Path(test_list).expanduser(),
        }
        self.annotations = None if annotations is None else Path(annotations).expanduser()
        self.batch_size = batch_size
        self.num_snippets = num_snippets
        self.num_workers = num_workers
        self.seed = seed
        self.records: dict[str, list[VideoRecord]] = {}
        self.datasets: dict[str, Dataset[Bag]] = {}

    def setup(self, stage: str) -> None:
        """Reads the lists that the stage needs and finds their videos."""
        for split in _SPLITS[stage]:
            self.records[split] = self.read_records(split)
            self.datasets[split] = self._dataset(split, self.records[split])

    def read_records(self, split: str) -> list[VideoRecord]:
        """The videos of "train", "val" or "test", before `setup` too: `FrameLevelAUROC(data.read_records("test"))`."""
        path = self.lists[split]
        records = read_wsvad_list(path)
        if self.annotations is not None and path == self.lists["test"] and split != "train":
            records = annotate(records, read_temporal_annotations(self.annotations), path, self.annotations)
        return records

    def train_dataloader(self) -> DataLoader[Bag]:
        """Bags of as many normal as abnormal videos, in an order of its own each epoch."""
        trainer = self.trainer
        sampler = BalancedBags(
            [record.label for record in self.records["train"]],
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )
        return self._loader("train", self.batch_size, sampler)

    def _dataset(self, split: str, records: Sequence[VideoRecord]) -> Dataset[Bag]:
        raise NotImplementedError

    def _loader(self, split: str, batch_size: int, sampler: BalancedBags | None = None) -> DataLoader[Bag]:
        return DataLoader(
            self.datasets[split],
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class SnippetFeatureDataModule(_BagDataModule):
    """Bags of features that were extracted before, one .npy file a video, for any list in the form of UCF-Crime's.

    Training batches hold `features` (B, K, D), `label` (B,) with 0 for normal, `vid` (B,), the place of the video in
    the list, `frame_index` (B, K), the middle frame of each snippet, `total_frames` (B,), and with `strong_view`
    `features_strong` (B, K, D). A snippet is the mean of the rows in one of K equal parts of the video.

    Validation and test batches are one video each with all R of its rows: `features` (1, R, D), and `snippet_index`
    (1, R), so that `metric.update(batch["vid"][:, None].expand_as(scores), batch["snippet_index"], scores)` feeds a
    frame-level metric.

    There is no official validation split. **By default validation batches are the test videos**, as in the authors'
    code: a checkpoint chosen by them is chosen on the test set. Give `val_list` to choose honestly.

    Args:
        root: Folder of the feature files.
        train_list: Lines "path 0 num_frames class"; see `read_wsvad_list`.
        test_list: Lines "path num_frames class start end [start end]".
        val_list: In the form of `test_list`; None validates on the test videos.
        annotations: UCF-Crime's file of temporal annotations, whose intervals take the place of those in `test_list`;
            see `read_temporal_annotations`.
        file_name: Of a video's features: `{name}` is the last component of its path in the list, such as
            "Abuse028_x264.mp4", `{stem}` the same without the suffix.
        layout: Axes of a file: "kd" for (rows, D); "kcd" for (rows, crops, D) and "ckd" for (crops, rows, D) where
            each row was extracted from several crops of the frames, usually ten. Their mean is taken.
        strong_view: Whether training batches hold a second view: one crop, drawn for the whole video. Needs a layout
            with crops. Our own choice: published methods on features have no second view.
        frames_per_row: Frames that a row was extracted from, 16 for most I3D features: files whose number of rows does
            not fit the video's frames are then an error. None does not check.
        batch_size: Videos per batch and process, even: half of them are normal.
        num_snippets: K.
        num_workers: Processes that read files, per loader.
        seed: Seed of the training order.

    Attributes:
        records: Videos of each split, after `setup`.

    Raises:
        ValueError: An argument does not fit. In `setup`: a list, annotation or feature file is malformed, or they
            contradict each other; the message names file and video.
        FileNotFoundError: In `setup`: a list or feature files are missing.
    """

    def __init__(
        self,
        root: str | Path,
        train_list: str | Path,
        test_list: str | Path,
        val_list: str | Path | None = None,
        annotations: str | Path | None = None,
        file_name: str = "{name}.npy",
        layout: FeatureLayout = "kd",
        strong_view: bool = False,
        frames_per_row: int | None = None,
        batch_size: int = 32,
        num_snippets: int = 32,
        num_workers: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root, train_list, test_list, val_list, annotations, batch_size, num_snippets, num_workers, seed
        )
        check_file_name(file_name)
        if layout not in get_args(FeatureLayout):
            raise ValueError(f"layout must be one of {get_args(FeatureLayout)}, got {layout!r}")
        if strong_view and layout == "kd":
            raise ValueError('strong_view needs a layout with crops, "kcd" or "ckd", got "kd"')
        if frames_per_row is not None and frames_per_row < 1:
            raise ValueError(f"frames_per_row must be at least 1 or None, got {frames_per_row}")
        self.file_name = file_name
        self.layout: FeatureLayout = layout
        self.strong_view = strong_view
        self.frames_per_row = frames_per_row

    def val_dataloader(self) -> DataLoader[Bag]:
        """One validation video a batch, in order."""
        return self._loader("val", 1)

    def test_dataloader(self) -> DataLoader[Bag]:
        """One test video a batch, in order."""
        return self._loader("test", 1)

    def predict_dataloader(self) -> DataLoader[Bag]:
        """The test batches."""
        return self.test_dataloader()

    def _dataset(self, split: str, records: Sequence[VideoRecord]) -> Dataset[Bag]:
        files = find_features(records, self.root, self.file_name, self.layout, self.frames_per_row)
        train = split == "train"
        rows = self.num_snippets if train else None
        return FeatureBags(records, files, self.layout, rows, crop_view=train and self.strong_view)


class _ClipDataModule(_BagDataModule):
    """Bags of clips from videos on disk; see `UCFCrimeDataModule`."""

    class_names: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        root: str | Path,
        train_list: str | Path,
        test_list: str | Path,
        val_list: str | Path | None = None,
        annotations: str | Path | None = None,
        kind: VideoKind = "auto",
        template: str | None = "img_{:08}.jpg",
        batch_size: int = 2,
        num_snippets: int = 16,
        clip_length: int = 5,
        frame_interval: int = 6,
        strong_view: bool = True,
        resample_views: bool = False,
        num_workers: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root, train_list, test_list, val_list, annotations, batch_size, num_snippets, num_workers, seed
        )
        if clip_length < 1 or frame_interval < 1:
            found = f"{clip_length} and {frame_interval}"
            raise ValueError(f"clip_length and frame_interval must be at least 1, got {found}")
        self.folder = VideoFolder(self.root, kind, template)
        self.shape = ClipShape(num_snippets, clip_length, frame_interval)
        self.strong_view = strong_view
        self.resample_views = resample_views

    @property
    def cells_per_video(self) -> Tensor:
        """Cells that each training video is scored in, (videos,) int64; read from the list, before `setup` too."""
        counts = [num_cells(record.num_frames, self.shape.span) for record in self.read_records("train")]
        return torch.tensor(counts)

    def val_dataloader(self) -> DataLoader[Bag]:
        """Bags of K clips of each validation video, in order."""
        return self._loader("val", self.batch_size)

    def test_dataloader(self) -> DataLoader[Bag]:
        """All cells of all test videos in order, as many clips a batch as in training."""
        return self._loader("test", self.batch_size * self.num_snippets)

    def predict_dataloader(self) -> DataLoader[Bag]:
        """The test batches."""
        return self.test_dataloader()

    def _dataset(self, split: str, records: Sequence[VideoRecord]) -> Dataset[Bag]:
        wrong = next((record for record in records if record.label >= len(self.class_names)), None)
        if wrong is not None:
            expected = f"0 … {len(self.class_names) - 1} ({', '.join(self.class_names)})"
            raise ValueError(f"{self.lists[split]}: {wrong.path} has class {wrong.label}, expected {expected}")
        if split == "train":
            return TrainingClips(records, self.folder, self.shape, self.strong_view, self.resample_views)
        return (CellClips if split == "test" else FixedClips)(records, self.folder, self.shape)


class UCFCrimeDataModule(_ClipDataModule):
    """UCF-Crime (Sultani et al., CVPR 2018) as bags of clips: 1,610 videos to train on, 290 to test on.

    Training batches hold `clips` (B, K, 3, T, 224, 224), `label` (B,), `vid` (B,), the place of the video in the list,
    `frame_index` (B, K), the middle frame of each clip, `total_frames` (B,), and with `strong_view` `clips_strong` of
    the shape of `clips`. Validation batches are the same without strong view, with K clips spread evenly; test batches
    hold one clip for each cell of 30 frames, (B, 1, 3, T, 224, 224). Both have `snippet_index` (B, K), so that
    `metric.update(batch["vid"][:, None].expand_as(scores), batch["snippet_index"], scores)` feeds a frame-level metric.

    The weak view is that of evaluation: shorter side to 256, centre 224. The strong one has random crops, colours and
    RandAugment, with one choice for all frames of a video.

    There is no official validation split. **By default validation batches are the test videos**, as in the authors'
    code: a checkpoint chosen by them is chosen on the test set. Give `val_list` to choose honestly.

    Args:
        root: Folder that the lists' paths are relative to; they may also be relative to `root/frames`. In the authors'
            layout that holds `<class>/<video>.mp4/img_00000000.jpg` and so on, the .mp4 being a folder; video files in
            the place of these folders do as well (with the extra `video`).
        train_list: Lines "path 0 num_frames class"; see `read_wsvad_list`.
        test_list: Lines "path num_frames class start end start end".
        val_list: In the form of `test_list`; None validates on the test videos.
        annotations: UCF-Crime's file of temporal annotations, whose intervals take the place of those in `test_list`;
            see `read_temporal_annotations`.
        kind: "frames" (folders of images), "video", "zip", or "auto", which looks at each path.
        template: Name of a frame by its number, for folders and ZIPs; None takes all images in order.
        batch_size: Videos per batch and process, even: half of them are normal.
        num_snippets: K, clips of a bag.
        clip_length: T, frames of a clip.
        frame_interval: From one frame of a clip to the next. A clip stands for `clip_length * frame_interval` frames.
        strong_view: Whether training batches hold a strongly augmented view too.
        resample_views: Whether the strong view draws places of its own, as the authors' code does. It then shares with
            the weak view only the part of the video that a clip comes from. False, our choice, takes the same frames.
        num_workers: Processes that decode videos, per loader.
        seed: Seed of the training order.

    Attributes:
        class_names: By label.
        records: Videos of each split, after `setup`.

    Raises:
        ValueError: An argument does not fit. In `setup`: a list or annotation is malformed, or they contradict each
            other. From a loader: a video is damaged, or has another number of frames than the list says.
        FileNotFoundError: In `setup`: a list or videos are missing.
    """

    class_names: ClassVar[tuple[str, ...]] = (
        "Normal",
        "Abuse",
        "Arrest",
        "Arson",
        "Assault",
        "Burglary",
        "Explosion",
        "Fighting",
        "RoadAccidents",
        "Robbery",
        "Shooting",
        "Shoplifting",
        "Stealing",
        "Vandalism",
    )


class TADDataModule(_ClipDataModule):
    """TAD, traffic anomalies (Lv et al., TIP 2021), as bags of clips: 400 videos to train on, 100 to test on.

    Batches, arguments and errors are those of `UCFCrimeDataModule`. Lines of `test_list` have one interval; those of
    normal videos, which read "0 num_frames", have none here. In 13 of the 60 abnormal test videos the anomaly starts at
    frame 0, which published numbers take for normal: see `FrameLevelAUROC`.
    """

    class_names: ClassVar[tuple[str, ...]] = (
        "Normal",
        "Accident",
        "IllegalTurn",
        "IllegalOccupation",
        "Retrograde",
        "Else",
        "PedestrianOnRoad",
        "RoadSpills",
    )

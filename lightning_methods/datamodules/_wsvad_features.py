"""Features of videos that were extracted before, one .npy file a video."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_methods.functional import VideoRecord

#: What the axes of a file are: k rows in time, c crops, d features.
FeatureLayout: TypeAlias = Literal["kd", "kcd", "ckd"]
Bag: TypeAlias = dict[str, Tensor]


class FeatureFile(NamedTuple):
    """Where the features of a video are, how many rows they have, and how wide these are."""

    path: Path
    rows: int
    width: int


class FeatureBags(Dataset[Bag]):
    """The features of one video, as a bag of K snippets or all of its rows.

    Args:
        records: The videos.
        files: The features of each, from `find_features`.
        layout: Of the files.
        num_snippets: K: rows are averaged over K equal parts of the video. None gives all rows, and their numbers as
            `snippet_index`.
        crop_view: Whether to add `features_strong`: one crop drawn at random for the whole video.
    """

    def __init__(
        self,
        records: Sequence[VideoRecord],
        files: Sequence[FeatureFile],
        layout: FeatureLayout,
        num_snippets: int | None,
        crop_view: bool = False,
    ) -> None:
        self.records = records
        self.files = files
        self.layout = layout
        self.num_snippets = num_snippets
        self.crop_view = crop_view

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Bag:
        record = self.records[index]
        values = _load(self.files[index].path).astype(np.float32)  # halves would overflow in the sums below
        crops = values[None] if self.layout == "kd" else values.swapaxes(0, 1) if self.layout == "kcd" else values
        rows = self.num_snippets or crops.shape[1]
        bag = {
            "features": self._snippets(crops.mean(0)),
            "label": torch.tensor(record.label),
            "vid": torch.tensor(index),
            "frame_index": (2 * torch.arange(rows) + 1) * record.num_frames // (2 * rows),
            "total_frames": torch.tensor(record.num_frames),
        }
        if self.crop_view:
            bag["features_strong"] = self._snippets(crops[int(torch.randint(len(crops), ()))])
        if self.num_snippets is None:
            bag["snippet_index"] = torch.arange(rows)
        return bag

    def _snippets(self, rows: Any) -> Tensor:
        return torch.from_numpy(rows if self.num_snippets is None else average_bins(rows, self.num_snippets))


def average_bins(rows: Any, bins: int) -> Any:
    """Means over the rows of `bins` equal parts, (R, D) -> (bins, D).

    Part k holds the rows from ⌊k R / bins⌋ up to ⌊(k + 1) R / bins⌋; where that is none, the first of them.
    """
    edges = np.arange(bins + 1) * len(rows) // bins
    # reduceat takes one row where a part is empty, hence at least 1.
    sums = np.add.reduceat(rows, edges[:-1], axis=0)
    return sums / np.diff(edges).clip(min=1).astype(rows.dtype)[:, None]


def check_file_name(file_name: str) -> None:
    """Has a place for the video's name, and for nothing else."""
    try:
        fits = file_name.format(name="a", stem="a") != file_name.format(name="b", stem="b")
    except (LookupError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(
            f"file_name must have a place for {{name}} or {{stem}}, such as '{{name}}.npy', got {file_name!r}"
        )


def find_features(
    records: Sequence[VideoRecord],
    root: Path,
    file_name: str,
    layout: FeatureLayout,
    frames_per_row: int | None,
) -> list[FeatureFile]:
    """The feature file of each video, after a look at the head of each file.

    Raises:
        FileNotFoundError: Files are missing; the message counts them and shows the first.
        ValueError: Two videos have one name; a file is damaged, has another shape or width than the first, or, with
            `frames_per_row`, as many rows as a video of another length.
    """
    name, times = Counter(record.name for record in records).most_common(1)[0]
    if times > 1:
        raise ValueError(
            f"{times} videos of the list are called {name}, so a feature file cannot say which it belongs to"
        )
    paths = [root / file_name.format(name=record.name, stem=Path(record.name).stem) for record in records]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} feature files are missing; first: {missing[0]}. "
            f"Expected one .npy file for each video in {root}, named {file_name!r}"
        )
    files = [FeatureFile(path, *_size(path, layout)) for path in paths]
    other = next((file for file in files if file.width != files[0].width), None)
    if other is not None:
        raise ValueError(f"{other.path} has {other.width} features a row, but {files[0].path} has {files[0].width}")
    if frames_per_row is not None:
        for record, file in zip(records, files, strict=True):
            _check_length(record, file, frames_per_row)
    return files


def _size(path: Path, layout: FeatureLayout) -> tuple[int, int]:
    """Rows and their width."""
    values = _load(path, mmap_mode="r")
    if values.ndim != len(layout) or values.dtype.kind != "f" or 0 in values.shape:
        expected = f"numbers with a point, of shape ({', '.join(layout.upper())}), none of them 0"
        raise ValueError(f"{path} must hold {expected}, as `layout` {layout!r} says; got {values.dtype} {values.shape}")
    return values.shape[layout.index("k")], values.shape[-1]


def _check_length(record: VideoRecord, file: FeatureFile, frames_per_row: int) -> None:
    least = record.num_frames // frames_per_row
    most = -(-record.num_frames // frames_per_row)
    if not least <= file.rows <= most:
        raise ValueError(
            f"{file.path} has {file.rows} rows of {frames_per_row} frames, {file.rows * frames_per_row} in all, but "
            f"{record.name} has {record.num_frames} frames in the list: {least} to {most} rows"
        )


def _load(path: Path, mmap_mode: Literal["r"] | None = None) -> Any:
    try:
        values = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an .npy file: {error}") from error
    if not isinstance(values, np.ndarray):
        raise ValueError(f"{path} must be an .npy file with one array, but is an .npz archive")
    return values

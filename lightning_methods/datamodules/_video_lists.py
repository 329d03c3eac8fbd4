"""Lists of videos with labels, as MMAction and its relatives write them, and where the videos lie.

One video a line, fields separated by white space: `folder num_frames label` for frames, `relative/path label` for
video files, `folder start num_frames label` where a video is a stretch of a longer one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_methods.datamodules._video_files import VideoKind

_FORMS: dict[int, str] = {
    2: "relative/path label",
    3: "folder num_frames label",
    4: "folder start num_frames label",
}


@dataclass(frozen=True)
class VideoEntry:
    """A line of a list.

    Args:
        name: The video's name in the list.
        label: Class index.
        num_frames: How many frames it has; None: all that are there.
        start: How many frames of the folder come before it.
    """

    name: str
    label: int
    num_frames: int | None = None
    start: int = 0

    def length(self, there: int) -> int:
        """Frames of the entry in a video of `there` frames: as many as the line says, or all from `start` on."""
        return there - self.start if self.num_frames is None else self.num_frames


def read_video_list(path: Path, kind: VideoKind, *, with_offset: bool = False) -> list[VideoEntry]:
    """The lines of a list.

    Args:
        path: The list.
        kind: Of the videos: "video" lists have two fields, "frames" and "zip" lists three; with "auto" the first line
            decides which.
        with_offset: Four fields instead.

    Raises:
        FileNotFoundError: The list is missing.
        ValueError: It is empty, or a line does not have the fields. The message gives the number of the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"list {path} is missing. Expected lines such as {_FORMS[2]!r} or {_FORMS[3]!r}")
    lines = [(number, line.split()) for number, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty. Expected lines such as {_FORMS[2]!r} or {_FORMS[3]!r}")
    if with_offset:
        count = 4
    elif kind == "auto":
        count = 2 if len(lines[0][1]) == 2 else 3
    else:
        count = 2 if kind == "video" else 3
    return [_entry(path, number, fields, count) for number, fields in lines]


def _entry(path: Path, number: int, fields: Sequence[str], count: int) -> VideoEntry:
    name, *values = fields
    where = f"{path}, line {number}: {' '.join(fields)!r}"
    if len(fields) != count:
        hint = "; names must not contain spaces" if len(fields) > count else ""
        raise ValueError(f"{where} has {len(fields)} fields, expected {count}, {_FORMS[count]!r}{hint}")
    if not all(value.isdecimal() for value in values):
        raise ValueError(f"{where} must be {_FORMS[count]!r}, with whole numbers after the name")
    *frames, label = map(int, values)
    if not frames:
        return VideoEntry(name, label)
    if frames[-1] < 1:
        raise ValueError(f"{where} has no frames")
    return VideoEntry(name, label, frames[-1], frames[0] if len(frames) == 2 else 0)


class VideoFinder:
    """Where the videos of lists lie under a folder.

    A name may be that of a folder, a file, a ZIP without its suffix, or a single JPEG without its suffix (a SCUFO
    video). Where a list has a class folder before the name that the files lack, as the lists of Kinetics backgrounds
    do, it is left out.

    Args:
        root: The folder.
        kind: What to look for.
    """

    def __init__(self, root: Path, kind: VideoKind) -> None:
        self.root = root
        self.kind = kind
        self._listings: dict[Path, set[str]] = {}

    def find(self, name: str) -> Path | None:
        """The path of a video; None if there is none."""
        for place in dict.fromkeys((self.root / name, self.root / Path(name).name)):
            for candidate in self._spellings(place):
                # One listing per folder instead of one look-up per video, which network disks answer slowly.
                if candidate.name in self._listing(candidate.parent):
                    return candidate
        return None

    def _spellings(self, place: Path) -> Iterator[Path]:
        yield place
        for suffix, kinds in ((".zip", ("auto", "zip")), (".jpg", ("auto", "frames"))):
            if self.kind in kinds:
                yield place.with_name(place.name + suffix)

    def _listing(self, folder: Path) -> set[str]:
        if folder not in self._listings:
            self._listings[folder] = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        return self._listings[folder]


def locate_videos(
    entries: Sequence[VideoEntry], finder: VideoFinder, list_file: Path, on_error: Literal["raise", "skip"]
) -> list[Path | None]:
    """The path of each entry; with `on_error="skip"`, None for those that are missing.

    Raises:
        FileNotFoundError: Videos are missing, or, with "skip", all of them. The message counts them and names the
            first.
    """
    paths = [finder.find(entry.name) for entry in entries]
    missing = [entry.name for entry, path in zip(entries, paths, strict=True) if path is None]
    if missing and (on_error == "raise" or len(missing) == len(paths)):
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} videos of {list_file} are not under {finder.root}; first: {missing[0]}"
        )
    return paths

"""Writes SCUBA, SCUFO and conflicting-foreground test sets: folders of frames, a list, and a manifest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from lightning_methods.datamodules._scuba_folder import Record, SetFolder, digest
from lightning_methods.datamodules._scuba_parts import Backgrounds, MaskReader, background_source, mask_reader
from lightning_methods.datamodules._video_clips import OnError
from lightning_methods.datamodules._video_files import VideoError, open_video
from lightning_methods.datamodules._video_lists import VideoEntry, VideoFinder
from lightning_methods.datamodules.stillmix import VideoSource
from lightning_methods.functional.stillmix_scuba import (
    conflicting_foreground,
    foreground_valid,
    replace_background,
)


def build_scuba(
    videos: VideoSource,
    masks: str | Path | MaskReader | None,
    backgrounds: Literal["stripes"] | str | Path,
    out: str | Path,
    *,
    per_video: int = 5,
    seed: int,
    conflicting: bool = False,
    valid_only: bool = False,
    on_error: OnError = "raise",
    progress: Callable[[int, int], None] = lambda done, total: None,  # noqa: ARG005
) -> Path:
    """Writes videos whose foreground moves before a still background of another scene.

    For the video `NAME` of the list, and k = 0 … `per_video` − 1, the folder `out/NAME__k` holds `frame000001.jpg` and
    so on; `out/list.txt` has the lines `NAME__k num_frames label`; `out/manifest.json` says what each was made from.
    A `VideoSource(out / "list.txt", out, "frames", "frame{:06d}.jpg")` reads them.

    Every folder, the list and the manifest appear whole or not at all, the list and the manifest's videos last. A call
    with the same arguments goes on where one was stopped. What is drawn depends on `seed`, the video's name and k
    alone.

    Args:
        videos: The videos.
        masks: A folder of masks: for each video a folder, ZIP or video file of its name, white in the foreground, or
            `NAME/puppet_mask.mat` as in JHMDB. Or a function of a video's name and frames, uint8 (T, 3, H, W), that
            returns masks (T, H, W), such as one around `functional.boxes_to_masks`. None: what moves, by
            `functional.fame_foreground_mask`, of every 16 frames; it is half of the frame, and a guess.
        backgrounds: "stripes", or a folder of images.
        out: Folder to write to.
        per_video: Videos to make from each.
        seed: Of the backgrounds, and of the still foregrounds.
        conflicting: Put the foreground of one frame of another video, of another class if there is one, behind the
            moving one.
        valid_only: Leave out videos whose foreground is too small, see `functional.foreground_valid`.
        on_error: "raise" if a video or its masks cannot be read, or "skip" the video; the manifest says why.
        progress: Takes how many of the videos in the list are done, and how many there are.

    Returns:
        The path of the list.

    Raises:
        ValueError: A video, its masks or a background cannot be read, an option is out of range, two videos have the
            same name, nothing could be made, or `out` holds a set made with other arguments.
        FileNotFoundError: The list is missing.
    """
    if per_video < 1:
        raise ValueError(f"`per_video` must be at least 1, got {per_video}")
    read_masks, masks_name = mask_reader(masks)
    entries = videos.entries()
    _check_names(entries, videos)
    settings = {
        "kind": "conflicting foreground" if conflicting else "scuba",
        "videos": digest(*(repr(entry) for entry in entries)),
        "masks": masks_name,
        "backgrounds": str(backgrounds),
        "per_video": per_video,
        "seed": seed,
        "valid_only": valid_only,
    }
    folder = SetFolder(Path(out).expanduser(), settings)
    maker = _Maker(
        entries=entries,
        reader=_Reader(videos),
        read_masks=read_masks,
        backgrounds=background_source(backgrounds),
        folder=folder,
        settings=settings,
        conflicting=conflicting,
        valid_only=valid_only,
    )
    skipped = {}
    for done, entry in enumerate(entries):
        progress(done, len(entries))
        if entry.name in folder.made:
            continue
        try:
            folder.add(entry.name, maker.make(entry))
        except VideoError as error:
            if on_error == "raise" and not isinstance(error, _TooSmallError):
                raise
            skipped[entry.name] = str(error)
    progress(len(entries), len(entries))
    made = {name: record for entry in entries for name, record in folder.made.get(entry.name, {}).items()}
    return folder.finish(made, skipped)


def build_scufo(scuba: VideoSource, out: str | Path, *, seed: int) -> Path:
    """Writes the SCUFO twin of each video of a SCUBA set: one of its frames, `out/NAME.jpg`, and `out/list.txt`.

    The frame is drawn from all frames of the video. The published numbers draw it from the frames that a clip samples,
    as `StaticBiasDataModule` does without writing anything.

    Args:
        scuba: The SCUBA set.
        out: Folder to write to, another one than that of the SCUBA set.
        seed: Of the frames; what is drawn depends on it and the video's name alone.

    Returns:
        The path of the list, lines `NAME 1 label`.

    Raises:
        ValueError: A video cannot be read, two have the same name, or `out` holds a set made with other arguments.
        FileNotFoundError: The list is missing.
    """
    entries, reader = scuba.entries(), _Reader(scuba)
    _check_names(entries, scuba)
    settings = {"kind": "scufo", "videos": digest(*(repr(entry) for entry in entries)), "seed": seed}
    folder = SetFolder(Path(out).expanduser(), settings)
    for entry in entries:
        if entry.name in folder.made:
            continue
        with open_video(reader.path(entry), kind=scuba.kind, template=scuba.template) as source:
            number = int(_rng(seed, entry.name).integers(entry.length(source.num_frames)))
            (frame,) = source.read([entry.start + number])
        name = _stem(entry)
        folder.write_frame(name, frame)
        record = {"source": entry.name, "label": entry.label, "num_frames": 1, "frame": number, "seed": seed}
        folder.add(entry.name, {name: record})
    made = {name: record for entry in entries for name, record in folder.made[entry.name].items()}
    return folder.finish(made, {})


class _Reader:
    """Whole videos of a list."""

    def __init__(self, videos: VideoSource) -> None:
        self.videos = videos
        self._finder = VideoFinder(Path(videos.root).expanduser(), videos.kind)

    def path(self, entry: VideoEntry) -> Path:
        path = self._finder.find(entry.name)
        if path is None:
            raise VideoError(f"{self._finder.root}: has no video {entry.name}")
        return path

    def frames(self, entry: VideoEntry) -> Tensor:
        """uint8 (T, 3, H, W)."""
        with open_video(self.path(entry), kind=self.videos.kind, template=self.videos.template) as source:
            return source.read(range(entry.start, entry.start + entry.length(source.num_frames)))


class _TooSmallError(VideoError):
    """A foreground that is not worth a test video."""


@dataclass(frozen=True)
class _Maker:
    """Makes the videos of one entry of the list after the other."""

    entries: Sequence[VideoEntry]
    reader: _Reader
    read_masks: MaskReader
    backgrounds: Backgrounds
    folder: SetFolder
    settings: Mapping[str, Any]
    conflicting: bool
    valid_only: bool

    def make(self, entry: VideoEntry) -> dict[str, Record]:
        """Writes the videos, and returns what the manifest says of each."""
        frames = self.reader.frames(entry)
        masks = self.read_masks(entry.name, frames)
        if self.valid_only and not foreground_valid(masks).video:
            raise _TooSmallError("its foreground is too small")
        made: dict[str, Record] = {}
        for number in range(self.settings["per_video"]):
            name = f"{_stem(entry)}__{number}"
            rng = _rng(self.settings["seed"], name)
            background, about = self.backgrounds.draw(rng)
            record: dict[str, Any] = {
                "source": entry.name,
                "label": entry.label,
                "num_frames": len(frames),
                "background": about,
                "seed": self.settings["seed"],
                "masks": self.settings["masks"],
            }
            if self.conflicting:
                still, still_mask, record["still"] = self._still(entry, rng)
                video = conflicting_foreground(frames, masks, still, still_mask, background)
            else:
                video = replace_background(frames, masks, background)
            self.folder.write_video(name, video)
            made[name] = record
        return made

    def _still(self, entry: VideoEntry, rng: np.random.Generator) -> tuple[Tensor, Tensor, Mapping[str, Any]]:
        """A frame of another video, its mask, and what the manifest says of it."""
        others = [other for other in self.entries if other.label != entry.label] or [
            other for other in self.entries if other is not entry
        ]
        if not others:
            raise ValueError("`conflicting` needs at least two videos")
        other = others[int(rng.integers(len(others)))]
        frames = self.reader.frames(other)
        number = int(rng.integers(len(frames)))
        return frames[number], self.read_masks(other.name, frames)[number], {"source": other.name, "frame": number}


def _check_names(entries: Sequence[VideoEntry], videos: VideoSource) -> None:
    seen: set[str] = set()
    for entry in entries:
        if _stem(entry) in seen:
            raise ValueError(f"{videos.list_file}: {entry.name} is in the list twice, or with two suffixes")
        seen.add(_stem(entry))


def _stem(entry: VideoEntry) -> str:
    """The name without the suffix of a video file; names of folders may have points."""
    stem, point, suffix = entry.name.rpartition(".")
    return stem if point and suffix.lower() in ("avi", "mkv", "mov", "mp4", "webm", "zip") else entry.name


def _rng(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng((seed, int(digest(name), 16)))

"""Videos with texts: which frames are taken of a clip, and how they become what a network is fed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from lightning_methods.datamodules._video_files import VideoError, open_video

FrameChoice: TypeAlias = Literal["random", "headtail", "uniform"]
OnError: TypeAlias = Literal["raise", "replace"]
#: Takes a path, how many frames and how they are chosen, and a side; returns uint8 (T, 3, side, side).
ClipLoader: TypeAlias = Callable[[Path, int, FrameChoice, int], Tensor]

# CLIP's normalisation.
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
_MOST_REPLACED = 10


def choose_frames(num_frames: int, count: int, how: FrameChoice) -> list[int]:
    """Numbers of the frames that are taken of a clip, in ascending order.

    Args:
        num_frames: Frames of the clip.
        count: Frames to take.
        how: "random": different frames, drawn by torch's global generator. "headtail": half of them from each half of
            the clip. "uniform": 0, s, 2s, ... with the step s = num_frames // count. Of a clip that is too short for
            different frames, some are taken repeatedly, evenly.

    Example:
        >>> choose_frames(17, 4, "uniform")
        [0, 4, 8, 12]
        >>> choose_frames(2, 4, "random")
        [0, 0, 1, 1]
    """
    if num_frames < count:
        return [place * num_frames // count for place in range(count)]
    if how == "uniform":
        return [place * (num_frames // count) for place in range(count)]
    if how == "headtail":
        middle, head = num_frames // 2, count // 2
        head = min(head, middle)
        tail = [middle + index for index in choose_frames(num_frames - middle, count - head, "random")]
        return [*choose_frames(middle, head, "random"), *tail]
    return sorted(torch.randperm(num_frames)[:count].tolist())


def load_clip(path: Path, count: int, how: FrameChoice, side: int) -> Tensor:
    """Some frames of a video, each squeezed into a square as TW-BERT's authors do (the aspect ratio is not kept).

    Returns:
        (count, 3, side, side), uint8.

    Raises:
        VideoError: The video cannot be read; the message names the file.
    """
    with open_video(path) as video:
        frames = video.read(choose_frames(video.num_frames, count, how))
    resized = F.interpolate(frames.float(), (side, side), mode="bilinear", antialias=True, align_corners=False)
    return resized.round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class ClipSamples:
    """Samples as columns of one length.

    Args:
        paths: Of the videos.
        texts: Texts by their key in the batch; several to one sample are alternatives, of which one is drawn.
        numbers: Integers by their key in the batch.
    """

    paths: Sequence[Path]
    texts: Mapping[str, Sequence[Sequence[str]]]
    numbers: Mapping[str, Sequence[int]]


class ClipFiles(Dataset[dict[str, Any]]):
    """Samples whose videos are read when they are asked for, as "video" (T, 3, side, side), normalised as for CLIP.

    Args:
        samples: What to read.
        num_frames: T.
        how: How the frames are chosen.
        side: Side of a frame in pixels.
        loader: Reads a clip.
        on_error: What becomes of a sample whose video cannot be read: the error, or another sample, drawn at random.
    """

    def __init__(
        self,
        samples: ClipSamples,
        num_frames: int,
        how: FrameChoice,
        side: int,
        loader: ClipLoader = load_clip,
        on_error: OnError = "raise",
    ) -> None:
        self.samples, self.num_frames, self.how, self.side = samples, num_frames, how, side
        self.loader, self.on_error = loader, on_error

    def __len__(self) -> int:
        return len(self.samples.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for _ in range(_MOST_REPLACED):
            try:
                frames = self.loader(self.samples.paths[index], self.num_frames, self.how, self.side)
                break
            except VideoError:
                if self.on_error == "raise":
                    raise
                index = int(torch.randint(len(self), ()))
        else:
            raise VideoError(
                f"{_MOST_REPLACED} videos in a row cannot be read; the last is {self.samples.paths[index]}. "
                f'on_error="raise" says why.'
            )
        texts = {key: _one_of(column[index]) for key, column in self.samples.texts.items()}
        numbers = {key: column[index] for key, column in self.samples.numbers.items()}
        return {"video": (frames.float() / 255 - _MEAN) / _STD, **texts, **numbers}


def _one_of(texts: Sequence[str]) -> str:
    # No draw where there is no choice: evaluation leaves the generator alone.
    return texts[int(torch.randint(len(texts), ()))] if len(texts) > 1 else texts[0]


def find_videos(folder: Path, names: Sequence[str], layout: str) -> dict[str, Path]:
    """Path of each video by its name without a suffix: a file of any format, an array, a ZIP or a folder of images.

    Raises:
        FileNotFoundError: Videos are missing. The message counts them and names the first.
    """
    wanted = list(dict.fromkeys(names))
    there = {path.stem if path.is_file() else path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
    if missing := [name for name in wanted if name not in there]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(wanted)} videos are not in {folder}; first: {missing[0]}. {layout}"
        )
    return {name: there[name] for name in wanted}


def check_clip_options(num_frames: int, image_size: int, batch_size: int, num_workers: int, on_error: str) -> None:
    """Raises a ValueError that names the first of the options that is wrong."""
    for name, value, least in (
        ("num_frames", num_frames, 1),
        ("image_size", image_size, 1),
        ("batch_size", batch_size, 1),
        ("num_workers", num_workers, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error must be one of {', '.join(get_args(OnError))}, got {on_error!r}")

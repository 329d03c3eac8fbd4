"""What every form of a video on disk offers: a number of frames, some of them, or all in turn."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


class VideoError(ValueError):
    """A video cannot be read; the message names the file and the reason."""


class FrameSource:
    """The frames of one open video. A context manager; `open_video` makes it.

    Attributes:
        path: The file or folder.
        num_frames: How many frames it has.
        names: File names of the frames, without folders; None for a video file.
    """

    path: Path
    num_frames: int
    names: Sequence[str] | None = None

    def read(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The frames with these numbers, in the order asked for; decodes no more than it must.

        Args:
            indices: Numbers of frames, counted from 0 in the order of display; repeats are fine.

        Returns:
            (T, 3, H, W), RGB, uint8.

        Raises:
            VideoError: An index is outside the video, or a frame cannot be decoded.
        """
        wanted = [int(index) for index in indices]
        if not wanted:
            raise VideoError(f"{self.path}: no frame was asked for")
        for index in wanted:
            if not 0 <= index < self.num_frames:
                raise VideoError(
                    f"{self.path}: frame {index} was asked for, but it has frames 0 … {self.num_frames - 1}"
                )
        frames = self._decode(sorted(set(wanted)))
        sizes = {tuple(frame.shape) for frame in frames.values()}
        if len(sizes) > 1:
            raise VideoError(f"{self.path}: its frames differ in size: {sorted(size[1:] for size in sizes)}")
        return torch.stack([frames[index] for index in wanted])

    def frames(self) -> Iterator[Tensor]:
        """All frames in order, each uint8 (3, H, W), one in memory at a time."""
        raise NotImplementedError

    def close(self) -> None:
        """Closes the file, if one is open."""

    def _decode(self, wanted: Sequence[int]) -> dict[int, Tensor]:
        """The frames with these ascending numbers, each (3, H, W)."""
        raise NotImplementedError

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: "TracebackType | None"
    ) -> None:
        self.close()

"""Video files, read and written through PyAV."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_methods._files import replace_file
from lightning_methods.datamodules._frame_source import FrameSource, VideoError


class VideoFile(FrameSource):
    """A video file.

    The times of all packets are read without decoding them; in order, they say when the frame of each number is
    shown and from which key frame it can be decoded. Where they do not identify the frames (raw streams; AVI with
    B-frames), frames are counted by decoding from the start.

    Raises:
        VideoError: The file is damaged or has no video.
        ModuleNotFoundError: PyAV is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._av = _import_av()
        self._reformatter = self._av.video.reformatter.VideoReformatter()
        with self._explained():
            self._container = self._av.open(str(path))
        try:
            if not self._container.streams.video:
                raise VideoError(f"{path}: has no video stream")
            self._check_end()
            self._times, self._keys = self._index()
            self.num_frames = len(self._times) or sum(1 for _ in self._from_start())
            if not self.num_frames:
                raise VideoError(f"{path}: has no frames")
        except BaseException:
            self.close()
            raise

    def frames(self) -> Iterator[Tensor]:
        for _, frame in self._from_start():
            yield self._pixels(frame)

    def close(self) -> None:
        self._container.close()

    def _check_end(self) -> None:
        """Refuses the first part of an MP4 file that begins with its index: it would pass for a shorter video."""
        entries = getattr(self._container.streams.video[0], "index_entries", ())  # not in old releases of PyAV
        if len(entries):
            last = entries[len(entries) - 1]
            size = self.path.stat().st_size
            if last.pos + last.size > size:
                raise VideoError(f"{self.path}: is cut off, it has {size} bytes of at least {last.pos + last.size}")

    def _index(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of each frame the time at which it is shown, and the number of its key frame.

        Both empty if times do not identify the frames. Arrays, since a day of video has millions of frames.
        """
        stream = self._container.streams.video[0]
        times, are_keys = array("q"), array("b")
        unknown = False
        with self._explained():
            for packet in self._container.demux(stream):
                if packet.size and not packet.is_discard:
                    unknown |= packet.pts is None
                    times.append(packet.pts or 0)
                    are_keys.append(packet.is_keyframe)
        order = np.argsort(times)
        shown, is_key = np.asarray(times)[order], np.asarray(are_keys, bool)[order]
        # With B-frames, a packet of an AVI file may hold two frames, or none.
        avi = self._container.format.name == "avi" and stream.codec_context.has_b_frames
        if unknown or avi or not np.diff(shown).all():
            return shown[:0], order[:0]
        return shown, np.maximum.accumulate(np.where(is_key, np.arange(len(shown)), 0))

    def _decode(self, wanted: Sequence[int]) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        for run in self._runs(wanted):
            for number, frame in self._from(run[0]):
                if number in run:
                    found[number] = self._pixels(frame)
                if number >= run[-1]:
                    break
        if missing := [number for number in wanted if number not in found]:
            raise VideoError(f"{self.path}: frame {missing[0]} cannot be decoded")
        return found

    def _runs(self, wanted: Sequence[int]) -> list[list[int]]:
        """Splits ascending numbers where going to a later key frame saves decoding."""
        runs = [[wanted[0]]]
        for number in wanted[1:]:
            if len(self._keys) and self._keys[number] > runs[-1][-1] + 1:
                runs.append([])
            runs[-1].append(number)
        return runs

    def _from(self, number: int) -> Iterator[tuple[int, Any]]:
        """Numbered frames, beginning no later than with this one."""
        if len(self._keys):
            with self._explained():
                stream = self._container.streams.video[0]
                self._container.seek(int(self._times[self._keys[number]]), stream=stream)
                decoded = self._numbered(self._container.decode(stream))
                first = next(decoded, None)
                # Formats differ in what they seek by; one that goes too far is read from its start.
                if first is not None and first[0] <= number:
                    yield first
                    yield from decoded
                    return
        yield from self._from_start()

    def _from_start(self) -> Iterator[tuple[int, Any]]:
        with self._explained(), self._av.open(str(self.path)) as container:
            yield from self._numbered(container.decode(video=0))

    def _numbered(self, frames: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        for place, frame in enumerate(frames):
            yield self._number(frame.pts) if len(self._times) else place, frame

    def _number(self, time: int | None) -> int:
        """Of the frame that is shown at a time; -1 if there is none."""
        place = 0 if time is None else int(np.searchsorted(self._times, time))
        return place if place < len(self._times) and self._times[place] == time else -1

    def _pixels(self, frame: Any) -> Tensor:
        pixels = self._reformatter.reformat(frame, format="rgb24").to_ndarray()
        return torch.from_numpy(pixels).permute(2, 0, 1)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except self._av.FFmpegError as error:
            raise VideoError(f"{self.path}: cannot be decoded ({error})") from error


def write_video(path: str | Path, frames: Iterable[Tensor], *, fps: float = 25.0, lossless: bool = True) -> None:
    """Writes a video file that is either there whole or not at all.

    Args:
        path: The file; its suffix, such as .mkv or .mp4, chooses the container. Its folder is made if need be.
        frames: Each uint8 (3, H, W), RGB; a tensor (T, 3, H, W) will do.
        fps: Frames per second.
        lossless: FFV1, from which the very pixels are read back, rather than H.264, which every player shows and
            whose sides must be even.

    Raises:
        VideoError: The frames cannot be encoded, or there are none.
        ModuleNotFoundError: PyAV is not installed.
    """
    av = _import_av()
    path = Path(path)

    def write(temporary: Path) -> None:
        with av.open(str(temporary), "w") as container:
            if not _encode(av, container, frames, fps, lossless):
                raise VideoError(f"{path}: there are no frames to write")

    try:
        replace_file(path, write)
    except av.FFmpegError as error:
        raise VideoError(f"{path}: cannot be written ({error})") from error


def _encode(av: Any, container: Any, frames: Iterable[Tensor], fps: float, lossless: bool) -> int:
    """How many frames have been written."""
    codec, pixel_format, options = ("ffv1", "bgr0", {}) if lossless else ("libx264", "yuv420p", {"crf": "18"})
    stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
    stream.pix_fmt = pixel_format
    count = 0
    for count, frame in enumerate(frames, 1):
        if count == 1:
            _, stream.height, stream.width = frame.shape
        image = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
        container.mux(stream.encode(image))
    if count:
        container.mux(stream.encode())
    return count


def _import_av() -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Video files are read with PyAV, which is not installed: pip install "lightning-methods[video]"'
        ) from error
    return av

"""A world of short videos in which what matters is short in space and long in time."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lightning_methods.datamodules._base import InMemoryDataModule
from lightning_methods.datamodules._video_files import write_video
from lightning_methods.datamodules.twbert import VideoQADataModule

OBJECTS, STATES = 6, 4
FRAMES, PATCHES = 8, 16
WORDS = 4
#: Frames in which the object has the state asked for.
MAJORITY = 6

# Of the videos: a patch is a tile of so many pixels a side, an object a colour, and its state a bright quarter.
TILE = 4
_SIDE = TILE * int(PATCHES**0.5)
_COLOURS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.9, 0.1),
    "blue": (0.15, 0.25, 1.0),
    "yellow": (1.0, 0.9, 0.1),
    "purple": (0.9, 0.2, 0.9),
    "cyan": (0.1, 0.9, 0.9),
}
_WORDS = (*_COLOURS, "where", "shines", "mostly")
_QUARTERS = ("upper left", "upper right", "lower left", "lower right")
_DARK = 0.35


class ObjectStatesDataModule(InMemoryDataModule):
    """Videos as patches, a question that names an object, and the state that it has in most frames.

    A video has 8 frames of 16 patches. Each of 6 objects occupies one patch of every frame, at a random place. An
    object has one of 4 states in 6 of the frames and another one in the remaining two. A patch shows (object, state)
    as two one-hot codes, the empty ones show nothing, and noise N(0, `noise`²) lies on all. In one of the two frames of
    the other state a *burst* puts look-alikes (the object asked for, in the wrong state) into up to 10 empty patches.
    Counted in patches the wrong state can win; counted in frames it has two of eight.

    The question has 4 words: start, the object's name, "state", end. Samples are (video, text, target): video
    (128, 10) float32, patches frame by frame; text (4,) word numbers below 9; target () the state.

    Args:
        train_size: Training videos, drawn by `seed`; bursts of 0 … 10 patches.
        batch_size: Videos per batch and process.
        burst: Patches in the bursts of the test videos (validation: 0 … 10, as in training).
        noise: Standard deviation of the noise.
        seed: Seed of the training videos and their order. Validation and test videos (1,000 each) are the same for
            every seed.

    Raises:
        ValueError: `train_size` is below 1, or `burst` is outside 0 … 10.

    Example:
        >>> world = ObjectStatesDataModule(train_size=32, batch_size=8)
        >>> [part.shape for part in next(iter(world.train_dataloader()))]
        [torch.Size([8, 128, 10]), torch.Size([8, 4]), torch.Size([8])]
    """

    num_classes = STATES
    num_features = OBJECTS + STATES
    num_words = OBJECTS + 3
    eval_size = 1000
    max_burst = PATCHES - OBJECTS

    def __init__(
        self, train_size: int = 32_000, batch_size: int = 128, *, burst: int = 10, noise: float = 0.15, seed: int = 0
    ) -> None:
        super().__init__(batch_size, seed)
        if train_size < 1:
            raise ValueError(f"train_size must be at least 1, got {train_size}")
        if not 0 <= burst <= self.max_burst:
            raise ValueError(f"burst must be in 0 … {self.max_burst}, got {burst}")
        self.train_size, self.burst, self.noise = train_size, burst, noise

    def load_splits(self) -> dict[str, tuple[Tensor, ...]]:
        """Videos (S, 128, 10), texts (S, 4) and targets (S,) of the three splits."""
        return self._drawn(self.noise)

    def _drawn(self, noise: float) -> dict[str, tuple[Tensor, ...]]:
        # Seeds of training draws are even, so they never meet those of the fixed splits.
        return {
            "train": _videos(self.train_size, 2 * self.seed, None, noise),
            "val": _videos(self.eval_size, 1, None, noise),
            "test": _videos(self.eval_size, 3, self.burst, noise),
        }


class ObjectVideosDataModule(ObjectStatesDataModule):
    """The videos, questions and answers of `ObjectStatesDataModule` in files, as data sets of videos have them.

    Videos are H.264 in .mp4, 8 frames of 16 × 16 pixels. A patch is a tile of 4 × 4 pixels, the colour of which is an
    object, and the bright quarter its state: "where red shines mostly". The noise lies on the pixels. Files are in the
    layout of MSVD-QA, in a temporary folder, and read back by `VideoQADataModule`, once; then they stay in memory.

    Samples are (video, text, target) as there, but for video (8, 3, 16, 16) float32, frames normalised as for CLIP.

    Args:
        train_size: Training videos, drawn by `seed`; bursts of 0 … 10 patches. Writing and reading takes about 10 ms
            a video.
        batch_size: Videos per batch and process.
        burst: Patches in the bursts of the test videos (validation: 0 … 10, as in training).
        noise: Standard deviation of the noise, the range of pixels being 1.
        seed: Seed of the training videos and their order. Validation and test videos (300 each) are the same for
            every seed.

    Raises:
        ValueError: `train_size` is below 1, or `burst` is outside 0 … 10.
        ModuleNotFoundError: PyAV, the extra `video`, is not installed.
    """

    eval_size = 300

    def __init__(
        self, train_size: int = 3000, batch_size: int = 128, *, burst: int = 10, noise: float = 0.05, seed: int = 0
    ) -> None:
        super().__init__(train_size, batch_size, burst=burst, noise=noise, seed=seed)

    def load_splits(self) -> dict[str, tuple[Tensor, ...]]:
        """Writes the videos and reads (video, text, target) of the three splits."""
        # Loaders draw from the global generator.
        with torch.random.fork_rng(devices=[]), TemporaryDirectory() as root:
            torch.manual_seed(self.seed)
            self._write(Path(root) / "msvd_qa")
            data = VideoQADataModule(
                root, "msvd_qa", FRAMES, image_size=_SIDE, tokenizer=_word_numbers, batch_size=1, num_workers=0
            )
            data.setup("fit")
            data.setup("test")
            loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
            read = {split: list(loader) for split, loader in loaders.items()}
        keys = ("video", "question", "target")
        return {split: tuple(torch.cat([one[key] for one in ones]) for key in keys) for split, ones in read.items()}

    def _write(self, folder: Path) -> None:
        (folder / "txt").mkdir(parents=True)
        (folder / "txt" / "train_ans2label.json").write_text(json.dumps({name: k for k, name in enumerate(_QUARTERS)}))
        for split, (codes, texts, targets) in self._drawn(0.0).items():
            lines = []
            for number, (video, text, target) in enumerate(zip(_pictures(codes), texts, targets, strict=True)):
                video = video + self.noise * torch.randn(video.shape)
                name = f"{split}{number:05}"
                write_video(folder / "videos" / f"{name}.mp4", (255 * video.clamp(0, 1)).round().byte(), lossless=False)
                question, answer = " ".join(_WORDS[word] for word in text), _QUARTERS[target]
                line = {"question": question, "answer": answer, "video_id": name, "answer_type": "where"}
                lines.append(json.dumps(line) + "\n")
            (folder / "txt" / f"{split}.jsonl").write_text("".join(lines))


def _word_numbers(texts: list[str]) -> Tensor:
    return torch.tensor([[_WORDS.index(word) for word in text.split()] for text in texts])


def _pictures(codes: Tensor) -> Tensor:
    """Patches (S, 128, 10) of codes without noise to frames (S, 8, 3, 16, 16) in [0, 1]."""
    quarters = torch.full((STATES, 2, 2), _DARK)
    quarters.flatten(1).fill_diagonal_(1.0)
    tiles = quarters.repeat_interleave(TILE // 2, 1).repeat_interleave(TILE // 2, 2)
    colour = codes[..., :OBJECTS] @ torch.tensor(list(_COLOURS.values()))
    light = codes[..., OBJECTS:] @ tiles.flatten(1)
    rows = _SIDE // TILE
    pixels = (colour[..., None] * light[..., None, :]).reshape(len(codes), FRAMES, rows, rows, 3, TILE, TILE)
    return pixels.permute(0, 1, 4, 2, 5, 3, 6).reshape(len(codes), FRAMES, 3, _SIDE, _SIDE)


def _videos(count: int, seed: int, burst: int | None, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    def shuffled(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).argsort(-1)

    state = draw(STATES, count, OBJECTS, 1)
    other = (state + 1 + draw(STATES - 1, count, OBJECTS, 1)) % STATES
    rank = shuffled(count, OBJECTS, FRAMES)  # the frames' places in a random order: the last two are the exceptions
    states = torch.where(rank < MAJORITY, state, other)

    asked = draw(OBJECTS, count)
    rows = torch.arange(count)
    burst_frame = rank[rows, asked].argmax(1)
    size = draw(PATCHES - OBJECTS + 1, count) if burst is None else torch.full((count,), burst)

    # What each of the 16 places of a frame holds, before the places are shuffled: the objects, then the look-alikes.
    codes = torch.zeros(count, FRAMES, PATCHES, OBJECTS + STATES)
    codes[:, :, :OBJECTS, :OBJECTS] = torch.eye(OBJECTS)
    codes[:, :, :OBJECTS, OBJECTS:] = torch.eye(STATES)[states].transpose(1, 2)
    look_alike = torch.cat([torch.eye(OBJECTS)[asked], torch.eye(STATES)[other[rows, asked, 0]]], dim=1)
    in_burst = torch.arange(PATCHES - OBJECTS) < size[:, None]
    codes[rows, burst_frame, OBJECTS:] = in_burst[..., None] * look_alike[:, None]

    place = shuffled(count, FRAMES, PATCHES)[..., None].expand_as(codes)
    video = codes.gather(2, place) + noise * torch.randn(codes.shape, generator=generator)
    start, word, end = (torch.full((count,), OBJECTS + k) for k in range(3))
    return video.flatten(1, 2), torch.stack([start, asked, word, end], dim=1), state[rows, asked, 0]

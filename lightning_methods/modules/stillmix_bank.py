"""The frames that StillMix blends into clips, and how they are chosen and read."""

import warnings
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass, fields
from functools import cached_property
from inspect import isfunction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_methods.functional import select_biased_frames
from lightning_methods.functional._index import check_integer
from lightning_methods.functional._logits import check_choice, check_positive
from lightning_methods.functional._seeds import seeded
from lightning_methods.functional.stillmix import Strategy
from lightning_methods.modules.stillmix_scores import FrameScores, check_scores, load_frame_scores, score_frames

Numbers = float | Sequence[float]
Size = int | tuple[int, int]
Score = Literal["top_prob", "target_prob"]
#: From a frame's key to the frame (C, h, w), or to the frame and its label.
FrameReader = Callable[[str], Any]


class FrameBank(nn.Module):
    """Frames to blend into clips, normalised when they are read.

    uint8 frames stay uint8, a quarter of float32 (147 MiB for 1024 frames of 224 × 224), and only the frames that a
    step uses are normalised, to (x / 255 − mean) / std. The frames are a buffer that moves with the module and is in
    no state dict.

    Args:
        frames: (M, C, H, W), uint8, or floating and normalised as the clips are.
        keys: A name for each frame; None numbers them.
        targets: Labels of the frames' videos, integers (M,). Only mixed labels need them.
        mean: Of the clips' normalisation, for values in [0, 1]; one number or C. None: 0. Only for uint8 frames.
        std: Likewise; None: 1.

    Raises:
        ValueError: If shapes or dtypes do not fit, if there are no frames, or if a value is NaN or infinite: it would
            reach samples that are not blended.

    Example:
        >>> import torch
        >>> bank = FrameBank(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), mean=0.5, std=0.25)
        >>> bank.sample(torch.tensor([0, 3]))[:, 0, 0, 0]
        tensor([-2., -2.])
        >>> bank
        FrameBank(4 frames of 3x2x2, uint8)
    """

    frames: Tensor
    targets: Tensor | None
    _scale: Tensor | None
    _shift: Tensor | None

    def __init__(
        self,
        frames: Tensor,
        keys: Iterable[str] | None = None,
        *,
        targets: Tensor | None = None,
        mean: Numbers | None = None,
        std: Numbers | None = None,
    ) -> None:
        super().__init__()
        _check_frames(frames)
        self.keys = tuple(map(str, range(len(frames)) if keys is None else keys))
        self.mean, self.std = mean, std
        if len(self.keys) != len(frames):
            raise ValueError(f"`keys` must name each of the {len(frames)} frames, got {len(self.keys)}")
        if targets is not None:
            check_integer("targets", targets)
            if targets.shape != (len(frames),):
                raise ValueError(f"`targets` must have shape ({len(frames)},), got {tuple(targets.shape)}")
            targets = targets.to(frames.device)
        scale, shift = _affine(frames, mean, std)
        for name, values in {"frames": frames, "targets": targets, "_scale": scale, "_shift": shift}.items():
            self.register_buffer(name, values, persistent=False)

    def __len__(self) -> int:
        return len(self.frames)

    def sample(self, indices: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The frames at `indices`, normalised.

        Args:
            indices: Integers of any shape, on the bank's device.
            dtype: Of the result; the arithmetic is in float32 at least.

        Returns:
            (*indices.shape, C, H, W).
        """
        # Twenty times as fast as `self.frames[indices]`.
        frames = self.frames.index_select(0, indices.flatten()).reshape(*indices.shape, *self.frames.shape[1:])
        if self._scale is None or self._shift is None:
            return frames.to(dtype)
        precise = torch.promote_types(torch.float32, dtype)
        return frames.to(precise).mul_(self._scale.to(precise)).add_(self._shift.to(precise)).to(dtype)

    def resized(self, size: Size) -> "FrameBank":
        """A bank of the same frames in another size (bilinear, no antialiasing, the aspect ratio is not kept).

        Args:
            size: (H, W), or one number for both.
        """
        frames = torch.cat([_resized(block, size) for block in torch.split(self.frames, 64)])
        return FrameBank(frames, self.keys, targets=self.targets, mean=self.mean, std=self.std)

    @classmethod
    def from_scores(
        cls,
        scores: FrameScores | str | Path,
        read_frame: FrameReader,
        *,
        size: Size,
        bank_size: int = 1024,
        strategy: Strategy = "quantile",
        low: float = 0.5,
        high: float = 1.0,
        score: Score = "top_prob",
        mean: Numbers | None = None,
        std: Numbers | None = None,
        seed: int = 0,
    ) -> "FrameBank":
        """Choose frames by their scores and read them; the arguments are those of `FrameBankSpec`."""
        return FrameBankSpec(
            scores=scores,
            reader=read_frame,
            size=size,
            bank_size=bank_size,
            strategy=strategy,
            low=low,
            high=high,
            score=score,
            mean=mean,
            std=std,
            seed=seed,
        ).build()

    @classmethod
    def from_dataset(
        cls,
        model: nn.Module,
        dataset: Dataset[Any],
        *,
        size: Size | None = None,
        bank_size: int = 1024,
        strategy: Strategy = "quantile",
        low: float = 0.5,
        high: float = 1.0,
        score: Score = "top_prob",
        mean: Numbers | None = None,
        std: Numbers | None = None,
        seed: int = 0,
        batch_size: int = 64,
        temperature: float = 1.0,
    ) -> "FrameBank":
        """Score the frames of a dataset with a network, choose by the scores, and read what was chosen.

        Args:
            model: Takes normalised frames (B, C, H, W), returns logits (B, K): any 2-D network, trained on single
                frames of this dataset.
            dataset: Item i is (frame (C, H, W), label). Frames are normalised, or uint8 to be normalised by `mean`
                and `std`.
            size: Of the bank's frames; None: as the dataset gives them.
            bank_size: As in `FrameBankSpec`, like those that follow.
            strategy: See there.
            low: See there.
            high: See there.
            score: See there.
            mean: See there.
            std: See there.
            seed: See there.
            batch_size: Frames scored at once.
            temperature: Of the softmax.

        Raises:
            ValueError: If the arguments do not fit, or nothing is selected.
        """
        if not isinstance(dataset, Sized):
            raise ValueError(f"`dataset` must have a length and items by index, got {type(dataset).__name__}")

        def normalised(items: Sequence[tuple[Any, ...]]) -> tuple[Tensor, Tensor]:
            bank = cls(torch.stack([frame for frame, *_ in items]), mean=mean, std=std)
            return bank.sample(torch.arange(len(items))), torch.tensor([int(label) for _, label, *_ in items])

        def read(key: str) -> tuple[Tensor, int]:
            frame, label, *_ = dataset[int(key)]
            return frame, int(label)

        loader = DataLoader(dataset, batch_size, collate_fn=normalised)
        return cls.from_scores(
            score_frames(model, loader, temperature=temperature),
            read,
            size=tuple(dataset[0][0].shape[-2:]) if size is None else size,
            bank_size=bank_size,
            strategy=strategy,
            low=low,
            high=high,
            score=score,
            mean=mean,
            std=std,
            seed=seed,
        )

    def extra_repr(self) -> str:
        """Number, shape and type of the frames."""
        count, *shape = self.frames.shape
        return f"{count} frames of {'x'.join(map(str, shape))}, {str(self.frames.dtype).removeprefix('torch.')}"


class Choice(NamedTuple):
    """Which frames make a bank, and the smallest score among them."""

    keys: tuple[str, ...]
    min_score: float


@dataclass(frozen=True, repr=False)
class FrameBankSpec:
    """A recipe for a `FrameBank`: which frames to choose, and how to read them.

    The chosen frames are shuffled and the first `bank_size` taken. Given the same seed, the same frames are chosen on
    every machine.

    Args:
        scores: `FrameScores`, or a file of them.
        reader: From a key of the scores to the frame (C, h, w), uint8, or normalised; or to (frame, label). It is asked
            for keys in sorted order, so that the frames of a video follow each other.
        size: To which frames are resized, as the clips: (H, W) or one number. Bilinear without antialiasing, the
            aspect ratio is not kept.
        bank_size: M. If fewer frames are selected, a warning, and a smaller bank. Published: 1024; 2048 for SlowFast on
            Kinetics.
        strategy: See `functional.select_biased_frames`; "quantile" in all published settings.
        low: Lower bound of "quantile" and "threshold". Published: 0.1 to 0.75.
        high: Upper bound; 1 in all published settings.
        score: "top_prob", the confidence, as in all published settings, or "target_prob".
        mean: Of the clips' normalisation, for uint8 frames; see `FrameBank`.
        std: Likewise.
        seed: Of the choice.

    Raises:
        ValueError: If an argument is out of its range; when used, if the scores are unreadable or nothing is selected.
    """

    scores: FrameScores | str | Path
    reader: FrameReader
    size: Size
    bank_size: int = 1024
    strategy: Strategy = "quantile"
    low: float = 0.5
    high: float = 1.0
    score: Score = "top_prob"
    mean: Numbers | None = None
    std: Numbers | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(bank_size=self.bank_size)
        check_choice("score", self.score, Score)
        check_choice("strategy", self.strategy, Strategy)

    def choose(self, *place: int) -> Choice:
        """The keys of a bank, in its order.

        Args:
            place: Numbers such as rank and epoch; each place draws for itself.
        """
        keys, values = self._sorted
        generator = seeded(self.seed, *place)
        chosen = select_biased_frames(
            values,
            strategy=self.strategy,
            low=self.low,
            high=self.high,
            count=self.bank_size if self.strategy == "top" else None,
            generator=generator,
        )
        kept = chosen[torch.randperm(len(chosen), generator=generator)[: self.bank_size]]
        if len(kept) < self.bank_size:
            warnings.warn(
                f"Only {len(kept)} frames are selected, fewer than bank_size={self.bank_size}: the bank is smaller.",
                stacklevel=2,
            )
        return Choice(tuple(keys[index] for index in kept.tolist()), float(values[kept].min()))

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that have no score."""
        return sorted({*keys}.difference(self._sorted[0]))

    def read(self, keys: Sequence[str]) -> FrameBank:
        """The bank of these frames."""
        frames = torch.empty(0)
        labels: list[tuple[int, int | None]] = []
        for key, place in sorted((key, place) for place, key in enumerate(keys)):
            try:
                item = self.reader(key)
            except KeyError as error:  # from a dictionary, for one
                raise ValueError(
                    f"`reader` has no frame {key!r}, which `scores` name: are they of other data?"
                ) from error
            frame, label = item if isinstance(item, tuple) else (item, None)
            frame = _resized(_one_frame(key, frame), self.size)[0]
            if not labels:
                frames = frame.new_empty(len(keys), *frame.shape)
            frames[place] = frame
            labels.append((place, label))
        known = [label for _, label in sorted(labels) if label is not None]
        targets = torch.tensor(known) if len(known) == len(keys) else None
        return FrameBank(frames, keys, targets=targets, mean=self.mean, std=self.std)

    def __repr__(self) -> str:
        values = ((field, getattr(self, field.name)) for field in fields(self))
        parts = [f"{field.name}={_name_of(value)}" for field, value in values if value != field.default]
        return f"FrameBankSpec({', '.join(parts)})"

    def build(self) -> FrameBank:
        """Choose and read."""
        return self.read(self.choose().keys)

    @cached_property
    def _sorted(self) -> tuple[list[str], Tensor]:
        """Keys in order with their scores: ties go by key."""
        scores = self.scores if isinstance(self.scores, tuple) else load_frame_scores(self.scores)
        scores = check_scores(scores)
        order = sorted(range(len(scores.keys)), key=scores.keys.__getitem__)
        return [scores.keys[index] for index in order], getattr(scores, self.score)[torch.tensor(order)]


def _name_of(value: Any) -> str:
    return str(value.__qualname__) if isfunction(value) else repr(value)


def _check_frames(frames: Tensor) -> None:
    if frames.ndim != 4 or not len(frames):
        raise ValueError(f"`frames` must have shape (M, C, H, W) with M at least 1, got {tuple(frames.shape)}")
    if frames.dtype != torch.uint8 and not frames.is_floating_point():
        raise ValueError(f"`frames` must be uint8, or floating and normalised, got {frames.dtype}")
    # The extremes are finite if all are; `isfinite` would need three times the memory of the bank.
    if frames.is_floating_point() and not bool(torch.stack(frames.aminmax()).isfinite().all()):
        raise ValueError("`frames` must be finite, got NaN or infinity: it would reach samples that are not blended")


def _affine(frames: Tensor, mean: Numbers | None, std: Numbers | None) -> tuple[Tensor | None, Tensor | None]:
    """Factor and summand, (C, 1, 1), that normalise uint8 values."""
    if frames.is_floating_point():
        if mean is not None or std is not None:
            raise ValueError("`mean` and `std` belong to uint8 `frames`: floating ones are taken as normalised")
        return None, None
    channels = frames.shape[1]
    columns = []
    for name, numbers, default in (("mean", mean, 0.0), ("std", std, 1.0)):
        values = torch.as_tensor(default if numbers is None else numbers, dtype=torch.float64).flatten()
        if len(values) not in (1, channels):
            raise ValueError(f"`{name}` must be one number or {channels}, one for each channel, got {numbers}")
        if not bool(values.isfinite().all()) or bool((values > 10).any()):
            raise ValueError(f"`{name}` must be that of values in [0, 1], got {numbers}: divide by 255")
        columns.append(values.expand(channels)[:, None, None])
    if not bool((columns[1] > 0).all()):
        raise ValueError(f"`std` must be positive, got {std}")
    mean_column, std_column = (column.to(frames.device) for column in columns)
    return (1 / (255 * std_column)).float(), (-mean_column / std_column).float()


def _one_frame(key: str, frame: Any) -> Tensor:
    if not isinstance(frame, Tensor) or frame.ndim != 3:
        found = f"shape {tuple(frame.shape)}" if isinstance(frame, Tensor) else type(frame).__name__
        raise ValueError(f"`reader` must give a tensor (C, H, W), got {found} for {key!r}")
    return frame[None]


def _resized(frames: Tensor, size: Size) -> Tensor:
    """(n, C, H, W) in another size, uint8 rounded."""
    height, width = (size, size) if isinstance(size, int) else size
    if frames.shape[-2:] == (height, width):
        return frames
    floating = frames if frames.is_floating_point() else frames.float()
    scaled = F.interpolate(floating, (height, width), mode="bilinear", align_corners=False, antialias=False)
    return scaled if frames.is_floating_point() else scaled.round().clamp(0, 255).to(torch.uint8)

"""Scores of the clips of a video, in one pass over its frames and in memory that its length does not change."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import default_collate

from lightning_methods.datamodules._video_files import FrameSource, VideoError
from lightning_methods.datamodules._wsvad_clips import ClipShape
from lightning_methods.datamodules._wsvad_sampling import cell_clip, middle_frame, num_cells
from lightning_methods.datamodules._wsvad_views import shrink, weak_view

Bag: TypeAlias = dict[str, Tensor]
Scorer: TypeAlias = Callable[[Bag], Any]


class ScoringError(ValueError):
    """The model, its checkpoint or its scores cannot be used."""


def load_scorer(model: str, checkpoint: Path | None, device: torch.device) -> Scorer:
    """What gives clips their scores.

    Args:
        model: "package.module.Class", a LightningModule, whose `predict_step` is asked; or "package.module:function".
            Both are looked for in the current folder too, and take a test batch as `UCFCrimeDataModule` gives it.
        checkpoint: Of the LightningModule.
        device: Where the LightningModule and its batches are; a function sees to that itself.

    Raises:
        ScoringError: There is no such class or function, or the checkpoint does not fit.
    """
    is_function = ":" in model
    if is_function != (checkpoint is None):
        expected = "a function, package.module:function, takes none" if is_function else "a class needs one"
        raise ScoringError(f"--checkpoint: {expected}; got --model {model} and --checkpoint {checkpoint}")
    module, _, name = model.rpartition(":" if is_function else ".")
    here = str(Path.cwd())  # a console script has its own folder on the path instead
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(import_module(module), name, None)
    except (ImportError, ValueError) as error:  # ValueError: an empty name
        raise ScoringError(f"--model {model}: cannot import {module!r} ({error})") from error
    if not callable(found):
        raise ScoringError(f"--model {model}: {module} has no {'function' if is_function else 'class'} {name!r}")
    return found if checkpoint is None else _module_scorer(model, found, checkpoint, device)


def _module_scorer(model: str, kind: Any, checkpoint: Path, device: torch.device) -> Scorer:
    if not hasattr(kind, "load_from_checkpoint"):
        raise ScoringError(f"--model {model} must be a LightningModule or package.module:function")
    try:
        module = kind.load_from_checkpoint(checkpoint, map_location=device)
    except OSError as error:
        raise ScoringError(f"--checkpoint {checkpoint} cannot be read: {error}") from error
    except Exception as error:  # pickles, constructors and state dicts raise almost anything
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ScoringError(
            f"--checkpoint {checkpoint} cannot be loaded into {model} ({reason}). If the module "
            "takes arguments that are not in the checkpoint, write a function that loads it and give "
            "--model package.module:function"
        ) from error
    module.eval().to(device)

    def score(batch: Bag) -> Any:
        return module.predict_step({name: values.to(device) for name, values in batch.items()}, 0)

    return score


@torch.inference_mode()
def score_video(source: FrameSource, score: Scorer, shape: ClipShape, batch_size: int, first: int) -> Iterator[Tensor]:
    """Scores of the clips of all cells from number `first` on, a batch at a time: (B,), float64 on the CPU.

    Frames are read once, in order. The frames before the first cell are read too, but not scored.

    Raises:
        VideoError: The video is damaged.
        ScoringError: The scorer returns something else than finite scores, (B,) or (B, 1), or logits of normal and
            abnormal, (B, 2) or (B, 1, 2).
    """
    cells = stream_cells(source, shape, first)
    while bags := list(islice(cells, batch_size)):
        batch = default_collate(bags)
        bags.clear()  # the batch is a copy: half of the memory while the scorer works
        yield _as_scores(score(batch), batch)


def stream_cells(source: FrameSource, shape: ClipShape, first: int = 0) -> Iterator[Bag]:
    """The bag of one clip of each cell from number `first` on, as `UCFCrimeDataModule` tests on, without labels.

    No more frames are held than a clip has, each cut to the size that a network sees.

    Raises:
        VideoError: The video ends early.
    """
    frames = enumerate(source.frames())
    for cell in range(first, num_cells(source.num_frames, shape.span)):
        numbers = cell_clip(cell, source.num_frames, shape.span, shape.clip_length, shape.interval)
        clip = _collect(frames, numbers[0].tolist())
        if clip is None:
            raise VideoError(f"{source.path}: ends before frame {int(numbers.max())} of {source.num_frames}")
        yield {
            "clips": clip[None],
            "vid": torch.tensor(0),
            "snippet_index": torch.tensor([cell]),
            "frame_index": middle_frame(numbers),
            "total_frames": torch.tensor(source.num_frames),
        }


def _collect(frames: Iterable[tuple[int, Tensor]], numbers: list[int]) -> Tensor | None:
    """(3, T, 224, 224): the frames with these numbers, from an iterator that is then behind the last of them."""
    last, views = max(numbers), dict[int, Tensor]()
    for number, frame in frames:
        if number in numbers:
            views[number] = weak_view(shrink(frame[None]))[0]
        if number == last:
            return torch.stack([views[number] for number in numbers], 1)
    return None


def _as_scores(output: Any, batch: Bag) -> Tensor:
    count = len(batch["clips"])
    scores = output.detach().double().cpu() if isinstance(output, Tensor) else torch.empty(0)
    if scores.shape in ((count, 2), (count, 1, 2)):
        scores = scores.reshape(count, 2).softmax(1)[:, 1]
    if scores.shape not in ((count,), (count, 1)):
        found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ScoringError(
            f"the model was given clips {tuple(batch['clips'].shape)} and should return scores, ({count},) or "
            f"({count}, 1), or logits of normal and abnormal, ({count}, 2) or ({count}, 1, 2); it returned {found}"
        )
    scores = scores.flatten()
    if not scores.isfinite().all():
        place = int(scores.isfinite().logical_not().nonzero()[0])
        frame = int(batch["frame_index"][place])
        raise ScoringError(f"the model gave the clip around frame {frame} the score {float(scores[place])}")
    return scores

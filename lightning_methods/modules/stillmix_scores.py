"""How much single frames give their label away: scoring them with a network, keeping the scores in a file."""

import pickle
import zipfile
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_methods._files import replace_file
from lightning_methods._modes import evaluating
from lightning_methods.functional import frame_bias_scores


class FrameScores(NamedTuple):
    """What a reference network says of the frames of a training set.

    Attributes:
        keys: A name for each of the n frames. In the authors' files `"{video}/{file name}"` for folders of frames and
            `"{relative video path}//{index from 0}"` for video files.
        target_prob: Probability of the label, float64 (n,).
        top_prob: Largest probability, float64 (n,).
    """

    keys: Sequence[str]
    target_prob: Tensor
    top_prob: Tensor

    def __repr__(self) -> str:
        return f"FrameScores(of {len(self.keys)} frames)"


def score_frames(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    temperature: float = 1.0,
    autocast: torch.dtype | None = None,
) -> FrameScores:
    """Run a frozen network in eval mode over frames; the maths is in `functional.frame_bias_scores`.

    Args:
        model: Takes frames (B, C, H, W) and returns logits (B, K), any network of timm for instance. Its modes are
            given back.
        loader: Batches (frames, targets, keys); without keys, the frames are numbered. To be scored: the frames of
            the training set on which the network was trained.
        temperature: Of the softmax.
        autocast: A dtype such as `torch.bfloat16` for the network: only the order of the scores matters.

    Raises:
        ValueError: If a batch or the logits do not fit, or if two frames have one key.

    Example:
        >>> import torch
        >>> frames = torch.tensor([[0.0, 0.0], [0.0, 1.0986]]).reshape(2, 2, 1, 1)
        >>> score_frames(torch.nn.Flatten(), [(frames, torch.tensor([0, 0]))]).keys
        ('000000000', '000000001')
    """
    place = next(iter(model.parameters()), torch.empty(0)).device
    keys: list[str] = []
    probs: list[tuple[Tensor, Tensor]] = []
    with evaluating(model):
        for frames, targets, *named in loader:
            with torch.autocast(place.type, dtype=autocast, enabled=autocast is not None):
                logits = model(frames.to(place, non_blocking=True))
            scores = frame_bias_scores(logits, targets.to(place, non_blocking=True), temperature=temperature)
            probs.append((scores.target_prob, scores.top_prob))  # stays on the device: one copy at the end
            numbers = range(len(keys), len(keys) + len(frames))
            keys += named[0] if named else [f"{number:09}" for number in numbers]
    if not probs:
        raise ValueError("`loader` gave no frames to score")
    target_prob, top_prob = (torch.cat(parts).double().cpu() for parts in zip(*probs, strict=True))
    return check_scores(FrameScores(tuple(keys), target_prob, top_prob))


def check_scores(scores: FrameScores) -> FrameScores:
    """The same, with its keys as a tuple.

    Raises:
        ValueError: If lengths differ, keys repeat, or a probability is none.
    """
    keys = tuple(scores.keys)
    for name in ("target_prob", "top_prob"):
        probs = getattr(scores, name)
        if probs.shape != (len(keys),) or not probs.is_floating_point():
            found = f"{tuple(probs.shape)} of {probs.dtype}"
            raise ValueError(f"`{name}` must be floating and of shape ({len(keys)},), one for each key, got {found}")
        if not bool(((probs >= 0) & (probs <= 1 + 1e-6)).all()):  # not a number either
            raise ValueError(f"`{name}` must hold probabilities, got values from {probs.min()} to {probs.max()}")
    if len(set(keys)) != len(keys):
        twice = next(key for key, after in pairwise(sorted(keys)) if key == after)
        raise ValueError(f"`keys` must differ, got {twice!r} more than once")
    return FrameScores(keys, scores.target_prob, scores.top_prob)


def save_frame_scores(path: str | Path, scores: FrameScores) -> None:
    """Write an `.npz` file; it is there whole or not at all.

    Args:
        path: The file.
        scores: What to keep.

    Raises:
        ValueError: If the scores do not fit together, or a key has a line break.
    """
    keys = check_scores(scores).keys
    text = "\n".join(keys)
    if text.count("\n") != max(0, len(keys) - 1):
        raise ValueError("`keys` must not have line breaks")
    # numpy would store text in one width for all keys.
    arrays = {"keys": np.frombuffer(text.encode(), np.uint8)}
    arrays |= {name: getattr(scores, name).double().cpu().numpy() for name in ("target_prob", "top_prob")}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # to a name, numpy may add a suffix
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    replace_file(Path(path), write)


def load_frame_scores(path: str | Path) -> FrameScores:
    """Read a score file: that of `save_frame_scores`, or the authors' pickle, a dict key -> [p_gt, p_top].

    No code in the file is run: anything in a pickle but dicts, lists, text and numbers is refused.

    Args:
        path: The file.

    Raises:
        ValueError: If the file is of neither kind, or its content does not fit together.
        FileNotFoundError: If it does not exist.
    """
    path = Path(path)
    try:
        return check_scores(_load_npz(path) if zipfile.is_zipfile(path) else _load_pickle(path))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no file of frame scores: {error}") from error


def _load_npz(path: Path) -> FrameScores:
    with np.load(path, allow_pickle=False) as arrays:
        target_prob, top_prob = (torch.from_numpy(arrays[name]) for name in ("target_prob", "top_prob"))
        text = arrays["keys"].tobytes().decode()
    return FrameScores(text.split("\n") if len(top_prob) else (), target_prob, top_prob)


class _PlainUnpickler(pickle.Unpickler):
    """Reads values that need no class."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, but only plain values are read")


def _load_pickle(path: Path) -> FrameScores:
    with path.open("rb") as file:
        content = _PlainUnpickler(file).load()
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"expected a dict of [p_gt, p_top] by key, got {type(content).__name__}")
    probs = torch.tensor([(float(p_gt), float(p_top)) for p_gt, p_top in content.values()], dtype=torch.float64)
    target_prob, top_prob = probs.reshape(-1, 2).unbind(1)
    return FrameScores(tuple(content), target_prob.contiguous(), top_prob.contiguous())

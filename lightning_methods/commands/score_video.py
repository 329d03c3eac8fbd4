"""`lightning-methods score-video`: how abnormal each frame of a video is, as a table and a plot."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lightning_methods._files import FolderError, claim_folder, replace_file
from lightning_methods.commands._device import as_device
from lightning_methods.commands._progress import progress
from lightning_methods.commands._video_scores import Scorer, ScoringError, load_scorer, score_video
from lightning_methods.datamodules._video_files import FrameSource, VideoError, open_video
from lightning_methods.datamodules._wsvad_clips import ClipShape
from lightning_methods.datamodules._wsvad_lists import Annotation, read_any_annotations
from lightning_methods.datamodules._wsvad_sampling import num_cells
from lightning_methods.functional import FramePieces, frame_level_pieces

_PROG = "lightning-methods score-video"
_ABOUT = """\
Scores videos with a trained detector: one clip for each cell of clip-length * frame-interval frames, as in testing on
UCF-Crime. Writes OUT/NAME.csv, the score of every frame, and OUT/NAME.png, the scores with the annotated anomalies. A
video is read once, in memory that its length does not change. What a stopped call has scored is kept: --resume.
"""
_MODEL = """\
package.module.Class, a LightningModule, with --checkpoint; its predict_step gets a batch with `clips`
(B, 1, 3, T, 224, 224) and more, as from UCFCrimeDataModule's test loader. Or package.module:function, which gets the
same. Either returns B scores or, for normal and abnormal, B pairs of logits
"""
_ANNOTATION = """\
anomalies to draw: a test list, "path num_frames class start end", or UCF-Crime's temporal annotations, "video class
start end start end"; videos are found in it by their file's name
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The options; None takes the program's own.

    Returns:
        Exit status: 0; 1 if model, video or annotation cannot be used; 2 if the output folder cannot be; 130 if the
        user pressed Ctrl-C.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(given)
    try:
        _run(options)
    except FolderError as error:
        return _sorry(f"error: {error}.", 2)
    except (ScoringError, VideoError, _InputError, OSError, ModuleNotFoundError) as error:
        return _sorry(f"error: {error}", 1)
    except KeyboardInterrupt:
        again = given if options.resume else [*given, "--resume"]
        return _sorry(f"Stopped. What was scored is kept; to go on: {_PROG} {shlex.join(again)}", 130)
    return 0


class _InputError(ValueError):
    """An argument, or a file that it names, cannot be used."""


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=_PROG, description=_ABOUT)
    add = parser.add_argument
    add("videos", nargs="+", type=Path, metavar="VIDEO", help="a video file, or a folder or ZIP of frames")
    add("--model", required=True, metavar="MODEL", help=_MODEL)
    add("--checkpoint", type=Path, metavar="FILE", help="of the LightningModule")
    add("--annotation", type=Path, metavar="FILE", help=_ANNOTATION)
    add("--out", type=Path, default=Path("runs/score-video"), metavar="DIR", help="(default: %(default)s)")
    add("--resume", action="store_true", help="go on with what a stopped call left in --out, and add videos")
    add("--clip-length", type=int, default=5, metavar="T", help="frames of a clip (default: 5)")
    add("--frame-interval", type=int, default=6, metavar="N", help="from one of them to the next (default: 6)")
    add("--windows", type=int, metavar="N", help="average over N windows a video, as the evaluation does with 32")
    add("--batch-size", type=int, default=16, metavar="N", help="clips at a time (default: 16)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=as_device, default=device, help=f"of the LightningModule (default: {device})")
    return parser


def _run(options: Namespace) -> None:
    names = _names(options)
    annotations = {} if options.annotation is None else _annotations(options.annotation)
    score = load_scorer(options.model, options.checkpoint, options.device)
    claim_folder(options.out, _settings(options), resume=options.resume)
    for name in names:
        if options.annotation is not None and name not in annotations:
            print(f"{name} is not in {options.annotation}: its plot has no anomalies", file=sys.stderr)
    draws = find_spec("matplotlib") is not None
    for path, name in zip(options.videos, names, strict=True):
        table, plot = options.out / f"{name}.csv", options.out / f"{name}.png"
        if table.exists() and (plot.exists() or not draws):
            print(f"{name}: done before -> {table}")
            continue
        annotation = annotations.get(name, Annotation())
        pieces = _pieces(options, path, name, score, annotation.num_frames)
        replace_file(table, partial(_write_table, pieces))
        if draws:
            replace_file(plot, partial(_draw, name, pieces, annotation.intervals))
        _kept_file(options, name).unlink(missing_ok=True)
        print(_sentence(name, pieces, table))
    if not draws:
        print('Plots need matplotlib: pip install "lightning-methods[demos]"', file=sys.stderr)


def _names(options: Namespace) -> list[str]:
    """Of the videos, by which their results are called and their annotations found."""
    for name in ("clip_length", "frame_interval", "batch_size", "windows"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise _InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    absent = next((path for path in options.videos if not path.exists()), None)
    if absent is not None:  # told before the folder of results is made
        raise _InputError(f"{absent}: there is no such file or folder")
    names = [path.resolve().name for path in options.videos]
    again = next((name for name in names if names.count(name) > 1), None)
    if again is not None:
        raise _InputError(f"several videos are called {again}: their results would replace each other in one --out")
    return names


def _annotations(path: Path) -> Mapping[str, Annotation]:
    try:
        return read_any_annotations(path)
    except ValueError as error:
        raise _InputError(str(error)) from error


def _settings(options: Namespace) -> dict[str, Any]:
    """All that decides a result, apart from the video."""
    checkpoint = options.checkpoint
    return {
        "model": options.model,
        "checkpoint": None if checkpoint is None else str(checkpoint.resolve()),
        "checkpoint_modified": None if checkpoint is None else checkpoint.stat().st_mtime_ns,
        "annotation": None if options.annotation is None else str(options.annotation.resolve()),
        "clip_length": options.clip_length,
        "frame_interval": options.frame_interval,
        "windows": options.windows,
        "batch_size": options.batch_size,
        "device": str(options.device),
        "torch": version("torch"),
    }


def _pieces(options: Namespace, path: Path, name: str, score: Scorer, expected: int | None) -> FramePieces:
    with open_video(path) as source:
        if expected not in (None, source.num_frames):
            found = f"{path} has {source.num_frames} frames, but {options.annotation} says {expected}"
            raise _InputError(f"{found}: the anomalies would be drawn in the wrong places")
        frames, scores = source.num_frames, _scores(options, source, name, score)
    index = torch.arange(len(scores))
    values = torch.tensor(scores, dtype=torch.float64)
    return frame_level_pieces(
        torch.zeros_like(index), index, values, torch.tensor([frames]), smooth_segments=options.windows
    )


def _scores(options: Namespace, source: FrameSource, name: str, score: Scorer) -> list[float]:
    """Of all cells; each batch is written down, and what a stopped call wrote is not scored again."""
    shape = ClipShape(1, options.clip_length, options.frame_interval)
    cells = num_cells(source.num_frames, shape.span)
    file = _kept_file(options, name)
    scores = _kept(file)
    if len(scores) < cells:
        # Whole batches only: the rest is then in the batches of a run that was never stopped, with its very scores.
        del scores[len(scores) // options.batch_size * options.batch_size :]
        replace_file(file, partial(_write_scores, scores))
        with progress(name, len(scores), cells) as show, file.open("a") as lines:
            for batch in score_video(source, score, shape, options.batch_size, len(scores)):
                scores += batch.tolist()
                lines.writelines(f"{value!r}\n" for value in batch.tolist())
                lines.flush()
                show(len(scores))
    return scores


def _kept_file(options: Namespace, name: str) -> Path:
    path: Path = options.out / "parts" / f"{name}.txt"
    return path


def _kept(path: Path) -> list[float]:
    """Scores of a stopped call; the last line counts only if it was written to its end."""
    text = path.read_text() if path.exists() else ""
    return [float(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _write_scores(scores: Sequence[float], path: Path) -> None:
    path.write_text("".join(f"{value!r}\n" for value in scores))


def _write_table(pieces: FramePieces, path: Path) -> None:
    with path.open("w") as file:
        file.write("frame,score\n")
        frames = iter(range(int(pieces.lengths.sum())))
        for value, length in zip(pieces.values.tolist(), pieces.lengths.tolist(), strict=True):
            file.writelines(f"{frame},{value:.6g}\n" for frame in islice(frames, length))


def _draw(name: str, pieces: FramePieces, spans: Sequence[tuple[int, int]], path: Path) -> None:
    from matplotlib.figure import Figure

    edges = [0, *pieces.lengths.cumsum(0).tolist()]
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots()
    for number, (start, end) in enumerate(spans):
        axes.axvspan(start, end, color="C3", alpha=0.2, linewidth=0, label="_" * bool(number) + "annotated anomaly")
    axes.stairs(pieces.values.tolist(), edges, baseline=None, color="C0", label="score")
    if pieces.values.min() >= 0 and pieces.values.max() <= 1:
        axes.set_ylim(-0.02, 1.02)
    axes.set(xlim=(0, edges[-1]), xlabel="frame", ylabel="score")
    axes.set_title(name, loc="left")
    if spans:
        figure.legend(loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def _sentence(name: str, pieces: FramePieces, table: Path) -> str:
    best = int(pieces.values.argmax())
    end = int(pieces.lengths[: best + 1].sum())
    start = end - int(pieces.lengths[best])
    return f"{name}: highest score {float(pieces.values[best]):.3f}, in frames {start} … {end - 1} -> {table}"


def _sorry(sentence: str, status: int) -> int:
    print(sentence, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

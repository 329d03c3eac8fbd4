"""`lightning-methods score-frames`: trains StillMix's reference network on single frames, and scores every frame."""

from __future__ import annotations

import argparse
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_methods._files import claim_folder, replace_file
from lightning_methods.commands._progress import progress
from lightning_methods.datamodules import VideoSource
from lightning_methods.datamodules._scuba_folder import digest
from lightning_methods.datamodules._video_clips import OnError
from lightning_methods.datamodules._video_files import VideoKind
from lightning_methods.datamodules.stillmix_frames import (
    AllFrames,
    RandomFrames,
    frame_batches,
    random_frame_loader,
    split_key,
)
from lightning_methods.functional._seeds import seeded
from lightning_methods.modules import (
    FrameScores,
    SingleFrameClassifier,
    load_frame_scores,
    save_frame_scores,
    score_frames,
)

_PROG = "lightning-methods score-frames"
_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
#: Options that may change between a call and its continuation.
_FREE = ("out", "resume", "workers", "accelerator", "skip_errors")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, scores and writes the file; see `--help`.

    Args:
        argv: The options; None takes those of the process.

    Returns:
        Exit status: 0; 1 after an error, in a sentence; 130 if the user pressed Ctrl-C.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(given)
    try:
        _run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise  # Lightning turns Ctrl-C into this
        again = given if options.resume else [*given, "--resume"]
        print(f"Stopped. To go on: {_PROG} {shlex.join(again)}", file=sys.stderr)
        return 130
    return 0


def _sentence(error: Exception) -> str:
    """What is wrong; a process that decodes puts its traceback before."""
    text = str(error)
    return text.rpartition(f"{type(error).__name__}: ")[2].strip() if text.startswith("Caught ") else text


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=_PROG,
        description="Trains a 2-D network on single frames of a training set, scores every frame of the same set by "
        "how sure the network is of it, and writes the scores to a file for FrameBankSpec.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--list", required=True, type=Path, metavar="FILE", help="lines `folder num_frames label` or `path label`")
    add("--root", required=True, type=Path, metavar="DIR", help="the folder that names in the list are relative to")
    add("--out", required=True, type=Path, metavar="FILE", help="the score file, .npz; FILE.work is kept beside it")
    add("--resume", action="store_true", help="go on with what a stopped call left in FILE.work")
    add("--kind", choices=get_args(VideoKind), default="auto", help="what the videos are")
    add("--template", help='names of frames, e.g. "frame{:06d}.jpg"')
    add("--network", default="resnet50", metavar="NAME", help="in timm: the 2-D twin of your video network")
    add("--weights", default="imagenet", help="to start with: imagenet (timm downloads them), none, or a file")
    add("--num-classes", type=int, metavar="K", help="default: the largest label + 1")
    add("--epochs", type=int, default=50, help="one frame of each video an epoch")
    add("--milestones", type=int, nargs="*", default=[20, 40], help="epochs after which the rate is divided by 10")
    add("--lr", type=float, default=0.04, help="published: 0.04 with batch 256, 0.01 with batch 64")
    add("--batch-size", type=int, default=256)
    add("--weight-decay", type=float, default=1e-5)
    add("--resize", type=int, default=256, help="side to which training frames are resized before the crop")
    add("--size", type=int, default=224, help="side of the crop, and of the frames that are scored")
    add("--every", type=int, metavar="N", help="score every Nth frame; default: all images, every 20th of video files")
    add("--temperature", type=float, default=1.0, help="of the softmax")
    add("--seed", type=int, default=0)
    add("--precision", choices=list(_AUTOCAST), default="32-true")
    add("--accelerator", default="auto", help="of Lightning's Trainer")
    add("--workers", type=int, default=4, metavar="N", help="processes that decode")
    add("--skip-errors", action="store_true", help="go on without videos that cannot be read, and count them")
    add("--videos-per-part", type=int, default=200, metavar="N", help="how many videos are scored between two savings")
    return parser


def _run(options: Namespace) -> None:
    source = VideoSource(options.list, options.root, options.kind, options.template)
    on_error: OnError = "skip" if options.skip_errors else "raise"
    training = RandomFrames(source, resize=options.resize, size=options.size, seed=options.seed, on_error=on_error)
    frames = AllFrames(source, size=options.size, every=options.every, on_error=on_error)
    work = options.out.with_name(f"{options.out.name}.work")
    network = _network(source, work, options)
    # What is wrong with the options has been said by now: a folder of results is for those that work.
    settings = {name: _plain(value) for name, value in vars(options).items() if name not in _FREE}
    claim_folder(work, settings, resume=options.resume)
    _train(network, training, work, options)
    scores = _score(network, frames, work, options)
    if unread := {entry.name for entry in frames.videos.entries}.difference(split_key(key)[0] for key in scores.keys):
        print(f"{len(unread)} of {len(frames)} videos could not be read; first: {min(unread)}", file=sys.stderr)
    save_frame_scores(options.out, scores)
    low, high = scores.top_prob.aminmax()
    print(f"{len(scores.keys)} frames, scored {low:.3g} to {high:.3g}: {options.out}")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _network(source: VideoSource, work: Path, options: Namespace) -> SingleFrameClassifier:
    pretrained = {"imagenet": True, "none": False}.get(options.weights, options.weights)
    begun = (work / "network.pt").exists() or (work / "training.ckpt").exists()
    torch.manual_seed(options.seed)
    return SingleFrameClassifier(
        options.network,
        options.num_classes or 1 + max(entry.label for entry in source.entries()),
        pretrained=not begun and pretrained,
        lr=options.lr,
        weight_decay=options.weight_decay,
        milestones=options.milestones,
    )


def _train(network: SingleFrameClassifier, frames: RandomFrames, work: Path, options: Namespace) -> None:
    file, last = work / "network.pt", work / "training.ckpt"
    if not file.exists():
        loader = random_frame_loader(frames, batch_size=options.batch_size, num_workers=options.workers)
        with progress("epochs", 0, options.epochs) as show:
            trainer = Trainer(
                max_epochs=options.epochs,
                accelerator=options.accelerator,
                devices=1,
                precision=options.precision,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[_Epochs(last, options.seed, show)],
            )
            trainer.fit(network, loader, ckpt_path=last if last.exists() else None)
        replace_file(file, lambda path: torch.save(network.state_dict(), path))
        last.unlink(missing_ok=True)
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    if options.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        network.cuda()


class _Epochs(Callback):
    """Saves after each epoch; random numbers of an epoch do not depend on how often the run was stopped before."""

    def __init__(self, file: Path, seed: int, show: Callable[[int], None]) -> None:
        self.file, self.seed, self.show = file, seed, show

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Called before each epoch: seeds what the network draws, dropout for one."""
        self.show(trainer.current_epoch)
        torch.manual_seed(seeded("epoch", self.seed, trainer.current_epoch).initial_seed())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Called after each epoch: saves it."""
        replace_file(self.file, trainer.save_checkpoint)
        self.show(trainer.current_epoch + 1)


def _score(network: SingleFrameClassifier, frames: AllFrames, work: Path, options: Namespace) -> FrameScores:
    parts = []
    with progress("videos", 0, len(frames)) as show:
        for start in range(0, len(frames), options.videos_per_part):
            videos = range(start, min(start + options.videos_per_part, len(frames)))
            # Named after its lines, for a list may be mended before a stopped call goes on.
            lines = digest(*(repr(frames.videos.entries[video]) for video in videos))
            file = work / f"scores-{videos.start:08}-{lines}.npz"
            if not file.exists():
                batches = frame_batches(frames, videos, batch_size=options.batch_size, num_workers=options.workers)
                save_frame_scores(file, _score_part(network, batches, options))
            parts.append(load_frame_scores(file))
            show(videos.stop)
    return FrameScores(
        tuple(key for part in parts for key in part.keys),
        torch.cat([part.target_prob for part in parts]),
        torch.cat([part.top_prob for part in parts]),
    )


def _score_part(network: SingleFrameClassifier, batches: Iterator[Any], options: Namespace) -> FrameScores:
    first = next(batches, None)
    if first is None:  # all of its videos were skipped
        return FrameScores((), torch.zeros(0), torch.zeros(0))
    autocast = _AUTOCAST[options.precision]
    return score_frames(network, chain([first], batches), temperature=options.temperature, autocast=autocast)

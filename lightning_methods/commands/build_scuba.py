"""`lightning-methods build-scuba`: test sets that tell motion from still evidence, made from any videos."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from lightning_methods.commands._progress import progress
from lightning_methods.datamodules._video_files import VideoKind
from lightning_methods.datamodules.stillmix import VideoSource
from lightning_methods.datamodules.stillmix_scuba import build_scuba, build_scufo


def main(argv: Sequence[str] | None) -> int:
    """Writes a SCUBA set and, if asked, its SCUFO twin.

    Args:
        argv: The arguments; None takes those of the process.

    Returns:
        0; 1 after one readable error on stderr; 130 if the user pressed Ctrl-C.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(given)
    try:
        _build(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. What is finished is kept; the same command goes on.", file=sys.stderr)
        return 130
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning-methods build-scuba",
        description="Writes videos whose foreground moves before a still background of another scene (SCUBA): "
        "folders of frames, OUT/list.txt and OUT/manifest.json. A stopped call is continued by the same command.",
    )
    parser.add_argument("list", type=Path, help="text file: `path label` or `folder num_frames label`, a line a video")
    parser.add_argument("root", type=Path, help="folder of the videos")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--kind", choices=get_args(VideoKind), default="auto", help="of the videos (default: auto)")
    parser.add_argument("--template", help="name of a frame by its number, such as 'img_{:05}.jpg'")
    parser.add_argument("--with-offset", action="store_true", help="lines are `folder start num_frames label`")
    parser.add_argument("--masks", type=Path, metavar="DIR", help="foreground masks (default: what moves, a guess)")
    parser.add_argument(
        "--backgrounds", default="stripes", metavar="stripes|DIR", help="stripes (default) or a folder of images"
    )
    parser.add_argument("--per-video", type=int, default=5, metavar="N", help="videos made from each (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    parser.add_argument("--conflicting", action="store_true", help="add the still foreground of another video")
    parser.add_argument("--valid-only", action="store_true", help="leave out videos whose foreground is too small")
    parser.add_argument("--skip-errors", action="store_true", help="go on where a video or its masks cannot be read")
    parser.add_argument("--scufo", type=Path, metavar="DIR", help="write a frozen frame of each made video, too")
    return parser


def _build(options: Namespace) -> None:
    videos = VideoSource(options.list, options.root, options.kind, options.template, options.with_offset)
    with progress("videos", 0, len(videos.entries())) as show:
        made = build_scuba(
            videos,
            options.masks,
            options.backgrounds,
            options.out,
            per_video=options.per_video,
            seed=options.seed,
            conflicting=options.conflicting,
            valid_only=options.valid_only,
            on_error="skip" if options.skip_errors else "raise",
            progress=lambda done, _total: show(done),
        )
    print(f"{_count(made)} videos: {made}")
    if options.scufo:
        still = build_scufo(VideoSource(made, options.out, "frames"), options.scufo, seed=options.seed)
        print(f"{_count(still)} still frames: {still}")


def _count(list_file: Path) -> int:
    return len(list_file.read_text().splitlines())

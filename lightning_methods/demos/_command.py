"""The options that all demos share, and how one is run from the command line."""

from __future__ import annotations

import shlex
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from lightning_methods._files import FolderError
from lightning_methods.demos._experiment import Experiment, collect
from lightning_methods.demos._records import ResultFolder

_EXTRA = ("sklearn", "matplotlib", "rich")


def demo_parser(name: str, description: str) -> ArgumentParser:
    """A parser with the options of every demo; the demo adds its own.

    Args:
        name: Name of the demo, as in `lightning-methods demo NAME`.
        description: What it shows, in a sentence or two.
    """
    parser = ArgumentParser(prog=f"lightning-methods demo {name}", description=description)
    parser.add_argument("--seeds", type=_positive, metavar="N", help="number of paired seeds")
    parser.add_argument("--out", type=Path, metavar="DIR", help="output folder (default: runs/DEMO)")
    parser.add_argument("--fast", action="store_true", help="fewer seeds and epochs: see that it works")
    parser.add_argument("--resume", action="store_true", help="go on with what a stopped call left in DIR")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def run_demo(
    parser: ArgumentParser, argv: Sequence[str] | None, experiment_of: Callable[[Namespace], Experiment]
) -> int:
    """Parses the options, runs the experiment they ask for and reports.

    Args:
        parser: From `demo_parser`.
        argv: The options; None takes the program's own.
        experiment_of: Makes the experiment from the parsed options.

    Returns:
        Exit status: 0; 1 if the extra `demos` is not installed; 2 if the output folder cannot be used; 130 if the
        user pressed Ctrl-C.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    options = parser.parse_args(given)
    if missing := [package for package in _EXTRA if find_spec(package) is None]:
        return _sorry(f'The demos need {", ".join(missing)}: pip install "lightning-methods[demos]"', 1)
    experiment = experiment_of(options)
    folder = options.out or Path("runs") / (f"{experiment.name}-fast" if options.fast else experiment.name)
    try:
        _run(experiment, folder, options)
    except FolderError as error:
        return _sorry(f"{error}.", 2)
    except KeyboardInterrupt:
        again = given if options.resume else [*given, "--resume"]
        return _sorry(f"Stopped. Finished runs are kept; to go on: {parser.prog} {shlex.join(again)}", 130)
    return 0


def _run(experiment: Experiment, path: Path, options: Namespace) -> None:
    # These need the extra, which has only now been found to be there.
    from rich.console import Console

    from lightning_methods.demos._report import LiveScreen, versions, write_report

    start = time.perf_counter()
    settings = {"experiment": experiment.name, "settings": experiment.settings, "versions": versions()}
    folder = ResultFolder(path)
    folder.open(settings, resume=options.resume)
    count = options.seeds or experiment.seeds
    seeds = range(experiment.first_seed, experiment.first_seed + count)
    console = Console(markup=False, highlight=False)
    runs = len(experiment.worlds) * len(experiment.arms) * len(seeds)
    with LiveScreen(console, experiment, runs) as screen:
        results = collect(experiment, folder, seeds, screen)
    about = {**settings, "seconds_of_this_call": round(time.perf_counter() - start, 3)}
    write_report(experiment, results, about, path, console)


def _sorry(sentence: str, status: int) -> int:
    print(sentence, file=sys.stderr)
    return status

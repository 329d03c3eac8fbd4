"""How far something is that takes long: a bar where somebody is looking, else a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

_EVERY = 60.0  # seconds


@contextmanager
def progress(title: str, done: int, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr if that is a terminal and rich is installed, else lines. Gives what is told how far it is.

    Args:
        title: Stands in front of the bar.
        done: How far it is at the start.
        total: How far it will be.
    """
    if find_spec("rich") is None or not sys.stderr.isatty():
        yield _lines(title, total)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    text = TextColumn("{task.description}", markup=False)
    columns = text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda now: bar.update(task, completed=now)


def _lines(title: str, total: int) -> Callable[[int], None]:
    said = time.monotonic()

    def show(now: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _EVERY:
            said = time.monotonic()
            print(f"{title}: {now:,} of {total:,}", file=sys.stderr, flush=True)

    return show

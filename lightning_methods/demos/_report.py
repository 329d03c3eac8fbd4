"""What a demo leaves behind: a table in the terminal, a plot, and one JSON file with everything."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lightning_methods._files import replace_file, write_json
from lightning_methods.demos._experiment import Experiment, Results
from lightning_methods.demos._records import Record
from lightning_methods.demos._statistics import Estimate, Summary, summarise

_PACKAGES = ("lightning-methods", "torch", "pytorch-lightning", "torchmetrics", "timm", "kornia", "scikit-learn")
_GAP = 2  # between two columns of a table


def versions() -> dict[str, str]:
    """Python and the packages that decide the figures."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


class LiveScreen:
    """Live progress in the terminal, and a line for each run that finishes. A context manager.

    Args:
        console: Where to write.
        experiment: What is being run.
        runs: Number of runs in all.
    """

    def __init__(self, console: Console, experiment: Experiment, runs: int) -> None:
        self._experiment = experiment
        self._live = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._all = self._live.add_task(f"{runs} runs", total=runs)
        self._now = self._live.add_task("", total=1.0)

    def __enter__(self) -> LiveScreen:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def begin(self, text: str) -> None:
        """A piece of work begins."""
        self._live.reset(self._now, description=text)

    def progress(self, share: float) -> None:
        """This share of it, 0 to 1, is done."""
        self._live.update(self._now, completed=share)

    def finished(self, record: Record, fresh: bool) -> None:
        """A run is done, now (`fresh`) or before a stop."""
        self._live.advance(self._all)
        shown = ", ".join(
            f"{metric.title} {record.metrics[name]:.{metric.digits}f}"
            for name, metric in self._experiment.metrics.items()
        )
        world = f"{record.world}: " if len(self._experiment.worlds) > 1 else ""
        when = f"{record.seconds:.1f} s" if fresh else "done before"
        arm = self._experiment.arms[record.arm]
        self._live.console.print(f"{world}seed {record.seed}  {arm}: {shown}  ({when})", soft_wrap=True)


def write_report(
    experiment: Experiment, results: Results, about: Mapping[str, Any], folder: Path, console: Console
) -> None:
    """Prints the table and writes `result.png` and `result.json`, the latter with `about` in it."""
    summaries = summarise(experiment, results)
    for world, arms in summaries.items():
        title = experiment.title if len(summaries) == 1 else f"{experiment.title}: {world}"
        console.print(title, style="bold", soft_wrap=True)
        for name, value in results.facts[world].items():
            console.print(f"{name}: {value:.4g}", soft_wrap=True)
        for table in _tables(experiment, arms, console.width):
            console.print(table)
        for table in _seed_tables(experiment, arms, console.width):
            console.print(table)
    for sentence in (*experiment.notes, _reading(experiment)):
        console.print(sentence, soft_wrap=True)
    replace_file(folder / "result.png", lambda path: _plot(experiment, summaries).savefig(path, dpi=150))
    write_json(
        folder / "result.json",
        {
            **about,
            "title": experiment.title,
            "machine": f"{platform.machine()} {platform.system()}",
            "seconds_of_runs": round(sum(record.seconds for record in results.records), 3),
            "facts": results.facts,
            "summary": {
                world: {arm: asdict(summary) for arm, summary in arms.items()} for world, arms in summaries.items()
            },
            "records": [asdict(record) for record in results.records],
        },
    )
    console.print(f"Everything is in {folder}: result.json, result.png and a record of each run.", soft_wrap=True)


def _tables(experiment: Experiment, arms: Mapping[str, Summary], width: int) -> Iterator[Table]:
    """All metrics, a line for each arm; as many columns side by side as fit into `width`."""
    titles = [experiment.arms[arm] for arm in arms]
    first = max(map(len, ["arm", *titles])) + _GAP + 1  # the left edge
    for columns in _fitting(_columns(experiment, list(arms.values())), width - first):
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("arm", no_wrap=True)
        for column in columns:
            table.add_column(column[0], justify="right", no_wrap=True)
        for title, *cells in zip(titles, *(column[1:] for column in columns), strict=True):
            table.add_row(title, *cells)
        yield table


def _columns(experiment: Experiment, summaries: Sequence[Summary]) -> Iterator[list[str]]:
    """Title and cells of each column: the headline metric, how it differs from the baselines, the other metrics."""
    for name, metric in experiment.metrics.items():
        yield [metric.title, *(_shown(summary.estimates[name], metric.digits) for summary in summaries)]
        if name != next(iter(experiment.metrics)):
            continue
        for baseline in experiment.baselines:
            differences = (summary.differences[name].get(baseline) for summary in summaries)
            title = f"minus {experiment.arms[baseline]}"
            yield [title, *(_difference(difference, metric.digits) for difference in differences)]


def _fitting(columns: Iterable[list[str]], width: int) -> Iterator[list[list[str]]]:
    """The columns, as many at a time as fit into `width`, at least one."""
    some: list[list[str]] = []
    left = width
    for column in columns:
        size = max(map(len, column)) + _GAP
        if some and size > left:
            yield some
            some, left = [], width
        some.append(column)
        left -= size
    yield some


def _seed_tables(experiment: Experiment, arms: Mapping[str, Summary], width: int) -> Iterator[Table]:
    """The headline metric of every run, a line for each arm; as many seeds side by side as fit into `width`."""
    headline = next(iter(experiment.metrics))
    digits = experiment.metrics[headline].digits
    cells = {
        arm: [f"{value:.{digits}f}" for value in summary.values[headline].values()] for arm, summary in arms.items()
    }
    seeds = [str(seed) for seed in next(iter(arms.values())).values[headline]]
    first = max(len(experiment.arms[arm]) for arm in arms) + _GAP
    other = max(len(cell) for column in (seeds, *cells.values()) for cell in column) + _GAP
    fitting = max(1, (width - first) // other)
    for start in range(0, len(seeds), fitting):
        some = slice(start, start + fitting)
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("seed", no_wrap=True)
        for seed in seeds[some]:
            table.add_column(seed, justify="right", no_wrap=True)
        for arm, values in cells.items():
            table.add_row(experiment.arms[arm], *values[some])
        yield table


def _shown(value: Estimate, digits: int, sign: str = "") -> str:
    margin = "" if value.margin is None else f" ± {value.margin:.{digits}f}"
    return f"{value.mean:{sign}.{digits}f}{margin}"


def _difference(value: Estimate | None, digits: int) -> str:
    if value is None:
        return ""
    return _shown(value, digits, "+") if value.clear else f"({_shown(value, digits, '+')})"


def _reading(experiment: Experiment) -> str:
    mean = "Mean ± half the 95 % interval over seeds (Student's t)."
    if not experiment.baselines:
        return mean
    return f"{mean} Differences are paired by seed; in brackets: the interval holds 0, so no difference is shown."


def _plot(experiment: Experiment, summaries: Mapping[str, Mapping[str, Summary]]) -> Figure:
    """One row a world: the headline metric, and next to it the differences from each baseline."""
    rows, columns = len(experiment.worlds), 1 + len(experiment.baselines)
    figure = Figure(figsize=(2.5 + 3.5 * columns, (1.5 + 0.35 * len(experiment.arms)) * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey="row")
    headline = next(iter(experiment.metrics))
    for axes, (world, arms) in zip(grid, summaries.items(), strict=True):
        values = {arm: list(summary.values[headline].values()) for arm, summary in arms.items()}
        _draw(axes[0], {arm: (values[arm], summary.estimates[headline]) for arm, summary in arms.items()})
        title = experiment.metrics[headline].title
        axes[0].set_xlabel(title if rows == 1 else f"{world}: {title}")
        axes[0].set_yticks(range(len(arms)), [experiment.arms[arm] for arm in arms])
        axes[0].invert_yaxis()
        for axis, baseline in zip(axes[1:], experiment.baselines, strict=True):
            pairs = {
                arm: [own - other for own, other in zip(values[arm], values[baseline], strict=True)] for arm in arms
            }
            rest = {arm: summary.differences[headline].get(baseline) for arm, summary in arms.items()}
            _draw(axis, {arm: (pairs[arm], rest[arm]) for arm in arms})
            axis.axvline(0, color="0.6", linewidth=1, zorder=0)
            axis.set_xlabel(f"minus {experiment.arms[baseline]}")
    figure.suptitle(experiment.title)
    return figure


def _draw(axes: Axes, rows: Mapping[str, tuple[list[float], Estimate | None]]) -> None:
    for place, (values, estimate) in enumerate(rows.values()):
        if estimate is None:  # the baseline itself
            continue
        axes.plot(values, [place] * len(values), "o", color="0.7", markersize=4)
        axes.errorbar(estimate.mean, place, xerr=estimate.margin, fmt="s", color="C0", markersize=5, capsize=3)
    axes.grid(axis="x", color="0.9")

"""A controlled experiment: arms that differ in one thing, run on the same seeds."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from pytorch_lightning import seed_everything

from lightning_methods.demos._records import Record, ResultFolder


@dataclass(frozen=True)
class Metric:
    """How a measured value is shown.

    Args:
        title: Name and unit.
        digits: Decimals.
    """

    title: str
    digits: int = 2


@dataclass(frozen=True)
class Shared:
    """What all runs of a world share, such as a trained teacher.

    Args:
        value: Handed to every run.
        facts: Figures about it, for the report.
    """

    value: Any = None
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Where an experiment prepares what the runs of a world share.

    Args:
        world: The world to prepare.
        folder: Keeps large results between a stop and `--resume`; see `kept_state`.
        progress: Takes the share that is done, 0 to 1.
    """

    world: str
    folder: Path
    progress: Callable[[float], None]


@dataclass(frozen=True)
class Run:
    """One training to measure. Torch's, NumPy's and Python's generators have just been seeded with `seed`.

    Args:
        world: The world.
        arm: The arm.
        seed: The seed; the same seeds go to every arm.
        shared: The value that `prepare` gave for this world.
        progress: Takes the share that is done, 0 to 1.
    """

    world: str
    arm: str
    seed: int
    shared: Any
    progress: Callable[[float], None]


@dataclass(frozen=True)
class Experiment:
    """What a demo runs and measures.

    Args:
        name: Names the default output folder.
        title: Heads the report.
        arms: Title of each arm by its key, in the order of the report.
        metrics: The measured values by name; the first is the headline.
        run: Trains and measures one arm on one seed. A function of its argument alone, whatever ran before.
        prepare: Makes what the runs of a world share. Called once per world and process, so also on resuming.
        settings: Everything else that decides the figures, as JSON types: a folder is resumed with equal ones only.
        worlds: Worlds in which all the arms run.
        baselines: Arms that the others are compared with, seed by seed.
        seeds: How many seeds if the user does not say.
        first_seed: The first of them.
        notes: Sentences under the report.
        pictures: Further plots, by the name of their file: functions that return a matplotlib figure.

    Raises:
        ValueError: `arms`, `worlds` or `metrics` is empty, a key does not make a file name, or a baseline is no arm.
    """

    name: str
    title: str
    arms: Mapping[str, str]
    metrics: Mapping[str, Metric]
    run: Callable[[Run], Mapping[str, float]]
    prepare: Callable[[Stage], Shared] = lambda stage: Shared()  # noqa: ARG005
    settings: Mapping[str, Any] = field(default_factory=dict)
    worlds: Sequence[str] = ("main",)
    baselines: Sequence[str] = ()
    seeds: int = 5
    first_seed: int = 0
    notes: Sequence[str] = ()
    pictures: Mapping[str, Callable[[], Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for argument in ("arms", "worlds", "metrics"):
            if not getattr(self, argument):
                raise ValueError(f"{argument} must not be empty")
        for key in (self.name, *self.arms, *self.worlds):
            if not re.fullmatch(r"[\w.,=+-]*\w", key):
                raise ValueError(f"name, arms and worlds must make file names, got {key!r}")
        if unknown := set(self.baselines) - set(self.arms):
            raise ValueError(f"baselines must be among the arms {list(self.arms)}, got {sorted(unknown)}")


class Screen(Protocol):
    """Where `collect` says how far it is."""

    def begin(self, text: str) -> None:
        """A piece of work begins."""

    def progress(self, share: float) -> None:
        """This share of it, 0 to 1, is done."""

    def finished(self, record: Record, fresh: bool) -> None:
        """A run is done, now (`fresh`) or before a stop."""


@dataclass(frozen=True)
class Results:
    """What an experiment measured.

    Args:
        records: All runs.
        facts: Figures about what the runs of each world share.
    """

    records: Sequence[Record]
    facts: Mapping[str, Mapping[str, float]]


def collect(experiment: Experiment, folder: ResultFolder, seeds: Sequence[int], screen: Screen) -> Results:
    """Runs what has not finished yet and returns everything.

    A run that was stopped half-way starts again. Each begins from its seed, so the figures are bit for bit
    those of an experiment that was never stopped.
    """
    records: list[Record] = []
    facts: dict[str, Mapping[str, float]] = {}
    with _one_thread():
        for world in experiment.worlds:
            screen.begin(f"{world}: preparing" if len(experiment.worlds) > 1 else "preparing")
            seed_everything(0, verbose=False)
            shared = experiment.prepare(Stage(world, folder.shared(world), screen.progress))
            facts[world] = dict(shared.facts)
            # Seeds outermost: an unfinished experiment has compared all arms on its first seeds.
            for seed in seeds:
                for arm in experiment.arms:
                    record = folder.read(world, arm, seed)
                    fresh = record is None
                    if record is None:
                        screen.begin(f"{experiment.arms[arm]}, seed {seed}")
                        record = _measure(experiment, Run(world, arm, seed, shared.value, screen.progress))
                        folder.write(record)
                    screen.finished(record, fresh)
                    records.append(record)
    return Results(records, facts)


def _measure(experiment: Experiment, run: Run) -> Record:
    seed_everything(run.seed, verbose=False)
    start = time.perf_counter()
    metrics = {name: float(value) for name, value in experiment.run(run).items()}
    if metrics.keys() != experiment.metrics.keys():
        raise ValueError(f"run must measure {list(experiment.metrics)}, but gave {list(metrics)}")
    return Record(run.world, run.arm, run.seed, metrics, round(time.perf_counter() - start, 3))


@contextmanager
def _one_thread() -> Iterator[None]:
    # Networks of this size are faster on one thread, and sums are then added in the same order on every machine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

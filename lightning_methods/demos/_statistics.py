"""Means over seeds, and differences paired by seed, with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from lightning_methods.demos._experiment import Experiment, Results

Values = dict[int, float]  # by seed


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: The mean.
        margin: Half the width of its 95 % interval; None for a single seed.
    """

    mean: float
    margin: float | None

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.margin is not None and abs(self.mean) > self.margin


@dataclass(frozen=True)
class Summary:
    """One arm in one world.

    Args:
        values: Every value, by metric and seed.
        estimates: Their means, by metric.
        differences: Mean of this arm minus a baseline, paired by seed; by metric and baseline.
    """

    values: dict[str, Values]
    estimates: dict[str, Estimate]
    differences: dict[str, dict[str, Estimate]]


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval by Student's t, for values that are independent and roughly normal.

    Example:
        >>> found = estimate([1.0, 2.0, 3.0])
        >>> found.mean, round(found.margin, 4)
        (2.0, 2.4841)
    """
    if len(values) < 2:
        return Estimate(fmean(values), None)
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # comes with scikit-learn

    quantile = float(stdtrit(len(values) - 1, 0.975))
    return Estimate(fmean(values), quantile * stdev(values) / sqrt(len(values)))


def summarise(experiment: Experiment, results: Results) -> dict[str, dict[str, Summary]]:
    """Summaries by world and arm, in the experiment's order."""
    return {
        world: {arm: _summary(experiment, results, world, arm) for arm in experiment.arms}
        for world in experiment.worlds
    }


def _summary(experiment: Experiment, results: Results, world: str, arm: str) -> Summary:
    values: dict[str, Values] = {}
    differences: dict[str, dict[str, Estimate]] = {}
    for metric in experiment.metrics:
        own = values[metric] = _values(results, world, arm, metric)
        differences[metric] = {}
        for baseline in experiment.baselines:
            if baseline != arm:
                other = _values(results, world, baseline, metric)
                differences[metric][baseline] = estimate([own[seed] - other[seed] for seed in own])
    return Summary(
        values=values,
        estimates={metric: estimate(list(of_seed.values())) for metric, of_seed in values.items()},
        differences=differences,
    )


def _values(results: Results, world: str, arm: str, metric: str) -> Values:
    return {
        record.seed: record.metrics[metric] for record in results.records if (record.world, record.arm) == (world, arm)
    }

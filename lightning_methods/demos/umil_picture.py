"""Test snippets as detectors see them: where they draw the line, and what an encoder makes of the features."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pytorch_lightning import seed_everything
from torch import Tensor

_SEED = 0
_COLOURS = ("0.55", "C3", "C1", "C0")

#: By title, what trains a detector and gives it and its data.
Trained = Mapping[str, Callable[..., tuple[Any, Any]]]


def score_maps(trained: Trained) -> Figure:
    """One panel a detector: snippets of abnormal test bags by kind, over the score of each place in the plane."""
    figure, panels = _panels(trained, "Snippets of abnormal test bags; the line is a score of 0.5", shared=True)
    for panel, (detector, data) in zip(panels, _train(trained), strict=True):
        features, kind = _abnormal_bags(data)
        axes = data.axes()
        cue, context = (features @ axes.T).unbind(-1)
        side = torch.linspace(-4, 4, 81)
        plane = torch.cartesian_prod(side, side).view(81, 81, 2)  # rows: context, columns: cue
        with torch.no_grad():
            score = detector(plane.flip(-1) @ axes).softmax(-1)[..., 1]
        panel.contourf(side, side, score.T, levels=torch.linspace(0, 1, 11).tolist(), cmap="Greys", alpha=0.35)
        panel.contour(side, side, score.T, levels=[0.5], colors="k", linewidths=1)
        _scatter(panel, context, cue, kind, data.kinds)
        panel.set_xlabel("context")
    panels[0].set_ylabel("cue")
    return _with_legend(figure, panels)


def feature_maps(trained: Trained) -> Figure:
    """Snippets of abnormal test bags on the first two principal axes: as they come, then one panel an encoder."""
    figure, panels = _panels(["the data", *trained], "Features of snippets of abnormal test bags", shared=False)
    for number, (detector, data) in enumerate(_train(trained)):
        features, kind = _abnormal_bags(data)
        with torch.no_grad():
            encoded = detector.encoder(features)
        for panel, points in [(panels[0], features)] * (number == 0) + [(panels[number + 1], encoded)]:
            rows = points.flatten(0, -2)
            centred = rows - rows.mean(0)
            axes = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
            first, second = (centred @ axes.T).unbind(-1)
            _scatter(panel, first, second, kind.flatten(), data.kinds)
            panel.set_xlabel("first principal axis")
    panels[0].set_ylabel("second")
    return _with_legend(figure, panels)


def _train(trained: Trained) -> Iterator[tuple[Any, Any]]:
    for train in trained.values():
        seed_everything(_SEED, verbose=False)
        yield train(seed=_SEED, progress=lambda _share: None)


def _abnormal_bags(data: Any) -> tuple[Tensor, Tensor]:
    """Features and kinds of their snippets."""
    features, label, _, _, kind = data.splits["test"]
    return features[label > 0], kind[label > 0]


def _panels(titles: Iterable[str], title: str, *, shared: bool) -> tuple[Figure, list[Axes]]:
    names = list(titles)
    figure = Figure(figsize=(5.2 * len(names), 4.6), layout="constrained")
    panels = list(figure.subplots(1, len(names), sharex=shared, sharey=shared, squeeze=False)[0])
    for panel, name in zip(panels, names, strict=True):
        panel.set_title(name)
    figure.suptitle(title)
    return figure, panels


def _scatter(panel: Axes, x: Tensor, y: Tensor, kind: Tensor, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        chosen = kind == number
        panel.plot(x[chosen], y[chosen], ".", color=_COLOURS[number], markersize=3, label=name, alpha=0.6)


def _with_legend(figure: Figure, panels: list[Axes]) -> Figure:
    figure.legend(*panels[-1].get_legend_handles_labels(), markerscale=3, loc="outside lower center", ncols=4)
    return figure

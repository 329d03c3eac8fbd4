"""Test snippets in the plane of cue and context, and where detectors draw the line."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from matplotlib.figure import Figure
from pytorch_lightning import seed_everything

_SEED = 0
_COLOURS = ("0.55", "C3", "C1", "C0")


def score_maps(trained: Mapping[str, Callable[..., tuple[Any, Any]]]) -> Figure:
    """One panel a detector: snippets of abnormal test bags by kind, over the score of each place in the plane.

    Args:
        trained: By title, what trains a detector and gives it and its data.
    """
    figure = Figure(figsize=(5.2 * len(trained), 4.4), layout="constrained")
    panels = figure.subplots(1, len(trained), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (title, train) in zip(panels, trained.items(), strict=True):
        seed_everything(_SEED, verbose=False)
        detector, data = train(seed=_SEED, progress=lambda _share: None)
        features, label, _, _, kind = data.splits["test"]
        axes = data.axes()
        inside = label > 0
        cue, context = (features[inside] @ axes.T).unbind(-1)
        side = torch.linspace(-4, 4, 81)
        plane = torch.cartesian_prod(side, side).view(81, 81, 2)  # rows: context, columns: cue
        with torch.no_grad():
            score = detector(plane.flip(-1) @ axes).softmax(-1)[..., 1]
        panel.contourf(side, side, score.T, levels=torch.linspace(0, 1, 11).tolist(), cmap="Greys", alpha=0.35)
        panel.contour(side, side, score.T, levels=[0.5], colors="k", linewidths=1)
        for number, name in enumerate(data.kinds):
            of_kind = kind[inside] == number
            panel.plot(context[of_kind], cue[of_kind], ".", color=_COLOURS[number], markersize=3, label=name, alpha=0.6)
        panel.set_title(title)
        panel.set_xlabel("context")
    panels[0].set_ylabel("cue")
    figure.legend(*panels[-1].get_legend_handles_labels(), markerscale=3, loc="outside lower center", ncols=4)
    figure.suptitle("Snippets of abnormal test bags; the line is a score of 0.5")
    return figure

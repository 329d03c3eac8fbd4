"""Do clusters of neighbours help a Transformer that has to vote within phrases of unknown length?

Tokens show the class of their phrase half of the time, so each is best told by a vote in its own phrase; where phrases
end is marked, but by a cue that attention has to learn to use. The Transformer, its optimizer and its data are the same
in both arms; the arms differ in the list of callbacks. Two worlds: "few", 512 training sequences, and "many", a fresh
sequence every time.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from lightning_methods._files import replace_file
from lightning_methods.attach import Method
from lightning_methods.callbacks import AdaClustFormer
from lightning_methods.datamodules import PhrasesDataModule
from lightning_methods.datamodules.acf_worlds import phrase_vote
from lightning_methods.demos._command import demo_parser, run_demo
from lightning_methods.demos._experiment import Experiment, Metric, Run, Shared, Stage
from lightning_methods.demos._training import evaluate, fit
from lightning_methods.demos.acf_models import TokenTagger


@dataclass(frozen=True)
class Arm:
    """One arm.

    Args:
        title: What the report calls it.
        options: Arguments of the callback; None: no callback.
        model: Arguments of the model; the same in both arms but for the search of `--tune`.
    """

    title: str
    options: Mapping[str, Any] | None = None
    model: Mapping[str, Any] = field(default_factory=dict)

    def callbacks(self) -> list[Method]:
        """The list for `Trainer(callbacks=...)`: all that the arms differ in."""
        return [] if self.options is None else [AdaClustFormer("module.blocks.*.attention", **self.options)]


# Each arm's learning rate did best of three on the validation split, on seeds that the report does not use (`--tune`).
# The clusters begin as the authors' do: the model is trained from scratch.
ARMS = {
    "plain": Arm("Transformer", model={"lr": 1e-3}),
    "acf": Arm("+ clusters", {"init_bias": None}, model={"lr": 1e-3}),
}
_TRIED = (1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class World:
    """How many training sequences there are, and how often they are seen."""

    title: str
    train_size: int
    epochs: int
    arms: Mapping[str, Arm] = field(default_factory=lambda: ARMS)

    def data(self, seed: int) -> PhrasesDataModule:
        """Its data."""
        return PhrasesDataModule(self.train_size, seed=seed)

    def prepare(self, stage: Stage) -> Shared:
        """What a vote within the true phrases reaches; and where to put the picture."""
        x, target, phrase = self.data(0).splits["test"]
        vote = (phrase_vote(x, phrase) == target).float().mean().item()
        return Shared(stage.folder, {"Vote within the true phrases, %": 100 * vote})

    def run(self, run: Run, split: Literal["val", "test"] = "test") -> dict[str, float]:
        """Trains in one arm and measures it."""
        arm = self.arms[run.arm]
        model, data = TokenTagger(**arm.model), self.data(run.seed)
        fit(
            model,
            data,
            epochs=self.epochs,
            callbacks=arm.callbacks(),
            progress=run.progress,
            gradient_clip_val=1.0,
        )
        accuracy = 100 * evaluate(model, data, split)[f"{split}_accuracy"]
        x, _, phrase = (part[:200] for part in data.splits[split])
        maps = attention_maps(model, x)
        if run.seed == 0 and split == "test":
            draw_maps(maps, phrase, run.shared / f"{run.arm}.png", f"{arm.title}: attention of a test sequence")
        return {"accuracy": accuracy, "separation": 100 * separation(maps[-1], phrase)}


def attention_maps(model: TokenTagger, x: Tensor) -> list[Tensor]:
    """What each layer gives as its attention weights (S, N, N), the mean of its heads."""
    maps: list[Tensor] = []

    def ask(attention: Any, args: tuple[Tensor, ...]) -> None:
        maps.append(attention.__class__.forward(attention, *args, need_weights=True)[1])

    attentions = [part for name, part in model.named_modules() if name.endswith(".attention")]
    handles = [attention.register_forward_pre_hook(ask) for attention in attentions]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return maps


def separation(weights: Tensor, phrase: Tensor) -> float:
    """Area under the curve with which weights (S, N, N) tell pairs of one phrase from pairs of two."""
    length = phrase.shape[1]
    off = ~torch.eye(length, dtype=torch.bool)
    same = phrase[:, :, None] == phrase[:, None, :]
    return float(binary_auroc(weights[:, off].flatten(), same[:, off].long().flatten()))


def draw_maps(maps: Sequence[Tensor], phrase: Tensor, path: Path, title: str) -> None:
    """The attention of every layer in the first sequence, with the true phrases as frames."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(4.5 * len(maps), 4.5), layout="constrained")
    figure.suptitle(title)
    for place, (axes, weights) in enumerate(zip(figure.subplots(1, len(maps)), maps, strict=True)):
        axes.imshow(weights[0], cmap="viridis")
        axes.set(title=f"layer {place}", xlabel="attended", ylabel="token")
        for number in range(int(phrase[0, -1]) + 1):
            (members,) = torch.where(phrase[0] == number)
            corner, side = members[0].item() - 0.5, len(members)
            axes.add_patch(Rectangle((corner, corner), side, side, fill=False, edgecolor="white"))
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=120))


WORLDS = {
    "few": World("512 training sequences", train_size=512, epochs=75),
    "many": World("a new sequence every time", train_size=76_800, epochs=1),
}
_FAST = {"few": replace(WORLDS["few"], epochs=15), "many": replace(WORLDS["many"], train_size=12_800)}


def candidates() -> dict[str, Arm]:
    """The settings that `--tune` tries, as arms."""
    return {
        f"{name}.lr={lr:g}": replace(arm, title=f"{arm.title}: lr={lr:g}", model={"lr": lr})
        for (name, arm), lr in product(ARMS.items(), _TRIED)
    }


def experiment(world: str = "few", *, fast: bool = False, tune: bool = False) -> Experiment:
    """The experiment in one of the worlds.

    Args:
        world: `"few"` or `"many"`.
        fast: Less training and fewer seeds.
        tune: The search for each arm's settings instead, on the validation split and on seeds of its own.
    """
    setup = (_FAST if fast else WORLDS)[world]
    if tune:
        setup = replace(setup, arms=candidates())
    arms = {name: {"options": arm.options, "model": dict(arm.model)} for name, arm in setup.arms.items()}
    return Experiment(
        name=f"acf-{world}-tune" if tune else f"acf-{world}",
        title=f"Classes of phrases, {setup.title}: accuracy on the {'validation' if tune else 'test'} split",
        arms={name: arm.title for name, arm in setup.arms.items()},
        metrics={"accuracy": Metric("accuracy, %"), "separation": Metric("phrases in the last layer, AUC %")},
        run=partial(setup.run, split="val" if tune else "test"),
        prepare=setup.prepare,
        settings={"train_size": setup.train_size, "epochs": setup.epochs, "arms": arms},
        worlds=(world,),
        baselines=() if tune else ("plain",),
        notes=() if tune else ("Pictures of the attention in a test sequence are in the folder shared/.",),
        seeds=2 if fast or tune else 5,
        first_seed=1000 if tune else 0,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    parser = demo_parser("acf", "Attention with learned clusters against plain attention, on phrases.")
    parser.add_argument(
        "--world", choices=sorted(WORLDS), default="few", help="few training sequences (default) or many"
    )
    parser.add_argument("--tune", action="store_true", help="show how the settings were chosen (world few)")

    def chosen(options: Namespace) -> Experiment:
        if options.tune and options.world != "few":
            parser.error("--tune searches the settings of --world few only")
        return experiment(options.world, fast=options.fast, tune=options.tune)

    return run_demo(parser, argv, chosen)


if __name__ == "__main__":
    sys.exit(main())

"""Do trajectories help where what matters is short in space and long in time?

A question names an object and asks for the state that it has in most frames of a video. In one frame, a burst of
look-alikes shows another state: counted in patches the wrong state wins, counted in frames it loses. The model, its
optimizer and its data are the same in all arms; the arms differ in the list of callbacks: torch's own attention over
everything; the trajectory-word attention told that there is one frame, which is word-to-patch attention with the very
same parameters; and told that there are eight.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, Literal

from lightning_methods.attach import Method
from lightning_methods.callbacks import TrajectoryWordAlignment
from lightning_methods.datamodules import ObjectStatesDataModule
from lightning_methods.datamodules.twbert_worlds import FRAMES, PATCHES
from lightning_methods.demos._command import demo_parser, run_demo
from lightning_methods.demos._experiment import Experiment, Metric, Run
from lightning_methods.demos._training import evaluate, fit
from lightning_methods.demos.twbert_models import VideoQuestionModel

#: Patches of the bursts in the test videos.
BURSTS = (0, 10)


@dataclass(frozen=True)
class Arm:
    """One arm.

    Args:
        title: What the report calls it.
        num_frames: Of the callback; None: no callback.
        model: Arguments of the model; the same in all arms but for the search of `--tune`.
    """

    title: str
    num_frames: int | None = None
    model: Mapping[str, Any] = field(default_factory=dict)

    def callbacks(self) -> list[Method]:
        """The list for `Trainer(callbacks=...)`: all that the arms differ in."""
        if self.num_frames is None:
            return []
        patches = FRAMES * PATCHES // self.num_frames
        where = "module.fusion.*.attention"
        return [TrajectoryWordAlignment(where, num_frames=self.num_frames, patches_per_frame=patches)]


# The learning rate is the published toy's. `--tune` tries two others in each arm, on the validation split and on seeds
# that the report does not use.
ARMS = {
    "plain": Arm("one attention"),
    "one-frame": Arm("word to patch", num_frames=1),
    "frames": Arm("trajectories", num_frames=FRAMES),
}
_TRIED = (1e-3, 3e-3, 1e-2)
_STEPS, _BATCH = 250, 128


def run(run: Run, arms: Mapping[str, Arm], steps: int, split: Literal["val", "test"] = "test") -> dict[str, float]:
    """Trains in one arm and measures it, on test videos with each size of bursts."""
    arm = arms[run.arm]
    model = VideoQuestionModel(**arm.model)
    data = ObjectStatesDataModule(steps * _BATCH, _BATCH, seed=run.seed)
    fit(
        model,
        data,
        epochs=1,
        callbacks=arm.callbacks(),
        gradient_clip_val=1.0,
    )
    run.progress(1.0)
    if split == "val":
        return {"accuracy": 100 * evaluate(model, data, split)["val_accuracy"]}
    tests = {burst: ObjectStatesDataModule(1, _BATCH, burst=burst) for burst in BURSTS}
    return {f"burst-{burst}": 100 * evaluate(model, test)["test_accuracy"] for burst, test in tests.items()}


def candidates() -> dict[str, Arm]:
    """The settings that `--tune` tries, as arms."""
    return {
        f"{name}.lr={lr:g}": replace(arm, title=f"{arm.title}: lr={lr:g}", model={"lr": lr})
        for (name, arm), lr in product(ARMS.items(), _TRIED)
    }


def experiment(*, fast: bool = False, tune: bool = False) -> Experiment:
    """The experiment.

    Args:
        fast: Less training and one seed.
        tune: The search for each arm's learning rate instead, on the validation split and on seeds of its own.
    """
    arms, steps = candidates() if tune else ARMS, 60 if fast else _STEPS
    metrics = {f"burst-{burst}": Metric(f"bursts of {burst}, accuracy %") for burst in reversed(BURSTS)}
    return Experiment(
        name="twbert-tune" if tune else "twbert",
        title=f"The state in most frames: accuracy on the {'validation' if tune else 'test'} split",
        arms={name: arm.title for name, arm in arms.items()},
        metrics={"accuracy": Metric("accuracy, %")} if tune else metrics,
        run=partial(run, arms=arms, steps=steps, split="val" if tune else "test"),
        settings={
            "steps": steps,
            "batch_size": _BATCH,
            "arms": {name: {"num_frames": arm.num_frames, "model": dict(arm.model)} for name, arm in arms.items()},
        },
        baselines=() if tune else ("one-frame",),
        notes=() if tune else ("Chance is 25 %. Word to patch has the very parameters of trajectories.",),
        seeds=1 if fast or tune else 3,
        first_seed=1000 if tune else 0,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    parser = demo_parser("twbert", "Attention that follows trajectories against attention over all patches.")
    parser.add_argument("--tune", action="store_true", help="show how the learning rates were chosen")

    def chosen(options: Namespace) -> Experiment:
        return experiment(fast=options.fast, tune=options.tune)

    return run_demo(parser, argv, chosen)


if __name__ == "__main__":
    sys.exit(main())

"""Do trajectories help where what matters is short in space and long in time?

A question names an object and asks for the state that it has in most frames of a video. In one frame, a burst of
look-alikes shows another state: counted in patches the wrong state wins, counted in frames it loses. The model, its
optimizer and its data are the same in all arms; the arms differ in the list of callbacks: torch's own attention over
everything; the trajectory-word attention told that there is one frame, which is word-to-patch attention with the very
same parameters; and told that there are eight. With `--world videos` the same world is in video files.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from lightning_methods.attach import Method
from lightning_methods.callbacks import TrajectoryWordAlignment
from lightning_methods.datamodules import ObjectStatesDataModule, ObjectVideosDataModule
from lightning_methods.datamodules.twbert_worlds import FRAMES, PATCHES
from lightning_methods.demos._command import demo_parser, run_demo
from lightning_methods.demos._experiment import Experiment, Metric, Run
from lightning_methods.demos._training import evaluate, fit
from lightning_methods.demos.twbert_models import FramesQuestionModel, VideoQuestionModel

#: Patches of the bursts in the test videos.
BURSTS = (0, 10)


@dataclass(frozen=True)
class Arm:
    """One arm.

    Args:
        title: What the report calls it.
        num_frames: Of the callback; None: no callback.
    """

    title: str
    num_frames: int | None = None

    def callbacks(self) -> list[Method]:
        """The list for `Trainer(callbacks=...)`: all that the arms differ in."""
        if self.num_frames is None:
            return []
        patches = FRAMES * PATCHES // self.num_frames
        where = "module.fusion.*.attention"
        return [TrajectoryWordAlignment(where, num_frames=self.num_frames, patches_per_frame=patches)]


# The settings of the model were given, not searched for, in any arm.
ARMS = {
    "plain": Arm("one attention"),
    "one-frame": Arm("word to patch", num_frames=1),
    "frames": Arm("trajectories", num_frames=FRAMES),
}
_BATCH = 128


@dataclass(frozen=True)
class World:
    """Where the videos come from, and how long is trained.

    Args:
        data: The world.
        model: A model of its videos.
        train_size: Training videos.
        epochs: Passes over them.
    """

    data: type[ObjectStatesDataModule]
    model: type[VideoQuestionModel]
    train_size: int
    epochs: int

    def settings(self) -> dict[str, Any]:
        """The world as JSON types."""
        return {"data": self.data.__name__, "train_size": self.train_size, "epochs": self.epochs}

    def run(self, run: Run) -> dict[str, float]:
        """Trains in one arm and measures it, on test videos with each size of bursts."""
        model = self.model()
        data = _data(self, self.train_size, seed=run.seed)
        fit(model, data, epochs=self.epochs, callbacks=ARMS[run.arm].callbacks(), gradient_clip_val=1.0)
        run.progress(1.0)
        tests = {burst: _data(self, 1, burst=burst) for burst in BURSTS}
        return {f"burst-{burst}": 100 * evaluate(model, test)["test_accuracy"] for burst, test in tests.items()}


# A file takes long to write and to read: there are fewer videos, and each is seen more than once.
WORLDS = {
    "patches": World(ObjectStatesDataModule, VideoQuestionModel, 250 * _BATCH, 1),
    "videos": World(ObjectVideosDataModule, FramesQuestionModel, 3000, 10),
}
#: What `--fast` runs.
FAST = {
    "patches": replace(WORLDS["patches"], train_size=60 * _BATCH),
    "videos": replace(WORLDS["videos"], train_size=768),
}


@lru_cache(maxsize=1 + len(BURSTS))
def _data(world: World, train_size: int, **options: int) -> ObjectStatesDataModule:
    """Videos of a world; the arms run one after the other on them."""
    return world.data(train_size, _BATCH, **options)


def experiment(*, fast: bool = False, world: str = "patches") -> Experiment:
    """The experiment.

    Args:
        fast: Less training and one seed.
        world: A key of `WORLDS`.
    """
    chosen = (FAST if fast else WORLDS)[world]
    return Experiment(
        name="twbert" if world == "patches" else f"twbert-{world}",
        title="The state in most frames: accuracy on the test split",
        arms={name: arm.title for name, arm in ARMS.items()},
        metrics={f"burst-{burst}": Metric(f"bursts of {burst}, accuracy %") for burst in reversed(BURSTS)},
        run=chosen.run,
        settings={
            **chosen.settings(),
            "batch_size": _BATCH,
            "arms": {name: arm.num_frames for name, arm in ARMS.items()},
        },
        baselines=("one-frame",),
        notes=("Chance is 25 %. Word to patch has the very parameters of trajectories.",),
        seeds=1 if fast else 3,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    parser = demo_parser("twbert", "Attention that follows trajectories against attention over all patches.")
    parser.add_argument(
        "--world", choices=WORLDS, default="patches", help="patches in memory, or videos in files (extra `video`)"
    )

    def chosen(options: Namespace) -> Experiment:
        return experiment(fast=options.fast, world=options.world)

    return run_demo(parser, argv, chosen)


if __name__ == "__main__":
    sys.exit(main())

"""Does StillMix make a video classifier see motion rather than backgrounds?

A world in which still evidence nearly always tells the class, and only motion makes it (`MovingShapesDataModule`):
clips in video files, and test sets whose background is swapped (SCUBA), frozen (SCUFO) or contradicted by a second
shape. A 3-D network is trained in the usual way, with other augmentations, and with StillMix. It, its optimizer and its
data are the same in every arm. The arms differ in the list of callbacks.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from typing import Any

import torch
from pytorch_lightning import seed_everything
from torch import Tensor

from lightning_methods.attach import Method
from lightning_methods.callbacks import StillMix, VideoAugment
from lightning_methods.datamodules import MovingShapesDataModule
from lightning_methods.demos._command import demo_parser, run_demo
from lightning_methods.demos._experiment import Experiment, Metric, Run, Shared, Stage
from lightning_methods.demos._training import evaluate, fit
from lightning_methods.demos.stillmix_models import ClipClassifier, FrameClassifier
from lightning_methods.modules import (
    BackgroundErase,
    FrameBank,
    FrameScores,
    VideoAugmentation,
    VideoMix,
    VideoMixup,
    score_frames,
)

_METRICS = {
    "stripes": ("SCUBA stripes, %", "stripes/scuba"),
    "iid": ("IID, %", "iid/accuracy"),
    "texture": ("SCUBA texture, %", "texture/scuba"),
    "scufo": ("SCUFO stripes, %", "stripes/scufo"),
    "contrasted": ("contrasted stripes, %", "stripes/contrasted"),
    "contrasted_texture": ("contrasted texture, %", "texture/contrasted"),
    "conflicting": ("conflicting, %", "conflicting/accuracy"),
}


@dataclass(frozen=True)
class Arm:
    """One arm: what mixes its training clips.

    Args:
        title: What the report calls it.
        about: What the title stands for.
        mixes: `StillMix`, one of the augmentations that it is compared with, or None.
        options: Its arguments.
    """

    title: str
    about: str
    mixes: type[StillMix] | type[VideoAugmentation] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """The arm without its title, as JSON types."""
        return {"mixes": getattr(self.mixes, "__name__", None), "options": dict(self.options)}

    def callbacks(self, bank: Callable[[], FrameBank]) -> list[Method]:
        """The list for `Trainer(callbacks=...)`: all that the arms differ in."""
        if self.mixes is None:
            return []
        if issubclass(self.mixes, StillMix):
            needs_bank = self.options.get("source") != "batch"
            return [self.mixes(bank() if needs_bank else None, **self.options)]
        return [VideoAugment(self.mixes(**self.options))]


# p, the probability with which a clip is mixed, is for each baseline the one of four that did best on SCUBA stripes in
# `--tune`, in two worlds that the report does not use. That of StillMix was not searched for.
_ARMS = {
    "erm": Arm("ERM", "no callback"),
    "mixup": Arm("Mixup", "clips and labels mixed", VideoMixup, {"p": 1.0, "num_classes": 4}),
    "videomix": Arm("VideoMix", "a box of another clip, labels mixed", VideoMix, {"p": 0.25, "num_classes": 4}),
    "be": Arm("BE", "a frame of the clip itself blended in", BackgroundErase, {"p": 0.25}),
    "batch": Arm("StillMix, random", "random frames of the batch", StillMix, {"p": 0.5, "source": "batch"}),
    "stillmix": Arm("StillMix", "frames on which a 2-D network is confident", StillMix, {"p": 0.5}),
}
_TRIED = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Setup:
    """The experiment's sizes and arms. Seed s stands for world s and for everything drawn in training.

    Args:
        train_size: Training clips.
        test_size: Clips of each test set.
        epochs: Of the video classifier.
        reference_epochs: Of the 2-D network.
        bank_size: Frames in the bank.
        low: The bank is drawn from the frames above this share by confidence.
        selector_seeds: Worlds in which the selector itself is measured.
        arms: The arms by name.
    """

    train_size: int = 1200
    test_size: int = 300
    epochs: int = 12
    reference_epochs: int = 10
    bank_size: int = 512
    low: float = 0.5
    selector_seeds: int = 2
    arms: Mapping[str, Arm] = field(default_factory=lambda: _ARMS)

    def settings(self) -> dict[str, Any]:
        """All that decides the figures, as JSON types."""
        sizes = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "arms"}
        return {**sizes, "arms": {name: arm.settings() for name, arm in self.arms.items()}}

    def prepare(self, stage: Stage) -> Shared:
        """Measures what the selector finds, apart from the arms: in worlds in which half of the clips are neutral."""
        facts = {}
        for seed in range(self.selector_seeds):
            data = self.data(seed, neutral=0.5)
            scores = self._scores(data, seed)
            half = scores.top_prob.argsort(descending=True)[: len(scores.keys) // 2]
            clip = torch.tensor([int(scores.keys[place].split("//")[0]) for place in half])
            share = (~data.is_neutral[clip]).double().mean()
            facts[f"Frames of the biased half of clips in the confident half, world {seed}, %"] = 100 * float(share)
            stage.progress((seed + 1) / self.selector_seeds)
        return Shared(None, facts)

    def data(self, seed: int, *, neutral: float = 0.0) -> MovingShapesDataModule:
        """World and training order of a seed."""
        test_size = 1 if neutral else self.test_size
        return MovingShapesDataModule(
            train_size=self.train_size, test_size=test_size, neutral=neutral, seed=seed, world_seed=seed
        )

    def run(self, run: Run) -> dict[str, float]:
        """Trains a network in one arm and measures it."""
        world = _world(self.train_size, self.test_size, run.seed)
        callbacks = self.arms[run.arm].callbacks(partial(self._bank, world, run.seed))
        seed_everything(run.seed, verbose=False)  # what was made above for several arms may have been there before
        network = ClipClassifier(world.test_names, world.scuba_names)
        fit(network, world, epochs=self.epochs, callbacks=callbacks, progress=run.progress)
        logged = evaluate(network, world)
        return {name: 100 * logged[key] for name, (_, key) in _METRICS.items()}

    def _bank(self, data: MovingShapesDataModule, seed: int) -> FrameBank:
        videos = data.splits["train"][0]

        def read(key: str) -> Tensor:
            clip, frame = map(int, key.split("//"))
            return videos[clip, :, frame]

        return FrameBank.from_scores(
            self._scores(data, seed), read, size=videos.shape[-1], bank_size=self.bank_size, low=self.low, seed=seed
        )

    def _scores(self, data: MovingShapesDataModule, seed: int) -> FrameScores:
        """Trains the 2-D network and asks it about every training frame."""
        seed_everything(seed, verbose=False)
        reference = FrameClassifier()
        fit(reference, data, epochs=self.reference_epochs)
        return score_frames(reference, _all_frames(data))


#: What `--fast` runs.
FAST = Setup(train_size=600, test_size=100, reference_epochs=6, bank_size=256, selector_seeds=1)


@lru_cache(maxsize=1)
def _world(train_size: int, test_size: int, seed: int) -> MovingShapesDataModule:
    """A world in memory; its arms run one after the other."""
    return Setup(train_size, test_size).data(seed)


def _all_frames(data: MovingShapesDataModule) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Frames, labels and names `CLIP//FRAME` of the training clips, in batches."""
    for videos, labels, index in zip(*(torch.split(part, 64) for part in data.splits["train"]), strict=True):
        frames = videos.transpose(1, 2)
        keys = [f"{clip}//{frame}" for clip in index.tolist() for frame in range(frames.shape[1])]
        yield frames.flatten(0, 1), labels.repeat_interleave(frames.shape[1]), keys


def candidates() -> dict[str, Arm]:
    """The settings that `--tune` tries, as arms: the same probabilities for every kind of mixing."""
    return {
        f"{name}.p={p:g}": replace(arm, title=f"{arm.title}: p = {p:g}", options={**arm.options, "p": p})
        for name, arm in _ARMS.items()
        if arm.mixes is not None
        for p in _TRIED
    }


def experiment(*, fast: bool = False, tune: bool = False) -> Experiment:
    """The experiment.

    Args:
        fast: Fewer clips, epochs and seeds.
        tune: The search for the probabilities of mixing instead, on worlds of its own.
    """
    setup = FAST if fast else Setup()
    if tune:
        setup = replace(setup, arms=candidates(), selector_seeds=0)
    about = "; ".join(f"{arm.title}: {arm.about}" for arm in _ARMS.values())
    return Experiment(
        name="stillmix-tune" if tune else "stillmix",
        title="Moving shapes: top-1 on backgrounds that training has not seen",
        arms={name: arm.title for name, arm in setup.arms.items()},
        metrics={name: Metric(title, digits=1) for name, (title, _) in _METRICS.items()},
        run=setup.run,
        prepare=setup.prepare,
        settings=setup.settings(),
        baselines=() if tune else ("erm",),
        notes=() if tune else (f"{about}.", *_LIMITS),
        seeds=2 if fast or tune else 5,
        first_seed=1000 if tune else 0,
    )


_LIMITS = (
    "Every frame of this world gives its label away, so choosing frames cannot beat random ones here.",
    "SCUFO clips do not move: at chance, 25 %, a network has learnt nothing from still evidence.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    parser = demo_parser("stillmix", "StillMix against other augmentations, on backgrounds that training has not seen.")
    parser.add_argument("--tune", action="store_true", help="show how the baselines' settings were chosen")

    def chosen(options: Namespace) -> Experiment:
        return experiment(fast=options.fast, tune=options.tune)

    return run_demo(parser, argv, chosen)


if __name__ == "__main__":
    sys.exit(main())

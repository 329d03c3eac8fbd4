"""What attaching costs: the time of a training step with methods attached against plain Lightning.

All variants train in turns, many short fits each, in one process on one thread. A turn gives each variant's
first decile of its steps, which interruptions hardly move; the figures are medians over turns of the difference to
plain Lightning in the same turn, so that whatever else the machine does hits all variants alike.

    python benchmarks/engine.py [--json FILE] [--fast]
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods.attach import Method, Step, address

#: Stated bounds.
NO_OP_RATIO, ENGINE_MICROSECONDS = 1.02, 30.0


class Small(LightningModule):
    """A three-layer network on flattened 28 x 28 images, batch 64."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SmallByHand(Small):
    """The same with `WithTerms` written into the step: what the maths costs without the engine."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        hidden = self.net[:4](batch[0])
        logits = self.net[4](hidden)
        loss = F.cross_entropy(logits, batch[1])
        return loss + (0.1 * hidden.square().mean() + 0.1 * logits.square().mean())


class NoOp(Method):
    """Attached, with nothing to do in a step."""

    def __init__(self) -> None:
        super().__init__(name="noop")


class WithTerms(Method):
    """Captures the root and a submodule, and adds two terms."""

    def __init__(self) -> None:
        super().__init__(name="terms", weights={"hidden": 0.1, "logits": 0.1})
        self.hidden = address("module.net.3")
        self.logits = address("module")

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        return {
            "hidden": step[self.hidden].square().mean(),
            "logits": step[self.logits].square().mean(),
        }


class TimedBatches:
    """Hands the same batch out again and again and notes when."""

    def __init__(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch = (torch.randn(64, 784, generator=generator), torch.arange(64) % 10)
        self.steps = steps
        self.times: list[float] = []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.steps):
            self.times.append(time.perf_counter())
            yield self.batch

    def first_decile(self) -> float:
        warm = self.times[len(self.times) // 5 :]
        return statistics.quantiles((after - before for before, after in itertools.pairwise(warm)), n=10)[0]


VARIANTS = {
    "plain Lightning": lambda: (Small(), []),
    "no-op method": lambda: (Small(), [NoOp()]),
    "two terms by hand": lambda: (SmallByHand(), []),
    "two captures and terms": lambda: (Small(), [WithTerms()]),
}


def quick_step(variant: str, steps: int) -> float:
    module, methods = VARIANTS[variant]()
    loader = TimedBatches(steps)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=methods,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10**9,
    )
    trainer.fit(module, loader)
    return loader.first_decile() * 1e6


def measure(turns: int, steps: int) -> dict[str, float]:
    rows = [{variant: quick_step(variant, steps) for variant in VARIANTS} for _ in range(turns + 1)][1:]
    middle = {variant: statistics.median(row[variant] for row in rows) for variant in VARIANTS}
    return {
        **{f"{variant} (µs a step)": value for variant, value in middle.items()},
        "no-op / plain": statistics.median(row["no-op method"] / row["plain Lightning"] for row in rows),
        "engine beyond the maths (µs)": statistics.median(
            row["two captures and terms"] - row["two terms by hand"] for row in rows
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--fast", action="store_true", help="few turns: a smoke test, not a measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    result = measure(turns=2, steps=50) if arguments.fast else measure(turns=35, steps=100)
    for name, value in result.items():
        print(f"{name:38s} {value:9.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.fast:
        return 0
    missed = []
    if result["no-op / plain"] > NO_OP_RATIO:
        missed.append(f"a no-op method costs more than {NO_OP_RATIO - 1:.0%}")
    if result["engine beyond the maths (µs)"] > ENGINE_MICROSECONDS:
        missed.append(f"captures and terms cost more than {ENGINE_MICROSECONDS} µs a step")
    for bound in missed:
        print("MISSED:", bound)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())

"""Speed and memory of StillMix, float32, one thread.

python benchmarks/stillmix.py [--json FILE] [--fast]

Mixing one batch against the formulation of the authors' code and against a loop over samples, in new memory, as a
program gets it, and in memory that is used again; the bank in bytes against one in float32; the callback's share of a
training step of a video network. The exit status is 1 if a stated bound is missed.
"""

import argparse
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from _measure import Report, Turns, extra_bytes, in_fresh_process
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_methods.attach import Step
from lightning_methods.callbacks import StillMix
from lightning_methods.functional import StillMixDraw
from lightning_methods.modules import FrameBank, StillMixAugment

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def frame_bank(size: int, frames: int = 64) -> FrameBank:
    pixels = torch.randint(256, (frames, 3, size, size), dtype=torch.uint8)
    return FrameBank(pixels, mean=MEAN, std=STD)


def published(videos: Tensor, still: Tensor, draw: StillMixDraw) -> Tensor:
    """As the authors' code mixes: everything for all samples, then two parts gathered and joined, in another order."""
    still = still[:, None].repeat(1, videos.shape[1], 1, 1, 1)
    mixed = draw.lam * videos + (1 - draw.lam) * still
    rows, others = draw.apply.nonzero()[:, 0], (~draw.apply).nonzero()[:, 0]
    return torch.cat([mixed[rows], videos[others]])


def frames_by_gather(videos: Tensor, indices: Tensor) -> Tensor:
    """As the authors' code takes frames out of the batch: an index for each value, stacked from a list."""
    batch, length, *shape = videos.shape
    partner = (torch.arange(batch) + 1 + indices // length) % batch
    index = torch.stack([indices % length] * math.prod(shape), 1).reshape(batch, 1, *shape)
    return videos[partner].gather(1, index)[:, 0]


def per_sample(videos: Tensor, bank: FrameBank, draw: StillMixDraw) -> Tensor:
    """The definition, sample by sample and frame by frame, from the same bank in bytes."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    clips = []
    for video, index, chosen in zip(videos, draw.indices, draw.apply, strict=True):
        still = (bank.frames[index].float() / 255 - mean) / std
        frames = [draw.lam * frame + (1 - draw.lam) * still if chosen else frame for frame in video]
        clips.append(torch.stack(frames))
    return torch.stack(clips)


def mixing() -> tuple[dict[str, Callable[[], Tensor]], int]:
    """Ways to mix one batch, which agree, and how many of its samples they mix."""
    torch.manual_seed(0)
    videos, bank = torch.randn(8, 8, 3, 224, 224), frame_bank(224)
    of_bank = StillMixAugment(bank, layout="btchw")
    into_batch = StillMixAugment(bank, layout="btchw", inplace=True)
    of_batch = StillMixAugment(source="batch", layout="btchw")
    draw, other = (augment.draw(videos, torch.Generator().manual_seed(0)) for augment in (of_bank, of_batch))
    own = videos.clone()
    floating = bank.sample(torch.arange(len(bank)))
    calls: dict[str, Callable[[], Tensor]] = {
        "bank": lambda: of_bank(videos, draw=draw),
        "bank, in place": lambda: into_batch(own, draw=draw),
        "bank, as published": lambda: published(videos, floating[draw.indices], draw),
        "bank, per sample": lambda: per_sample(videos, bank, draw),
        "batch": lambda: of_batch(videos, draw=other),
        "batch, as published": lambda: published(videos, frames_by_gather(videos, other.indices), other),
        "a copy of the batch": lambda: videos.clone(),
    }
    for name in ("bank", "batch"):
        order = torch.cat([rows.nonzero()[:, 0] for rows in ((draw if name == "bank" else other).apply, ~draw.apply)])
        assert torch.allclose(calls[f"{name}, as published"](), calls[name]()[order], atol=1e-5)
    assert torch.allclose(calls["bank, per sample"](), calls["bank"](), atol=1e-5)
    assert torch.allclose(calls["bank, in place"](), calls["bank"](), atol=1e-5)
    return calls, int(draw.apply.sum())


RATIOS = {  # by the memory that there is: the least that is stated
    "reused": {
        ("bank", "bank, as published"): 4,
        ("bank, in place", "bank, as published"): 6,
        ("bank, in place", "bank, per sample"): 3,
        ("bank", "bank, per sample"): 1,
        ("batch", "batch, as published"): 8,
    },
    "new": {
        ("bank, in place", "bank, as published"): 8,
        ("bank, in place", "bank, per sample"): 8,
        ("bank", "bank, as published"): 4,
    },
}


def mixing_speed(report: Report, memory: str, fast: bool) -> None:
    calls, mixed = mixing()
    turns = Turns(calls, rounds=5 if fast else 30)
    at = f"8x8x3x224x224, {mixed} of 8 mixed, {memory} memory"
    for name in calls:
        report.add(f"{at}: {name}, ms", 1e3 * turns.seconds(name))
    for (ours, plain), least in RATIOS[memory].items():
        report.add(f"{at}: {ours} / {plain}, times faster", turns.ratio(plain, ours), at_least=least)
    if memory == "reused":
        report.add(f"{at}: bank, times as long as a copy", turns.ratio("bank", "a copy of the batch"), at_most=2)


def bank_memory(report: Report) -> None:
    """As it is resident, in a process of its own."""
    mib = {kind: in_fresh_process(__file__, "--memory", kind) / 2**20 for kind in ("uint8", "float32")}
    for kind, value in mib.items():
        report.add(f"bank of 1024 frames of 224 x 224, {kind}, MiB", value)
    report.add("bank in bytes / in float32", mib["uint8"] / mib["float32"], at_most=0.26)


def hold(kind: str, frames: int) -> Callable[[], object]:
    held = []

    def make() -> None:
        pixels = torch.zeros(frames, 3, 224, 224, dtype=getattr(torch, kind))
        held.append(FrameBank(pixels.fill_(1)))

    return make


class VideoNet(LightningModule):
    """A small 3-D network, or one of timm over frames with the mean of their logits; keeps the time of each step."""

    def __init__(self, net: nn.Module, over_frames: bool) -> None:
        super().__init__()
        self.net, self.over_frames = net, over_frames

    def forward(self, videos: Tensor) -> Tensor:
        if self.over_frames:
            return self.net(videos.flatten(0, 1)).unflatten(0, videos.shape[:2]).mean(1)
        return self.net(videos.transpose(1, 2))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def conv3d() -> nn.Module:
    layers: list[nn.Module] = []
    for width_in, width, stride in ((3, 16, (1, 2, 2)), (16, 32, (1, 2, 2)), (32, 64, (2, 2, 2))):
        layers += [nn.Conv3d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm3d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, 10))


def resnet18() -> nn.Module:
    import timm

    return timm.create_model("resnet18", num_classes=10)


class Clock(Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: object) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *args: object) -> None:
        self.seconds.append(time.perf_counter() - self.start)


class Timed(StillMix):
    """Keeps the time of its part of each step: the difference of two steps drowns in the noise of a shared machine."""

    def rewrite(self, step: Step) -> None:
        start = time.perf_counter()
        super().rewrite(step)
        self.seconds = [*getattr(self, "seconds", []), time.perf_counter() - start]


def training_step(report: Report, fast: bool) -> None:
    for name, net, size, over_frames in (
        ("3-D network, 8 frames of 112", conv3d(), 112, False),
        ("ResNet-18 over 8 frames of 112", resnet18(), 112, True),
    ):
        torch.manual_seed(0)
        steps = 4 if fast else 12
        batches = DataLoader([(torch.randn(8, 8, 3, size, size), torch.arange(8))] * steps, batch_size=None)
        clock, method = Clock(), Timed(frame_bank(size), layout="btchw")
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[method, clock],
        )
        trainer.fit(VideoNet(net, over_frames), batches)
        whole, part = clock.seconds[1:], method.seconds[1:]
        at = f"batch of 8, {name}"
        report.add(f"{at}: step, ms", 1e3 * statistics.median(whole))
        report.add(f"{at}: StillMix in it, ms", 1e3 * statistics.median(part))
        share = statistics.median(own / step for own, step in zip(part, whole, strict=True))
        report.add(f"{at}: StillMix, % of the step", 100 * share, at_most=3)


def with_reused_memory(report: Report, fast: bool) -> None:
    """What is measured in a process that keeps the memory it was given.

    glibc gives a block of more than 32 MiB back after each use and asks for new pages at the next, 15 ms for such a
    batch and each of its copies. Memory that is used again is what a GPU's allocator gives.
    """
    kept = {**os.environ, "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    with TemporaryDirectory() as folder:
        figures = Path(folder, "figures.json")
        command = [sys.executable, __file__, "--reused", str(figures), *["--fast"] * fast]
        subprocess.run(command, env=kept, check=False)  # noqa: S603  # our own; 1 says that a bound was missed
        content = json.loads(figures.read_text())
    report.figures |= content["figures"]
    report.missed += content["missed"]


def quiet() -> None:
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # Lightning's advice on workers and the like


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--fast", action="store_true", help="fewer rounds")
    parser.add_argument("--memory", metavar="DTYPE", help=argparse.SUPPRESS)
    parser.add_argument("--reused", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    if options.memory:
        print(extra_bytes(hold(options.memory, 1024), warm_up=hold(options.memory, 2)))
        return 0
    report = Report()
    if options.reused:
        mixing_speed(report, "reused", options.fast)
        training_step(report, options.fast)
        return report.finish(options.reused)
    mixing_speed(report, "new", options.fast)
    bank_memory(report)
    with_reused_memory(report, options.fast)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())

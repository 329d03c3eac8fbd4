"""Speed and memory of the ProReg loss, forward and backward, float32, one thread; and what its teacher costs.

python benchmarks/proreg.py [--json FILE] [--fast]

Against the plain formulation with its five passes of softmax, growth with the number of classes, and training with a
snapshot as the teacher against training with precomputed prompt logits. The exit status is 1 if a stated bound is
missed.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _measure import Report, Turns, extra_bytes, in_fresh_process
from torch import Tensor, nn

from lightning_methods.functional import proreg_loss, proreg_terms

BATCH = 64


def fused(logits: Tensor, prompts: Tensor, target: Tensor) -> Tensor:
    return proreg_loss(logits, prompts, target, alpha=2.0)


def terms(logits: Tensor, prompts: Tensor, target: Tensor) -> Tensor:
    """What the callback computes: the two terms apart, for the log."""
    found = proreg_terms(logits, prompts, target)
    label = ((1 - found.weight) * found.cross_entropy).mean()
    return label + 2.0 * (found.weight * found.prompt).mean()


def plain(logits: Tensor, prompts: Tensor, target: Tensor) -> Tensor:
    """The definition, term by term, with torch's own losses."""
    with torch.no_grad():
        p, q = (x.softmax(1).gather(1, target[:, None])[:, 0] for x in (logits, prompts))
        weight = q / (p + q + 1e-5)
    label = F.cross_entropy(logits, target, reduction="none")
    prompt = -(prompts.softmax(1) * logits.log_softmax(1)).sum(1)
    return ((1 - weight) * label).mean() + 2.0 * (weight * prompt).mean()


LOSSES = {"fused": fused, "terms": terms, "plain": plain}


def problem(classes: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, prompts = (torch.randn(batch, classes, generator=generator) for _ in range(2))
    return logits.requires_grad_(), prompts, torch.randint(classes, (batch,), generator=generator)


def step(name: str, classes: int, batch: int) -> Callable[[], object]:
    inputs = problem(classes, batch)
    return lambda: torch.autograd.grad(LOSSES[name](*inputs), inputs[0])


def memory(name: str, classes: int, batch: int) -> float:
    """MiB above what was resident before."""
    return in_fresh_process(__file__, "--memory", name, classes, batch) / 2**20


def against_plain(report: Report, fast: bool) -> None:
    for classes in (10, 100, 1000, 10000):
        values = [loss(*problem(classes, 4)) for loss in LOSSES.values()]
        if not all(torch.allclose(value, values[0], rtol=1e-5) for value in values):
            raise RuntimeError("the formulations disagree")
        turns = Turns({name: step(name, classes, BATCH) for name in LOSSES}, rounds=20 if fast else 100)
        large = classes >= 1000
        mib = {name: memory(name, classes, BATCH) for name in LOSSES} if large else {}
        at = f"B={BATCH} C={classes}"
        for name in LOSSES:
            report.add(f"{at}: {name}, ms", 1e3 * turns.seconds(name))
        huge = classes == 10000  # smaller ones are near the resolution of a page, and of a clock on a busy machine
        report.add(f"{at}: plain / fused, time", turns.ratio("plain", "fused"), at_least=1.1 if huge else 0)
        report.add(f"{at}: plain / terms, time", turns.ratio("plain", "terms"))
        for name, value in mib.items():
            report.add(f"{at}: {name}, extra MiB", value)
        if huge:
            report.add(f"{at}: plain / fused, memory", mib["plain"] / mib["fused"], at_least=1.2)


def growth(report: Report, fast: bool) -> None:
    sizes = (1000, 4000, 16000)
    turns = Turns({str(c): step("fused", c, BATCH) for c in sizes}, rounds=20 if fast else 60)
    mib = {c: memory("fused", c, BATCH) for c in sizes}
    for classes in sizes:
        report.add(f"B={BATCH} C={classes}: ns a logit", 1e9 * turns.seconds(str(classes)) / (BATCH * classes))
        report.add(f"B={BATCH} C={classes}: extra bytes a logit", mib[classes] * 2**20 / (BATCH * classes))
    # Linear growth is 16; twice that leaves room for leaving the caches. Quadratic growth would be 256.
    report.add("time at C=16000 / C=1000", turns.ratio("16000", "1000"), at_most=32)
    report.add("memory at C=16000 / C=1000", mib[16000] / mib[1000], at_most=32)


def fits() -> dict[str, Callable[[], object]]:
    """Whole fits of eight steps of a small vision transformer: without ProReg, and with either kind of prompts."""
    # Here, so that the processes that measure memory need not import it.
    import timm
    from pytorch_lightning import LightningModule, Trainer

    from lightning_methods.callbacks import ProReg

    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    class Vision(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.visual = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0)
            self.head = nn.Linear(192, 100)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.visual(images))

        def training_step(self, batch: Any) -> Tensor:
            images, target, _ = batch
            return F.cross_entropy(self(images), target)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    rows = [(torch.randn(16, 3, 64, 64), torch.arange(16), torch.randn(16, 100)) for _ in range(8)]
    module = Vision()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

    def fit(*methods: ProReg) -> None:
        loader = torch.utils.data.DataLoader(rows, batch_size=None)
        Trainer(max_epochs=1, accelerator="cpu", callbacks=list(methods), **quiet).fit(module, loader)

    return {
        "without": fit,
        "precomputed": lambda: fit(ProReg(prompt="batch.2")),
        "snapshot": lambda: fit(ProReg(snapshot="module.visual", text_features="module.head.weight")),
    }


def teachers(report: Report, fast: bool) -> None:
    calls = fits()
    turns = Turns(calls, rounds=3 if fast else 9)
    for name in calls:
        report.add(f"ViT-Ti/16 at 64, B=16: {name}, ms a step", 1e3 * turns.seconds(name) / 8)
    report.add("time with precomputed logits / without ProReg", turns.ratio("precomputed", "without"), at_most=1.15)
    # A forward pass is about a third of a training step.
    report.add("time with a snapshot / with precomputed logits", turns.ratio("snapshot", "precomputed"), at_most=1.6)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--fast", action="store_true", help="fewer rounds")
    parser.add_argument("--memory", nargs=3, metavar=("LOSS", "C", "B"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        name, classes, batch = options.memory[0], int(options.memory[1]), int(options.memory[2])
        print(extra_bytes(step(name, classes, batch), warm_up=step(name, max(2, classes // 10), batch)))
        return 0
    report = Report()
    for part in (against_plain, growth, teachers):
        part(report, options.fast)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())

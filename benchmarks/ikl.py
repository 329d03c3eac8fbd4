"""Speed and memory of the IKL loss, forward and backward, float32, one thread.

python benchmarks/ikl.py [--json FILE] [--fast]

Against the plain formulation over all pairs of classes, against PyTorch's KL divergence, and growth with the
number of classes. The exit status is 1 if a stated bound is missed.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _measure import Report, Turns, extra_bytes, in_fresh_process
from torch import Tensor

from lightning_methods.functional import ikl_loss

BATCH = 64


def closed(student: Tensor, teacher: Tensor) -> Tensor:
    return ikl_loss(student, teacher)


def pairs(student: Tensor, teacher: Tensor) -> Tensor:
    """The definition, with as few B x C x C tensors as it can be written."""
    gap = student - teacher
    weight = teacher.softmax(1)
    error = gap[:, :, None] - gap[:, None, :]
    wmse = (weight[:, :, None] * weight[:, None, :] * error.square()).sum() / (4 * len(gap))
    return wmse + F.cross_entropy(student, weight)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")


LOSSES = {"closed": closed, "pairs": pairs, "kl": kl}


def problem(classes: int, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(batch, classes, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


def step(loss: Callable[[Tensor, Tensor], Tensor], classes: int, batch: int) -> Callable[[], object]:
    student, teacher = problem(classes, batch)
    return lambda: torch.autograd.grad(loss(student, teacher), student)


def class_wise_step(classes: int, batch: int) -> Callable[[], object]:
    student, teacher = problem(classes, batch)
    means, target = torch.full((classes, classes), 1 / classes), torch.arange(batch) % classes
    return lambda: torch.autograd.grad(ikl_loss(student, teacher, means, target), student)


def memory(name: str, classes: int, batch: int) -> float:
    """MiB above what was resident before."""
    return in_fresh_process(__file__, "--memory", name, classes, batch) / 2**20


def against_pairs(report: Report, fast: bool) -> None:
    batch = 16 if fast else BATCH
    for classes in (10, 100, 1000):
        if not torch.allclose(closed(*problem(classes, 4)), pairs(*problem(classes, 4)), rtol=1e-5):
            raise RuntimeError("the two formulations disagree")
        large = classes == 1000
        calls = {name: step(LOSSES[name], classes, batch) for name in ("closed", "pairs")}
        turns = Turns(calls, rounds=3 if large else 30)
        at = f"B={batch} C={classes}"
        report.add(f"{at}: closed form, ms", 1e3 * turns.seconds("closed"))
        report.add(f"{at}: all pairs, ms", 1e3 * turns.seconds("pairs"))
        report.add(f"{at}: times faster", turns.ratio("pairs", "closed"), at_least=500 if large else 0)
        mib = {name: memory(name, classes, batch) for name in calls}
        report.add(f"{at}: closed form, extra MiB", mib["closed"])
        report.add(f"{at}: all pairs, extra MiB", mib["pairs"])
        if large:  # the closed form's tensors are below the resolution of a page or two otherwise
            report.add(f"{at}: times less memory", mib["pairs"] / mib["closed"], at_least=50)


def against_kl(report: Report, fast: bool) -> None:
    for classes in (10, 100, 1000):
        calls = {
            "kl": step(kl, classes, BATCH),
            "sample-wise": step(closed, classes, BATCH),
            "class-wise": class_wise_step(classes, BATCH),
        }
        turns = Turns(calls, rounds=60 if fast else 200)
        for name in ("sample-wise", "class-wise"):
            bound = 1.6 if classes == 1000 else float("inf")
            report.add(f"B={BATCH} C={classes}: time of {name} / kl_div", turns.ratio(name, "kl"), at_most=bound)


def growth(report: Report, fast: bool) -> None:
    sizes = (1000, 4000, 16000)
    turns = Turns({str(c): step(closed, c, BATCH) for c in sizes}, rounds=20 if fast else 60)
    mib = {c: memory("closed", c, BATCH) for c in sizes}
    for classes in sizes:
        report.add(f"B={BATCH} C={classes}: ns a logit", 1e9 * turns.seconds(str(classes)) / (BATCH * classes))
        report.add(f"B={BATCH} C={classes}: extra bytes a logit", mib[classes] * 2**20 / (BATCH * classes))
    # Linear growth is 16; twice that leaves room for leaving the caches. Quadratic growth would be 256.
    report.add("time at C=16000 / C=1000", turns.ratio("16000", "1000"), at_most=32)
    report.add("memory at C=16000 / C=1000", mib[16000] / mib[1000], at_most=32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--fast", action="store_true", help="fewer rounds, a smaller batch against all pairs")
    parser.add_argument("--memory", nargs=3, metavar=("LOSS", "C", "B"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        loss, classes, batch = LOSSES[options.memory[0]], int(options.memory[1]), int(options.memory[2])
        print(extra_bytes(step(loss, classes, batch), warm_up=step(loss, max(2, classes // 10), batch)))
        return 0
    report = Report()
    for part in (against_kl, growth, against_pairs):
        part(report, options.fast)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())

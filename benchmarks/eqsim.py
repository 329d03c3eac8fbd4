"""Speed and memory of EqSim's losses, forward and backward, float32, one thread.

python benchmarks/eqsim.py [--json FILE] [--fast]

Against the plain formulation, one row of the batch after the other, and growth with the batch. The exit status is 1 if
a stated bound is missed.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _measure import Report, Turns, extra_bytes, in_fresh_process
from torch import Tensor

from lightning_methods.functional import eqsim_all_pairs_loss, eqsim_close_far_loss, eqsim_sample_close
from lightning_methods.metrics import RetrievalRecall

SETTINGS = {"activation": "softmax", "margin": 0.0, "weight": 0.5}
K = 4


def criterion(s00: Tensor, s01: Tensor, s10: Tensor, s11: Tensor) -> Tensor:
    text = ((s00 - s01) - (s11 - s10)).square().mean()
    image = ((s00 - s10) - (s11 - s01)).square().mean()
    return 0.5 * (F.relu(text) + F.relu(image))


def all_pairs_by_row(logits: Tensor) -> Tensor:
    """Row by row: its slices of the scores behind the diagonal, and of the diagonal; then all of them joined."""
    scores = logits.softmax(1)
    parts: list[list[Tensor]] = [[], [], [], []]
    for i in range(len(scores) - 1):
        behind = slice(i + 1, None)
        own, others = scores.diag()[i], scores.diag()[behind]
        append(parts, own.expand_as(others), scores[i, behind], scores[behind, i], others)
    return criterion(*(torch.cat(part) for part in parts))


def close_far_by_row(logits: Tensor, close_index: Tensor) -> Tensor:
    """Anchor by anchor: its entries of the scores and of the diagonal, and of the mask that leaves the far pairs."""
    scores = logits.softmax(1)
    mask = torch.ones_like(scores)
    parts: list[list[Tensor]] = [[], [], [], []]
    for i, index in enumerate(close_index):
        own, others = scores.diag()[i], scores.diag()[index]
        append(parts, own.expand_as(others), scores[i, index], scores[index, i], others)
        mask[i, index] = 0
        mask[index, i] = 0
    far = 0.5 * F.relu((((scores - scores.T) * mask) ** 2).mean())
    return criterion(*(torch.cat(part) for part in parts)) + far


def append(parts: list[list[Tensor]], *values: Tensor) -> None:
    for part, value in zip(parts, values, strict=True):
        part.append(value)


def sample_by_row(logits: Tensor, anchors: int) -> Tensor:
    """Two draws for each anchor, each read on the host."""
    text, image = logits.T.softmax(1), logits.softmax(1)
    rows = []
    for i in range(anchors):
        row: list[int] = []
        for side in (text, image):
            weights = side[i].clone()
            weights[i] = 0
            row += [int(index) for index in torch.multinomial(weights, K)]
        rows.append(row)
    return torch.tensor(rows)


def problem(size: int, anchors: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(size, size, generator=generator)
    return logits.requires_grad_(), eqsim_sample_close(logits, num_samples=K, num_anchors=anchors, generator=generator)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "all pairs": lambda logits, _: eqsim_all_pairs_loss(logits, **SETTINGS),
    "all pairs by row": lambda logits, _: all_pairs_by_row(logits),
    "close/far": lambda logits, index: eqsim_close_far_loss(logits, index, **SETTINGS).total,
    "close/far by row": close_far_by_row,
}


def step(name: str, size: int, anchors: int) -> Callable[[], object]:
    logits, index = problem(size, anchors)
    return lambda: torch.autograd.grad(LOSSES[name](logits, index), logits)


def retrieval(images: int, texts: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(number, 64, generator=generator) for number in (images, texts))
    metric = RetrievalRecall()
    ids = torch.arange(texts)
    metric.update(image, ids[:images], text, ids % images, ids)
    return metric.compute


def memory(*arguments: object) -> float:
    """MiB above what was resident before."""
    return in_fresh_process(__file__, "--memory", *arguments) / 2**20


def against_rows(report: Report, name: str, size: int, anchors: int, *, bound: float, rounds: int) -> None:
    slow = f"{name} by row"
    if not torch.allclose(LOSSES[name](*problem(64, 16)), LOSSES[slow](*problem(64, 16)), rtol=1e-4):
        raise RuntimeError("the two formulations disagree")
    calls = {each: step(each, size, anchors) for each in (name, slow)}
    # Long enough that a fast one does not pay for what the slow one has left in the caches and the allocator.
    turns = Turns(calls, rounds, slice_s=0.05, clock=time.process_time)
    at = f"{name}, G={size} B={anchors}"
    report.add(f"{at}: ms", 1e3 * turns.seconds(name))
    report.add(f"{at}: row by row, ms", 1e3 * turns.seconds(slow))
    report.add(f"{at}: times faster", turns.ratio(slow, name), at_least=bound)
    if size > 256:
        mib = {each: memory(each, size, anchors) for each in (name, slow)}
        report.add(f"{at}: extra MiB", mib[name])
        report.add(f"{at}: row by row, extra MiB", mib[slow])


def losses(report: Report, fast: bool) -> None:
    for size in (64, 256, 1024):
        bound = 20 if size == 1024 else 0
        against_rows(report, "all pairs", size, size, bound=bound, rounds=3 if size == 1024 else 10 if fast else 20)
    for size, anchors in ((64, 64), (512, 64)):
        bound = 20 if size == 512 else 0
        against_rows(report, "close/far", size, anchors, bound=bound, rounds=5 if fast else 20)


def sampling(report: Report, fast: bool) -> None:
    logits, _ = problem(512, 64)
    calls = {
        "at once": lambda: eqsim_sample_close(logits, num_samples=K, num_anchors=64),
        "by row": lambda: sample_by_row(logits.detach(), 64),
    }
    turns = Turns(calls, 5 if fast else 20)
    report.add("draw of K=4 for G=512 B=64: ms", 1e3 * turns.seconds("at once"))
    report.add("draw of K=4 for G=512 B=64: times faster than row by row", turns.ratio("by row", "at once"))


def growth(report: Report, fast: bool) -> None:
    """Quadratic is 16 from one size to four times it; twice that leaves room for leaving the caches."""
    for name in ("all pairs", "close/far"):
        turns = Turns({str(size): step(name, size, size) for size in (512, 2048)}, 5 if fast else 15)
        report.add(f"{name}: time at G=B=2048 / 512", turns.ratio("2048", "512"), at_most=32)
        mib = {size: memory(name, size, size) for size in (512, 2048)}
        report.add(f"{name}: memory at G=B=2048 / 512", mib[2048] / mib[512], at_most=32)
        report.add(f"{name}: extra bytes for each of the G² entries at 2048", mib[2048] * 2**20 / 2048**2)


def recall(report: Report, fast: bool) -> None:
    images, texts = (2_000, 10_000) if fast else (6_000, 30_000)
    matrix = 4 * images * texts / 2**20
    used = memory("retrieval", images, texts)
    report.add(f"recall, {images} images, {texts} texts: extra MiB", used)
    report.add(f"recall, {images} images, {texts} texts: MiB of the similarities alone", matrix)
    report.add("recall: bytes for each entry of one chunk", used * 2**20 / (1024 * texts), at_most=16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--fast", action="store_true", help="fewer rounds")
    parser.add_argument("--memory", nargs=3, metavar=("WHAT", "G", "B"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        what, first, second = options.memory[0], int(options.memory[1]), int(options.memory[2])
        if what == "retrieval":
            print(extra_bytes(retrieval(first, second), warm_up=retrieval(10, 50)))
        else:
            print(extra_bytes(step(what, first, second), warm_up=step(what, 16, 8)))
        return 0
    report = Report()
    for part in (losses, sampling, growth, recall):
        part(report, options.fast)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())

"""Speed and memory of UMIL's losses over pairs, forward and backward, float32, one thread.

python benchmarks/umil.py [--json FILE] [--fast]

Against the expansion of all pairs that was published, growth with the number of snippets, the whole invariance loss,
and the division. The exit status is 1 if a stated bound is missed.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _measure import Report, Turns, extra_bytes, in_fresh_process
from torch import Tensor

from lightning_methods.functional import confidence_split, pairwise_cluster_loss, umil_invariance_loss
from lightning_methods.modules import SnippetDivision

WIDTH = 512
Problem = tuple[Tensor, Tensor, Tensor]


def products(features: Tensor, weak: Tensor, strong: Tensor) -> Tensor:
    return pairwise_cluster_loss(features, weak, strong).loss


def expansion(features: Tensor, weak: Tensor, strong: Tensor) -> Tensor:
    """Every pair as a row: N² copies of features and of probabilities, as published."""
    count = len(features)
    first, second = features.repeat(count, 1), features.repeat_interleave(count, 0)
    alike = F.cosine_similarity(first, second) > 0.7
    one, other = weak.softmax(1).repeat(count, 1), strong.softmax(1).repeat_interleave(count, 0)
    agree = (one * other).sum(1)
    return -torch.where(alike, agree + 1e-7, 1 - agree + 1e-7).log().mean()


LOSSES = {"products": products, "expansion": expansion}


def problem(count: int) -> Problem:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, WIDTH, generator=generator) + 1.5  # about half of the pairs are alike
    weak, strong = (torch.randn(count, 2, generator=generator).requires_grad_() for _ in range(2))
    return features, weak, strong


def step(name: str, count: int) -> Callable[[], object]:
    features, weak, strong = problem(count)
    return lambda: torch.autograd.grad(LOSSES[name](features, weak, strong), [weak, strong])


def memory(name: str, count: int) -> float:
    """MiB above what was resident before."""
    return in_fresh_process(__file__, "--memory", name, count) / 2**20


def against_expansion(report: Report, fast: bool) -> None:
    for count in (64, 256) if fast else (64, 256, 512):
        if not torch.allclose(products(*problem(16)), expansion(*problem(16)), rtol=1e-5):
            raise RuntimeError("the two formulations disagree")
        large = count == 512
        turns = Turns({name: step(name, count) for name in LOSSES}, rounds=5 if large else 20)
        at = f"N={count} D={WIDTH}"
        for name in LOSSES:
            report.add(f"{at}: {name}, ms", 1e3 * turns.seconds(name))
        report.add(f"{at}: times faster", turns.ratio("expansion", "products"), at_least=30 if large else 0)
        mib = {name: memory(name, count) for name in LOSSES}
        for name in LOSSES:
            report.add(f"{at}: {name}, extra MiB", mib[name])
        if large:  # smaller ones are below the resolution of a page or two
            report.add(f"{at}: times less memory", mib["expansion"] / mib["products"], at_least=50)


def growth(report: Report, fast: bool) -> None:
    sizes = (256, 1024) if fast else (256, 1024, 4096, 8192)
    turns = Turns({str(n): step("products", n) for n in sizes}, rounds=3)
    for count in sizes:
        report.add(f"N={count} D={WIDTH}: ns a pair", 1e9 * turns.seconds(str(count)) / count**2)
        if count >= 1024:
            report.add(f"N={count} D={WIDTH}: extra bytes a pair", memory("products", count) * 2**20 / count**2)
    # Quadratic growth is 16; twice that leaves room for leaving the caches.
    report.add("time at N=1024 / N=256", turns.ratio("1024", "256"), at_most=32)


def whole_loss(report: Report, fast: bool) -> None:
    """The invariance loss of 16 bags of 16 snippets, against rows picked by masks and pairs expanded."""
    bags, snippets = 16, 16
    features, weak, _ = problem(bags * snippets)
    logits = weak.detach().view(bags, snippets, 2).requires_grad_()
    clusters = weak.detach().flip(0).view(bags, snippets, 2).requires_grad_()
    z = features.view(bags, snippets, WIDTH)
    ambiguous = torch.arange(bags * snippets).view(bags, snippets) % 3 == 0
    labels = torch.arange(bags * snippets).view(bags, snippets) % 2

    def masked() -> object:
        loss = umil_invariance_loss(logits, clusters, z, ambiguous, labels, weight_variance=1.0)
        return torch.autograd.grad(loss.total, [logits, clusters])

    def chosen() -> object:
        """Rows picked by a boolean mask, and every pair expanded."""
        a, c = ambiguous.flatten(), ~ambiguous.flatten()
        one_hot = F.one_hot(labels.flatten()[c], 2).float()
        f, g = logits.flatten(0, 1), clusters.flatten(0, 1)
        compat, compat_c = expansion(features[a], f[a], f[a]), expansion(one_hot, f[c], f[c])
        pairs = compat + expansion(features[a], g[a], g[a]) + expansion(one_hot, g[c], g[c])
        loss = pairs + (compat - compat_c) ** 2 / 2 + F.cross_entropy(f[c], labels.flatten()[c])
        return torch.autograd.grad(loss, [logits, clusters])

    turns = Turns({"masked": masked, "chosen": chosen}, rounds=10 if fast else 30)
    at = f"invariance loss, {bags} x {snippets} snippets"
    report.add(f"{at}, ms", 1e3 * turns.seconds("masked"))
    report.add(f"{at}, with expanded pairs, ms", 1e3 * turns.seconds("chosen"))
    report.add(f"{at}: times faster", turns.ratio("chosen", "masked"), at_least=3)


def division(report: Report, fast: bool) -> None:
    """An epoch's end on as many cells as UCF-Crime has, from running moments and from the table of all scores."""
    cells, epochs = (42_000 if fast else 422_000), 15
    per_video = 262
    sizes = torch.full((cells // per_video,), per_video)
    running = SnippetDivision(sizes)
    videos = torch.arange(len(sizes))
    grid = torch.arange(per_video).expand(len(sizes), -1)
    labels = videos % 2
    table = torch.rand(epochs, len(sizes) * per_video)

    def from_moments() -> object:
        running.update(videos, grid, table[0].view(-1, per_video), labels)
        return running.end_epoch()

    def from_table() -> object:
        return confidence_split(table, labels.repeat_interleave(per_video))

    turns = Turns({"moments": from_moments, "table": from_table}, rounds=5)
    at = f"{len(sizes) * per_video} cells"
    report.add(f"division of {at}, running moments, ms", 1e3 * turns.seconds("moments"))
    report.add(f"division of {at}, table of {epochs} epochs, ms", 1e3 * turns.seconds("table"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--fast", action="store_true", help="fewer rounds and smaller sizes")
    parser.add_argument("--memory", nargs=2, metavar=("LOSS", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        name, count = options.memory[0], int(options.memory[1])
        print(extra_bytes(step(name, count), warm_up=step(name, 16)))
        return 0
    report = Report()
    for part in (against_expansion, growth, whole_loss, division):
        part(report, options.fast)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())

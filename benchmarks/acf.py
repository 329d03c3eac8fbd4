"""Speed and memory of ACF's parts, forward and backward, float32, one thread; times are those of the processor.

python benchmarks/acf.py [--json FILE] [--fast]

The cluster matrix against the plain form that averages every span, attention layers against
`torch.nn.MultiheadAttention`, and how the memory of the lean form grows with the length. The exit status is 1 if a
stated bound is missed.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _measure import Report, Turns, extra_bytes, in_fresh_process
from torch import Tensor, nn

from lightning_methods.functional import (
    cluster_attention,
    neighbor_cluster_attention,
    neighbor_cluster_matrix,
    neighbor_links,
    span_cluster_attention,
    span_cluster_matrix,
    span_scores,
)
from lightning_methods.modules import AdaClusterAttention, ClusterState


def plain_matrix(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The mean of every span, (B, N, N, D), by a product with (N, N, N), and a running product."""
    batch, length, width = x.shape
    index = torch.arange(length)
    inside = (index[:, None, None] <= index) & (index <= index[None, :, None])  # start, end, element
    spans = inside / inside.sum(-1, keepdim=True).clamp_min(1)
    means = (spans.view(length * length, length) @ x).view(batch, length, length, width)
    joined = torch.cat([x.unsqueeze(1).expand_as(means), means], -1)
    probs = F.linear(joined, weight, bias).squeeze(-1).sigmoid()
    upper = probs.triu() + torch.ones_like(probs).tril(-1)
    product = upper.cumprod(-1).triu(1)
    return product + product.mT + torch.eye(length)


def closed_matrix(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return span_cluster_matrix(x, weight, bias).matrix


def matrix_problem(batch: int, length: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((batch, length, width), (1, 2 * width), (1,))]
    tensors[1] /= width**0.5
    return [tensor.requires_grad_() for tensor in tensors]


def matrix(report: Report, fast: bool) -> None:
    for batch, length in ((4, 18), (4, 64)):
        inputs = matrix_problem(batch, length, 64 if fast else 512)
        forms = {"closed": closed_matrix, "plain": plain_matrix}
        torch.testing.assert_close(closed_matrix(*inputs), plain_matrix(*inputs), rtol=1e-4, atol=1e-5)
        turns = Turns(
            {n: lambda f=form, x=inputs: torch.autograd.grad(f(*x).square().sum(), x) for n, form in forms.items()},
            rounds=3 if fast else 7,
            clock=time.process_time,
        )
        at = f"cluster matrix B={batch} N={length} D={inputs[0].shape[2]}"
        for name in forms:
            report.add(f"{at}: {name}, ms", 1e3 * turns.seconds(name))
        bound = 50 if length == 64 and not fast else 0
        report.add(f"{at}: times faster", turns.ratio("plain", "closed"), at_least=bound)


def layers(report: Report, fast: bool) -> None:
    batch, width = (2, 64) if fast else (8, 512)
    for name, length, options in (
        ("span", 24, {}),
        ("grid 12 x 12", 144, {"kind": "grid", "grid_size": (12, 12)}),
    ):
        torch_s = nn.MultiheadAttention(width, 8, batch_first=True)
        ours = AdaClusterAttention.from_multihead(torch_s, **options)
        x = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
        state = ClusterState()

        def step(module: nn.Module, x: Tensor = x, torch_s: nn.Module = torch_s, state: ClusterState = state) -> object:
            extra = {} if module is torch_s else {"state": state}
            out = module(x, x, x, need_weights=False, **extra)[0]
            return torch.autograd.grad(out.square().sum(), [x, *module.parameters()])

        turns = Turns(
            {"torch": lambda m=torch_s, s=step: s(m), "ours": lambda m=ours, s=step: s(m)},
            rounds=5 if fast else 15,
            clock=time.process_time,
        )
        at = f"attention layer, {name}, B={batch} D={width}"
        report.add(f"{at}: torch, ms", 1e3 * turns.seconds("torch"))
        report.add(f"{at}: with clusters, ms", 1e3 * turns.seconds("ours"))
        report.add(f"{at}: time with / without clusters", turns.ratio("ours", "torch"))


def attention_inputs(length: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(1, 2, length, 16, generator=generator).requires_grad_() for _ in range(3)]
    return heads, torch.randn(1, length, 16, generator=generator).requires_grad_()


def run_form(form: str, length: int) -> Callable[[], object]:
    heads, x = attention_inputs(length)
    weight, bias = 0.1 * torch.ones(1, 32), 6.0 * torch.ones(1)
    calls: dict[str, Callable[[], Tensor]] = {
        "span, lean": lambda: span_cluster_attention(*heads, [span_scores(x, weight, bias)]),
        "span, plain": lambda: cluster_attention(*heads, span_cluster_matrix(x, weight, bias).matrix),
        "neighbours, lean": lambda: neighbor_cluster_attention(*heads, neighbor_links(x, x)),
        "neighbours, plain": lambda: cluster_attention(*heads, neighbor_cluster_matrix(x, x).matrix),
    }
    return lambda: torch.autograd.grad(calls[form]().square().sum(), [*heads, x])


def lean(report: Report, fast: bool) -> None:
    sizes = (512, 1024) if fast else (512, 1024, 2048, 4096)
    for kind in ("span", "neighbours"):
        for length in sizes:
            lean_mib, plain_mib = (
                in_fresh_process(__file__, "--memory", f"{kind}, {form}", length) / 2**20 for form in ("lean", "plain")
            )
            at = f"{kind} H=2 N={length}"
            report.add(f"{at}: lean, extra MiB", lean_mib)
            report.add(f"{at}: plain, extra MiB", plain_mib)
            bound = 5 if length == 4096 else 0
            report.add(f"{at}: times less memory", plain_mib / lean_mib, at_least=bound)
            if length in (512, 2048):
                turns = Turns(
                    {form: run_form(f"{kind}, {form}", length) for form in ("lean", "plain")},
                    rounds=3,
                    clock=time.process_time,
                )
                report.add(f"{at}: time lean / plain", turns.ratio("lean", "plain"))
        first, last = (report.figures[f"{kind} H=2 N={n}: lean, extra MiB"] for n in (sizes[0], sizes[-1]))
        growth = sizes[-1] / sizes[0]
        # Quadratic growth would be the square of this.
        report.add(f"{kind}: lean memory at N={sizes[-1]} / {sizes[0]}", last / first, at_most=2 * growth)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--fast", action="store_true", help="fewer rounds, smaller problems")
    parser.add_argument("--memory", nargs=2, metavar=("FORM", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        form, length = options.memory[0], int(options.memory[1])
        print(extra_bytes(run_form(form, length), warm_up=run_form(form, 192)))
        return 0
    report = Report()
    for part in (matrix, layers, lean):
        part(report, options.fast)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())

"""Speed and memory of TW-BERT's parts, forward and backward, float32, one thread.

python benchmarks/twbert.py [--json FILE] [--fast]

Trajectory-word attention against the plain form, which goes frame by frame and gives every word a copy of the text;
the fine-grained contrast and the perturbed top k against forms that keep their large tensors. The exit status is 1 if a
stated bound is missed.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _measure import Report, Turns
from torch import Tensor

from lightning_methods.functional import fine_grained_contrastive_loss, perturbed_topk, trajectory_word_attention

HEADS = 12


def plain_attention(tensors: list[Tensor], frames: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    text, video, weight, bias, norm_weight, norm_bias = tensors
    batch, length, width = text.shape
    head = width // HEADS
    patches = torch.unflatten(video[:, 1:], 1, (frames, -1))
    size = patches.shape[2]

    def linear(index: int, x: Tensor) -> Tensor:
        part = slice(index * width, (index + 1) * width)
        return F.linear(x, weight[part], bias[part])

    def heads(index: int, x: Tensor) -> Tensor:
        return torch.unflatten(linear(index, x), -1, (HEADS, head)).transpose(-3, -2)

    def attend(query: Tensor, key: Tensor, value: Tensor, extra: int) -> Tensor:
        logits = query @ key.mT / math.sqrt(head)
        if extra:
            closed = F.pad(mask == 0, (0, extra), value=False)
            logits = logits.masked_fill(closed.view(batch, *[1] * (logits.ndim - 2), -1), -1e9)
        return logits.softmax(-1) @ value

    pooled = []
    for t in range(frames):
        z = attend(heads(0, text), heads(1, patches[:, t]), heads(2, patches[:, t]), 0)
        pooled.append(z.transpose(1, 2).flatten(2))
    own = F.layer_norm(linear(7, torch.stack(pooled, 2)), (width,), norm_weight, norm_bias, 1e-12)
    keys = torch.cat([text.unsqueeze(1).expand(-1, length, -1, -1), own], 2)  # (B, L, L + T, D)
    query = heads(3, text).transpose(1, 2).unsqueeze(3)
    words = attend(query, heads(4, keys), heads(5, keys), frames).squeeze(3).flatten(2)

    of_cls, of_patches = [], []
    for t in range(frames):
        tokens = torch.cat([video[:, :1], patches[:, t]], 1)
        around = torch.cat([text, patches[:, t], video[:, :1]], 1)
        out = attend(heads(0, tokens), heads(1, around), heads(2, around), size + 1).transpose(1, 2).flatten(2)
        of_cls.append(out[:, :1])
        of_patches.append(out[:, 1:])
    return linear(6, words), linear(6, torch.cat([torch.stack(of_cls).mean(0), *of_patches], 1))


def our_attention(tensors: list[Tensor], frames: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    return trajectory_word_attention(*tensors, num_heads=HEADS, num_frames=frames, text_mask=mask)


def attention_problem(frames: int, width: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 40, width), (2, 1 + 49 * frames, width), (8 * width, width), (8 * width,), (width,), (width,)]
    tensors = [torch.randn(shape, generator=generator) / math.sqrt(width) for shape in shapes]
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 20:] = 0
    return [tensor.requires_grad_() for tensor in tensors], mask


def saved_mib(forward: Callable[[], object], inputs: list[Tensor]) -> float:
    """What the graph keeps for the backward pass, beside the inputs, each storage once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2**20


def attention(report: Report, fast: bool) -> None:
    width = 192 if fast else 768
    forms = {"ours": our_attention, "plain": plain_attention}
    for frames in (4, 8):
        tensors, mask = attention_problem(frames, width)
        for one, other in zip(*(form(tensors, frames, mask) for form in forms.values()), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

        def step(form: Callable, tensors: list[Tensor] = tensors, frames: int = frames, mask: Tensor = mask) -> object:
            return torch.autograd.grad(sum(result.sum() for result in form(tensors, frames, mask)), tensors)

        turns = Turns({name: lambda f=form: step(f) for name, form in forms.items()}, rounds=3 if fast else 9)
        at = f"attention D={width} L=40 S=49 B=2 T={frames}"
        for name, form in forms.items():
            report.add(f"{at}: {name}, ms", 1e3 * turns.seconds(name))
            saved = saved_mib(lambda f=form, a=(tensors, frames, mask): f(*a), tensors)
            report.add(f"{at}: {name}, saved MiB", saved)
        # The text is copied 40 times: narrow layers are not bound by that, so the bound holds at full width.
        report.add(f"{at}: times faster", turns.ratio("plain", "ours"), at_least=0 if fast else 1.8)
        figures = report.figures
        ratio = figures[f"{at}: plain, saved MiB"] / figures[f"{at}: ours, saved MiB"]
        report.add(f"{at}: times less saved", ratio, at_least=1.2)


def plain_fine(video: Tensor, text: Tensor, mask: Tensor, videos: Tensor, texts: Tensor, masks: Tensor) -> Tensor:
    """Every product divided by the temperature, masked and kept."""
    target = torch.arange(len(video))
    losses = 0.0
    for patches, words, real, turned in ((video, texts, masks, False), (videos, text, mask, True)):
        frames = torch.unflatten(F.normalize(patches, dim=-1), 1, (4, -1))
        products = torch.einsum("ytse,xle->yxlts", frames, F.normalize(words, dim=-1)) / 0.07
        best = products.amax(-1).masked_fill(real[None, :, :, None] == 0, 0)
        logits = best.sum((2, 3)) / real.sum(1) / 4
        losses = losses + F.cross_entropy(logits.T if turned else logits, target)
    return losses / 2


def fine(report: Report, fast: bool) -> None:
    batch, columns, width = (4, 16, 32) if fast else (8, 64, 256)
    generator = torch.Generator().manual_seed(0)
    video, text = (torch.randn(batch, size, width, generator=generator) for size in (196, 40))
    videos, texts = (torch.randn(columns, size, width, generator=generator) for size in (196, 40))
    inputs = [video.requires_grad_(), text.requires_grad_(), torch.ones(batch, 40), videos, texts]
    inputs.append(torch.ones(columns, 40))
    forms = {
        "ours": lambda: fine_grained_contrastive_loss(*inputs, num_frames=4),
        "ours, chunks of 8": lambda: fine_grained_contrastive_loss(*inputs, num_frames=4, chunk_size=8),
        "plain": lambda: plain_fine(*inputs),
    }
    turns = Turns(
        {name: lambda f=form: torch.autograd.grad(f(), [video, text]) for name, form in forms.items()},
        rounds=3 if fast else 7,
    )
    at = f"fine-grained contrast B={batch} K={columns} T·S=196 L=40"
    for name, form in forms.items():
        report.add(f"{at}: {name}, ms", 1e3 * turns.seconds(name))
        report.add(f"{at}: {name}, saved MiB", saved_mib(form, inputs))
    report.add(f"{at}: times faster", turns.ratio("plain", "ours"))
    saved = report.figures[f"{at}: plain, saved MiB"] / report.figures[f"{at}: ours, saved MiB"]
    report.add(f"{at}: times less saved", saved, at_least=2)


class OneHotTopK(torch.autograd.Function):
    """The definition, with all one-hot matrices (B, n, k, T) kept."""

    @staticmethod
    def forward(ctx, scores: Tensor, noise: Tensor, k: int, sigma: float) -> Tensor:  # noqa: ANN001
        chosen = (scores.unsqueeze(1) + sigma * noise).topk(k).indices.sort(-1).values
        one_hot = F.one_hot(chosen, scores.shape[1]).to(scores.dtype)
        ctx.save_for_backward(one_hot, noise)
        ctx.sigma = sigma
        return one_hot.mean(1)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # noqa: ANN001, ANN205
        one_hot, noise = ctx.saved_tensors
        slope = torch.einsum("bnrt,bnt->brt", one_hot, noise) / (noise.shape[1] * ctx.sigma)
        return (gradient * slope).sum(1), None, None, None


def topk(report: Report, fast: bool) -> None:
    batch, frames, kept = 16, 32, 23
    scores = torch.rand(batch, frames, generator=torch.Generator().manual_seed(0)).softmax(1).requires_grad_()
    noise = torch.randn(batch, 500, frames, generator=torch.Generator().manual_seed(1))
    forms = {
        "ours": lambda: perturbed_topk(scores, k=kept, noise=noise),
        "ours, full gradient": lambda: perturbed_topk(scores, k=kept, noise=noise, gradient="full"),
        "one-hot": lambda: OneHotTopK.apply(scores, noise, kept, 0.05),
    }
    torch.testing.assert_close(forms["ours"](), forms["one-hot"](), rtol=1e-4, atol=1e-5)
    turns = Turns(
        {name: lambda f=form: torch.autograd.grad(f().square().sum(), scores) for name, form in forms.items()},
        rounds=5 if fast else 15,
    )
    at = f"perturbed top {kept} of {frames}, B={batch} n=500"
    for name, form in forms.items():
        report.add(f"{at}: {name}, ms", 1e3 * turns.seconds(name))
        report.add(f"{at}: {name}, saved MiB", saved_mib(form, [scores, noise]))
    report.add(f"{at}: times faster", turns.ratio("one-hot", "ours"))
    saved = report.figures[f"{at}: one-hot, saved MiB"] / report.figures[f"{at}: ours, saved MiB"]
    report.add(f"{at}: times less saved", saved, at_least=frames)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--fast", action="store_true", help="fewer rounds, smaller problems")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report()
    for part in (topk, fine, attention):
        part(report, options.fast)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())

r"""StillMix: blend training clips with still frames that give their label away.

A single frame often betrays the class of a video (its background, clothes, objects), and a network that learns this
fails once the background or the actor changes. A reference network, trained on single frames, finds such frames by
its confidence; training clips are blended with motionless videos of them and keep their own label, so that still
evidence becomes unreliable and motion stays reliable.

Every random number is drawn apart from its use: a draw can be kept and replayed. Nothing here waits for the device,
except the selection of frames, which runs once.

Source: Li, Liu, Zhang, Li, "Mitigating and Evaluating Static Bias of Action Representations in the Background and the
Foreground", ICCV 2023, arXiv 2211.12883. The formulas and the published settings were read in the authors' code; of
the paper only the abstract could be read.
"""

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_methods.functional._index import check_integer, pick
from lightning_methods.functional._logits import (
    check_choice,
    check_logits,
    check_positive,
    check_range,
    softmax,
    upcast,
)
from lightning_methods.functional._video import (
    Layout,
    blend,
    check_apply,
    check_lam,
    check_videos,
    moved,
    sample_beta,
)

Strategy: TypeAlias = Literal["quantile", "threshold", "top", "bernoulli"]


class StillMixDraw(NamedTuple):
    """The random numbers of one training step."""

    lam: Tensor
    indices: Tensor
    apply: Tensor


class FrameBiasScores(NamedTuple):
    """What a reference network says of single frames: probability of the label, largest probability, its class."""

    target_prob: Tensor
    top_prob: Tensor
    top_class: Tensor


def stillmix(
    videos: Tensor,
    frames: Tensor,
    lam: float | Tensor,
    apply: Tensor | None = None,
    *,
    layout: Layout = "bcthw",
    inplace: bool = False,
) -> Tensor:
    r"""Blend each clip with a motionless video made of one frame; labels stay as they are.

    $\tilde x_i = \lambda x_i + (1 - \lambda)\, \mathrm{repeat}_T(z_i)$ where `apply`, $\tilde x_i = x_i$ elsewhere.
    λ weighs the clip (from the authors' code): swapping it is invisible at λ ≈ ½ and wrong for the authors' other
    settings. One broadcast `torch.lerp`: the repeated frame is never made, the batch keeps its order (in the authors'
    code the blended samples come first), samples not in `apply` come back bit for bit.

    Args:
        videos: x, floating and normalised, of shape `layout`.
        frames: z, normalised like the clips: (B, C, H, W), or (B, N, C, H, W) for the layout "bncthw", where
            (B, C, H, W) is shared by the clips of a sample. Finite, cast to the videos' dtype, and detached.
        lam: λ in [0, 1]; a number, or a tensor of one value or of shape (B,) on the videos' device.
        apply: Which samples to blend, boolean (B,); None: all.
        layout: "btchw", "bcthw" or "bncthw".
        inplace: Write into `videos`, which saves a second batch. Not for a leaf that needs its gradient.

    Returns:
        A new tensor of the videos' shape and dtype; `videos` themselves with `inplace`.

    Raises:
        ValueError: If shapes, dtypes or options do not fit, or if a number `lam` leaves [0, 1].

    Example:
        >>> import torch
        >>> videos, frames = torch.ones(2, 3, 4, 1, 1), torch.zeros(2, 3, 1, 1)
        >>> stillmix(videos, frames, 0.75, torch.tensor([True, False]))[:, 0, :, 0, 0]
        tensor([[0.7500, 0.7500, 0.7500, 0.7500],
                [1.0000, 1.0000, 1.0000, 1.0000]])
    """
    check_videos(videos, layout)
    check_lam(lam, videos)
    check_apply(apply, videos)
    _check_frames(frames, videos, layout)
    if layout == "bncthw" and frames.ndim == 4:
        frames = frames.unsqueeze(1)
    still = frames.detach().to(videos.dtype).unsqueeze(layout.index("t"))
    return blend(videos, still, lam, apply, inplace=inplace)


def sample_stillmix(
    batch_size: int,
    num_frames: int,
    *,
    alpha: float = 200.0,
    beta: float = 200.0,
    p: float = 0.5,
    clips: int = 1,
    per_sample_lam: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> StillMixDraw:
    """Draw what one step needs: λ ~ Beta(alpha, beta), bank indices with replacement, and who is blended.

    Args:
        batch_size: B.
        num_frames: Frames in the bank, M.
        alpha: First parameter of the Beta distribution. The default pair has mean 0.5 and deviation 0.025.
        beta: Second parameter.
        p: Probability with which a sample is blended.
        clips: N clips of a sample, each with a frame of its own.
        per_sample_lam: A λ for each sample instead of one for the batch (not in the authors' code).
        generator: The draw is made on its device; None: on `device`, from the global generator.
        device: Where the draw ends up; None: where it was made.

    Returns:
        `lam` () or (B,); `indices`, integers in [0, M), (B,) or, for several clips, (B, N); `apply`, boolean (B,).

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> import torch
        >>> draw = sample_stillmix(4, 1024, p=1.0, generator=torch.Generator().manual_seed(0))
        >>> draw.lam.shape, draw.indices.shape, draw.apply
        (torch.Size([]), torch.Size([4]), tensor([True, True, True, True]))
    """
    check_positive(batch_size=batch_size, num_frames=num_frames, alpha=alpha, beta=beta, clips=clips)
    check_range("p", p, 0, 1)
    source = device if generator is None else generator.device
    lam = sample_beta(alpha, beta, (batch_size,) if per_sample_lam else (), generator=generator, device=source)
    shape = (batch_size,) if clips == 1 else (batch_size, clips)
    indices = torch.randint(num_frames, shape, generator=generator, device=source)
    apply = torch.rand(batch_size, generator=generator, device=source) < p
    return StillMixDraw(*(moved(drawn, device or drawn.device) for drawn in (lam, indices, apply)))


def frame_bias_scores(logits: Tensor, targets: Tensor, *, temperature: float = 1.0) -> FrameBiasScores:
    """How strongly single frames give their label away, from a reference network's logits; no gradient.

    Args:
        logits: (n, K), floating; softmax in float32 at least.
        targets: Labels of the frames' videos, integers (n,).
        temperature: Divides the logits. The authors' code has 1.

    Returns:
        Three tensors of shape (n,). `top_prob` is the score of all published settings: the confidence in the
        network's own prediction, right or wrong.

    Raises:
        ValueError: If shapes or dtypes do not fit, or (on a CPU) if `targets` leaves [0, K).

    Example:
        >>> import torch
        >>> frame_bias_scores(torch.tensor([[0.0, 1.0986]]), torch.tensor([0]))
        FrameBiasScores(target_prob=tensor([0.2500]), top_prob=tensor([0.7500]), top_class=tensor([1]))
    """
    check_logits(logits=logits)
    check_integer("targets", targets)
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        found = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"`logits` and `targets` must have shapes (n, K) and (n,), got {found}")
    check_positive(temperature=temperature)
    probs = softmax(upcast(logits)[0], temperature)
    top_prob, top_class = probs.max(1)
    return FrameBiasScores(pick("targets", targets.long()[:, None], probs)[:, 0], top_prob, top_class)


def select_biased_frames(
    scores: Tensor,
    *,
    strategy: Strategy = "quantile",
    low: float = 0.5,
    high: float = 1.0,
    count: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Indices of the frames that betray their label most; all four strategies are from the authors' code.

    - "quantile" (all published settings): positions int(low · n) to int(high · n) of the frames sorted by score, in
      this order. `low` probably is the paper's threshold τ (a guess).
    - "threshold": low ≤ score ≤ high, in the order of the frames.
    - "top": the `count` largest scores, or all if there are fewer, the largest first.
    - "bernoulli": each frame with its score as probability, in the order of the frames; a new draw at each call.

    A tie goes to the smaller index when ascending and to the larger one when descending: sort the frames by their
    keys first, and the same frames are chosen on every machine.

    Args:
        scores: (n,), floating; keep float64 where the scores were stored so.
        strategy: See above.
        low: Lower bound of "quantile" and "threshold".
        high: Upper bound of the two.
        count: For "top", and only for it.
        generator: For "bernoulli", of the scores' device.

    Returns:
        Integers, at least one.

    Raises:
        ValueError: If a shape, dtype or option does not fit, if a score is NaN, or if nothing is selected.

    Example:
        >>> import torch
        >>> select_biased_frames(torch.tensor([0.9, 0.3, 0.9, 0.5]))
        tensor([0, 2])
        >>> select_biased_frames(torch.tensor([0.9, 0.3, 0.9, 0.5]), strategy="top", count=3)
        tensor([2, 0, 3])
    """
    _check_selection(scores, strategy, low, high, count)
    ascending = scores.sort(stable=True).indices
    if strategy == "quantile":
        chosen = ascending[int(low * len(scores)) : int(high * len(scores))]
    elif strategy == "top":
        chosen = ascending.flip(0)[:count]
    elif strategy == "threshold":
        chosen = ((scores >= low) & (scores <= high)).nonzero()[:, 0]
    else:
        draw = torch.rand(scores.shape, dtype=scores.dtype, device=scores.device, generator=generator)
        chosen = (draw < scores).nonzero()[:, 0]
    if not len(chosen):
        found = f"strategy {strategy!r}, low {low}, high {high}"
        raise ValueError(f"no frame of the {len(scores)} `scores` is selected ({found}): widen the window")
    return chosen


def _check_frames(frames: Tensor, videos: Tensor, layout: Layout) -> None:
    if not frames.is_floating_point():
        raise ValueError(f"`frames` must be floating, got {frames.dtype}: normalise them like the clips first")
    sizes = dict(zip(layout, videos.shape, strict=True))
    shared = tuple(sizes[dim] for dim in "bchw")
    own = tuple(sizes[dim] for dim in layout if dim != "t")
    if frames.shape not in (shared, own):
        expected = f"{shared}" if shared == own else f"{own} or {shared}"
        raise ValueError(f"`frames` must have shape {expected} to fit the clips, got {tuple(frames.shape)}")


def _check_selection(scores: Tensor, strategy: Strategy, low: float, high: float, count: int | None) -> None:
    check_choice("strategy", strategy, Strategy)
    if scores.ndim != 1 or not scores.is_floating_point():
        raise ValueError(f"`scores` must be floating and of shape (n,), got {tuple(scores.shape)} of {scores.dtype}")
    if scores.isnan().any():
        raise ValueError(f"`scores` must be numbers, got NaN in {int(scores.isnan().sum())} of {len(scores)}")
    check_range("low", low, 0, 1)
    check_range("high", high, 0, 1)
    if low >= high:
        raise ValueError(f"`low` must be smaller than `high`, got {low} and {high}")
    if (strategy == "top") != (count is not None):
        raise ValueError(f"`count` belongs to strategy 'top' and to no other, got {count} for {strategy!r}")
    if count is not None:
        check_positive(count=count)

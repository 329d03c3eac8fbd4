r"""TW-BERT's frame selector: a differentiable choice of the frames that a text asks for.

Source: as `trajectory_word_attention`; the perturbed maximum is that of Berthet et al., "Learning with Differentiable
Perturbed Optimizers", NeurIPS 2020, applied to the top k as by Cordonnier et al., CVPR 2021.
"""

from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_methods.functional._logits import check_choice, check_positive, check_range
from lightning_methods.functional._shapes import at_least_float32, check_floating, check_shape, no_autocast

PerturbedGradient: TypeAlias = Literal["diagonal", "full"]


class FrameSelection(NamedTuple):
    """The chosen frames (B, k, N, D), the scores of all (B, T) and the weights of the choice (B, k, T)."""

    frames: Tensor
    scores: Tensor
    indicators: Tensor


def perturbed_topk(
    scores: Tensor,
    *,
    k: int,
    num_samples: int = 500,
    sigma: float = 0.05,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    gradient: PerturbedGradient = "diagonal",
) -> Tensor:
    r"""The mean, over noise on the scores, of the top k as one-hot rows in the order of their positions.

    $I_r = \frac1n \sum_n P_{nr}$, where $P_{nr}$ is the one-hot row of the r-th position, from the left, among the k
    largest of $p + \sigma \varepsilon_n$. For gradients $g$ of the result,

    - "full" is $\frac{1}{n\sigma} \sum_n \varepsilon_{nt} \sum_{r, t'} P_{nrt'} g_{rt'}$, the Monte-Carlo estimate of
      the true gradient of the expectation;
    - "diagonal" keeps t' = t only, as the authors' code does.

    Args:
        scores: p, (B, T).
        k: Number of rows, in [1, T].
        num_samples: n, at least 1.
        sigma: σ > 0.
        noise: ε, (B, n, T), standard normal; None: drawn, (B, num_samples, T).
        generator: Of the drawn noise, on the device of `scores`.
        gradient: As above.

    Returns:
        Weights (B, k, T), float32 at least; each row sums to 1.

    Raises:
        ValueError: If an argument is out of its range or the noise has another shape.

    Example:
        >>> import torch
        >>> perturbed_topk(torch.tensor([[0.1, 0.9, 0.5]]), k=2, num_samples=3, sigma=1e-3)
        tensor([[[0., 1., 0.],
                 [0., 0., 1.]]])
    """
    check_floating(scores=scores, noise=noise)
    check_shape("scores", scores, "B, T", (None, None))
    batch, length = scores.shape
    check_range("k", k, 1, length)
    check_range("num_samples", num_samples, 1, float("inf"))
    check_positive(sigma=sigma)
    check_choice("gradient", gradient, PerturbedGradient)
    scores = scores.to(at_least_float32(scores))
    if noise is None:
        size = (batch, num_samples, length)
        noise = torch.randn(size, generator=generator, dtype=scores.dtype, device=scores.device)
    check_shape("noise", noise, "B, n, T", (batch, None, length))
    noise = noise.detach().to(scores.dtype)

    fixed = scores.detach()
    chosen = (fixed.unsqueeze(1) + sigma * noise).topk(k, sorted=False).indices.sort(-1).values.transpose(1, 2)
    samples = noise.shape[1]
    weights = fixed.new_zeros(batch, k, length)
    weights = weights.scatter_add(2, chosen, weights.new_full((), 1 / samples).expand_as(chosen))
    if not scores.requires_grad:
        return weights
    # The derivative is constant once the noise is drawn: a term that is zero carries it.
    step = scores - fixed
    if gradient == "diagonal":
        own = noise.transpose(1, 2).gather(1, chosen)  # (B, k, n): the noise of what was chosen
        slope = torch.zeros_like(weights).scatter_add(2, chosen, own) / (samples * sigma)
        return weights + slope * step.unsqueeze(1)
    slope = fixed.new_zeros(batch, k, length, length)
    index, source = (part.expand(batch, k, samples, length) for part in (chosen.unsqueeze(-1), noise.unsqueeze(1)))
    slope = slope.scatter_add(2, index, source) / (samples * sigma)
    return weights + (slope @ step[:, None, :, None]).squeeze(-1)


def select_frames(
    frames: Tensor,
    text: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    in_weight: Tensor,
    mid_weight: Tensor,
    out_weight: Tensor,
    *,
    k: int,
    num_samples: int = 500,
    sigma: float = 0.05,
    training: bool = False,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    gradient: PerturbedGradient = "diagonal",
) -> FrameSelection:
    r"""The k frames that fit a text best, in their order.

    With the frames' [CLS] tokens $c_t$ and the text's $u$: $f_t = \mathrm{GELU}(W_{in} \mathrm{LN}(c_t))$ and
    $p = \mathrm{softmax}_t(W_{out} \mathrm{GELU}(W_{mid} [f_t; u]))$; LN has eps 1e-5, and GELU is the exact one.

    Args:
        frames: Tokens of frames, each with its [CLS] first, (B, T, N, D).
        text: The text's [CLS], (B, D).
        norm_weight: Of the LayerNorm, (D,).
        norm_bias: (D,).
        in_weight: (D, D).
        mid_weight: (D, 2D).
        out_weight: (1, D).
        k: Number of frames, in [1, T].
        num_samples: As in `perturbed_topk`.
        sigma: As in `perturbed_topk`.
        training: Frames are means weighted by `perturbed_topk`; if False they are the best k themselves, and the
            scores receive no gradient from them.
        noise: As in `perturbed_topk`, for training.
        generator: As in `perturbed_topk`.
        gradient: As in `perturbed_topk`.

    Raises:
        ValueError: If shapes do not fit or an argument is out of its range.

    Example:
        >>> import torch
        >>> maps = torch.ones(4), torch.zeros(4), torch.eye(4), torch.ones(4, 8), torch.ones(1, 4)
        >>> select_frames(torch.randn(2, 6, 3, 4), torch.randn(2, 4), *maps, k=5).frames.shape
        torch.Size([2, 5, 3, 4])
    """
    check_floating(frames=frames, text=text)
    check_shape("frames", frames, "B, T, N, D", (None,) * 4)
    batch, length, tokens, width = frames.shape
    if not tokens:
        raise ValueError("`frames` must have a [CLS] token in each frame, got no token")
    check_shape("text", text, "B, D", (batch, width))
    check_shape("norm_weight", norm_weight, "D", (width,))
    check_shape("norm_bias", norm_bias, "D", (width,))
    check_shape("in_weight", in_weight, "D, D", (width, width))
    check_shape("mid_weight", mid_weight, "D, 2D", (width, 2 * width))
    check_shape("out_weight", out_weight, "1, D", (1, width))
    check_range("k", k, 1, length)

    features = F.gelu(F.linear(F.layer_norm(frames[:, :, 0], (width,), norm_weight, norm_bias), in_weight))
    # One product for all frames and one for the text, which is the same in all.
    of_frames, of_text = F.linear(features, mid_weight[:, :width]), F.linear(text, mid_weight[:, width:])
    logits = F.linear(F.gelu(of_frames + of_text.unsqueeze(1)), out_weight).squeeze(-1)
    scores = logits.softmax(-1, dtype=at_least_float32(logits))
    if training:
        indicators = perturbed_topk(
            scores, k=k, num_samples=num_samples, sigma=sigma, noise=noise, generator=generator, gradient=gradient
        )
        with no_autocast(frames):
            mixed = indicators @ frames.to(indicators.dtype).flatten(2)
        return FrameSelection(mixed.to(frames.dtype).view(batch, k, tokens, width), scores, indicators)
    best = scores.detach().topk(k, sorted=False).indices.sort(-1).values
    chosen = frames.take_along_dim(best[:, :, None, None], 1)
    indicators = scores.new_zeros(batch, k, length).scatter(2, best.unsqueeze(-1), 1.0)
    return FrameSelection(chosen, scores, indicators)

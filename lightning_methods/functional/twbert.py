r"""Trajectory-word attention of TW-BERT: a word attends inside every frame first, then over the frames.

One softmax over all patches of all frames is won by what covers many patches. Here each word has a softmax of its own
in every frame, whose results are the word's trajectory, one token a frame; a second softmax runs over the trajectory
and the other words. The patches keep an ordinary attention to the words and to their own frame, so the layer is not
symmetric.

Letters: B samples, L words (padded), T frames, S patches of a frame, D width, H heads, d = D / H.

Source: Yang et al., "Learning Trajectory-Word Alignments for Video-Language Tasks", ICCV 2023, arXiv 2301.01953. The
formulas are those of the authors' code (TRESPASSING19990617/TW-BERT), and agree with its results; that they are the
paper's is a guess, as the paper's body could not be read. That text keys are projected once, and not once for every
query word, is ours.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_methods.functional._shapes import at_least_float32, check_floating, check_shape


class TrajectoryWordResult(NamedTuple):
    """The attended words (B, L, D) and video tokens (B, 1 + T·S, D)."""

    text: Tensor
    video: Tensor


class TrajectoryResult(NamedTuple):
    """One token for each word and frame (B, H, L, T, d), and the weights of the patches (B, H, L, T, S)."""

    trajectory: Tensor
    weights: Tensor


def trajectory_word_attention(
    text: Tensor,
    video: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    num_heads: int,
    num_frames: int,
    text_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
) -> TrajectoryWordResult:
    r"""Asymmetric attention between words and the patches of a video.

    1. Trajectory: in each frame a word pools the patches, $z_{it} = \sum_s a^1_{its} v_1(p_{ts})$ with
       $a^1_{it} = \mathrm{softmax}_s(q_1(w_i) \cdot k_1(p_{ts}) / \sqrt d)$; the video's [CLS] is no key.
    2. $r_{it} = \mathrm{LayerNorm}(\mathrm{traj}(z_{it}))$.
    3. Word: one softmax over the L words and the T tokens of the word's own trajectory, with $q_2, k_2, v_2$, then
       `out`. As the trajectory is never masked, every row has a key.
    4. Patches: those of a frame attend to the words, to each other and to the video's [CLS], with $q_1, k_1, v_1$ and
       `out`; the [CLS] does so in every frame, and its results are averaged.

    Words that are masked receive outputs, which mean nothing. Softmaxes are computed in float32 at least.

    Args:
        text: Words, already normalised by the block, (B, L, D).
        video: [CLS] and then the patches, frame by frame, (B, 1 + T·S, D).
        proj_weight: The eight linear maps q1, k1, v1, q2, k2, v2, out and traj, (8D, D).
        proj_bias: (8D,).
        norm_weight: Of the trajectory's LayerNorm, (D,).
        norm_bias: (D,).
        num_heads: H, a divisor of D.
        num_frames: T; 1 is ordinary word-to-patch attention.
        text_mask: Non-zero at real words, (B, L), bool or integer; None if all are.
        dropout_p: Dropout probability on the three attention weights.
        eps: Of the LayerNorm.

    Raises:
        ValueError: If shapes do not fit, D is no multiple of `num_heads`, or the patches do not divide into frames.

    Example:
        >>> import torch
        >>> text, video = torch.randn(2, 5, 8), torch.randn(2, 1 + 3 * 4, 8)
        >>> maps, bias = torch.randn(64, 8), torch.zeros(64)
        >>> result = trajectory_word_attention(
        ...     text, video, maps, bias, torch.ones(8), torch.zeros(8), num_heads=2, num_frames=3
        ... )
        >>> result.text.shape, result.video.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 13, 8]))
    """
    _check_inputs(text, video, num_heads, num_frames, text_mask)
    width = text.shape[2]
    check_shape("proj_weight", proj_weight, "8D, D", (8 * width, width))
    for name, vector, names, size in (
        ("proj_bias", proj_bias, "8D", 8 * width),
        ("norm_weight", norm_weight, "D", width),
        ("norm_bias", norm_bias, "D", width),
    ):
        check_shape(name, vector, names, (size,))

    weight, bias = proj_weight.reshape(8, width, width), proj_bias.reshape(8, width)
    words = _project(text, weight[:6], bias[:6], num_heads)
    tokens = _project(video, weight[:3], bias[:3], num_heads)
    mask = None if text_mask is None else text_mask != 0

    pooled = _pool_frames(words[0], tokens, num_frames, dropout_p)
    trajectory = F.layer_norm(F.linear(pooled, weight[7], bias[7]), (width,), norm_weight, norm_bias, eps)
    keys = _project(trajectory, weight[4:6], bias[4:6], num_heads)
    text_out = _attend_words(words[3:], keys, mask, dropout_p)
    video_out = _attend_patches(words[1:3], tokens, mask, num_frames, dropout_p)
    return TrajectoryWordResult(F.linear(text_out, weight[6], bias[6]), F.linear(video_out, weight[6], bias[6]))


def trajectory_pool(query: Tensor, key: Tensor, value: Tensor) -> TrajectoryResult:
    r"""A word's attention inside each frame by itself, with its weights: step 1 of `trajectory_word_attention`.

    Args:
        query: Of the words, (B, H, L, d).
        key: Of the patches, (B, H, T, S, d).
        value: Same shape as `key`.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import torch
        >>> result = trajectory_pool(torch.randn(2, 1, 3, 4), *torch.randn(2, 2, 1, 5, 6, 4))
        >>> result.trajectory.shape, result.weights.sum(-1).allclose(torch.ones(2, 1, 3, 5))
        (torch.Size([2, 1, 3, 5, 4]), True)
    """
    check_floating(query=query, key=key, value=value)
    check_shape("query", query, "B, H, L, d", (None,) * 4)
    batch, heads, _, width = query.shape
    check_shape("key", key, "B, H, T, S, d", (batch, heads, None, None, width))
    check_shape("value", value, "B, H, T, S, d", key.shape)
    logits = query.unsqueeze(2) @ key.transpose(-2, -1) / math.sqrt(width)
    weights = logits.softmax(-1, dtype=at_least_float32(logits))
    pooled = weights.to(value.dtype) @ value
    return TrajectoryResult(pooled.transpose(2, 3), weights.transpose(2, 3))


def _check_inputs(text: Tensor, video: Tensor, num_heads: int, num_frames: int, text_mask: Tensor | None) -> None:
    check_floating(text=text, video=video)
    check_shape("text", text, "B, L, D", (None,) * 3)
    batch, length, width = text.shape
    check_shape("video", video, "B, 1 + T·S, D", (batch, None, width))
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"`num_heads` must divide the width D = {width}, got {num_heads}")
    patches = video.shape[1] - 1
    if num_frames < 1 or patches < num_frames or patches % num_frames:
        found = f"{num_frames} frames for 1 + {patches} tokens"
        raise ValueError(f"`num_frames` must divide the patches of `video` (B, 1 + T·S, D), got {found}")
    if text_mask is not None:
        check_shape("text_mask", text_mask, "B, L", (batch, length))


def _project(tokens: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Several maps in one product: (..., D) with (M, D, D) to M tensors (..., H, d)."""
    maps, width = weight.shape[:2]
    packed = F.linear(tokens, weight.flatten(0, 1), bias.flatten())
    return torch.unflatten(packed, -1, (maps, num_heads, width // num_heads)).unbind(-3)


def _by_frame(token: Tensor, num_frames: int) -> Tensor:
    """Patches, without the [CLS]: (B, 1 + T·S, ...) to (B, T, S, ...)."""
    return torch.unflatten(token[:, 1:], 1, (num_frames, -1))


def _pool_frames(query: Tensor, tokens: tuple[Tensor, ...], num_frames: int, dropout_p: float) -> Tensor:
    """Words (B, L, H, d) and video (B, 1 + T·S, H, d) to trajectories before their map, (B, T, L, D)."""
    batch, length, heads, width = query.shape
    key, value = (_by_frame(token, num_frames).flatten(0, 1).transpose(1, 2) for token in tokens[1:])
    query = query.unsqueeze(1).expand(batch, num_frames, length, heads, width).flatten(0, 1).transpose(1, 2)
    pooled = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p)
    return pooled.transpose(1, 2).reshape(batch, num_frames, length, heads * width)


def _attend_words(
    words: tuple[Tensor, ...], trajectory: tuple[Tensor, ...], mask: Tensor | None, dropout_p: float
) -> Tensor:
    """Words (B, L, H, d), and keys and values of trajectories (B, T, L, H, d), to words (B, L, D).

    Every word has T keys of its own besides the L that all words share, which no fused kernel knows; the logits of
    both are joined for one softmax, and the shared keys are never repeated.
    """
    query, key, value = (part.transpose(1, 2) for part in words)
    own_key, own_value = (part.permute(0, 3, 2, 1, 4) for part in trajectory)  # (B, H, L, T, d)
    length = query.shape[2]
    query = query / math.sqrt(query.shape[-1])
    logits = torch.cat([query @ key.transpose(-2, -1), (own_key @ query.unsqueeze(-1)).squeeze(-1)], -1)
    logits = logits.to(at_least_float32(logits))
    if mask is not None:
        closed = F.pad(~mask, (0, own_key.shape[3]), value=False)
        logits = logits.masked_fill(closed[:, None, None], torch.finfo(logits.dtype).min)
    weights = F.dropout(logits.softmax(-1), dropout_p).to(value.dtype)
    shared, own = weights[..., :length], weights[..., length:]
    attended = shared @ value + (own.unsqueeze(-2) @ own_value).squeeze(-2)
    return attended.transpose(1, 2).flatten(2)


def _attend_patches(
    words: tuple[Tensor, ...], tokens: tuple[Tensor, ...], mask: Tensor | None, num_frames: int, dropout_p: float
) -> Tensor:
    """Keys and values of words (B, L, H, d), and video (B, 1 + T·S, H, d), to video (B, 1 + T·S, D)."""
    batch, length = words[0].shape[:2]

    def per_frame(part: Tensor) -> Tensor:
        return part.unsqueeze(1).expand(batch, num_frames, *part.shape[1:])

    patches = [_by_frame(token, num_frames) for token in tokens]
    cls = [per_frame(token[:, :1]) for token in tokens]
    query = torch.cat([cls[0], patches[0]], 2)
    key, value = (
        torch.cat([per_frame(word), patch, one], 2)
        for word, patch, one in zip(words, patches[1:], cls[1:], strict=True)
    )
    if mask is not None:
        mask = F.pad(mask, (0, key.shape[2] - length), value=True)
        mask = per_frame(mask).flatten(0, 1)[:, None, None]
    query, key, value = (part.flatten(0, 1).transpose(1, 2) for part in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p)
    attended = torch.unflatten(attended.transpose(1, 2), 0, (batch, num_frames)).flatten(3)
    return torch.cat([attended[:, :, 0].mean(1, keepdim=True), attended[:, :, 1:].flatten(1, 2)], 1)

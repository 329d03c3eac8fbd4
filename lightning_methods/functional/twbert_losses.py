r"""Contrast and matching of videos and texts as TW-BERT is pretrained with, and its masked words.

Source: as `trajectory_word_attention`. The fine-grained contrast is that of the paper's first version, which the
authors' code has switched off and whose weight it does not tell.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_methods.functional._index import check_integer
from lightning_methods.functional._logits import check_range
from lightning_methods.functional._shapes import at_least_float32, check_floating, check_shape, no_autocast

#: Label of tokens that `torch.nn.functional.cross_entropy` leaves out.
_IGNORED = -100


class MaskedTokens(NamedTuple):
    """Token ids of which some are masked, and labels: the original id there, -100 elsewhere."""

    ids: Tensor
    labels: Tensor


def video_text_contrastive_loss(
    video: Tensor,
    text: Tensor,
    video_momentum: Tensor,
    text_momentum: Tensor,
    video_queue: Tensor,
    text_queue: Tensor,
    temperature: Tensor | float,
    *,
    alpha: float = 0.4,
    normalize: bool = True,
) -> Tensor:
    r"""Contrast of videos and texts against momentum features and a queue, with targets softened by the momentum.

    With the columns $\bar T = [\bar t; Q_t]$ of a video, $s = v \bar T^\top / \tau$ and
    $y_i = \alpha\, \mathrm{softmax}(\bar v_i \bar T^\top / \tau) + (1 - \alpha)\, e_i$, the loss of the videos is
    the mean over i of $-\sum_k y_{ik} \log \mathrm{softmax}(s_i)_k$; that of the texts is the mirror image, and the
    result the mean of the two. At alpha 0 and without queues it is InfoNCE between the features and the momentum's.

    Gradients reach `video`, `text` and, through the students' logits only, `temperature`.

    Args:
        video: Features of videos, (B, E); video i belongs to text i.
        text: Features of texts, (B, E).
        video_momentum: Of the same videos by the momentum encoder, (B, E).
        text_momentum: Of the same texts by the momentum encoder, (B, E).
        video_queue: Earlier momentum features, unit rows, (Q, E); Q may be 0.
        text_queue: (Q, E).
        temperature: τ > 0, a number or scalar tensor. The authors learn it within [0.001, 0.5], from 0.07.
        alpha: Share of the momentum's prediction in the targets, in [0, 1].
        normalize: Divide features (not the queues) by their norm.

    Returns:
        Scalar, float32 at least.

    Raises:
        ValueError: If shapes do not fit or `alpha` leaves its range.

    Example:
        >>> import torch
        >>> eye, nothing = torch.eye(2), torch.zeros(0, 2)
        >>> video_text_contrastive_loss(eye, eye, eye, eye, nothing, nothing, 1.0, alpha=0.0)
        tensor(0.3133)
    """
    features = {"video": video, "text": text, "video_momentum": video_momentum, "text_momentum": text_momentum}
    queues = {"video_queue": video_queue, "text_queue": text_queue}
    check_floating(**features, **queues)
    check_shape("video", video, "B, E", (None, None))
    for name, tensor in features.items():
        check_shape(name, tensor, "B, E", video.shape)
    for name, tensor in queues.items():
        check_shape(name, tensor, "Q, E", (None, video.shape[1]))
    check_range("alpha", alpha, 0, 1)

    dtype = at_least_float32(*features.values())
    with no_autocast(video):
        v, t, v_momentum, t_momentum = (_unit(tensor, dtype, normalize) for tensor in features.values())
        tau = torch.as_tensor(temperature, dtype=dtype, device=video.device)
        texts = torch.cat([t_momentum, text_queue.to(dtype)]).detach()
        videos = torch.cat([v_momentum, video_queue.to(dtype)]).detach()
        of_video = _distilled(v, v_momentum, texts, tau, alpha)
        of_text = _distilled(t, t_momentum, videos, tau, alpha)
    return (of_video + of_text) / 2


def fine_grained_contrastive_loss(
    video: Tensor,
    text: Tensor,
    text_mask: Tensor,
    video_all: Tensor,
    text_all: Tensor,
    text_all_mask: Tensor,
    *,
    num_frames: int,
    temperature: Tensor | float = 0.07,
    normalize: bool = True,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Contrast of patches and words: each word looks for its best patch in each frame.

    The similarity of a video and a text is the mean over its words l and the frames t of
    $\max_s p_{ts} \cdot w_l / \tau$. The loss is the mean of two cross-entropies: of the videos against all texts, and
    of the texts against all videos; pair i is the right one of sample i.

    Gradients reach `video`, `text` and `temperature`. Where several patches are equally good, one receives the
    gradient. A text without words has similarity 0 with every video.

    Args:
        video: Features of patches, without [CLS], frame by frame, (B, T·S, E).
        text: Features of tokens, (B, L, E).
        text_mask: Non-zero at tokens that count, (B, L); the authors count [CLS] and [SEP], too.
        video_all: Momentum features of the same videos and then others, constants, (K, T·S, E).
        text_all: The same of the texts, (K, L, E).
        text_all_mask: (K, L).
        num_frames: T.
        temperature: τ > 0, a number or scalar tensor.
        normalize: Divide every feature by its norm.
        chunk_size: Number of the K columns whose similarities stand in memory at a time; None: all. What is kept for
            the backward pass does not grow with S in either case.

    Returns:
        Scalar, float32 at least.

    Raises:
        ValueError: If shapes do not fit, K < B, or `num_frames` does not divide the patches.

    Example:
        >>> import torch
        >>> patches, words, mask = torch.eye(2)[:, None], torch.eye(2)[:, None], torch.ones(2, 1)
        >>> fine_grained_contrastive_loss(patches, words, mask, patches, words, mask, num_frames=1, temperature=1.0)
        tensor(0.3133)
    """
    _check_fine(video, text, text_mask, video_all, text_all, text_all_mask, num_frames)
    if chunk_size is not None:
        check_range("chunk_size", chunk_size, 1, float("inf"))
    dtype = at_least_float32(video, text)
    columns = chunk_size or len(video_all)
    with no_autocast(video):
        patches, words = _unit(video, dtype, normalize), _unit(text, dtype, normalize)
        all_patches = _unit(video_all.detach(), dtype, normalize)
        all_words = _unit(text_all.detach(), dtype, normalize)
        mask, all_mask = (text_mask != 0).to(dtype), (text_all_mask != 0).to(dtype)
        of_video = [
            _best_patches(patches, chunk, chunk_mask, num_frames)
            for chunk, chunk_mask in zip(torch.split(all_words, columns), torch.split(all_mask, columns), strict=True)
        ]
        of_text = [_best_patches(chunk, words, mask, num_frames).T for chunk in torch.split(all_patches, columns)]
        target = torch.arange(len(video), device=video.device)
        losses = [F.cross_entropy(torch.cat(part, 1) / temperature, target) for part in (of_video, of_text)]
    return (losses[0] + losses[1]) / 2


def video_text_matching_loss(logits: Tensor, num_positive: int) -> Tensor:
    """Cross-entropy of "does this text belong to this video", true for the first pairs only.

    Args:
        logits: Of no and yes, (R, 2); the authors have R = 3B: B pairs, B texts with a wrong video, and B videos with
            a wrong text.
        num_positive: How many of the first rows are right.

    Returns:
        Scalar, float32 at least.

    Raises:
        ValueError: If the shape does not fit or there are fewer rows than `num_positive`.

    Example:
        >>> import torch
        >>> video_text_matching_loss(torch.tensor([[0.0, 9.0], [9.0, 0.0], [9.0, 0.0]]), 1)
        tensor(0.0001)
    """
    check_floating(logits=logits)
    check_shape("logits", logits, "3B, 2", (None, 2))
    check_range("num_positive", num_positive, 1, len(logits))
    target = (torch.arange(len(logits), device=logits.device) < num_positive).long()
    with no_autocast(logits):
        return F.cross_entropy(logits.to(at_least_float32(logits)), target)


@torch.no_grad()
def sample_hard_negatives(similarity: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """For each row one other column, drawn by the softmax of the similarities without the diagonal.

    Args:
        similarity: Logits, (B, B), B at least 2.
        generator: Of the random numbers, on the device of `similarity`.

    Returns:
        Columns (B,), never the row's own.

    Raises:
        ValueError: If the matrix is not square or has fewer than two rows.

    Example:
        >>> import torch
        >>> sample_hard_negatives(torch.tensor([[9.0, 1.0], [2.0, 9.0]]))
        tensor([1, 0])
    """
    check_floating(similarity=similarity)
    check_shape("similarity", similarity, "B, B", (len(similarity), len(similarity)))
    if len(similarity) < 2:
        raise ValueError("`similarity` must have at least 2 rows: a single pair has no negative")
    diagonal = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    logits = similarity.to(at_least_float32(similarity)).masked_fill(diagonal, float("-inf"))
    # torch.multinomial draws in the same way, after it has waited for the device to check its input.
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(1) / noise).masked_fill(diagonal, -1).argmax(1)


def hard_negative_matching_loss(
    matcher: Callable[..., Tensor],
    text: Tensor,
    video: Tensor,
    text_logits: Tensor,
    video_logits: Tensor,
    *,
    text_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`video_text_matching_loss` of B pairs, each text with a video like its own, and each video with such a text.

    Args:
        matcher: From texts (R, L, D), videos (R, N, D) and, if there is one, the mask (R, L), to logits of no and yes,
            (R, 2). It is called once, with R = 3B: the pairs, B texts with wrong videos, and B videos with wrong texts.
        text: Tokens of the texts, (B, L, D), B at least 2.
        video: Tokens of their videos, (B, N, D); widths may differ.
        text_logits: How like text i is to video j, (B, B), divided by the temperature: `sample_hard_negatives` draws
            the wrong videos by it. It receives no gradient.
        video_logits: How like video i is to text j, (B, B); draws the wrong texts.
        text_mask: Non-zero at real words, (B, L).
        generator: Of the random numbers, on the device of the logits.

    Returns:
        Scalar, float32 at least.

    Raises:
        ValueError: If shapes do not fit, also that of what the matcher returns, or B < 2.

    Example:
        >>> import torch
        >>> text, video = torch.eye(2)[:, None], torch.eye(2)[:, None]
        >>> def matcher(text, video):
        ...     return 9 * torch.stack([1 - (text * video).sum((1, 2)), (text * video).sum((1, 2))], 1)
        >>> hard_negative_matching_loss(matcher, text, video, torch.zeros(2, 2), torch.zeros(2, 2))
        tensor(0.0001)
    """
    batch = len(text)
    check_shape("text", text, "B, L, D", (None,) * 3)
    check_shape("video", video, "B, N, D", (batch, None, None))
    check_shape("text_logits", text_logits, "B, B", (batch, batch))
    check_shape("video_logits", video_logits, "B, B", (batch, batch))
    own = torch.arange(batch, device=text.device)
    wrong_video = sample_hard_negatives(text_logits, generator=generator)
    wrong_text = sample_hard_negatives(video_logits, generator=generator)
    texts = torch.cat([own, own, wrong_text])
    inputs = [text[texts], video[torch.cat([own, wrong_video, own])]]
    if text_mask is not None:
        check_shape("text_mask", text_mask, "B, L", text.shape[:2])
        inputs.append(text_mask[texts])
    logits = matcher(*inputs)
    check_shape("matcher(...)", logits, "3B, 2", (3 * batch, 2))
    return video_text_matching_loss(logits, batch)


@torch.no_grad()
def mask_tokens(
    ids: Tensor,
    *,
    mask_id: int,
    vocab_size: int,
    special_mask: Tensor,
    pad_id: int = 0,
    probability: float = 0.15,
    generator: torch.Generator | None = None,
) -> MaskedTokens:
    """BERT's masked words: of those chosen 80 % become [MASK], 10 % a random token, and 10 % stay.

    Args:
        ids: Token ids, any shape.
        mask_id: Id of [MASK].
        vocab_size: Random tokens have ids below it.
        special_mask: Non-zero at tokens that are never chosen, such as [CLS] and [SEP]; the shape of `ids`.
        pad_id: Id of padding, which is never chosen.
        probability: Of each other token to be chosen, in [0, 1].
        generator: Of the random numbers, on the device of `ids`.

    Raises:
        ValueError: If `ids` are no integers, shapes differ or `probability` leaves its range.

    Example:
        >>> import torch
        >>> ids, special = torch.tensor([[101, 7, 102, 0]]), torch.tensor([[1, 0, 1, 0]])
        >>> mask_tokens(ids, mask_id=103, vocab_size=200, special_mask=special, probability=1.0).labels
        tensor([[-100,    7, -100, -100]])
    """
    check_integer("ids", ids)
    check_shape("special_mask", special_mask, "as ids", ids.shape)
    check_range("probability", probability, 0, 1)
    # One number decides that a token is chosen and another what becomes of it.
    chosen, fate = torch.rand(2, *ids.shape, device=ids.device, generator=generator)
    masked = (chosen < probability) & (special_mask == 0) & (ids != pad_id)
    other = torch.randint(vocab_size, ids.shape, device=ids.device, generator=generator, dtype=ids.dtype)
    replaced = torch.where(fate < 0.8, mask_id, torch.where(fate < 0.9, other, ids))
    return MaskedTokens(torch.where(masked, replaced, ids), torch.where(masked, ids, _IGNORED))


def _unit(features: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    features = features.to(dtype)
    return F.normalize(features, dim=-1) if normalize else features


def _distilled(student: Tensor, momentum: Tensor, columns: Tensor, tau: Tensor, alpha: float) -> Tensor:
    """Cross-entropy of the rows, the first columns being theirs."""
    log_probs = (student @ columns.T / tau).log_softmax(1)
    hard = -log_probs.diagonal().mean()
    if alpha == 0:
        return hard
    soft_target = (momentum.detach() @ columns.T / tau.detach()).softmax(1)
    return alpha * -(soft_target * log_probs).sum(1).mean() + (1 - alpha) * hard


def _best_patches(patches: Tensor, words: Tensor, mask: Tensor, num_frames: int) -> Tensor:
    """Patches (Y, T·S, E) and words (X, L, E) to similarities (Y, X)."""
    frames = torch.unflatten(patches, 1, (num_frames, -1))
    # The maximum remembers which patch won and needs none of the products for its gradient.
    best = torch.unflatten((frames @ words.flatten(0, 1).T).max(2).values, 2, mask.shape)
    return (best * mask).sum((1, 3)) / (num_frames * mask.sum(1).clamp_min(1))


def _check_fine(
    video: Tensor, text: Tensor, mask: Tensor, video_all: Tensor, text_all: Tensor, all_mask: Tensor, num_frames: int
) -> None:
    check_floating(video=video, text=text, video_all=video_all, text_all=text_all)
    check_shape("video", video, "B, T·S, E", (None,) * 3)
    batch, patches, width = video.shape
    check_shape("text", text, "B, L, E", (batch, None, width))
    check_shape("text_mask", mask, "B, L", text.shape[:2])
    check_shape("video_all", video_all, "K, T·S, E", (None, patches, width))
    check_shape("text_all", text_all, "K, L, E", (len(video_all), None, width))
    check_shape("text_all_mask", all_mask, "K, L", text_all.shape[:2])
    if num_frames < 1 or patches < num_frames or patches % num_frames:
        raise ValueError(f"`num_frames` must divide the {patches} patches of `video`, got {num_frames}")
    if len(video_all) < batch:
        raise ValueError(f"`video_all` must start with the {batch} videos themselves, got {len(video_all)} rows")

"""How ACF's captioner is trained: by words, by whole captions, and the rows that its authors make of a caption.

Source: as `span_cluster_matrix`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_methods.functional._index import check_integer
from lightning_methods.functional._logits import Reduction, check_choice, check_range
from lightning_methods.functional._shapes import at_least_float32, check_floating, check_shape, no_autocast


class PrefixRows(NamedTuple):
    """Rows of token ids and of masks (R, L), and the caption that each row comes from (R,)."""

    inputs: Tensor
    input_mask: Tensor
    targets: Tensor
    target_mask: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple has a method of this name


def masked_token_nll(logprobs: Tensor, targets: Tensor, mask: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Negative log-likelihood of the tokens that a mask lets count.

    $-\sum m_{rl} \log p_{rl}(\mathrm{target}) / \sum m_{rl}$ over all rows together; 0 where nothing counts.

    Args:
        logprobs: Log-probabilities, (R, L, V).
        targets: Token ids, (R, L); where the mask is 0 they are not read.
        mask: Weights ≥ 0 or bool, (R, L).
        reduction: "mean" as above, "sum" without the division, "none" gives shape (R, L).

    Returns:
        float32 at least.

    Raises:
        ValueError: If shapes do not fit, or (on a CPU) if targets that count leave [0, V).

    Example:
        >>> import torch
        >>> logprobs = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).log()
        >>> masked_token_nll(logprobs, torch.tensor([[1, -1]]), torch.tensor([[1, 0]]))
        tensor(0.6931)
    """
    check_floating(logprobs=logprobs)
    check_shape("logprobs", logprobs, "R, L, V", (None,) * 3)
    check_integer("targets", targets)
    check_shape("targets", targets, "R, L", logprobs.shape[:2])
    check_shape("mask", mask, "R, L", logprobs.shape[:2])
    check_choice("reduction", reduction, Reduction)
    read = torch.where(mask != 0, targets.long(), 0)
    try:
        chosen = logprobs.gather(2, read.unsqueeze(-1)).squeeze(-1)
    except RuntimeError:
        found = f"values from {int(read.min())} to {int(read.max())}"
        raise ValueError(f"`targets` must hold token ids in [0, {logprobs.shape[2]}), got {found}") from None
    dtype = at_least_float32(logprobs)
    with no_autocast(logprobs):
        weight = mask.to(dtype)
        losses = -weight * torch.where(mask != 0, chosen.to(dtype), 0)
        if reduction == "none":
            return losses
        return losses.sum() if reduction == "sum" else _ratio(losses.sum(), weight.sum())


def self_critical_loss(logprobs: Tensor, rewards: Tensor, mask: Tensor, *, num_samples: int) -> Tensor:
    r"""Policy gradient on sampled captions, each judged against the other samples of its image.

    The advantage of a sample is its reward minus the mean reward of the other n - 1, a constant, and the loss
    $-\sum_{st} a_s m_{st} \log p(w_{st}) / \sum_{st} m_{st}$; 0 where nothing counts.

    Args:
        logprobs: Log-probabilities of the sampled tokens, (B·n, T); the n samples of an image are neighbours.
        rewards: (B·n,).
        mask: Tokens that count, up to and with the one that ends the caption (see `caption_mask`), (B·n, T).
        num_samples: n, at least 2.

    Returns:
        Scalar, float32 at least.

    Raises:
        ValueError: If shapes do not fit, or `num_samples` is below 2 or does not divide the rows.

    Example:
        >>> import torch
        >>> logprobs = torch.tensor([[-1.0], [-3.0]])
        >>> self_critical_loss(logprobs, torch.tensor([3.0, 1.0]), torch.ones(2, 1), num_samples=2)
        tensor(-2.)
    """
    check_floating(logprobs=logprobs)
    check_shape("logprobs", logprobs, "B·n, T", (None, None))
    rows = len(logprobs)
    check_shape("rewards", rewards, "B·n", (rows,))
    check_shape("mask", mask, "B·n, T", logprobs.shape)
    check_range("num_samples", num_samples, 2, float("inf"))
    if rows % num_samples:
        raise ValueError(f"`num_samples` must divide the {rows} rows of `logprobs`, got {num_samples}")
    dtype = at_least_float32(logprobs)
    with no_autocast(logprobs):
        reward = rewards.detach().to(dtype).view(-1, num_samples)
        others = (reward.sum(1, keepdim=True) - reward) / (num_samples - 1)
        weight = mask.to(dtype)
        chosen = torch.where(mask != 0, logprobs.to(dtype), 0)  # what was sampled behind the end may have -inf
        return -_ratio(((reward - others).view(-1, 1) * weight * chosen).sum(), weight.sum())


def caption_mask(tokens: Tensor, end_id: int) -> Tensor:
    """True up to and with the first `end_id` of each row; everywhere in rows without one.

    Args:
        tokens: Integers, (..., T).
        end_id: The token that ends a caption; what pads behind it may have any id, this one too.

    Raises:
        ValueError: If the tokens are no integers.

    Example:
        >>> import torch
        >>> caption_mask(torch.tensor([[5, 9, 9], [5, 6, 7]]), end_id=9)
        tensor([[ True,  True, False],
                [ True,  True,  True]])
    """
    check_integer("tokens", tokens)
    ends = (tokens == end_id).long()
    return ends.cumsum(-1) == ends


def prefix_mask_rows(tokens: Tensor, *, mask_id: int, end_id: int) -> PrefixRows:
    """The training rows that the authors make of captions: a prefix, [MASK], and the next word as the target.

    A caption of n words between its begin and end tokens becomes n + 1 rows. Row r sees the tokens 0 to r and [MASK] at
    r + 1, in both directions; its target stands at r + 1. The columns behind hold `end_id` and are masked. As clusters
    are causal by themselves, ordinary causal training needs one row a caption instead; this is for parity. The host
    reads how many rows there are, so it belongs where batches are made.

    Args:
        tokens: Captions with their begin token first and `end_id` last, padded with anything, (B, L).
        mask_id: Id of [MASK].
        end_id: Id of the end. A caption without it fills its row, and its last word is its last target.

    Raises:
        ValueError: If `tokens` are no integers (B, L).

    Example:
        >>> import torch
        >>> rows = prefix_mask_rows(torch.tensor([[0, 5, 6, 9, 9]]), mask_id=8, end_id=9)
        >>> rows.inputs
        tensor([[0, 8, 9, 9, 9],
                [0, 5, 8, 9, 9],
                [0, 5, 6, 8, 9]])
        >>> rows.targets[rows.target_mask]
        tensor([5, 6, 9])
    """
    check_integer("tokens", tokens)
    check_shape("tokens", tokens, "B, L", (None, None))
    # The begin token is no end, even where both have the same id.
    predicted = caption_mask(tokens[:, 1:], end_id)
    index, prefix = predicted.nonzero(as_tuple=True)
    position = torch.arange(tokens.shape[1], device=tokens.device)
    last = prefix[:, None] + 1
    inputs = torch.where(position < last, tokens[index], torch.where(position == last, mask_id, end_id))
    return PrefixRows(inputs, position <= last, tokens[index], position == last, index)


def _ratio(total: Tensor, weight: Tensor) -> Tensor:
    return total / weight.masked_fill(weight == 0, 1)

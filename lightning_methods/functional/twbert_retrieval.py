"""How text-video retrieval is judged, in one stage and in the two stages of TW-BERT's protocol.

Source: the authors' code, as `trajectory_word_attention`. What becomes of ties is ours: rounding and dropped candidates
make many of them, and the authors' sort leaves their order open.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_methods.functional._index import check_integer
from lightning_methods.functional._logits import check_choice, check_range
from lightning_methods.functional._shapes import check_floating, check_shape

Ties: TypeAlias = Literal["pessimistic", "optimistic"]

#: Decimals of match scores in the authors' protocol.
_DECIMALS = 4


@torch.no_grad()
def retrieval_ranks(scores: Tensor, targets: Tensor | None = None, *, ties: Ties = "pessimistic") -> Tensor:
    """At which place each row's right column stands; 1 is the best.

    Args:
        scores: Floating, (R, C).
        targets: The right column of each row, integers (R,); None: row i has column i.
        ties: "pessimistic" puts the right column behind others of the same score, "optimistic" before them. NaN counts
            as the same score.

    Returns:
        Integers in [1, C], (R,).

    Raises:
        ValueError: If shapes do not fit, or (on a CPU) if `targets` leave [0, C).

    Example:
        >>> import torch
        >>> retrieval_ranks(torch.tensor([[0.9, 0.1, 0.9], [0.5, 0.2, 0.1]]))
        tensor([2, 2])
    """
    check_floating(scores=scores)
    check_shape("scores", scores, "R, C", (None, None))
    check_choice("ties", ties, Ties)
    rows, columns = scores.shape
    if targets is None:
        if rows > columns:
            raise ValueError(f"`targets` are missing: {rows} rows and {columns} columns cannot be pairs")
        targets = torch.arange(rows, device=scores.device)
    check_integer("targets", targets)
    check_shape("targets", targets, "R", (rows,))
    try:
        right = scores.gather(1, targets[:, None].long())
    except RuntimeError:
        found = f"values from {int(targets.min())} to {int(targets.max())}"
        raise ValueError(f"`targets` must hold columns in [0, {columns}), got {found}") from None
    if ties == "optimistic":
        return 1 + (scores > right).sum(1)
    return (~(scores < right)).sum(1)  # the right one is among them


@torch.no_grad()
def two_stage_retrieval_metrics(
    match_scores: Tensor, similarities: Tensor, *, candidates: int = 50
) -> dict[str, float]:
    """Recall and ranks where a cheap similarity chooses candidates and a matching head ranks them.

    For each text only the `candidates` videos of the highest similarity keep their match score, rounded to four
    decimals; all others have 0. Texts rank the videos by rows, videos the texts by columns of this one matrix. Ties
    count against the right one.

    Args:
        match_scores: Probabilities that text i and video j belong together, (N, N); i and i do.
        similarities: Of the first stage, (N, N).
        candidates: Videos kept for each text, at least 1.

    Returns:
        For "t2v" (text to video) and "v2t": `t2v_r1`, `t2v_r5`, `t2v_r10` in percent, `t2v_median_rank` and
        `t2v_mean_rank` from 1.

    Raises:
        ValueError: If the matrices are not square or differ in shape, are empty, or `candidates` < 1.

    Example:
        >>> import torch
        >>> match = torch.tensor([[0.9, 0.2], [0.8, 0.7]])
        >>> metrics = two_stage_retrieval_metrics(match, torch.eye(2), candidates=2)
        >>> metrics["t2v_r1"], metrics["v2t_r1"], metrics["t2v_mean_rank"]
        (50.0, 100.0, 1.5)
    """
    check_shape("match_scores", match_scores, "N, N", (len(match_scores), len(match_scores)))
    kept = keep_candidates(match_scores, similarities, candidates)
    directions = {"t2v": retrieval_ranks(kept), "v2t": retrieval_ranks(kept.T)}
    return {
        f"{direction}_{name}": float(value)
        for direction, ranks in directions.items()
        for name, value in rank_statistics(ranks, (1, 5, 10)).items()
    }


def keep_candidates(match_scores: Tensor, similarities: Tensor, candidates: int) -> Tensor:
    """Match scores (texts, videos), rounded, and 0 outside each text's candidates."""
    check_floating(match_scores=match_scores, similarities=similarities)
    check_shape("match_scores", match_scores, "texts, videos", (None, None))
    check_shape("similarities", similarities, "texts, videos", match_scores.shape)
    check_range("candidates", candidates, 1, float("inf"))
    best = similarities.topk(min(candidates, similarities.shape[1]), sorted=False).indices
    rounded = match_scores.round(decimals=_DECIMALS)
    return torch.zeros_like(rounded).scatter(1, best, rounded.gather(1, best))


def rank_statistics(ranks: Tensor, ks: tuple[int, ...]) -> dict[str, Tensor]:
    """Recall at each k in percent, and median (the mean of the two middle ones) and mean rank."""
    if not len(ranks):
        raise ValueError("there must be at least one rank, got none")
    ranks = ranks.double()
    recalls = {f"r{k}": 100 * (ranks <= k).double().mean() for k in ks}
    ordered = ranks.sort().values
    median = (ordered[(len(ranks) - 1) // 2] + ordered[len(ranks) // 2]) / 2
    return {**recalls, "median_rank": median, "mean_rank": ranks.mean()}

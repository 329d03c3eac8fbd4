"""Text-video retrieval, from features and in the two stages of TW-BERT's protocol; and answers about videos."""

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_methods.functional import retrieval_ranks
from lightning_methods.functional._index import check_integer
from lightning_methods.functional._logits import check_choice, check_range
from lightning_methods.functional._shapes import check_floating, check_shape
from lightning_methods.functional.twbert_retrieval import Ties, keep_candidates, rank_statistics

Direction: TypeAlias = Literal["t2v", "v2t"]


class TextVideoRecall(Metric):
    """Recall at k in percent, and the median and mean rank from 1, of text-to-video or video-to-text retrieval.

    Every text of the evaluated data is compared with every video, by the cosine of their features. Several texts may
    belong to one video: then each text looks for that video, and of a video's texts the last one counts.

    Args:
        ks: Each at least 1.
        direction: "t2v" ranks videos for each text, "v2t" texts for each video.
        ties: As in `retrieval_ranks`.
        chunk: Rows whose similarities stand in memory at a time.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of its range or shapes do not fit.

    Example:
        >>> import torch
        >>> metric = TextVideoRecall(ks=(1,))
        >>> metric.update(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.1]]))
        >>> metric.compute()
        {'r1': tensor(100.), 'median_rank': tensor(1.), 'mean_rank': tensor(1.)}
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    texts: list[Tensor]
    videos: list[Tensor]
    video_ids: list[Tensor]

    def __init__(
        self,
        ks: Sequence[int] = (1, 5, 10),
        direction: Direction = "t2v",
        ties: Ties = "pessimistic",
        chunk: int = 1024,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not ks or min(ks) < 1:
            raise ValueError(f"`ks` must hold numbers of at least 1, got {tuple(ks)}")
        check_choice("direction", direction, Direction)
        check_choice("ties", ties, Ties)
        check_range("chunk", chunk, 1, math.inf)
        self.ks = tuple(ks)
        self.direction = direction
        self.ties: Ties = ties
        self.chunk = chunk
        for name in ("texts", "videos", "video_ids"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, texts: Tensor, videos: Tensor, video_ids: Tensor | None = None) -> None:
        """Add pairs.

        Args:
            texts: Features, (B, E).
            videos: Features of the videos that they belong to, (B, E).
            video_ids: Which video each row has, integers of at least 0, (B,): rows of one number are one video. None:
                each row has its own. Give them in all updates or in none.
        """
        check_floating(texts=texts, videos=videos)
        check_shape("texts", texts, "B, E", (None, None))
        check_shape("videos", videos, "B, E", texts.shape)
        if video_ids is None:
            video_ids = torch.full((len(texts),), -1, device=texts.device)
        check_integer("video_ids", video_ids)
        check_shape("video_ids", video_ids, "B", (len(texts),))
        self.texts.append(F.normalize(texts.detach().float(), dim=1))
        self.videos.append(F.normalize(videos.detach().float(), dim=1))
        self.video_ids.append(video_ids.long())

    def compute(self) -> dict[str, Tensor]:
        """`r1`, `r5` and so on, `median_rank` and `mean_rank`."""
        texts, videos, ids = (dim_zero_cat(state) for state in (self.texts, self.videos, self.video_ids))
        if (ids < 0).all():
            ids = torch.arange(len(ids), device=ids.device)
        elif (ids < 0).any():
            raise ValueError("`video_ids` must be given in all updates or in none")
        _, of_text = torch.unique(ids, return_inverse=True)
        last = _last_row(of_text)
        videos = videos[last]
        query, columns, targets = (texts, videos, of_text) if self.direction == "t2v" else (videos, texts, last)
        ranks = [
            retrieval_ranks(rows @ columns.T, right, ties=self.ties)
            for rows, right in zip(torch.split(query, self.chunk), torch.split(targets, self.chunk), strict=True)
        ]
        return {name: value.float() for name, value in rank_statistics(torch.cat(ranks), self.ks).items()}


class TwoStageRecall(Metric):
    """`two_stage_retrieval_metrics` of scored pairs of texts and videos that arrive in any order, on any rank.

    Only pairs that the matching head has scored are needed: a pair that never arrives is no candidate. Several texts
    may belong to one video; then for video-to-text retrieval the one with the largest number counts.

    Args:
        candidates: Videos kept for each text, at least 1.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If `candidates` < 1 or shapes do not fit.

    Example:
        >>> import torch
        >>> metric = TwoStageRecall(candidates=1)
        >>> text, video = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
        >>> metric.update(text, video, torch.tensor([0.9, 0.2, 0.8, 0.7]), torch.tensor([0.5, 0.1, 0.1, 0.5]))
        >>> metric.compute()["t2v_r1"]
        tensor(100.)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    text_ids: list[Tensor]
    video_ids: list[Tensor]
    target_ids: list[Tensor]
    match_scores: list[Tensor]
    similarities: list[Tensor]

    def __init__(self, candidates: int = 50, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_range("candidates", candidates, 1, math.inf)
        self.candidates = candidates
        for name in ("text_ids", "video_ids", "target_ids", "match_scores", "similarities"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        text_ids: Tensor,
        video_ids: Tensor,
        match_scores: Tensor,
        similarities: Tensor,
        target_ids: Tensor | None = None,
    ) -> None:
        """Add scored pairs.

        Args:
            text_ids: Number of each pair's text, integers (P,).
            video_ids: Number of each pair's video, (P,).
            match_scores: Probabilities of the matching head, (P,).
            similarities: Of the first stage, (P,).
            target_ids: Number of the video that the pair's text belongs to, (P,). None: text i belongs to video i.
        """
        target_ids = text_ids if target_ids is None else target_ids
        check_shape("text_ids", text_ids, "P", (None,))
        for name, ids in (("text_ids", text_ids), ("video_ids", video_ids), ("target_ids", target_ids)):
            check_integer(name, ids)
            check_shape(name, ids, "P", text_ids.shape)
        check_floating(match_scores=match_scores, similarities=similarities)
        check_shape("match_scores", match_scores, "P", text_ids.shape)
        check_shape("similarities", similarities, "P", text_ids.shape)
        self.text_ids.append(text_ids.long())
        self.video_ids.append(video_ids.long())
        self.target_ids.append(target_ids.long())
        self.match_scores.append(match_scores.detach().float())
        self.similarities.append(similarities.detach().float())

    def compute(self) -> dict[str, Tensor]:
        """`t2v_r1`, `t2v_r5`, `t2v_r10`, `t2v_median_rank`, `t2v_mean_rank`, and the same for "v2t"."""
        text_ids, video_ids, target_ids = (
            dim_zero_cat(state) for state in (self.text_ids, self.video_ids, self.target_ids)
        )
        texts, row = torch.unique(text_ids, return_inverse=True)
        videos, both = torch.unique(torch.cat([video_ids, target_ids]), return_inverse=True)
        column, right = both.split(len(text_ids))
        place = row * len(videos) + column
        match, similarity = (
            torch.full((len(texts) * len(videos),), fill, device=row.device).index_put((place,), dim_zero_cat(state))
            for fill, state in ((0.0, self.match_scores), (-math.inf, self.similarities))
        )
        shape = (len(texts), len(videos))
        kept = keep_candidates(match.view(shape), similarity.view(shape), self.candidates)
        of_text = torch.zeros_like(texts).index_put((row,), right)
        wanted, compact = torch.unique(of_text, return_inverse=True)  # a video without a text has no rank
        ranks = {
            "t2v": retrieval_ranks(kept, of_text),
            "v2t": retrieval_ranks(kept.T[wanted], _last_row(compact)),
        }
        return {
            f"{direction}_{name}": value.float()
            for direction, values in ranks.items()
            for name, value in rank_statistics(values, (1, 5, 10)).items()
        }


class AnswerAccuracy(Metric):
    """Right answers in percent, of all questions and of those of each type.

    Args:
        answer_types: Names of the types; those of MSRVTT-QA and MSVD-QA as `VideoQADataModule` numbers them.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If a name is given twice or is "accuracy", or shapes do not fit.

    Example:
        >>> import torch
        >>> metric = AnswerAccuracy(("what", "who"))
        >>> metric.update(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, -1]), torch.tensor([0, 0]))
        >>> metric.compute()
        {'accuracy': tensor(50.), 'what': tensor(50.), 'who': tensor(nan)}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    right: Tensor
    asked: Tensor

    def __init__(self, answer_types: Sequence[str] = ("what", "who", "how", "where", "when"), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.answer_types = tuple(answer_types)
        if len({"accuracy", *self.answer_types}) != 1 + len(self.answer_types):
            raise ValueError(f"`answer_types` must be different names, none of them accuracy, got {self.answer_types}")
        for name in ("right", "asked"):
            self.add_state(name, torch.zeros(len(self.answer_types), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, answer_type: Tensor) -> None:
        """Add answers.

        Args:
            logits: Of the answers, (B, C).
            target: The right ones, integers (B,); -1 where it is none of those that can be given: never right.
            answer_type: A place in `answer_types` for each, (B,).
        """
        check_floating(logits=logits)
        check_shape("logits", logits, "B, C", (None, None))
        for name, numbers in (("target", target), ("answer_type", answer_type)):
            check_integer(name, numbers)
            check_shape(name, numbers, "B", (len(logits),))
        kind = answer_type.long()
        self.right = self.right.index_add(0, kind, (logits.argmax(1) == target).long())
        self.asked = self.asked.index_add(0, kind, torch.ones_like(kind))

    def compute(self) -> dict[str, Tensor]:
        """`accuracy`, and one value by the name of each type; NaN where nothing was asked."""
        right, asked = (torch.cat([state.sum(0, keepdim=True), state]) for state in (self.right, self.asked))
        return dict(zip(("accuracy", *self.answer_types), 100 * right / asked, strict=True))


def _last_row(groups: Tensor) -> Tensor:
    """The last row of each group, for groups 0, 1, and so on."""
    rows = torch.arange(len(groups), device=groups.device)
    size = int(groups.max()) + 1 if len(groups) else 0
    return rows.new_zeros(size).scatter_reduce(0, groups, rows, "amax")

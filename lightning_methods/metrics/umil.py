"""How weakly supervised video anomaly detection is judged: frame-level figures from scores of snippets.

The protocol is that of the code of Lv et al., CVPR 2023, arXiv 2303.12369, which published numbers on UCF-Crime and TAD
use; average precision and the false-alarm rate are common on this task but not part of it. Nothing is kept but the
scores: a set as long as UCF-Crime's test videos, 1.1 million frames, is computed from about 9,600 pieces.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.data import dim_zero_cat

from lightning_methods.functional import (
    VideoRecord,
    frame_level_pieces,
    piecewise_auroc,
    piecewise_average_precision,
)
from lightning_methods.functional._index import check_integer
from lightning_methods.functional._logits import check_choice

#: A `VideoRecord`, or its fields in order or by name, as a YAML file has them.
RecordLike: TypeAlias = VideoRecord | Sequence[Any] | Mapping[str, Any]
Subset: TypeAlias = Literal["all", "abnormal"]
AlarmSubset: TypeAlias = Literal["all", "normal", "abnormal"]


class _Counts(NamedTuple):
    """Score of each piece, (M,), and its numbers of positive and negative frames."""

    values: Tensor
    positives: Tensor
    negatives: Tensor


class _FrameLevelMetric(Metric):
    """Gathers scores of snippets; subclasses compute from `_counts`."""

    is_differentiable = False
    full_state_update = False
    video_index: list[Tensor]
    snippet_index: list[Tensor]
    scores: list[Tensor]

    def __init__(
        self,
        records: Sequence[RecordLike],
        subset: AlarmSubset,
        smooth_segments: int | None,
        legacy_start_zero: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if smooth_segments is not None and smooth_segments < 1:
            raise ValueError(f"`smooth_segments` must be at least 1 or None, got {smooth_segments}")
        self.records = [_record(number, record) for number, record in enumerate(records)]
        if not self.records:
            raise ValueError("`records` must hold at least one video")
        self.subset = subset
        self.smooth_segments = smooth_segments
        self.legacy_start_zero = legacy_start_zero
        for name in ("video_index", "snippet_index", "scores"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, video_index: Tensor, snippet_index: Tensor, scores: Tensor) -> None:
        """Take the scores of a batch of snippets.

        Args:
            video_index: Place of each snippet's video in `records`, integers of any shape.
            snippet_index: Number of the snippet in its video, same shape. Only the order counts; of several scores for
                one snippet one is taken.
            scores: How abnormal, floating, same shape.
        """
        for name, index in (("video_index", video_index), ("snippet_index", snippet_index)):
            check_integer(name, index)
            if index.shape != scores.shape:
                expected, found = tuple(scores.shape), tuple(index.shape)
                raise ValueError(f"`{name}` must have the shape of `scores`, {expected}, got {found}")
        if not scores.is_floating_point():
            raise ValueError(f"`scores` must be floating, got {scores.dtype}")
        self.video_index.append(video_index.flatten().long())
        self.snippet_index.append(snippet_index.flatten().long())
        self.scores.append(scores.detach().flatten().to(torch.promote_types(scores.dtype, torch.float32)))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Before states are gathered: a rank that saw no batch joins in with nothing, of the right dtype."""
        if not self._is_synced and not self.scores:
            nothing = torch.zeros(0, dtype=torch.long, device=self.device)
            self.video_index, self.snippet_index, self.scores = [nothing], [nothing], [nothing.float()]
        super().sync(*args, **kwargs)

    def _counts(self) -> _Counts:
        # On the CPU: these are a few thousand numbers, and some devices have no float64.
        video, snippet, scores = (
            dim_zero_cat(state).cpu() if len(state) else torch.zeros(0, dtype=dtype)
            for state, dtype in (
                (self.video_index, torch.long),
                (self.snippet_index, torch.long),
                (self.scores, torch.float32),
            )
        )
        if len(video) and not 0 <= int(video.min()) <= int(video.max()) < len(self.records):
            found = f"values from {int(video.min())} to {int(video.max())}"
            raise ValueError(f"`video_index` must be in [0, {len(self.records)}), one for each record, got {found}")
        spans = [_anomalies(record, self.legacy_start_zero) for record in self.records]
        wanted = torch.tensor([self.subset == "all" or bool(s) == (self.subset == "abnormal") for s in spans])
        scored = torch.zeros_like(wanted).index_fill(0, video, True)
        self._warn_of_missing(wanted & ~scored)
        chosen = wanted & scored
        if not chosen.all():
            kept = chosen[video]
            number = chosen.cumsum(0) - 1  # of a chosen video among the chosen
            video, snippet, scores = number[video[kept]], snippet[kept], scores[kept]
        frames = torch.tensor([record.num_frames for record in self.records])[chosen]
        pieces = frame_level_pieces(video, snippet, scores, frames, smooth_segments=self.smooth_segments)
        offsets = (frames.cumsum(0) - frames).tolist()
        of_chosen = [span for span, taken in zip(spans, chosen.tolist(), strict=True) if taken]
        intervals = [(a + start, a + end) for a, span in zip(offsets, of_chosen, strict=True) for start, end in span]
        positives = _overlaps(pieces.lengths, intervals)
        return _Counts(pieces.values, positives, pieces.lengths - positives)

    def _warn_of_missing(self, missing: Tensor) -> None:
        count = int(missing.sum())
        if count:
            first = self.records[int(missing.int().argmax())].name
            rank_zero_warn(
                f"{type(self).__name__}: {count} of {len(self.records)} videos have no scores and are left out; "
                f"first: {first}"
            )

    def _warn_of_absent(self, what: str) -> Tensor:
        rank_zero_warn(f"{type(self).__name__} is nan: no frame of the scored videos is {what}")
        return torch.tensor(torch.nan, dtype=torch.float64)

    def _with_both_classes(self, counts: _Counts) -> Tensor | None:
        """NaN, with a warning, where a figure that tells two classes apart has one only."""
        for what, number in (("abnormal", counts.positives), ("normal", counts.negatives)):
            if not number.any():
                return self._warn_of_absent(what)
        return None


class FrameLevelAUROC(_FrameLevelMetric):
    r"""Area under the ROC curve over the frames of all videos together, as published for UCF-Crime and TAD.

    Snippet scores become frame scores as in `frame_level_pieces`: stretched over the video, then averaged over 32
    windows. AUC_O of the papers is `subset="all"`, AUC_A is `subset="abnormal"`: videos with at least one abnormal
    frame.

    **Anomalies that start at frame 0.** The authors' code takes them for normal frames. UCF-Crime has none; on TAD 13
    of 60 abnormal test videos lose their labels, which leaves 5,832 of 10,609 abnormal frames and takes these videos
    out of AUC_A. `legacy_start_zero=True` compares with published numbers; False is right.

    Args:
        records: The videos, as `VideoRecord` or its fields in a sequence or mapping; `video_index` of `update` counts
            them from 0. Ends of anomalies beyond the video are cut.
        subset: "all" or "abnormal" videos.
        smooth_segments: Windows a video; None takes the scores as they are.
        legacy_start_zero: Whether an anomaly that starts at frame 0 counts as normal.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If there are no records or one is malformed; if an argument, or in `compute` a video's index, does
            not fit.

    Warns:
        UserWarning: In `compute`, about videos without scores, which are left out, and frames of one class only, of
            which the result is NaN.

    Example:
        >>> import torch
        >>> videos = [VideoRecord("a.mp4", 64, 1, ((32, 64),)), VideoRecord("b.mp4", 32, 0)]
        >>> metric = FrameLevelAUROC(videos)
        >>> metric.update(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), torch.tensor([0.2, 0.9, 0.4]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(
        self,
        records: Sequence[RecordLike],
        subset: Subset = "all",
        smooth_segments: int | None = 32,
        legacy_start_zero: bool = True,
        **kwargs: Any,
    ) -> None:
        check_choice("subset", subset, Subset)
        super().__init__(records, subset, smooth_segments, legacy_start_zero, **kwargs)

    def compute(self) -> Tensor:
        """The area, a scalar in [0, 1], float64 on the CPU."""
        counts = self._counts()
        absent = self._with_both_classes(counts)
        return piecewise_auroc(*counts) if absent is None else absent


class FrameLevelAveragePrecision(_FrameLevelMetric):
    """Average precision over the frames of all videos together, with abnormal as the positive class.

    The frames, their labels and the arguments are those of `FrameLevelAUROC`; its warnings and errors too.

    Args:
        records: The videos.
        subset: "all" or "abnormal" videos.
        smooth_segments: Windows a video; None takes the scores as they are.
        legacy_start_zero: Whether an anomaly that starts at frame 0 counts as normal.
        kwargs: Of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = FrameLevelAveragePrecision([VideoRecord("a.mp4", 64, 1, ((32, 64),))])
        >>> metric.update(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0.9, 0.2]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(
        self,
        records: Sequence[RecordLike],
        subset: Subset = "all",
        smooth_segments: int | None = 32,
        legacy_start_zero: bool = True,
        **kwargs: Any,
    ) -> None:
        check_choice("subset", subset, Subset)
        super().__init__(records, subset, smooth_segments, legacy_start_zero, **kwargs)

    def compute(self) -> Tensor:
        """The average precision, a scalar in [0, 1], float64 on the CPU."""
        counts = self._counts()
        absent = self._with_both_classes(counts)
        return piecewise_average_precision(*counts) if absent is None else absent


class FrameLevelFalseAlarmRate(_FrameLevelMetric):
    """Share of normal frames whose score lies above a threshold.

    Frames and labels are those of `FrameLevelAUROC`, with its warnings and errors. Papers report the rate over normal
    videos at threshold 0.5 (Sultani et al., CVPR 2018).

    Args:
        records: The videos.
        threshold: A higher score is an alarm.
        subset: "normal" videos, those without an abnormal frame; the normal frames of "abnormal" ones; or of "all".
        smooth_segments: Windows a video; None takes the scores as they are.
        legacy_start_zero: Whether an anomaly that starts at frame 0 counts as normal. True would count alarms on such
            anomalies as false, hence False here.
        kwargs: Of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = FrameLevelFalseAlarmRate([VideoRecord("b.mp4", 64, 0)], threshold=0.5)
        >>> metric.update(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0.2, 0.9]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(
        self,
        records: Sequence[RecordLike],
        threshold: float = 0.5,
        subset: AlarmSubset = "normal",
        smooth_segments: int | None = 32,
        legacy_start_zero: bool = False,
        **kwargs: Any,
    ) -> None:
        check_choice("subset", subset, AlarmSubset)
        super().__init__(records, subset, smooth_segments, legacy_start_zero, **kwargs)
        self.threshold = threshold

    def compute(self) -> Tensor:
        """The rate, a scalar in [0, 1], float64 on the CPU; NaN without a normal frame."""
        values, _, negatives = self._counts()
        if not negatives.any():
            return self._warn_of_absent("normal")
        return negatives[values > self.threshold].sum() / negatives.sum().double()


def _record(number: int, fields: RecordLike) -> VideoRecord:
    try:
        record = VideoRecord(**fields) if isinstance(fields, Mapping) else VideoRecord(*fields)
        intervals = tuple((int(start), int(end)) for start, end in record.intervals)
        record = VideoRecord(str(record.path), int(record.num_frames), int(record.label), intervals)
    except (TypeError, ValueError) as error:
        expected = "(path, num_frames, label, intervals)"
        raise ValueError(f"`records[{number}]` must be a VideoRecord, {expected}, got {fields!r}") from error
    if record.num_frames < 1:
        raise ValueError(f"`records[{number}]` ({record.name}) must have at least 1 frame, got {record.num_frames}")
    return record


def _anomalies(record: VideoRecord, legacy_start_zero: bool) -> list[tuple[int, int]]:
    """The frames that count as abnormal, as disjoint intervals in order."""
    first = 1 if legacy_start_zero or record.label == 0 else 0
    found: list[tuple[int, int]] = []
    for start, end in sorted(record.intervals):
        if start < first:
            continue
        start, end = max(start, found[-1][1] if found else 0), min(end, record.num_frames)
        if start < end:
            found.append((start, end))
    return found


def _overlaps(lengths: Tensor, intervals: Sequence[tuple[int, int]]) -> Tensor:
    """How many frames of each piece lie in the intervals, which are disjoint and in order."""
    ends = lengths.cumsum(0)
    if not intervals:
        return torch.zeros_like(ends)
    start, end = torch.tensor(intervals).T.contiguous()
    covered = (end - start).cumsum(0)

    def before(frame: Tensor) -> Tensor:
        current = torch.searchsorted(start, frame, right=True) - 1
        inside = covered[current] - (end[current] - frame).clamp_min(0)
        return torch.where(current < 0, 0, inside)

    return before(ends) - before(ends - lengths)

r"""From scores of snippets to scores of frames, and how weakly supervised anomaly detection is judged on them.

A video of n frames with m snippet scores is constant on runs of n/m frames; the authors' evaluation then averages over
windows, after which a video has at most 33 different values. So a frame is never looked at: a *piece* is a run of
frames with one value, and the area under the ROC curve follows from how many positive and negative frames each piece
has.

Sources: expansion, windows and cells are those of the evaluation in the code of Lv et al., "Unbiased Multiple Instance
Learning for Weakly Supervised Video Anomaly Detection", CVPR 2023, arXiv 2303.12369. Counting pieces instead of frames
is our own; the results are the same. Average precision is not part of that evaluation.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_methods.functional._index import check_integer


class VideoRecord(NamedTuple):
    """A video and its annotation.

    Attributes:
        path: Where its frames are, relative to the data set's folder. The last component names the video.
        num_frames: At least 1.
        label: 0 for a normal video, else the number of its kind of anomaly.
        intervals: Its anomalies, as (start, end) with frames counted from 0 and the end not included. Empty for
            normal videos and where only the video's label is known.
    """

    path: str
    num_frames: int
    label: int
    intervals: tuple[tuple[int, int], ...] = ()

    @property
    def name(self) -> str:
        """Last component of the path, by which features and annotations refer to the video."""
        return self.path.rstrip("/").rpartition("/")[2]


class FramePieces(NamedTuple):
    """Runs of frames with one score, in the order of the frames, videos one after the other.

    Attributes:
        values: Score of each piece, (M,), float64.
        lengths: Number of its frames, (M,), int64, at least 1.
    """

    values: Tensor
    lengths: Tensor


@torch.no_grad()
def frame_level_pieces(
    video_index: Tensor,
    snippet_index: Tensor,
    scores: Tensor,
    num_frames: Tensor,
    *,
    smooth_segments: int | None = 32,
) -> FramePieces:
    r"""Scores of all frames as runs of equal value, without writing a frame down.

    A video with n frames and m scores, in the order of their snippets: score i holds for the frames from
    ⌊i·n/m + ½⌋ up to ⌊(i + 1)·n/m + ½⌋. Then each of `smooth_segments` windows of ⌊n / `smooth_segments`⌋ frames, and
    the frames that are left over, take their mean; a video shorter than `smooth_segments` frames takes one value.
    Windows over which the score is constant keep it to the last bit, so ties stay ties.

    Args:
        video_index: Which video a score belongs to, integers (S,) in [0, V).
        snippet_index: Where in its video, integers (S,), at least 0. Only the order counts. Of several scores for one
            snippet, which the padding of a distributed sampler makes, the first is taken.
        scores: Floating, finite, (S,).
        num_frames: Frames of each video, integers (V,), at least 1.
        smooth_segments: Number of windows; None leaves the scores as they are.

    Returns:
        At most 33 pieces a video, or one a snippet without windows. Their lengths sum to that of `num_frames`.

    Raises:
        ValueError: If shapes, dtypes or values do not fit, or a video has no score.

    Example:
        >>> import torch
        >>> index = torch.tensor([0, 1])
        >>> video, scores = torch.zeros_like(index), torch.tensor([0.0, 1.0])
        >>> frame_level_pieces(video, index, scores, torch.tensor([90]), smooth_segments=3)
        FramePieces(values=tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64), lengths=tensor([30, 30, 30]))
    """
    _check_scores(video_index, snippet_index, scores, num_frames)
    if smooth_segments is not None and smooth_segments < 1:
        raise ValueError(f"`smooth_segments` must be at least 1 or None, got {smooth_segments}")
    frames = num_frames.long()
    offsets = frames.cumsum(0) - frames
    video, scores = _ordered(video_index.long(), snippet_index.long(), scores)
    starts = _starts(video, frames, offsets)
    del video  # of a long set a good part of the memory
    if smooth_segments is not None:
        # Windows 0, w, 2w, …, the last of them up to the end of the video.
        steps = torch.arange(smooth_segments + 1, device=frames.device)
        windows = (offsets[:, None] + steps * (frames // smooth_segments)[:, None]).flatten()
        scores, starts = _means(starts, scores, windows, frames.sum()), windows
    lengths = _lengths(starts, frames.sum())
    kept = lengths > 0
    return FramePieces(scores[kept].double(), lengths[kept])


def frame_level_scores(
    video_index: Tensor,
    snippet_index: Tensor,
    scores: Tensor,
    num_frames: Tensor,
    *,
    smooth_segments: int | None = 32,
) -> Tensor:
    """The score of every frame; `frame_level_pieces` written out, with its arguments and errors.

    Returns:
        float64, of length `num_frames.sum()`, in the order of the videos.

    Example:
        >>> import torch
        >>> index = torch.tensor([0, 1])
        >>> frame_level_scores(index, torch.zeros_like(index), torch.tensor([0.5, 0.25]), torch.tensor([2, 3]))
        tensor([0.5000, 0.5000, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """
    pieces = frame_level_pieces(video_index, snippet_index, scores, num_frames, smooth_segments=smooth_segments)
    return pieces.values.repeat_interleave(pieces.lengths)


def piecewise_auroc(values: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    r"""Area under the ROC curve of samples that come in groups with one score each.

    With P_v positives and N_v negatives at score v: $\sum_v P_v (N_{<v} + N_v / 2) / (P N)$, exactly the area over the
    samples written out.

    Args:
        values: Score of each group, (M,), in any order; equal ones count as one group.
        positives: Number of positive samples in each, or their total weight, (M,), not negative.
        negatives: The same of negative samples.

    Returns:
        Scalar, float64; NaN without a positive or without a negative.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> piecewise_auroc(torch.tensor([0.1, 0.9]), torch.tensor([1, 3]), torch.tensor([4, 0]))
        tensor(0.8750, dtype=torch.float64)
    """
    positive, negative = _by_value(values, positives, negatives)
    below = negative.cumsum(0) - negative
    return (positive * (below + negative / 2)).sum() / (positive.sum() * negative.sum())


def piecewise_average_precision(values: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    r"""Average precision of samples that come in groups with one score each.

    Over the distinct scores v, $\sum_v (P_v / P) \, P_{\ge v} / (P_{\ge v} + N_{\ge v})$: a step function, not the
    trapezoids under the precision-recall curve, which some papers on this task call AP.

    Args:
        values: Score of each group, (M,), in any order; equal ones count as one group.
        positives: Number of positive samples in each, or their total weight, (M,), not negative.
        negatives: The same of negative samples.

    Returns:
        Scalar, float64; NaN without a positive.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> piecewise_average_precision(torch.tensor([0.1, 0.9]), torch.tensor([1, 3]), torch.tensor([4, 0]))
        tensor(0.8750, dtype=torch.float64)
    """
    positive, negative = (counts.flip(0) for counts in _by_value(values, positives, negatives))
    hits, seen = positive.cumsum(0), (positive + negative).cumsum(0)
    precision = torch.where(seen > 0, hits / seen, 0.0)  # a group without samples may come first
    return (positive * precision).sum() / positive.sum()


def snippet_cell_index(frame_index: Tensor, total_frames: Tensor, num_cells: Tensor) -> Tensor:
    """Which cell of a video's grid a snippet falls into: ⌊frame · cells / frames⌋.

    Args:
        frame_index: Middle frame of each snippet (of a clip of T frames the one at T // 2), integers (B, K).
        total_frames: Frames of the video, integers (B,).
        num_cells: Cells of the video, integers (B,). A last cell that is too short to be kept is not among them: the
            others share its frames.

    Returns:
        (B, K), int64, in [0, num_cells) for frames in [0, total_frames). The values are not checked.

    Raises:
        ValueError: If shapes or dtypes do not fit.

    Example:
        >>> import torch
        >>> snippet_cell_index(torch.tensor([[413, 899]]), torch.tensor([900]), torch.tensor([30]))
        tensor([[13, 29]])
    """
    if frame_index.ndim != 2:
        raise ValueError(f"`frame_index` must have shape (B, K), got {tuple(frame_index.shape)}")
    check_integer("frame_index", frame_index)
    for name, counts in (("total_frames", total_frames), ("num_cells", num_cells)):
        check_integer(name, counts)
        if counts.shape != frame_index.shape[:1]:
            raise ValueError(f"`{name}` must have shape ({len(frame_index)},), got {tuple(counts.shape)}")
    return frame_index.long() * num_cells.long()[:, None] // total_frames.long()[:, None]


def _check_scores(video_index: Tensor, snippet_index: Tensor, scores: Tensor, num_frames: Tensor) -> None:
    if not scores.is_floating_point() or scores.ndim != 1:
        raise ValueError(f"`scores` must be floating, (S,), got {tuple(scores.shape)} of {scores.dtype}")
    for name, index in (("video_index", video_index), ("snippet_index", snippet_index), ("num_frames", num_frames)):
        check_integer(name, index)
        if index.ndim != 1 or (name != "num_frames" and index.shape != scores.shape):
            expected = "(V,)" if name == "num_frames" else f"that of `scores`, {tuple(scores.shape)}"
            raise ValueError(f"`{name}` must have shape {expected}, got {tuple(index.shape)}")
    _check_range("video_index", video_index, 0, len(num_frames) - 1)
    _check_range("snippet_index", snippet_index, 0)
    _check_range("num_frames", num_frames, 1)
    if not scores.isfinite().all():
        first = int(scores.isfinite().logical_not().nonzero()[0])
        raise ValueError(f"`scores` must be finite, got {float(scores[first])} for video {int(video_index[first])}")


def _check_range(name: str, index: Tensor, low: int, high: float = float("inf")) -> None:
    outside = index[(index < low) | (index > high)]
    if len(outside):
        expected = f"in [{low}, {high}]" if high < float("inf") else f"at least {low}"
        raise ValueError(f"`{name}` must be {expected}, got {int(outside[0])}")


def _ordered(video: Tensor, snippet: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Video and score of each snippet, by video and snippet, repeated ones left out."""
    # Two stable sorts: the earliest of several scores for a snippet stays in front.
    order = snippet.argsort(stable=True)
    order = order[video[order].argsort(stable=True)]
    video, snippet, scores = video[order], snippet[order], scores[order]
    first = torch.ones_like(video, dtype=torch.bool)
    first[1:] = (video[1:] != video[:-1]) | (snippet[1:] != snippet[:-1])
    return video[first], scores[first]


def _starts(video: Tensor, frames: Tensor, offsets: Tensor) -> Tensor:
    """First frame of each snippet in the row of all videos."""
    counts = video.bincount(minlength=len(frames))
    if not counts.all():
        first = int(counts.argmin())
        raise ValueError(f"`scores` must cover every video, {int((counts == 0).sum())} have none; first: video {first}")
    rank = torch.arange(len(video), device=video.device) - (counts.cumsum(0) - counts)[video]
    return offsets[video] + (rank * (frames / counts.double())[video] + 0.5).long()


def _means(starts: Tensor, values: Tensor, windows: Tensor, end: Tensor) -> Tensor:
    """Mean over each window of the function that is `values[i]` from `starts[i]` on; both ascend from 0 to `end`."""
    cuts = torch.cat([starts, windows]).sort().values
    # Of starts that are equal the last one counts: the runs before it are empty.
    run = torch.searchsorted(starts, cuts, right=True, out_int32=True).sub_(1)
    window = torch.searchsorted(windows, cuts, right=True, out_int32=True).sub_(1)
    # Means of the difference to the window's first value, so that constant windows are exact.
    first = values[torch.searchsorted(starts, windows, right=True) - 1].double()
    areas = values[run].double().sub_(first[window]).mul_(_lengths(cuts, end))
    return first + torch.zeros_like(first).index_add_(0, window, areas) / _lengths(windows, end).clamp_min(1)


def _lengths(starts: Tensor, end: Tensor) -> Tensor:
    ends = starts.roll(-1)
    ends[-1:] = end
    return ends.sub_(starts)


def _by_value(values: Tensor, positives: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    """Positives and negatives of each distinct value, in ascending order, float64: exact for counts up to 2⁵³."""
    for name, counts in (("positives", positives), ("negatives", negatives)):
        if values.ndim != 1 or counts.shape != values.shape:
            found = f"`values` {tuple(values.shape)} and `{name}` {tuple(counts.shape)}"
            raise ValueError(f"`values`, `positives` and `negatives` must have one shape (M,), got {found}")
    distinct, group = torch.unique(values, return_inverse=True)
    zeros = torch.zeros(len(distinct), dtype=torch.float64, device=values.device)
    return zeros.index_add(0, group, positives.double()), zeros.index_add(0, group, negatives.double())

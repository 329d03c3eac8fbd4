"""Pieces against every frame written out, and sklearn's figures of merit on those frames."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from lightning_methods.functional import (
    VideoRecord,
    frame_level_pieces,
    frame_level_scores,
    piecewise_auroc,
    piecewise_average_precision,
    snippet_cell_index,
)


def plain_frames(scores, frames, segments):
    """One video: expansion, then windows, frame by frame."""
    ratio = frames / len(scores)
    expanded = np.empty(frames)
    for i, score in enumerate(scores):
        expanded[int(i * ratio + 0.5) : int((i + 1) * ratio + 0.5)] = score
    if segments is None:
        return expanded
    width = frames // segments
    smooth = expanded.copy()
    for k in range(segments if width else 0):
        smooth[k * width : (k + 1) * width] = expanded[k * width : (k + 1) * width].mean()
    if frames > segments * width:
        smooth[segments * width :] = expanded[segments * width :].mean()
    return smooth


@st.composite
def sets_of_videos(draw):
    """Scores of each video, its frames, and everything flat in an order of its own with some scores repeated."""
    videos = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 400)), min_size=1, max_size=5))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    coarse = draw(st.booleans())
    scores = [generator.random(count).round(1) if coarse else generator.random(count) for count, _ in videos]
    flat = [(v, 3 * i, score) for v, video in enumerate(scores) for i, score in enumerate(video)]
    order = generator.permutation(len(flat))
    flat = [flat[i] for i in order]
    again = [(v, i, 100.0) for v, i, _ in flat[: draw(st.integers(0, 3))]]  # later scores of a snippet do not count
    index = [torch.tensor([entry[k] for entry in flat + again]) for k in range(2)]
    frames = torch.tensor([count for _, count in videos])
    return scores, frames, (*index, torch.tensor([entry[2] for entry in flat + again], dtype=torch.float64), frames)


@settings(max_examples=80, deadline=None)
@given(sets_of_videos(), st.sampled_from([32, 7, 1, None]))
def test_scores_are_those_of_each_frame(problem, segments):
    scores, frames, arguments = problem
    expected = np.concatenate([plain_frames(s, int(n), segments) for s, n in zip(scores, frames, strict=True)])
    found = frame_level_scores(*arguments, smooth_segments=segments)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)
    pieces = frame_level_pieces(*arguments, smooth_segments=segments)
    most = frames.clamp_max(33).sum() if segments == 32 else len(arguments[2])
    assert segments not in (32, None) or len(pieces.values) <= most
    assert pieces.lengths.min() >= 1


@settings(max_examples=60, deadline=None)
@given(sets_of_videos(), st.integers(0, 2**32))
def test_figures_are_those_of_sklearn_on_all_frames(problem, seed):
    _, frames, arguments = problem
    pieces = frame_level_pieces(*arguments)
    labels = np.random.default_rng(seed).integers(0, 2, int(frames.sum()))
    bounds = [0, *pieces.lengths.cumsum(0).tolist()]
    positives = torch.tensor([labels[a:b].sum() for a, b in pairwise(bounds)])
    counts = positives, pieces.lengths - positives
    if 0 < labels.sum() < len(labels):
        expanded = frame_level_scores(*arguments).numpy()
        assert abs(piecewise_auroc(pieces.values, *counts) - roc_auc_score(labels, expanded)) < 1e-12
        expected = average_precision_score(labels, expanded)
        assert abs(piecewise_average_precision(pieces.values, *counts) - expected) < 1e-12
        swapped = piecewise_auroc(-pieces.values, *counts)
        assert abs(swapped + piecewise_auroc(pieces.values, *counts) - 1) < 1e-12


def test_a_constant_window_keeps_its_score_to_the_last_bit():
    """0.1 · 7 / 7 is not 0.1 in every way of summing, and a tie that breaks moves the area."""
    score = torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    index = torch.arange(1000)
    scores = frame_level_scores(index // 10, index % 10, score.expand(1000), 37 + torch.arange(100))
    assert (scores == score).all()


def test_published_cases_of_expansion():
    def frames(scores, n, **kwargs):
        index = torch.arange(len(scores))
        return frame_level_scores(
            torch.zeros_like(index), index, torch.tensor(scores), torch.tensor([n]), **kwargs
        ).tolist()

    # ½ rounds up: the first score takes 3 of 5 frames
    assert frames([0.0, 1.0], 5, smooth_segments=None) == [0, 0, 0, 1, 1]
    # 5 frames at the end without a cell of their own: the two cells stretch over 65 frames
    assert frames([0.0, 1.0], 65, smooth_segments=None).count(0) == 33
    # fewer frames than windows: one mean
    assert frames([0.0, 1.0], 31) == pytest.approx([15 / 31] * 31)
    # 32 windows of 2 frames, and the mean of the 3 left over
    scores = frames([float(i) for i in range(67)], 67)
    assert scores[:4] == [0.5, 0.5, 2.5, 2.5]
    assert scores[64:] == [65.0] * 3
    # more scores than frames: starts 0, 1, 1 and 2
    assert frames([0.0, 1.0, 2.0, 3.0], 2, smooth_segments=None) == [0, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_scores(dtype):
    index = torch.arange(3)
    scores = torch.tensor([0.25, 0.5, 0.75], dtype=dtype)
    found = frame_level_scores(torch.zeros_like(index), index, scores, torch.tensor([96]))
    assert (found[:30] == 0.25).all()
    assert found.mean() == 0.5


def test_scores_need_no_order_and_index_types_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    video = torch.tensor([0] * 5 + [1] * 7)
    snippet = torch.cat([torch.arange(5), torch.arange(7)])
    scores, frames = torch.rand(12, generator=generator), torch.tensor([100, 333])
    order = torch.randperm(12, generator=generator)
    expected = frame_level_scores(video, snippet, scores, frames)
    found = frame_level_scores(video[order].int(), snippet[order].short(), scores[order], frames.int())
    assert torch.equal(found, expected)


def test_ties_within_and_between_groups():
    values = torch.tensor([0.5, 0.5, 0.2, 0.9])
    positives, negatives = torch.tensor([1, 2, 0, 0]), torch.tensor([2, 0, 3, 0])
    y, s = [1, 0, 0, 1, 1, 0, 0, 0], [0.5] * 5 + [0.2] * 3
    assert piecewise_auroc(values, positives, negatives) == roc_auc_score(y, s)
    assert piecewise_average_precision(values, positives, negatives) == average_precision_score(y, s)


def test_one_class_only():
    values, some, none = torch.tensor([0.1, 0.2]), torch.tensor([1, 2]), torch.tensor([0, 0])
    assert piecewise_auroc(values, some, none).isnan()
    assert piecewise_auroc(values, none, some).isnan()
    assert piecewise_average_precision(values, none, some).isnan()
    assert piecewise_average_precision(values, some, none) == 1


def test_counts_of_a_long_set_stay_exact():
    """A million frames a group: products of counts leave the range of float32 and of int32."""
    values = torch.arange(3.0)
    positives, negatives = torch.tensor([0, 1_000_001, 0]), torch.tensor([1_000_003, 0, 1])
    assert piecewise_auroc(values, positives, negatives) == 1_000_003 / 1_000_004


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 100_000), st.integers(1, 500), st.data())
def test_cells(total, cells, data):
    frame = data.draw(st.integers(0, total - 1))
    (found,) = snippet_cell_index(torch.tensor([[frame]]), torch.tensor([total]), torch.tensor([cells])).flatten()
    assert found == math.floor(frame * cells / total)
    assert 0 <= found < cells


def test_cells_of_several_videos():
    frames = torch.tensor([[0, 413, 899], [0, 29, 58]], dtype=torch.int32)
    found = snippet_cell_index(frames, torch.tensor([900, 59]), torch.tensor([30, 2]))
    assert found.dtype == torch.int64
    assert found.tolist() == [[0, 13, 29], [0, 0, 1]]


def test_cells_of_long_videos_do_not_overflow():
    frame = torch.tensor([[2**30]], dtype=torch.int32)
    found = snippet_cell_index(frame, torch.tensor([2**31 - 1]).int(), torch.tensor([2**26]).int())
    assert found.item() == 2**30 * 2**26 // (2**31 - 1)


def test_name_of_a_video():
    assert VideoRecord("frames/Abuse/Abuse001_x264.mp4/", 10, 1).name == "Abuse001_x264.mp4"
    assert VideoRecord("a.mp4", 10, 1).name == "a.mp4"


INDEX, S, N = torch.tensor([0, 1]), torch.tensor([0.5, 0.5]), torch.tensor([9, 9])
BAD_CALLS = {
    "scores of integers": (
        lambda: frame_level_scores(INDEX, INDEX, INDEX, N),
        r"`scores` must be floating, \(S,\), got \(2,\)",
    ),
    "scores of two dimensions": (lambda: frame_level_scores(INDEX, INDEX, S[None], N), r"`scores`.*\(1, 2\)"),
    "nan": (
        lambda: frame_level_scores(INDEX, INDEX, S / torch.tensor([1, 0]), N),
        "`scores` must be finite, got inf.*video 1",
    ),
    "floating index": (lambda: frame_level_scores(S, INDEX, S, N), "`video_index` must hold integers"),
    "fewer snippets": (
        lambda: frame_level_scores(INDEX, INDEX[:1], S, N),
        r"`snippet_index`.*that of `scores`, \(2,\)",
    ),
    "negative snippet": (
        lambda: frame_level_scores(INDEX, INDEX - 1, S, N),
        "`snippet_index` must be at least 0, got -1",
    ),
    "video too high": (lambda: frame_level_scores(INDEX + 1, INDEX, S, N), r"`video_index` must be in \[0, 1\], got 2"),
    "no frames": (lambda: frame_level_scores(INDEX, INDEX, S, N * 0), "`num_frames` must be at least 1, got 0"),
    "frames of two dimensions": (
        lambda: frame_level_scores(INDEX, INDEX, S, N[None]),
        r"`num_frames`.*\(V,\), got \(1, 2\)",
    ),
    "video without scores": (
        lambda: frame_level_scores(INDEX * 0, INDEX, S, N),
        "`scores`.*1 have none; first: video 1",
    ),
    "windows": (lambda: frame_level_scores(INDEX, INDEX, S, N, smooth_segments=0), "`smooth_segments`.*got 0"),
    "auroc": (lambda: piecewise_auroc(S, INDEX, INDEX[:1]), r"`values` \(2,\) and `negatives` \(1,\)"),
    "average precision": (lambda: piecewise_average_precision(S[None], INDEX, INDEX), r"`values` \(1, 2\)"),
    "cells, floating": (lambda: snippet_cell_index(S[None], INDEX[:1], INDEX[:1]), "`frame_index` must hold integers"),
    "cells, shape": (lambda: snippet_cell_index(INDEX, INDEX, INDEX), r"`frame_index`.*\(B, K\), got \(2,\)"),
    "cells, totals": (
        lambda: snippet_cell_index(INDEX[None], INDEX, INDEX[:1]),
        r"`total_frames` must have shape \(1,\)",
    ),
    "cells, counts": (lambda: snippet_cell_index(INDEX[None], INDEX[:1], INDEX), r"`num_cells` must have shape \(1,\)"),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()

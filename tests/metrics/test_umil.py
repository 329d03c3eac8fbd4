"""Frame-level metrics against sklearn on frames and labels that are written out one by one."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from ranks import on_ranks
from sklearn.metrics import average_precision_score, roc_auc_score

from lightning_methods.functional import VideoRecord
from lightning_methods.metrics import FrameLevelAUROC, FrameLevelAveragePrecision, FrameLevelFalseAlarmRate

RECORDS = [
    VideoRecord("Abuse/A1.mp4", 1000, 1, ((165, 240),)),
    VideoRecord("Normal/N1.mp4", 423, 0),
    VideoRecord("Arson/A2.mp4", 333, 3, ((10, 60), (250, 999))),  # beyond the end
    VideoRecord("abnormal/A3.mp4", 200, 2, ((0, 77),)),  # from the first frame on
    VideoRecord("normal/N2.mp4", 31, 0, ((0, 31),)),  # as TAD's list has normal videos
    VideoRecord("Arson/A4.mp4", 640, 3, ((100, 300), (200, 350), (0, 20))),  # overlap, and both kinds of start
    VideoRecord("Unlabelled/A5.mp4", 100, 4, ((-1, -1),)),
]
METRICS = {"auroc": FrameLevelAUROC, "average precision": FrameLevelAveragePrecision}


def snippets(seed=0, dtype=torch.float32):
    """(video, snippet, score) of all videos, one for 30 frames, in a mixed order."""
    counts = torch.tensor([max(1, record.num_frames // 30) for record in RECORDS])
    video = torch.arange(len(RECORDS)).repeat_interleave(counts)
    snippet = torch.cat([torch.arange(int(count)) for count in counts])
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(video), generator=generator, dtype=torch.float64).to(dtype)
    order = torch.randperm(len(video), generator=generator)
    return video[order], snippet[order], scores[order]


def plain_labels(record, legacy):
    labels = np.zeros(record.num_frames, dtype=int)
    for start, end in record.intervals:
        if start > 0 or (start == 0 and not legacy and record.label > 0):
            labels[start:end] = 1
    return labels


def plain_scores(video, snippet, scores, number, segments):
    frames = RECORDS[number].num_frames
    mine = video == number
    ordered = scores[mine][snippet[mine].argsort()].double().numpy()
    ratio = frames / len(ordered)
    found = np.empty(frames)
    for i, score in enumerate(ordered):
        found[int(i * ratio + 0.5) : int((i + 1) * ratio + 0.5)] = score
    width = 0 if segments is None else frames // segments
    for k in range(segments or 0):
        if width:
            found[k * width : (k + 1) * width] = found[k * width : (k + 1) * width].mean()
    if segments is not None and frames > width * segments:
        found[width * segments :] = found[width * segments :].mean()
    return found


def plain(data, subset="all", segments=32, legacy=True):
    """Labels and scores of all frames of the subset."""
    labels, scores = [], []
    for number in data[0].unique().tolist():
        label = plain_labels(RECORDS[number], legacy)
        if subset == "all" or label.any() == (subset == "abnormal"):
            labels.append(label)
            scores.append(plain_scores(*data, number, segments))
    return np.concatenate(labels), np.concatenate(scores)


def fed(metric, data, batch=16):
    for part in zip(*(values.split(batch) for values in data), strict=True):
        metric.update(*part)
    return metric


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "right"])
@pytest.mark.parametrize("segments", [32, 5, None])
@pytest.mark.parametrize("subset", ["all", "abnormal"])
@pytest.mark.parametrize(
    ("metric", "reference"), [(FrameLevelAUROC, roc_auc_score), (FrameLevelAveragePrecision, average_precision_score)]
)
def test_is_sklearns_on_all_frames(metric, reference, subset, segments, legacy):
    data = snippets()
    expected = reference(*plain(data, subset, segments, legacy))
    found = fed(metric(RECORDS, subset, segments, legacy), data).compute()
    assert found.dtype == torch.float64
    assert abs(found - expected) < 1e-12


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "right"])
@pytest.mark.parametrize("subset", ["all", "normal", "abnormal"])
def test_false_alarm_rate(subset, legacy):
    data = snippets()
    labels, scores = plain(data, subset, legacy=legacy)
    metric = fed(FrameLevelFalseAlarmRate(RECORDS, 0.55, subset, legacy_start_zero=legacy), data)
    assert abs(metric.compute() - (scores > 0.55)[labels == 0].mean()) < 1e-12


def test_false_alarm_rate_is_of_normal_videos_and_strictly_above():
    data = snippets()
    data = *data[:2], torch.where(data[0] == 1, 0.5, data[2])
    _, scores = plain(data, "normal", legacy=False)
    found = fed(FrameLevelFalseAlarmRate(RECORDS), data).compute()
    assert 0 < found < 1
    assert abs(found - (scores > 0.5).mean()) < 1e-12


def test_defaults_are_those_of_published_numbers():
    data = snippets()
    assert abs(fed(FrameLevelAUROC(RECORDS), data).compute() - roc_auc_score(*plain(data))) < 1e-12
    # A3 and part of A4 start at frame 0
    assert sum(plain_labels(record, True).sum() for record in RECORDS) == 75 + 50 + 83 + 250
    assert sum(plain_labels(record, False).sum() for record in RECORDS) == 75 + 50 + 83 + 250 + 77 + 20


def test_a_perfect_and_an_inverted_detector():
    records = [VideoRecord("a", 640, 1, ((320, 640),)), VideoRecord("n", 64, 0)]
    video, snippet = torch.tensor([0] * 20 + [1] * 2), torch.tensor([*range(20), 0, 1])
    scores = torch.tensor([0.0] * 10 + [1.0] * 10 + [0.0] * 2)
    assert fed(FrameLevelAUROC(records), (video, snippet, scores)).compute() == 1
    assert fed(FrameLevelAUROC(records), (video, snippet, -scores)).compute() == 0
    assert fed(FrameLevelAveragePrecision(records), (video, snippet, scores)).compute() == 1
    assert fed(FrameLevelAUROC(records), (video, snippet, 0 * scores)).compute() == 0.5


@pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))
def test_scores_seen_twice_count_once(metric):
    video, snippet, scores = snippets()
    expected = fed(metric(RECORDS), (video, snippet, scores)).compute()
    again = [torch.cat([values, values[:9]]) for values in (video, snippet, scores)]
    assert fed(metric(RECORDS), again).compute() == expected


def test_any_shape_of_batch_and_any_dtype_of_scores():
    video, snippet, scores = snippets(dtype=torch.float16)
    expected = roc_auc_score(*plain((video, snippet, scores)))
    metric = FrameLevelAUROC(RECORDS)
    size = len(video) // 2 * 2
    metric.update(*(values[:size].reshape(2, -1) for values in (video, snippet, scores)))
    metric.update(video[size:].int(), snippet[size:].int(), scores[size:])
    assert abs(metric.compute() - expected) < 1e-12


def test_scores_keep_no_graph():
    metric = FrameLevelAUROC(RECORDS)
    metric.update(torch.tensor([0]), torch.tensor([0]), torch.tensor([0.5], requires_grad=True))
    assert not metric.scores[0].requires_grad


def test_records_as_a_yaml_file_has_them():
    data = snippets()
    expected = fed(FrameLevelAUROC(RECORDS), data).compute()
    lists = [[r.path, r.num_frames, r.label, [list(pair) for pair in r.intervals]] for r in RECORDS]
    mappings = [record._asdict() for record in RECORDS]
    for records in (lists, mappings):
        assert fed(FrameLevelAUROC(records), data).compute() == expected


# --- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [*METRICS.values(), FrameLevelFalseAlarmRate])
def test_merges(metric):
    data = snippets()
    half = len(data[0]) // 2
    first = fed(metric(RECORDS), [values[:half] for values in data])
    first.merge_state(fed(metric(RECORDS), [values[half:] for values in data]))
    assert first.compute() == fed(metric(RECORDS), data).compute()


def on_one_rank(rank, share):
    """Every metric over what `share` gives to this rank; the padding repeats some snippets on both."""
    data = snippets()
    part = [values[share == rank] for values in data]
    if rank in share:
        part = [torch.cat([mine, values[:3]]) for mine, values in zip(part, data, strict=True)]
    found, kept = [], []
    for metric in (*METRICS.values(), FrameLevelFalseAlarmRate):
        made = metric(RECORDS)
        if rank in share:
            fed(made, part)
        found.append(made.compute())
        kept.append(sum(len(scores) for scores in made.scores))  # the states are this rank's own again
    return found, kept, len(part[0])


@pytest.mark.parametrize("share", ["uneven", "one rank has nothing"])
def test_two_processes_merge_what_they_saw(share):
    data = snippets()
    of_rank = torch.arange(len(data[0])) % 3 % 2 if share == "uneven" else torch.zeros(len(data[0]))
    expected = [fed(metric(RECORDS), data).compute() for metric in (*METRICS.values(), FrameLevelFalseAlarmRate)]
    for found, kept, size in on_ranks(on_one_rank, of_rank):
        assert found == expected
        assert kept == 3 * [size]


def test_copies_pickles_resets_and_does_not_enter_checkpoints():
    data = snippets()
    metric = fed(FrameLevelAUROC(RECORDS, subset="abnormal"), data)
    expected = metric.compute()
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        other._computed = None
        assert other.compute() == expected
    assert not metric.state_dict()
    metric.reset()
    assert metric.scores == []
    assert fed(metric, data).compute() == expected


def test_forward_gives_the_figure_of_the_batch():
    video, snippet, scores = snippets()
    metric = FrameLevelAUROC(RECORDS)
    with pytest.warns(UserWarning, match="6 of 7 videos"):
        value = metric(*(values[video == 0] for values in (video, snippet, scores)))
    labels, expanded = plain([values[video == 0] for values in (video, snippet, scores)])
    assert abs(value - roc_auc_score(labels, expanded)) < 1e-12


# --- what is missing ------------------------------------------------------------------------------


def test_videos_without_scores_are_left_out_with_a_warning():
    data = snippets()
    part = [values[(data[0] != 1) & (data[0] != 5)] for values in data]
    metric = fed(FrameLevelAUROC(RECORDS), part)
    with pytest.warns(UserWarning, match="FrameLevelAUROC: 2 of 7 videos have no scores and are left out; first: N1"):
        found = metric.compute()
    assert abs(found - roc_auc_score(*plain(part))) < 1e-12


def test_no_warning_about_videos_that_do_not_belong_to_the_subset():
    data = snippets()
    part = [values[data[0] != 1] for values in data]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fed(FrameLevelAUROC(RECORDS, subset="abnormal"), part).compute()


@pytest.mark.parametrize(
    ("metric", "numbers", "what"),
    [
        (FrameLevelAUROC, [1, 4, 6], "abnormal"),
        (FrameLevelAveragePrecision, [1, 4, 6], "abnormal"),
        (FrameLevelAUROC, [0], "normal"),
        (FrameLevelAveragePrecision, [0], "normal"),
        (FrameLevelFalseAlarmRate, [0], "normal"),
        (FrameLevelAUROC, [], "abnormal"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*have no scores", "ignore:The ``compute`` method")
def test_one_class_is_nan_with_a_warning(metric, numbers, what):
    records = [RECORDS[0]._replace(intervals=((1, 1000),)), *RECORDS[1:]] if what == "normal" else RECORDS
    data = snippets()
    kept = torch.isin(data[0], torch.tensor(numbers))
    made = metric(records, legacy_start_zero=True)
    if what == "normal":
        records[0] = VideoRecord("A1", 1000, 1, ((0, 1000),))
        made = metric(records, legacy_start_zero=False)
    if kept.any():
        fed(made, [values[kept] for values in data])
    with pytest.warns(UserWarning, match=f"{metric.__name__} is nan: no frame of the scored videos is {what}"):
        assert made.compute().isnan()


def test_memory_is_that_of_the_scores():
    """UCF-Crime's size: 37,145 scores and at most 33 pieces a video, whatever the number of frames."""
    generator = torch.Generator().manual_seed(0)
    records = [VideoRecord(f"{i}", 3834, i % 2, ((100, 700),) if i % 2 else ()) for i in range(290)]
    metric = FrameLevelAUROC(records)
    video = torch.arange(290).repeat_interleave(128)
    metric.update(video, torch.arange(128).repeat(290), torch.rand(len(video), generator=generator))
    assert sum(state[0].nbytes for state in (metric.video_index, metric.snippet_index, metric.scores)) < 1e6
    assert len(metric._counts().values) == 290 * 33


X, S = torch.tensor([0, 1]), torch.tensor([0.5, 0.5])
BAD_CALLS = {
    "no records": (lambda: FrameLevelAUROC([]), "`records` must hold at least one video"),
    "a record of one": (lambda: FrameLevelAUROC([("a",)]), r"`records\[0\]` must be a VideoRecord.*\('a',\)"),
    "a strange record": (lambda: FrameLevelAUROC([RECORDS[0], {"name": "a"}]), r"`records\[1\]` must be a VideoRecord"),
    "intervals": (lambda: FrameLevelAUROC([("a", 9, 1, (3, 4))]), r"`records\[0\]`.*\(3, 4\)"),
    "no frames": (lambda: FrameLevelAUROC([("v/a", 0, 1)]), r"`records\[0\]` \(a\) must have at least 1 frame, got 0"),
    "subset": (lambda: FrameLevelAUROC(RECORDS, subset="normal"), "`subset`.*'all', 'abnormal'.*'normal'"),
    "other subset": (lambda: FrameLevelAveragePrecision(RECORDS, subset="O"), "`subset`.*'all', 'abnormal'.*'O'"),
    "alarm subset": (lambda: FrameLevelFalseAlarmRate(RECORDS, subset="n"), "`subset`.*'normal'.*'n'"),
    "windows": (lambda: FrameLevelAUROC(RECORDS, smooth_segments=0), "`smooth_segments`.*got 0"),
    "shapes": (lambda: FrameLevelAUROC(RECORDS).update(X, X[:1], S), r"`snippet_index`.*\(2,\), got \(1,\)"),
    "floating index": (lambda: FrameLevelAUROC(RECORDS).update(S, X, S), "`video_index` must hold integers"),
    "integer scores": (lambda: FrameLevelAUROC(RECORDS).update(X, X, X), "`scores` must be floating, got torch.int64"),
    "other videos": (
        lambda: fed(FrameLevelAUROC(RECORDS), (X + 6, X, S)).compute(),
        r"`video_index` must be in \[0, 7\), one for each record, got values from 6 to 7",
    ),
    "negative video": (
        lambda: fed(FrameLevelAUROC(RECORDS), (X - 1, X, S)).compute(),
        "`video_index`.*from -1 to 0",
    ),
    "nan": (lambda: fed(FrameLevelAUROC(RECORDS), (X, X, S / 0 * 0)).compute(), "`scores` must be finite, got nan"),
}


@pytest.mark.filterwarnings("ignore:.*have no scores")
@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=list(BAD_CALLS))
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()

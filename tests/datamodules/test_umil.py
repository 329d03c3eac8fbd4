"""Lists, annotations, features and balanced bags, on files in the forms that people have."""

import os
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning import LightningModule, Trainer
from ranks import on_ranks
from sklearn.metrics import roc_auc_score

from lightning_methods.datamodules import (
    SnippetFeatureDataModule,
    VideoRecord,
    read_temporal_annotations,
    read_wsvad_list,
)
from lightning_methods.datamodules._wsvad_features import average_bins
from lightning_methods.datamodules._wsvad_sampling import BalancedBags
from lightning_methods.metrics import FrameLevelAUROC

# --- lists ----------------------------------------------------------------------------------------

UCF_TRAIN = """\
Abuse/Abuse001_x264.mp4 0 2729 1
Vandalism/Vandalism050_x264.mp4 0 400 13
Training_Normal_Videos_Anomaly/Normal_Videos001_x264.mp4 0 2010 0
"""
UCF_TEST = """\
Abuse/Abuse028_x264.mp4 1412 1 165 240 -1 -1
Arson/Arson011_x264.mp4 1266 3 150 420 680 1267
Normal/Normal_Videos_003_x264.mp4 2793 0 -1 -1 -1 -1
"""
TAD_TRAIN = "abnormal/01_Accident_001.mp4 0 314 1\nnormal/Normal_002.mp4 0 700 0"  # no newline at the end
TAD_TEST = """\
abnormal/01_Accident_005.mp4 500 1 120 300
abnormal/02_IllegalTurn_001.mp4 200 2 0 90
normal/Normal_011.mp4 611 0 0 611
"""
ANNOTATIONS = """\
Abuse028_x264.mp4  Abuse  165  240  -1  -1
Arson011_x264.mp4  Arson  150  420  680  1267

Normal_Videos_003_x264.mp4  Normal  -1  -1  -1  -1
"""


def written(path, text):
    path.write_text(text)
    return path


def test_ucf_crime_lists(tmp_path):
    assert read_wsvad_list(written(tmp_path / "train.txt", UCF_TRAIN)) == [
        VideoRecord("Abuse/Abuse001_x264.mp4", 2729, 1, ()),
        VideoRecord("Vandalism/Vandalism050_x264.mp4", 400, 13, ()),
        VideoRecord("Training_Normal_Videos_Anomaly/Normal_Videos001_x264.mp4", 2010, 0, ()),
    ]
    records = read_wsvad_list(str(written(tmp_path / "test.txt", UCF_TEST)))
    assert records == [
        VideoRecord("Abuse/Abuse028_x264.mp4", 1412, 1, ((165, 240),)),
        VideoRecord("Arson/Arson011_x264.mp4", 1266, 3, ((150, 420), (680, 1266))),  # the end is cut
        VideoRecord("Normal/Normal_Videos_003_x264.mp4", 2793, 0, ()),
    ]
    assert [record.name for record in records][2] == "Normal_Videos_003_x264.mp4"


def test_tad_lists(tmp_path):
    train = read_wsvad_list(written(tmp_path / "train.txt", TAD_TRAIN))
    assert train == [
        VideoRecord("abnormal/01_Accident_001.mp4", 314, 1, ()),
        VideoRecord("normal/Normal_002.mp4", 700, 0, ()),
    ]
    assert [record.intervals for record in read_wsvad_list(written(tmp_path / "test.txt", TAD_TEST))] == [
        ((120, 300),),
        ((0, 90),),
        (),
    ]


def test_tabs_blank_lines_and_an_interval_beyond_the_video(tmp_path):
    text = "a.mp4\t50\t1\t60\t70\r\n\r\n  b.mp4   9  0  -1 -1  \r\n"
    assert read_wsvad_list(written(tmp_path / "list.txt", text)) == [
        VideoRecord("a.mp4", 50, 1, ()),
        VideoRecord("b.mp4", 9, 0, ()),
    ]


def test_temporal_annotations(tmp_path):
    assert read_temporal_annotations(written(tmp_path / "annotations.txt", ANNOTATIONS)) == {
        "Abuse028_x264.mp4": ((165, 240),),
        "Arson011_x264.mp4": ((150, 420), (680, 1267)),
        "Normal_Videos_003_x264.mp4": (),
    }


BAD_LISTS = {
    "empty": ("\n\n", "is empty; expected lines"),
    "too few fields": ("a.mp4 0 100 1\nb.mp4 100 1\n", '1 of 2 lines .*first: line 2, "b.mp4 100 1": 3 fields'),
    "no number": ("a.mp4 0 x 1\n", "line 1.*invalid literal.*'x'"),
    "half an interval": ("a.mp4 100 1 3 4 5\n", "a start without an end"),
    "reversed": ("a.mp4 100 1 40 30\n", "an interval from 40 to 30"),
    "no frames": ("a.mp4 0 0 1\n", "0 frames of class 1"),
    "negative class": ("a.mp4 0 10 -1\n", "10 frames of class -1"),
    "another start": ("a.mp4 5 100 1\n", "it starts at frame 5, not 0"),
}


@pytest.mark.parametrize(("text", "message"), BAD_LISTS.values(), ids=list(BAD_LISTS))
def test_malformed_lists_show_the_line(tmp_path, text, message):
    path = written(tmp_path / "list.txt", text)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + message):
        read_wsvad_list(path)


def test_malformed_annotations(tmp_path):
    path = written(tmp_path / "a.txt", "a.mp4 Abuse 1 2\nb.mp4 Abuse 1 2\na.mp4 Abuse 3 4\n")
    with pytest.raises(ValueError, match=r"a\.mp4 is annotated 2 times"):
        read_temporal_annotations(path)
    with pytest.raises(ValueError, match='1 of 1 lines are not "video class start end'):
        read_temporal_annotations(written(path, "a.mp4 Abuse 1\n"))


@pytest.mark.parametrize("read", [read_wsvad_list, read_temporal_annotations])
def test_missing_files_say_what_was_expected(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"list\.txt is missing; expected a text file with lines"):
        read(tmp_path / "list.txt")


# --- features -------------------------------------------------------------------------------------

ROWS = {
    "Abuse001_x264.mp4": 170,
    "Vandalism050_x264.mp4": 25,
    "Normal_Videos001_x264.mp4": 125,
    "Abuse028_x264.mp4": 88,
    "Arson011_x264.mp4": 79,
    "Normal_Videos_003_x264.mp4": 174,
}
CROPS, WIDTH = 10, 6
SHAPES = {"kd": lambda k: (k, WIDTH), "kcd": lambda k: (k, CROPS, WIDTH), "ckd": lambda k: (CROPS, k, WIDTH)}


@pytest.fixture
def ucf(tmp_path):
    for name, text in (("train.txt", UCF_TRAIN), ("test.txt", UCF_TEST), ("annotations.txt", ANNOTATIONS)):
        written(tmp_path / name, text)
    return tmp_path


def write_features(root, layout="kd", template="{name}.npy", dtype=np.float32):
    generator = np.random.default_rng(0)
    for name, rows in ROWS.items():
        values = generator.standard_normal(SHAPES[layout](rows)).astype(dtype)
        np.save(root / template.format(name=name, stem=name.removesuffix(".mp4")), values)


def features(root, **kwargs):
    settings = {"batch_size": 2, "num_workers": 0, **kwargs}
    return SnippetFeatureDataModule(root, root / "train.txt", root / "test.txt", **settings)


def plain_bins(rows, bins):
    """As in the code that most papers on UCF-Crime share."""
    edges = [k * len(rows) // bins for k in range(bins + 1)]
    return np.stack([rows[a:b].mean(0) if b > a else rows[a] for a, b in pairwise(edges)])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 100), st.integers(1, 40), st.sampled_from([np.float32, np.float64]))
def test_bins(rows, bins, dtype):
    values = np.random.default_rng(rows).standard_normal((rows, 3)).astype(dtype)
    found = average_bins(values, bins)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, plain_bins(values, bins), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("layout", SHAPES)
def test_training_bags_are_means_over_bins_and_crops(ucf, layout, dtype):
    write_features(ucf, layout, dtype=dtype)
    data = features(ucf, layout=layout, num_snippets=16)
    data.setup("fit")
    for index, record in enumerate(data.records["train"]):
        bag = data.datasets["train"][index]
        values = np.load(ucf / f"{record.name}.npy").astype(np.float64)
        rows = {"kd": values, "kcd": values.mean(1) if values.ndim == 3 else 0, "ckd": values.mean(0)}[layout]
        assert bag["features"].dtype == torch.float32
        np.testing.assert_allclose(bag["features"].numpy(), plain_bins(rows, 16), rtol=1e-5, atol=1e-5)
        assert (bag["label"], bag["vid"], bag["total_frames"]) == (record.label, index, record.num_frames)
        middles = [int((k + 0.5) * record.num_frames / 16) for k in range(16)]
        assert bag["frame_index"].tolist() == middles
        assert "features_strong" not in bag
        assert "snippet_index" not in bag


@pytest.mark.parametrize("layout", ["kcd", "ckd"])
def test_the_strong_view_is_one_crop(ucf, layout):
    write_features(ucf, layout)
    data = features(ucf, layout=layout, num_snippets=16, strong_view=True)
    data.setup("fit")
    values = np.load(ucf / f"{data.records['train'][0].name}.npy")
    crops = values.swapaxes(0, 1) if layout == "kcd" else values
    expected = np.stack([plain_bins(crop, 16) for crop in crops])
    torch.manual_seed(0)
    drawn = set()
    for _ in range(40):
        strong = data.datasets["train"][0]["features_strong"].numpy()
        drawn.add(int(np.flatnonzero(np.isclose(expected, strong, atol=1e-5).all((1, 2)))[0]))
    assert len(drawn) > 5


def test_test_bags_hold_every_row_of_one_video(ucf):
    write_features(ucf)
    data = features(ucf)
    data.setup("test")
    batches = list(data.test_dataloader())
    assert len(batches) == 3
    for index, (batch, record) in enumerate(zip(batches, data.records["test"], strict=True)):
        rows = ROWS[record.name]
        assert torch.equal(batch["features"][0], torch.from_numpy(np.load(ucf / f"{record.name}.npy")))
        assert batch["snippet_index"].tolist() == [list(range(rows))]
        assert batch["frame_index"].shape == (1, rows)
        assert batch["vid"].tolist() == [index]
    assert torch.equal(next(iter(data.predict_dataloader()))["features"], batches[0]["features"])


def test_file_names_by_stem(ucf):
    write_features(ucf, "kcd", template="{stem}_i3d.npy")
    data = features(ucf, layout="kcd", file_name="{stem}_i3d.npy")
    data.setup("fit")
    assert data.datasets["val"].files[0].path == ucf / "Abuse028_x264_i3d.npy"


def test_annotations_take_the_place_of_the_lists_intervals(ucf):
    write_features(ucf)
    expected = read_wsvad_list(ucf / "test.txt")
    # the test videos in the form of training lists: without intervals
    written(ucf / "test.txt", "".join(f"{r.path} 0 {r.num_frames} {r.label}\n" for r in expected))
    data = features(ucf, annotations=ucf / "annotations.txt")
    assert data.read_records("test") == expected
    assert data.read_records("val") == expected
    data.setup("fit")
    assert data.records["val"] == expected
    assert data.records["train"] == read_wsvad_list(ucf / "train.txt")


def test_a_validation_list_of_its_own(ucf):
    write_features(ucf)
    written(ucf / "val.txt", UCF_TEST.splitlines()[0])
    data = features(ucf, val_list=ucf / "val.txt", annotations=ucf / "annotations.txt")
    data.setup("fit")
    assert [record.name for record in data.records["val"]] == ["Abuse028_x264.mp4"]
    assert len(data.read_records("test")) == 3


def test_only_the_lists_that_a_stage_needs_are_read(ucf):
    write_features(ucf)
    (ucf / "train.txt").unlink()
    features(ucf).setup("validate")
    features(ucf).setup("test")
    with pytest.raises(FileNotFoundError, match=r"train\.txt"):
        features(ucf).setup("fit")


def break_file(root, content):
    (root / "Abuse028_x264.mp4.npy").write_bytes(content)


def saved(root, values):
    np.save(root / "Abuse028_x264.mp4.npy", values)


BAD_FILES = {
    "no npy": (lambda root: break_file(root, b"hello"), {}, "npy cannot be read as an .npy file"),
    "empty": (lambda root: break_file(root, b""), {}, "npy cannot be read as an .npy file"),
    "cut off": (
        lambda root: break_file(root, (root / "Arson011_x264.mp4.npy").read_bytes()[:500]),
        {},
        "npy cannot be read as an .npy file",
    ),
    "pickled": (lambda root: saved(root, np.array([None])), {}, "npy cannot be read as an .npy file"),
    "archive": (
        lambda root: (
            np.savez(root / "a.npz", a=np.ones(1)),
            (root / "a.npz").rename(root / "Abuse028_x264.mp4.npy"),
        ),
        {},
        "is an .npz archive",
    ),
    "other layout": (
        lambda root: saved(root, np.ones((88, 10, 6), np.float32)),
        {},
        r"must hold .* of shape \(K, D\).*`layout` 'kd' says; got float32 \(88, 10, 6\)",
    ),
    "integers": (lambda root: saved(root, np.ones((88, 6), int)), {}, r"got int64 \(88, 6\)"),
    "no rows": (lambda root: saved(root, np.ones((0, 6))), {}, r"got float64 \(0, 6\)"),
    "too few rows": (
        lambda root: saved(root, np.ones((44, 6))),
        {"frames_per_row": 16},
        r"has 44 rows of 16 frames, 704 in all, but Abuse028_x264.mp4 has 1412 frames in the list: 88 to 89 rows",
    ),
    "another width": (lambda root: saved(root, np.ones((88, 7))), {}, "npy has 7"),
    "other frames": (lambda root: None, {"frames_per_row": 8}, r"has 88 rows of 8 frames, 704 in all.*1412 frames"),
    "duplicates": (
        lambda root: written(root / "test.txt", UCF_TEST + "Other/Abuse028_x264.mp4 1412 1 1 2 -1 -1\n"),
        {},
        r"2 videos of the list are called Abuse028_x264\.mp4",
    ),
}


@pytest.mark.parametrize(("damage", "kwargs", "message"), BAD_FILES.values(), ids=list(BAD_FILES))
def test_damaged_features_are_named_at_setup(ucf, damage, kwargs, message):
    write_features(ucf)
    damage(ucf)
    with pytest.raises(ValueError, match="Abuse028_x264.mp4.*" + message if "called" not in message else message):
        features(ucf, **kwargs).setup("test")


def test_lengths_fit_with_the_last_rows_frames_left_out_or_not(ucf):
    write_features(ucf)  # 1412 / 16 = 88.25: 88; 1266 / 16 = 79.125: 79; 2793 / 16 = 174.6: 174
    features(ucf, frames_per_row=16).setup("test")
    saved(ucf, np.ones((89, 6), np.float32))
    features(ucf, frames_per_row=16).setup("test")


def test_missing_features_are_counted(ucf):
    write_features(ucf)
    for name in ("Abuse028_x264.mp4", "Arson011_x264.mp4"):
        (ucf / f"{name}.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 3 feature files are missing; first: .*Abuse028_x264.mp4.npy"):
        features(ucf).setup("test")


CONTRADICTIONS = {
    "not in the list": (ANNOTATIONS + "Z.mp4 Abuse 1 2\nX.mp4 Abuse 1 2\n", r"annotates 2 videos that .*first: X\.mp4"),
    "normal": (
        ANNOTATIONS.replace("Normal  -1  -1", "Normal  5  9"),
        "Normal_Videos_003_x264.mp4 is normal in .*but has 1",
    ),
    "abnormal": (ANNOTATIONS.split("\n", 1)[1], r"Abuse028_x264.mp4 is abnormal \(class 1\).*but has 0 anomalies"),
    "beyond the end": (ANNOTATIONS.replace("165  240", "1412  1500"), "0 anomalies within its 1412 frames"),
}


@pytest.mark.parametrize(("text", "message"), CONTRADICTIONS.values(), ids=list(CONTRADICTIONS))
def test_annotations_that_contradict_the_list(ucf, text, message):
    written(ucf / "annotations.txt", text)
    with pytest.raises(ValueError, match=message):
        features(ucf, annotations=ucf / "annotations.txt").read_records("test")


BAD_ARGUMENTS = {
    "batch_size": ({"batch_size": 3}, "batch_size must be even and at least 2.*got 3"),
    "no batch": ({"batch_size": 0}, "batch_size.*got 0"),
    "num_snippets": ({"num_snippets": 0}, "num_snippets must be at least 1, got 0"),
    "num_workers": ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
    "layout": ({"layout": "dk"}, "layout must be one of .*got 'dk'"),
    "strong_view": ({"strong_view": True}, "strong_view needs a layout with crops"),
    "file_name": ({"file_name": "features.npy"}, "file_name must have a place for .*got 'features.npy'"),
    "other place": ({"file_name": "{name}_{crop}.npy"}, "file_name must have a place for .*crop"),
    "frames_per_row": ({"frames_per_row": 0}, "frames_per_row must be at least 1 or None, got 0"),
}


@pytest.mark.parametrize(("kwargs", "message"), BAD_ARGUMENTS.values(), ids=list(BAD_ARGUMENTS))
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        features(Path("data"), **kwargs)


# --- balanced bags --------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=30), st.integers(1, 3), st.integers(0, 5))
def test_batches_have_as_many_normal_as_abnormal_videos(labels, world_size, epoch):
    if all(labels) or not any(labels):
        labels = [0, 1, *labels]
    parts = []
    for rank in range(world_size):
        sampler = BalancedBags(labels, seed=1, rank=rank, world_size=world_size)
        sampler.set_epoch(epoch)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler)
        kinds = [labels[index] > 0 for index in parts[-1]]
        assert kinds[::2] == [True] * (len(kinds) // 2)
        assert kinds[1::2] == [False] * (len(kinds) // 2)
    assert len({len(part) for part in parts}) == 1
    seen = np.bincount(np.concatenate(parts), minlength=len(labels))
    abnormal = np.array(labels) > 0
    assert seen.min() >= 1
    for kind in (abnormal, ~abnormal):
        assert seen[kind].max() - seen[kind].min() <= 1  # every video of a class as often as the others


def test_the_order_is_a_matter_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = BalancedBags([0, 1] * 20, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize(("labels", "missing"), [([0, 0], "abnormal"), ([2, 1], "normal")])
def test_bags_need_both_classes(labels, missing):
    with pytest.raises(ValueError, match=f"2 training videos, but none is {missing}"):
        BalancedBags(labels)


# --- with Lightning -------------------------------------------------------------------------------


class Detector(LightningModule):
    """Feeds a frame-level metric as the datamodule's docstring says."""

    def __init__(self, records):
        super().__init__()
        self.head = torch.nn.Linear(WIDTH, 1)
        self.metric = FrameLevelAUROC(records)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch["vid"].tolist()))
        assert batch["features"].shape == (2, 8, WIDTH)
        return self.head(batch["features"]).square().mean()

    def test_step(self, batch, batch_idx):
        scores = self.head(batch["features"]).squeeze(-1)
        self.metric.update(batch["vid"][:, None].expand_as(scores), batch["snippet_index"], scores)
        self.log("auc", self.metric)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def quiet_trainer(**kwargs):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


@pytest.mark.filterwarnings("ignore")
def test_trains_and_tests_under_lightning(ucf):
    write_features(ucf)
    data = features(ucf, num_snippets=8)
    module = Detector(data.read_records("test"))
    quiet_trainer(max_epochs=2, limit_val_batches=0).fit(module, data)
    epochs = [[videos for epoch, videos in module.seen if epoch == number] for number in range(2)]
    assert [len(batches) for batches in epochs] == [2, 2]
    assert all(abnormal in (0, 1) and normal == 2 for batches in epochs for abnormal, normal in batches)
    (logged,) = quiet_trainer().test(module, data, verbose=False)
    labels, scores = [], []
    for record in data.records["test"]:
        rows = module.head(torch.from_numpy(np.load(ucf / f"{record.name}.npy"))).detach().double().squeeze(1).numpy()
        ratio, n = record.num_frames / len(rows), record.num_frames
        frames = np.repeat(rows, [int((i + 1) * ratio + 0.5) - int(i * ratio + 0.5) for i in range(len(rows))])
        width = n // 32
        means = [frames[k * width : (k + 1) * width].mean() for k in range(32)] + [frames[32 * width :].mean()]
        scores.append(np.repeat(means, [width] * 32 + [n - 32 * width]))
        labels.append(np.isin(np.arange(n), [f for a, b in record.intervals for f in range(a, b)]))
    assert logged["auc"] == pytest.approx(roc_auc_score(np.concatenate(labels), np.concatenate(scores)), abs=1e-6)


def on_one_rank(rank, root):
    # Lightning takes the process group that is there already.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    torch.manual_seed(0)
    data = features(root, num_snippets=8)
    module = Detector(data.read_records("test"))
    trainer = quiet_trainer(max_epochs=1, limit_val_batches=0, devices=2, strategy="ddp")
    trainer.fit(module, data)
    (logged,) = trainer.test(module, data, verbose=False)
    return module.seen, logged["auc"]


@pytest.mark.filterwarnings("ignore")
def test_two_processes_share_bags_and_scores(ucf):
    write_features(ucf)
    (first, auc), (second, other) = on_ranks(on_one_rank, ucf)
    assert len(first) == len(second) == 1
    assert sorted(first[0][1] + second[0][1]) == [0, 1, 2, 2]
    torch.manual_seed(0)
    data = features(ucf)
    (logged,) = quiet_trainer().test(Detector(data.read_records("test")), data, verbose=False)
    assert auc == other == pytest.approx(logged["auc"], abs=1e-6)

"""Bags of clips from videos whose frame i is a plain picture of grey level i."""

import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from torchvision.transforms import v2

from lightning_methods.datamodules import TADDataModule, UCFCrimeDataModule, read_wsvad_list
from lightning_methods.datamodules._video_files import write_video
from lightning_methods.datamodules._wsvad_sampling import (
    cell_clip,
    clip_frames,
    fixed_offsets,
    num_cells,
    training_offsets,
)
from lightning_methods.datamodules._wsvad_views import StrongView, multi_scale_crop, shrink, weak_view
from lightning_methods.functional import snippet_cell_index
from lightning_methods.metrics import FrameLevelAUROC

K, T, STEP = 16, 5, 6
SPAN = T * STEP

# --- sampling -------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2000), st.sampled_from([1, 4, 16, 32, 40]), st.sampled_from([8, 30]), st.integers(0, 999))
def test_training_offsets(n, k, span, seed):
    found = training_offsets(n, k, span, torch.Generator().manual_seed(seed)).tolist()
    part = (n - span + 1) // k
    assert len(found) == k
    if part > 0:
        assert all(i * part <= offset < (i + 1) * part for i, offset in enumerate(found))
        assert max(found) + span <= n
    elif n > max(k, span):
        assert found == sorted(found)
        assert 0 <= found[0] <= found[-1] <= n - span
    elif part == 0:
        assert found == np.around(np.arange(k) * (n - span + 1) / k).tolist()
    else:
        assert found == [0] * k


def test_training_offsets_use_every_place():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([training_offsets(100, 4, 30, generator) for _ in range(400)])
    assert [set(column.tolist()) for column in drawn.T] == [set(range(17 * i, 17 * i + 17)) for i in range(4)]
    drawn = torch.stack([training_offsets(40, 16, 30, generator) for _ in range(100)])
    assert set(drawn.flatten().tolist()) == set(range(11))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2000), st.sampled_from([1, 4, 16]), st.sampled_from([8, 30]))
def test_fixed_offsets(n, k, span):
    part = (n - span + 1) / k
    expected = [int(i * part + part / 2) if n >= span else 0 for i in range(k)]
    assert fixed_offsets(n, k, span).tolist() == expected


def test_clips_go_on_at_the_start():
    assert clip_frames(torch.tensor([0, 7]), 20, 3, 6).tolist() == [[0, 6, 12], [7, 13, 19]]
    assert clip_frames(torch.tensor([10]), 14, 3, 6).tolist() == [[10, 2, 8]]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000))
def test_cells(n):
    cells = num_cells(n, SPAN)
    assert cells == max(sum(min(SPAN, n - start) >= 5 for start in range(0, n, SPAN)), 1)
    for cell in {0, cells // 2, cells - 1}:
        (clip,) = cell_clip(cell, n, SPAN, T, STEP).tolist()
        length = min(SPAN, n - cell * SPAN)
        assert clip == [cell * SPAN + (STEP * t) % length for t in range(T)]
        if n % SPAN == 0:
            middle = torch.tensor([[clip[T // 2]]])
            assert snippet_cell_index(middle, torch.tensor([n]), torch.tensor([cells])) == cell


# --- views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(60, 80), (90, 60), (300, 256)])
def test_weak_view_is_resize_centre_crop_and_normalise(size):
    frames = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    usual = v2.Compose(
        [
            v2.ToDtype(torch.float32),
            v2.Resize(256, antialias=False),
            v2.CenterCrop(224),
            v2.Normalize((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        ]
    )
    found = weak_view(shrink(frames))
    assert found.shape == (2, 3, 224, 224)
    torch.testing.assert_close(found, usual(frames), atol=1e-3, rtol=0)


def test_strong_view_makes_one_choice_for_all_frames():
    picture = torch.rand(1, 3, 256, 300, generator=torch.Generator().manual_seed(0))
    view = StrongView()
    torch.manual_seed(0)
    operations, results = set(), []
    for _ in range(30):
        found = view(picture.expand(3, -1, -1, -1))
        assert found.shape == (3, 3, 224, 224)
        torch.testing.assert_close(found, found[:1].expand_as(found), rtol=0, atol=1e-6)
        operations |= {item.name for item in view.operations._params}
        results.append(found[0])
    assert len(operations) > 10
    assert len({float(result.sum()) for result in results}) == 30
    assert torch.isfinite(torch.stack(results)).all()
    assert not found.requires_grad


def test_strong_view_keeps_time():
    """Frames that differ before the view differ after it, in the same order."""
    levels = torch.linspace(0.3, 0.6, 4).view(4, 1, 1, 1).expand(4, 3, 256, 256)
    view = StrongView()
    torch.manual_seed(1)
    means = torch.stack([view(levels).mean((1, 2, 3)) for _ in range(10)])
    steps = means.diff(dim=1)
    assert ((steps >= -1e-5).all(1) | (steps <= 1e-5).all(1)).sum() >= 8  # equalisation of a plain picture is none


def test_multi_scale_crop_takes_the_sizes_and_places_that_there_are():
    down, right = torch.meshgrid(torch.arange(256.0), torch.arange(340.0), indexing="ij")
    coordinates = torch.stack([down, right, 0 * down])[None]
    sizes, places = set(), set()
    torch.manual_seed(0)
    for _ in range(600):
        crop = multi_scale_crop(coordinates)[0]
        assert crop.shape == (3, 224, 224)
        height = round(float(crop[0, 100, 0] - crop[0, 0, 0]) * 224 / 100)
        width = round(float(crop[1, 0, 100] - crop[1, 0, 0]) * 224 / 100)
        top, left = float(crop[0, 112, 0]) - height / 2, float(crop[1, 0, 112]) - width / 2
        sizes.add((height, width))
        places.add((round(top / max(256 - height, 1), 1), round(left / (340 - width), 1)))
    scales = [256, 224, 192, 168]
    assert sizes == {(h, w) for i, h in enumerate(scales) for j, w in enumerate(scales) if abs(i - j) <= 1}
    assert {(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.5)} <= places


# --- files ----------------------------------------------------------------------------------------

TRAIN = """\
Abuse/Abuse001_x264.mp4 0 210 1
Training_Normal_Videos_Anomaly/Normal_Videos001_x264.mp4 0 95 0
Training_Normal_Videos_Anomaly/Normal_Videos002_x264.mp4 0 20 0
"""
TEST = """\
Abuse/Abuse028_x264.mp4 94 1 30 60 -1 -1
Normal/Normal_Videos_003_x264.mp4 63 0 -1 -1 -1 -1
"""


def pictures(count):
    return torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)


def save_pictures(folder, count):
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures(count)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"img_{number:08d}.jpg", quality=95)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The authors' layout: lists, and below `frames` folders called .mp4."""
    root = tmp_path_factory.mktemp("ucf")
    for name, text in (("train.txt", TRAIN), ("test.txt", TEST)):
        (root / name).write_text(text)
        for record in read_wsvad_list(root / name):
            save_pictures(root / "frames" / record.path, record.num_frames)
    return root


def crime(root, kind=UCFCrimeDataModule, lists=None, **kwargs):
    lists = lists or root
    return kind(root, lists / "train.txt", lists / "test.txt", **{"num_workers": 0, **kwargs})


def levels(clips):
    """Numbers of the frames in clips (..., 3, T, H, W) of the weak view."""
    red = clips.select(-4, 0)[..., 100:110, 100:110].mean((-1, -2)) * 58.395 + 123.675
    return red.round().long().tolist()


def test_training_bags_show_the_frames_that_they_name(tree):
    data = crime(tree, strong_view=False)
    data.setup("fit")
    torch.manual_seed(0)
    for index, record in enumerate(data.records["train"]):
        bag = data.datasets["train"][index]
        assert bag["clips"].shape == (K, 3, T, 224, 224)
        assert bag["clips"].dtype == torch.float32
        shown = torch.tensor(levels(bag["clips"]))
        assert ((shown[:, 1:] - shown[:, :-1]) % record.num_frames == STEP % record.num_frames).all()
        assert shown[:, T // 2].tolist() == bag["frame_index"].tolist()
        assert (bag["label"], bag["vid"], bag["total_frames"]) == (record.label, index, record.num_frames)
        assert "clips_strong" not in bag
        if record.num_frames == 210:  # 181 places in 16 parts of 11
            assert (shown[:, 0] // 11).tolist() == list(range(K))
            again = levels(data.datasets["train"][index]["clips"])
            assert again != shown.tolist()


def test_strong_view_of_the_same_frames_or_of_others(tree):
    for resample in (False, True):
        data = crime(tree, resample_views=resample)
        data.setup("fit")
        dataset = data.datasets["train"]
        dataset.strong_view = weak_view  # so that its frames can be told
        torch.manual_seed(0)
        bag = dataset[0]
        same = levels(bag["clips"]) == levels(bag["clips_strong"])
        assert same != resample
        parts = [torch.tensor(levels(bag[name]))[:, 0] // 11 for name in ("clips", "clips_strong")]
        assert torch.equal(*parts)
    data = crime(tree)
    data.setup("fit")
    bag = data.datasets["train"][1]
    assert bag["clips_strong"].shape == bag["clips"].shape
    assert not torch.equal(bag["clips_strong"], bag["clips"])


def test_validation_bags_are_spread_evenly(tree):
    data = crime(tree)
    data.setup("validate")
    (batch,) = data.val_dataloader()
    assert batch["clips"].shape == (2, K, 3, T, 224, 224)
    part = (94 - 29) / K
    first = [[int(k * part + part / 2), *(int(k * part + part / 2) + STEP * t for t in range(1, T))] for k in range(K)]
    assert levels(batch["clips"][0]) == first
    assert batch["frame_index"][0].tolist() == [clip[2] for clip in first]
    assert batch["snippet_index"].tolist() == [list(range(K))] * 2


def test_test_batches_hold_every_cell_once(tree):
    data = crime(tree, num_snippets=2)
    data.setup("test")
    batches = list(data.test_dataloader())
    assert [len(batch["clips"]) for batch in batches] == [4, 1]
    assert batches[0]["clips"].shape == (4, 1, 3, T, 224, 224)
    cells = [
        (int(video), int(snippet), clip[0])
        for batch in batches
        for video, snippet, clip in zip(batch["vid"], batch["snippet_index"], levels(batch["clips"]), strict=True)
    ]
    # 94 frames are three cells and four frames, which are left out; 63 are two and three
    assert [cell[:2] for cell in cells] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert [cell[2] for cell in cells[:3]] == [[start + STEP * t for t in range(T)] for start in (0, 30, 60)]


def test_cells_of_training_videos(tree):
    assert crime(tree).cells_per_video.tolist() == [7, 4, 1]


@pytest.mark.parametrize("form", ["video files", "zips", "beside the lists"])
def test_other_forms_of_the_same_videos_give_the_same_clips(tree, tmp_path, form):
    for record in read_wsvad_list(tree / "test.txt"):
        path = tmp_path / record.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if form == "video files":
            write_video(path, pictures(record.num_frames))
        elif form == "zips":
            with zipfile.ZipFile(path, "w") as archive:
                for frame in (tree / "frames" / record.path).iterdir():
                    archive.write(frame, frame.name)
        else:
            path.symlink_to(tree / "frames" / record.path)
    found, expected = (crime(root, lists=tree) for root in (tmp_path, tree))
    for data in (found, expected):
        data.setup("test")
    for a, b in zip(found.datasets["test"], expected.datasets["test"], strict=True):
        assert levels(a.pop("clips")) == levels(b.pop("clips"))
        assert all(torch.equal(a[key], b[key]) for key in b)


def test_workers_read_what_the_main_process_reads(tree):
    data = crime(tree, num_snippets=2, num_workers=2)
    data.setup("test")
    _ = data.datasets["test"][0]  # leaves a file open, which the workers inherit
    found = list(data.test_dataloader())
    data.num_workers = 0
    for a, b in zip(found, data.test_dataloader(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in b)
    copied = pickle.loads(pickle.dumps(data.datasets["test"]))  # what a spawned worker gets
    assert torch.equal(copied[1]["clips"], data.datasets["test"][1]["clips"])


def test_a_video_is_opened_once_for_its_cells(tree, monkeypatch):
    data = crime(tree)
    data.setup("test")
    opened = []
    dataset = data.datasets["test"]
    original = dataset._open
    monkeypatch.setattr(dataset, "_open", lambda index: opened.append(index) or original(index))
    for index in range(len(dataset)):
        dataset[index]
    assert opened == [0, 1]


def test_another_number_of_frames_than_the_list_says(tree, tmp_path):
    (tmp_path / "train.txt").write_text(TRAIN)
    (tmp_path / "test.txt").write_text(TEST.replace(" 94 ", " 95 "))
    data = crime(tree, lists=tmp_path)
    data.setup("test")
    with pytest.raises(ValueError, match=r"Abuse028_x264\.mp4 has 94 frames, but the list says 95"):
        data.datasets["test"][0]


def test_missing_videos_are_counted_at_setup(tree, tmp_path):
    (tmp_path / "train.txt").write_text(TRAIN + "Arson/Arson001_x264.mp4 0 100 3\nArson/Arson002_x264.mp4 0 100 3")
    (tmp_path / "test.txt").write_text(TEST)
    with pytest.raises(FileNotFoundError, match=r"2 of 5 videos are neither in .*frames nor.*: Arson/Arson001"):
        crime(tree, lists=tmp_path).setup("fit")


def test_images_with_other_names(tree):
    data = crime(tree, template="frame_{:05}.jpg")
    data.setup("test")
    with pytest.raises(ValueError, match=r"Abuse028_x264\.mp4: has no images named by the template"):
        data.datasets["test"][0]


def test_classes_are_those_of_the_data_set(tree, tmp_path):
    assert len(UCFCrimeDataModule.class_names) == 14
    assert len(TADDataModule.class_names) == 8
    (tmp_path / "train.txt").write_text(TRAIN.replace(" 1\n", " 8\n"))
    (tmp_path / "test.txt").write_text(TEST)
    crime(tree, lists=tmp_path).setup("fit")
    with pytest.raises(ValueError, match=r"train\.txt: Abuse/Abuse001.* has class 8, expected 0 … 7 \(Normal, Acc"):
        crime(tree, TADDataModule, lists=tmp_path).setup("fit")


@pytest.mark.parametrize("argument", ["clip_length", "frame_interval"])
def test_bad_arguments(argument):
    with pytest.raises(ValueError, match=r"clip_length and frame_interval must be at least 1.*0"):
        UCFCrimeDataModule("data", "train.txt", "test.txt", **{argument: 0})


# --- with Lightning -------------------------------------------------------------------------------


class Detector(LightningModule):
    """Scores a clip by its brightness."""

    def __init__(self, records):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.metric = FrameLevelAUROC(records, smooth_segments=None)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append({key: tuple(value.shape) for key, value in batch.items()})
        return self.scale * batch["clips_strong"].mean()

    def test_step(self, batch, batch_idx):
        scores = self.scale * batch["clips"].mean((2, 3, 4, 5))
        self.metric.update(batch["vid"][:, None].expand_as(scores), batch["snippet_index"], scores)
        self.log("auc", self.metric)

    validation_step = test_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.filterwarnings("ignore")
def test_trains_validates_and_tests_tad(tmp_path):
    (tmp_path / "train.txt").write_text("abnormal/01_Accident_001.mp4 0 40 1\nnormal/Normal_002.mp4 0 40 0")
    (tmp_path / "test.txt").write_text("abnormal/01_Accident_005.mp4 60 1 30 60\nnormal/Normal_011.mp4 30 0 0 30\n")
    for name, count in (("abnormal/01_Accident_001", 40), ("normal/Normal_002", 40)):
        save_pictures(tmp_path / "frames" / f"{name}.mp4", count)
    for name, count in (("abnormal/01_Accident_005", 60), ("normal/Normal_011", 30)):
        save_pictures(tmp_path / "frames" / f"{name}.mp4", count)
    data = crime(tmp_path, TADDataModule, num_snippets=2, clip_length=2, frame_interval=15)
    module = Detector(data.read_records("test"))
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    assert module.seen == [
        {
            "label": (2,),
            "vid": (2,),
            "frame_index": (2, 2),
            "total_frames": (2,),
            "clips": (2, 2, 3, 2, 224, 224),
            "clips_strong": (2, 2, 3, 2, 224, 224),
        }
    ]
    (logged,) = trainer.test(module, data, verbose=False)
    assert logged["auc"] == 1  # the abnormal cell is the brightest

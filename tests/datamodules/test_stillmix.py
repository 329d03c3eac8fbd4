import warnings
import zipfile

import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule
from ranks import on_ranks

from lightning_methods.datamodules import StaticBiasDataModule, VideoListDataModule, VideoSource
from lightning_methods.datamodules._video_files import write_video
from lightning_methods.datamodules.stillmix import IMAGENET_MEAN, IMAGENET_STD, twin_frame
from lightning_methods.functional import still_video
from lightning_methods.metrics import StaticBiasReport

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
SMALL = {"size": 8, "short_side": 8, "num_workers": 0, "batch_size": 2, **PLAIN}


def clip(video, frames):
    """Frame t of a video is plain grey of 10 · video + t."""
    shades = 10 * video + torch.arange(frames, dtype=torch.uint8)
    return shades[:, None, None, None].expand(frames, 3, 8, 12)


def save_frames(folder, video, frames, template, first=1):
    folder.mkdir(parents=True)
    for number, frame in enumerate(clip(video, frames)):
        image = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
        image.save(folder / template.format(number + first), quality=100)
    return folder


def pack(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
            file.unlink()
    folder.rmdir()


def shades(videos):
    """(B, T) of batches (B, T, C, H, W)."""
    return videos.mean((-3, -2, -1)).round().long().tolist()


@pytest.fixture
def hmdb51(tmp_path):
    """Folders of frames by class, and the lists of the first split."""
    root = tmp_path / "hmdb51"
    for number, (name, frames) in enumerate([("brush_hair/a", 8), ("cartwheel/b", 6), ("catch/c", 9)]):
        save_frames(root / "rawframes" / name, number, frames, "frame{:06d}.jpg")
    (root / "trainlist01.txt").write_text("brush_hair/a 8 0\ncartwheel/b 6 1\n\ncatch/c 9 2\n")
    (root / "testlist01.txt").write_text("catch/c 9 2\nbrush_hair/a 8 0\n")
    return root


def frames_source(root, name, **options):
    return VideoSource(root / name, root / "rawframes", "frames", "frame{:06d}.jpg", **options)


def first(loader):
    return next(iter(loader))


def test_frame_folders_in_the_layout_of_hmdb51(hmdb51):
    data = VideoListDataModule(
        frames_source(hmdb51, "trainlist01.txt"),
        frames_source(hmdb51, "testlist01.txt"),
        clips=4,
        num_classes=3,
        **SMALL,
    )
    data.setup("fit")
    videos, labels, index = first(data.val_dataloader())
    assert videos.shape == (2, 4, 3, 8, 8)
    assert (videos.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert shades(videos) == [[20 + t for t in (1, 3, 5, 7)], [1, 3, 5, 7]]  # middles of four parts of 9 and 8
    assert (labels.tolist(), index.tolist()) == ([2, 0], [0, 1])
    seen = [batch for _ in range(20) for batch in data.train_dataloader()]
    assert {int(i) for batch in seen for i in batch[2]} == {0, 1, 2}
    for videos, labels, index in seen:
        assert torch.equal(labels, index)
        for row, number in zip(shades(videos), index.tolist(), strict=True):
            assert row == sorted(row)
            assert {shade // 10 for shade in row} == {number}
    starts = {row[0] for videos, _, index in seen for row, i in zip(shades(videos), index, strict=True) if i == 0}
    assert starts == {0, 1}  # U{0 … a-1} with a = 2


def test_video_files_in_the_layout_of_kinetics(tmp_path):
    for number, name in enumerate(["abseiling/x", "zumba/y"]):
        write_video(tmp_path / "train" / f"{name}.mp4", clip(number, 20))
    (tmp_path / "train.txt").write_text("abseiling/x.mp4 0\nzumba/y.mp4 1\n")
    source = VideoSource(tmp_path / "train.txt", tmp_path / "train", clips=2, crops=3)
    data = VideoListDataModule(
        source, source, layout="bncthw", clips=1, clip_length=4, frame_step=2, random_crop="resized", **SMALL
    )
    data.setup("fit")
    videos, labels, _ = first(data.val_dataloader())
    assert videos.shape == (2, 2 * 3, 3, 4, 8, 8)
    assert labels.tolist() == [0, 1]
    by_clip = videos.transpose(2, 3).mean((-3, -2, -1)).round().long()
    assert by_clip[1].tolist() == [[13, 15, 17, 19]] * 3 + [[19, 21, 23, 25]] * 3  # D = 13: starts 3 and 9
    videos, _, _ = first(data.train_dataloader())
    assert videos.shape == (2, 1, 3, 4, 8, 8)


def test_the_defaults_are_the_published_ones_for_tsm(hmdb51):
    source = frames_source(hmdb51, "testlist01.txt", crops=3)
    data = VideoListDataModule(source, source, {"iid": source}, num_workers=0)
    data.setup("test")
    (loader,) = data.test_dataloader()
    videos, _, _ = first(loader)
    assert videos.shape == (2, 3, 8, 3, 224, 224)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    grey = videos[0, 0, 0].mean((1, 2)) * std + mean
    torch.testing.assert_close(grey, torch.full((3,), 20.0), atol=1.0, rtol=0)
    assert data.train_transform.short_side == 256
    assert data.train_transform.random_crop == "multiscale"


def test_lists_with_an_offset(tmp_path, hmdb51):
    (tmp_path / "list.txt").write_text("catch/c 2 4 2\ncatch/c 5 4 1\n")
    source = VideoSource(tmp_path / "list.txt", hmdb51 / "rawframes", "frames", "frame{:06d}.jpg", with_offset=True)
    data = VideoListDataModule(val=source, clips=4, **SMALL)
    data.setup("validate")
    assert shades(first(data.val_dataloader())[0]) == [[22, 23, 24, 25], [25, 26, 27, 28]]


@pytest.mark.parametrize("form", ["folders", "zips", "single images"])
def test_lists_of_kinetics_backgrounds_have_a_class_that_the_folders_lack(tmp_path, form):
    for number in range(2):
        frames = 1 if form == "single images" else 5
        folder = save_frames(tmp_path / "SCUBA" / f"v__{number}", number, frames, "{:06d}.jpg")
        if form == "zips":
            pack(folder, tmp_path / "SCUBA" / f"v__{number}.zip")
        if form == "single images":
            (folder / "000001.jpg").rename(tmp_path / "SCUBA" / f"v__{number}.jpg")
            folder.rmdir()
    frames = 1 if form == "single images" else 5
    (tmp_path / "list.txt").write_text(f"juggling/v__0 {frames} 0\njuggling/v__1 {frames} 0\n")
    kind = "frames" if form == "folders" else "auto"
    data = VideoListDataModule(val=VideoSource(tmp_path / "list.txt", tmp_path / "SCUBA", kind), clips=5, **SMALL)
    data.setup("validate")
    expected = [[0] * 5, [10] * 5] if form == "single images" else [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]]
    assert shades(first(data.val_dataloader())[0]) == expected


def test_the_listed_place_comes_before_the_one_without_a_class(tmp_path):
    save_frames(tmp_path / "a" / "v", 1, 3, "{}.jpg")
    save_frames(tmp_path / "v", 2, 3, "{}.jpg")
    (tmp_path / "list.txt").write_text("a/v 3 0\nb/v 3 0\n")
    data = VideoListDataModule(val=VideoSource(tmp_path / "list.txt", tmp_path, "frames"), clips=3, **SMALL)
    data.setup("validate")
    assert shades(first(data.val_dataloader())[0]) == [[10, 11, 12], [20, 21, 22]]


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("a 3 0\nmy video 3 0\n", "frames", r"list.txt, line 2: 'my video 3 0' has 4 fields, expected 3.*no.* spaces"),
        ("a 3 0\nb 1\n", "frames", "line 2: 'b 1' has 2 fields, expected 3, 'folder num_frames label'"),
        ("a 3 0\n", "video", "line 1: 'a 3 0' has 3 fields, expected 2, 'relative/path label'"),
        ("a 0\nb 3 0\n", "auto", "line 2: 'b 3 0' has 3 fields, expected 2"),
        ("a 3 0\nb 0\n", "auto", "line 2: 'b 0' has 2 fields, expected 3"),
        ("a x 0\n", "frames", "line 1: 'a x 0' must be 'folder num_frames label', with whole numbers"),
        ("a 3 -1\n", "frames", "line 1: 'a 3 -1' must be"),
        ("\na 0 1\n", "zip", "line 2: 'a 0 1' has no frames"),
        ("a 3 7\n", "frames", r"1 of 1 labels are outside 0 … 2; first: 7 of a"),
        ("\n", "auto", "list.txt is empty. Expected lines such as"),
    ],
)
def test_lines_that_do_not_fit_are_refused_by_number(tmp_path, text, kind, message):
    (tmp_path / "list.txt").write_text(text)
    data = VideoListDataModule(val=VideoSource(tmp_path / "list.txt", tmp_path, kind), num_classes=3, **SMALL)
    with pytest.raises(ValueError, match=message):
        data.setup("validate")


def test_missing_files_are_named(tmp_path, hmdb51):
    data = VideoListDataModule(val=VideoSource(tmp_path / "none.txt", tmp_path), **SMALL)
    with pytest.raises(FileNotFoundError, match=r"list .*none\.txt is missing\. Expected lines such as"):
        data.setup("validate")
    (tmp_path / "list.txt").write_text("catch/c 9 2\ncatch/d 9 2\ncatch/e 9 2\n")
    source = VideoSource(tmp_path / "list.txt", hmdb51 / "rawframes", "frames")
    with pytest.raises(
        FileNotFoundError, match=r"2 of 3 videos of .*list\.txt are not under .*rawframes; first: catch/d"
    ):
        VideoListDataModule(val=source, **SMALL).setup("validate")


def broken(hmdb51):
    """The second of three training videos cannot be decoded; the list has a fourth that is missing."""
    for file in (hmdb51 / "rawframes" / "cartwheel" / "b").iterdir():
        file.write_bytes(b"no picture")
    with (hmdb51 / "trainlist01.txt").open("a") as file:
        file.write("catch/d 9 2\n")
    return frames_source(hmdb51, "trainlist01.txt")


def test_errors_of_decoding_name_the_file(hmdb51):
    for file in (hmdb51 / "rawframes" / "cartwheel" / "b").iterdir():
        file.write_bytes(b"no picture")
    data = VideoListDataModule(val=frames_source(hmdb51, "trainlist01.txt"), clips=2, **SMALL)
    data.setup("validate")
    with pytest.raises(ValueError, match=r"cartwheel/b: frame frame000002\.jpg cannot be decoded"):
        list(data.val_dataloader())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_skipped_and_counted(hmdb51, workers):
    source = broken(hmdb51)
    options = {**SMALL, "num_workers": workers, "batch_size": 1}
    data = VideoListDataModule(source, source, clips=2, on_error="skip", **options)
    data.setup("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = list(data.val_dataloader())
        trained = [batch for _ in range(3) for batch in data.train_dataloader()]
    assert [batch[1].tolist() for batch in batches] == [[0], [], [2], []]
    assert [batch[0].shape for batch in batches] == [(len(batch[1]), 2, 3, 8, 8) for batch in batches]
    counts = [sum(int(batch[1]) == label for batch in trained) for label in range(3)]
    assert counts == [6, 0, 6]  # the next in the list took the place of each
    assert data.skipped == {"train": 2, "val": 2}
    with pytest.warns(UserWarning, match="could not be read") as warned:
        data.teardown("fit")
    assert [str(warning.message) for warning in warned] == [
        f"2 of 4 videos of {name!r} could not be read." for name in ("train", "val")
    ]


@pytest.mark.filterwarnings("ignore:skipped")
def test_nothing_that_can_be_read_is_an_error_in_training(hmdb51):
    for file in (hmdb51 / "rawframes").rglob("*.jpg"):
        file.write_bytes(b"no picture")
    data = VideoListDataModule(frames_source(hmdb51, "trainlist01.txt"), on_error="skip", **SMALL)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"none of the 3 videos can be read; first: .*brush_hair/a"):
        list(data.train_dataloader())


# --- static bias ----------------------------------------------------------------------------------


class Shade(LightningModule):
    """Classifies by the first frame, and keeps the report as a user would."""

    def __init__(self, names):
        super().__init__()
        self.names, self.seen = names, {}
        self.report = StaticBiasReport(["stripes"])

    def forward(self, videos):
        return torch.nn.functional.one_hot((videos[:, 0, 0, 0, 0] > 5).long(), 2).float()

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        video, label, _, *frame = batch
        self.seen.setdefault(self.names[dataloader_idx], []).append(batch)
        if frame:
            twin = still_video(video, *frame, layout="btchw")
            self.report.update(self.names[dataloader_idx], self(video), self(twin), label)

    def on_test_epoch_end(self):
        self.log_dict(self.report.compute())


@pytest.fixture
def static_bias(tmp_path):
    """Two SCUBA videos, the second of which moves from class 0 to class 1 between its first and its last frames."""
    for number in range(2):
        save_frames(tmp_path / "STRIPE" / f"v{number}__0", number, 9, "frame{:06d}.jpg")
    (tmp_path / "stripe.txt").write_text("v0__0 9 0\nv1__0 9 1\n")
    (tmp_path / "iid.txt").write_text("v1__0 9 1\n")
    stripes = VideoSource(tmp_path / "stripe.txt", tmp_path / "STRIPE", "frames", "frame{:06d}.jpg")
    iid = VideoSource(tmp_path / "iid.txt", tmp_path / "STRIPE", "frames")
    return lambda **options: StaticBiasDataModule(
        test={"iid": iid}, scuba={"stripes": stripes}, **{"clips": 9, **SMALL, **options}
    )


def test_twins_repeat_a_seeded_frame_of_the_very_clip(static_bias, trainer):
    data = static_bias(seed=3)
    assert data.test_names == ["iid", "stripes"]
    model = Shade(data.test_names)
    logged, _ = trainer().test(model, data, verbose=False)
    ((iid, _, _),) = model.seen["iid"]
    assert shades(iid) == [[10 + t for t in range(9)]]
    ((videos, labels, index, frame),) = model.seen["stripes"]
    assert (labels.tolist(), index.tolist()) == ([0, 1], [0, 1])
    assert frame.tolist() == [twin_frame(3, 9, i) for i in range(2)]
    twins = still_video(videos, frame, layout="btchw")
    assert shades(twins) == [[10 * video + int(frame[video])] * 9 for video in range(2)]
    assert logged["stripes/scuba"] == 1.0
    assert {"stripes/contrasted", "mean/scufo"} <= set(logged)


def test_twins_depend_on_seed_and_place_alone(static_bias):
    frames = {}
    for name, options in {"one": {}, "same": {"batch_size": 1}, "other": {"seed": 1}}.items():
        data = static_bias(**options)
        data.setup("test")
        frames[name] = torch.cat([batch[3] for batch in data.test_dataloader()[1]]).tolist()
    assert frames["one"] == frames["same"]
    drawn = [[twin_frame(seed, 8, index) for index in range(200)] for seed in range(2)]
    assert drawn[0] != drawn[1]
    assert set(drawn[0]) == set(range(8))
    counts = torch.tensor(drawn).flatten().bincount()
    assert counts.min() > 25


def test_twins_of_dense_clips_count_the_frames_of_a_clip(static_bias):
    data = static_bias(layout="bncthw", clips=1, clip_length=4)
    data.setup("test")
    videos, _, _, frame = first(data.test_dataloader()[1])
    assert videos.shape == (2, 1, 3, 4, 8, 8)
    assert frame.tolist() == [twin_frame(0, 4, i) for i in range(2)]
    assert still_video(videos, frame, layout="bncthw").shape == videos.shape


def test_empty_batches_have_twins_of_none(static_bias, tmp_path):
    for file in (tmp_path / "STRIPE" / "v0__0").iterdir():
        file.write_bytes(b"no picture")
    data = static_bias(on_error="skip", batch_size=1)
    data.setup("test")
    with pytest.warns(UserWarning, match="skipped: .*v0__0"):
        empty, whole = list(data.test_dataloader()[1])
    assert [len(part) for part in empty] == [0] * 4
    assert [len(part) for part in whole] == [1] * 4
    assert data.skipped == {"test/iid": 0, "test/stripes": 1}


def share_of_rank(rank, make):
    from torch.utils.data import DistributedSampler

    data = make()
    data.setup("test")
    loader = data.test_dataloader()[1]
    sampler = DistributedSampler(loader.dataset, shuffle=False)
    return [(item[2], loader.collate_fn([item])[3].item()) for item in map(loader.dataset.__getitem__, sampler)]


def test_ranks_test_the_twins_that_one_process_tests(static_bias):
    both = on_ranks(share_of_rank, static_bias)
    assert sorted(both[0] + both[1]) == [(i, twin_frame(0, 9, i)) for i in range(2)]


BAD_OPTIONS = {
    "batch_size": ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    "workers": ({"num_workers": -1}, "`num_workers` must be at least 0"),
    "layout": ({"layout": "cthw"}, "`layout` must be one of"),
    "crop": ({"random_crop": "five"}, "`random_crop` must be one of"),
    "on_error": ({"on_error": "ignore"}, "`on_error` must be one of"),
    "clips": ({"clips": 0}, "`clips` must be at least 1"),
    "test size": ({"test_size": 300}, "`test_short_side` must be at least 300, got 256"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=list(BAD_OPTIONS))
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        VideoListDataModule(**options)


def test_bad_sources_are_named():
    with pytest.raises(ValueError, match="`kind` must be one of"):
        VideoSource("list.txt", ".", "avi")
    for options in ({"clips": 0}, {"crops": 2}):
        with pytest.raises(ValueError, match="`clips` must be at least 1 and `crops` 1 or 3"):
            VideoSource("list.txt", ".", **options)
    source = VideoSource("list.txt", ".")
    with pytest.raises(ValueError, match=r"`test` and `scuba` must have different names, both have \['a'\]"):
        StaticBiasDataModule(test={"a": source}, scuba={"a": source})

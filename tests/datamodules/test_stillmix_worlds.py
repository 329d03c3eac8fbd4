import json

import pytest
import torch

from lightning_methods.datamodules import MovingShapesDataModule
from lightning_methods.datamodules import stillmix_worlds as worlds
from lightning_methods.datamodules._video_files import open_video
from lightning_methods.functional import still_video

SMALL = {"train_size": 20, "test_size": 6}
SETS = ["train", "val", "iid", "conflicting", "texture", "stripes"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def world(root):
    data = MovingShapesDataModule(root, batch_size=8, **SMALL)
    before = torch.random.get_rng_state()
    assert data.splits  # written and read once for all tests
    assert torch.equal(torch.random.get_rng_state(), before)
    return data


def pixels(videos):
    """uint8 of normalised videos."""
    return (videos * 76.5 + 114.75).round().to(torch.uint8)


def test_sets_are_read_from_lossless_video_files(world, root):
    assert list(world.splits) == SETS
    for name, (videos, labels, index, *_) in world.splits.items():
        count = 20 if name == "train" else 6
        assert videos.shape == (count, 3, 8, 24, 24)
        assert index.tolist() == list(range(count))
        lines = (root / f"{name}.txt").read_text().splitlines()
        assert lines == [f"{name}/{number:05}.mkv {label}" for number, label in enumerate(labels.tolist())]
        frames, generated = worlds._World(0).clips(name, torch.zeros(count, dtype=torch.bool))
        assert torch.equal(generated, labels)
        assert torch.equal(pixels(videos), frames.transpose(1, 2))
    with open_video(root / "train" / "00003.mkv") as video:
        assert torch.equal(video.read(range(8)).transpose(0, 1), pixels(world.splits["train"][0][3]))


def test_loaders_are_those_of_static_bias(world, trainer, model):
    loaders = world.test_dataloader()
    assert world.test_names == ("iid", "conflicting", "texture", "stripes")
    assert [len(next(iter(loader))) for loader in loaders] == [3, 3, 4, 4]
    videos, _, _, frame = next(iter(loaders[3]))
    assert still_video(videos, frame).shape == (6, 3, 8, 24, 24)
    assert 0 <= frame.min() <= frame.max() < 8
    orders = [torch.cat([batch[2] for batch in world.train_dataloader()]).tolist() for _ in range(2)]
    assert sorted(orders[0]) == list(range(20))
    assert orders[0] != list(range(20))
    trainer().fit(model, MovingShapesDataModule(world.root, batch_size=8, **SMALL))
    assert [len(batch[1]) for batch in model.seen["train"]] == [8, 8, 4]


def test_a_folder_is_reused_and_holds_one_world(world, root, monkeypatch):
    monkeypatch.setattr(worlds, "write_video", None)  # nothing is written again
    again = MovingShapesDataModule(root, **SMALL).splits
    assert all(torch.equal(again[name][0], world.splits[name][0]) for name in SETS)
    with pytest.raises(ValueError, match=r"holds another world, .*'world_seed': 0.*'world_seed': 1"):
        MovingShapesDataModule(root, world_seed=1, **SMALL).setup("fit")


def test_a_stopped_writing_starts_again(tmp_path, world, monkeypatch):
    write, written = worlds.write_video, []

    def stopping(path, clip):
        if len(written) == 25:
            raise KeyboardInterrupt
        written.append(path)
        write(path, clip)

    monkeypatch.setattr(worlds, "write_video", stopping)
    data = MovingShapesDataModule(tmp_path, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        data.setup("fit")
    monkeypatch.setattr(worlds, "write_video", write)
    assert torch.equal(data.splits["stripes"][0], world.splits["stripes"][0])
    assert json.loads((tmp_path / "world.json").read_text())["train_size"] == 20


def drawn(name, count=400, seed=0, neutral=0.0):
    data = MovingShapesDataModule(train_size=count, neutral=neutral, world_seed=seed)
    return worlds._World(seed).clips(name, data.is_neutral)


@pytest.fixture
def dark(monkeypatch):
    """No noise, and black backgrounds."""
    monkeypatch.setattr(worlds, "_NOISE", 0.0)
    monkeypatch.setattr(
        worlds._World, "_backgrounds", lambda self, name, labels, *_: torch.zeros(len(labels), 3, 24, 24)
    )


def test_the_class_is_the_direction_of_motion(dark):
    frames, labels = drawn("iid", 80)
    masks = frames.amax(2) > 0
    assert 21 <= masks.flatten(2).sum(2).min() <= masks.flatten(2).sum(2).max() <= 49
    steps = ((0, 2), (0, -2), (2, 0), (-2, 0))
    for clip, label in zip(masks, labels.tolist(), strict=True):
        assert torch.equal(clip[1:], clip[:-1].roll(steps[label], (1, 2)))


def test_conflicting_clips_have_a_second_shape_that_stays(dark):
    frames, labels = drawn("conflicting", 80)
    masks = frames.amax(2) > 0
    still = masks.all(1)  # a shape that moves covers a pixel in at most four frames
    assert (still.flatten(1).sum(1) >= 20).float().mean() > 0.9  # unless the other one keeps passing over it
    steps = torch.tensor([(0, 2), (0, -2), (2, 0), (-2, 0)])
    right = 0
    for clip, behind, label in zip(masks, still, labels.tolist(), strict=True):
        alone = clip & ~behind
        overlap = [(alone[1:] & alone[:-1].roll(tuple(step), (1, 2))).sum() for step in steps.tolist()]
        right += int(torch.stack(overlap).argmax()) == label
    assert right >= 76


def test_no_frame_and_no_place_shows_the_class():
    """Shapes start anywhere, and the sets are drawn apart."""
    frames, _ = drawn("stripes", 300)
    assert frames.unique(dim=0).shape[0] == 300
    first, second = (drawn(name, 40)[1] for name in ("iid", "stripes"))
    assert not torch.equal(first, second)


def test_still_evidence_gives_the_class_away_as_often_as_it_should():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (20_000,), generator=generator)
    for share in (0.95, 0.9):
        kinds = worlds._mostly(labels, share, generator)
        assert abs((kinds == labels).double().mean() - (share + (1 - share) / 4)) < 0.01
    world = worlds._World(0)
    assert world.textures.shape == (8, 3, 24, 24)
    frames, labels = drawn("train", 300)
    pictures = frames.float().mean(1) - frames.float().mean((1, 3, 4))[:, :, None, None]
    textures = world.textures - world.textures.mean((2, 3), keepdim=True)
    # How well each texture fits at any shift around the borders.
    product = torch.fft.fft2(pictures)[:, None] * torch.fft.fft2(textures).conj()
    fit = torch.fft.ifft2(product).real.sum(2).flatten(2).amax(2)
    own = (fit.argmax(1) // 2 == labels).double().mean()
    assert 0.9 < own < 0.99


def test_scuba_backgrounds_are_new():
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        first, second = worlds._stripes(generator).flatten(1).unique(dim=1).T
        assert (first + second - 1).abs().max() < 0.01  # two colours that complete each other
    labels = torch.zeros(30, dtype=torch.int64)
    textures = worlds._World(0)._backgrounds("texture", labels, labels > 0, generator)
    assert (torch.corrcoef(textures.flatten(1)) - torch.eye(30)).max() < 0.9


def test_neutral_clips_have_a_grey_shape_and_a_background_of_their_own(monkeypatch):
    data = MovingShapesDataModule(train_size=400, neutral=0.5, world_seed=3)
    assert 160 < data.is_neutral.sum() < 240
    assert torch.equal(data.is_neutral, data.is_neutral)
    monkeypatch.setattr(worlds, "_NOISE", 0.0)
    frames, _ = drawn("train", 400, seed=3, neutral=0.5)
    grey = (frames == 128).all(2).flatten(2).sum(2).amin(1) >= 30  # a disc of 37 pixels, in every frame
    assert torch.equal(grey, data.is_neutral)
    assert not MovingShapesDataModule().is_neutral.any()


def test_worlds_and_sets_depend_on_their_seed_alone():
    same, other = drawn("iid", 10), drawn("iid", 10, seed=1)
    assert torch.equal(drawn("iid", 10)[0], same[0])
    assert not torch.equal(other[0], same[0])
    before = torch.random.get_rng_state()
    drawn("iid", 10)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bad_options_are_named(tmp_path):
    for options, message in [
        ({"train_size": 0}, "train_size must be at least 1, got 0"),
        ({"test_size": 0}, "test_size must be at least 1, got 0"),
        ({"neutral": 1.5}, r"neutral must be in \[0, 1\], got 1.5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            MovingShapesDataModule(tmp_path, **options)

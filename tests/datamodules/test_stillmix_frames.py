"""Single frames of listed videos: which are drawn, what they are called, and that their names lead back to them."""

import copy
import pickle
import zipfile

import pytest
import torch
from PIL import Image

from lightning_methods.datamodules import VideoFrameReader, VideoSource
from lightning_methods.datamodules._video_files import VideoError, write_video
from lightning_methods.datamodules.stillmix_frames import AllFrames, RandomFrames, frame_batches, random_frame_loader

NAMES = ("brush_hair/a", "cartwheel/b", "catch/c")
COUNTS = (3, 5, 4)


def shade(video, frame):
    return 60 * video + 10 * frame + 5


def image(video, frame, size=(12, 8)):
    return Image.new("RGB", size, (shade(video, frame),) * 3)


@pytest.fixture
def folders(tmp_path):
    """Three videos as HMDB51 has them, labels 5, 6 and 7."""
    for video, (name, count) in enumerate(zip(NAMES, COUNTS, strict=True)):
        (tmp_path / "frames" / name).mkdir(parents=True)
        for frame in range(count):
            image(video, frame).save(tmp_path / "frames" / name / f"frame{frame + 1:06}.png")
    lines = (f"{name} {count} {video + 5}" for video, (name, count) in enumerate(zip(NAMES, COUNTS, strict=True)))
    (tmp_path / "list.txt").write_text("\n".join(lines))
    return VideoSource(tmp_path / "list.txt", tmp_path / "frames", "frames", "frame{:06d}.png")


@pytest.fixture
def zips(folders, tmp_path):
    """The same as ZIPs, the frames of one in a folder inside."""
    (tmp_path / "zips").mkdir()
    for video, name in enumerate(NAMES):
        target = tmp_path / "zips" / f"{name}.zip"
        target.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(target, "w") as archive:
            for file in (tmp_path / "frames" / name).iterdir():
                archive.write(file, f"inner/{file.name}" if video == 1 else file.name)
    return VideoSource(tmp_path / "list.txt", tmp_path / "zips", "zip")


@pytest.fixture
def files(tmp_path):
    pytest.importorskip("av")
    for video, (name, count) in enumerate(zip(NAMES, COUNTS, strict=True)):
        frames = torch.tensor([shade(video, frame) for frame in range(count)], dtype=torch.uint8)
        path = tmp_path / "files" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, frames[:, None, None, None].expand(count, 3, 32, 32).contiguous())
    (tmp_path / "files.txt").write_text("".join(f"{name}.mp4 {video + 5}\n" for video, name in enumerate(NAMES)))
    return VideoSource(tmp_path / "files.txt", tmp_path / "files", "video")


def near(pixels, expected):
    return (pixels.float() - expected).abs().max() <= 3  # of lossy video; ten lie between two frames


@pytest.mark.parametrize("kind", ["folders", "zips", "files"])
def test_keys_lead_back_to_the_frames_that_were_scored(kind, request):
    source = request.getfixturevalue(kind)
    every, reader = AllFrames(source, size=4, every=1), VideoFrameReader(source)
    for video in range(3):
        frames, labels, keys = every[video]
        assert frames.shape == (COUNTS[video], 3, 4, 4)
        assert frames.dtype == torch.uint8
        assert labels.tolist() == [video + 5] * COUNTS[video]
        for number, (frame, key) in enumerate(zip(frames, keys, strict=True)):
            file = f".mp4//{number}" if kind == "files" else f"/frame{number + 1:06}.png"
            assert key == f"{NAMES[video]}{file}"
            assert near(frame, shade(video, number))
            found, label = reader(key)
            assert near(found, shade(video, number))
            assert label == video + 5


def test_strides(folders, files):
    assert AllFrames(folders, size=4, every=2)[1][2] == [f"cartwheel/b/frame{number:06}.png" for number in (1, 3, 5)]
    assert len(AllFrames(folders, size=4)[1][2]) == 5, "all images"
    assert AllFrames(files, size=4)[1][2] == ["cartwheel/b.mp4//0"], "every 20th frame of a video file"


def test_stretches_of_longer_videos(folders, tmp_path):
    (tmp_path / "parts.txt").write_text("cartwheel/b 1 2 9\n")
    source = VideoSource(tmp_path / "parts.txt", tmp_path / "frames", "frames", with_offset=True)
    frames, labels, keys = AllFrames(source, size=4)[0]
    assert [int(frame[0, 0, 0]) for frame in frames] == [shade(1, 1), shade(1, 2)]
    assert keys == ["cartwheel/b/frame000002.png", "cartwheel/b/frame000003.png"]
    assert labels.tolist() == [9, 9]
    drawn = {int(RandomFrames(source, resize=4, size=4)[epoch, 0][0][0, 0, 0]) for epoch in range(20)}
    assert drawn == {shade(1, 1), shade(1, 2)}
    (tmp_path / "parts.txt").write_text("cartwheel/b 3 4 9\n")
    with pytest.raises(VideoError, match="has 5 frames, but the list has 3 … 6"):
        AllFrames(source, size=4)[0]


def test_a_long_video_is_read_in_parts(folders, monkeypatch):
    from lightning_methods.datamodules import stillmix_frames

    whole = AllFrames(folders, size=4)[1]
    monkeypatch.setattr(stillmix_frames, "_AT_ONCE", 2)
    parts = AllFrames(folders, size=4)[1]
    assert torch.equal(whole[0], parts[0])
    assert whole[2] == parts[2]


def test_frames_are_resized_without_antialiasing(tmp_path):
    (tmp_path / "v").mkdir()
    pixels = torch.randint(256, (9, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(tmp_path / "v" / "1.png")
    (tmp_path / "list.txt").write_text("v 1 0\n")
    source = VideoSource(tmp_path / "list.txt", tmp_path, "frames")
    expected = torch.nn.functional.interpolate(pixels.permute(2, 0, 1)[None].float(), (4, 4), mode="bilinear")
    assert torch.equal(AllFrames(source, size=4)[0][0], expected.round().byte())


def test_a_uniform_frame_of_each_video_an_epoch(folders):
    frames = RandomFrames(folders, resize=6, size=4, seed=3)
    counts = torch.zeros(5)
    for epoch in range(200):
        pixels, label = frames[epoch, 1]
        assert pixels.shape == (3, 4, 4)
        assert label == 6
        counts[(int(pixels[0, 0, 0]) - shade(1, 0)) // 10] += 1
    assert (counts / 200).tolist() == pytest.approx([0.2] * 5, abs=0.1)


def test_every_video_has_a_draw_of_its_own(folders, tmp_path):
    (tmp_path / "list.txt").write_text("cartwheel/b 5 6\n" * 2)
    frames = RandomFrames(folders, resize=4, size=4)
    assert any(not torch.equal(frames[epoch, 0][0], frames[epoch, 1][0]) for epoch in range(10))


def test_crops_and_flips_are_those_of_the_square(tmp_path):
    (tmp_path / "v").mkdir()
    pixels = torch.arange(36, dtype=torch.uint8).reshape(6, 6, 1).expand(6, 6, 3)
    Image.fromarray(pixels.contiguous().numpy()).save(tmp_path / "v" / "1.png")
    (tmp_path / "list.txt").write_text("v 1 0\n")
    frames = RandomFrames(VideoSource(tmp_path / "list.txt", tmp_path, "frames"), resize=6, size=5)
    square = pixels[..., 0]
    crops = [square[top : top + 5, left : left + 5] for top in range(2) for left in range(2)]
    expected = [crop for one in crops for crop in (one, one.flip(-1))]
    seen = [next(n for n, crop in enumerate(expected) if torch.equal(crop, frames[e, 0][0][0])) for e in range(60)]
    assert set(seen) == set(range(8))


def test_draws_follow_from_seed_epoch_and_index_alone(folders):
    def epoch(seed, number):
        loader = random_frame_loader(RandomFrames(folders, resize=6, size=4, seed=seed), batch_size=2)
        loader.sampler.set_epoch(number)
        return [torch.cat([frames.flatten(1).float(), labels[:, None]], 1) for frames, labels in loader]

    first = epoch(0, 0)
    assert [len(batch) for batch in first] == [2, 1]
    assert all(torch.equal(a, b) for a, b in zip(first, epoch(0, 0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, epoch(0, 1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, epoch(1, 0), strict=True))
    orders = {tuple(int(label) for batch in epoch(0, number) for label in batch[:, -1]) for number in range(10)}
    assert len(orders) > 1
    assert all(sorted(order) == [5, 6, 7] for order in orders)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_frames_go_across_videos(folders, workers):
    every = AllFrames(folders, size=4)
    batches = list(frame_batches(every, range(3), batch_size=5, num_workers=workers))
    assert [len(keys) for _, _, keys in batches] == [5, 5, 2]
    keys = [key for _, _, part in batches for key in part]
    assert keys == [key for video in range(3) for key in every[video][2]]
    assert torch.equal(torch.cat([frames for frames, _, _ in batches]), torch.cat([every[n][0] for n in range(3)]))
    assert torch.cat([labels for _, labels, _ in batches]).tolist() == [5] * 3 + [6] * 5 + [7] * 4
    (middle,) = frame_batches(every, range(1, 2), batch_size=8)
    assert len(middle[2]) == 5


def test_the_reader_opens_a_video_once_and_can_be_copied(files, monkeypatch):
    from lightning_methods.datamodules import stillmix_frames

    opened = []
    original = stillmix_frames.open_video
    monkeypatch.setattr(
        stillmix_frames, "open_video", lambda path, **k: opened.append(path.stem) or original(path, **k)
    )
    reader = VideoFrameReader(files)
    for key in ("brush_hair/a.mp4//0", "brush_hair/a.mp4//2", "catch/c.mp4//1"):
        reader(key)
    assert opened == ["a", "c"]
    for other in (copy.deepcopy(reader), pickle.loads(pickle.dumps(reader))):
        assert other == reader
        assert near(other("catch/c.mp4//1")[0], shade(2, 1))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "smile/d/frame000001.png",
            "has no video 'smile/d', of which 'smile/d/frame000001.png' should be a frame",
        ),
        ("catch/c/frame000009.png", r"has no frame 'frame000009.png', only frame000001.png"),
        ("frame000001.png", "has no video ''"),
        ("catch/c//9", "frame 9 was asked for"),
        ("catch/c//-1", "has no frame '-1'"),
        ("catch/c//first", "has no frame 'first'"),
    ],
)
def test_keys_that_lead_nowhere(folders, key, message):
    with pytest.raises(VideoError, match=message):
        VideoFrameReader(folders)(key)


def test_errors(folders, tmp_path):
    with pytest.raises(ValueError, match="`size` must be at most `resize`"):
        RandomFrames(folders, resize=4, size=5)
    with pytest.raises(ValueError, match="`every`"):
        AllFrames(folders, every=0)
    for file in (tmp_path / "frames" / "catch" / "c").iterdir():
        file.unlink()
    (tmp_path / "frames" / "catch" / "c").rmdir()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 videos .* first: catch/c"):
        AllFrames(folders)
    with pytest.raises(VideoError, match="has no video 'catch/c'"):
        VideoFrameReader(folders)("catch/c/frame000001.png")

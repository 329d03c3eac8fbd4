import random
import tracemalloc
import zipfile

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_methods.datamodules._video_files import VideoError, open_video, write_video

COUNT = 40  # frame i shows the six binary digits of i as black and white columns


def picture(number):
    digits = np.array([number >> place & 1 for place in range(6)], np.uint8)
    return np.broadcast_to(255 * digits.repeat(8)[None, :, None], (24, 48, 3)).copy()


def numbers(frames):
    """Which frames these are."""
    columns = frames.float().mean((-3, -2)).unflatten(-1, (6, 8)).mean(-1) > 127
    return (columns * 2 ** torch.arange(6)).sum(-1).tolist()


def encode(path, codec="libx264", movflags="", **options):
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 48, 24, "yuv420p"
        for number in range(COUNT):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
        container.mux(stream.encode())
    return path


def x264(**options):
    fixed = {"b-adapt": 0, "scenecut": 0, **options}
    return {"x264-params": ":".join(f"{name}={value}" for name, value in fixed.items())}


FILES = {
    "b-frames.mp4": x264(bframes=3, keyint=12),
    "open-gop.mp4": x264(bframes=3, keyint=9, **{"open-gop": 1}),
    "one-gop.mp4": x264(bframes=2, keyint=250),
    "intra.mp4": x264(keyint=1),
    "b-frames.mkv": x264(bframes=3, keyint=12),
    "b-frames.ts": x264(bframes=3, keyint=12),
    "plain.avi": {"codec": "mpeg4", "g": "7"},
    "b-frames.avi": {"codec": "mpeg4", "g": "7", "bf": "2"},
    "raw.h264": x264(bframes=3, keyint=12),
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name, options in FILES.items():
        encode(folder / name, **options)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_any_frame_of_a_video_file_can_be_read_by_its_number(videos, name):
    path = videos / name
    draw = random.Random(0)
    with open_video(path) as video:
        assert video.num_frames == COUNT
        assert numbers(torch.stack(list(video.frames()))) == list(range(COUNT))
        for number in draw.sample(range(COUNT), COUNT):
            assert numbers(video.read([number])) == [number]
        for _ in range(10):
            wanted = draw.choices(range(COUNT), k=8)  # any order, with repeats
            assert numbers(video.read(wanted)) == wanted
        assert numbers(video.read(torch.arange(COUNT))) == list(range(COUNT))


def test_the_files_have_the_b_frames_that_they_are_named_after(videos):
    for name in ("b-frames.mp4", "open-gop.mp4", "b-frames.mkv"):
        with av.open(str(videos / name)) as container:
            times = [packet.pts for packet in container.demux(video=0) if packet.size]
        assert times != sorted(times)


def test_reading_goes_to_the_key_frame_and_reading_all_frames_leaves_the_position_alone(videos, monkeypatch):
    decoded = []
    with open_video(videos / "b-frames.mp4") as video:
        numbered = video._numbered
        monkeypatch.setattr(
            video, "_numbered", lambda frames: (decoded.append(n) or (n, f) for n, f in numbered(frames))
        )
        assert numbers(video.read([38])) == [38]
        assert decoded == [36, 37, 38]
        decoded.clear()
        assert numbers(video.read([1, 25, 26])) == [1, 25, 26]
        assert decoded == [0, 1, 24, 25, 26]
        stream = video.frames()
        first = [next(stream) for _ in range(3)]
        assert numbers(video.read([30])) == [30]
        assert numbers(torch.stack([*first, next(stream)])) == [0, 1, 2, 3]


def test_lossless_video_gives_back_the_pixels(tmp_path):
    frames = torch.randint(0, 256, (5, 3, 23, 25), dtype=torch.uint8)
    write_video(tmp_path / "deep" / "clip.mp4", frames)
    with open_video(tmp_path / "deep" / "clip.mp4") as video:
        assert torch.equal(video.read(range(5)), frames)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["clip.mp4"]


def test_ordinary_video_is_close_and_plays_at_the_given_rate(tmp_path):
    frames = torch.from_numpy(np.stack([picture(number) for number in range(10)])).permute(0, 3, 1, 2)
    write_video(tmp_path / "clip.mp4", iter(frames), fps=12.5, lossless=False)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == 12.5
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
    with open_video(tmp_path / "clip.mp4") as video:
        assert numbers(video.read(range(10))) == list(range(10))


def test_what_cannot_be_encoded_leaves_no_file(tmp_path):
    with pytest.raises(VideoError, match=r"clip\.mp4: cannot be written"):
        write_video(tmp_path / "clip.mp4", torch.zeros(2, 3, 5, 5, dtype=torch.uint8), lossless=False)
    with pytest.raises(VideoError, match=r"clip\.mp4: there are no frames"):
        write_video(tmp_path / "clip.mp4", [])
    assert not list(tmp_path.iterdir())


def save_frames(folder, names):
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        Image.fromarray(picture(number)).save(folder / name)
    return folder


def pack(folder, path, inside=""):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/._img_00001.jpg", b"resource fork")
        for file in folder.iterdir():
            archive.write(file, inside + file.name)
    return path


@pytest.mark.parametrize("form", ["folder", "zip", "zip with a folder inside"])
@pytest.mark.parametrize(
    ("names", "template"),
    [
        ([f"img_{n:05}.jpg" for n in range(1, 13)], "img_{:05}.jpg"),
        ([f"frame{n:06d}.jpg" for n in range(1, 13)], "frame{:06d}.jpg"),
        ([f"{n:06d}.jpg" for n in range(12)], "{:06d}.jpg"),
        ([f"f{n}.PNG" for n in range(1, 13)], None),  # f2 before f10
        ([f"f{n}.PNG" for n in range(98, 110)], "f{}.PNG"),
    ],
)
def test_images_in_a_folder_or_an_archive(tmp_path, form, names, template):
    path = save_frames(tmp_path / "clip", names)
    (path / "notes.txt").write_text("not a frame")
    if form != "folder":
        path = pack(path, tmp_path / "clip.zip", "clip/" if "inside" in form else "")
    with open_video(path, template=template) as video:
        assert video.num_frames == 12
        assert numbers(video.read([11, 0, 9, 9])) == [11, 0, 9, 9]
        assert numbers(torch.stack(list(video.frames()))) == list(range(12))
        assert video.read([0]).shape == (1, 3, 24, 48)
        assert video.read([0]).dtype == torch.uint8


def test_a_template_passes_over_other_images(tmp_path):
    folder = save_frames(tmp_path / "clip", ["img_00001.jpg", "img_00002.jpg", "img_3.jpg", "flow_00001.jpg"])
    with open_video(folder, template="img_{:05}.jpg") as video:
        assert video.num_frames == 2
    with open_video(folder) as video:
        assert video.num_frames == 4


def test_a_single_image_is_a_video_of_one_frame(tmp_path):
    path = save_frames(tmp_path / "clip", ["a.jpg", "b.jpg"]) / "b.jpg"
    with open_video(path) as video:
        assert video.num_frames == 1
        assert numbers(video.read([0, 0])) == [1, 1]


def test_frames_in_an_array(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), dtype=np.uint8)
    np.save(tmp_path / "clip.npy", frames)
    expected = torch.from_numpy(frames).permute(0, 3, 1, 2)
    with open_video(tmp_path / "clip.npy") as video:
        assert video.num_frames == 7
        assert torch.equal(video.read([5, 0, 5]), expected[[5, 0, 5]])
        assert torch.equal(torch.stack(list(video.frames())), expected)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 4, 6, 3)), r"must hold frames \(T, H, W, 3\), uint8, found \(2, 4, 6, 3\), float64"),
        (np.zeros((2, 3, 4, 6), np.uint8), r"found \(2, 3, 4, 6\), uint8"),
        (np.zeros((4, 6, 3), np.uint8), r"found \(4, 6, 3\), uint8"),
        (np.zeros((0, 4, 6, 3), np.uint8), r"found \(0, 4, 6, 3\), uint8"),
        (np.array([{}]), r"cannot be read as a \.npy file"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, reason):
    np.save(tmp_path / "clip.npy", array)
    with pytest.raises(VideoError, match=rf"clip\.npy: .*{reason}"):
        open_video(tmp_path / "clip.npy")


def test_colours_are_rgb_and_grey_images_get_three_channels(tmp_path):
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "0.png")
    Image.new("L", (4, 4), 7).save(tmp_path / "1.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(tmp_path / "2.png")
    with open_video(tmp_path) as video:
        assert video.read([0, 1, 2])[:, :, 0, 0].tolist() == [[255, 0, 0], [7, 7, 7], [1, 2, 3]]


def broken(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


def test_errors_name_the_file_and_the_reason(tmp_path, videos):
    folder = save_frames(tmp_path / "clip", ["img_1.jpg", "img_2.jpg", "img_4.jpg"])
    (tmp_path / "empty").mkdir()
    whole = (videos / "b-frames.mp4").read_bytes()
    for path, options, reason in [
        (tmp_path / "none", {}, "no such file or folder"),
        (tmp_path / "empty", {}, "has no images"),
        (folder, {"template": "img_{}.jpg"}, "frame number 3 is missing"),
        (folder, {"template": "frame{:06d}.jpg"}, "no images named by the template, only"),
        (broken(tmp_path, "text.mp4", b"not a video" * 99), {}, "cannot be decoded"),
        (broken(tmp_path, "cut.mp4", whole[: len(whole) // 2]), {}, "cannot be decoded"),
        (broken(tmp_path, "text.zip", b"not a zip"), {"kind": "zip"}, "cannot be read as a ZIP file"),
        (broken(tmp_path, "text.npy", b"no array"), {}, "cannot be read as a .npy file"),
        (broken(tmp_path, "empty.npy", b""), {}, "cannot be read as a .npy file"),
        (videos / "b-frames.mp4", {"kind": "frames"}, "frame b-frames.mp4 cannot be decoded"),
        (videos, {"kind": "video"}, "cannot be"),
    ]:
        with pytest.raises(VideoError, match=reason) as error, open_video(path, **options) as video:
            video.read([0])
        assert str(path.parent) in str(error.value)
        assert path.name in str(error.value)


def test_the_first_part_of_a_video_is_no_shorter_video(tmp_path):
    path = encode(tmp_path / "cut.mp4", movflags="faststart", **x264(keyint=1))
    with av.open(str(path)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: ends[19]])  # twenty whole frames
    with pytest.raises(VideoError, match=rf"cut\.mp4: is cut off, it has {ends[19]} bytes of at least {max(ends)}"):
        open_video(path)


def test_errors_of_frames_name_them(tmp_path, videos):
    folder = save_frames(tmp_path / "clip", ["0.jpg", "1.jpg"])
    Image.new("RGB", (8, 8)).save(folder / "2.jpg")
    broken(folder, "3.jpg", b"\xff\xd8\xff not a picture")
    with open_video(folder) as video:
        with pytest.raises(VideoError, match=r"clip: its frames differ in size: \[\(8, 8\), \(24, 48\)\]"):
            video.read([0, 2])
        with pytest.raises(VideoError, match=r"clip: frame 3\.jpg cannot be decoded"):
            video.read([3])
        with pytest.raises(VideoError, match=r"clip: no frame was asked for"):
            video.read([])
        for index in (-1, 4):
            with pytest.raises(VideoError, match=rf"clip: frame {index} was asked for, but it has frames 0 … 3"):
                video.read([0, index])
    with pytest.raises(VideoError, match=r"mkv: frame 40 was"), open_video(videos / "b-frames.mkv") as video:
        video.read([40])


def test_a_frame_that_the_decoder_gives_up_on_is_an_error(videos, monkeypatch):
    with open_video(videos / "plain.avi") as video:
        numbered = video._numbered
        monkeypatch.setattr(video, "_numbered", lambda frames: ((n, f) for n, f in numbered(frames) if n != 5))
        with pytest.raises(VideoError, match=r"plain\.avi: frame 5 cannot be decoded"):
            video.read([4, 5, 6])


def test_a_seek_that_goes_too_far_is_made_good(videos):
    with open_video(videos / "intra.mp4") as video:
        video._keys = video._keys + 10
        assert numbers(video.read([20])) == [20]


def test_a_long_video_takes_few_bytes_a_frame(tmp_path):
    count = 3000
    write_video(tmp_path / "long.mkv", (torch.zeros(3, 8, 8, dtype=torch.uint8) for _ in range(count)))
    tracemalloc.start()
    try:
        with open_video(tmp_path / "long.mkv") as video:
            kept, most = tracemalloc.get_traced_memory()
            assert video.num_frames == count
    finally:
        tracemalloc.stop()
    assert kept < 40 * count
    assert most < 80 * count


def test_wrong_options(tmp_path):
    with pytest.raises(ValueError, match=r"`kind` must be one of \('auto', 'frames', 'zip', 'video'\), got 'avi'"):
        open_video(tmp_path, kind="avi")
    for template in ("img.jpg", "{}_{}.jpg"):
        with pytest.raises(ValueError, match="`template` must have one place for a number"):
            open_video(tmp_path, template=template)


def test_without_pyav_a_sentence_says_what_to_install(videos, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-methods\[video\]"'):
        open_video(videos / "plain.avi")


def test_sound_beside_the_frames_does_no_harm(tmp_path):
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        image, sound = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=16000)
        image.width, image.height, image.pix_fmt = 48, 24, "yuv420p"
        sound.layout = "mono"
        for number in range(COUNT):
            container.mux(image.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 640), np.float32), format="fltp", layout="mono")
            samples.sample_rate, samples.pts = 16000, 640 * number
            container.mux(sound.encode(samples))
        container.mux(image.encode())
        container.mux(sound.encode())
    with open_video(tmp_path / "clip.mp4") as video:
        assert video.num_frames == COUNT
        assert numbers(video.read([39, 3])) == [39, 3]


def test_a_file_without_a_picture_is_refused(tmp_path):
    with av.open(str(tmp_path / "song.wav"), "w") as container:
        sound = container.add_stream("pcm_s16le", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        container.mux(sound.encode(samples))
        container.mux(sound.encode())
    with pytest.raises(VideoError, match=r"song\.wav: has no video stream"):
        open_video(tmp_path / "song.wav")

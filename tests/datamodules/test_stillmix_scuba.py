import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_methods.datamodules import StaticBiasDataModule, VideoSource, build_scuba, build_scufo
from lightning_methods.datamodules import _scuba_folder as scuba_folder
from lightning_methods.datamodules._scuba_parts import fame_masks
from lightning_methods.datamodules._video_files import VideoError, open_video, write_video
from lightning_methods.functional import sinusoidal_stripes

FRAMES, HEIGHT, WIDTH = 6, 32, 48
NAMES = ["brush/a", "brush/b", "catch/c"]


def square(t):
    """Where the foreground is: it moves 4 pixels a frame."""
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[8:24, 4 * t : 4 * t + 16] = True
    return mask


def masks():
    return torch.stack([square(t) for t in range(FRAMES)])


def frames(number):
    """A square of one grey before another."""
    ground = torch.full((FRAMES, 3, HEIGHT, WIDTH), 20 * number, dtype=torch.uint8)
    return ground.masked_fill(masks()[:, None], 100 + 20 * number)


def save(folder, pictures, template="frame{:06d}.png"):
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures, 1):
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy().squeeze()).save(folder / template.format(number))


@pytest.fixture
def world(tmp_path):
    for number, name in enumerate(NAMES):
        save(tmp_path / "videos" / name, frames(number))
        save(tmp_path / "masks" / name, 255 * masks()[:, None].byte())
    for number in range(3):
        (tmp_path / "places").mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (250, 10 * number, 0)).save(tmp_path / "places" / f"{number}.png")
    lines = (f"{name} {FRAMES} {label}\n" for name, label in zip(NAMES, (0, 0, 1), strict=True))
    (tmp_path / "list.txt").write_text("".join(lines))
    return tmp_path


def source(world, **options):
    return VideoSource(world / "list.txt", world / "videos", "frames", **options)


def read(path, **options):
    with open_video(path, **options) as video:
        return video.read(range(video.num_frames))


def manifest(out):
    return json.loads((out / "manifest.json").read_text())


def close(found, expected):
    """Up to what JPEG does to edges."""
    return (found.float() - expected.float()).abs().mean() < 6


def test_foreground_moves_before_an_image_of_the_folder(world):
    out = world / "out"
    path = build_scuba(source(world), world / "masks", world / "places", out, per_video=2, seed=3)
    names = [f"{name}__{k}" for name in NAMES for k in range(2)]
    assert path.read_text().splitlines() == [f"{name} {FRAMES} {int('catch' in name)}" for name in names]
    records = manifest(out)["videos"]
    assert list(records) == names
    for name in names:
        found = read(out / name, template="frame{:06d}.jpg")
        number = NAMES.index(name.split("__")[0])
        green = 10 * int(records[name]["background"].removesuffix(".png"))
        background = torch.tensor([250, green, 0])[None, :, None, None].expand(FRAMES, 3, HEIGHT, WIDTH)
        assert close(found, torch.where(masks()[:, None], frames(number), background))
        assert records[name]["seed"] == 3
        assert records[name]["masks"] == str(world / "masks")
    assert len({record["background"] for record in records.values()}) > 1
    assert not list(out.rglob(".*"))


def test_the_set_can_be_tested_with_its_twins(world):
    path = build_scuba(source(world), world / "masks", "stripes", world / "out", per_video=1, seed=0)
    data = StaticBiasDataModule(
        scuba={"stripes": VideoSource(path, world / "out", "frames", "frame{:06d}.jpg")},
        clips=FRAMES,
        size=HEIGHT,
        short_side=HEIGHT,
        num_workers=0,
    )
    data.setup("test")
    (batch,) = data.test_dataloader()[0]
    assert batch[0].shape == (3, FRAMES, 3, HEIGHT, HEIGHT)
    assert batch[1].tolist() == [0, 0, 1]


def test_stripes_are_those_of_the_manifest(world):
    out = world / "out"
    build_scuba(source(world), lambda name, frames: torch.zeros(len(frames), HEIGHT, WIDTH), "stripes", out, seed=1)
    records = manifest(out)["videos"]
    assert len(records) == 15
    draws = {json.dumps(record["background"]) for record in records.values()}
    assert len(draws) == 15
    name, record = next(iter(records.items()))
    draw = {**record["background"], "color": tuple(record["background"]["color"])}
    stripes = Image.fromarray(sinusoidal_stripes(**draw).permute(1, 2, 0).numpy())
    expected = torch.from_numpy(np.array(stripes.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    assert (read(out / name)[0].float() - expected.float()).abs().mean() < 15  # JPEG of thin stripes
    assert record["masks"] == "<lambda>"


def test_a_conflicting_foreground_comes_from_another_class(world):
    out = world / "out"
    build_scuba(source(world), world / "masks", world / "places", out, per_video=3, seed=0, conflicting=True)
    for name, record in manifest(out)["videos"].items():
        still = record["still"]
        other = NAMES.index(still["source"])
        assert (other == 2) != (record["label"] == 1)
        green = 10 * int(record["background"].removesuffix(".png"))
        expected = torch.tensor([250, green, 0])[None, :, None, None].repeat(FRAMES, 1, HEIGHT, WIDTH)
        expected = torch.where(square(still["frame"]), frames(other)[still["frame"]], expected)
        expected = torch.where(masks()[:, None], frames(NAMES.index(record["source"])), expected)
        assert close(read(out / name), expected)
    frozen = {record["still"]["frame"] for record in manifest(out)["videos"].values()}
    assert len(frozen) > 1


@pytest.mark.parametrize("form", ["zip", "video", "jhmdb"])
def test_masks_come_in_several_forms(world, form):
    root = world / "other"
    for name in NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if form == "zip":
            with zipfile.ZipFile(root / f"{name}.zip", "w") as archive:
                for file in sorted((world / "masks" / name).iterdir()):
                    archive.write(file, file.name)
        elif form == "video":
            write_video(root / name / "mask.mp4", 255 * masks()[:, None].byte().expand(-1, 3, -1, -1))
            (root / name / "mask.mp4").replace(root / f"{name}.mp4")
            (root / name).rmdir()
            (root / f"{name}.mp4").rename(root / name)
        else:
            from scipy.io import savemat

            (root / name).mkdir()
            savemat(root / name / "puppet_mask.mat", {"part_mask": masks().permute(1, 2, 0).byte().numpy()})
    build_scuba(source(world), world / "masks", world / "places", world / "one", per_video=1, seed=0)
    build_scuba(source(world), root, world / "places", world / "two", per_video=1, seed=0)
    for name in NAMES:
        assert torch.equal(read(world / "one" / f"{name}__0"), read(world / "two" / f"{name}__0"))


def test_masks_of_another_size_are_fitted(world):
    for name in NAMES:
        for file in (world / "masks" / name).iterdir():
            image = Image.open(file)
            image.resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.NEAREST).save(file)
    build_scuba(source(world), world / "masks", world / "places", world / "out", per_video=1, seed=0)
    found = read(world / "out" / "catch/c__0")
    assert (found[0, 1, 10:22, 2:14].float() - 140).abs().max() < 12


def test_without_masks_what_moves_is_the_foreground(world):
    build_scuba(source(world), None, world / "places", world / "out", per_video=1, seed=0)
    assert manifest(world / "out")["videos"]["brush/a__0"]["masks"] == "fame"
    for length in (2, 16, 17, 18, 33):
        pictures = torch.randint(0, 256, (length, 3, 16, 16), dtype=torch.uint8)
        found = fame_masks("v", pictures)
        assert found.shape == (length, 16, 16)
        assert found.flatten(1).sum(1).tolist() == [128] * length
        changes = [t for t in range(1, length) if not torch.equal(found[t], found[t - 1])]
        assert changes == {18: [16], 33: [16]}.get(length, [])  # 17 = 16 + 1: the last one joins
    with pytest.raises(VideoError, match="v: has one frame"):
        fame_masks("v", pictures[:1])


def test_video_files_lose_their_suffix(world):
    for number, name in enumerate(NAMES):
        write_video(world / "videos" / f"{name}.v2.mp4", frames(number))
    (world / "list.txt").write_text("".join(f"{name}.v2.mp4 {number}\n" for number, name in enumerate(NAMES)))
    videos = VideoSource(world / "list.txt", world / "videos", "video")
    path = build_scuba(videos, None, "stripes", world / "out", per_video=1, seed=0)
    assert path.read_text() == "".join(f"{name}.v2__0 {FRAMES} {number}\n" for number, name in enumerate(NAMES))


def test_draws_depend_on_seed_and_name_alone(world):
    def backgrounds(out, seed=0):
        build_scuba(source(world), world / "masks", "stripes", world / out, per_video=2, seed=seed)
        return {name: record["background"] for name, record in manifest(world / out)["videos"].items()}

    first = backgrounds("one")
    (world / "list.txt").write_text("\n".join(reversed((world / "list.txt").read_text().splitlines()[1:])))
    second = backgrounds("two")
    assert second == {name: first[name] for name in second}
    assert len(second) == 4
    assert not [name for name, drawn in backgrounds("three", seed=1).items() if drawn == first[name]]


def test_a_stopped_call_is_continued(world, monkeypatch):
    def tree(out):
        return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}

    arguments = (source(world), world / "masks", "stripes")
    build_scuba(*arguments, world / "whole", per_video=2, seed=0)
    saved, save = [], scuba_folder._save

    def stopping(frame, path):
        if len(saved) == 2 * FRAMES + 9:
            raise KeyboardInterrupt
        saved.append(path)
        save(frame, path)

    monkeypatch.setattr(scuba_folder, "_save", stopping)
    with pytest.raises(KeyboardInterrupt):
        build_scuba(*arguments, world / "out", per_video=2, seed=0)
    assert not (world / "out" / "list.txt").exists()
    assert sorted(path.name for path in (world / "out" / "brush").iterdir()) == ["a__0", "a__1", "b__0"]
    with (world / "out" / ".journal.jsonl").open("a") as file:
        file.write('["brush/b", {"br')  # as a power cut would leave it
    saved.clear()
    build_scuba(*arguments, world / "out", per_video=2, seed=0)
    assert len(saved) == 3 * FRAMES
    assert tree(world / "out") == tree(world / "whole")
    saved.clear()
    monkeypatch.setattr("lightning_methods.datamodules.stillmix_scuba.open_video", None)  # nothing is read again
    build_scuba(*arguments, world / "out", per_video=2, seed=0)
    assert not saved
    assert tree(world / "out") == tree(world / "whole")


def test_a_folder_holds_one_set(world):
    build_scuba(source(world), world / "masks", "stripes", world / "out", per_video=1, seed=0)
    for changed, name in [({"per_video": 2}, "per_video"), ({"seed": 1}, "seed"), ({"conflicting": True}, "kind")]:
        with pytest.raises(ValueError, match=f"holds a set made with other arguments: `{name}` was"):
            build_scuba(
                source(world), world / "masks", "stripes", world / "out", **{"per_video": 1, "seed": 0, **changed}
            )


def test_small_foregrounds_can_be_left_out(world):
    def read_masks(name, frames):
        return masks() if name != "brush/b" else masks() & False

    options = {"per_video": 1, "seed": 0}
    build_scuba(source(world), read_masks, "stripes", world / "all", **options)
    build_scuba(source(world), read_masks, "stripes", world / "out", valid_only=True, **options)
    assert "brush/b__0" in manifest(world / "all")["videos"]
    assert list(manifest(world / "out")["videos"]) == ["brush/a__0", "catch/c__0"]
    assert manifest(world / "out")["skipped"] == {"brush/b": "its foreground is too small"}


def test_what_cannot_be_read_stops_or_is_skipped(world):
    for file in (world / "videos" / "brush/a").iterdir():
        file.write_bytes(b"no picture")
    (world / "masks" / "brush/b" / "frame000001.png").unlink()
    arguments = (source(world), world / "masks", "stripes", world / "out")
    with pytest.raises(VideoError, match=r"videos/brush/a: frame frame000001\.png cannot be decoded"):
        build_scuba(*arguments, per_video=1, seed=0)
    build_scuba(*arguments, per_video=1, seed=0, on_error="skip")
    skipped = manifest(world / "out")["skipped"]
    assert list(skipped) == ["brush/a", "brush/b"]
    assert "has 5 masks for the 6 frames of brush/b" in skipped["brush/b"]
    (world / "list.txt").write_text("brush/a 6 0\n")
    with pytest.raises(ValueError, match=r"no video could be made; first: brush/a: .* cannot be decoded"):
        build_scuba(source(world), world / "masks", "stripes", world / "none", per_video=1, seed=0, on_error="skip")


def test_other_errors_name_what_is_wrong(world):
    videos, out = source(world), world / "out"
    (world / "empty").mkdir()
    (world / "grey").mkdir()
    Image.new("L", (8, 8)).save(world / "grey" / "0.png")
    with pytest.raises(ValueError, match="`per_video` must be at least 1"):
        build_scuba(videos, None, "stripes", out, per_video=0, seed=0)
    with pytest.raises(VideoError, match="empty: has no background images"):
        build_scuba(videos, None, world / "empty", out, seed=0)
    with pytest.raises(VideoError, match="empty: has no masks of brush/a"):
        build_scuba(videos, world / "empty", "stripes", world / "out2", seed=0)
    with pytest.raises(VideoError, match="grey: 100 images drawn from it are all grey"):
        build_scuba(videos, None, world / "grey", world / "out3", seed=0)
    (world / "list.txt").write_text("brush/a 6 0\nbrush/a 6 0\n")
    with pytest.raises(ValueError, match="brush/a is in the list twice"):
        build_scuba(videos, None, "stripes", world / "out4", seed=0)
    (world / "list.txt").write_text("brush/a 6 0\n")
    with pytest.raises(ValueError, match="`conflicting` needs at least two videos"):
        build_scuba(videos, None, "stripes", world / "out5", seed=0, conflicting=True)


def test_grey_backgrounds_are_drawn_anew_and_transparency_is_dropped(world):
    for number in range(6):
        Image.new("L", (8, 8), 99).save(world / "places" / f"grey{number}.png")
    Image.new("RGBA", (8, 8), (1, 200, 3, 0)).save(world / "places" / "clear.png")
    build_scuba(source(world), world / "masks", world / "places", world / "out", per_video=12, seed=0)
    drawn = {record["background"]: name for name, record in manifest(world / "out")["videos"].items()}
    assert set(drawn) == {"0.png", "1.png", "2.png", "clear.png"}
    corner = read(world / "out" / drawn["clear.png"])[0, :, 0, -1]
    assert (corner.int() - torch.tensor([1, 200, 3])).abs().max() < 8


def test_scufo_is_a_frame_of_each_video(world):
    path = build_scuba(source(world), world / "masks", world / "places", world / "out", per_video=4, seed=0)
    scuba = VideoSource(path, world / "out", "frames", "frame{:06d}.jpg")
    found = build_scufo(scuba, world / "scufo", seed=5)
    assert found.read_text() == path.read_text().replace(f" {FRAMES} ", " 1 ")
    records = manifest(world / "scufo")["videos"]
    for name, record in records.items():
        still = read(world / "scufo" / f"{name}.jpg")
        assert close(still[0], read(world / "out" / name)[record["frame"]])
    assert len({record["frame"] for record in records.values()}) > 2
    again = build_scufo(scuba, world / "again", seed=5)
    assert manifest(again.parent)["videos"] == records
    build_scufo(scuba, world / "scufo", seed=5)  # finished: nothing to do
    with pytest.raises(ValueError, match="holds a set made with other arguments: `kind` was 'scuba' and is 'scufo'"):
        build_scufo(scuba, world / "out", seed=5)

"""`lightning-methods score-frames` on tiny videos: what it writes, and that a stopped call goes on as if it had not."""

import shutil
import warnings

import pytest
import timm
import torch
from PIL import Image

from lightning_methods.cli import main as cli
from lightning_methods.commands import score_frames as command
from lightning_methods.commands.score_frames import main
from lightning_methods.datamodules import VideoFrameReader, VideoSource
from lightning_methods.modules import FrameBankSpec, SingleFrameClassifier, load_frame_scores

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and the like

SMALL = "--network test_resnet --weights none --epochs 3 --milestones 2 --lr 0.05 --batch-size 4 --resize 36 --size 32"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Six videos of two classes; in every second one the colour says the class, the others are grey."""
    root = tmp_path_factory.mktemp("videos")
    lines = []
    for video in range(6):
        (root / f"v{video}").mkdir()
        for frame in range(3):
            colour = (120, 120, 120) if video % 3 == 2 else (250, 20, 20) if video % 2 else (20, 250, 20)
            Image.new("RGB", (40, 34), tuple(value + frame for value in colour)).save(
                root / f"v{video}" / f"img_{frame + 1:05}.png"
            )
        lines.append(f"v{video} 3 {video % 2}\n")
    (root / "train.txt").write_text("".join(lines))
    return root


def call(videos, out, *more, options=SMALL):
    given = ["--list", str(videos / "train.txt"), "--root", str(videos), "--out", str(out), "--accelerator", "cpu"]
    with torch.random.fork_rng(), warnings.catch_warnings():
        return main([*given, "--workers", "0", "--videos-per-part", "2", *options.split(), *more])


@pytest.fixture(scope="module")
def unbroken(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "scores.npz"
    assert call(videos, out) == 0
    return out


def same_scores(first, second):
    first, second = load_frame_scores(first), load_frame_scores(second)
    return first.keys == second.keys and all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))


def test_scores_are_those_of_the_network_that_was_trained(videos, unbroken):
    scores = load_frame_scores(unbroken)
    assert scores.keys == tuple(f"v{video}/img_{frame + 1:05}.png" for video in range(6) for frame in range(3))
    network = SingleFrameClassifier("test_resnet", 2, pretrained=False).eval()
    network.load_state_dict(torch.load(unbroken.with_name("scores.npz.work") / "network.pt"))
    reader = VideoFrameReader(VideoSource(videos / "train.txt", videos, "frames"))
    for key, target_prob, top_prob in zip(*scores, strict=True):
        frame, label = reader(key)
        frame = torch.nn.functional.interpolate(frame[None].float(), (32, 32), mode="bilinear").round().byte()
        with torch.no_grad():
            probs = network(frame).softmax(1)[0]
        assert target_prob.item() == pytest.approx(probs[label].item(), abs=1e-4)
        assert top_prob.item() == pytest.approx(probs.max().item(), abs=1e-4)


def test_a_bank_is_made_of_them(videos, unbroken):
    reader = VideoFrameReader(VideoSource(videos / "train.txt", videos))
    bank = FrameBankSpec(unbroken, reader, size=8, bank_size=4, low=0.5).build()
    assert bank.frames.shape == (4, 3, 8, 8)
    assert bank.targets.tolist() == [int(key[1]) % 2 for key in bank.keys]


def test_training_finds_the_frames_that_betray_their_class(videos, tmp_path):
    options = SMALL.replace("--epochs 3 --milestones 2", "--epochs 40 --milestones 30")
    assert call(videos, tmp_path / "scores.npz", options=options) == 0
    scores = load_frame_scores(tmp_path / "scores.npz")
    grey = torch.tensor([key[1] in "25" for key in scores.keys])
    assert scores.top_prob[grey].max() < scores.top_prob[~grey].min()
    assert (scores.target_prob[~grey] == scores.top_prob[~grey]).all(), "right where there is something to see"


@pytest.mark.parametrize("stop", ["training", "scoring"])
def test_a_stopped_call_goes_on_and_ends_like_the_unbroken_one(videos, unbroken, tmp_path, stop, monkeypatch, capsys):
    out, seen = tmp_path / "scores.npz", []
    name = {"training": "_Epochs", "scoring": "score_frames"}[stop]
    original = getattr(command, name)

    def interrupted(*args, **kwargs):
        seen.append(args)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    if stop == "training":
        monkeypatch.setattr(original, "on_train_epoch_start", stopping(original.on_train_epoch_start))
    else:
        monkeypatch.setattr(command, name, interrupted)
    assert call(videos, out) == 130
    assert "To go on: lightning-methods score-frames --list" in capsys.readouterr().err
    assert not out.exists()
    kept = {path.name[:15] for path in out.with_name("scores.npz.work").iterdir()}
    of_stop = {"training": {"training.ckpt"}, "scoring": {"network.pt", "scores-00000000"}}
    assert kept == {"settings.json"} | of_stop[stop]
    monkeypatch.undo()

    done = []
    monkeypatch.setattr(command, "score_frames", lambda *a, **k: done.append(1) or score_frames(*a, **k))
    monkeypatch.setattr(command, "_train", lambda *a: done.append("train") or train(*a)) if stop == "training" else None
    assert call(videos, out, "--resume") == 0
    assert done.count(1) == (3 if stop == "training" else 2), "what was scored before is not scored again"
    assert same_scores(out, unbroken)


score_frames, train = command.score_frames, command._train


def stopping(hook):
    def stopped(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt
        return hook(self, trainer, pl_module)

    return stopped


def test_a_list_that_was_mended_is_scored_where_it_changed(videos, tmp_path, monkeypatch):
    out, lines = tmp_path / "scores.npz", (videos / "train.txt").read_text().splitlines()
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert call(videos, out, "--list", str(tmp_path / "list.txt")) == 0
    (tmp_path / "list.txt").write_text("\n".join([*lines[:3], *lines[4:]]))
    done = []
    monkeypatch.setattr(command, "score_frames", lambda *a, **k: done.append(1) or score_frames(*a, **k))
    assert call(videos, out, "--list", str(tmp_path / "list.txt"), "--resume") == 0
    assert len(done) == 2, "the first part is as it was"
    found = {key.partition("/")[0] for key in load_frame_scores(out).keys}
    assert found == {"v0", "v1", "v2", "v4", "v5"}


def test_another_seed_gives_other_scores(videos, unbroken, tmp_path):
    assert call(videos, tmp_path / "scores.npz", "--seed", "1") == 0
    assert not same_scores(tmp_path / "scores.npz", unbroken)


def test_what_belongs_to_other_settings_is_not_mixed(videos, unbroken, capsys):
    assert call(videos, unbroken) == 1
    assert "already holds results: continue them with --resume" in capsys.readouterr().err
    assert call(videos, unbroken, "--resume", "--seed", "7", "--every", "2") == 1
    assert "other settings: every is null there and 2 here; seed is" in capsys.readouterr().err
    assert call(videos, unbroken, "--resume", "--workers", "1") == 0


def test_weights_to_start_with_come_from_a_file(videos, tmp_path):
    given = timm.create_model("test_resnet", num_classes=1000)
    torch.save(given.state_dict(), tmp_path / "weights.pt")
    options = SMALL.replace("none", str(tmp_path / "weights.pt")).replace("--lr 0.05", "--lr 1e-9")
    assert call(videos, tmp_path / "scores.npz", "--num-classes", "5", options=options) == 0
    network = torch.load(tmp_path / "scores.npz.work" / "network.pt")
    same = [
        torch.allclose(network[f"model.{name}"], value, atol=1e-5)
        for name, value in given.named_parameters()
        if network[f"model.{name}"].shape == value.shape
    ]
    assert len(same) > 10
    assert all(same)
    assert [len(value) for name, value in network.items() if name.endswith("fc.weight")] == [5]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--list", "none.txt"], "list none.txt is missing"),
        (["--root", "nowhere"], "6 of 6 videos"),
        (["--size", "64"], "`size` must be at most `resize`"),
        (["--lr", "0"], "`lr` must be positive"),
        (["--network", "resnet5O"], "timm has no model 'resnet5O'. It has resnet50"),
    ],
)
def test_errors_are_a_sentence(videos, tmp_path, more, message, capsys):
    assert call(videos, tmp_path / "scores.npz", *more) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.iterdir()), "a folder of results is for options that work"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_damaged_video_is_named_without_a_traceback(videos, tmp_path, workers, capsys):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "cut.mp4").write_bytes(b"no video")
    (tmp_path / "list.txt").write_text("cut.mp4 0\n")
    given = ("--list", str(tmp_path / "list.txt"), "--root", str(tmp_path / "videos"), "--workers", workers)
    assert call(videos, tmp_path / "scores.npz", *given) == 1
    error = capsys.readouterr().err.partition("error: ")[2]
    assert error.startswith(f"{tmp_path / 'videos' / 'cut.mp4'}: cannot be decoded")
    assert error.count("\n") == 1


def test_videos_that_cannot_be_read_are_skipped_and_counted(videos, unbroken, tmp_path, capsys):
    lines = (videos / "train.txt").read_text()
    folder = tmp_path / "videos"
    shutil.copytree(videos, folder)
    for name in ("v0", "v1"):  # a whole part
        (folder / name / "img_00002.png").write_bytes(b"no image")
    (tmp_path / "list.txt").write_text(f"{lines}v9 3 1\n")
    given = ("--list", str(tmp_path / "list.txt"), "--root", str(folder), "--skip-errors")
    assert call(videos, tmp_path / "scores.npz", *given) == 0
    assert "3 of 7 videos could not be read; first: v0" in capsys.readouterr().err
    expected = [key for key in load_frame_scores(unbroken).keys if key[:2] not in ("v0", "v1")]
    assert list(load_frame_scores(tmp_path / "scores.npz").keys) == expected


def test_it_is_a_command_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        cli(["score-frames", "--help"])
    assert stop.value.code == 0
    assert "single frames" in capsys.readouterr().out

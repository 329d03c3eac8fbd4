"""`lightning-methods score-video` on a real video file, against one clip after the other."""

import csv
import gc
import re
import sys
import textwrap
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer

from lightning_methods.commands import score_video
from lightning_methods.commands._video_scores import stream_cells
from lightning_methods.commands.score_video import main
from lightning_methods.datamodules import UCFCrimeDataModule
from lightning_methods.datamodules._frame_source import FrameSource
from lightning_methods.datamodules._video_files import open_video, write_video
from lightning_methods.datamodules._wsvad_clips import ClipShape

FRAMES = 157  # five cells of 30 frames and one of 7
NAME = "Abuse028_x264.mp4"

#: A user's file.
USER = """
    import torch
    from pytorch_lightning import LightningModule

    calls = []
    stop_at = None

    def brightness(batch):
        calls.append(batch)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return torch.sigmoid(batch["clips"].mean((1, 2, 3, 4, 5)))

    def column(batch):
        return brightness(batch)[:, None]

    def pairs(batch):
        return torch.stack([torch.zeros(len(batch["clips"])), brightness(batch).logit()], 1)

    def pairs_of_snippets(batch):
        return pairs(batch)[:, None].half().float()

    def wrong_shape(batch):
        return torch.zeros(len(batch["clips"]), 3)

    def no_tensor(batch):
        return [0.0]

    def undefined(batch):
        return torch.where(batch["snippet_index"][:, 0] == 3, torch.nan, 0.0)

    def broken(batch):
        raise ValueError("a fault of the user's own")

    class Detector(LightningModule):
        def __init__(self, scale=1.0):
            super().__init__()
            self.save_hyperparameters()
            self.weight = torch.nn.Parameter(torch.tensor(scale))
            self.dropout = torch.nn.Dropout(0.9)

        def forward(self, batch):
            return torch.sigmoid(self.weight * self.dropout(batch["clips"]).mean((2, 3, 4, 5)))

    class Demanding(LightningModule):
        def __init__(self, width):
            super().__init__()

    class Plain:
        pass

    number = 3
"""


def level(number):
    """Rises and falls over the video."""
    return int(120 + 100 * np.sin(number / 20))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / NAME
    write_video(path, (torch.full((3, 24, 32), level(number), dtype=torch.uint8) for number in range(FRAMES)))
    return path


@pytest.fixture
def user(tmp_path, monkeypatch):
    """The user's module, in the current folder."""
    (tmp_path / "user_model.py").write_text(textwrap.dedent(USER))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "user_model", raising=False)
    import user_model

    yield user_model
    sys.modules.pop("user_model", None)


def run(*videos, model="user_model:brightness", **options):
    flags = [f"--{name.replace('_', '-')}{'' if value is True else f'={value}'}" for name, value in options.items()]
    return main([*map(str, videos), "--model", model, "--out", "out", *flags])


def table(name=NAME, out="out"):
    rows = list(csv.reader(Path(out, f"{name}.csv").read_text().splitlines()))
    assert rows[0] == ["frame", "score"]
    assert [int(row[0]) for row in rows[1:]] == list(range(len(rows) - 1))
    return np.array([float(row[1]) for row in rows[1:]])


def plain_scores():
    """Of the six cells: brightness of the clip, as the weak view normalises it."""
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    found = []
    for start in range(0, FRAMES, 30):
        length = min(30, FRAMES - start)
        grey = np.array([level(start + 6 * t % length) for t in range(5)])
        found.append(1 / (1 + np.exp(-((grey[:, None] - mean) / std).mean())))
    return found


def stretched(scores):
    ratio = FRAMES / len(scores)
    edges = [int(i * ratio + 0.5) for i in range(len(scores) + 1)]
    return np.repeat(scores, np.diff(edges))


def test_table_has_the_score_of_every_frame(user, video, capsys):
    assert run(video) == 0
    np.testing.assert_allclose(table(), stretched(plain_scores()), rtol=1e-5)
    best = int(np.argmax(plain_scores()))
    edges = [int(i * FRAMES / 6 + 0.5) for i in range(7)]
    said = f"highest score {plain_scores()[best]:.3f}, in frames {edges[best]} … {edges[best + 1] - 1}"
    assert said in capsys.readouterr().out
    files = sorted(path.name for path in Path("out").iterdir())
    assert files == [f"{NAME}.csv", f"{NAME}.png", "parts", "settings.json"]
    assert not list(Path("out/parts").iterdir())


def test_scores_are_those_of_testing_on_ucf_crime(user, video, tmp_path):
    (tmp_path / "test.txt").write_text(f"{NAME} {FRAMES} 1 30 60 -1 -1\n")
    data = UCFCrimeDataModule(video.parent, tmp_path / "none.txt", tmp_path / "test.txt", num_workers=0)
    data.setup("test")
    with open_video(video) as source:
        bags = list(stream_cells(source, ClipShape(1, 5, 6)))
    for bag, expected in zip(bags, data.datasets["test"], strict=True):
        assert bag.keys() == expected.keys() - {"label"}
        for name, values in bag.items():
            torch.testing.assert_close(values, expected[name], atol=1e-5, rtol=0)


def test_batches_are_what_a_model_is_promised(user, video):
    assert run(video, batch_size=4) == 0
    shapes = [{name: tuple(values.shape) for name, values in batch.items()} for batch in user.calls]
    assert shapes == [
        {
            "clips": (count, 1, 3, 5, 224, 224),
            "vid": (count,),
            "snippet_index": (count, 1),
            "frame_index": (count, 1),
            "total_frames": (count,),
        }
        for count in (4, 2)
    ]
    assert torch.cat([batch["snippet_index"] for batch in user.calls]).flatten().tolist() == list(range(6))


@pytest.mark.parametrize("function", ["column", "pairs", "pairs_of_snippets"])
def test_other_forms_of_scores(user, video, function):
    assert run(video, model=f"user_model:{function}") == 0
    np.testing.assert_allclose(table(), stretched(plain_scores()), rtol=1e-2 if "snippets" in function else 1e-4)


def test_a_module_and_its_checkpoint(user, video, tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(user.Detector(scale=2.0))
    trainer.save_checkpoint(tmp_path / "detector.ckpt")
    assert run(video, model="user_model.Detector", checkpoint=tmp_path / "detector.ckpt") == 0
    logits = np.log(plain_scores()) - np.log1p(-np.array(plain_scores()))
    np.testing.assert_allclose(table(), stretched(1 / (1 + np.exp(-2 * logits))), rtol=1e-4)  # dropout is off


def test_other_clips_and_windows(user, video):
    assert run(video, clip_length=2, frame_interval=10, windows=32) == 0
    assert torch.cat([batch["frame_index"] for batch in user.calls]).flatten().tolist()[:3] == [10, 30, 50]
    assert len(user.calls[0]["clips"]) == 8  # cells of 20 frames, and one of 17
    found = table()
    assert len(found) == FRAMES
    assert all(np.ptp(found[4 * k : 4 * k + 4]) == 0 for k in range(32))


def test_a_folder_of_frames(user, tmp_path):
    folder = tmp_path / "frames" / "clip"
    folder.mkdir(parents=True)
    for number in range(FRAMES):
        Image.new("RGB", (32, 24), (level(number),) * 3).save(folder / f"img_{number:08d}.png")
    assert run(folder) == 0
    np.testing.assert_allclose(table("clip"), stretched(plain_scores()), rtol=1e-5)


# --- plot -----------------------------------------------------------------------------------------


def red_columns(path):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    red = (pixels[..., 0] > 230) & (pixels[..., 1] < 225) & (abs(pixels[..., 1] - pixels[..., 2]) < 3)
    return np.flatnonzero(red.sum(0) > 0.3 * len(pixels))


ANNOTATIONS = {
    "list": f"Abuse/{NAME} {FRAMES} 1 30 60 100 130\nOther/Other.mp4 50 2 1 9 -1 -1\n",
    "temporal annotations": f"{NAME}  Abuse  30  60  100  130\nNormal.mp4  Normal  -1  -1  -1  -1\n",
}


@pytest.mark.parametrize("form", ANNOTATIONS)
def test_plot_shows_the_annotated_frames(user, video, tmp_path, form):
    (tmp_path / "annotation.txt").write_text(ANNOTATIONS[form])
    assert run(video, annotation="annotation.txt") == 0
    columns = red_columns(f"out/{NAME}.png")
    gaps = np.flatnonzero(np.diff(columns) > 5)
    assert len(gaps) == 1  # two spans
    width = np.split(columns, gaps + 1)
    assert abs(len(width[0]) - len(width[1])) <= 3
    axes = len(width[0]) / 30 * FRAMES  # columns of the whole video
    assert (width[1][0] - width[0][0]) / axes == pytest.approx(70 / FRAMES, abs=0.02)


def test_plot_without_annotation(user, video, tmp_path, capsys):
    (tmp_path / "annotation.txt").write_text("Other.mp4 50 2 1 9\n")
    assert run(video, annotation="annotation.txt") == 0
    assert not len(red_columns(f"out/{NAME}.png"))
    assert f"{NAME} is not in annotation.txt: its plot has no anomalies" in capsys.readouterr().err


def test_an_annotation_of_another_number_of_frames_is_refused(user, video, tmp_path, capsys):
    (tmp_path / "annotation.txt").write_text(f"Abuse/{NAME} 150 1 30 60 100 130\n")
    assert run(video, annotation="annotation.txt") == 1
    assert f"{NAME} has {FRAMES} frames, but annotation.txt says 150" in capsys.readouterr().err


def test_without_matplotlib_there_is_the_table(user, video, monkeypatch, capsys):
    monkeypatch.setattr(score_video, "find_spec", lambda name: None)
    assert run(video) == 0
    assert len(table()) == FRAMES
    assert not Path(f"out/{NAME}.png").exists()
    assert 'lightning-methods[demos]"' in capsys.readouterr().err


# --- stopping and going on ------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_a_stopped_call_goes_on_where_it_was(user, video, capsys, stop_at):
    assert main([str(video), "--model", "user_model:brightness", "--out", "whole", "--batch-size=2"]) == 0
    user.calls.clear()
    user.stop_at = stop_at
    assert run(video, batch_size=2) == 130
    assert "--resume\n" in capsys.readouterr().err
    assert not Path(f"out/{NAME}.csv").exists()
    part = Path("out/parts", f"{NAME}.txt")
    part.write_text(part.read_text() + "0.12")  # as if it was killed while it wrote
    user.calls.clear()
    user.stop_at = None
    assert run(video, batch_size=2, resume=True) == 0
    scored = torch.cat([batch["snippet_index"] for batch in user.calls]).flatten().tolist()
    assert scored == list(range(2 * (stop_at - 1), 6))
    for suffix in ("csv", "png"):
        assert Path(f"out/{NAME}.{suffix}").read_bytes() == Path(f"whole/{NAME}.{suffix}").read_bytes()


def test_a_line_that_was_not_written_to_its_end_does_not_count(user, video):
    user.stop_at = 3
    assert run(video, batch_size=1) == 130
    part = Path("out/parts", f"{NAME}.txt")
    part.write_text(part.read_text()[:-16])
    user.stop_at = None
    assert run(video, batch_size=1, resume=True) == 0
    np.testing.assert_allclose(table(), stretched(plain_scores()), rtol=1e-5)


def test_each_batch_is_on_disk_before_the_next_is_scored(user, video, monkeypatch):
    seen = []

    def scores(batch):
        seen.append(Path("out/parts", f"{NAME}.txt").read_text().count("\n"))
        return torch.zeros(len(batch["clips"]))

    monkeypatch.setattr(user, "brightness", scores)
    assert run(video, batch_size=2) == 0
    assert seen == [0, 2, 4]


def test_a_score_that_is_not_of_a_whole_batch_is_made_again(user, video):
    user.stop_at = 3
    assert run(video, batch_size=2) == 130
    path = Path(f"out/parts/{NAME}.txt")
    path.write_text("\n".join(path.read_text().splitlines()[:3]) + "\n")
    user.calls.clear()
    user.stop_at = None
    assert run(video, batch_size=2, resume=True) == 0
    assert user.calls[0]["snippet_index"].flatten().tolist() == [2, 3]
    np.testing.assert_allclose(table(), stretched(plain_scores()), rtol=1e-5)


def test_finished_videos_are_left_alone_and_others_added(user, video, tmp_path, capsys):
    other = tmp_path / "other.mkv"
    write_video(other, (torch.full((3, 24, 32), 200, dtype=torch.uint8) for _ in range(40)))
    assert run(video) == 0
    user.calls.clear()
    capsys.readouterr()
    assert run(video, other, resume=True) == 0
    assert f"{NAME}: done before" in capsys.readouterr().out
    assert [int(batch["total_frames"][0]) for batch in user.calls] == [40]
    assert len(table("other.mkv")) == 40


def test_results_of_other_settings_are_refused(user, video, capsys):
    assert run(video) == 0
    assert run(video) == 2
    assert "already holds results: continue them with --resume" in capsys.readouterr().err
    assert run(video, resume=True, frame_interval=3) == 2
    assert "frame_interval is 6 there and 3 here" in capsys.readouterr().err


# --- memory ---------------------------------------------------------------------------------------


class Counted(FrameSource):
    """A video of any length that counts how many of its frames are alive."""

    path = Path("counted.mp4")

    def __init__(self, num_frames):
        self.num_frames = num_frames
        self.alive = self.most = 0

    def frames(self):
        for number in range(self.num_frames):
            frame = torch.full((3, 30, 40), number % 256, dtype=torch.uint8)
            weakref.finalize(frame, self.one_less)
            self.alive += 1
            self.most = max(self.most, self.alive)
            yield frame

    def one_less(self):
        self.alive -= 1


def bytes_of_views():
    """Of all tensors of the size that a network sees."""
    views = [item for item in gc.get_objects() if type(item) is torch.Tensor and item.shape[-2:] == (224, 224)]
    return sum({view.untyped_storage().data_ptr(): view.untyped_storage().nbytes() for view in views}.values())


def test_memory_does_not_grow_with_the_video(user, monkeypatch):
    clip = 5 * 3 * 224 * 224 * 4
    gc.collect()
    before, found = bytes_of_views(), {}
    for length in (120, 480):
        source, sizes = Counted(length), []
        monkeypatch.setattr(score_video, "open_video", lambda path, source=source: source)

        def scores(batch, sizes=sizes):
            sizes.append(bytes_of_views() - before)
            return torch.zeros(len(batch["clips"]))

        monkeypatch.setattr(user, "brightness", scores)
        Path(f"{length}.mp4").touch()
        assert run(f"{length}.mp4", batch_size=2, resume=True) == 0
        assert len(sizes) == length // 60
        found[length] = source.most, max(sizes)
    assert found[480] == found[120]
    frames, size = found[480]
    assert frames <= 3
    assert size <= 3 * clip  # a batch of two, and the clip that was read last


# --- errors ---------------------------------------------------------------------------------------

ERRORS = {
    "no such module": ({"model": "nowhere:f"}, "--model nowhere:f: cannot import 'nowhere'"),
    "no module name": ({"model": ":f"}, "--model :f: cannot import ''"),
    "no such function": ({"model": "user_model:f"}, "--model user_model:f: user_model has no function 'f'"),
    "no function": ({"model": "user_model:number"}, "user_model has no function 'number'"),
    "class without checkpoint": ({"model": "user_model.Detector"}, "--checkpoint: a class needs one"),
    "function and checkpoint": (
        {"checkpoint": "a.ckpt"},
        "--checkpoint: a function.* takes none",
    ),
    "no such class": ({"model": "user_model.Net", "checkpoint": "a.ckpt"}, "user_model has no class 'Net'"),
    "no module": ({"model": "user_model.Plain", "checkpoint": "a.ckpt"}, "must be a LightningModule or"),
    "no checkpoint": ({"model": "user_model.Detector", "checkpoint": "none.ckpt"}, "none.ckpt cannot be read"),
    "strange checkpoint": (
        {"model": "user_model.Detector", "checkpoint": "user_model.py"},
        r"user_model\.py cannot be loaded into user_model\.Detector .*package\.module:function",
    ),
    "shape": (
        {"model": "user_model:wrong_shape"},
        r"clips \(6, 1, 3, 5, 224, 224\) and .*shape \(6, 3\)",
    ),
    "no tensor": ({"model": "user_model:no_tensor"}, "it returned list"),
    "nan": ({"model": "user_model:undefined"}, "the clip around frame 102 the score nan"),
    "no annotation": ({"annotation": "none.txt"}, "none.txt is missing"),
    "strange annotation": ({"annotation": "user_model.py"}, "user_model.py: .* lines are not .*nor are they"),
    "clip_length": ({"clip_length": 0}, "--clip-length must be at least 1, got 0"),
    "windows": ({"windows": 0}, "--windows must be at least 1, got 0"),
    "batch_size": ({"batch_size": -1}, "--batch-size must be at least 1, got -1"),
}


@pytest.mark.parametrize(("options", "message"), ERRORS.values(), ids=list(ERRORS))
def test_errors_are_a_sentence(user, video, capsys, options, message):
    assert run(video, **options) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error), error


def test_a_module_whose_arguments_the_checkpoint_lacks(user, video, tmp_path, capsys):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(LightningModule())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert run(video, model="user_model.Demanding", checkpoint="a.ckpt") == 1
    assert "arguments that are not in the checkpoint, write a function" in capsys.readouterr().err


def test_videos_that_cannot_be_read(user, video, tmp_path, capsys):
    assert run(video, tmp_path / "none.mp4") == 1
    assert "none.mp4: there is no such file or folder" in capsys.readouterr().err
    assert not Path("out").exists(), "a folder of results is for videos that are there"
    (tmp_path / "text.mp4").write_text("hello")
    assert run(tmp_path / "text.mp4") == 1
    assert "text.mp4: cannot be decoded" in capsys.readouterr().err
    (tmp_path / NAME).write_bytes(video.read_bytes())
    assert run(video, tmp_path / NAME, resume=True) == 1
    assert f"several videos are called {NAME}" in capsys.readouterr().err


def test_a_video_that_ends_early(user, monkeypatch, capsys):
    source = Counted(50)
    source.num_frames, source.frames = 90, Counted(50).frames
    monkeypatch.setattr(score_video, "open_video", lambda path: source)
    source.path.touch()
    assert run(source.path) == 1
    assert "counted.mp4: ends before frame 54 of 90" in capsys.readouterr().err


def test_faults_in_the_users_code_keep_their_traceback(user, video):
    with pytest.raises(ValueError, match="a fault of the user's own"):
        run(video, model="user_model:broken")


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "--annotation FILE" in capsys.readouterr().out

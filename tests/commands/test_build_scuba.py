import json
import sys

import pytest
import torch

from lightning_methods.commands.build_scuba import main
from lightning_methods.datamodules._video_files import open_video, write_video


@pytest.fixture
def videos(tmp_path):
    """Three clips, in the order of their shades, with a square that moves."""
    for number in range(3):
        frames = torch.full((4, 3, 24, 24), 40 * number, dtype=torch.uint8)
        for t in range(4):
            frames[t, :, 8:16, 4 * t : 4 * t + 8] = 200
        write_video(tmp_path / "videos" / f"v{number}.mp4", frames)
    (tmp_path / "list.txt").write_text("v0.mp4 0\nv1.mp4 1\nv2.mp4 1\n")
    return tmp_path


def run(videos, *options, out="out"):
    return main([str(videos / "list.txt"), str(videos / "videos"), str(videos / out), *map(str, options)])


def test_makes_both_sets(videos, capsys):
    assert run(videos, "--per-video", 2, "--seed", 4, "--scufo", videos / "scufo") == 0
    output = capsys.readouterr().out
    assert f"6 videos: {videos / 'out' / 'list.txt'}" in output
    assert f"6 still frames: {videos / 'scufo' / 'list.txt'}" in output
    settings = json.loads((videos / "out" / "manifest.json").read_text())["settings"]
    assert (settings["seed"], settings["per_video"], settings["masks"]) == (4, 2, "fame")
    with open_video(videos / "out" / "v2__1", template="frame{:06d}.jpg") as video:
        assert video.num_frames == 4
    assert (videos / "scufo" / "v0__0.jpg").is_file()


def test_options_reach_the_set(videos):
    for number in range(3):
        masks = torch.zeros(4, 3, 24, 24, dtype=torch.uint8)
        masks[:, :, :12] = 255 if number else 0
        write_video(videos / "masks" / f"v{number}.mp4", masks)
    (videos / "videos" / "v2.mp4").write_bytes(b"no video")
    options = ("--masks", videos / "masks", "--valid-only", "--skip-errors", "--per-video", 1, "--kind", "video")
    assert run(videos, *options) == 0
    content = json.loads((videos / "out" / "manifest.json").read_text())
    assert list(content["videos"]) == ["v1__0"]
    assert list(content["skipped"]) == ["v0.mp4", "v2.mp4"]
    (videos / "list.txt").write_text("v0.mp4 0\nv1.mp4 1\n")
    assert run(videos, "--conflicting", "--masks", videos / "masks", out="conflict") == 0
    content = json.loads((videos / "conflict" / "manifest.json").read_text())
    assert content["videos"]["v0__0"]["still"]["source"] == "v1.mp4"


def test_errors_are_one_sentence(videos, capsys):
    (videos / "list.txt").write_text("v0.mp4 0\nv9.mp4 0\n")
    assert run(videos) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "has no video v9.mp4" in error
    assert run(videos, "--seed", 1) == 1
    assert "made with other arguments: `seed` was 0 and is 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["list.txt"])


def test_ctrl_c_says_how_to_go_on(videos, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_methods.datamodules.stillmix_scuba.replace_background", stop)
    assert run(videos) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(videos) == 0


def test_works_without_rich(videos, monkeypatch):
    monkeypatch.setattr("lightning_methods.commands._progress.find_spec", lambda name: None)
    assert run(videos) == 0


def test_takes_the_arguments_of_the_process(videos, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["build-scuba", str(videos / "list.txt"), str(videos / "videos"), str(videos / "o")]
    )
    assert main(None) == 0

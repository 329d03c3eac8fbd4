"""The twbert demo: arms that differ in a callback only, and the effect on the test split."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_methods.datamodules import ObjectVideosDataModule
from lightning_methods.demos import twbert, twbert_models
from lightning_methods.demos._experiment import Run
from lightning_methods.demos.twbert import ARMS, WORLDS, experiment
from lightning_methods.demos.twbert_models import FramesQuestionModel, VideoQuestionModel


@pytest.fixture(autouse=True)
def _no_world_is_left():
    yield
    twbert._data.cache_clear()


def test_trajectories_see_through_bursts():  # after 250 steps: see the card
    found, world = {}, replace(WORLDS["patches"], train_size=100 * 128)
    for arm in ("one-frame", "frames"):
        torch.manual_seed(0)
        found[arm] = world.run(Run("main", arm, 0, None, lambda share: None))
    assert found["frames"]["burst-10"] > found["one-frame"]["burst-10"] + 10


def test_one_frame_has_the_parameters_of_many():
    shapes = []
    for arm in ("one-frame", "frames"):
        (callback,) = ARMS[arm].callbacks()
        model = callback.apply(VideoQuestionModel())
        shapes.append({name: value.shape for name, value in model.named_parameters()})
    assert shapes[0] == shapes[1]
    assert ARMS["plain"].callbacks() == []


def test_the_model_knows_nothing_of_the_methods():
    tree = ast.parse(Path(twbert_models.__file__).read_text())
    imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(name.startswith(("lightning_methods.callbacks", "lightning_methods.attach")) for name in imported)


def test_frames_are_cut_into_patches_row_by_row():
    model, seen = FramesQuestionModel(patch_size=2, num_frames=2, patches_per_frame=6), []
    model.patches.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    video = torch.arange(2 * 2 * 3 * 4 * 6.0).view(2, 2, 3, 4, 6)
    assert model(video, torch.zeros(2, 4, dtype=torch.long)).shape == (2, 4)
    patches = [
        frame[:, row : row + 2, column : column + 2].flatten()
        for frame in video[1]
        for row in (0, 2)
        for column in (0, 2, 4)
    ]
    assert torch.equal(seen[0][1], torch.stack(patches))


def test_the_demo_from_video_files(tmp_path, monkeypatch):
    monkeypatch.setattr(ObjectVideosDataModule, "eval_size", 4)
    monkeypatch.setitem(twbert.FAST, "videos", replace(WORLDS["videos"], train_size=128, epochs=1))
    assert twbert.main(["--world", "videos", "--fast", "--out", str(tmp_path)]) == 0
    records = json.loads((tmp_path / "result.json").read_text())["records"]
    assert {record["arm"] for record in records} == set(ARMS)
    assert set(records[0]["metrics"]) == {"burst-0", "burst-10"}


@pytest.mark.parametrize("world", WORLDS)
def test_experiments(world):
    whole, fast = experiment(world=world), experiment(fast=True, world=world)
    assert whole.seeds >= 3
    assert list(whole.metrics) == ["burst-10", "burst-0"]
    assert fast.settings != whole.settings

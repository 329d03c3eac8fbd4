"""The twbert demo: arms that differ in a callback only, and the effect on the test split."""

import ast
from pathlib import Path

import torch

from lightning_methods.demos import twbert_models
from lightning_methods.demos._experiment import Run
from lightning_methods.demos.twbert import ARMS, experiment, run
from lightning_methods.demos.twbert_models import VideoQuestionModel


def test_trajectories_see_through_bursts():  # after 250 steps: see the card
    found = {}
    for arm in ("one-frame", "frames"):
        torch.manual_seed(0)
        found[arm] = run(Run("main", arm, 0, None, lambda share: None), steps=100)
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


def test_experiments():
    whole, fast = experiment(), experiment(fast=True)
    assert whole.seeds >= 3
    assert list(whole.metrics) == ["burst-10", "burst-0"]
    assert fast.settings != whole.settings

"""The acf demo: arms that differ in a callback only, what it measures, and the effect on the test split."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_methods.demos import acf, acf_models
from lightning_methods.demos._experiment import Run
from lightning_methods.demos.acf import ARMS, WORLDS, attention_maps, draw_maps, experiment, separation
from lightning_methods.demos.acf_models import TokenTagger


def run(arm, seed, folder, world):
    torch.manual_seed(seed)
    return world.run(Run("few", arm, seed, folder, lambda share: None))


def test_clusters_help_with_few_sequences(tmp_path):  # over five seeds: see the card
    short = replace(WORLDS["few"], epochs=30)
    found = {arm: run(arm, 0, tmp_path, short)["accuracy"] for arm in ARMS}
    assert found["acf"] > found["plain"] + 1
    for arm in ARMS:
        assert (tmp_path / f"{arm}.png").stat().st_size > 10_000


def test_models_know_nothing_of_the_methods():
    tree = ast.parse(Path(acf_models.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(
        name and name.startswith(("lightning_methods.callbacks", "lightning_methods.attach")) for name in imported
    )


def test_the_arms_differ_in_callbacks_only():
    assert ARMS["plain"].callbacks() == []
    (callback,) = ARMS["acf"].callbacks()
    assert type(callback).__name__ == "AdaClustFormer"
    assert ARMS["plain"].model == ARMS["acf"].model


def test_separation_is_the_area_under_the_curve():
    phrase = torch.tensor([[0, 0, 1, 1]])
    same = (phrase[:, :, None] == phrase[:, None]).float()
    assert separation(same, phrase) == 1
    assert separation(1 - same, phrase) == 0
    diagonal_only = torch.eye(4)[None]  # a token and itself are no pair
    assert separation(diagonal_only, phrase) == 0.5


def test_maps_are_what_the_layers_attend_to_and_leave_the_model_alone():
    model = TokenTagger()
    x = torch.randn(3, 24, 7)
    expected = model(x)
    maps = attention_maps(model, x)
    assert [part.shape for part in maps] == [(3, 24, 24)] * 2
    torch.testing.assert_close(maps[0].sum(2), torch.ones(3, 24))
    assert torch.equal(model(x), expected)
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_the_picture(tmp_path):
    phrase = torch.tensor([[0] * 10 + [1] * 14])
    draw_maps([torch.rand(1, 24, 24)] * 2, phrase, tmp_path / "a" / "map.png", "a title")
    assert (tmp_path / "a" / "map.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("world", WORLDS)
def test_experiments(world):
    whole, fast, tune = experiment(world), experiment(world, fast=True), experiment(world, tune=True)
    assert whole.seeds >= 5
    assert set(whole.arms) == set(ARMS)
    assert fast.settings != whole.settings
    assert len(tune.arms) == 6
    assert tune.first_seed >= whole.first_seed + whole.seeds


def test_tuning_is_for_one_world(capsys):
    with pytest.raises(SystemExit):
        acf.main(["--tune", "--world", "many"])
    assert "--world few only" in capsys.readouterr().err

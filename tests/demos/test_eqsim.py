"""The eqsim demo: arms that differ in a callback only, a fair search, and the effect on the test quadruples."""

import ast
import json
import math
import runpy
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lightning_methods.datamodules import MinimalChangeDataModule, eqsim_worlds
from lightning_methods.demos import eqsim, eqsim_models
from lightning_methods.demos._experiment import Run, collect
from lightning_methods.demos._records import ResultFolder
from lightning_methods.demos._training import evaluate, fit
from lightning_methods.demos.eqsim_models import DualEncoder
from lightning_methods.functional import pair_group_scores, retrieval_recall


class NoScreen:
    def begin(self, text):
        pass

    def progress(self, share):
        pass

    def finished(self, record, fresh):
        pass


def test_eqsim_tells_minimal_changes_apart(tmp_path):  # over ten seeds: see the card
    experiment = eqsim.experiment()
    arms = {name: experiment.arms[name] for name in ("plain", "eqsim")}
    some = replace(experiment, arms=arms, baselines=())
    results = collect(some, ResultFolder(tmp_path), range(2), NoScreen())
    of = {(record.arm, record.seed): record.metrics for record in results.records}
    better = {key: [of["eqsim", seed][key] - of["plain", seed][key] for seed in range(2)] for key in of["eqsim", 0]}
    assert sum(better["group"]) / 2 >= 4
    assert min(better["group"]) > 0
    assert sum(better["recall"]) / 2 > 0
    assert max(better["gap"]) < 0


class TestModel:
    def test_the_loss_is_the_symmetric_contrastive_one(self):
        image, text = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
        model = DualEncoder()
        i, t = (F.normalize(x) for x in (model.image_encoder(image), model.text_encoder(text)))
        logits = i @ t.T / 0.07
        rows = [logits[n].exp() for n in range(5)]
        columns = [logits[:, n].exp() for n in range(5)]
        expected = -sum((rows[n][n] / rows[n].sum()).log() + (columns[n][n] / columns[n].sum()).log() for n in range(5))
        torch.testing.assert_close(model.training_step((image, text)), expected / 10)

    def test_it_measures_what_the_functions_say(self):
        torch.manual_seed(0)
        model, data = DualEncoder(), MinimalChangeDataModule(train_size=64)
        for split in ("val", "test"):
            found = evaluate(model, data, split)
            with torch.no_grad():
                image, text = model(*data.splits[split])
                quads = [(image[:, i] * text[:, j]).sum(1) for i in range(2) for j in range(2)]
                groups = pair_group_scores(*quads)
                image, text = model(*data.splits[f"{split}_pairs"][:2])
                number = torch.arange(500)
                recall = retrieval_recall(image @ text.T, number, number, k=(1,))
            assert found["text"] == pytest.approx(groups.text.item())
            assert found["image"] == pytest.approx(groups.image.item())
            assert found["group"] == pytest.approx(groups.group.item())
            assert found["recall"] == pytest.approx((recall.text_recall + recall.image_recall).item() / 2)
            s00, s01, s10, s11 = quads
            margin = ((s00 + s11 - s01 - s10) / 2).mean()
            gap = ((s00 + s10 - s01 - s11).abs() + (s00 + s01 - s10 - s11).abs()).mean() / 2 / margin
            assert found["gap"] == pytest.approx(gap.item(), rel=1e-3)

    def test_the_scale_stays_in_its_range_and_matrices_alone_decay(self):
        model = DualEncoder(weight_decay=3.0)
        with torch.no_grad():
            model.logit_scale.fill_(9.0)
        fit(model, MinimalChangeDataModule(train_size=64), epochs=1)
        assert model.logit_scale.item() == pytest.approx(math.log(100), abs=1e-5)
        for decay_scale in (False, True):
            model = DualEncoder(weight_decay=3.0, decay_scale=decay_scale)
            decay = {
                parameter: group["weight_decay"]
                for group in model.configure_optimizers().param_groups
                for parameter in group["params"]
            }
            assert decay.pop(model.logit_scale) == (3.0 if decay_scale else 0.0)
            assert len(decay) == len(list(model.parameters())) - 1
            assert all(value == (3.0 if parameter.ndim == 2 else 0.0) for parameter, value in decay.items())


class TestArms:
    @pytest.mark.parametrize("file", [eqsim_models.__file__, eqsim_worlds.__file__])
    def test_modules_and_data_know_nothing_of_the_methods(self, file):
        tree = ast.parse(Path(file).read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        for room in ("callbacks", "attach", "modules", "mixins"):
            assert not [name for name in imported if name.startswith(f"lightning_methods.{room}")]

    @pytest.mark.parametrize("world", eqsim.WORLDS.values(), ids=eqsim.WORLDS)
    def test_arms_differ_in_callbacks_only(self, world):
        assert all(not arm.model for arm in world.arms.values())
        assert [name for name, arm in world.arms.items() if not arm.callbacks()] == ["plain"]

    @pytest.mark.parametrize("world", eqsim.WORLDS.values(), ids=eqsim.WORLDS)
    def test_settings_hold_all_that_decides_the_figures(self, world):
        assert world.settings().keys() == {field.name for field in fields(world)} - {"title", "baselines"}
        for changed in ({"epochs": 3}, {"train_size": 3}, {"model": {"lr": 3.0}}):
            assert replace(world, **changed).settings() != world.settings()
        for part in ("options", "model"):
            arms = {name: replace(arm, **{part: {"x": 1}}) for name, arm in world.arms.items()}
            assert replace(world, arms=arms).settings() != world.settings()
        json.dumps(world.settings())

    def test_the_released_setting_is_the_default(self):
        assert eqsim.WORLDS["limited"].arms["released"].options == {}

    def test_the_seed_makes_the_world_and_the_order(self, monkeypatch):
        made = []

        def data(size, **seeds):
            made.append((size, seeds))
            return MinimalChangeDataModule(size, **seeds)

        monkeypatch.setattr(eqsim, "MinimalChangeDataModule", data)
        replace(eqsim.WORLDS["limited"], train_size=64, epochs=1).run(Run("main", "plain", 7, None, print))
        assert made == [(64, {"seed": 7, "world_seed": 7})]

    @pytest.mark.parametrize("world", ["limited", "soft"])
    def test_the_search_gave_every_arm_the_same_number_of_settings(self, world):
        tried = [name.split(".")[0] for name in eqsim.candidates(world)]
        names = ["plain", "cyclip", "eqsim", "all-pairs"]
        assert {name: tried.count(name) for name in tried} == dict.fromkeys(names, 12)

    @pytest.mark.parametrize("world", ["limited", "soft"])
    def test_the_settings_of_the_report_are_among_those_tried(self, world):
        tried = list(eqsim.candidates(world).values())
        model = {name: eqsim.WORLDS[world].model[name] for name in ("lr", "weight_decay")}
        assert model in [arm.model for arm in tried]
        for name, arm in eqsim.WORLDS[world].arms.items():
            if name not in ("plain", "released", "strong"):
                assert arm.options in [other.options for other in tried]

    def test_worlds_differ_in_what_their_names_say(self):
        limited, abundant, soft = (eqsim.WORLDS[name] for name in ("limited", "abundant", "soft"))
        assert replace(abundant, title=limited.title, train_size=1500, epochs=25) == limited
        assert (soft.train_size, soft.epochs) == (limited.train_size, limited.epochs)
        assert soft.model["decay_scale"]
        assert "decay_scale" not in limited.model

    def test_the_search_looks_at_validation_and_at_other_worlds(self):
        search, report = eqsim.experiment(tune=True), eqsim.experiment()
        assert search.run.keywords == {"split": "val"}
        assert report.run.keywords == {"split": "test"}
        assert search.first_seed >= report.first_seed + 100
        assert report.seeds >= 10
        assert eqsim.experiment(fast=True).seeds < 5


class TestCommand:
    @pytest.fixture(autouse=True)
    def tiny(self, monkeypatch):
        worlds = {name: replace(world, train_size=128, epochs=1) for name, world in eqsim.WORLDS.items()}
        monkeypatch.setattr(eqsim, "WORLDS", worlds)

    @pytest.mark.parametrize("world", eqsim.WORLDS)
    def test_runs_and_leaves_its_results(self, world, tmp_path, capsys):
        assert eqsim.main(["--world", world, "--fast", "--seeds", "1", "--out", str(tmp_path)]) == 0
        result = json.loads((tmp_path / "result.json").read_text())
        assert {record["arm"] for record in result["records"]} == set(eqsim.WORLDS[world].arms)
        assert (tmp_path / "result.png").exists()
        assert "CyCLIP" in capsys.readouterr().out

    def test_ctrl_c_then_resume_gives_the_same_bits(self, tmp_path, monkeypatch):
        def figures(folder):
            records = json.loads((folder / "result.json").read_text())["records"]
            return {(record["arm"], record["seed"]): record["metrics"] for record in records}

        options = ["--seeds", "1", "--out"]
        assert eqsim.main([*options, str(tmp_path / "unbroken")]) == 0
        training_step, calls = DualEncoder.training_step, []

        def stopping(self, batch):
            calls.append(1)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return training_step(self, batch)

        monkeypatch.setattr(DualEncoder, "training_step", stopping)
        assert eqsim.main([*options, str(tmp_path / "stopped")]) == 130
        assert eqsim.main([*options, str(tmp_path / "stopped"), "--resume"]) == 0
        assert figures(tmp_path / "stopped") == figures(tmp_path / "unbroken")

    def test_the_search_is_for_two_worlds(self, capsys):
        with pytest.raises(SystemExit, match="2"):
            eqsim.main(["--tune", "--world", "abundant"])
        assert "--tune searches the settings of --world limited and soft only" in capsys.readouterr().err

    def test_is_a_program(self, monkeypatch, capsys):
        monkeypatch.setattr("sys.argv", ["eqsim", "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(eqsim.__file__, run_name="__main__")
        assert "--tune" in capsys.readouterr().out

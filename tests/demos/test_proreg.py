"""The ProReg demo: honest baselines, arms that differ in a callback only, and the effect on the test split."""

import ast
import copy
import json
import runpy
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from lightning_methods.datamodules import BiasedContextsDataModule
from lightning_methods.demos import proreg, proreg_models
from lightning_methods.demos._experiment import Run, collect
from lightning_methods.demos._records import ResultFolder
from lightning_methods.demos._training import evaluate, fit
from lightning_methods.demos.proreg_models import CaptionedModel, LogitEnsemble, TunedClassifier

ARMS = ["zero-shot", "ft", "ft-tuned", "ensemble", "constant", "a", "b", "c"]


class NoScreen:
    def begin(self, text):
        pass

    def progress(self, share):
        pass

    def finished(self, record, fresh):
        pass


def measured(experiment, folder, world, arms, seeds):
    """Metric -> arm -> values over the seeds."""
    some = replace(experiment, arms={arm: experiment.arms[arm] for arm in arms}, worlds=(world,), baselines=())
    records = collect(some, ResultFolder(folder), range(seeds), NoScreen()).records
    return {
        metric: {
            arm: torch.tensor([one.metrics[metric] for one in records if one.arm == arm], dtype=torch.float64)
            for arm in arms
        }
        for metric in experiment.metrics
    }


class TestEffect:
    """On three of the ten seeds of the report, with the settings that were chosen on other worlds."""

    @pytest.fixture(scope="class")
    @classmethod
    def of(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("proreg")
        return measured(proreg.experiment(), folder, "wrong-words", ["zero-shot", "ft", "b"], 3)

    def test_it_beats_fine_tuning_out_of_distribution(self, of):
        assert (of["out_of_distribution"]["b"] - of["out_of_distribution"]["ft"]).mean() >= 8
        assert (of["harmonic_mean"]["b"] - of["harmonic_mean"]["ft"]).mean() >= 5

    def test_it_beats_the_prompts_alone(self, of):
        assert (of["harmonic_mean"]["b"] - of["harmonic_mean"]["zero-shot"]).mean() >= 10

    def test_the_prompts_are_wrong_for_a_third(self, of):
        assert 55 < of["in_distribution"]["zero-shot"].mean() < 66

    def test_fine_tuning_goes_by_the_context(self, of):
        assert of["in_distribution"]["ft"].mean() > 94
        assert of["out_of_distribution"]["ft"].mean() < 70


class TestArms:
    def test_modules_and_data_know_nothing_of_the_method(self):
        tree = ast.parse(Path(proreg_models.__file__).read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        ours = {name for name in imported if name.startswith("lightning_methods")}
        assert ours == {"lightning_methods.metrics"}

    @pytest.mark.parametrize("world", proreg.WORLDS.values(), ids=proreg.WORLDS)
    def test_arms_differ_in_callbacks_only(self, world):
        assert list(world.arms) == ARMS
        assert [name for name, arm in world.arms.items() if arm.student] == ["ft-tuned"]
        assert [name for name, arm in world.arms.items() if arm.share] == ["zero-shot", "ensemble"]
        assert [name for name, arm in world.arms.items() if arm.callbacks()] == ["constant", "a", "b", "c"]
        kinds = [
            (arm.options["weighting"], arm.options.get("prompt_power", 1.0)) for arm in list(world.arms.values())[4:]
        ]
        assert kinds == [("constant", 1.0), ("loss", 1.0), ("probability", 1.0), ("probability", 10.0)]

    @pytest.mark.parametrize("world", proreg.WORLDS.values(), ids=proreg.WORLDS)
    def test_settings_hold_all_that_decides_the_figures(self, world):
        json.dumps(world.settings())
        assert replace(world, wrong_words=not world.wrong_words).settings() != world.settings()
        for name, change in product(ARMS, ({"share": 0.33}, {"student": {"lr": 9.0}}, {"options": {"alpha": 9.0}})):
            arms = {**world.arms, name: replace(world.arms[name], **change)}
            assert replace(world, arms=arms).settings() != world.settings()

    def test_the_worlds_differ_in_the_words_only(self):
        assert {name: world.wrong_words for name, world in proreg.WORLDS.items()} == {
            "wrong-words": True,
            "fair": False,
        }

    def test_the_search_gave_every_arm_the_same_number_of_settings(self):
        tried = [name.split(".")[0] for name in proreg.candidates()]
        assert {name: tried.count(name) for name in tried} == dict.fromkeys(ARMS[2:], 8)

    def test_the_settings_of_the_report_are_among_those_tried(self):
        tried = [arm.settings() for arm in proreg.candidates().values()]
        for world in proreg.WORLDS.values():
            for name in ARMS[2:]:
                assert world.arms[name].settings() in tried

    def test_the_search_looks_at_validation_and_at_other_worlds(self, monkeypatch):
        search, report = proreg.experiment(tune=True), proreg.experiment()
        assert search.first_seed >= report.first_seed + 100
        assert set(search.worlds) == set(report.worlds) == set(proreg.WORLDS)
        splits = []

        def looked_at(module, data, split):
            splits.append((split, data.world_seed, data.seed))
            return dict.fromkeys(proreg.METRICS, 0.0)

        monkeypatch.setattr(proreg, "evaluate", looked_at)
        monkeypatch.setattr(proreg, "fit", lambda *args, **kwargs: None)
        for experiment in (search, report):
            experiment.run(Run("fair", next(iter(experiment.arms)), 7, None, print))
        assert splits == [("val", 7, 7), ("test", 7, 7)]


class TestModels:
    def test_pretraining_is_the_same_whatever_ran_before(self):
        weights = []
        for before in (1, 2):
            torch.manual_seed(before)
            proreg.pretrained.cache_clear()
            state = torch.get_rng_state()
            weights.append(proreg.pretrained(5, 1).state_dict())
            assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        other = proreg.pretrained(6, 1).state_dict()
        assert not torch.equal(other["net.words"], weights[0]["net.words"])

    def test_a_classifier_begins_as_the_zero_shot_one_and_leaves_the_pretrained_alone(self):
        torch.manual_seed(0)
        model = CaptionedModel()
        before = copy.deepcopy(model.state_dict())
        words = (1, 0, 2, 3, 4, 5)
        classifier = TunedClassifier(model, words)
        x = torch.randn(4, 32)
        torch.testing.assert_close(classifier(x), model.net(x)[:, list(words)])
        fit(classifier, BiasedContextsDataModule(train_size=64), epochs=1)
        assert (classifier(x) - model.net(x)[:, list(words)]).abs().max() > 0.01
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_the_head_learns_three_times_as_fast(self):
        groups = TunedClassifier(CaptionedModel(), range(6), lr=0.5).configure_optimizers().param_groups
        assert [(group["lr"], len(group["params"])) for group in groups] == [(0.5, 4), (1.5, 2)]

    def test_an_ensemble_averages_logits(self):
        torch.manual_seed(0)
        first, second = (TunedClassifier(CaptionedModel(), range(6)) for _ in range(2))
        x = torch.randn(4, 32)
        expected = 0.7 * first(x) + 0.3 * second(x)
        torch.testing.assert_close(LogitEnsemble(first, second, 0.3)(x), expected)
        data = BiasedContextsDataModule()
        assert evaluate(LogitEnsemble(first, second, 0.0), data) == evaluate(first, data)

    @pytest.mark.parametrize("split", ["val", "test"])
    def test_accuracies_are_those_of_the_two_groups(self, split):
        torch.manual_seed(0)
        module, data = TunedClassifier(CaptionedModel(), range(6)), BiasedContextsDataModule()
        x, target, group = data.splits[split]
        hits = (module(x).argmax(1) == target).double()
        first, second = hits[group == 0].mean().item(), hits[group == 1].mean().item()
        found = evaluate(module, data, split)
        assert found["in_distribution"] == pytest.approx(first)
        assert found["out_of_distribution"] == pytest.approx(second)
        assert found["harmonic_mean"] == pytest.approx(2 / (1 / first + 1 / second))


class TestCommand:
    @pytest.fixture(autouse=True)
    def tiny(self, monkeypatch):
        monkeypatch.setattr(proreg, "_FAST_EPOCHS", (1, 2))

    def test_shows_both_worlds_and_leaves_its_results(self, tmp_path, capsys):
        assert proreg.main(["--fast", "--seeds", "1", "--out", str(tmp_path)]) == 0
        result = json.loads((tmp_path / "result.json").read_text())
        assert {(one["world"], one["arm"]) for one in result["records"]} == set(product(proreg.WORLDS, ARMS))
        assert (tmp_path / "result.png").exists()
        shown = capsys.readouterr().out
        for world in proreg.WORLDS:
            assert f"test split: {world}" in shown
            assert f"Settings in {world}" in shown
        assert "only pay where prompts are wrong" in shown

    def test_ctrl_c_then_resume_gives_the_same_bits(self, tmp_path, monkeypatch):
        def figures(folder):
            records = json.loads((folder / "result.json").read_text())["records"]
            return {(one["world"], one["arm"]): one["metrics"] for one in records}

        fair = proreg.WORLDS["fair"]
        some = {name: fair.arms[name] for name in ("ft", "ft-tuned", "constant", "b")}
        monkeypatch.setattr(proreg, "WORLDS", {"fair": replace(fair, arms=some)})
        options = ["--fast", "--seeds", "1", "--out"]
        assert proreg.main([*options, str(tmp_path / "unbroken")]) == 0
        training_step, calls = TunedClassifier.training_step, []

        def stopping(self, batch):
            calls.append(1)
            if len(calls) == 25:
                raise KeyboardInterrupt
            return training_step(self, batch)

        monkeypatch.setattr(TunedClassifier, "training_step", stopping)
        assert proreg.main([*options, str(tmp_path / "stopped")]) == 130
        proreg.pretrained.cache_clear()
        assert proreg.main([*options, str(tmp_path / "stopped"), "--resume"]) == 0
        assert figures(tmp_path / "stopped") == figures(tmp_path / "unbroken")

    def test_is_a_program(self, monkeypatch, capsys):
        monkeypatch.setattr("sys.argv", ["proreg", "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(proreg.__file__, run_name="__main__")
        assert "--tune" in capsys.readouterr().out

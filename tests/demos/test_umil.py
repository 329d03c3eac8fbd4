"""The UMIL demo: arms that differ in a callback only, the effect on the test split, and where it ends."""

import ast
import json
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lightning_methods.callbacks import UMIL
from lightning_methods.datamodules import SyntheticBiasedBagsDataModule
from lightning_methods.demos import umil, umil_models
from lightning_methods.demos._experiment import Run
from lightning_methods.demos._training import fit
from lightning_methods.demos.umil_models import MILDetector, figures
from lightning_methods.functional import temporal_smoothness, temporal_sparsity, umil_mil_loss

SEEDS = (0, 1, 2)


def quiet(share):
    pass


def measured(world, arms, seeds=SEEDS):
    """Figures by arm, a column for each seed."""
    run = umil.experiment("bags" if world == "main" else "limits").run
    found = {arm: [run(Run(world, arm, seed, None, quiet)) for seed in seeds] for arm in arms}
    return {arm: {name: torch.tensor([one[name] for one in of]) for name in umil.METRICS} for arm, of in found.items()}


class TestEffect:
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def measure(cls):
        cls.of = measured("main", ["mil", "umil"])

    def test_umil_beats_mil_within_abnormal_bags_on_every_seed(self):  # smallest of eight seeds: +12
        gain = self.of["umil"]["auc_abnormal"] - self.of["mil"]["auc_abnormal"]
        assert (gain >= 5).all()

    def test_context_alone_raises_no_alarm_and_subtle_anomalies_are_found(self):
        assert (self.of["umil"]["false_alarms"] < 10).all()
        assert (self.of["mil"]["false_alarms"] > 15).all()
        assert (self.of["umil"]["subtle_recall"] > 95).all()
        assert (self.of["mil"]["subtle_recall"] < 60).all()

    def test_umil_beats_mil_at_its_own_learning_rate_and_both_its_parts(self):
        parts = measured("main", ["mil-tuned", "ce", "pairs-random"], seeds=SEEDS[:1])
        best = max(part["auc_abnormal"].item() for part in parts.values())
        assert self.of["umil"]["auc_abnormal"][0] > best + 2


class TestLimits:
    def test_more_noise_asks_for_a_lower_threshold(self):
        of = measured("noise=0.3", ["umil", "umil-0.4"], seeds=(0,))
        assert of["umil-0.4"]["auc_abnormal"].item() > 99
        assert of["umil"]["auc_abnormal"].item() < 95


class TestModel:
    def test_the_loss_is_the_published_baseline(self):
        batch = next(iter(SyntheticBiasedBagsDataModule().train_dataloader()))
        detector = MILDetector(encoder=True)
        torch.nn.init.normal_(detector.head.weight)
        logits = detector(batch["features"])
        scores = logits.softmax(-1)[..., 1]
        mil = umil_mil_loss(logits, batch["label"], margin=False).mil
        expected = mil + 0.01 * temporal_smoothness(scores) + 0.001 * temporal_sparsity(scores)
        found = detector.training_step(batch)
        torch.testing.assert_close(found, expected)
        for one, other in zip(
            torch.autograd.grad(found, detector.parameters()),
            torch.autograd.grad(expected, detector.parameters()),
            strict=True,
        ):
            torch.testing.assert_close(one, other)

    def test_it_is_linear_and_starts_at_zero(self):
        detector = MILDetector()
        assert not detector(torch.randn(2, 3, 32)).any()
        assert sum(parameter.numel() for parameter in detector.parameters()) == 66

    def test_figures(self):
        scores = torch.tensor([[0.9, 0.2, 0.8, 0.1], [0.7, 0.3, 0.3, 0.3]])
        target = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
        kind = torch.tensor([[2, 2, 3, 3], [0, 0, 0, 0]])
        found = figures(scores, target, kind, torch.tensor([1, 0]))
        assert {name: value.item() for name, value in found.items()} == {
            "auc_abnormal": 75.0,
            "auc": pytest.approx(100 * 7 / 12),
            "false_alarms": 50.0,
            "subtle_recall": 50.0,
        }


class TestPairs:
    def test_terms_are_those_over_chosen_snippets(self):
        torch.manual_seed(0)
        method = umil.RandomPairs(share=0.35)
        assert method.chosen.sum() == 0.35 * method.chosen.numel()
        z, logits = torch.randn(2, 16, 32), torch.randn(2, 16, 2)
        vid = torch.tensor([3, 8])
        method.chosen[3, 0] = True
        terms = method.losses({method.features: z, method.logits: logits, method.vid: vid})
        flat = method.chosen[vid].flatten()
        rows, p = z.flatten(0, 1)[flat], logits.flatten(0, 1)[flat].softmax(-1)
        alike = F.cosine_similarity(rows[:, None], rows[None], dim=-1) > 0.7
        agree = p @ p.T
        expected = -torch.where(alike, agree + 1e-7, 1 - agree + 1e-7).log().mean()
        torch.testing.assert_close(terms["compat"], expected)
        assert terms.keys() == {"compat", "cluster"}

    def test_all_of_them_by_default(self):
        assert umil.RandomPairs().chosen.all()

    def test_nothing_before_the_start(self):
        trained = []
        for callbacks in ([], [umil.RandomPairs(start_epoch=2)]):
            detector = MILDetector()
            fit(detector, SyntheticBiasedBagsDataModule(), epochs=2, callbacks=callbacks)
            trained.append(detector.head.weight)
        assert torch.equal(*trained)


class TestArms:
    def test_the_module_knows_nothing_of_the_package(self):
        tree = ast.parse(Path(umil_models.__file__).read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        assert not [name for name in imported if name.startswith("lightning_methods")]

    def test_arms_differ_in_callbacks_but_for_rates_of_their_own(self):
        for name, arm in {**umil.ARMS, **umil.LIMIT_ARMS}.items():
            assert arm.detector == ({"lr": 1e-4} if name.endswith("-tuned") else {})
            assert bool(arm.callbacks()) == (not name.startswith("mil"))

    def test_ambiguous_snippets_are_as_many_as_random_ones(self):
        method = UMIL(**umil._UMIL, start_epoch=2, history_warmup=2)
        fit(MILDetector(), SyntheticBiasedBagsDataModule(), epochs=2, callbacks=[method])
        assert method._division.ambiguous.float().mean().item() == pytest.approx(umil._RANDOM["share"], abs=0.01)

    def test_the_search_gave_every_kind_of_arm_the_same_rates(self):
        tried = {}
        for name, arm in umil.candidates().items():
            tried.setdefault(name.split(".")[0], []).append(arm.detector["lr"])
        assert set(tried) == {"mil", "ce", "pairs-all", "pairs-random", "umil", "release"}
        assert set(map(tuple, tried.values())) == {umil._RATES}
        assert umil._OWN_RATE["lr"] in umil._RATES
        assert MILDetector().lr in umil._RATES

    def test_the_search_looks_at_validation_and_at_other_seeds(self):
        search, report = umil.experiment(tune=True), umil.experiment()
        assert search.run.keywords["split"] == "val"
        assert report.run.keywords["split"] == "test"
        assert search.first_seed >= report.first_seed + 100

    @pytest.mark.parametrize("world", ["bags", "limits"])
    def test_settings_hold_all_that_decides_the_figures(self, world):
        settings = umil.experiment(world).settings
        assert settings != umil.experiment(world, fast=True).settings
        json.dumps(settings)
        given = umil.LIMITS if world == "limits" else umil.MAIN
        assert settings["worlds"].keys() == given.keys()
        assert settings["arms"].keys() == umil.experiment(world).arms.keys()


class TestCommand:
    @pytest.fixture(autouse=True)
    def tiny(self, monkeypatch):
        monkeypatch.setattr(umil, "_EPOCHS", {True: 1, False: 1})

    @pytest.mark.parametrize("world", ["bags", "limits"])
    def test_runs_and_leaves_its_results(self, world, tmp_path, capsys):
        assert umil.main(["--world", world, "--fast", "--seeds", "1", "--out", str(tmp_path)]) == 0
        result = json.loads((tmp_path / "result.json").read_text())
        assert {record["arm"] for record in result["records"]} == set(
            umil.LIMIT_ARMS if world == "limits" else umil.ARMS
        )
        pictures = {path.name for path in tmp_path.glob("*.png")}
        assert pictures == {"result.png", "scores.png" if world == "bags" else "features.png"}
        assert "UMIL" in capsys.readouterr().out

    def test_the_search_is_for_the_bags(self, capsys):
        with pytest.raises(SystemExit, match="2"):
            umil.main(["--tune", "--world", "limits"])
        assert "--tune is for --world bags only" in capsys.readouterr().err

    def test_is_a_program(self, monkeypatch, capsys):
        monkeypatch.setattr("sys.argv", ["umil", "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(umil.__file__, run_name="__main__")
        assert "--resume" in capsys.readouterr().out

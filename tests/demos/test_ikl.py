"""The IKL demo: honest baselines, arms that differ in a callback only, and the effect on the test split."""

import ast
import json
import runpy
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lightning_methods.callbacks import IKLDistillation
from lightning_methods.demos import ikl, ikl_models
from lightning_methods.demos._experiment import Run, collect
from lightning_methods.demos._records import ResultFolder
from lightning_methods.demos._training import fit
from lightning_methods.demos.ikl import HintonDistillation, SuperclassDataModule
from lightning_methods.demos.ikl_models import MLP


class NoScreen:
    def begin(self, text):
        pass

    def progress(self, share):
        pass

    def finished(self, record, fresh):
        pass


def accuracies(experiment, folder, arms, seeds):
    """Accuracy of each arm, (arms, seeds)."""
    some = replace(experiment, arms={arm: experiment.arms[arm] for arm in arms}, baselines=())
    results = collect(some, ResultFolder(folder), range(seeds), NoScreen())
    found = {(record.arm, record.seed): record.metrics["accuracy"] for record in results.records}
    return {arm: torch.tensor([found[arm, seed] for seed in range(seeds)], dtype=torch.float64) for arm in arms}


class TestSyntheticWorld:
    """The published order of the ablation. Margins measured over five seeds: see each test."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def accuracy(cls, tmp_path_factory):
        cls.of = accuracies(
            ikl.experiment("synthetic"), tmp_path_factory.mktemp("synthetic"), ["kl", "dkl", "ba", "ikl", "gkl"], 2
        )

    def test_dkl_is_kl(self):  # differences of at most 0.04
        assert (self.of["dkl"] - self.of["kl"]).abs().mean() <= 0.1

    def test_broken_asymmetry_beats_kl(self):  # +0.46 ± 0.24
        assert (self.of["ba"] - self.of["kl"]).mean() > 0.1

    def test_class_wise_weights_add_to_it(self):  # +0.96
        assert (self.of["ikl"] - self.of["ba"]).mean() > 0.3

    def test_ikl_beats_kl(self):  # +1.42 ± 0.31, smallest seed +1.08
        assert (self.of["ikl"] - self.of["kl"]).mean() >= 0.5
        assert (self.of["ikl"] > self.of["kl"]).all()

    def test_gkl_beats_kl(self):  # +2.58 ± 0.46, smallest seed +2.26
        assert (self.of["gkl"] - self.of["kl"]).mean() >= 1.5


class TestDigits:
    def test_ikl_beats_cross_entropy_and_kl(self, tmp_path):  # +2.7 ± 1.1 and +2.1 ± 1.2 over ten seeds
        of = accuracies(ikl.experiment("digits"), tmp_path, ["ce", "kl", "ikl"], 3)
        assert (of["ikl"] - of["ce"]).mean() >= 0.5
        assert (of["ikl"] - of["kl"]).mean() >= 0.3


class TestBaseline:
    def test_gradient_is_written_out(self):
        # d/ds of w·T²·KL(softmax(t/T) ‖ softmax(s/T)), mean over the rows, is w·T·(softmax(s/T) - softmax(t/T))/B.
        student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
        student.requires_grad_()
        method = HintonDistillation(MLP(4), temperature=3.0, kl_weight=0.9)
        step = {method.student_logits: student, method.teacher_logits: teacher}
        (gradient,) = torch.autograd.grad(method.losses(step)["kl"], student)
        expected = 3.0 * ((student / 3).softmax(1) - (teacher / 3).softmax(1)) / 5
        torch.testing.assert_close(gradient, expected)

    @pytest.mark.parametrize(
        ("baseline", "same"),
        [
            ({}, {"variant": "dkl", "wmse_weight": 2.0}),
            (
                {"temperature": 4.0, "kl_weight": 0.9, "task_weight": 0.1},
                {"temperature": 4.0, "ce_weight": 0.9 * 16, "task_weight": 0.1, "wmse_weight": 0.0},
            ),
        ],
        ids=["KL at T = 1", "strong KD"],
    )
    def test_trains_as_the_library_does_with_the_same_gradient(self, baseline, same):
        torch.manual_seed(0)
        teacher, start = MLP(8).eval(), MLP(6).state_dict()
        trained = []
        for callback in (HintonDistillation(teacher, **baseline), IKLDistillation(teacher, **same), None):
            student = MLP(6)
            student.load_state_dict(start)
            data = SuperclassDataModule(train_size=128, batch_size=64)
            fit(student, data, epochs=2, callbacks=[callback] if callback else [])
            trained.append(torch.cat([parameter.detach().flatten() for parameter in student.parameters()]))
        hinton, library, alone = trained
        torch.testing.assert_close(hinton, library, rtol=1e-4, atol=1e-6)
        assert (hinton - alone).abs().max() > 1e-3


class TestArms:
    def test_modules_and_data_know_nothing_of_the_methods(self):
        tree = ast.parse(Path(ikl_models.__file__).read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        assert not [name for name in imported if name.startswith("lightning_methods")]

    @pytest.mark.parametrize("world", ikl.WORLDS.values(), ids=ikl.WORLDS)
    def test_arms_differ_in_callbacks_only(self, world):
        assert all(not arm.student for arm in world.arms.values())
        assert [name for name, arm in world.arms.items() if not arm.callbacks(MLP(4))] == ["ce"]

    @pytest.mark.parametrize("world", ikl.WORLDS.values(), ids=ikl.WORLDS)
    def test_settings_hold_all_that_decides_the_figures(self, world):
        names = {field.name for field in fields(world)} - {"title", "baselines"}
        assert world.settings().keys() == names
        for name in ("teacher_epochs", "epochs"):
            assert replace(world, **{name: 3}).settings() != world.settings()
        for name in ("teacher", "teacher_data", "student", "student_data"):
            changed = partial(getattr(world, name).func, changed=1)
            assert replace(world, **{name: changed}).settings() != world.settings()
        arms = {name: replace(arm, options={**arm.options, "x": 1}) for name, arm in world.arms.items()}
        assert replace(world, arms=arms).settings() != world.settings()
        json.dumps(world.settings())

    def test_the_seed_draws_the_students_samples(self):
        drawn = []

        def data(seed):
            drawn.append(SuperclassDataModule(train_size=20, seed=seed))
            return drawn[-1]

        world = replace(ikl.WORLDS["synthetic"], student_data=data, epochs=1)
        world.run(Run("main", "ce", 7, None, print))
        assert [module.seed for module in drawn] == [7]

    def test_the_search_gave_every_arm_the_same_number_of_settings(self):
        tried = [name.split(".")[0] for name in ikl.candidates()]
        assert {name: tried.count(name) for name in tried} == dict.fromkeys(["ce", "kl", "kd", "ikl", "gkl"], 12)

    def test_the_settings_of_the_report_are_among_those_tried(self):
        arms = ikl.WORLDS["digits"].arms
        tried = ikl.candidates()
        for name, arm in arms.items():
            if name == "kd-4":  # the usual setting, whatever the search says
                assert arm.options == {"temperature": 4.0, "kl_weight": 0.9, "task_weight": 0.1}
            elif name == "ce":
                student = ikl_models.ConvStudent()
                chosen = {"lr": student.lr, "weight_decay": student.weight_decay}
                assert chosen in [other.student for other in tried.values()]
            else:
                assert arm.settings() in [other.settings() for other in tried.values()]

    def test_the_search_looks_at_validation_and_at_other_seeds(self):
        search, report = ikl.experiment(tune=True), ikl.experiment()
        assert search.run.keywords == {"split": "val"}
        assert report.run.keywords == {"split": "test"}
        assert search.first_seed >= report.first_seed + 100


class TestCommand:
    @pytest.fixture(autouse=True)
    def tiny(self, monkeypatch):
        monkeypatch.setattr(ikl, "_FAST_EPOCHS", {"digits": (1, 2), "synthetic": (1, 2)})

    @pytest.mark.parametrize("world", ["digits", "synthetic"])
    def test_runs_and_leaves_its_results(self, world, tmp_path, capsys):
        assert ikl.main(["--world", world, "--fast", "--seeds", "1", "--out", str(tmp_path)]) == 0
        result = json.loads((tmp_path / "result.json").read_text())
        assert {record["arm"] for record in result["records"]} == set(ikl.WORLDS[world].arms)
        assert (tmp_path / "result.png").exists()
        assert (tmp_path / "shared/main/teacher.pt").exists()
        assert "IKL" in capsys.readouterr().out

    @pytest.mark.parametrize("step", [100, 160 + 33])
    def test_ctrl_c_then_resume_gives_the_same_bits(self, step, tmp_path, monkeypatch):
        def figures(folder):
            records = json.loads((folder / "result.json").read_text())["records"]
            return {(record["arm"], record["seed"]): record["metrics"] for record in records}

        options = ["--world", "synthetic", "--fast", "--seeds", "1", "--out"]
        assert ikl.main([*options, str(tmp_path / "unbroken")]) == 0
        training_step, calls = MLP.training_step, []

        def stopping(self, batch):
            calls.append(1)
            if len(calls) == step:
                raise KeyboardInterrupt
            return training_step(self, batch)

        monkeypatch.setattr(MLP, "training_step", stopping)
        assert ikl.main([*options, str(tmp_path / "stopped")]) == 130
        assert ikl.main([*options, str(tmp_path / "stopped"), "--resume"]) == 0
        assert figures(tmp_path / "stopped") == figures(tmp_path / "unbroken")

    def test_another_world_cannot_continue_the_folder(self, tmp_path, capsys):
        assert ikl.main(["--world", "synthetic", "--fast", "--seeds", "1", "--out", str(tmp_path)]) == 0
        assert ikl.main(["--fast", "--resume", "--out", str(tmp_path)]) == 2
        assert 'experiment is "ikl-synthetic" there and "ikl-digits" here' in capsys.readouterr().err

    def test_the_search_is_for_the_digits(self, capsys):
        with pytest.raises(SystemExit, match="2"):
            ikl.main(["--tune", "--world", "synthetic"])
        assert "--tune searches the settings of --world digits only" in capsys.readouterr().err

    def test_is_a_program(self, monkeypatch, capsys):
        monkeypatch.setattr("sys.argv", ["ikl", "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(ikl.__file__, run_name="__main__")
        assert "--resume" in capsys.readouterr().out


def test_teacher_and_student_are_what_the_docs_say():
    student, teacher = ikl_models.ConvStudent(), ikl_models.ResNetTeacher()
    images = torch.rand(3, 1, 8, 8)
    assert student(images).shape == teacher(images).shape == (3, 10)
    assert sum(parameter.numel() for parameter in student.parameters()) == 6090
    assert round(sum(parameter.numel() for parameter in teacher.parameters()) / 1e6, 2) == 0.37


def test_the_teacher_sees_shifted_digits():
    torch.manual_seed(0)
    teacher = ikl_models.ResNetTeacher()
    seen = []
    teacher.forward = lambda images: seen.append(images) or torch.zeros(len(images), 10, requires_grad=True)
    image = torch.rand(2, 1, 8, 8)
    for _ in range(60):
        teacher.training_step((image, torch.tensor([0, 1])))
    padded = F.pad(image, (1, 1, 1, 1))
    shifts = [padded[..., top : top + 8, left : left + 8] for top in range(3) for left in range(3)]
    counts = [sum(torch.equal(one, shift) for one in seen) for shift in shifts]
    assert sum(counts) == 60
    assert min(counts) > 0

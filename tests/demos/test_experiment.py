"""The harness of the demos: paired runs, records, stopping and resuming, statistics, report."""

import json
import logging
import random
import signal
from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import nn

from lightning_methods._files import replace_file, write_json
from lightning_methods.demos import _command, _training
from lightning_methods.demos._command import demo_parser, run_demo
from lightning_methods.demos._experiment import Experiment, Metric, Shared
from lightning_methods.demos._records import Record, ResultFolder, kept_state
from lightning_methods.demos._statistics import estimate
from lightning_methods.demos._training import evaluate, fit


@pytest.fixture(autouse=True, scope="module")
def _python_handles_ctrl_c():
    # A shell starts background jobs with SIGINT ignored, and Python leaves that as it is.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def draw(run):
    """What a run sees of its generators, plus an effect of the arm."""
    run.progress(0.5)
    noise = torch.rand(()).item() + np.random.rand() + random.random()  # noqa: NPY002
    return {"score": noise + {"base": 0.0, "better": 1.0}[run.arm], "loss": noise}


TOY = Experiment(
    name="toy",
    title="A toy",
    arms={"base": "Base", "better": "Better [x]"},
    metrics={"score": Metric("score, %", 3), "loss": Metric("loss")},
    run=draw,
    settings={"student": {"lr": 0.1}},
    baselines=("base",),
    seeds=3,
)


def demo(experiment, folder, *options):
    return run_demo(demo_parser("toy", "A toy."), ["--out", str(folder), *options], lambda _: experiment)


def result(folder):
    """result.json, read as strict JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((folder / "result.json").read_text(), parse_constant=refuse)


def figures(folder):
    """Every measured value, exactly."""
    return {(r["world"], r["arm"], r["seed"]): r["metrics"] for r in result(folder)["records"]}


class TestRuns:
    def test_arms_are_paired_by_seed(self, tmp_path):
        assert demo(TOY, tmp_path) == 0
        found = figures(tmp_path)
        for seed in range(3):
            base, better = found["main", "base", seed], found["main", "better", seed]
            assert better["loss"] == base["loss"]
        assert len({found["main", "base", seed]["loss"] for seed in range(3)}) == 3

    def test_a_run_does_not_depend_on_what_ran_before(self, tmp_path):
        def drawing(stage):
            torch.rand(1000)
            random.random()
            return Shared()

        demo(TOY, tmp_path / "a")
        demo(replace(TOY, arms={"better": "Better"}, baselines=(), prepare=drawing), tmp_path / "b", "--seeds", "1")
        assert figures(tmp_path / "b")["main", "better", 0] == figures(tmp_path / "a")["main", "better", 0]

    def test_every_world_has_its_own_preparation(self, tmp_path):
        prepared = []

        def prepare(stage):
            prepared.append((stage.world, stage.folder))
            return Shared(stage.world, {"length": len(stage.world)})

        def run(run):
            assert run.shared == run.world
            return draw(run)

        demo(replace(TOY, worlds=("one", "three"), prepare=prepare, run=run, seeds=2), tmp_path)
        assert prepared == [("one", tmp_path / "shared/one"), ("three", tmp_path / "shared/three")]
        assert result(tmp_path)["facts"] == {"one": {"length": 3}, "three": {"length": 5}}
        assert len(figures(tmp_path)) == 8

    def test_one_thread_and_then_as_before(self, tmp_path):
        def run(run):
            assert torch.get_num_threads() == 1
            return draw(run)

        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            demo(replace(TOY, run=run, seeds=1), tmp_path)
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)

    def test_run_must_give_the_announced_metrics(self, tmp_path):
        with pytest.raises(ValueError, match=r"run must measure \['score', 'loss'\], but gave \['acc'\]"):
            demo(replace(TOY, run=lambda run: {"acc": 1.0}), tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"arms": {}, "baselines": ()}, "arms must not be empty"),
            ({"arms": {"a/b": "A"}, "baselines": ()}, "'a/b'"),
            ({"worlds": ("..",)}, r"'\.\.'"),
            ({"baselines": ("bse",)}, r"among the arms \['base', 'better'\], got \['bse'\]"),
        ],
    )
    def test_bad_experiments_are_refused(self, change, message):
        with pytest.raises(ValueError, match=message):
            replace(TOY, **change)


class Net(LightningModule):
    """Training with dropout, so that every random number counts."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def test_step(self, batch, batch_idx):
        self.log("score", self.net(batch[0]).mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


class Data(LightningDataModule):
    def train_dataloader(self):
        rows = torch.linspace(-1, 1, 32).view(8, 4)
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=2, shuffle=True)

    test_dataloader = train_dataloader


class InterruptAt(Net):
    """The user presses Ctrl-C in the n-th training step, counted over all trainings."""

    left = 0

    def training_step(self, batch, batch_idx):
        type(self).left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return super().training_step(batch, batch_idx)


def trained(folder, *options):
    """Six trainings of 12 steps each after a teacher's 8."""

    def prepare(stage):
        def train():
            teacher = InterruptAt()
            fit(teacher, Data(), epochs=2, progress=stage.progress)
            return teacher.state_dict()

        state = kept_state(stage.folder / "teacher.pt", train)
        return Shared(state, {"weight": state["net.0.weight"].sum().item()})

    def run(run):
        module = InterruptAt()
        module.load_state_dict(run.shared)
        fit(module, Data(), epochs=3, progress=run.progress)
        return {"score": evaluate(module, Data())["score"], "loss": 0.0}

    return demo(replace(TOY, prepare=prepare, run=run), folder, *options)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    InterruptAt.left = 0
    folder = tmp_path_factory.mktemp("unbroken")
    assert trained(folder) == 0
    return folder


class TestStopAndResume:
    @pytest.mark.parametrize(("step", "finished"), [(5, 0), (9, 0), (8 + 17, 1), (8 + 5 * 12 + 7, 5)])
    def test_ctrl_c_in_mid_run_then_resume_gives_the_same_bits(self, step, finished, unbroken, tmp_path, capsys):
        handler = signal.getsignal(signal.SIGINT)
        InterruptAt.left = step
        assert trained(tmp_path) == 130
        assert signal.getsignal(signal.SIGINT) is handler
        assert f"lightning-methods demo toy --out {tmp_path} --resume" in capsys.readouterr().err
        assert len(list(tmp_path.rglob("seed-*.json"))) == finished
        assert not (tmp_path / "result.json").exists()
        InterruptAt.left = 0
        assert trained(tmp_path, "--resume") == 0
        assert figures(tmp_path) == figures(unbroken)
        assert result(tmp_path)["facts"] == result(unbroken)["facts"]

    def test_two_stops_and_two_resumes(self, unbroken, tmp_path):
        for step, options in [(8 + 17, ()), (20, ("--resume",))]:
            InterruptAt.left = step
            assert trained(tmp_path, *options) == 130
        InterruptAt.left = 0
        assert trained(tmp_path, "--resume") == 0
        assert figures(tmp_path) == figures(unbroken)

    def test_finished_runs_are_not_repeated(self, tmp_path):
        demo(TOY, tmp_path)
        calls = []
        again = replace(TOY, run=lambda run: calls.append((run.arm, run.seed)) or draw(run))
        assert demo(again, tmp_path, "--resume", "--seeds", "4") == 0
        assert calls == [("base", 3), ("better", 3)]
        assert len(figures(tmp_path)) == 8

    def test_resume_without_a_start_starts(self, tmp_path):
        assert demo(TOY, tmp_path / "new", "--resume") == 0

    def test_old_results_are_not_overwritten(self, tmp_path, capsys):
        demo(TOY, tmp_path)
        before = figures(tmp_path)
        assert demo(replace(TOY, run=lambda run: {"score": 0, "loss": 0}), tmp_path) == 2
        assert f"{tmp_path} already holds results: continue them with --resume" in capsys.readouterr().err
        assert figures(tmp_path) == before

    def test_other_settings_are_refused_and_named(self, tmp_path, capsys):
        demo(TOY, tmp_path)
        changed = replace(TOY, settings={"student": {"lr": 0.2}, "epochs": 3})
        assert demo(changed, tmp_path, "--resume") == 2
        error = capsys.readouterr().err
        assert "settings.student.lr is 0.1 there and 0.2 here" in error
        assert "settings.epochs is absent there and 3 here" in error

    def test_another_release_of_torch_is_refused(self, tmp_path, capsys):
        demo(TOY, tmp_path)
        settings = json.loads((tmp_path / "settings.json").read_text())
        settings["versions"]["torch"] = "0.4"
        (tmp_path / "settings.json").write_text(json.dumps(settings))
        assert demo(TOY, tmp_path, "--resume") == 2
        assert 'versions.torch is "0.4" there' in capsys.readouterr().err

    def test_equal_settings_are_equal_after_json(self, tmp_path):
        tuples = replace(TOY, settings={"widths": (1, 2), 3: None})
        demo(tuples, tmp_path)
        assert demo(tuples, tmp_path, "--resume") == 0

    def test_an_exit_that_is_no_ctrl_c_stays_one(self):
        class Quits(Net):
            def training_step(self, batch, batch_idx):
                raise SystemExit(3)

        with pytest.raises(SystemExit, match="3"):
            fit(Quits(), Data(), epochs=1)


class TestFiles:
    def test_a_failed_write_leaves_the_old_file_and_nothing_else(self, tmp_path):
        def breaks_off(path):
            path.write_text("half of ")
            raise OSError("disk full")

        write_json(tmp_path / "x.json", {"a": 1})
        with pytest.raises(OSError, match="disk full"):
            replace_file(tmp_path / "x.json", breaks_off)
        assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
        assert [path.name for path in tmp_path.iterdir()] == ["x.json"]

    def test_a_file_appears_only_when_it_is_whole(self, tmp_path, monkeypatch):
        path = tmp_path / "state.pt"
        seen = []
        save = torch.save
        monkeypatch.setattr(torch, "save", lambda *a: (save(*a), seen.append(path.exists())))
        state = kept_state(path, lambda: {"w": torch.arange(3.0)})
        assert seen == [False]
        assert path.exists()
        assert torch.equal(state["w"], torch.arange(3.0))

    def test_kept_state_is_made_once(self, tmp_path):
        first = kept_state(tmp_path / "a" / "state.pt", lambda: {"w": torch.ones(1)})
        second = kept_state(tmp_path / "a" / "state.pt", pytest.fail)
        assert torch.equal(first["w"], second["w"])

    def test_values_survive_to_the_last_bit(self, tmp_path):
        folder = ResultFolder(tmp_path)
        record = Record("w", "a", 1, {"x": 0.1 + 0.2, "y": 1e-300}, 0.5)
        folder.write(record)
        assert folder.read("w", "a", 1) == record
        assert folder.read("w", "a", 2) is None


class TestStatistics:
    def test_interval_is_students(self):
        values = [93.2, 94.1, 93.7, 95.0, 92.9]
        mean = sum(values) / 5
        sd = sqrt(sum((value - mean) ** 2 for value in values) / 4)
        found = estimate(values)
        assert found.mean == pytest.approx(mean)
        assert found.margin == pytest.approx(2.7764451 * sd / sqrt(5))  # t of 4 degrees of freedom, two-sided 5 %

    def test_one_seed_has_no_interval(self):
        assert estimate([1.0]).margin is None
        assert not estimate([1.0]).clear

    def test_differences_are_paired(self, tmp_path):
        # The seeds differ by tens, the arms by exactly 1 in each.
        run = lambda run: {"score": 10.0 * run.seed + (run.arm == "better"), "loss": 0.0}  # noqa: E731
        demo(replace(TOY, run=run), tmp_path)
        summary = result(tmp_path)["summary"]["main"]
        assert summary["better"]["differences"]["score"]["base"] == {"mean": 1.0, "margin": 0.0}
        assert summary["better"]["estimates"]["score"]["margin"] > 20
        assert summary["base"]["differences"]["score"] == {}


class TestReport:
    def test_table_shows_mean_difference_and_every_seed(self, tmp_path, capsys):
        run = lambda run: {"score": run.seed + 0.25 * (run.arm == "better"), "loss": run.seed - 1}  # noqa: E731
        demo(replace(TOY, run=run, notes=("Read this [first].",)), tmp_path)
        shown = capsys.readouterr().out
        assert "1.250 ± 2.484" in shown
        assert "+0.250 ± 0.000" in shown
        words = " ".join(shown.split())
        assert "seed 0 1 2" in words
        assert "Better [x] 0.250 1.250 2.250" in words
        assert "Read this [first]." in shown

    def test_a_difference_that_may_be_nothing_is_in_brackets(self, tmp_path, capsys):
        run = lambda run: {"score": (run.arm == "better") * (run.seed - 0.5), "loss": 0.0}  # noqa: E731
        demo(replace(TOY, run=run), tmp_path)
        assert "(+0.500 ± 2.484)" in capsys.readouterr().out

    def test_many_seeds_keep_their_width(self, tmp_path, capsys):
        run = lambda run: {"score": 100 + run.seed**2 / 1000, "loss": 0.0}  # noqa: E731
        demo(replace(TOY, run=run), tmp_path, "--seeds", "23")
        shown = capsys.readouterr().out
        words = shown.split()
        assert all(words.count(f"{100 + seed**2 / 1000:.3f}") == 2 for seed in range(23))
        assert "…" not in shown

    def test_many_metrics_go_into_several_tables(self, tmp_path, capsys):
        metrics = {f"m{number}": Metric(f"metric {number}, %") for number in range(9)}
        run = lambda run: {f"m{number}": number + run.seed / 8 for number in range(9)}  # noqa: E731
        demo(replace(TOY, metrics=metrics, run=run), tmp_path)
        shown = capsys.readouterr().out
        assert "…" not in shown
        assert all(f"metric {number}, %" in shown for number in range(9))
        assert [shown.count(f"{number}.12 ± 0.31") for number in range(9)] == [2] * 9
        assert max(map(len, shown.split("Mean ±")[0].splitlines()[-12:])) <= 80

    def test_json_holds_everything(self, tmp_path):
        demo(TOY, tmp_path, "--seeds", "1")
        found = result(tmp_path)
        assert found["settings"] == {"student": {"lr": 0.1}}
        assert {"python", "torch", "pytorch-lightning", "lightning-methods"} <= set(found["versions"])
        assert found["seconds_of_this_call"] >= found["seconds_of_runs"] >= 0
        assert found["records"][0].keys() == {"world", "arm", "seed", "metrics", "seconds"}

    @pytest.mark.parametrize("worlds", [("main",), ("one", "two")])
    def test_plot_is_a_png(self, worlds, tmp_path):
        demo(replace(TOY, worlds=worlds), tmp_path)
        assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")


class TestCommand:
    def test_missing_extra_is_one_sentence(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(_command, "find_spec", lambda name: None if name in ("rich", "sklearn") else object())
        assert demo(TOY, tmp_path / "out") == 1
        expected = 'The demos need sklearn, rich: pip install "lightning-methods[demos]"\n'
        assert capsys.readouterr().err == expected
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("seeds", ["0", "-1", "two"])
    def test_seeds_must_be_positive(self, seeds, tmp_path, capsys):
        with pytest.raises(SystemExit):
            demo(TOY, tmp_path, "--seeds", seeds)
        assert f"expected a whole number of at least 1, got '{seeds}'" in capsys.readouterr().err

    def test_default_folder_is_the_demos_own(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for options in ([], ["--fast"]):
            assert run_demo(demo_parser("toy", "A toy."), options, lambda _: TOY) == 0
        assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["toy", "toy-fast"]

    def test_lightning_is_quiet_and_then_as_before(self, recwarn, capsys):
        logger, said = logging.getLogger("pytorch_lightning"), []
        handler = logging.Handler()
        handler.emit = said.append
        level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        try:
            fit(Net(), Data(), epochs=1)
            evaluate(Net(), Data())
            assert logger.level == logging.INFO
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
        assert not said
        assert not recwarn.list
        assert capsys.readouterr() == ("", "")


def test_progress_reaches_the_end():
    seen = []
    _training.fit(Net(), Data(), epochs=4, progress=seen.append)
    assert seen == [0.25, 0.5, 0.75, 1.0]

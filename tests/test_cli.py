"""The console command, run in this process where possible: importing Lightning takes seconds."""

import logging
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_methods.cli import main
from lightning_methods.registry import METHODS

PROJECT = """
    import torch
    import torch.nn.functional as F
    from {package} import LightningDataModule, LightningModule
    from torch import nn

    class Net(LightningModule):
        def __init__(self, lr: float = 0.1):
            super().__init__()
            self.net = nn.Linear(4, 3)
            self.lr = lr

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return {{"loss": F.cross_entropy(self(batch["x"]), batch["y"])}}

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self(batch["x"]), batch["y"]))

        test_step = validation_step

        def predict_step(self, batch, batch_idx):
            return self(batch["x"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    class Data(LightningDataModule):
        def __init__(self, size: int = 12):
            super().__init__()
            if size < 1:
                raise ValueError(f"size must be at least 1, got {{size}}")
            generator = torch.Generator().manual_seed(0)
            self.rows = [
                {{"x": torch.randn(4, generator=generator), "y": torch.tensor(i % 3)}} for i in range(size)
            ]

        def train_dataloader(self):
            return torch.utils.data.DataLoader(self.rows, batch_size=6)

        val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    class Teacher(nn.Linear):
        def __init__(self, classes: int = 3):
            super().__init__(4, classes)
"""
METHODS_OF_ITS_OWN = """
    from lightning_methods.attach import Method, address
    from lightning_methods.mixins import IKLDistillationMixin
    from project import Net, Teacher

    class Shrink(Method):
        def __init__(self):
            super().__init__(name="shrink")
            self.image = address("batch.x")
            self.unseen = address("module.net")

        def rewrite(self, step):
            step[self.image] = step[self.image][:2]
            step["batch.y"] = step["batch.y"][:2]

    class Distilled(IKLDistillationMixin, Net):
        def __init__(self):
            super().__init__()
            self.ikl = {"teacher": Teacher(), "inputs": "batch.x", "class_wise": False}
"""
CONFIG = """
    model: {class_path: project.Net}
    data: {class_path: project.Data}
    trainer:
      accelerator: cpu
      max_epochs: 240
      logger: false
      callbacks:
        - class_path: lightning_methods.callbacks.IKLDistillation
          init_args:
            teacher: {class_path: project.Teacher}
            inputs: batch.x
            target: batch.y
            wmse_weight: 8.0
            warmup_epochs: 20
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's folder with a module, data and a configuration, as the current one."""
    files = {
        "project.py": PROJECT.format(package="pytorch_lightning"),
        "own.py": METHODS_OF_ITS_OWN,
        "net.yaml": CONFIG,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(textwrap.dedent(text))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["lightning-methods"])
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "0")  # so that what `seed_everything` sets is taken back
    levels = {name: logging.getLogger(name).level for name in ("pytorch_lightning", "lightning.pytorch")}
    yield tmp_path
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for name in ("project", "own"):
        sys.modules.pop(name, None)


def check(*overrides):
    with torch.random.fork_rng():
        return main(["check", "--config", "net.yaml", *overrides])


def ikl(**arguments):
    """Overrides of the callback's arguments."""
    return [f"--trainer.callbacks.init_args.{name}={value}" for name, value in arguments.items()]


def rows(output):
    """The cells of every line of the report's tables, by their first."""
    lines = [re.split(r"  +", line.strip()) for line in output.splitlines() if line.startswith("  ")]
    return {line[0]: line[1:] for line in lines}


def total(output):
    return float(re.search(r"total loss (\S+)", output)[1])


def test_list_has_a_line_for_every_method(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[info.name, info.kind] for info in METHODS]


def test_show_tells_what_the_registry_knows(capsys):
    for info in METHODS:
        assert main(["show", info.name]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert info.title in text
        assert info.paper in text
        assert info.card in text
        for name in info.demos:
            assert f"lightning-methods demo {name}" in text
        for name in (*info.callbacks, *info.functional, *info.known_limits):
            assert " ".join(name.split()) in text


def test_list_and_show_import_no_torch():
    code = "import sys; from lightning_methods.cli import main; main(['list']); main(['show', 'ikl'])"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "usage: lightning-methods COMMAND"),
        (["lst"], "there is no command 'lst'"),
        (["list", "all"], "`list` takes no arguments, but got all"),
        (["show"], "`show` takes the name of one method: "),
        (["show", "kli"], "There is no method 'kli'; there are "),
        (["demo"], "`demo` takes the name of a demo, or `all`: "),
        (["demo", "--fast"], "`demo` takes the name of a demo, or `all`: "),
        (["demo", "kli"], "There is no demo 'kli'; there are "),
    ],
)
def test_arguments_that_cannot_be_understood(arguments, says, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""


def test_help(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("list", "show", "demo", "check", "fit", "validate", "test", "predict"):
        assert command in text


def test_demo_passes_its_options_on(monkeypatch):
    calls = []
    rows = tuple(
        replace(METHODS[0], name=name, more_demos=more) for name, more in (("fine", ("fine_too",)), ("worse", ()))
    )
    monkeypatch.setattr("lightning_methods.cli.METHODS", rows)
    monkeypatch.setattr("lightning_methods.registry.METHODS", rows)
    for status, name in ((0, "fine"), (1, "fine_too"), (3, "worse")):
        demo = SimpleNamespace(main=lambda options, name=name, status=status: calls.append((name, options)) or status)
        monkeypatch.setitem(sys.modules, f"lightning_methods.demos.{name}", demo)
    assert main(["demo", "fine_too", "--seeds", "2", "--fast"]) == 1
    assert main(["demo", "all", "--resume"]) == 3
    everything = [(name, ["--resume"]) for name in ("fine", "fine_too", "worse")]
    assert calls == [("fine_too", ["--seeds", "2", "--fast"]), *everything]


@pytest.mark.parametrize(("package", "extras"), [("sklearn", "demos"), ("transformers", "demos,text")])
def test_demo_names_the_extra_that_is_missing(package, extras, monkeypatch, capsys):
    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name == "lightning_methods.demos.ikl":
                raise ModuleNotFoundError(f"No module named '{package}'", name=package)

    monkeypatch.delitem(sys.modules, "lightning_methods.demos.ikl", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    assert main(["demo", "ikl"]) == 1
    says = f'{package}, which is not installed: pip install "lightning-methods[{extras}]"'
    assert says in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
class TestCheck:
    def test_shows_every_address_and_term(self, project, capsys):
        before = sorted(project.rglob("*.*"))
        assert check() == 0
        output = capsys.readouterr().out
        table = rows(output)
        assert table["student_logits"] == ["module", "Tensor [6, 3] float32 on cpu, with gradient"]
        assert table["teacher_logits"] == ["teacher", "Tensor [6, 3] float32 on cpu"]
        assert table["target"] == ["batch.y", "Tensor [6] int64 on cpu"]
        assert table["teacher.inputs"] == ["batch.x", "Tensor [6, 4] float32 on cpu"]
        # The first of 20 epochs of warm-up, although only one step is run.
        assert table["wmse"][1] == "8 × 0.05 (ramp)"
        assert table["soft_ce"][1] == "1 × 0.05 (ramp)"
        task, wmse, soft_ce = (float(table[term][0]) for term in ("task", "wmse", "soft_ce"))
        assert wmse > 0
        assert total(output) == pytest.approx(task + 0.05 * (8 * wmse + soft_ce), rel=1e-4)
        assert [path for path in sorted(project.rglob("*.*")) if "__pycache__" not in str(path)] == before

    def test_total_is_the_loss_before_accumulation_divides_it(self, project, capsys):
        assert check() == 0
        once = total(capsys.readouterr().out)
        assert check("--trainer.accumulate_grad_batches=2") == 0
        assert total(capsys.readouterr().out) == pytest.approx(once, rel=1e-5)

    def test_share_of_the_configured_epochs(self, project, capsys):
        assert check(*ikl(warmup_epochs=0.25), "--trainer.max_epochs=16") == 0
        assert rows(capsys.readouterr().out)["wmse"][1] == "8 × 0.25 (ramp)"

    def test_weight_of_the_task(self, project, capsys):
        assert check(*ikl(task_weight=0.5, wmse_weight=0, warmup_epochs=1)) == 0
        output = capsys.readouterr().out
        table = rows(output)
        assert table["task"][1] == "0.5"
        assert total(output) == pytest.approx(0.5 * float(table["task"][0]) + float(table["soft_ce"][0]), rel=1e-4)

    def test_address_that_is_not_needed_is_no_error(self, project, capsys):
        assert check(*ikl(target="batch.label", class_wise="false")) == 0
        assert rows(capsys.readouterr().out)["target"] == ["batch.label", "nothing"]

    def test_what_resolves_is_shown_beside_the_error(self, project, capsys):
        assert check(*ikl(target="batch.label")) == 1
        captured = capsys.readouterr()
        table = rows(captured.out)
        assert table["student_logits"] == ["module", "Tensor [6, 3] float32 on cpu, with gradient"]
        assert table["target"] == ["batch.label", "nothing"]
        assert captured.err.startswith("error: Address 'batch.label': batch is a dict of 2, which has no 'label'.")

    @pytest.mark.parametrize(
        ("overrides", "says"),
        [
            (["--foo=1"], "foo"),
            (["--config=nowhere.yaml"], "config: File does not exist"),
            (["--trainer.max_epochs=ten"], "trainer.max_epochs: Expected a <class 'int'>"),
            (["--model=project.Nett"], "model: Problem with given class_path 'project.Nett': module 'project' has no"),
            (["--data.size=0"], "size must be at least 1, got 0"),
            (ikl(bogus=1), "trainer.callbacks: Problem with given class_path 'lightning_methods.callbacks.IKL"),
            (ikl(gamma=2), "Expected `gamma` only with variant='gkl'"),
            (ikl(student_logits="modul"), "Address 'modul' begins with 'modul'"),
            (ikl(student_logits="module.nett"), "has no submodule, parameter or buffer 'nett'"),
            (ikl(teacher_checkpoint="no.ckpt"), "there is no file no.ckpt"),
            (["--trainer.callbacks=null"], "No method is attached; the Trainer's callbacks are: none."),
            (ikl(inputs="module"), "RuntimeError: "),
        ],
    )
    def test_every_error_is_one_sentence(self, project, capsys, overrides, says):
        assert check(*overrides) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert says in error
        assert "Traceback" not in error
        assert "Union" not in error
        assert len(error.splitlines()) == 1

    def test_method_that_only_rewrites(self, project, capsys):
        assert check("--trainer.callbacks=own.Shrink") == 0
        output = capsys.readouterr().out
        assert rows(output) == {
            "argument": ["address", "value"],
            "image": ["batch.x", "Tensor [2, 4] float32 on cpu"],
        }
        assert total(output) > 0

    def test_several_methods(self, project, capsys):
        assert check("--trainer.callbacks+=own.Shrink") == 0
        output = capsys.readouterr().out
        assert output.index("IKLDistillation 'ikl'") < output.index("Shrink 'shrink'")
        assert rows(output)["student_logits"] == ["module", "Tensor [2, 3] float32 on cpu, with gradient"]

    def test_method_that_is_off(self, project, capsys):
        assert check(*ikl(wmse_weight=0, ce_weight=0)) == 0
        assert "IKLDistillation 'ikl'\n  did nothing: all its weights are 0\n" in capsys.readouterr().out

    def test_method_of_a_mixin(self, project, capsys):
        assert check("--trainer.callbacks=null", "--model=own.Distilled") == 0
        assert rows(capsys.readouterr().out)["teacher.inputs"][0] == "batch.x"

    def test_checkpoints_and_progress_bars_are_left_out(self, project, capsys):
        callbacks = [
            "--trainer.callbacks+=pytorch_lightning.callbacks.OnExceptionCheckpoint",
            "--trainer.callbacks.dirpath=kept",
            "--trainer.callbacks+=pytorch_lightning.callbacks.RichProgressBar",
            "--trainer.logger=pytorch_lightning.loggers.CSVLogger",
            "--trainer.logger.save_dir=logs",
        ]
        assert check(*callbacks) == 0
        assert total(capsys.readouterr().out) > 0
        assert check(*ikl(target="batch.label"), *callbacks) == 1
        assert not (project / "kept").exists()
        assert not (project / "logs").exists()


@pytest.mark.filterwarnings("ignore")
def test_fit_validate_test_predict(project):
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    config = ["--config", "net.yaml", "--trainer.logger=true", *quiet]
    with torch.random.fork_rng():
        assert main(["fit", *config, "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1"]) == 0
        (path,) = project.rglob("*.ckpt")
        for command in ("validate", "test", "predict"):
            assert main([command, *config, f"--ckpt_path={path}"]) == 0
    content = torch.load(path, weights_only=True)
    assert sorted(content["state_dict"]) == ["net.bias", "net.weight"]
    assert content["callbacks"]["IKLDistillation[ikl]"]["class_means"]["class_probs"].shape == (3, 3)


def test_module_of_the_other_lightning(project):
    """The console command itself, with a module that imports `lightning`."""
    (project / "project.py").write_text(textwrap.dedent(PROJECT.format(package="lightning")))
    command = [str(Path(sys.executable).with_name("lightning-methods")), "check", "--config=net.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=project, env=environment)
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout)["student_logits"] == ["module", "Tensor [6, 3] float32 on cpu, with gradient"]

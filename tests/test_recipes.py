"""The recipes in the top-level folder `callbacks/`, used in each of the three ways that its index promises."""

import logging
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from pytorch_lightning import Callback, Trainer
from recipe_worlds import WORLDS, write_hmdb51

from lightning_methods import callbacks
from lightning_methods.cli import main
from lightning_methods.plugin import VARIABLE, callbacks_from_environment
from lightning_methods.registry import METHODS

FOLDER = Path(__file__).parents[1] / "callbacks"
RECIPES = sorted(FOLDER.rglob("*.yaml"))

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice, and jsonargparse's on its own names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder that holds the files that the recipes name."""
    folder = tmp_path_factory.mktemp("user")
    write_hmdb51(folder)
    (folder / "checkpoints").mkdir()
    torch.save(timm.create_model("resnet34", num_classes=100).state_dict(), folder / "checkpoints" / "teacher.ckpt")
    return folder


@pytest.fixture
def user(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["lightning-methods"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "0")  # so that what `seed_everything` sets is taken back
    level = logging.getLogger("pytorch_lightning").level
    with torch.random.fork_rng():
        yield
    logging.getLogger("pytorch_lightning").setLevel(level)


def arguments(command, path):
    """The command with a recipe, and the module and data that it is for."""
    trainer = {"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1, "logger": "false"}
    if command == "fit":
        trainer |= dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), "false")
    options = [f"--trainer.{name}={value}" for name, value in trainer.items()]
    model, data = (f"{kind.__module__}.{kind.__name__}" for kind in WORLDS[path.stem])
    return [command, "--config", str(path), f"--model={model}", f"--data={data}", *options]


def test_every_method_has_a_recipe():
    assert set(WORLDS) == {path.stem for path in RECIPES}
    assert [path.relative_to(FOLDER).as_posix() for path in RECIPES] == sorted(f"{info.name}.yaml" for info in METHODS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_both_readers_build_the_same_callbacks(path, user, monkeypatch):
    from pytorch_lightning.cli import LightningCLI

    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path)])
    quiet = {"logger": False, "enable_checkpointing": False}
    by_cli = LightningCLI(*WORLDS[path.stem], run=False, save_config_callback=None, trainer_defaults=quiet)
    monkeypatch.setenv(VARIABLE, str(path))
    by_plugin = callbacks_from_environment()
    names = {name for info in METHODS if info.name == path.stem for name in info.callbacks}
    methods = [callback for callback in by_cli.trainer.callbacks if type(callback).__name__ in names]
    assert [repr(callback) for callback in by_plugin] == [repr(callback) for callback in methods]
    assert {type(callback).__name__ for callback in by_plugin} <= names
    assert by_plugin


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_environment_variable(path, user, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(path))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, log_every_n_steps=1, accelerator="cpu", enable_model_summary=False, **quiet)
    model, data = WORLDS[path.stem]
    trainer.fit(model(), data())
    assert trainer.global_step == 2
    assert any(key.startswith(f"{path.stem}/") for key in trainer.callback_metrics)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_check(path, user, capsys):
    assert main(arguments("check", path)) == 0
    output = capsys.readouterr().out
    assert " nothing\n" not in output
    assert "total loss" in output


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_fit(path, user, monkeypatch):
    seen = []

    class Spy(Callback):
        def on_train_end(self, trainer, pl_module):
            seen.append(set(trainer.callback_metrics))

    monkeypatch.setattr(sys.modules[__name__], "Spy", Spy, raising=False)
    assert main([*arguments("fit", path), f"--trainer.callbacks+={__name__}.Spy"]) == 0
    assert any(key.startswith(f"{path.stem}/") for key in seen[0])
    Path("config.yaml").unlink()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_index_links_to_code_and_card(path):
    index = (FOLDER / "README.md").read_text()
    row = next(line for line in index.splitlines() if line.startswith(f"| [{path.name}]({path.name}) |"))
    links = re.findall(r"\]\(([^)]+)\)", row)
    assert all((FOLDER / link).exists() for link in links)
    for item in yaml.safe_load(path.read_text())["trainer"]["callbacks"]:
        package, name = item["class_path"].rsplit(".", 1)
        assert package == "lightning_methods.callbacks"
        assert name in callbacks.__all__
        assert f"[`{name}`](../lightning_methods/callbacks/{path.stem}.py)" in row

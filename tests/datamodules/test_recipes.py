"""The recipes in the top-level folder `datamodules/`."""

import re
import sys
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from pytorch_lightning import LightningDataModule
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.demos.boring_classes import BoringModel

from lightning_methods import datamodules

FOLDER = Path(__file__).parents[2] / "datamodules"
RECIPES = sorted(FOLDER.rglob("*.yaml"))


def test_there_is_a_recipe_for_every_datamodule():
    assert len(RECIPES) == 33
    named = [re.search(r"class_path: lightning_methods\.datamodules\.(\w+)\n", path.read_text())[1] for path in RECIPES]
    assert set(named) == {name for name in datamodules.__all__ if name.endswith("DataModule")}


@pytest.mark.filterwarnings("ignore")  # the name of `instantiate_classes` changed in jsonargparse 4.49
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_gives_the_datamodule_with_all_its_settings(path):
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    config = parser.parse_path(path)
    data = parser.instantiate_classes(config).data
    assert type(data).__name__ == config.data.class_path.rsplit(".", 1)[1]
    # Every argument is spelled out, so that the file shows what there is to change.
    spelled_out = set(re.findall(r"^    (\w+):", path.read_text(), re.MULTILINE))
    assert spelled_out == set(vars(config.data.init_args))


@pytest.mark.filterwarnings("ignore")
def test_recipe_trains_under_lightning_cli(tmp_path, monkeypatch):
    class Model(BoringModel):
        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).square().mean()

        validation_step = training_step

    settings = {
        "trainer.max_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.limit_val_batches": 1,
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.default_root_dir": tmp_path,
        "data.train_size": 100,
    }
    arguments = ["fit", "--config", str(FOLDER / "superclass.yaml"), *(f"--{k}={v}" for k, v in settings.items())]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    cli = LightningCLI(Model, save_config_callback=None)
    assert cli.trainer.global_step == 1
    assert len(cli.datamodule.splits["train"][0]) == 100


def test_index_links_every_recipe_to_its_code():
    index = (FOLDER / "README.md").read_text()
    for path in RECIPES:
        name = re.search(r"datamodules\.(\w+)\n", path.read_text())[1]
        row = next(line for line in index.splitlines() if line.startswith(f"| [{path.name}]({path.name}) |"))
        code = re.search(rf"\[`{name}`\]\((.+?)\)", row)[1]
        assert f"class {name}(" in (FOLDER / code).read_text()

"""Methods attached from outside: to scripts that never mention this package, by one environment variable."""

import copy
import csv
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from plain import Batches, Plain, pairs, same, trainer

from lightning_methods.callbacks import IKLDistillation
from lightning_methods.plugin import VARIABLE, callbacks_from_environment

SCRIPT = """
import sys
import torch
import {package} as lightning
from {package}.loggers import CSVLogger

class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 3)
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = torch.nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

lightning.seed_everything(0)
data = [(torch.randn(4), torch.tensor(index % 3)) for index in range(12)]
trainer = lightning.Trainer(
    max_epochs=1, log_every_n_steps=1, accelerator="cpu", logger=CSVLogger({folder!r}, name="", version=""),
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(Net(), torch.utils.data.DataLoader(data, batch_size=4))
ours = sorted(name for name in sys.modules if name.startswith("lightning_methods"))
"""

RECIPE = """
trainer:
  callbacks:
    - class_path: lightning_methods.callbacks.IKLDistillation
      init_args:
        teacher: {class_path: torch.nn.Linear, init_args: {in_features: 4, out_features: 3}}
        class_wise: false
        wmse_weight: 0.5
"""


def columns(folder):
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    return set(rows[0]), [row["train_loss"] for row in rows]


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_a_script_that_never_mentions_the_package_shows_the_terms_in_its_logs(fresh, tmp_path, package):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    plain = SCRIPT.format(package=package, folder=str(tmp_path / "plain"))
    imported = fresh[package](plain + 'print("\\nOURS", ours)')
    # Unset, it costs an import of next to nothing.
    assert imported.splitlines()[-1] == "OURS ['lightning_methods', 'lightning_methods.plugin']"
    fresh[package](SCRIPT.format(package=package, folder=str(tmp_path / "attached")), LIGHTNING_METHODS=str(recipe))
    without, losses = columns(tmp_path / "plain")
    attached, other_losses = columns(tmp_path / "attached")
    assert not any("ikl" in name for name in without)
    assert attached - without == {"ikl/wmse", "ikl/soft_ce", "ikl/loss", "ikl/ramp"}
    assert losses[0] == other_losses[0], "the first step sees the same module and data"
    assert losses[2] != other_losses[2]


def test_importing_it_loads_nothing_else():
    code = """
        import sys
        before = set(sys.modules)
        import lightning_methods.plugin
        assert lightning_methods.plugin.callbacks_from_environment() == []
        heavy = {"torch", "jsonargparse", "yaml", "pytorch_lightning", "lightning", "lightning_methods.attach"}
        print(sorted(heavy & set(sys.modules)), len(set(sys.modules) - before) < 60)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env={VARIABLE: ""}, check=False
    )
    assert done.stdout == "[] True\n", done.stderr


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a recipe and has the variable name it."""

    def write(text):
        path = tmp_path / "recipe.yaml"
        if isinstance(text, bytes):
            path.write_bytes(text)
        else:
            path.write_text(text)
        monkeypatch.setenv(VARIABLE, str(path))
        return path

    return write


def test_every_trainer_gets_callbacks_of_its_own(recipe):
    recipe(RECIPE)
    first, second = ([c for c in trainer().callbacks if isinstance(c, IKLDistillation)] for _ in range(2))
    assert len(first) == len(second) == 1
    assert first[0] is not second[0]
    assert first[0].weights == {"wmse": 0.5, "soft_ce": 1.0}


@pytest.mark.parametrize("value", [None, ""])
def test_unset_or_empty_gives_none(monkeypatch, value):
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    assert callbacks_from_environment() == []


@pytest.mark.parametrize(
    "text",
    [
        "trainer: {callbacks: []}",
        "trainer:\n  max_epochs: 3\n  callbacks: []\nmodel: {lr: 0.1}\ndata: null",
        "seed_everything: 1\ntrainer: {callbacks: []}\n",
    ],
)
def test_other_keys_are_left_to_lightningcli(recipe, text):
    recipe(text)
    assert callbacks_from_environment() == []


def test_several_callbacks_and_lightnings_own(recipe):
    recipe(RECIPE + "    - class_path: pytorch_lightning.callbacks.Timer\n      init_args: {duration: '00:00:01:00'}\n")
    assert [type(callback).__name__ for callback in callbacks_from_environment()] == ["IKLDistillation", "Timer"]


def test_yaml_with_anchors_and_merged_keys(recipe):
    recipe("""
common: &common
  callbacks:
    - &timer {class_path: pytorch_lightning.callbacks.Timer}
    - *timer
trainer:
  <<: *common
""")
    assert [type(callback).__name__ for callback in callbacks_from_environment()] == ["Timer", "Timer"]


# --- what is wrong, and in which line --------------------------------------------------------------


def test_a_missing_file_names_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match=rf"{VARIABLE} names .*none\.yaml: the file cannot be read: No such file"):
        callbacks_from_environment()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match=rf"{VARIABLE} names .*: the file cannot be read: Is a directory"):
        trainer()


@pytest.mark.parametrize(
    ("text", "line"),
    [("trainer:\n  callbacks: [\n", 3), ("trainer:\n  callbacks:\n - x: {\n", 3), ("a: 1\nb: 2\n\tc: 3\n", 3),
     ("a: *nothing\n", 1)],
)  # fmt: skip
def test_what_is_not_yaml_names_the_line(recipe, text, line):
    path = recipe(text)
    with pytest.raises(ValueError, match=rf"{VARIABLE} names {path}, line {line}: the file is not YAML: "):
        callbacks_from_environment()


@pytest.mark.parametrize("content", [b"\x80\x81\xff", b"trainer: \x00"])
def test_a_file_that_is_no_text_names_the_variable(recipe, content):
    path = recipe(content)
    with pytest.raises(ValueError, match=rf"{VARIABLE} names {path}.*: the file is not YAML: "):
        callbacks_from_environment()


@pytest.mark.parametrize(
    "text",
    ["", "- 1\n", "text", "trainer: 3", "trainer: []", "callbacks: []", "trainer: {callbacks: {}}",
     "trainer: {callbacks: null}", "trainer: {callbacks: lightning_methods.callbacks.IKLDistillation}"],
)  # fmt: skip
def test_a_file_without_a_list_of_callbacks(recipe, text):
    path = recipe(text)
    with pytest.raises(ValueError, match=rf"{VARIABLE} names {path}: expected a list of callbacks at the key `trai"):
        callbacks_from_environment()


ITEM = "trainer:\n  callbacks:\n    - class_path: pytorch_lightning.callbacks.Timer\n    # a comment\n{}"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("    - class_path: lightning_methods.callbacks.IKLDistilation\n", "IKLDistilation"),
        ("    - class_path: nowhere.Method\n", "nowhere"),
        ("    - class_path: torch.nn.Linear\n", "torch.nn.Linear"),
        ("    - class_path: lightning_methods.callbacks.IKLDistillation\n", "teacher"),
        ("    - class_path: lightning_methods.callbacks.IKLDistillation\n      init_args: {teecher: x}\n", "teecher"),
        ("    - class_path: lightning_methods.callbacks.IKLDistillation\n      init_args: {teacher: 'timm:resnet18', "
         "gamma: high}\n", "gamma"),
        ("    - class_path: lightning_methods.callbacks.IKLDistillation\n      init_args: {teacher: 'timm:resnet18', "
         "gamma: 0.5}\n", "Expected `gamma` only with variant='gkl'"),
        ("    - class_path: lightning_methods.callbacks.IKLDistillation\n      init_args: {teacher: 'timm:resnet18', "
         "student_logits: modul}\n", "Did you mean 'module'"),
        ("    - {init_args: {}}\n", "class_path|init_args"),
        ("    - 3\n", "3"),
        ("    - \n", ""),
    ],
)  # fmt: skip
def test_a_callback_that_cannot_be_built_names_its_line(recipe, item, message):
    path = recipe(ITEM.format(item))
    with pytest.raises(ValueError, match=rf"{VARIABLE} names {path}, line 5: the callback cannot be built: ") as error:
        callbacks_from_environment()
    assert re.search(message, str(error.value))


def test_a_wrong_recipe_stops_the_trainer_not_the_import(recipe):
    recipe("trainer: 3")
    with pytest.raises(ValueError, match=VARIABLE):
        trainer()


def test_the_recipe_trains_like_the_callback_in_the_list(recipe, monkeypatch):
    recipe(RECIPE.replace("torch.nn.Linear, init_args: {in_features: 4, out_features: 3}", "plain.Plain"))
    from_recipe, from_list = Plain(), Plain()
    with torch.no_grad():
        for module in (from_recipe, from_list):
            module.net[0].weight.mul_(2)  # else the student is its teacher
    trainer().fit(from_recipe, Batches(pairs()))
    monkeypatch.delenv(VARIABLE)
    plain = copy.deepcopy(from_list)
    trainer().fit(plain, Batches(pairs()))
    trainer(IKLDistillation(Plain(), class_wise=False, wmse_weight=0.5)).fit(from_list, Batches(pairs()))
    assert not same(from_list, plain)
    assert same(from_recipe, from_list)

"""The examples are short enough to read whole, and run."""

import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch

from lightning_methods.registry import METHODS

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.rglob("*.py"))


def test_there_is_one_for_every_method():
    assert len(EXAMPLES) == len(METHODS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_fits_on_a_page(path):
    assert len(path.read_text().splitlines()) <= 80


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs_as_a_program(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--fast"])
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "0")  # so that what `seed_everything` sets is taken back
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and the like
        runpy.run_path(str(path), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if re.search(r"\d %", line)]
    assert len(lines) >= 2

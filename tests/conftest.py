"""Shared by every test: one thread, a quiet Lightning, and the folder of the shared modules on the path."""

import logging
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # `plain` is found under any of pytest's import modes
torch.set_num_threads(1)

from fresh import Fresh  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def _quiet():
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def fresh():
    """Runs code in a process that has imported one Lightning package and nothing of ours: `fresh[package](code)`."""
    processes = {package: Fresh(package) for package in ("pytorch_lightning", "lightning.pytorch")}
    yield processes
    for process in processes.values():
        process.close()

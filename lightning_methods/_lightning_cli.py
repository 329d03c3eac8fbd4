"""LightningCLI, and what else of Lightning the command line needs, of the package that is in use.

The choice is that of `lightning_methods.attach._lightning`, and is made when this file is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lightning_methods.attach._lightning import package

if TYPE_CHECKING:
    from pytorch_lightning import Trainer
    from pytorch_lightning.callbacks import Checkpoint, ModelSummary, ProgressBar
    from pytorch_lightning.cli import LightningCLI
else:
    _package = package()
    Trainer = _package.Trainer
    Checkpoint = _package.callbacks.Checkpoint
    ModelSummary = _package.callbacks.ModelSummary
    ProgressBar = _package.callbacks.ProgressBar
    LightningCLI = importlib.import_module(f"{_package.__name__}.cli").LightningCLI

__all__ = ["Checkpoint", "LightningCLI", "ModelSummary", "ProgressBar", "Trainer"]

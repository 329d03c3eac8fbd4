"""LightningCLI, and what else of Lightning the command line needs, of the package that is in use.

The choice is that of `lightning_methods.attach._lightning`, and is made when this file is imported.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytorch_lightning import Trainer
    from pytorch_lightning.callbacks import Checkpoint, ModelSummary, ProgressBar
    from pytorch_lightning.cli import LightningCLI
else:
    _other = "lightning.pytorch" in sys.modules and "pytorch_lightning" not in sys.modules
    _package = importlib.import_module("lightning.pytorch" if _other else "pytorch_lightning")
    Trainer = _package.Trainer
    Checkpoint = _package.callbacks.Checkpoint
    ModelSummary = _package.callbacks.ModelSummary
    ProgressBar = _package.callbacks.ProgressBar
    LightningCLI = importlib.import_module(f"{_package.__name__}.cli").LightningCLI

__all__ = ["Checkpoint", "LightningCLI", "ModelSummary", "ProgressBar", "Trainer"]

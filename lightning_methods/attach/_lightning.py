"""Which Lightning: the one place that chooses between `pytorch_lightning` and `lightning.pytorch`.

Both packages ship the same classes under two names, and `isinstance` across them is false. A Trainer
of either runs a callback of the other, but jsonargparse (so LightningCLI) checks the type. Therefore the
classes come from whichever package the program has already imported; where it has imported both, a
callback derives from both base classes; where it has imported neither, `pytorch_lightning` is taken.
"""

from __future__ import annotations

import copy
import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, Union


def _packages() -> list[ModuleType]:
    names = [name for name in ("pytorch_lightning", "lightning.pytorch") if name in sys.modules]
    return [importlib.import_module(name) for name in names or ["pytorch_lightning"]]


def package() -> Any:
    """The package that is in use; `pytorch_lightning` where both are."""
    return _packages()[0]


if TYPE_CHECKING:
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer

    #: What a YAML reader should accept as a callback: either package's class.
    CallbackType = Callback
else:

    def _class(name: str) -> type:
        bases = tuple(getattr(package, name) for package in _packages())
        return bases[0] if len(bases) == 1 else type(name, bases, {"__module__": __name__})

    Callback = _class("Callback")
    CallbackType = Union[tuple(package.Callback for package in _packages())]  # noqa: UP007  # as many members as packages
    LightningDataModule = _class("LightningDataModule")
    MisconfigurationException = importlib.import_module(
        f"{package().__name__}.utilities.exceptions"
    ).MisconfigurationException
    # Names for annotations only: never test with isinstance against one package's class.
    LightningModule = Any
    Trainer = Any


def is_training(trainer: Trainer) -> bool:
    """`trainer.training`, without its comparison of lower-cased strings: this is asked in every step."""
    stage = trainer.state.stage
    return stage is not None and stage is type(stage).TRAINING


def should_log(trainer: Trainer) -> bool:
    """Whether the trainer sends this training step's values to its loggers; a `log` on other steps is wasted."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
    steps: int = trainer.fit_loop.epoch_loop._batches_that_stepped + 1  # this one included
    return every > 0 and (steps % every == 0 or trainer.should_stop)


def overrides(module: LightningModule, hook: str) -> bool:
    """Whether a LightningModule of either package defines `hook` itself."""
    implementation = getattr(type(module), hook, None)
    return implementation is not None and not implementation.__module__.startswith(
        ("pytorch_lightning.", "lightning.pytorch.")
    )


def plain_copy(module: Any) -> Any:
    """A deep copy that runs its own forward: one of a compiled module would still run the module's compiled one."""
    copied = copy.deepcopy(module)
    if getattr(copied, "_compiler_ctx", None) is not None:
        for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            vars(copied).pop(name, None)
        copied._compiler_ctx = None
    return copied


__all__ = [
    "Callback",
    "CallbackType",
    "LightningDataModule",
    "LightningModule",
    "MisconfigurationException",
    "Trainer",
    "is_training",
    "overrides",
    "package",
    "plain_copy",
    "should_log",
]

"""Quiet Lightning runs for experiments."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from lightning_fabric.utilities.warnings import PossibleUserWarning
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer


def fit(
    module: LightningModule,
    data: LightningDataModule,
    *,
    epochs: int,
    callbacks: Sequence[Any] = (),
    progress: Callable[[float], None] | None = None,
    **trainer_options: Any,
) -> None:
    """Trains on the CPU and shows nothing; no validation, logs or checkpoints unless asked for.

    Args:
        module: What to train.
        data: Its data.
        epochs: Number of epochs.
        callbacks: What makes this arm differ from the others.
        progress: Takes the share of epochs done.
        trainer_options: More options of the Trainer.

    Raises:
        KeyboardInterrupt: The user pressed Ctrl-C. (Lightning itself would end the program.)
    """
    options = {"limit_val_batches": 0, **trainer_options}
    watchers = [_EpochProgress(progress)] if progress else []
    with _quiet():
        trainer = _trainer(max_epochs=epochs, callbacks=[*callbacks, *watchers], **options)
        with _interrupts():
            trainer.fit(module, datamodule=data)


def evaluate(
    module: LightningModule, data: LightningDataModule, split: Literal["val", "test"] = "test"
) -> dict[str, float]:
    """What the module logs in an epoch of testing or validation, over all loaders of the split."""
    with _quiet():
        trainer = _trainer()
        loop = trainer.test if split == "test" else trainer.validate
        with _interrupts():
            logged = loop(module, datamodule=data, verbose=False)
    return {name: float(value) for of_loader in logged for name, value in of_loader.items()}


def _trainer(**options: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**quiet, **options})


class _EpochProgress(Callback):
    def __init__(self, progress: Callable[[float], None]) -> None:
        self._progress = progress

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Called after each epoch: reports the share that is done."""
        self._progress((trainer.current_epoch + 1) / (trainer.max_epochs or 1))


@contextmanager
def _interrupts() -> Iterator[None]:
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)  # "may", "consider": advice for other sizes
            warnings.filterwarnings("ignore", category=FutureWarning, module="pytorch_lightning")
            yield
    finally:
        logger.setLevel(level)

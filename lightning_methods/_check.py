"""`lightning-methods check`: one training batch, and what every attached method read and added in it."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lightning_methods._lightning_cli import Checkpoint, LightningCLI, ModelSummary, ProgressBar, Trainer
from lightning_methods.attach import AddressError, Method, Step
from lightning_methods.attach._lightning import Callback, LightningModule, MisconfigurationException
from lightning_methods.attach.address import AnyAddress, Computed, describe

#: Errors whose text says enough; others come from the depths of somebody's code.
_EXPECTED = (ValueError, MisconfigurationException, argparse.ArgumentError, OSError, ImportError)


def check(argv: Sequence[str] | None) -> int:
    """Builds module, data and callbacks as `fit` would, runs one training batch and prints a report.

    Nothing is logged or saved. After the training batch Lightning runs one validation batch, if there are any.

    Args:
        argv: `check`, then the arguments of `fit`; None takes those of the process.

    Returns:
        0, or 1 after one readable error on stderr.
    """
    for package in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    try:
        _CheckCLI(args=None if argv is None else list(argv))
    except Exception as error:
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 1
    return 0


class _CheckTrainer(Trainer):
    check = Trainer.fit  # a subcommand is a method of the Trainer


class _CheckCLI(LightningCLI):
    """LightningCLI with one subcommand, `check`, which takes what `fit` takes."""

    def __init__(self, args: Any) -> None:
        parser = {"exit_on_error": False, "check": {"exit_on_error": False}}
        super().__init__(
            trainer_class=_CheckTrainer,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs=parser,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"check": LightningCLI.subcommands()["fit"]}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(fast_dev_run=True, **kwargs)
        # `fast_dev_run` makes it one epoch, but schedules and warm-ups should see the number that was configured.
        if (max_epochs := self.config["check"]["trainer"]["max_epochs"]) is not None:
            trainer.fit_loop.max_epochs = max_epochs
        writing = (Checkpoint, ModelSummary, ProgressBar)
        kept = (callback for callback in _callbacks(trainer) if not isinstance(callback, writing))
        _callbacks(trainer)[:] = [*kept, _Report()]
        return trainer


class _Report(Callback):
    """Listens in on the two calls that the engine makes to a method, then prints what passed."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, tuple[AnyAddress, str]]] = {}
        self.terms: dict[str, Mapping[str, Tensor]] = {}
        self.own_loss: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Called once every method is attached: stands in for their `rewrite` and `losses`."""
        methods = _attached(trainer)
        if not methods:
            given = ", ".join(type(callback).__name__ for callback in _callbacks(trainer) if callback is not self)
            raise ValueError(f"No method is attached; the Trainer's callbacks are: {given or 'none'}.")
        for method in methods:
            if method.rewrites:
                vars(method)["rewrite"] = partial(self._rewrite, method, method.rewrite)
            if method.adds_losses:
                vars(method)["losses"] = partial(self._losses, method, method.losses)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Called after the step: prints, and leaves the methods as they were."""
        methods = _attached(trainer)
        for method in methods:
            vars(method).pop("rewrite", None)
            vars(method).pop("losses", None)
        if batch_idx or not trainer.is_global_zero:
            return
        for method in methods:
            self._print(method, method.factor(trainer))
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is None:
            print("training_step returned no loss, so there was nothing to add to.")
        else:
            # Lightning has divided it by the number of accumulated batches.
            print(f"total loss {loss * trainer.accumulate_grad_batches:.6g}")

    def _rewrite(self, method: Method, rewrite: Callable[[Step], None], step: Step) -> None:
        rewrite(step)
        self._read(method, step, batch_only=True)  # before the module's own step there is nothing else

    def _losses(
        self, method: Method, losses: Callable[[Step], Mapping[str, Tensor]], step: Step
    ) -> Mapping[str, Tensor]:
        self.own_loss = step.output["loss"] if isinstance(step.output, Mapping) else step.output
        try:
            self._read(method, step, batch_only=False)
            self.terms[method.name] = losses(step)
        except Exception:
            if step.trainer.is_global_zero:
                self._print(method, None)  # what does resolve helps to mend what does not
            raise
        return self.terms[method.name]

    def _read(self, method: Method, step: Step, *, batch_only: bool) -> None:
        values = self.values.setdefault(method.name, {})
        for argument, where in method.addresses().items():
            if batch_only and (isinstance(where, Computed) or where.root != "batch"):
                continue
            try:
                values[argument] = where, _value(step[where])
            except AddressError:
                values[argument] = where, "nothing"  # an error only if the method asks for it

    def _print(self, method: Method, factor: float | None) -> None:
        print(f"{type(method).__name__} {method.name!r}")
        values = self.values.get(method.name)
        if values is None:
            print(f"  did nothing: {'all its weights are 0' if not method.active else 'it was not asked in this step'}")
        else:
            _print_table(("argument", "address", "value"), [(name, *map(str, row)) for name, row in values.items()])
        if terms := self.terms.get(method.name):
            ramp = "" if factor is None else f" × {factor:.4g} (ramp)"
            rows = [("task", self.own_loss, "replaced" if method.replaces_loss else f"{method.task_weight:.6g}")]
            for name, term in terms.items():
                factors = "" if name in method.unramped else ramp
                rows.append((name, term, f"{method.weights.get(name, 1.0):.6g}{factors}"))
            _print_table(("term", "value", "weight"), [(name, f"{value:.6g}", weight) for name, value, weight in rows])
        print()


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]  # set by a connector


def _attached(trainer: Trainer) -> list[Method]:
    return [callback for callback in _callbacks(trainer) if isinstance(callback, Method)]


def _value(value: Any) -> str:
    if not isinstance(value, Tensor):
        return describe(value)
    dtype = str(value.dtype).removeprefix("torch.")
    gradient = ", with gradient" if value.requires_grad else ""
    return f"{type(value).__name__} {list(value.shape)} {dtype} on {value.device}{gradient}"


def _print_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    table = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _sentence(error: BaseException) -> str:
    """What is wrong and where, without the list of everything else that the parser tried."""
    key = re.match(r'Parser key "([^"]+)": *', str(error))
    while "Union subtypes" in str(error) and (inner := error.__cause__ or error.__context__):
        error = inner
    if not isinstance(error, _EXPECTED):
        return f"{type(error).__name__}: {error} (`lightning-methods fit` with the same arguments shows where)"
    if key is None:
        return str(error)
    return f"{key[1]}: {' '.join(str(error).removeprefix(key[0]).split())}"

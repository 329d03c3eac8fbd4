"""The contract between a method's author and the engine."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_methods.attach import helpers as helper_container
from lightning_methods.attach import surgery
from lightning_methods.attach._lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    overrides,
)
from lightning_methods.attach.address import Address, AnyAddress, Computed, flat
from lightning_methods.attach.ramp import Ramp
from lightning_methods.attach.step import Step, TrainingStep, attached_step
from lightning_methods.attach.teacher import Teacher

AnyModule = TypeVar("AnyModule", bound=nn.Module)

#: Attributes that Lightning sets on every callback: methods of the module it fits.
_OF_THE_RUN = ("log", "log_dict")


class Method(Callback):
    """A training method that attaches to any LightningModule.

    A subclass overrides at most `rewrite`, `losses`, `helpers` and `replacements`, and keeps its addresses (parsed with
    `address`) as attributes. The engine finds them there, records what they name, weights and adds the
    terms, and logs the raw terms (`NAME/term`) and their weighted sum (`NAME/loss`).

    Args:
        name: Prefix in logs, key in checkpoints. Two methods of one class need two names.
        weights: Weight of each term that `losses` returns; 1 where none is given. If all are 0 the method is
            off, bit for bit.
        ramp: Common factor of the weights over time.
        task_weight: Weight of the module's own loss.
        log: `True` logs on the steps at which the Trainer logs, `"epoch"` also the epoch's mean over steps (which
            costs a `log` call every step), `False` never.

    Raises:
        ValueError: If a weight is negative, or `name` is empty or has a dot.
    """

    #: The terms replace the module's loss instead of adding to it.
    replaces_loss: bool = False
    #: The module computes something else at inference too, so its checkpoints need the method: it has `replacements`.
    changes_inference: ClassVar[bool] = False
    #: Two processes with half of a batch each train like one with all of it (terms are means over samples).
    exact_over_ranks: bool = True
    #: Terms that have their whole weight from the first step on, whatever the ramp.
    unramped: frozenset[str] = frozenset()
    #: A frozen network, readable under `teacher...` addresses.
    teacher: Teacher | None = None

    def __init__(
        self,
        *,
        name: str,
        weights: Mapping[str, float] | None = None,
        ramp: Ramp | None = None,
        task_weight: float = 1.0,
        log: bool | Literal["epoch"] = True,
    ) -> None:
        if not name or "." in name:
            raise ValueError(f"Expected `name` to be a word without dots, but got {name!r}.")
        self.name = name
        self.weights = dict(weights or {})
        self.ramp = ramp
        self.task_weight = task_weight
        self.log_terms = log  # `log` itself is an attribute that Lightning sets on every callback
        for term, weight in (*self.weights.items(), ("task", task_weight)):
            if not weight >= 0:  # not a number either
                raise ValueError(f"Expected the {term} weight of {name!r} to be at least 0, but got {weight}.")
        self.did_something = False
        self._open_epoch: int | None = None
        self._ramp: Ramp | None = None
        self._step: TrainingStep | None = None
        self._helpers: Mapping[str, nn.Module] | None = None
        self.helper_parameters: list[nn.Parameter] = []

    # What an author writes

    def rewrite(self, step: Step) -> None:
        """Called before the module's own step: may write to addresses in the batch (`step[address] = value`)."""

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """Called after the module's own step, autocast off: returns raw scalar terms by name; none skips the step."""
        return {}

    def helpers(self) -> Mapping[str, nn.Module]:
        """Called once: trainable parts, to be optimised with the module and saved with the callback."""
        return {}

    def replacements(self, module: nn.Module) -> Mapping[str, nn.Module]:
        """Called before the optimizers are made: new parts of the model, by the paths of those they replace.

        A new part that takes over the Parameters of the old one (the objects, not copies) keeps them trained after
        `undo`.
        """
        return {}

    def end_epoch(self) -> None:
        """Called once after each training epoch, on every rank: what the epoch gathered takes effect."""

    # What an author may ask for

    def probe(self, *inputs: Any, batch: Any = None) -> contextlib.AbstractContextManager[Step]:
        """Runs the module's `forward` on other inputs, inside of a training step or outside: a context to read in.

        It runs in the Trainer's precision, in the modes and with the gradients that are on at the time, and nothing
        that the module's own step has recorded is lost. The context gives a `Step` in which `module...` addresses are
        those of this run and `batch...` addresses are read in `batch`; there is no output. Recorded values die with
        the context.

        Args:
            inputs: What `forward` is called with; an address among them is read in `batch`.
            batch: What `batch...` addresses are read in.
        """
        assert self._step is not None, "a method probes a module only while it is attached to it"
        return self._step.probe(self, inputs, batch)

    # What the engine asks

    def factor(self, trainer: Trainer) -> float | None:
        """The ramp's factor now; None without a ramp."""
        if self._ramp is None:
            return None
        return self._ramp.at(trainer.current_epoch if self._ramp.unit == "epoch" else trainer.global_step)

    @property
    def active(self) -> bool:
        """False if every weight is 0: then the engine leaves the step alone."""
        return not self.weights or any(self.weights.values()) or self.task_weight != 1.0 or self.replaces_loss

    @property
    def rewrites(self) -> bool:
        """Whether the class overrides `rewrite`."""
        return type(self).rewrite is not Method.rewrite

    @property
    def adds_losses(self) -> bool:
        """Whether the class overrides `losses`."""
        return type(self).losses is not Method.losses

    # Surgery

    def apply(self, module: AnyModule) -> AnyModule:
        """Puts the method's parts in place, as attaching does: before loading a checkpoint without a Trainer.

        Idempotent: parts that this method has put there, in this run or an earlier one, stay.

        Returns:
            `module`.

        Raises:
            AddressError: If an address matches nothing.
            MisconfigurationException: If another method has replaced one of the parts.
        """
        if not surgery.is_operated(module, self.name):
            # Initial weights must not shift the random numbers of the module's training.
            with torch.random.fork_rng(devices=[]):
                surgery.operate(module, self.replacements(module), self.name, type(self).__name__)
        return module

    def undo(self, module: AnyModule) -> AnyModule:
        """Puts the original parts back; what they share with the new ones stays as trained.

        Returns:
            `module`.
        """
        surgery.undo(module, self.name)
        return module

    def export(self, module: AnyModule) -> AnyModule:
        """A copy that keeps the new parts and needs neither this callback nor a word of it in its state dict."""
        return surgery.without_traces(module)

    def addresses(self) -> dict[str, AnyAddress]:
        """Every address that the method or its teacher reads, by the name of the argument that gave it."""
        named = dict(_addresses_in("", vars(self)))
        if self.teacher is not None:
            named.update(_addresses_in("teacher", vars(self.teacher)))
        return named

    @property
    def state_key(self) -> str:
        """Tells this callback's state apart from that of others in a checkpoint."""
        return f"{type(self).__qualname__}[{self.name}]"

    # Lightning's hooks, in the order of a run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called before the optimizers are made: operates, attaches, checks addresses, registers helpers."""
        if self.changes_inference:
            self.apply(pl_module)
            for average in helper_container.averages(trainer, pl_module):
                if not surgery.is_operated(average.module, self.name):  # it has to begin where the module does
                    self.apply(average.module).load_state_dict(pl_module.state_dict())
        if stage != "fit":
            return
        # An error in here needs no care: Lightning then calls `on_exception`.
        self._open_epoch = None  # of a run that was broken off; a restored one is loaded after this
        self._attach(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the optimizers exist, before their state is restored: brings the helpers in."""
        helper_container.join_optimizer(trainer, pl_module)
        if self._step is not None:
            self._step.start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before training, after everything is restored: ends an epoch that was stopped after its last step.

        Lightning resumes such a checkpoint at the first batch of the next epoch, without the hooks between.
        """
        if self._open_epoch not in (None, trainer.current_epoch):
            self.end_epoch()
        self._open_epoch = trainer.current_epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before each training epoch, but not where a run is resumed in one."""
        self._open_epoch = trainer.current_epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after each training epoch: ends it, and says if the method never did anything in it."""
        self.end_epoch()
        self._open_epoch = None
        if not self.did_something and not self.changes_inference and (self.rewrites or self.adds_losses):
            reason = "all its weights are 0" if not self.active else "it neither changed a batch nor gave a term"
            rank_zero_warn(f"{self!r} did nothing in epoch {trainer.current_epoch}: {reason}.")
        self.did_something = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when training raises, in place of `teardown`: leaves the module as it was."""
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called at the end: leaves the module as it was."""
        if stage == "fit":
            self._detach()

    def state_dict(self) -> dict[str, Any]:
        """The helpers' values and the epoch that has begun but not ended; a subclass adds its buffers."""
        helpers = {name: helper.state_dict() for name, helper in (self._helpers or {}).items()}
        return {"helpers": helpers, "open_epoch": self._open_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._open_epoch = state_dict["open_epoch"]
        for name, values in state_dict["helpers"].items():
            self._built_helpers()[name].load_state_dict(values)

    # Attaching

    def _attach(self, trainer: Trainer, module: LightningModule) -> None:
        self._refuse(module)
        self._ramp = None if self.ramp is None else self.ramp.resolved(trainer.max_epochs)
        step = attached_step(trainer, module)
        self._step = step
        step.add(self)
        if self.teacher is not None:
            asked = [where for where in flat(self.addresses().values()) if where.root == "teacher"]
            self.teacher.attach(module, trainer.strategy.root_device, asked)
        # What the module makes in its `setup` or `configure_model` is not there yet: `on_fit_start` starts then.
        if not (overrides(module, "setup") or overrides(module, "configure_model")):
            step.start()
        # Parameters that no loss reaches stop DDP, so a method that is off brings none.
        if self.active and (helpers := self._built_helpers()):
            helper_container.register(trainer, module, self.name, helpers)
            trained = (p for helper in helpers.values() for p in helper.parameters() if p.requires_grad)
            self.helper_parameters = list(trained)

    def _refuse(self, module: LightningModule) -> None:
        if not module.automatic_optimization and self.adds_losses:
            raise MisconfigurationException(
                f"{self!r} adds to the loss that training_step returns, but {type(module).__name__} optimises "
                f"manually, so Lightning ignores that loss. Call the method's functions from "
                f"lightning_methods.functional in your training_step instead."
            )
        if "dataloader_iter" in inspect.signature(module.training_step).parameters:
            raise MisconfigurationException(
                f"{self!r} needs the batch, but {type(module).__name__}.training_step takes `dataloader_iter` "
                f"and fetches batches itself."
            )

    def _built_helpers(self) -> Mapping[str, nn.Module]:
        if self._helpers is None:
            # Initial weights must not shift the random numbers of the module's training.
            with torch.random.fork_rng(devices=[]):
                self._helpers = self.helpers()
        return self._helpers

    def _detach(self) -> None:
        step, self._step = self._step, None
        if self.teacher is not None:
            self.teacher.detach()
        if step is not None:
            helper_container.unregister(step.module, self.name)
            self.helper_parameters = []
            step.remove(self)
        for name in _OF_THE_RUN:
            self.__dict__.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        # A copy made in mid-run is a method of its own: it takes neither the module nor its wrapper along.
        own = {name: value for name, value in vars(self).items() if name not in _OF_THE_RUN}
        return {**own, "_step": None}

    def __repr__(self) -> str:
        parts = []
        settings = {**vars(self), "log": self.log_terms}
        if self.teacher is not None:
            given = vars(self.teacher)
            settings |= {"inputs": given["inputs"]}
            settings |= {f"teacher_{name}": given[name] for name in ("checkpoint", "key", "transform")}
        if self.ramp is not None and self.ramp.unit == "epoch":
            settings["warmup_epochs"] = self.ramp.length
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = settings.get(name, self.weights.get(_term(name), parameter.default))
            if isinstance(value, (Address, Computed)) and isinstance(parameter.default, str):
                value = value if str(value) != parameter.default else parameter.default
            if value is not parameter.default and value != parameter.default:
                shown = f"Tensor{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                parts.append(f"{name}={shown}")
        return f"{type(self).__name__}({', '.join(parts)})"


def _term(argument: str) -> str:
    """The term whose weight an argument gives: `x` for `x_weight` and `weight_x`."""
    return argument.removeprefix("weight_") if argument.startswith("weight_") else argument.removesuffix("_weight")


def _addresses_in(label: str, value: Any) -> Iterator[tuple[str, AnyAddress]]:
    if isinstance(value, (Address, Computed)):
        yield label, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _addresses_in(f"{label} key", key)
            yield from _addresses_in(f"{label}.{key}".lstrip("."), item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _addresses_in(f"{label}.{index}", item)

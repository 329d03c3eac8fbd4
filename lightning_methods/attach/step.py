"""The wrapper around one LightningModule's `training_step`, shared by every attached method."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_methods.attach._lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    is_training,
    should_log,
)
from lightning_methods.attach.address import (
    Address,
    AddressError,
    AddressLike,
    AnyAddress,
    Computed,
    address,
    describe,
    flat,
    read_items,
    with_key,
    write_items,
)
from lightning_methods.attach.capture import NotCalledError, Recorder, called_submodules, itself
from lightning_methods.attach.teacher import Teacher

if TYPE_CHECKING:
    from lightning_methods.attach.method import Method


class Step:
    """What a method sees of one training step.

    Attributes:
        module: The LightningModule.
        trainer: Its Trainer.
        batch: The batch as the methods have rewritten it so far.
        original_batch: The batch as the Trainer gave it.
        output: What the module's own `training_step` returned; None before it ran.
        index: Index of the batch in its epoch; -1 in a probe.
    """

    __slots__ = (
        "_asked",
        "_autocast",
        "_method",
        "_notes",
        "_recorder",
        "batch",
        "index",
        "module",
        "original_batch",
        "output",
        "trainer",
    )

    def __init__(self, module: LightningModule, trainer: Trainer, batch: Any, index: int, recorder: Recorder) -> None:
        self.module = module
        self.trainer = trainer
        self.batch = self.original_batch = batch
        self.output: Any = None
        self.index = index
        self._recorder = recorder
        self._method: Method | None = None  # whose turn it is
        self._notes: dict[bool, dict[str, Tensor | float]] = {}
        self._asked: list[Teacher] = []
        device = trainer.strategy.root_device.type
        self._autocast = (device, torch.is_autocast_enabled(device))

    @property
    def epoch(self) -> int:
        """The epoch, counted from 0."""
        return self.trainer.current_epoch

    @property
    def logs(self) -> bool:
        """Whether what the method notes in this step will be seen: a costly value is made only if it is."""
        wanted = self._method is not None and self._method.log_terms
        # One `log` costs about as much as a whole small step, so none is spent on steps that nobody sees.
        return wanted == "epoch" or (bool(wanted) and should_log(self.trainer))

    def note(self, values: Mapping[str, Tensor | float]) -> None:
        """Logs scalars beside the method's terms, as `NAME/key`, if this step `logs`."""
        if self._method is not None and self.logs and not self.trainer.barebones:
            notes = self._notes.setdefault(self._method.log_terms == "epoch", {})
            for key, value in values.items():
                notes[f"{self._method.name}/{key}"] = value.detach() if isinstance(value, Tensor) else value

    def __getitem__(self, where: AddressLike) -> Any:
        """The value at an address.

        Raises:
            AddressError: If the address names nothing in this step.
        """
        return self.read_from(address(where), self.batch)

    def __setitem__(self, where: AddressLike, value: Any) -> None:
        """Replaces `batch` by one with `value` at an address; the given batch is never mutated."""
        self.batch = self.written(self.batch, address(where), value)
        self._clear_teachers()  # what they said was about another batch

    def read_from(self, where: AnyAddress, batch: Any) -> Any:
        """The value at an address, `batch...` addresses being read in the batch given."""
        if isinstance(where, Computed):
            return where.read(self)
        if where.root == "module":
            return self._recorder.read(where)
        if where.root == "batch":
            return read_items(batch, where, "batch")
        if where.root == "output":
            return read_items(self.output, where, "output")
        teacher = None if self._method is None else self._method.teacher
        if teacher is None:
            raise AddressError(f"Address '{where}': this method has no teacher.")
        if teacher not in self._asked:
            self._asked.append(teacher)
            teacher.run(self)
        return teacher.read(where)

    def written(self, batch: Any, where: AnyAddress, value: Any) -> Any:
        """A copy of `batch` with `value` at an address."""
        if isinstance(where, Computed):
            if where.write is None:
                raise AddressError(f"{where!r} can only be read; to write, give a pair of functions (get, set).")
            return where.write(self, value)
        if where.root != "batch":
            raise AddressError(f"Address '{where}' cannot be written: only addresses in the batch can.")
        return write_items(batch, where.items, value, where, "batch")

    def forward_context(self) -> contextlib.AbstractContextManager[None]:
        """For a method's own forward passes: the trainer's autocast, which is off around its loss terms."""
        device, enabled = self._autocast
        return torch.autocast(device, torch.get_autocast_dtype(device)) if enabled else contextlib.nullcontext()

    def loss_context(self) -> contextlib.AbstractContextManager[None]:
        """For loss maths: no autocast."""
        device, enabled = self._autocast
        return torch.autocast(device, enabled=False) if enabled else contextlib.nullcontext()

    def clear(self) -> None:
        """Drops every recorded value."""
        self._recorder.clear()
        self._clear_teachers()

    def _clear_teachers(self) -> None:
        for teacher in self._asked:
            teacher.clear()
        self._asked = []


class TrainingStep:
    """Stands in for `module.training_step` on the instance, from `setup("fit")` to `teardown`.

    One call: every method may rewrite the batch; the module's own step runs with captures live; every method
    returns its terms; they are weighted and added, and the output keeps the shape the module gave it. Outside
    of training (a module may call its `training_step` from validation), and inside of a step (it may call it for
    the parts of a batch), it only passes on.

    Args:
        trainer: The Trainer that fits the module.
        module: The LightningModule.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer = trainer
        self.module = module
        self.original: Callable[..., Any] = module.training_step
        # Lightning reads the signature off `__wrapped__` to decide whether to pass `batch_idx`.
        self.__wrapped__ = getattr(self.original, "__wrapped__", self.original)
        # and, if somebody wraps this wrapper in turn, compares the code of what it finds there.
        self.__code__ = getattr(self.__wrapped__, "__code__", None)
        self.methods: list[Method] = []
        self.recorder = Recorder(module, ())
        self._instance_attribute = "training_step" in module.__dict__
        self._rewriting: list[Method] = []
        self._losing: list[Method] = []
        self._started = False
        self._inside = False
        module.__dict__["training_step"] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copied module gets its own plain step: not this wrapper, its methods or their teachers.
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._instance_attribute:
            return itself, (self.original,)
        return getattr, (self.module, "training_step")

    def add(self, method: Method) -> None:
        """Attaches one more method, in callback order."""
        for other in self.methods:
            if other.name == method.name:
                raise MisconfigurationException(
                    f"Two attached methods are called {method.name!r}: {other!r} and {method!r}. "
                    f"Give one another `name`; it tells them apart in logs and checkpoints."
                )
            if other.replaces_loss and method.replaces_loss:
                raise MisconfigurationException(
                    f"Both {other!r} and {method!r} replace the module's loss; at most one method can."
                )
        self.methods.append(method)

    def remove(self, method: Method) -> None:
        """Detaches a method; the last one takes the wrapper off."""
        if method in self.methods:
            self.methods.remove(method)
        if self.methods:
            return
        self.recorder.remove()
        self._rewriting, self._losing = [], []  # whoever has wrapped this wrapper may still call it
        if self.module.__dict__.get("training_step") is self:
            del self.module.__dict__["training_step"]
            if self._instance_attribute:
                self.module.__dict__["training_step"] = self.original

    def start(self) -> None:
        """Prepares for the first step: hooks what the methods' addresses name, finds out who does what."""
        self._started = True
        for method in self.methods:
            for where in flat(method.addresses().values()):
                if where.root == "module":
                    self.recorder.add(where)
        self._rewriting = [m for m in self.methods if m.active and m.rewrites]
        self._losing = [m for m in self.methods if m.active and m.adds_losses]

    @contextlib.contextmanager
    def probe(self, method: Method, inputs: tuple[Any, ...], batch: Any) -> Iterator[Step]:
        """The module's `forward`, recorded: see `Method.probe`."""
        if not self._started:
            self.start()
        step = Step(self.module, self.trainer, batch, -1, self.recorder)
        step._method = method
        with self.recorder.set_aside():
            try:
                values = [step[value] if isinstance(value, (Address, Computed)) else value for value in inputs]
                with self.trainer.precision_plugin.forward_context(), self.recorder:
                    self.module(*values)
                yield step
            finally:
                step.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One training step of the module, with every attached method."""
        if not self._started:
            self.start()
        if self._inside or not (self._rewriting or self._losing) or not is_training(self.trainer):
            return self.original(*args, **kwargs)
        if kwargs:  # Lightning passes everything by position; a caller of its own may not
            args, kwargs = (*args, *kwargs.values()), {}
        batch, *rest = args
        step = Step(
            self.module,
            self.trainer,
            batch,
            rest[0] if rest else self.trainer.fit_loop.batch_idx,
            self.recorder,
        )
        self._inside = True
        try:
            for method in self._rewriting:
                before = step.batch
                step._method = method
                with step.loss_context():
                    method.rewrite(step)
                method.did_something |= step.batch is not before
            with self.recorder:
                step.output = self.original(step.batch, *rest)
            output = self._extended(step) if self._losing else step.output
            for every_step, notes in step._notes.items():
                # A batch size of 1 keeps Lightning from searching the batch: an epoch value is the mean over steps.
                self.module.log_dict(notes, on_step=True, on_epoch=every_step, batch_size=1)
            return output
        except NotCalledError as error:
            if error.where.root != "module":
                raise
            hint = called_submodules(self.module, lambda: self.original(step.batch, *rest))
            raise NotCalledError(error.where, hint) from None
        finally:
            self._inside = False
            step.clear()

    def _extended(self, step: Step) -> Any:
        """The module's output with the methods' terms in its loss."""
        output = step.output
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):  # None skips the step; anything else is Lightning's to refuse
            return output
        own: Tensor | None = loss
        added: Tensor | None = None
        with step.loss_context():
            for method in self._losing:
                step._method = method
                terms = method.losses(step)
                weighted = self._weighted(step, method, terms) if terms else None
                if weighted is not None and method.replaces_loss:
                    own = None
                if terms and own is not None and method.task_weight != 1.0:
                    own = own * method.task_weight
                for part in (weighted, self._idle_helpers(method, terms)):
                    if part is not None:
                        added = part if added is None else added + part
        if own is not None:
            added = own if added is None else own + added
        if added is loss:
            return output
        return with_key(output, "loss", added) if isinstance(output, Mapping) else added

    def _weighted(self, step: Step, method: Method, terms: Mapping[str, Tensor]) -> Tensor | None:
        """The weighted sum of a method's terms; None if every weight is 0 now."""
        method.did_something = True
        self._check(method, terms)
        factor = method.factor(self.trainer)
        weighted: Tensor | None = None
        for name, term in terms.items():
            weight = method.weights.get(name, 1.0)
            if factor is not None and name not in method.unramped:
                weight *= factor
            if weight == 0.0:  # not even 0 * term: a term that is infinite must not matter
                continue
            weighted = term * weight if weighted is None else torch.add(weighted, term, alpha=weight)
        if step.logs:
            total = 0.0 if weighted is None else weighted
            step.note({**terms, "loss": total} if factor is None else {**terms, "loss": total, "ramp": factor})
        return weighted

    def _idle_helpers(self, method: Method, terms: Mapping[str, Tensor]) -> Tensor | None:
        """0 times the helpers where a term is left out: DDP stops at parameters that the loss does not reach."""
        if not method.helper_parameters:
            return None
        if terms and method.factor(self.trainer) != 0.0 and all(method.weights.get(name, 1.0) for name in terms):
            return None
        return torch.stack([(parameter * 0.0).sum().float() for parameter in method.helper_parameters]).sum()

    def _check(self, method: Method, terms: Mapping[str, Tensor]) -> None:
        for name, term in terms.items():
            if not isinstance(term, Tensor) or term.ndim:
                raise ValueError(
                    f"{method!r}: expected its term {name!r} to be a scalar Tensor, but got {describe(term)}."
                )
        if not any(term.requires_grad for term in terms.values()):
            raise ValueError(
                f"{method!r}: none of its terms ({', '.join(terms)}) carries a gradient, so it would change nothing. "
                f"What its addresses name was detached, or computed without gradients, by the module."
            )


def attached_step(trainer: Trainer, module: LightningModule) -> TrainingStep:
    """The wrapper that stands on `module`, put there if there is none yet."""
    current = module.__dict__.get("training_step")
    if isinstance(current, TrainingStep) and current.trainer is trainer and current.methods:
        return current
    return TrainingStep(trainer, module)

"""What capturing leaves alone: modules that were not called, other code's calls and hooks, copies, other processes."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from plain import (
    IN,
    ONE,
    ROWS,
    Batches,
    CallsForward,
    Penalty,
    Plain,
    Probe,
    fit,
    fitted_trace,
    pairs,
    same,
    seen,
    trace,
    trainer,
)
from pytorch_lightning import Callback
from torch import nn

from lightning_methods.attach import AddressError, Method, computed

# --- submodules that were not called ---------------------------------------------------------------


class CallsNet(Plain):
    """Calls neither itself nor its `forward`."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)


class Random(CallsNet):
    """Draws random numbers and updates buffers in its step, and never calls itself."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(IN)
        self.idle = nn.Linear(2, 2)
        self.drop = nn.Dropout(0.5)
        self.steps = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = super().training_step((self.drop(self.norm(x)), y), batch_idx)
        self.steps += 1
        if self.steps == 1:  # the state that the step left
            self.after = (torch.get_rng_state(), copy.deepcopy(dict(self.named_buffers())))
        return loss


@pytest.mark.parametrize("text", ["module", "module.idle", "module.idle@input"])
def test_not_called_lists_what_was_and_leaves_random_state_and_buffers(text):
    module = Random()
    with pytest.raises(AddressError) as error:
        seen(module, text)
    message = str(error.value)
    why = {
        "module": "the step called neither self(...) nor self.forward(...)",
        "module.idle": "'module.idle' gave no value, because it was not called in this step",
        "module.idle@input": "'module.idle' gave no value, because it was not called in this step",
    }[text]
    assert f"Address '{text}'" in message
    assert why in message
    fired = message.partition("likeliest first): ")[2]
    # Matrices first, the last of them (the head) before the earlier ones.
    assert fired.startswith("'module.net' returned a Tensor of shape [6, 3] and dtype float32; 'module.net.2'")
    assert fired.index("'module.net.0'") < fired.index("'module.norm'")
    assert "idle" not in fired
    rng, buffers = module.after
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in module.named_buffers())
    assert not any(part._forward_hooks for part in module.modules())


def test_not_called_survives_a_step_that_needs_gradients_itself():
    class Penalised(CallsNet):
        def training_step(self, batch, batch_idx):
            x, y = batch
            x = x.clone().requires_grad_()
            out = self.net(x)
            (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            return F.cross_entropy(out, y) + gradient.square().mean()

    with pytest.raises(AddressError, match=r"'module' gave no value.*'module.net' returned a Tensor"):
        seen(Penalised(), "module")


def test_not_called_with_nothing_called_at_all():
    class Functional(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(F.linear(x, self.net[2].weight[:, :IN]), y)

    with pytest.raises(AddressError, match="No submodule was called either: name a value of the batch"):
        seen(Functional(), "module")


# --- what is not the step --------------------------------------------------------------------------


class CallsEverywhere(Callback):
    """Runs the module wherever it is asked, outside of the training step."""

    def _call(self, trainer, module, *args):
        module(torch.full((1, IN), 7.0))

    on_train_batch_start = on_before_backward = on_before_zero_grad = on_train_batch_end = on_validation_start = _call
    on_train_epoch_end = on_train_start = on_sanity_check_start = _call


class Validates(Plain):
    def validation_step(self, batch, batch_idx):
        self(batch[0])


def test_nothing_outside_the_step_is_recorded():
    probe = Probe("module#0", "module#-1", "module.net.0#0", "module.net.0#-1")
    fit(Validates(), CallsEverywhere(), probe, CallsEverywhere(), val=ONE, num_sanity_val_steps=1, val_check_interval=1)
    assert len(probe.seen) == 3
    for first, last, hidden, last_hidden in probe.seen:
        assert first is last
        assert hidden is last_hidden
        assert len(first) == len(hidden) == ROWS


def test_a_forward_that_was_kept_from_inside_the_step_records_nothing_outside_of_it():
    class Keeps(Plain):
        kept = None

        def training_step(self, batch, batch_idx):
            self.kept = self.forward
            return super().training_step(batch, batch_idx)

    class Calls(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if pl_module.kept is not None:
                pl_module.kept(torch.zeros(1, IN))

    probe = Probe("module#0", "module#-1")
    fit(Keeps(), probe, Calls())
    assert [first is last for first, last in probe.seen] == [True] * 3


def test_a_methods_own_forward_passes_are_not_recorded():
    class Looks(Probe):
        def losses(self, step):
            before = step["module"]
            step.module(torch.zeros(1, IN))
            step.module.net(torch.zeros(1, IN))
            assert step["module"] is before
            assert len(step["module.net.0#-1"]) == ROWS
            return super().losses(step)

    first, second = Looks("module#-1", "module.net.0#-1"), Looks("module#-1", "module.net.0", name="second")
    fit(Plain(), first, second)
    assert [one[0] is two[0] for one, two in zip(first.seen, second.seen, strict=True)] == [True] * 3


def test_values_die_with_their_step():
    died = []

    class Watches(Method):
        def __init__(self, *addresses):
            super().__init__(name="watch")
            self.asked = addresses
            self.references = []

        def losses(self, step):
            died.extend(reference() is None for reference in self.references)
            self.references = [weakref.ref(step[where]) for where in self.asked]
            return {}

    class Forgets(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            gc.collect()
            died.extend(reference() is None for reference in watch.references)

    watch = Watches("module.net.0", "module.net.1@input", "module")
    watch.asked = [computed(lambda step, where=where: step[where], where) for where in watch.asked]
    fit(Plain(), watch, Forgets())
    assert len(died) == 3 * 3 + 3 * 2  # asked at the end of three steps, and at the start of the next
    assert all(died)


def test_values_die_when_the_step_fails():
    class Fails(Probe):
        def losses(self, step):
            self.reference = weakref.ref(step["module.net.0"])
            raise RuntimeError("on purpose")

    module, probe = Plain(), Fails("module.net.0")
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, probe)
    gc.collect()
    assert probe.reference() is None


# --- the module's own hooks ------------------------------------------------------------------------


def test_the_modules_own_hooks_keep_working_and_come_first():
    module, calls = Plain(), []
    module.register_forward_pre_hook(lambda _, args: calls.append("root pre") or (args[0] * 2,))
    module.register_forward_hook(lambda *_: calls.append("root"))
    module.net[0].register_forward_hook(lambda _, args, output: calls.append("sub") or output + 1)
    before = fitted_trace(module)
    calls.clear()
    received, hidden, after = seen(module, "module@input", "module.net.0", "module.net.1@input")
    assert calls == ["root pre", "sub", "root"]
    assert torch.equal(received, ONE[0][0] * 2)
    assert hidden is after, "the hook saw what the module's own hook made of the output"
    assert trace(module) == before


def test_hooks_are_gone_after_the_fit():
    module = Plain()
    before = fitted_trace(module)
    fit(module, Probe("module", "module.net", "module.net.0#0", "module.net.2@input", "module.net.0.bias"), Penalty())
    assert trace(module) == before


# --- copies ----------------------------------------------------------------------------------------


class Uncopyable:
    def __deepcopy__(self, memo):
        raise AssertionError("a copy of the module copied the engine")

    def __reduce__(self):
        raise AssertionError("a pickle of the module holds the engine")


class Guarded(Probe):
    """A method that must not be copied along with the module."""

    def __init__(self, *addresses, **arguments):
        super().__init__(*addresses, **arguments)
        self.guard = Uncopyable()


def deep(module):
    return copy.deepcopy(module)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


class CopiesItself(Plain):
    """Copies itself inside its step, as averaging code does."""

    made = None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        type(self).made = type(self).way(self)
        return loss


@pytest.mark.parametrize("way", [deep, pickled])
@pytest.mark.parametrize("inside", [True, False], ids=["inside the step", "between steps"])
def test_copies_of_a_module_under_hooks_are_plain_modules(way, inside):
    made = []

    class Copies(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            made.append(way(pl_module))

    probe = Guarded("module", "module.net.0")
    if inside:
        CopiesItself.way = staticmethod(way)
        module = CopiesItself()
        fit(module, probe, batches=ONE)
        copied = CopiesItself.made
    else:
        module = Plain()
        fit(module, probe, Copies(), batches=ONE)
        (copied,) = made
    count = len(probe.seen)
    x = ONE[0][0]
    assert torch.equal(copied(x), copied.net(x))
    assert copied.forward.__self__ is copied
    assert copied.training_step.__self__ is copied
    CopiesItself.way = staticmethod(lambda module: None)
    fit(copied, batches=ONE)
    assert len(probe.seen) == count, "training the copy reaches the method"
    reference = Plain()
    fit(reference, batches=ONE)
    if not inside:
        fit(reference, batches=ONE)
    assert same(copied, reference)
    again = Probe("module", "module.net.0")
    fit(copied, again, batches=ONE)
    assert len(again.seen) == 1


def test_a_copy_that_the_step_calls_is_not_taken_for_the_original():
    """An average of the network, made and asked inside the step."""

    class Averages(Plain):
        average = None

        def training_step(self, batch, batch_idx):
            x, y = batch
            logits = self(x)
            if self.average is None:
                self.average = [copy.deepcopy(self.net), pickled(self.net)]
            for average in self.average:
                average(x * 0)
            return F.cross_entropy(logits, y)

    probe = Probe("module.net", "module.net.0#0", "module.net.0#-1")
    fit(Averages(), probe)
    assert len(probe.seen) == 3
    assert all(first is last for _, first, last in probe.seen)


# --- two processes ---------------------------------------------------------------------------------


class Counts(Probe):
    """Fails in the process where DDP's call of the root counts as one."""

    def losses(self, step):
        assert step["module#0"] is step["module#-1"], "the call that encloses the step was recorded"
        assert step["module@input"] is step.batch[0]
        return {"l2": step["module"].square().mean()}


@pytest.mark.parametrize("cls", [Plain, CallsForward])
def test_the_call_with_which_ddp_encloses_the_step_does_not_count(cls):
    module, alone = cls(), Plain()
    run = trainer(Counts("module", "module@input"), strategy="ddp_fork", devices=2, use_distributed_sampler=False)
    run.fit(module, Batches(pairs(2)))
    # Both processes see the same batches, so they do what one process does.
    fit(alone, Counts("module", "module@input"), batches=pairs(2))
    assert same(module, alone)


def test_under_ddp_a_module_that_calls_neither_is_told_so():
    run = trainer(Probe("module"), strategy="ddp_fork", devices=2, use_distributed_sampler=False)
    with pytest.raises(Exception, match=r"neither self\(...\) nor self.forward\(...\).*module.net"):
        run.fit(CallsNet(), Batches(pairs(1)))

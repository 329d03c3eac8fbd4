"""What addresses into the module give: outputs, inputs, several calls, parameters; and that nothing else is touched."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from plain import CLASSES, IN, ROWS, Batches, Penalty, Plain, Probe, fit, fitted_trace, pairs, same, trace, trainer
from pytorch_lightning import Callback
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_methods.attach import AddressError, Method, computed

ONE = pairs(1)


def seen(module, *addresses, batches=ONE, **arguments):
    """What addresses give in the last step."""
    probe = Probe(*addresses)
    fit(module, probe, batches=batches, **arguments)
    return probe.seen[-1]


# --- the module itself -----------------------------------------------------------------------------


class CallsForward(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.forward(x), y)


class CallsNet(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)


class Keeps(Plain):
    """Keeps its own logits, to compare."""

    def forward(self, x):
        self.mine = self.net(x)
        return self.mine


class KeepsAndCallsForward(Keeps, CallsForward):
    pass


@pytest.mark.parametrize("cls", [Keeps, KeepsAndCallsForward])
def test_module_is_what_forward_returned_however_it_was_called(cls):
    module = cls()
    logits, again, x = seen(module, "module", "module#0", "module@input")
    assert logits is module.mine
    assert again is logits
    assert x is ONE[0][0]


@pytest.mark.parametrize("cls", [Keeps, KeepsAndCallsForward])
def test_one_call_counts_once(cls):
    with pytest.raises(AddressError, match=r"'module#1': there were 1 calls in this step, numbered from 0"):
        seen(cls(), "module#1")


def test_a_forward_on_the_instance_is_seen_and_stays():
    module = Plain()
    stand_in = nn.Linear(IN, CLASSES)
    object.__setattr__(module, "forward", lambda x: stand_in(x))
    before = module.__dict__["forward"]
    (logits,) = seen(module, "module")
    assert logits.grad_fn is not None
    assert module.__dict__["forward"] is before


def test_the_graph_of_a_captured_tensor_is_alive():
    class PullsLogits(Method):
        def losses(self, step):
            return {"pull": step["module"].square().mean() + step["module.net.0"].square().mean()}

    class ByHand(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            hidden = self.net[0](x)
            logits = self.net[2](self.net[1](hidden))
            return F.cross_entropy(logits, y) + (logits.square().mean() + hidden.square().mean())

    class Pulls(PullsLogits):
        def __init__(self):
            super().__init__(name="pull")
            self.asked = computed(lambda step: None, "module", "module.net.0")

    attached, by_hand = Plain(), ByHand()
    fit(attached, Pulls())
    fit(by_hand)
    assert not same(by_hand, Plain())
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(attached.state_dict()[name], value)


# --- several calls ---------------------------------------------------------------------------------


class TwoViews(Plain):
    """Calls itself twice in a step."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y) + F.cross_entropy(self(-x), y)


def test_the_last_of_several_calls_is_used_with_a_warning_that_tells_how_to_choose():
    with pytest.warns(UserWarning, match=r"'module' was called 2 times in one step; the last call is used") as caught:
        last, first, second, minus_one, minus_two = seen(
            TwoViews(), "module", "module#0", "module#1", "module#-1", "module#-2", batches=pairs(1) * 3
        )
    assert last is second
    assert last is minus_one
    assert first is minus_two
    assert first is not second
    about_calls = [str(warning.message) for warning in caught if "was called" in str(warning.message)]
    assert len(about_calls) == 1, "it warns once, not every step"
    assert "Write 'module#0' to 'module#1' to choose" in about_calls[0]


def test_the_warning_keeps_the_rest_of_the_address():
    with pytest.warns(UserWarning, match=r"'module.cross' was called 2 times.*Write 'module.cross#0:logits' to "):
        seen(Composite(), "module.cross#0:logits", "module.cross:logits")


def test_every_call_has_its_input():
    module = TwoViews()
    first, second = seen(module, "module.net.0@input#0", "module@input#1")
    assert first is ONE[0][0]
    assert torch.equal(second, -first)


@pytest.mark.parametrize("call", [2, -3])
def test_a_call_that_was_not_made_is_an_error(call):
    with pytest.raises(AddressError, match="there were 2 calls"):
        seen(TwoViews(), f"module#{call}")


# --- inputs and items ------------------------------------------------------------------------------


class Crossed(nn.Module):
    """Takes arguments by position and by name, and returns a dict."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(IN, CLASSES)

    def forward(self, x, context=None, *, mask=None, scale=1.0):
        return {"logits": self.linear(x) * scale, "extra": (mask, [context])}


class Composite(Plain):
    def __init__(self):
        super().__init__()
        self.cross = Crossed()
        self.heads = nn.ModuleDict({"main": nn.Identity(), "other": nn.Identity()})
        self.tied = self.cross.linear
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("mean", torch.tensor(3.0))

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.mask = x > 0
        out = self.cross(x, y, mask=self.mask)
        self.cross(x)
        return F.cross_entropy(self.heads["main"](out["logits"]), y) * self.scale


def test_arguments_by_name_and_position():
    module = Composite()
    everything, first, mask, only = seen(
        module, "module.cross@input#0", "module.cross@input#0:0", "module.cross@input#0:mask", "module.cross@input#1"
    )
    x, y = ONE[0]
    assert list(everything) == [0, 1, "mask"]
    assert everything[0] is x
    assert everything[1] is y
    assert everything["mask"] is module.mask
    assert first is x
    assert mask is module.mask
    assert only is x, "one positional argument comes as it is"


def test_several_positional_arguments_come_as_a_tuple():
    class Pairs(Plain):
        def forward(self, x, y):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(*batch), batch[1])

    both, second = seen(Pairs(), "module@input", "module@input:1")
    assert isinstance(both, tuple)
    assert both[0] is ONE[0][0]
    assert second is both[1] is ONE[0][1]


def test_items_of_what_a_submodule_returned():
    module = Composite()
    logits, mask, target, head = seen(
        module,
        "module.cross#0:logits",
        "module.cross#0:extra.0",
        "module.cross#0:extra.1.0",
        "module.heads.main",
    )
    assert logits.shape == (ROWS, CLASSES)
    assert logits.requires_grad
    assert mask is module.mask
    assert target is ONE[0][1]
    assert head is logits


def test_a_wrong_item_names_the_call_and_the_nearest():
    with pytest.raises(AddressError, match=r"'module.cross:logit': module.cross is a dict of 2") as error:
        seen(Composite(), "module.cross:logit")
    assert "Did you mean 'logits'?" in str(error.value)


@pytest.mark.filterwarnings("ignore:.*was called")
def test_a_module_with_two_names_is_seen_under_both():
    one, other = seen(Composite(), "module.tied", "module.cross.linear")
    assert one is other


def test_parameters_and_buffers():
    module = Composite()
    scale, mean, weight = seen(module, "module.scale", "module.mean", "module.cross.linear.weight")
    assert scale is module.scale
    assert mean is module.mean
    assert weight is module.cross.linear.weight


@pytest.mark.parametrize("text", ["module.scale@input", "module.scale#0", "module.mean:0"])
def test_a_parameter_has_neither_calls_nor_items(text):
    with pytest.raises(AddressError, match=r"names a (Parameter|Tensor), which takes no '@input', '#' or ':'"):
        seen(Composite(), text)


def test_activation_checkpointing_records_the_forward_pass_once():
    class Checkpointed(Plain):
        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    probe = Probe("module.net.0", "module.net.0#0")
    fit(Checkpointed(), probe, batches=pairs(2))
    assert all(last is first for last, first in probe.seen)


# --- wrong paths -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("module.nte", r"'module' \(Composite\) has no submodule, parameter or buffer 'nte'; it has 'net', .*'mean'\. "
         "Did you mean 'net'"),
        ("module.net.3", r"'module.net' \(Sequential\) has no .*'3'; it has '0', '1', '2'\."),
        ("module.linear", r"Did you mean 'module.cross.linear'"),
        ("module.net.0.weigth", r"it has 'weight', 'bias'\. Did you mean 'weight'"),
        ("module.net.1.x", r"'module.net.1' \(Tanh\) .*; it has no submodules or parameters"),
        ("module.scale.x", r"'module.scale' \(Parameter\) .*; it has no submodules or parameters"),
        ("module.forward", r"no submodule, parameter or buffer 'forward'"),
        ("module.trainer", r"no submodule, parameter or buffer 'trainer'"),
    ],
)  # fmt: skip
def test_a_wrong_path_fails_before_training_and_leaves_the_module_alone(text, message):
    module = Composite()
    before, called = trace(module), []
    module.net.register_forward_hook(lambda *_: called.append(1))
    with pytest.raises(AddressError, match=message) as error:
        fit(module, Probe("module.net", text))
    assert f"'{text}'" in str(error.value)
    assert not called
    after = trace(module)
    after["net"][2]["_forward_hooks"] -= 1
    assert {name: after[name] for name in after if name != "attributes"} == {
        name: before[name] for name in before if name != "attributes"
    }
    assert "training_step" not in vars(module)


def test_a_path_that_a_function_reads_must_be_named():
    with pytest.raises(AddressError, match=r"computed\(function, 'module.net.0'\)"):
        seen(Plain(), lambda step: step["module.net.0"])
    (hidden,) = seen(Plain(), computed(lambda step: step["module.net.0"], "module.net.0"))
    assert hidden.shape == (ROWS, 8)


# --- submodules that were not called ---------------------------------------------------------------


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
    module, calls = Keeps(), []
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
    module = Composite()
    before = fitted_trace(module)
    fit(module, Probe("module.cross#0", "module.cross.linear#1", "module.scale", "module.heads.main@input"), Penalty())
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

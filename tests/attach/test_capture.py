"""What addresses into the module give: outputs, inputs, several calls, parameters."""

import pytest
import torch
import torch.nn.functional as F
from plain import CLASSES, IN, ONE, ROWS, CallsForward, Plain, Probe, fit, pairs, same, seen, trace
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_methods.attach import AddressError, Method, computed

# --- the module itself -----------------------------------------------------------------------------


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

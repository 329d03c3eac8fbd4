"""Parts of the model replaced, and given back."""

import copy
import pickle

import pytest
import torch
from plain import Plain, fit, pairs
from pytorch_lightning import LightningModule
from torch import nn

from lightning_methods.attach import AddressError, Method, Parts
from lightning_methods.attach._lightning import MisconfigurationException
from lightning_methods.testing import check_method


class Gated(nn.Module):
    """A Linear whose output is scaled by a learned gate for each feature; keeps the Linear's own Parameters."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.gate = nn.Parameter(torch.linspace(0.5, 1.5, len(linear.bias)))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) * self.gate


class Gate(Method):
    """The smallest surgery."""

    changes_inference = True

    def __init__(self, modules="module.net.*.fc", name="gate"):
        super().__init__(name=name)
        self.modules = Parts(modules)

    def replacements(self, module):
        return {path: Gated(part) for path, part in self.modules.find(module).items()}


class Block(nn.Module):
    def __init__(self, fc):
        super().__init__()
        self.fc = fc

    def forward(self, x):
        return x + self.fc(x).relu()


class Net(LightningModule):
    def __init__(self, shared=False):
        super().__init__()
        torch.manual_seed(0)
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.net = nn.Sequential(Block(first), Block(first if shared else second))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.net(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


BATCH = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def test_the_smallest_surgery_passes_the_suite():
    report = check_method(Gate(), Net(), BATCH)
    assert {"leaves_no_trace", "checkpoint_says_what_it_needs", "resumes_exactly", "compiles"} <= set(report.passed)
    assert "checkpoint_is_plain" in report.not_run


def test_paths_are_matched_name_by_name_in_the_order_given():
    net = Net()
    assert list(Parts("module.net.*.fc").find(net)) == ["net.0.fc", "net.1.fc"]
    assert list(Parts(["module.head", "module.net.0"]).find(net)) == ["head", "net.0"]
    assert list(Parts("module.*").find(net)) == ["net", "head"]
    assert list(Parts("module.he*").find(net)) == ["head"]


def test_what_matches_nothing_is_an_error_with_the_nearest_and_changes_nothing():
    net = Net()
    with pytest.raises(
        AddressError, match=r"'module\.net\.\*\.fcc' matches no submodule of Net.*'module\.net\.[01]\.fc'"
    ):
        fit(net, Gate(["module.head", "module.net.*.fcc"]))
    assert type(net.head) is nn.Linear


@pytest.mark.parametrize("text", ["batch.0", "module", "module.net@input", "module.net:0", "module.net#0"])
def test_only_bare_paths_of_submodules_are_parts(text):
    with pytest.raises(AddressError, match="path of a submodule"):
        Parts(text)


def test_at_least_one_address():
    with pytest.raises(AddressError, match="at least one"):
        Parts([])


def test_parts_are_trained_and_stay_after_the_fit():
    net, gate = Net(), Gate()
    fit(net, gate, batches=[BATCH])
    fresh = Gate().apply(Net())
    for trained, new in ((net.net[0].fc, fresh.net[0].fc), (net.net[1].fc, fresh.net[1].fc)):
        assert type(trained) is Gated
        assert not torch.equal(trained.gate, new.gate)
    assert not any("original" in name for name, _ in net.named_modules())


def test_new_parts_do_not_shift_the_random_numbers():
    class Draws(Gate):
        def replacements(self, module):
            torch.rand(1)
            return super().replacements(module)

    net = Net()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Draws().apply(net)
    assert torch.equal(torch.rand(3), expected)


def test_undo_gives_the_originals_back_with_what_they_share_as_trained():
    net = Net()
    before = [block.fc for block in net.net]
    gate = Gate()
    fit(net, gate, batches=[BATCH])
    trained = net.net[0].fc.weight.detach().clone()
    assert gate.undo(net) is net
    assert [block.fc for block in net.net] == before
    assert torch.equal(net.net[0].fc.weight, trained)
    assert not torch.equal(trained, Net().net[0].fc.weight)
    assert list(net.state_dict()) == list(Net().state_dict())
    assert gate.undo(net) is net  # nothing left to undo


def test_applying_again_changes_nothing():
    net = Gate().apply(Net())
    parts = list(net.modules())
    Gate().apply(net)
    fit(net, Gate(), batches=[BATCH])
    assert list(net.modules()) == parts


def test_two_methods_may_not_replace_one_part():
    with pytest.raises(MisconfigurationException, match=r"'module\.net\.0\.fc' is a Gated .* 'gate' .* 'other'"):
        Gate(name="other").apply(Gate().apply(Net()))


def test_two_methods_on_two_parts():
    first, second = Gate(), Gate("module.head", name="head")
    net = Net()
    fit(net, first, second, batches=[BATCH])
    assert type(net.head) is Gated
    first.undo(net)
    assert type(net.head) is Gated
    assert type(net.net[0].fc) is nn.Linear
    with pytest.raises(RuntimeError, match="saved with the callback Gate"):
        Net().load_state_dict(net.state_dict())


def test_a_part_at_two_paths_is_replaced_by_one():
    net = Gate().apply(Net(shared=True))
    assert type(net.net[0].fc) is Gated
    assert net.net[0].fc is net.net[1].fc
    Gate().undo(net)
    assert net.net[0].fc is net.net[1].fc
    assert type(net.net[0].fc) is nn.Linear


def test_device_and_mode_are_those_of_the_old_part():
    net = Net().to("meta")
    net.net[0].fc.eval()
    Gate().apply(net)
    assert net.net[0].fc.gate.device.type == "meta"
    assert [block.fc.training for block in net.net] == [False, True]


def test_copies_and_pickles_keep_the_parts_and_can_be_undone():
    net, gate = Net(), Gate()
    gate.apply(net)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(copied(BATCH[0]), net(BATCH[0]))
        assert copied.net[0].fc is not net.net[0].fc
        gate.undo(copied)
        assert type(copied.net[0].fc) is nn.Linear
        assert copied.net[0].fc.weight is not net.net[0].fc.weight


def test_an_exported_module_needs_no_method():
    net, gate = Net(), Gate()
    fit(net, gate, batches=[BATCH])
    exported = gate.export(net)
    assert torch.equal(exported(BATCH[0]), net(BATCH[0]))
    assert not any("saved with" in key for key in exported.state_dict())
    gate.undo(exported)  # it has become a model of its own
    assert type(exported.net[0].fc) is Gated
    assert type(net.net[0].fc) is Gated


def test_validating_alone_puts_the_parts_in_place():
    from pytorch_lightning import Trainer

    class Validates(Net):
        def validation_step(self, batch, batch_idx):
            self.seen = type(self.net[0].fc)

        def val_dataloader(self):
            return torch.utils.data.DataLoader(range(1))

    net = Validates()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    Trainer(callbacks=[Gate()], accelerator="cpu", **quiet).validate(net, verbose=False)
    assert net.seen is Gated


def test_manual_optimisation_is_no_obstacle():
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

    net = Manual()
    fit(net, Gate(), batches=[BATCH])
    assert not torch.equal(net.net[0].fc.gate, Gate().apply(Manual()).net[0].fc.gate)


def test_plain_methods_operate_on_nothing():
    class Nothing(Method):
        def losses(self, step):
            return {"square": next(step.module.parameters()).square().sum()}

    module = Plain()
    fit(module, Nothing(name="nothing"), batches=pairs(1))
    assert not any("saved with" in key for key in module.state_dict())

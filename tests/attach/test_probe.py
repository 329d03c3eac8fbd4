"""Probes: a method runs the module's forward itself, inside of the training step or outside, and reads addresses."""

import pytest
import torch
import torch.nn.functional as F
from plain import CLASSES, IN, ONE, CallsForward, Penalty, Plain, assert_close, fit, pairs, trace
from pytorch_lightning import Callback

from lightning_methods.attach import AddressError, Method, address


class Probing(Method):
    """Runs the module on twice the inputs in every step and after every epoch; keeps what it reads."""

    def __init__(self, where="module", *, of_batch="batch.y", name="probing"):
        super().__init__(name=name)
        self.where, self.of_batch, self.inputs = address(where), address(of_batch), address("batch.0")
        self.inside, self.outside = [], []

    def losses(self, step):
        before = step[self.where]
        with self.probe(2 * step[self.inputs], batch={"y": step.batch[1]}) as other:
            read = other[self.where]
            self.inside.append((before, read))
            assert other[self.of_batch] is step.batch[1]
            assert other.index == -1
            assert other.output is None
        assert step[self.where] is before
        return {"consistency": (read - before).square().mean()}

    def end_epoch(self):
        module = self._step.module
        ones = torch.ones(2, IN, dtype=module.net[0].weight.dtype)
        with torch.no_grad(), self.probe(ones) as step:
            self.outside.append((step[self.where], module(ones), module.training))


class ByHandConsistency(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self(x)
        return F.cross_entropy(out, y) + (self(2 * x) - out).square().mean()


@pytest.mark.parametrize("where", ["module", "module.net", "module.net.2"])
def test_a_term_from_a_probe_trains_as_written_by_hand(where):
    attached, by_hand = Plain(), ByHandConsistency()
    fit(attached, Probing(where), max_epochs=2)
    fit(by_hand, max_epochs=2)
    assert_close(attached, by_hand)


def test_inputs_may_be_addresses_in_the_batch():
    class Addressed(Probing):
        def losses(self, step):
            with self.probe(address("batch.x"), batch={"x": step.batch[0]}) as other:
                self.inside.append((step[self.where], other[self.where]))
            return super().losses(step)

    method = Addressed()
    fit(Plain(), method, batches=ONE)
    own, probed = method.inside[0]
    assert torch.equal(own, probed)


def test_a_module_that_calls_its_forward_by_name():
    attached, by_hand = CallsForward(), ByHandConsistency()
    fit(attached, Probing())
    fit(by_hand)
    assert_close(attached, by_hand)


def test_outside_of_a_step_it_reads_the_module_as_it_is():
    method = Probing()
    fit(Plain(), method, max_epochs=2)
    assert len(method.outside) == 2
    for read, expected, training in method.outside:
        assert torch.equal(read, expected)
        assert not read.requires_grad
        assert training  # modes are the method's affair
    assert not torch.equal(method.outside[0][0], method.outside[1][0])


def test_the_modules_own_values_are_those_of_its_own_step_for_methods_that_follow():
    class After(Penalty):
        def __init__(self):
            super().__init__(name="after")
            self.where, self.inputs = address("module.net"), address("module.net@input")
            self.seen = []

        def losses(self, step):
            self.seen.append((step[self.where], step.module.net(step.batch[0]), step[self.inputs], step.batch[0]))
            return super().losses(step)

    after = After()
    fit(Plain(), Probing("module.net"), after, batches=ONE)
    out, expected, received, given = after.seen[0]
    assert torch.equal(out, expected)
    assert received is given


def test_runs_in_the_trainers_precision():
    method = Probing()
    fit(Plain(), method, precision="bf16-mixed", batches=ONE)
    (before, inside), (outside, _, _) = method.inside[0], method.outside[0]
    assert before.dtype == inside.dtype == outside.dtype == torch.bfloat16
    double = Probing()
    fit(Plain().double(), double, precision="64-true", batches=[(x.double(), y) for x, y in ONE])
    assert double.inside[0][1].dtype == torch.float64


def test_what_forward_does_not_reach_is_an_error_that_leaves_no_trace():
    class Late(Probing):
        def losses(self, step):
            return {"zero": step.module.net[0].weight.sum() * 0}  # so that the error is the probe's

    class TwoParts(Plain):
        def __init__(self):
            super().__init__()
            self.aside = torch.nn.Linear(IN, CLASSES)

    module = TwoParts()
    with pytest.raises(AddressError, match=r"'module.aside' gave no value"):
        fit(module, Late("module.aside"))
    assert "training_step" not in vars(module)
    assert not any(part._forward_hooks for part in module.modules())


def test_recorded_values_die_with_the_probe():
    kept = []

    class Leaks(Probing):
        def end_epoch(self):
            with self.probe(torch.ones(2, IN)) as step:
                kept.append(step)

    module = Plain()
    fit(module, Leaks(), batches=pairs(1))
    with pytest.raises(AddressError):
        kept[0]["module"]
    reference = Plain()
    fit(reference, batches=pairs(1))
    assert trace(module) == trace(reference)


def test_two_processes_probe_alike():
    class Same(Callback):
        def on_train_end(self, trainer, pl_module):
            assert trainer.world_size == 2

    fit(Plain(), Probing(), Same(), accelerator="cpu", strategy="ddp_fork", devices=2, use_distributed_sampler=False)

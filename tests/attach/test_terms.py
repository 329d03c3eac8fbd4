"""The terms that methods return: weights, ramps, and what is no term."""

import pytest
import torch
import torch.nn.functional as F
from plain import (
    ByHand,
    Penalty,
    Plain,
    Probe,
    Spy,
    assert_close,
    fit,
    penalty,
    same,
)

from lightning_methods.attach import Method

# --- weights ---------------------------------------------------------------------------------------


class Two(Method):
    """Two terms, one of which may be anything."""

    def __init__(self, other=1.0, **arguments):
        super().__init__(name="two", **arguments)
        self.other = other

    def losses(self, step):
        return {"a": penalty(step.module), "b": penalty(step.module) * self.other}


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"a": 0.3, "b": 0.2}, 0.5), ({"a": 0.3}, 1.3), (None, 2.0), ({"a": 0.0, "b": 0.25}, 0.25)],
)
def test_terms_are_weighted(given, expected):
    attached, by_hand = Plain(), ByHand(expected)
    fit(attached, Two(weights=given))
    fit(by_hand)
    assert_close(attached, by_hand)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_term_of_weight_0_cannot_spoil_the_others(bad):
    attached, by_hand = Plain(), ByHand(1.0)
    fit(attached, Two(other=bad, weights={"b": 0.0, "a": 1.0}))
    fit(by_hand)
    assert_close(attached, by_hand)


@pytest.mark.parametrize("order", [1, -1])
def test_the_task_weight_is_that_of_the_modules_own_loss_only(order):
    attached, by_hand = Plain(), ByHand(0.3 + 0.2, task_weight=0.5 * 0.5)
    methods = [Penalty(0.3, task_weight=0.5), Penalty(0.2, task_weight=0.5, name="second")]
    fit(attached, *methods[::order])
    fit(by_hand)
    assert_close(attached, by_hand)


def test_weight_0_is_not_attached_bit_for_bit():
    class Noisy(Plain):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, self.training)

    class Off(Method):
        def rewrite(self, step):
            raise AssertionError("asked though its weight is 0")

        def losses(self, step):
            raise AssertionError("asked though its weight is 0")

    off = Off(name="off", weights={"a": 0.0, "b": 0.0})
    plain, attached = Noisy(), Noisy()
    spy, reference = Spy(), Spy()
    fit(plain, reference)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"did nothing in epoch 0: all its weights are 0"):
        fit(attached, off, spy)
    assert same(attached, plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, spy.returned, reference.returned))


def test_terms_outside_the_ramp_have_their_whole_weight():
    from lightning_methods.attach import Ramp

    class Steady(Two):
        unramped = frozenset({"b"})

    attached, by_hand = Plain(), ByHand(0.25)
    fit(attached, Steady(weights={"a": 0.5, "b": 0.25}, ramp=Ramp(4, start=9)), max_epochs=2)
    fit(by_hand, max_epochs=2)
    assert_close(attached, by_hand)


def test_a_ramp_scales_every_weight():
    from lightning_methods.attach import Ramp

    class ByHandRamp(ByHand):
        def training_step(self, batch, batch_idx):
            now = self.current_epoch if self.unit == "epoch" else self.global_step
            self.weight = 0.5 * self.factors[now]
            return super().training_step(batch, batch_idx)

    for unit, ramp, factors in [
        ("epoch", Ramp(2), [0.5, 1.0, 1.0]),
        ("epoch", Ramp(2, start=1), [0.0, 0.5, 1.0]),
        ("epoch", Ramp(0.7), [1 / 2.1, 2 / 2.1, 1.0]),  # a share of three epochs
        ("step", Ramp(4, start=2, unit="step"), [0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
    ]:
        attached, by_hand = Plain(), ByHandRamp()
        by_hand.unit, by_hand.factors = unit, factors
        fit(attached, Penalty(0.5, ramp=ramp), max_epochs=3)
        fit(by_hand, max_epochs=3)
        assert_close(attached, by_hand)


def test_a_share_of_an_endless_training_is_refused():
    from lightning_methods.attach import Ramp

    module = Plain()
    with pytest.raises(ValueError, match="needs its number of epochs, but the Trainer has max_epochs=-1"):
        fit(module, Penalty(ramp=Ramp(0.5)), max_epochs=-1, max_steps=2)
    assert "training_step" not in vars(module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": {"l2": -1.0}}, "Expected the l2 weight of 'm' to be at least 0, but got -1.0"),
        ({"task_weight": -0.5}, "Expected the task weight of 'm' to be at least 0, but got -0.5"),
        ({"weights": {"l2": float("nan")}}, "Expected the l2 weight of 'm' to be at least 0, but got nan"),
    ],
)
def test_negative_weights_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Method(name="m", **arguments)


# --- terms that are none ---------------------------------------------------------------------------


class Gives(Method):
    def __init__(self, give, **arguments):
        super().__init__(name="gives", **arguments)
        self.give = give

    def losses(self, step):
        return self.give(step)


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda step: {"l2": step.module.net[0].weight}, r"its term 'l2' to be a scalar Tensor, but got a Parameter|"
         r"its term 'l2' to be a scalar Tensor, but got a Tensor of shape \[8, 4\]"),
        (lambda step: {"l2": penalty(step.module).reshape(1)}, r"a scalar Tensor, but got a Tensor of shape \[1\]"),
        (lambda step: {"ok": penalty(step.module), "l2": 1.0}, "its term 'l2' to be a scalar Tensor, but got a float"),
        (lambda step: {"l2": None}, "its term 'l2' to be a scalar Tensor, but got None"),
        (lambda step: {"x": penalty(step.module).detach(), "y": torch.ones(())}, r"none of its terms \(x, y\) carries"),
    ],
)  # fmt: skip
def test_terms_must_be_scalars_with_a_gradient(give, message):
    module, spied = Plain(), Gives(give)
    with pytest.raises(ValueError, match=message) as error:
        fit(module, spied)
    assert "Gives(" in str(error.value)
    assert "training_step" not in vars(module)


def test_one_term_with_a_gradient_is_enough():
    attached, by_hand = Plain(), ByHand()
    fit(attached, Gives(lambda step: {"l2": penalty(step.module), "constant": torch.ones(())}))
    fit(by_hand)
    assert_close(attached, by_hand)


def test_no_terms_leave_the_output_object_alone():
    outputs = []

    class Keeps(Plain):
        def training_step(self, batch, batch_idx):
            outputs.append({"loss": super().training_step(batch, batch_idx)})
            return outputs[-1]

    spy = Spy()
    fit(Keeps(), Probe("batch.0"), spy)
    assert all(got is own for got, own in zip(spy.returned, outputs, strict=True))
    assert len(outputs) == 3

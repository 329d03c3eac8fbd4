"""One training step with methods attached: what the module is called with, what comes back, in which order."""

import functools
import types
from collections import OrderedDict
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from plain import (
    IN,
    ONE,
    ByHand,
    Penalty,
    Plain,
    Probe,
    assert_close,
    fit,
    pairs,
    penalty,
    returned,
    same,
    trace,
)
from pytorch_lightning import Callback

from lightning_methods.attach import AddressError, Method, address

# --- the signature of training_step ----------------------------------------------------------------


def wrapped(function):
    @functools.wraps(function)
    def decorated(*args, **kwargs):
        return function(*args, **kwargs)

    return decorated


def hidden(function):
    def decorated(self, *args):
        return function(self, *args)

    return decorated


class Signature(Plain):
    def __init__(self):
        super().__init__()
        self.got = []

    def loss(self, batch, *others):
        self.got.append((batch, *others))
        return F.cross_entropy(self(batch[0]), batch[1])


class BatchOnly(Signature):
    def training_step(self, batch):
        return self.loss(batch)


class OtherNames(Signature):
    def training_step(self, data, i):
        return self.loss(data, i)


class OtherName(Signature):
    def training_step(self, data):
        return self.loss(data)


class Anything(Signature):
    def training_step(self, *args):
        return self.loss(*args)


class WithDefault(Signature):
    def training_step(self, batch, batch_idx=None, alpha=0.5):
        return self.loss(batch, batch_idx, alpha)


class KeywordOnly(Signature):
    def training_step(self, batch, *, verbose=False):
        return self.loss(batch, verbose)


class Decorated(Signature):
    @wrapped
    def training_step(self, batch):
        return self.loss(batch)


class DecoratedTwice(Signature):
    @wrapped
    @wrapped
    def training_step(self, batch, batch_idx):
        return self.loss(batch, batch_idx)


class DecoratedAndHidden(Signature):
    @hidden
    def training_step(self, batch, batch_idx):
        return self.loss(batch, batch_idx)


class Inherited(OtherNames):
    def training_step(self, data, i):
        return super().training_step(data, i)


class OnTheInstance(Signature):
    def __init__(self):
        super().__init__()
        self.training_step = types.MethodType(lambda self, batch, batch_idx: self.loss(batch, batch_idx), self)

    def training_step(self, batch, batch_idx):
        raise AssertionError("the one on the instance is meant")


SIGNATURES = [
    BatchOnly, OtherNames, OtherName, Anything, WithDefault, KeywordOnly, Decorated, DecoratedTwice,
    DecoratedAndHidden, Inherited, OnTheInstance,
]  # fmt: skip


@pytest.mark.parametrize("cls", SIGNATURES)
def test_the_step_is_called_as_lightning_calls_it_without_methods(cls):
    plain, attached, by_hand = cls(), cls(), ByHand()
    fit(plain, batches=ONE)
    before = dict(vars(attached))
    fit(attached, Penalty(), Probe("module"), batches=ONE)
    assert len(attached.got) == 1
    assert len(attached.got[0]) == len(plain.got[0])
    assert all(torch.equal(x, y) for x, y in zip(attached.got[0][0], plain.got[0][0], strict=True))
    assert attached.got[0][1:] == plain.got[0][1:]
    fit(by_hand, batches=ONE)
    assert_close(attached, by_hand)
    assert vars(attached).get("training_step") is before.get("training_step")


def test_a_step_that_calls_itself_for_parts_of_a_batch():
    class Recursive(Plain):
        def training_step(self, batch, batch_idx):
            if isinstance(batch, dict):
                return sum(self.training_step(part, batch_idx) for part in batch.values())
            return super().training_step(batch, batch_idx)

    batches = [dict(zip("ab", pairs(2), strict=True))]
    attached, probe = Recursive(), Probe("module#0", "module#1", "batch.a.0")

    class ByHandRecursive(Recursive):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss + penalty(self) if isinstance(batch, dict) else loss

    by_hand = ByHandRecursive()
    fit(attached, Penalty(), probe, batches=batches)
    fit(by_hand, batches=batches)
    assert_close(attached, by_hand)
    assert len(probe.seen) == 1, "the step of a part is not a training step of its own"


# --- the output ------------------------------------------------------------------------------------


class Output(dict):
    pass


class ModelOutput(OrderedDict):
    """Keys are attributes too."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)


@pytest.mark.parametrize("make", [dict, Output, OrderedDict, ModelOutput])
def test_a_mapping_keeps_its_type_and_its_other_keys(make):
    extra = object()

    class Returns(Plain):
        def training_step(self, batch, batch_idx):
            self.own = make(loss=super().training_step(batch, batch_idx), logits=self(batch[0]), extra=extra)
            self.own_loss = self.own["loss"]
            return self.own

    modules = []

    def module():
        modules.append(Returns())
        return modules[-1]

    got, _ = returned(module, Penalty(2.0))
    own = modules[-1].own
    assert type(got) is make
    assert list(got) == ["loss", "logits", "extra"]
    assert got["extra"] is extra
    assert got["logits"] is own["logits"]
    assert own["loss"] is modules[-1].own_loss, "the module's own mapping was changed"
    torch.testing.assert_close(got["loss"], own["loss"] + 2 * penalty(Plain()))
    assert getattr(got, "loss", got["loss"]) is got["loss"]


def test_a_tensor_stays_a_tensor_and_keeps_its_shape():
    class OneElement(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx).reshape(1)

    for module, shape in ((Plain, ()), (OneElement, (1,))):
        got, plain = returned(module, Penalty())
        assert type(got) is torch.Tensor
        assert got.shape == shape
        assert got.requires_grad
        torch.testing.assert_close(got, plain + penalty(Plain()))


def test_without_a_loss_methods_are_skipped():
    class Skips(Plain):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    class ByHandSkips(ByHand):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    attached, probe, by_hand = Skips(), Probe("batch.0"), ByHandSkips()
    fit(attached, probe, Penalty())
    fit(by_hand)
    assert_close(attached, by_hand)
    assert len(probe.seen) == 2


@pytest.mark.parametrize("output", [3.0, "loss", {"los": torch.ones(())}, {"loss": None}, {"loss": 1.0}])
def test_a_wrong_output_is_left_for_lightning_to_refuse(output):
    class Wrong(Plain):
        def training_step(self, batch, batch_idx):
            return output

    messages = []
    for methods in ((), (Penalty(),)):
        with pytest.raises(Exception) as error:  # noqa: PT011  # the same one, whichever it is
            fit(Wrong(), *methods)
        messages.append((type(error.value), str(error.value)))
    assert messages[0] == messages[1]


# --- several methods -------------------------------------------------------------------------------


class Shift(Method):
    """Adds a constant to the images."""

    def __init__(self, amount, name):
        super().__init__(name=name)
        self.amount = amount
        self.image = address("batch.0")
        self.before = []

    def rewrite(self, step):
        self.before.append((step[self.image], step.original_batch, step.output))
        step[self.image] = step[self.image] + self.amount


class Kept(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batch = batch


def test_batches_are_rewritten_in_callback_order_and_never_mutated():
    class Keeps(Plain):
        def training_step(self, batch, batch_idx):
            self.got = batch
            return super().training_step(batch, batch_idx)

    x, y = ONE[0]
    untouched = x.clone()
    first, second, module, kept = Shift(1.0, "a"), Shift(2.0, "b"), Keeps(), Kept()
    probe = Probe("batch", "module@input", lambda step: step.original_batch)
    fit(module, kept, first, second, probe, batches=ONE)
    assert torch.equal(x, untouched)
    assert kept.batch[0] is x, "the trainer's own batch stays"
    (seen_first, original, output), (seen_second, original_second, _) = first.before[0], second.before[0]
    assert seen_first is x
    assert torch.equal(seen_second, x + 1)
    assert original[0] is original_second[0] is x
    assert output is None
    assert torch.equal(module.got[0], x + 1 + 2)
    assert module.got[1] is y
    batch, received, original = probe.seen[0]
    assert batch is module.got
    assert received is module.got[0]
    assert original[0] is x


def test_terms_are_asked_in_callback_order():
    order = []

    class Says(Penalty):
        def losses(self, step):
            order.append(self.name)
            return super().losses(step)

    fit(Plain(), Says(name="b"), Says(name="a"), Says(name="c"), batches=ONE)
    assert order == ["b", "a", "c"]


def test_two_methods_add_up():
    attached, by_hand = Plain(), ByHand(0.7 + 0.4)
    fit(attached, Penalty(0.7), Penalty(0.4, name="second"))
    fit(by_hand)
    assert_close(attached, by_hand)


class Replaces(Penalty):
    replaces_loss = True


def test_a_method_can_replace_the_loss():
    attached, by_hand = Plain(), ByHand(0.5, task_weight=0.0)
    fit(attached, Replaces(0.5))
    fit(by_hand)
    assert_close(attached, by_hand)
    assert not same(attached, Plain())


@pytest.mark.parametrize("replacing_first", [True, False])
def test_replacing_the_loss_keeps_the_terms_of_the_other_methods(replacing_first):
    methods = [Replaces(0.5), Penalty(0.25, name="other")]
    attached, by_hand = Plain(), ByHand(0.75, task_weight=0.0)
    fit(attached, *(methods if replacing_first else reversed(methods)))
    fit(by_hand)
    assert_close(attached, by_hand)


def test_two_that_replace_the_loss_are_refused():
    module = Plain()
    before = trace(module)
    with pytest.raises(Exception, match=r"Both Replaces\(\) and Replaces\(name='second'\) replace the module's loss"):
        fit(module, Replaces(), Replaces(name="second"))
    assert "training_step" not in vars(module)
    assert trace(module)["net"] == before["net"]


def test_two_of_one_name_are_refused():
    module = Plain()
    with pytest.raises(Exception, match=r"Two attached methods are called 'penalty': Penalty\(\) and Probe\(") as error:
        fit(module, Penalty(), Probe(name="penalty"))
    assert "another `name`" in str(error.value)
    assert "training_step" not in vars(module)
    fit(module, Penalty(), Penalty(name="second"))


# --- what a method sees ----------------------------------------------------------------------------


def test_the_step_tells_where_it_is():
    class Looks(Method):
        def losses(self, step):
            seen.append((step.index, step.epoch, step.module is module, step.trainer is module.trainer))
            assert isinstance(step.output, Mapping)
            assert step["output.loss"] is step.output["loss"]
            return {}

    class Returns(Plain):
        def training_step(self, batch):
            return {"loss": super().training_step(batch, 0)}

    seen, module = [], Returns()
    fit(module, Looks(name="looks"), batches=pairs(2), max_epochs=2)
    assert seen == [(0, 0, True, True), (1, 0, True, True), (0, 1, True, True), (1, 1, True, True)]


@pytest.mark.parametrize("text", ["output", "output.loss", "module.net", "module", "teacher"])
def test_only_the_batch_can_be_written(text):
    class Writes(Method):
        def rewrite(self, step):
            step[text] = 1

    with pytest.raises(AddressError, match=rf"Address '{text}' cannot be written: only addresses in the batch can"):
        fit(Plain(), Writes(name="writes"))


def test_a_pair_of_functions_reads_and_writes():
    class Doubles(Method):
        def __init__(self, where):
            super().__init__(name="doubles")
            self.where = address(where)

        def rewrite(self, step):
            step[self.where] = step[self.where] * 2

    pair = (lambda step: step.batch[0], lambda step, value: (value, step.batch[1]))
    probe = Probe("module@input", pair[0])
    fit(Plain(), Doubles(pair), probe, batches=ONE)
    assert torch.equal(probe.seen[0][0], ONE[0][0] * 2)
    assert probe.seen[0][1] is probe.seen[0][0]
    with pytest.raises(AddressError, match=r"can only be read; to write, give a pair of functions \(get, set\)"):
        fit(Plain(), Doubles(pair[0]), batches=ONE)


def test_a_batch_that_is_one_tensor_can_be_replaced():
    class Autoencoder(Plain):
        def training_step(self, batch, batch_idx):
            return self(batch).square().mean()

    class Zeroes(Method):
        def rewrite(self, step):
            step["batch"] = torch.zeros_like(step["batch"])

    probe = Probe("module@input")
    fit(Autoencoder(), Zeroes(name="zeroes"), probe, batches=[torch.ones(2, IN)])
    assert torch.equal(probe.seen[0][0], torch.zeros(2, IN))


def test_a_teacher_that_is_not_there():
    with pytest.raises(AddressError, match=r"Address 'teacher.net': this method has no teacher"):
        fit(Plain(), Probe("teacher.net"))


@pytest.mark.parametrize(("text", "near"), [("batch.2", "'0', '1'"), ("output.los", "Did you mean 'loss'")])
def test_a_wrong_place_in_batch_or_output_fails_in_the_first_step(text, near):
    class Returns(Plain):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx)}

    module = Returns()
    with pytest.raises(AddressError, match=near):
        fit(module, Probe(text))
    assert same(module, Returns())

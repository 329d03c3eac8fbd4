"""Mixins: the method travels with the model class, as one callback for each instance."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from plain import CLASSES, IN, Batches, Penalty, Plain, fit, pairs, penalty, same, weights
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import EarlyStopping, EMAWeightAveraging, Timer
from torch import nn

from lightning_methods.attach import Method
from lightning_methods.callbacks import IKLDistillation
from lightning_methods.mixins import IKLDistillationMixin, MethodMixin


class PenaltyMixin(MethodMixin):
    method = Penalty
    settings = "penalty"


class Other(Penalty):
    """Another method, which is no relative of `Penalty` for Lightning's rule that a module's callback overrides."""


class OtherMixin(MethodMixin):
    method = Other
    settings = "other"


class Penalised(PenaltyMixin, Plain):
    penalty = {"weight": 0.5}  # noqa: RUF012


class ByHand(Plain):
    """The same written into the step."""

    def __init__(self, weight=0.5):
        super().__init__()
        self.weight = weight

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.weight * penalty(self)


def by_hand(weight, *callbacks, epochs=(1,)):
    module = ByHand(weight)
    for max_epochs in epochs:
        fit(module, *callbacks, max_epochs=max_epochs)
    return module


def assert_close(module, expected):
    torch.testing.assert_close(weights(module), weights(expected))


def test_the_class_trains_with_its_method():
    module = Penalised()
    run = fit(module)
    assert [type(callback) for callback in run.callbacks if isinstance(callback, Method)] == [Penalty]
    assert_close(module, by_hand(0.5))


def test_settings_of_the_instance_win():
    module = Penalised()
    module.penalty = {"weight": 0.25, "name": "mine"}
    fit(module)
    assert_close(module, by_hand(0.25))


def test_the_bundled_mixin():
    class Taught(IKLDistillationMixin, Plain):
        ikl = {"teacher": nn.Linear(IN, CLASSES), "class_wise": False}  # noqa: RUF012

    attached, carried = Plain(), Taught()
    fit(attached, IKLDistillation(**Taught.ikl))
    run = fit(carried)
    assert any(isinstance(callback, IKLDistillation) for callback in run.callbacks)
    assert same(attached, carried)
    assert not same(attached, Plain())


# --- the same instance -----------------------------------------------------------------------------


class Keeps(Penalised):
    """Notes the callbacks of every run."""

    def validation_step(self, batch, batch_idx):
        pass

    def setup(self, stage):
        self.found = [callback for callback in self.trainer.callbacks if isinstance(callback, Penalty)]


def test_every_run_gets_the_same_callback():
    module, found = Keeps(), []
    run = fit(module, val=pairs(1))
    found += module.found
    run.validate(module, Batches(pairs(1)), verbose=False)
    found += module.found
    run.fit_loop.max_epochs = 2
    run.fit(module, Batches(pairs()))
    found += module.found
    fit(module)
    found += module.found
    assert len(found) == 4, "one in each run"
    assert len(set(map(id, found))) == 1
    assert found[0] is module.configure_callbacks()[0]
    assert_close(module, by_hand(0.5, epochs=(2, 1)))


def test_two_modules_have_two_callbacks_and_may_share_a_trainer():
    first, second = Penalised(), Penalised()
    run = fit(first)
    run.fit_loop.max_epochs = 2
    run.fit(second, Batches(pairs()))
    assert first.configure_callbacks()[0] is not second.configure_callbacks()[0]
    assert [callback for callback in run.callbacks if isinstance(callback, Penalty)] == second.configure_callbacks()


def test_the_callback_dies_with_its_module():
    module = Penalised()
    fit(module)
    callback = weakref.ref(module.configure_callbacks()[0])
    del module
    gc.collect()
    assert callback() is None


class Uncopyable(Penalty):
    def __deepcopy__(self, memo):
        raise AssertionError("the module's copy copied the callback")

    def __reduce__(self):
        raise AssertionError("the module's pickle holds the callback")


class UncopyableMixin(MethodMixin):
    method = Uncopyable
    settings = "penalty"


class Copied(UncopyableMixin, Plain):
    penalty = {"weight": 0.5}  # noqa: RUF012


def test_copies_have_callbacks_of_their_own_and_do_not_copy_this_one():
    module = Copied()
    callback = module.configure_callbacks()[0]
    fit(module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.configure_callbacks()[0] is not callback
        other.load_state_dict(Plain().state_dict())
        fit(other)
        assert_close(other, by_hand(0.5))


def test_weight_averaging():
    module = Penalised()
    fit(module, EMAWeightAveraging(decay=0.5), max_epochs=2)
    assert_close(module, by_hand(0.5, EMAWeightAveraging(decay=0.5), epochs=(2,)))


# --- with the class's other callbacks --------------------------------------------------------------


def test_several_mixins_on_one_class():
    class Both(PenaltyMixin, OtherMixin, Plain):
        penalty = {"weight": 0.5}  # noqa: RUF012
        other = {"weight": 0.25, "name": "other"}  # noqa: RUF012

    module = Both()
    run = fit(module)
    assert [type(callback) for callback in run.callbacks if isinstance(callback, Penalty)] == [Penalty, Other]
    assert_close(module, by_hand(0.75))


def test_a_mixin_on_a_subclass_joins_those_of_its_parent():
    class Child(OtherMixin, Penalised):
        other = {"weight": 0.25, "name": "other"}  # noqa: RUF012

    module = Child()
    fit(module)
    assert_close(module, by_hand(0.75))


@pytest.mark.parametrize("given", [Timer, lambda: [Timer(), EarlyStopping("x")], lambda: (Timer(),), list])
def test_callbacks_of_the_classes_behind_are_kept(given):
    class Brings(Plain):
        def configure_callbacks(self):
            return given()

    class Carries(PenaltyMixin, Brings):
        penalty = {"weight": 0.5}  # noqa: RUF012

    expected = given()
    expected = list(expected) if isinstance(expected, (list, tuple)) else [expected]
    assert [type(callback) for callback in Carries().configure_callbacks()] == [*map(type, expected), Penalty]


@pytest.mark.parametrize("asks", [True, False], ids=["asks super", "does not ask super"])
def test_the_classs_own_configure_callbacks_does_not_hide_the_method(asks):
    class Brings(Penalised):
        def configure_callbacks(self):
            return [*(super().configure_callbacks() if asks else ()), Timer()]

    module = Brings()
    assert sorted(type(callback).__name__ for callback in module.configure_callbacks()) == ["Penalty", "Timer"]
    fit(module)
    assert_close(module, by_hand(0.5))


def test_attributes_named_like_the_mixins_own_belong_to_the_module():
    class Busy(Penalised):
        method = "adam"

        def __init__(self):
            super().__init__()
            self.settings = {"lr": 0.1}

    module = Busy()
    fit(module)
    assert_close(module, by_hand(0.5))


# --- what is refused -------------------------------------------------------------------------------


def test_the_wrong_order_of_bases_is_refused_where_the_class_is_written():
    for bases in [(LightningModule, PenaltyMixin), (Plain, PenaltyMixin), (LightningModule, IKLDistillationMixin)]:
        mixin = bases[1].__name__
        with pytest.raises(Exception, match=rf"Wrong: write `class Wrong\({mixin}, LightningModule\)`") as error:
            type("Wrong", bases, {})
        assert type(error.value).__name__ == "MisconfigurationException"


def test_the_right_order_is_accepted_at_any_depth():
    class Base(PenaltyMixin):
        pass

    class First(Base, Plain):
        penalty = {}  # noqa: RUF012

    class Second(First):
        pass

    assert len(Second().configure_callbacks()) == 1


@pytest.mark.parametrize("settings", [None, [("weight", 1.0)], 0.5])
def test_settings_that_are_missing_or_no_dict(settings):
    class Without(PenaltyMixin, Plain):
        pass

    module = Without()
    if settings is not None:
        module.penalty = settings
    with pytest.raises(Exception, match=r"Without\.penalty should be a dict of Penalty's arguments, but is") as error:
        fit(module)
    assert type(error.value).__name__ == "MisconfigurationException"
    module.penalty = {}
    fit(module)


def test_a_wrong_argument_names_it():
    module = Penalised()
    module.penalty = {"wieght": 1.0}
    with pytest.raises(TypeError, match="wieght"):
        fit(module)


@pytest.mark.parametrize("given", [lambda: Penalty(name="mine"), lambda: Parent(name="parent")], ids=["same", "parent"])
def test_a_clash_with_the_trainers_callback_is_an_error(given):
    module = Penalised()
    if given().name == "parent":

        class ChildMixin(MethodMixin):
            method, settings = Child, "child"

        class Carries(ChildMixin, Plain):
            child = {}  # noqa: RUF012

        module = Carries()
    with pytest.raises(Exception, match=r"brings \w+\(.*\) through its mixin, and the Trainer has .*Use one"):
        fit(module, given())
    assert "training_step" not in vars(module)


class Parent(Penalty):
    pass


class Child(Parent):
    pass


def test_the_trainers_other_methods_stay():
    module = Penalised()
    fit(module, Other(0.25, name="other"), Timer())
    assert_close(module, by_hand(0.75))

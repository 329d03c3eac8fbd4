"""A method through the life of a run: what is refused, exceptions, second fits, validation, modules made late."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from plain import (
    CLASSES,
    ONE,
    Batches,
    ByHand,
    Penalty,
    Plain,
    Probe,
    assert_close,
    fit,
    fitted_trace,
    pairs,
    same,
    trace,
    trainer,
)
from pytorch_lightning import Callback
from torch import nn

from lightning_methods.attach import AddressError

# --- what is refused -------------------------------------------------------------------------------


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        raise AssertionError("trained")


class Fetches(Plain):
    def training_step(self, dataloader_iter):
        raise AssertionError("trained")


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Manual, r"Penalty\(\) adds to the loss .* but Manual optimises manually.*lightning_methods\.functional"),
        (Fetches, r"Penalty\(\) needs the batch, but Fetches\.training_step takes `dataloader_iter`"),
    ],
)
def test_what_cannot_work_is_refused_and_the_module_left_alone(cls, message):
    module = cls()
    before = trace(module)
    with pytest.raises(Exception, match=message) as error:
        fit(module, Penalty())
    assert type(error.value).__name__ == "MisconfigurationException"
    after = trace(module)
    lightnings = {"_fabric", "_device", "_hparams"}
    assert set(after.pop("attributes")) - set(before.pop("attributes")) <= lightnings
    assert after == before


# --- no trace --------------------------------------------------------------------------------------


class Fails(Callback):
    """Raises in one hook."""

    def __init__(self, hook):
        def fail(*args, **kwargs):
            raise RuntimeError("on purpose")

        setattr(self, hook, fail)


class FailsItself(Probe):
    """A method that raises in one of its own."""

    def __init__(self, hook):
        super().__init__("module", "module.net.0")

        def fail(*args, **kwargs):
            raise RuntimeError("on purpose")

        setattr(self, hook, fail)
        self.rewrites_too = hook == "rewrite"

    @property
    def rewrites(self):
        return self.rewrites_too


class FailsOnce(Plain):
    """Raises inside its second step, while everything is hooked."""

    def forward(self, x):
        if self.fails and self.calls == 1:
            self.fails = False
            self.net(x)
            raise RuntimeError("on purpose")
        self.calls += 1
        return super().forward(x)

    def __init__(self, fails=True):
        super().__init__()
        self.fails, self.calls = fails, 0


@pytest.mark.parametrize(
    "failing",
    [
        functools.partial(Fails, "setup"),
        functools.partial(Fails, "on_fit_start"),
        functools.partial(Fails, "on_train_batch_start"),
        functools.partial(Fails, "on_after_backward"),
        functools.partial(Fails, "on_train_batch_end"),
        functools.partial(FailsItself, "rewrite"),
        functools.partial(FailsItself, "losses"),
        functools.partial(FailsItself, "helpers"),
        functools.partial(Probe, "module.nothing", name="wrong"),
    ],
    ids=lambda failing: f"{failing.func.__name__} {failing.args[0]}",
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_an_exception_leaves_no_trace_and_training_works_again(failing, first):
    module, methods = Plain(), [Penalty(), Probe("module", "module.net.0@input", name="eyes")]
    before = fitted_trace(module)
    callbacks = [failing(), *methods] if first else [*methods, failing()]
    with pytest.raises((RuntimeError, AddressError)):
        fit(module, *callbacks)
    after = trace(module)
    for found in (before, after):
        found.pop("attributes")
    assert after == before
    assert not {"training_step", "forward"} & set(vars(module))

    again, fresh = Plain(), Plain()
    module.load_state_dict(again.state_dict())
    fit(module, *methods)
    fit(fresh, Penalty())
    assert same(module, fresh)


def test_an_exception_inside_the_modules_own_step():
    module, fresh, probe = FailsOnce(), FailsOnce(fails=False), Probe("module", "module.net.0")
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, Penalty(), probe)
    assert not {"training_step", "forward"} & set(vars(module))
    assert not module.net[0]._forward_hooks
    module.load_state_dict(Plain().state_dict())
    module.calls = 2
    fit(module, Penalty(), probe)
    fit(fresh, Penalty())
    assert same(module, fresh)


def test_nothing_is_left_after_a_fit():
    module = Plain()
    before = fitted_trace(module)
    method = Penalty()
    kept = set(vars(method))
    fit(module, method, Probe("module", "module.net", "module.net.0@input"))
    assert trace(module) == before
    assert set(vars(method)) == kept
    assert all(value is not module for value in vars(method).values())


def test_fitting_twice_goes_on_and_the_same_callback_serves_another_module():
    module, by_hand, method = Plain(), ByHand(), Penalty()
    for _ in range(2):
        fit(module, method)
        fit(by_hand)
    assert_close(module, by_hand)
    other, reference = Plain(), ByHand()
    fit(other, method)
    fit(reference)
    assert_close(other, reference)


def test_the_same_trainer_fits_twice():
    module, by_hand = Plain(), ByHand()
    for one, callbacks in ((module, [Penalty()]), (by_hand, [])):
        run = fit(one, *callbacks)
        run.fit_loop.max_epochs = 2
        run.fit(one, Batches(pairs()))
    assert_close(module, by_hand)


class Wraps(Callback):
    """Another library that puts its own function in the place of training_step, in every order."""

    def __init__(self):
        self.calls = 0

    def setup(self, trainer, pl_module, stage):
        wrapped = pl_module.training_step

        @functools.wraps(wrapped)
        def counted(*args):
            self.calls += 1
            return wrapped(*args)

        self.found = vars(pl_module).get("training_step")
        pl_module.training_step = counted

    def teardown(self, trainer, pl_module, stage):
        del vars(pl_module)["training_step"]
        if self.found is not None:
            pl_module.training_step = self.found


@pytest.mark.parametrize("first", [True, False])
def test_another_wrapper_around_the_step(first):
    module, by_hand = Plain(), ByHand()
    probe = Probe("module")
    for rounds in (1, 2):
        others = Wraps()
        methods = [Penalty(), probe]
        fit(module, *([others, *methods] if first else [*methods, others]))
        fit(by_hand)
        assert others.calls == 3
        assert len(probe.seen) == 3 * rounds
        assert_close(module, by_hand)
    # Whatever order the others undo their work in: without a method the step is the module's own.
    count = len(probe.seen)
    module.load_state_dict(Plain().state_dict())
    fit(module)
    fit(reference := Plain())
    assert same(module, reference)
    assert len(probe.seen) == count


def test_a_wrapper_that_others_put_back_is_idle_in_the_same_trainer():
    module, probe = Plain(), Probe("module")
    run = fit(module, Penalty(), probe, Wraps())
    run.callbacks.clear()
    run.fit_loop.max_epochs = 2
    module.load_state_dict(Plain().state_dict())
    run.fit(module, Batches(pairs()))
    fit(reference := Plain())
    assert same(module, reference)
    assert len(probe.seen) == 3


# --- training only ---------------------------------------------------------------------------------


class Validates(Plain):
    """Uses its training step as a loss function elsewhere."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def validation_step(self, batch, batch_idx):
        self.losses.append((self.training_step(batch, batch_idx), F.cross_entropy(self.net(batch[0]), batch[1])))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.training_step(batch, batch_idx)


def test_validation_and_sanity_steps_are_left_alone():
    module, by_hand, probe = Validates(), ByHand(), Probe("module")
    fit(module, Penalty(), probe, val=ONE, num_sanity_val_steps=1, val_check_interval=1)
    fit(by_hand)
    assert_close(module, by_hand)
    assert len(module.losses) == 1 + 3
    assert all(torch.equal(own, expected) for own, expected in module.losses)
    assert len(probe.seen) == 3


def test_outside_of_fit_nothing_is_attached():
    module = Validates()
    run = trainer(Penalty(), Probe("module.nothing at all"))
    run.validate(module, Batches(ONE), verbose=False)
    run.test(module, Batches(ONE), verbose=False)
    run.predict(module, Batches(ONE))
    assert len(module.losses) == 2
    assert all(torch.equal(own, expected) for own, expected in module.losses)
    assert "training_step" not in vars(module)


def test_a_batch_that_another_callback_rewrites_late():
    class Rewrites(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batch["x"] = batch["x"] + 1

    class Dicts(Plain):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch["x"]), batch["y"])

    x, y = ONE[0]
    probe = Probe("batch.x", "module@input")
    fit(Dicts(), probe, Rewrites(), batches=[{"x": x, "y": y}])
    assert torch.equal(probe.seen[0][0], x + 1)
    assert probe.seen[0][1] is probe.seen[0][0]


# --- modules that are made late --------------------------------------------------------------------


class Configures(Plain):
    def __init__(self):
        super().__init__()
        self.net, self.made = None, Plain().net

    def configure_model(self):
        if self.net is None:
            self.net = copy.deepcopy(self.made)


class SetsUp(Configures):
    """Makes its network in `setup`, which Lightning calls after that of the callbacks."""

    configure_model = Plain.configure_model

    def setup(self, stage):
        if self.net is None:
            self.net = copy.deepcopy(self.made)


class SetsUpAnew(Plain):
    """Makes its network again in `setup`, for instance when the number of classes is known."""

    def setup(self, stage):
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))


@pytest.mark.parametrize("cls", [Configures, SetsUp, SetsUpAnew])
def test_submodules_made_after_the_callbacks_setup(cls):
    probe = Probe("module", "module.net.0", "module.net.2", "module.net.2.weight")
    module = cls()
    fit(module, probe)
    logits, hidden, last, weight = probe.seen[0]
    assert logits is last
    assert hidden.shape == (6, 8)
    assert weight is module.net[2].weight


@pytest.mark.parametrize("cls", [Configures, SetsUp])
def test_their_wrong_addresses_fail_before_the_first_step(cls):
    module = cls()
    with pytest.raises(AddressError, match=r"'module.net' \(Sequential\) has no .*'3'; it has '0', '1', '2'"):
        fit(module, Penalty(), Probe("module.net.3"))
    assert "training_step" not in vars(module)
    fit(module, Penalty(), Probe("module.net.2"))

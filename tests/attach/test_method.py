"""A method through the life of a run: setup, training, validation, logging, errors, copies, and other callbacks."""

import contextlib
import copy
import csv
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from plain import (
    CLASSES,
    Batches,
    Penalty,
    Plain,
    Probe,
    fit,
    fitted_trace,
    pairs,
    penalty,
    same,
    trace,
    trainer,
    weights,
)
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EMAWeightAveraging, LearningRateFinder, WeightAveraging
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.tuner import Tuner
from torch import nn

from lightning_methods.attach import AddressError, Method, Ramp, Teacher, address, computed

ONE = pairs(1)


class ByHand(Plain):
    """What `Plain` with `Penalty()` should do, written into the step."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + penalty(self)


def assert_close(module, expected):
    torch.testing.assert_close(weights(module), weights(expected))


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
    fit(module)
    fit(reference := Plain())
    count = len(probe.seen)
    module.load_state_dict(Plain().state_dict())
    fit(module)
    assert same(module, reference)
    assert len(probe.seen) == count


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


# --- logging ---------------------------------------------------------------------------------------


class TwoTerms(Method):
    def __init__(self, name="two", **arguments):
        super().__init__(name=name, weights={"b": 0.5}, **arguments)

    def losses(self, step):
        term = penalty(step.module)
        return {"a": term, "b": term * 2}


def rows(folder, module, *methods, **arguments):
    """What the CSV logger wrote, without empty cells."""
    logger = CSVLogger(folder, name="", version="")
    fit(module, *methods, logger=logger, **arguments)
    path = folder / "metrics.csv"
    with path.open() if path.exists() else contextlib.nullcontext([]) as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def named(row, prefix="two"):
    return {key: value for key, value in row.items() if key.startswith(f"{prefix}/")}


def test_raw_terms_their_weighted_sum_and_the_ramp_are_logged(tmp_path):
    module = Plain()
    value = penalty(module).item()
    found = rows(tmp_path, module, TwoTerms(ramp=Ramp(4)), batches=ONE)
    assert len(found) == 1
    expected = {"two/a": value, "two/b": 2 * value, "two/loss": 0.25 * (value + 0.5 * 2 * value), "two/ramp": 0.25}
    assert named(found[0]) == pytest.approx(expected)


def test_a_silent_ramp_logs_a_loss_of_0(tmp_path):
    found = rows(tmp_path, Plain(), TwoTerms(ramp=Ramp(1, start=1)), batches=ONE)
    assert named(found[0])["two/loss"] == 0
    assert named(found[0])["two/a"] > 0


class CountsLogs(Plain):
    def __init__(self):
        super().__init__()
        self.logs = []

    def log_dict(self, values, *args, **kwargs):
        self.logs.append((self.trainer.global_step, list(values)))
        super().log_dict(values, *args, **kwargs)


def test_nothing_is_logged_on_steps_that_the_trainer_does_not_log(tmp_path):
    module = CountsLogs()
    found = rows(tmp_path, module, TwoTerms(), batches=pairs(6), log_every_n_steps=3)
    assert [step for step, _ in module.logs] == [2, 5]
    assert [row["step"] for row in found if named(row)] == [2, 5]
    assert all(set(named(row)) == {"two/a", "two/b", "two/loss"} for row in found if named(row))


def test_log_false_logs_nothing(tmp_path):
    module = CountsLogs()
    found = rows(tmp_path, module, TwoTerms(log=False))
    assert not module.logs
    assert not any(map(named, found))


def test_log_epoch_adds_the_mean_over_steps(tmp_path):
    class Three(Method):
        def losses(self, step):
            return {"x": 0 * penalty(step.module) + step.index}

    # The last batch has other than the others' size: every step counts the same.
    batches = [*pairs(2), tuple(part[:1] for part in pairs(1)[0])]
    found = rows(tmp_path, Plain(), Three(name="two", log="epoch"), batches=batches, log_every_n_steps=2)
    steps = [row["two/x_step"] for row in found if "two/x_step" in row]
    epochs = [(row["two/x_epoch"], row["two/loss_epoch"]) for row in found if "two/x_epoch" in row]
    assert steps == [1.0]
    assert epochs == [(1.0, 1.0)]


def test_one_methods_epoch_values_are_not_the_others_business(tmp_path):
    alone = rows(tmp_path / "a", Plain(), TwoTerms())
    beside = rows(tmp_path / "b", Plain(), TwoTerms(), Penalty(0.0001, log="epoch"))
    assert [sorted(named(row)) for row in alone] == [sorted(named(row)) for row in beside if named(row)]
    assert {"penalty/l2_step", "penalty/l2_epoch"} <= set().union(*beside)


def test_nothing_is_logged_for_a_barebones_trainer():
    module = CountsLogs()
    arguments = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"))
    fit(module, TwoTerms(log="epoch"), barebones=True, log_every_n_steps=None, num_sanity_val_steps=None, **arguments)
    assert not module.logs


# --- warnings --------------------------------------------------------------------------------------


class Idle(Method):
    """Does something in its second epoch only."""

    def __init__(self, kind):
        super().__init__(name="idle")
        self.kind = kind

    @property
    def rewrites(self):
        return self.kind == "rewrite"

    def rewrite(self, step):
        if step.epoch == 1:
            step["batch.0"] = step["batch.0"] * 1

    @property
    def adds_losses(self):
        return self.kind == "losses"

    def losses(self, step):
        return {"x": penalty(step.module)} if step.epoch == 1 else {}


@pytest.mark.parametrize("kind", ["rewrite", "losses"])
def test_a_method_that_did_nothing_in_an_epoch_says_so(kind, recwarn):
    fit(Plain(), Idle(kind), Penalty(), max_epochs=3)
    about = [str(warning.message) for warning in recwarn if "did nothing" in str(warning.message)]
    assert [text.partition("in ")[2] for text in about] == [
        "epoch 0: it neither changed a batch nor gave a term.",
        "epoch 2: it neither changed a batch nor gave a term.",
    ]
    assert all(text.startswith("Idle(") for text in about)


# --- names and copies ------------------------------------------------------------------------------


def test_state_keys_tell_instances_apart_and_do_not_hang_on_settings():
    assert Penalty().state_key == Penalty(0.5).state_key
    assert len({Penalty().state_key, Penalty(name="b").state_key, TwoTerms(name="penalty").state_key}) == 3


class Everything(Method):
    """Has an argument of every kind."""

    def __init__(
        self,
        teacher=None,
        *,
        image="batch.0",
        logits="module",
        pull_weight=1.0,
        push_weight=0.5,
        ramp=None,
        task_weight=1.0,
        log=True,
        name="everything",
    ):
        super().__init__(
            name=name,
            weights={"pull": pull_weight, "push": push_weight},
            ramp=ramp,
            task_weight=task_weight,
            log=log,
        )
        self.teacher = None if teacher is None else Teacher(teacher)
        self.image, self.logits = address(image), address(logits)

    def losses(self, step):
        self.during = repr(self)
        return {"pull": penalty(step.module), "push": penalty(step.module)}


def bias(step):
    return step.module.net[0].bias


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "Everything()"),
        ({"teacher": nn.Linear(4, 3)}, "Everything(teacher=Linear(...))"),
        ({"teacher": "timm:resnet10t"}, "Everything(teacher='timm:resnet10t')"),
        ({"image": "batch.image"}, "Everything(image='batch.image')"),
        ({"image": "batch.0"}, "Everything()"),
        ({"logits": computed(bias, "module.net")}, "Everything(logits=<bias>)"),
        ({"pull_weight": 0.3}, "Everything(pull_weight=0.3)"),
        ({"pull_weight": 1.0, "push_weight": 1.0}, "Everything(push_weight=1.0)"),
        ({"ramp": Ramp(3)}, "Everything(ramp=Ramp(length=3, start=0, unit='epoch'))"),
        ({"task_weight": 0.0, "log": False, "name": "b"}, "Everything(task_weight=0.0, log=False, name='b')"),
        ({"log": "epoch"}, "Everything(log='epoch')"),
    ],
)
def test_repr_reads_like_the_constructor_call_with_what_is_not_default(arguments, text):
    assert repr(Everything(**arguments)) == text


def test_repr_is_the_same_during_a_fit():
    method = Everything(log="epoch", pull_weight=0.3)
    before = repr(method)
    fit(Plain(), method)
    assert method.during == before
    assert repr(method) == before


def test_methods_are_copied_and_pickled_with_their_settings():
    method = Everything(image="batch.image", pull_weight=0.3, ramp=Ramp(3))
    for other in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert repr(other) == repr(method)
        assert other.addresses() == method.addresses()
        assert other.weights == method.weights


@pytest.mark.parametrize("when", ["on_train_start", "on_train_batch_end", "on_fit_end"])
def test_a_copy_made_during_a_fit_leaves_the_module_behind_and_works(when):
    copies = []

    class Copies(Callback):
        pass

    method = TwoTerms()
    setattr(Copies, when, lambda self, *args: copies.append((copy.deepcopy(method), pickle.dumps(method))))
    fit(Plain(), method, Copies(), batches=ONE)
    copied, text = copies[0]
    assert b"plain" not in text.replace(b"plain.Penalty", b""), "the pickle holds the module"
    for other in (copied, pickle.loads(text)):
        attached, reference = Plain(), Plain()
        fit(attached, other)
        fit(reference, TwoTerms())
        assert same(attached, reference)


# --- with the rest of Lightning --------------------------------------------------------------------


@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 0.01}, {"gradient_clip_val": 0.01,
                                                                   "gradient_clip_algorithm": "value"}])  # fmt: skip
def test_accumulation_and_clipping(clip):
    module, by_hand = Plain(), ByHand()
    for one, methods in ((module, [Penalty()]), (by_hand, [])):
        run = fit(one, *methods, batches=pairs(4), accumulate_grad_batches=2, **clip)
        assert run.global_step == 2
    assert_close(module, by_hand)
    assert not same(module, Plain())


@pytest.mark.parametrize("averaging", [functools.partial(EMAWeightAveraging, decay=0.5), WeightAveraging])
@pytest.mark.parametrize("first", [True, False])
def test_weight_averaging_on_either_side(averaging, first):
    module, by_hand = Plain(), ByHand()
    probe = Probe("module", "module.net.0")
    fit(module, *([averaging(), Penalty(), probe] if first else [Penalty(), probe, averaging()]), max_epochs=2)
    fit(by_hand, averaging(), max_epochs=2)
    assert_close(module, by_hand)
    fit(plain := ByHand(), max_epochs=2)
    assert not same(module, plain), "nothing was averaged"
    assert len(probe.seen) == 6


@pytest.mark.filterwarnings("ignore")
def test_the_learning_rate_finder_before_a_fit(tmp_path):
    class HasRate(Plain):
        lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module, method = HasRate(), Penalty()
    before = weights(module)
    run = trainer(method, default_root_dir=tmp_path, max_epochs=2)
    Tuner(run).lr_find(module, Batches(pairs(8)), num_training=5, update_attr=False)
    assert same(weights(module), before)
    assert "training_step" not in vars(module)
    by_hand = ByHand()
    run.fit(module, Batches(pairs()))
    fit(by_hand, max_epochs=2)
    assert_close(module, by_hand)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [True, False])
def test_the_learning_rate_finder_as_a_callback(tmp_path, first):
    module, by_hand, probe = Plain(), ByHand(), Probe("module")
    for one, methods in ((module, [Penalty(), probe]), (by_hand, [])):
        one.lr = 0.1
        finder = LearningRateFinder(num_training_steps=4, update_attr=False)
        fit(
            one,
            *([finder, *methods] if first else [*methods, finder]),
            batches=pairs(5),
            max_epochs=2,
            default_root_dir=tmp_path,
        )
    assert_close(module, by_hand)
    assert len(probe.seen) >= 10


def test_autocast_is_off_for_terms_and_on_for_a_methods_own_forward():
    class Looks(Method):
        def rewrite(self, step):
            seen.append(("rewrite", torch.is_autocast_enabled("cpu")))

        def losses(self, step):
            seen.append(("losses", torch.is_autocast_enabled("cpu")))
            with step.forward_context():
                seen.append(("forward", torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
                own = step.module.net(step.batch[0])
            with step.loss_context():
                seen.append(("again", torch.is_autocast_enabled("cpu")))
            seen.append((step["module"].dtype, own.dtype, (step.batch[0] @ step.batch[0].T).dtype))
            return {"x": own.float().square().mean()}

        def __init__(self):
            super().__init__(name="looks")
            self.asked = address("module")

    seen = []
    bf16, single = torch.bfloat16, torch.float32
    fit(Plain(), Looks(), batches=ONE, precision="bf16-mixed")
    assert seen == [
        ("rewrite", False),
        ("losses", False),
        ("forward", True, bf16),
        ("again", False),
        (bf16, bf16, single),
    ]
    seen.clear()
    fit(Plain(), Looks(), batches=ONE)
    assert seen[2][:2] == ("forward", False)
    assert seen[-1] == (single, single, single)


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_true_precision_reaches_the_terms(precision, dtype):
    probe = Probe("module", "batch.0", lambda step: step.output)
    fit(Plain(), Penalty(), probe, batches=ONE, precision=precision)
    assert [value.dtype for value in probe.seen[0]] == [dtype] * 3

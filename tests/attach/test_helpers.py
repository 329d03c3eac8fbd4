"""Trainable parts of a method: they train with the module, and no checkpoint of the module knows of them."""

import copy
import importlib
import multiprocessing
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from plain import (
    CLASSES,
    Batches,
    Penalty,
    Plain,
    fit,
    fitted_trace,
    pairs,
    same,
    trace,
    trainer,
    weights,
)
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EMAWeightAveraging, LearningRateFinder
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_methods.attach import Method, Ramp, address
from lightning_methods.attach.helpers import CONTAINER, Helpers, join_optimizer, unregister


def head(seed=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(CLASSES, 2)


class Head(Method):
    """Asks a small head on the logits for the sign of the images' sum."""

    def __init__(self, *, name="head", build=head, **arguments):
        super().__init__(name=name, **arguments)
        self.logits, self.images = address("module"), address("batch.0")
        self.build = build

    def helpers(self):
        return {"sign": self.build()}

    def losses(self, step):
        target = (step[self.images].sum(1) > 0).long()
        return {"sign": F.cross_entropy(step.module.get_submodule(f"{CONTAINER}.{self.name}.sign")(step[self.logits]),
                                        target)}  # fmt: skip

    @property
    def sign(self):
        return self._helpers["sign"]


class ByHand(Plain):
    """The same written into the module, the head being its own."""

    def __init__(self):
        super().__init__()
        self.sign = head()

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        return F.cross_entropy(logits, y) + F.cross_entropy(self.sign(logits), (x.sum(1) > 0).long())


def adam(module, parameters):
    return torch.optim.Adam(parameters, lr=0.05)


def one_cycle(module, parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=7)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def lambdas(module, parameters):
    groups = [{"params": [p]} for p in parameters]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    factors = [lambda step: 1.0 for _ in groups[:-1]] + [lambda step: 0.5**step]
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factors), "interval": "step"}]


def listing(base, listed, make):
    """A module whose optimizer is made by `make` over all its parameters, or over those of `net` only."""

    class Lists(base):
        def configure_optimizers(self):
            parameters = list(self.parameters() if listed == "all" else self.net.parameters())
            if listed != "all" and hasattr(self, "sign"):
                parameters += list(self.sign.parameters())
            return make(self, parameters)

    return Lists()


def sign_of(module, method=None):
    return weights(module.sign if method is None else method.sign)


LISTED = ["all", "only those of net"]


# --- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", LISTED)
@pytest.mark.parametrize("make", [adam, one_cycle])
def test_helpers_train_as_if_they_were_the_modules_own(listed, make):
    module, by_hand, method = listing(Plain, listed, make), listing(ByHand, listed, make), Head()
    fit(module, method, max_epochs=2)
    fit(by_hand, max_epochs=2)
    assert not same(sign_of(None, method), weights(head())), "the helper did not train"
    torch.testing.assert_close(sign_of(None, method), sign_of(by_hand))
    torch.testing.assert_close(weights(module), {k: v for k, v in weights(by_hand).items() if "sign" not in k})


def test_helpers_follow_the_schedule_of_the_last_group():
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, *args):
            groups = trainer.optimizers[0].param_groups
            own = {id(p) for p in method.sign.parameters()}
            rates.append([group["lr"] for group in groups if own & {id(p) for p in group["params"]}])

    method = Head()
    run = fit(listing(Plain, "only those of net", lambdas), method, Rates())
    assert rates == [[0.1], [0.05], [0.025]]
    assert len(run.lr_scheduler_configs[0].scheduler.base_lrs) == len(run.optimizers[0].param_groups)


def test_listing_all_parameters_lists_each_helper_once():
    seen = []

    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            listed = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
            seen.append((len(listed), len(set(listed)), len(list(pl_module.parameters()))))

    for listed in LISTED:
        fit(listing(Plain, listed, adam), Head(), Head(name="second"), Looks())
    assert seen == [(8, 8, 8)] * 2


def test_frozen_helpers_are_not_optimised():
    module, method = listing(Plain, "only those of net", adam), Head(build=lambda: head().requires_grad_(False))
    run = fit(module, method)
    assert sum(len(group["params"]) for group in run.optimizers[0].param_groups) == 4
    assert same(sign_of(None, method), weights(head()))


def test_initial_weights_do_not_shift_the_random_numbers_of_training():
    class Noisy(Plain):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, self.training)

    class Silent(Head):
        def losses(self, step):
            return {}

    plain, attached = Noisy(), Noisy()
    fit(plain)
    fit(attached, Silent(build=lambda: nn.Linear(CLASSES, 2)))
    assert same(plain, attached)


def test_weight_0_brings_no_helpers():
    seen = []

    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(len(list(pl_module.parameters())))

    plain, attached = Plain(), Plain()
    fit(plain)
    with pytest.warns(UserWarning, match="all its weights are 0"):
        fit(attached, Head(weights={"sign": 0.0}), Looks(), gradient_clip_val=1e6)
    assert seen == [4], "parameters without a gradient stop DDP"
    assert same(plain, attached)


# --- no trace --------------------------------------------------------------------------------------


def test_nothing_is_left_on_the_module_and_a_second_fit_goes_on():
    module, method, by_hand = Plain(), Head(), ByHand()
    before = fitted_trace(module)
    fit(module, method)
    assert trace(module) == before
    fit(module, method)
    for _ in range(2):
        fit(by_hand)
    torch.testing.assert_close(sign_of(None, method), sign_of(by_hand))


def test_an_exception_leaves_no_container():
    class Fails(Head):
        def losses(self, step):
            raise RuntimeError("on purpose")

    module = Plain()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, Head(), Fails(name="fails"))
    assert CONTAINER not in module._modules
    fit(module, Head())


def test_one_method_leaving_keeps_the_helpers_of_the_other():
    module = Plain()
    container = Helpers({"a": nn.ModuleDict({"x": head()}), "b": nn.ModuleDict({"x": head()})})
    module.add_module(CONTAINER, container)
    unregister(module, "a")
    assert list(module._modules[CONTAINER]) == ["b"]
    unregister(module, "a")
    unregister(module, "b")
    assert CONTAINER not in module._modules


# --- checkpoints -----------------------------------------------------------------------------------


class Saves(Callback):
    """Writes a checkpoint after some steps."""

    def __init__(self, path, at=1):
        self.path, self.at = path, at

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


@pytest.fixture
def written(tmp_path):
    """A checkpoint of a fit with helpers, and the module as it was then."""
    path, module = tmp_path / "with.ckpt", Plain()
    fit(module, Head(), Penalty(), Saves(path, at=3))
    return path, module


def test_the_checkpoint_loads_strictly_into_the_plain_module(written):
    path, module = written
    content = torch.load(path, weights_only=True)
    assert set(content["state_dict"]) == set(Plain().state_dict())
    assert same(Plain.load_from_checkpoint(path), module)
    other = Plain()
    other.load_state_dict(content["state_dict"], strict=True)
    assert same(other, module)


def test_the_checkpoint_loads_where_this_package_is_not_installed(written):
    path, module = written

    def load():
        for name in [name for name in sys.modules if name.partition(".")[0] == "lightning_methods"]:
            sys.modules[name] = None  # any import of it fails
        with pytest.raises(ImportError):
            importlib.import_module("lightning_methods")
        for weights_only in (True, False):
            assert same(Plain.load_from_checkpoint(path, weights_only=weights_only), module)

    process = multiprocessing.get_context("fork").Process(target=load)
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("listed", LISTED)
@pytest.mark.parametrize("make", [adam, one_cycle])
@pytest.mark.parametrize("at", [1, 3, 4])
def test_resuming_is_exact_helpers_and_optimizer_state_included(tmp_path, listed, make, at):
    class Where:
        """Tells Lightning its place in the epoch."""

        def __init__(self):
            self.place, self.batches = 0, pairs()

        def __len__(self):
            return 3

        def __iter__(self):
            self.place %= 3
            while self.place < 3:
                self.place += 1
                yield self.batches[self.place - 1]

        def state_dict(self):
            return {"place": self.place}

        def load_state_dict(self, state):
            self.place = state["place"]

    path = tmp_path / "some.ckpt"
    whole, method = listing(Plain, listed, make), Head()
    trainer(method, Saves(path, at), max_epochs=2).fit(whole, Where())
    resumed, again = listing(Plain, listed, make), Head(build=lambda: head(seed=99))
    run = trainer(again, max_epochs=2)
    run.fit(resumed, Where(), ckpt_path=path)
    assert run.global_step == 6
    assert same(resumed, whole)
    assert same(sign_of(None, again), sign_of(None, method))


def test_a_plain_checkpoint_starts_a_run_with_helpers(tmp_path):
    path, module = tmp_path / "plain.ckpt", Plain()
    fit(module, Saves(path, at=3))

    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            self.found = weights(pl_module), sign_of(None, method), sorted(pl_module.state_dict())
            pl_module.load_state_dict(torch.load(path)["state_dict"], strict=True)
            self.after = sign_of(None, method)

    method, looks, other = Head(), Looks(), Plain()
    other.load_state_dict(torch.load(path)["state_dict"])
    fit(other, method, looks)
    assert same(looks.found[0], module)
    assert same(looks.found[1], weights(head()))
    assert same(looks.after, weights(head())), "loading the module's weights must leave the helpers alone"
    assert looks.found[2] == sorted(module.state_dict())


def test_a_strict_load_still_finds_the_modules_own_missing_and_surplus_keys():
    problems = []

    class Loads(Callback):
        def on_train_start(self, trainer, pl_module):
            state = pl_module.state_dict()
            surplus = {**state, "net.9.weight": torch.ones(1), f"{CONTAINER}.stray": torch.ones(1)}
            missing = {name: value for name, value in state.items() if name != "net.0.bias"}
            for wrong in (surplus, missing):
                result = pl_module.load_state_dict(wrong, strict=False)
                problems.append((result.missing_keys, [key for key in result.unexpected_keys if CONTAINER not in key]))
                with pytest.raises(RuntimeError, match=r"net\.9\.weight|net\.0\.bias"):
                    pl_module.load_state_dict(wrong, strict=True)

    fit(Plain(), Head(), Loads())
    assert problems == [([], ["net.9.weight"]), (["net.0.bias"], [])]


def test_a_prefix_before_the_module_changes_nothing():
    """Averages and wrappers ask with a prefix."""
    found = []

    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            wrapper = nn.ModuleDict({"inner": pl_module})
            found.append(sorted(wrapper.state_dict()))
            found.append(sorted(pl_module.state_dict(prefix="a.", keep_vars=True)))
            wrapper.load_state_dict(wrapper.state_dict(), strict=True)

    fit(Plain(), Head(), Looks())
    own = sorted(Plain().state_dict())
    assert found == [[f"inner.{name}" for name in own], [f"a.{name}" for name in own]]


# --- with other callbacks --------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_weight_averaging_averages_helpers_and_writes_plain_checkpoints(tmp_path, first):
    path, module, by_hand, method = tmp_path / "a.ckpt", Plain(), ByHand(), Head()

    def averaging():
        return EMAWeightAveraging(decay=0.5)

    callbacks = [averaging(), method] if first else [method, averaging()]
    fit(module, *callbacks, Saves(path, at=2), max_epochs=2)
    fit(by_hand, averaging(), max_epochs=2)
    torch.testing.assert_close(weights(module), {k: v for k, v in weights(by_hand).items() if "sign" not in k})
    torch.testing.assert_close(sign_of(None, method), sign_of(by_hand))
    assert set(torch.load(path)["state_dict"]) == set(Plain().state_dict())
    resumed, again = Plain(), Head(build=lambda: head(seed=9))
    callbacks = [averaging(), again] if first else [again, averaging()]
    fit(resumed, *callbacks, max_epochs=2, ckpt_path=path)


def test_averages_of_other_modules_are_left_alone():
    class Averages(Callback):
        def __init__(self):
            self.average = AveragedModel(nn.Linear(2, 2))

    other = Averages()
    fit(Plain(), other, Head())
    assert CONTAINER not in other.average.module._modules


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("listed", LISTED)
@pytest.mark.parametrize("first", [True, False])
def test_the_learning_rate_finder_gives_helpers_back_as_they_were(tmp_path, listed, first):
    seen = []

    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(sign_of(None, method))

    finder, method = LearningRateFinder(num_training_steps=4, update_attr=False), Head()
    module = listing(Plain, listed, adam)
    module.lr = 0.1
    callbacks = [finder, method] if first else [method, finder]
    fit(module, *callbacks, Looks(), batches=pairs(5), default_root_dir=tmp_path)
    assert same(seen[-1], weights(head()))


def test_a_copy_of_the_module_in_mid_fit_has_helpers_of_its_own():
    copies = []

    class Copies(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            copies.append(copy.deepcopy(pl_module))

    method = Head()
    fit(Plain(), method, Copies(), batches=pairs(1))
    assert set(copies[0].state_dict()) == set(Plain().state_dict())
    own = copies[0]._modules[CONTAINER]["head"]["sign"].weight
    assert own is not method.sign.weight
    copies[0].load_state_dict(Plain().state_dict(), strict=True)


class Halves(Batches):
    """Each of two processes gets its half of every batch."""

    def __iter__(self):
        rank = torch.distributed.get_rank()
        yield from (tuple(part.chunk(2)[rank] for part in batch) for batch in self.batches)


@pytest.mark.parametrize("arguments", [{}, {"ramp": Ramp(1, start=1)}, {"weights": {"sign": 0.0}}], ids=str)
def test_two_processes_on_half_batches_do_what_one_does_on_whole_ones(tmp_path, arguments):
    """DDP averages the head's gradients too."""
    module, alone, path = Plain(), Plain(), tmp_path / "ddp.ckpt"
    method, reference = Head(**arguments), Head(**arguments)
    distributed = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    run = trainer(method, Saves(path, at=6), max_epochs=2, **distributed)
    run.fit(module, Halves(pairs()))
    fit(alone, reference, max_epochs=2)
    torch.testing.assert_close(weights(module), weights(alone))
    saved = torch.load(path)["callbacks"][method.state_key]["helpers"]
    torch.testing.assert_close(saved, reference.state_dict()["helpers"])


# --- optimizers ------------------------------------------------------------------------------------


def test_without_exactly_one_optimizer_it_is_not_clear_which_trains_the_helpers():
    module = Plain()
    module.add_module(CONTAINER, Helpers({"head": nn.ModuleDict({"sign": head()})}))
    optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in module.net.parameters()]
    with pytest.raises(Exception, match=r"helpers of head are in none of the 4 optimizers.*self\.parameters\(\)"):
        join_optimizer(SimpleNamespace(optimizers=optimizers), module)
    optimizers[1].add_param_group({"params": list(module._modules[CONTAINER].parameters())})
    join_optimizer(SimpleNamespace(optimizers=optimizers), module)  # all are listed: nothing to choose
    assert [len(optimizer.param_groups) for optimizer in optimizers] == [1, 2, 1, 1]


@pytest.mark.filterwarnings("ignore")  # Lightning's, on the missing optimizer
@pytest.mark.parametrize(("made", "message"), [(0, "in none of the 0 optimizers"), (2, "multiple optimizers")])
def test_another_number_of_optimizers_is_refused_and_leaves_no_trace(made, message):
    class Makes(Plain):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.net.parameters(), lr=0.1) for _ in range(made)] or None

    module = Makes()
    with pytest.raises(Exception, match=message):
        fit(module, Head())
    assert "training_step" not in vars(module)
    assert CONTAINER not in module._modules

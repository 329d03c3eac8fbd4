"""Methods beside the rest of Lightning: names, copies, accumulation, averaging, the learning-rate finder, precision."""

import copy
import functools
import pickle

import pytest
import torch
from plain import (
    ONE,
    Batches,
    ByHand,
    Penalty,
    Plain,
    Probe,
    assert_close,
    fit,
    pairs,
    penalty,
    same,
    trainer,
    weights,
)
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EMAWeightAveraging, LearningRateFinder, WeightAveraging
from pytorch_lightning.tuner import Tuner
from torch import nn

from lightning_methods.attach import Method, Ramp, Teacher, address, computed

# --- names and copies ------------------------------------------------------------------------------


def test_state_keys_tell_instances_apart_and_do_not_hang_on_settings():
    assert Penalty().state_key == Penalty(0.5).state_key
    assert len({Penalty().state_key, Penalty(name="b").state_key, Everything(name="penalty").state_key}) == 3


class Everything(Method):
    """Has an argument of every kind."""

    def __init__(
        self,
        teacher=None,
        *,
        image="batch.0",
        logits="module",
        pull_weight=1.0,
        weight_push=0.5,
        ramp=None,
        task_weight=1.0,
        centres=None,
        log=True,
        name="everything",
    ):
        super().__init__(
            name=name,
            weights={"pull": pull_weight, "push": weight_push},
            ramp=ramp,
            task_weight=task_weight,
            log=log,
        )
        self.teacher = None if teacher is None else Teacher(teacher)
        self.image, self.logits = address(image), address(logits)
        self.centres = centres

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
        ({"pull_weight": 1.0, "weight_push": 1.0}, "Everything(weight_push=1.0)"),
        ({"ramp": Ramp(3)}, "Everything(ramp=Ramp(length=3, start=0, unit='epoch'))"),
        ({"task_weight": 0.0, "log": False, "name": "b"}, "Everything(task_weight=0.0, log=False, name='b')"),
        ({"log": "epoch"}, "Everything(log='epoch')"),
        ({"centres": torch.ones(2, 3)}, "Everything(centres=Tensor(2, 3))"),
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

    method = Penalty(0.3)
    setattr(Copies, when, lambda self, *args: copies.append((copy.deepcopy(method), pickle.dumps(method))))
    fit(Plain(), method, Copies(), batches=ONE)
    copied, text = copies[0]
    assert b"training_step" not in text
    assert b"Linear" not in text, "the pickle holds the module"
    for other in (copied, pickle.loads(text)):
        attached, reference = Plain(), Plain()
        fit(attached, other)
        fit(reference, Penalty(0.3))
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

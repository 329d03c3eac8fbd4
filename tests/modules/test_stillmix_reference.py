"""`SingleFrameClassifier` trains by the authors' recipe, in either Lightning."""

import pytest
import torch
import torch.nn.functional as F
from plain import fit
from torch import nn

from lightning_methods.modules import SingleFrameClassifier


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))


BATCHES = [
    (torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(seed)), torch.arange(6) % 4, list("abcdef"))
    for seed in range(2)
]


def test_training_by_hand():
    model = SingleFrameClassifier(network(), lr=0.5, weight_decay=0.1, milestones=(1, 2))
    run = fit(model, batches=BATCHES, max_epochs=3)
    assert "train_loss" in run.callback_metrics
    hand = network()
    for epoch in range(3):
        for frames, targets, _ in BATCHES:
            grads = torch.autograd.grad(F.cross_entropy(hand(frames), targets), list(hand.parameters()))
            with torch.no_grad():
                for value, grad in zip(hand.parameters(), grads, strict=True):
                    value -= 0.5 * 0.1**epoch * (grad + 0.1 * value)
    for found, expected in zip(model.model.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_defaults_are_the_published_recipe():
    (optimizer,), (schedule,) = SingleFrameClassifier(network()).configure_optimizers()
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.04, 1e-5, 0)
    assert sorted(schedule.milestones) == [20, 40]
    assert schedule.gamma == 0.1


def test_a_network_of_timm():
    model = SingleFrameClassifier("test_resnet", 5, pretrained=False)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("arguments", "message"), [(("test_resnet",), "`num_classes` is missing"), ((network(), None), "`lr`")]
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        SingleFrameClassifier(*arguments, lr=0.04 if "num" in message else 0.0)


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_it_is_a_module_of_the_lightning_in_use(fresh, package):
    fresh[package](f"""
import sys
import {package} as used
import lightning_methods.modules
assert not {{"timm", "kornia", "lightning_methods.attach"}} & set(sys.modules)
from lightning_methods.modules import SingleFrameClassifier
assert issubclass(SingleFrameClassifier, used.LightningModule)
assert len({{"pytorch_lightning", "lightning.pytorch"}} & set(sys.modules)) == 1
""")


def test_other_names_are_an_error():
    from lightning_methods import modules

    with pytest.raises(AttributeError, match="no attribute 'SingleFrameNet'; it has ACFCaptioner"):
        modules.SingleFrameNet  # noqa: B018

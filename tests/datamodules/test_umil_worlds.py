"""The world of biased bags: every kind of snippet as documented."""

import pytest
import torch
from torch import Tensor

from lightning_methods.datamodules import SyntheticBiasedBagsDataModule
from lightning_methods.datamodules.umil_worlds import KINDS


@pytest.fixture(scope="module")
def world() -> SyntheticBiasedBagsDataModule:
    return SyntheticBiasedBagsDataModule(noise=0.0, world_seed=3)


def signal(world: SyntheticBiasedBagsDataModule, features: Tensor) -> tuple[Tensor, Tensor]:
    """Cue and context of snippets."""
    axes = world.axes()
    torch.testing.assert_close(axes @ axes.T, torch.eye(2))
    cue, context = (features @ axes.T / 2).unbind(-1)
    return cue, context


def test_bags_hold_what_they_should(world):
    for split, bags in (("train", 160), ("val", 200), ("test", 200)):
        features, label, vid = world.splits[split][:3]
        assert features.shape == (bags, 16, 32)
        assert label.sum() == bags / 2
        assert vid.tolist() == list(range(bags))
    _, label, _, abnormal, kind = world.splits["test"]
    assert not kind[label == 0].any()
    assert not abnormal[label == 0].any()
    counts = torch.stack([(kind[label == 1] == number).sum(1) for number in range(4)], 1)
    assert counts.unique(dim=0).tolist() == [[4, 2, 5, 5]]
    assert abnormal[label == 1].sum(1).unique().tolist() == [7]
    first = kind[label == 1].argmax(1)  # where the bag's first context-only snippet stands
    assert len(first.unique()) > 5, "snippets of a bag come in random order"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_cue_and_context_are_distributed_as_documented(world, kind):
    features, _, _, abnormal, kinds = world.splits["test"]
    of_kind = kinds == KINDS.index(kind)
    cue, context = (values[of_kind] for values in signal(world, features))
    assert abnormal[of_kind].unique().tolist() == [int(kind.abnormal)]
    strength = cue if kind.abnormal else -cue
    if kind.strength is None:
        assert -0.1 <= strength.min() < -0.05
        assert 0.85 < strength.max() <= 0.9 + 1e-5
        assert strength.mean() == pytest.approx(0.4, abs=0.06)
    else:
        assert strength.mean() == pytest.approx(kind.strength[0], abs=0.02)
        assert strength.std() == pytest.approx(kind.strength[1], rel=0.15)
    assert context.mean() == pytest.approx(kind.context[0], abs=0.04)
    assert context.std() == pytest.approx(kind.context[1], rel=0.15)


def test_noise_is_in_every_dimension_and_nothing_else_beside_the_two_axes(world):
    noisy = SyntheticBiasedBagsDataModule(noise=0.15, world_seed=3).splits["test"][0]
    clean = world.splits["test"][0]
    axes = world.axes()
    assert (clean - clean @ axes.T @ axes).abs().max() < 1e-5
    torch.testing.assert_close((noisy - clean).std(dim=(0, 1)), torch.full((32,), 0.15), atol=0.02, rtol=0)


def test_worlds_and_orders_have_their_own_seeds():
    one, again, other, order = (
        SyntheticBiasedBagsDataModule(seed=seed, world_seed=world) for seed, world in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    state = torch.manual_seed(5).get_state()
    assert torch.equal(one.splits["test"][0], again.splits["test"][0])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one.splits["test"][0], other.splits["test"][0])
    assert torch.equal(one.splits["train"][0], order.splits["train"][0])
    first, second = (next(iter(data.train_dataloader()))["vid"] for data in (one, order))
    assert not torch.equal(first, second)


def test_batches_are_named_and_training_does_not_see_the_truth(world):
    (train, *_), (test, *_) = list(world.train_dataloader()), list(world.test_dataloader())
    assert list(train) == ["features", "label", "vid"]
    assert list(test) == ["features", "label", "vid", "snippet_label", "kind"]
    assert torch.equal(train["label"], world.splits["train"][1][train["vid"]])
    assert world.kinds == ("plain", "obvious anomaly", "subtle anomaly", "context only")


@pytest.mark.parametrize(("arguments", "message"), [({"noise": -0.1}, "noise"), ({"batch_size": 0}, "batch_size")])
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        SyntheticBiasedBagsDataModule(**arguments)

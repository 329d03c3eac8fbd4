import math

import pytest
import torch

from lightning_methods.datamodules import BiasedContextsDataModule, CaptionedContextsDataModule


def centres(x, label):
    return torch.stack([x[label == k].mean(0) for k in range(6)])


def test_pretraining_has_objects_and_contexts_apart():
    x, objects, contexts = CaptionedContextsDataModule().splits["train"]
    assert x.shape == (6000, 32)
    table = torch.zeros(6, 6).index_put_((objects, contexts), torch.ones(6000), accumulate=True)
    # 36 cells of 167 samples each: independent draws stay within four standard deviations
    assert ((table - 6000 / 36).abs() < 4 * math.sqrt(6000 / 36)).all()


def test_prototypes_have_their_norms_and_the_noise_its_size():
    x, objects, contexts = CaptionedContextsDataModule(world_seed=3).splits["train"]
    one_hot = torch.cat([torch.nn.functional.one_hot(label, 6).float() for label in (objects, contexts)], 1)
    solution = torch.linalg.lstsq(one_hot, x).solution  # prototypes, up to a common shift of objects and contexts
    residual = x - one_hot @ solution
    assert abs(residual.std().item() - 0.7) < 0.01
    for rows, norm in ((solution[:6], 2.0), (solution[6:], 3.2)):
        # centred: the mean of the squared norms is norm² less that of their mean
        assert rows.sub(rows.mean(0)).norm(dim=1).square().mean() < norm**2 + 0.1
        assert rows.sub(rows.mean(0)).norm(dim=1).square().mean() > 0.6 * norm**2
    # objects and contexts live in orthogonal halves
    first, second = (part - part.mean(0) for part in (solution[:6], solution[6:]))
    assert (first @ second.T).abs().max() < 0.5


@pytest.mark.parametrize("bias", [0.95, 0.5])
def test_context_follows_the_class_in_group_0_only(bias):
    data = BiasedContextsDataModule(train_size=3000, bias=bias, world_seed=1)
    words = CaptionedContextsDataModule(world_seed=1)
    x, _, contexts = words.splits["train"]
    prototypes = centres(x, contexts)
    for split, groups in (("train", [0]), ("test", [0, 1]), ("val", [0, 1])):
        x, target, group = data.splits[split]
        nearest = torch.cdist(x, prototypes).argmin(1)
        for number in groups:
            chosen = group == number
            share = (nearest == target)[chosen].float().mean().item()
            expected = bias + (1 - bias) / 6 if number == 0 else 1 / 6
            assert abs(share - expected) < 0.06  # the nearest prototype is sometimes wrong


def test_sizes_and_groups():
    data = BiasedContextsDataModule(train_size=50)
    assert {split: len(tensors[0]) for split, tensors in data.splits.items()} == {
        "train": 50,
        "val": 5000,
        "test": 10000,
    }
    assert data.splits["val"][2].bincount().tolist() == [2000, 3000]
    assert data.splits["test"][2].bincount().tolist() == [4000, 6000]
    assert not data.splits["train"][2].any()


def test_the_world_depends_on_its_seed_alone():
    def first(**settings):
        return BiasedContextsDataModule(**settings).splits["test"][0]

    state = torch.get_rng_state()
    assert torch.equal(first(world_seed=4, seed=1), first(world_seed=4, seed=2, train_size=7, wrong_words=False))
    assert not torch.equal(first(world_seed=4), first(world_seed=5))
    assert torch.equal(torch.get_rng_state(), state)
    orders = [next(iter(BiasedContextsDataModule(seed=seed).train_dataloader()))[1] for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_both_parts_are_of_one_world_and_share_no_sample():
    caption, biased = CaptionedContextsDataModule(world_seed=2), BiasedContextsDataModule(world_seed=2, bias=0.0)
    x, objects, _ = caption.splits["train"]
    y, target, _ = biased.splits["test"]
    assert (centres(x, objects) - centres(y, target)).norm(dim=1).max() < 0.5
    other, number, _ = BiasedContextsDataModule(world_seed=6, bias=0.0).splits["test"]
    assert (centres(x, objects) - centres(other, number)).norm(dim=1).max() > 1
    assert torch.cdist(x[:500], y[:500]).min() > 0.1


def test_two_classes_are_badly_named():
    assert BiasedContextsDataModule().words == (1, 0, 2, 3, 4, 5)
    assert BiasedContextsDataModule(wrong_words=False).words == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_size": 0}, "train_size must be at least 1, got 0"),
        ({"bias": 1.1}, r"bias must lie in \[0, 1\], got 1.1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_refuses_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        BiasedContextsDataModule(**settings)

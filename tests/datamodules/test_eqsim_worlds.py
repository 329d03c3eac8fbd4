from types import SimpleNamespace

import pytest
import torch

from lightning_methods.datamodules import MinimalChangeDataModule

PRIOR = torch.tensor([0.70, 0.15, 0.10, 0.05])


def modality(draw):
    """Scene codes, attribute codes, M and N, in the order in which they are drawn."""
    shapes = [(40, 16), (4, 16), (32, 64), (64, 64)]
    scenes, attributes, mix, bend = (torch.randn(*shape, generator=draw) for shape in shapes)
    return scenes, attributes * 0.3, mix / 16**0.5, bend / 8


def seen(of, scene, attribute, nuisance):
    scenes, attributes, mix, bend = of
    z = torch.cat([scenes[scene] + attributes[attribute], 0.6 * nuisance]) @ mix
    return z + z.tanh() @ bend


def test_samples_follow_the_formula():
    """The documented world, sample by sample, in the order in which its numbers are drawn."""
    draw = torch.Generator().manual_seed(11)
    image_of, text_of = modality(draw), modality(draw)
    splits = MinimalChangeDataModule(train_size=5, world_seed=11).splits

    scene = torch.randint(40, (2000,), generator=draw)
    first = torch.randint(4, (2000,), generator=draw)
    other = (first + torch.randint(1, 4, (2000,), generator=draw)) % 4
    noises = [torch.randn(2000, 16, generator=draw) for _ in range(2)]
    for found, of, noise in zip(splits["val"], (image_of, text_of), noises, strict=True):
        for n in (0, 7, 1999):
            for place, attribute in enumerate((first[n], other[n])):
                torch.testing.assert_close(found[n, place], seen(of, scene[n], attribute, noise[n]))
    counts = (first * 4 + other).bincount(minlength=16).view(4, 4)
    assert counts.diagonal().sum() == 0
    assert (counts - 2000 / 12 * (1 - torch.eye(4))).abs().max() < 60  # uniform over unequal pairs

    scene = torch.randint(40, (500,), generator=draw)
    attribute = torch.multinomial(PRIOR, 500, replacement=True, generator=draw)
    noises = [torch.randn(500, 16, generator=draw) for _ in range(2)]
    for found, of, noise in zip(splits["val_pairs"], (image_of, text_of), noises, strict=False):
        for n in (0, 8, 499):
            torch.testing.assert_close(found[n], seen(of, scene[n], attribute[n], noise[n]))


def test_splits_and_seeds():
    state = torch.manual_seed(6).get_state()
    small, large = MinimalChangeDataModule(10).splits, MinimalChangeDataModule(3000).splits
    again, other = MinimalChangeDataModule(10, seed=1).splits, MinimalChangeDataModule(10, world_seed=1).splits
    assert torch.equal(torch.get_rng_state(), state)
    sizes = {"train": 10, "val": 2000, "val_pairs": 500, "test": 2000, "test_pairs": 500}
    assert {name: len(tensors[0]) for name, tensors in small.items()} == sizes
    assert len(large["train"][0]) == 3000
    for name in ("val", "val_pairs", "test", "test_pairs"):
        assert all(torch.equal(*pair) for pair in zip(small[name], large[name], strict=True))
        assert not torch.equal(small[name][0], other[name][0])
    assert torch.equal(small["train"][0], again["train"][0])
    rows = torch.cat([tensors[0].reshape(-1, 64) for tensors in large.values()])
    assert len(rows.unique(dim=0)) == len(rows)
    assert small["test_pairs"][2].tolist() == list(range(500))


def test_loaders():
    world = MinimalChangeDataModule(train_size=100, batch_size=32, seed=4)
    (image, text), *_ = world.train_dataloader()
    assert image.shape == text.shape == (32, 64)
    assert not torch.equal(image, world.splits["train"][0][:32])
    for loaders, split in ((world.val_dataloader(), "val"), (world.test_dataloader(), "test")):
        quads, pairs = loaders
        images, texts = next(iter(quads))
        assert images.shape == texts.shape == (32, 2, 64)
        assert torch.equal(images, world.splits[split][0][:32])
        assert torch.equal(next(iter(pairs))[2], torch.arange(32))
    world.trainer = SimpleNamespace(global_rank=1, world_size=2)
    assert [len(loader) for loader in world.test_dataloader()] == [32, 8]


@pytest.mark.parametrize("settings", [{"train_size": 0}, {"batch_size": 0}])
def test_refuses_sizes_below_1(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be at least 1, got 0"):
        MinimalChangeDataModule(**settings)

import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_methods.datamodules import DigitsDataModule, SuperclassDataModule
from lightning_methods.datamodules._tensors import TensorLoader, rank_within_class


def ten(**kwargs):
    """Ten samples whose second tensor is a function of the first."""
    number = torch.arange(10)
    return TensorLoader(number, 100 - number, **{"batch_size": 4, "shuffle": True, **kwargs})


def passes(loader, count):
    return [[number.tolist() for number, _ in loader] for _ in range(count)]


# --- the loader -----------------------------------------------------------------------------------


def test_a_pass_holds_every_sample_once_and_keeps_rows_together():
    batches = list(ten())
    assert [len(number) for number, _ in batches] == [4, 4, 2]
    number, other = (torch.cat(column) for column in zip(*batches, strict=True))
    assert sorted(number.tolist()) == list(range(10))
    torch.testing.assert_close(other, 100 - number)


def test_without_shuffling_the_order_is_that_of_the_tensors():
    assert passes(ten(shuffle=False), 2) == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]] * 2


def test_orders_depend_on_seed_and_pass_and_on_nothing_else():
    torch.manual_seed(1)
    first = passes(ten(seed=3), 3)
    before = torch.manual_seed(2).get_state()
    assert passes(ten(seed=3), 3) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert len({str(order) for order in first}) == 3


def test_neighbouring_seeds_share_no_order():
    orders = [str(order) for seed in range(4) for order in passes(ten(seed=seed), 4)]
    assert len(set(orders)) == len(orders)


@settings(max_examples=50, deadline=None)
@given(
    samples=st.integers(1, 12),
    batch_size=st.integers(1, 5),
    taken=st.integers(0, 20),
    shuffle=st.booleans(),
)
def test_a_loader_restored_anywhere_goes_on_as_the_unbroken_one(samples, batch_size, taken, shuffle):
    def endless(loader):
        while True:
            yield from (number.tolist() for (number,) in loader)

    def build():
        return TensorLoader(torch.arange(samples), batch_size=batch_size, shuffle=shuffle, seed=5)

    unbroken = build()
    stream = endless(unbroken)
    for _ in range(taken):
        next(stream)
    restored = build()
    restored.load_state_dict(unbroken.state_dict())
    assert len(restored) == len(unbroken)
    continued = endless(restored)
    assert [next(continued) for _ in range(20)] == [next(stream) for _ in range(20)]


def restored_after(batches):
    loader = ten()
    for _, _ in zip(range(batches), loader, strict=False):
        pass
    restored = ten()
    restored.load_state_dict(loader.state_dict())
    return restored


def test_a_loader_restored_at_the_end_of_a_pass_begins_the_next_one():
    assert passes(restored_after(3), 1) == passes(ten(), 2)[1:]


def test_a_restored_pass_that_is_abandoned_is_not_taken_up_again():
    loader = restored_after(1)
    next(iter(loader))
    assert passes(loader, 1) == passes(ten(), 2)[1:]


def test_an_iterator_nobody_reads_uses_up_no_pass():
    loader = ten()
    iter(loader)
    iter(loader)
    assert passes(loader, 2) == passes(ten(), 2)


def test_an_abandoned_pass_is_followed_by_the_next_one():
    loader = ten()
    next(iter(loader))
    assert passes(loader, 1) == passes(ten(), 2)[1:]


def test_set_epoch_chooses_the_pass():
    loader = ten()
    next(iter(loader))
    loader.batch_sampler.sampler.set_epoch(7)
    chosen = passes(loader, 1)
    again = ten()
    again.batch_sampler.sampler.set_epoch(7)
    assert chosen == passes(again, 1)
    assert chosen != passes(ten(), 1)


def test_processes_share_the_samples_evenly():
    parts = [passes(ten(rank=rank, world_size=3), 1)[0] for rank in range(3)]
    assert [[len(batch) for batch in part] for part in parts] == [[4]] * 3
    seen = [number for part in parts for batch in part for number in batch]
    assert set(seen) == set(range(10))
    assert len(seen) == 12  # 10 samples over 3 processes: two are seen twice


@pytest.mark.parametrize(
    ("tensors", "batch_size", "message"),
    [
        ((), 1, "same number of samples, at least one; got []"),
        ((torch.zeros(0),), 1, "at least one; got [0]"),
        ((torch.zeros(3), torch.zeros(2)), 1, "got [3, 2]"),
        ((torch.zeros(3),), 0, "batch_size must be at least 1, got 0"),
    ],
)
def test_loader_refuses(tensors, batch_size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TensorLoader(*tensors, batch_size=batch_size)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(0, 10))
def test_rank_within_class_counts_through_every_class(labels, seed):
    rank = rank_within_class(torch.tensor(labels), torch.Generator().manual_seed(seed))
    for label in set(labels):
        own = [place for place, other in zip(rank.tolist(), labels, strict=True) if other == label]
        assert sorted(own) == list(range(len(own)))


# --- the loader in Lightning ----------------------------------------------------------------------


class Recorder(LightningModule):
    """Remembers which samples each step saw, and learns something that depends on their order."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))
        self.seen = []

    def training_step(self, batch, batch_idx):
        number, _ = batch
        self.seen.append(number.tolist())
        return (self.weight * number.float() / 10 - 1).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(folder, *, save, resume=None, **kwargs):
    model = Recorder()
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **save)],
        **kwargs,
    )
    trainer.fit(model, ten(seed=1), ten(shuffle=False), ckpt_path=resume)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("save", "kwargs", "steps"),
    [
        ({"every_n_train_steps": 1}, {}, range(1, 9)),
        ({"every_n_train_steps": 1}, {"limit_train_batches": 2}, range(1, 6)),
        ({"save_on_train_epoch_end": True}, {}, (3, 6)),
        ({"save_on_train_epoch_end": True}, {"limit_train_batches": 2}, (2, 4)),
        ({"save_on_train_epoch_end": False}, {}, (3, 6)),
    ],
    ids=["every step", "every step of cut epochs", "epoch end", "end of cut epochs", "after validation"],
)
def test_training_resumed_from_any_checkpoint_sees_what_the_unbroken_run_saw(tmp_path, save, kwargs, steps):
    unbroken = fit(tmp_path, save=save, **kwargs)
    per_epoch = kwargs.get("limit_train_batches", 3)
    assert unbroken.seen == [batch for order in passes(ten(seed=1), 3) for batch in order[:per_epoch]]
    for step in steps:
        checkpoint = tmp_path / f"step={step}.ckpt"
        resumed = fit(tmp_path / "resumed", save=save, resume=checkpoint, **kwargs)
        assert resumed.seen == unbroken.seen[step:]
        assert torch.equal(resumed.weight, unbroken.weight)


# --- the synthetic world --------------------------------------------------------------------------


def test_superclass_samples_follow_the_formula():
    """The documented world, sample by sample, in the order in which its numbers are drawn."""
    world = SuperclassDataModule(train_size=None, world_seed=11)
    draw = torch.Generator().manual_seed(11)
    w1 = torch.randn(12, 64, generator=draw) / math.sqrt(12)
    w2 = torch.randn(64, 32, generator=draw) / 8
    superclass = torch.randn(5, 12, generator=draw).mul(2)
    offset = torch.randn(20, 12, generator=draw).mul(0.9)
    target = torch.randint(20, (30_000,), generator=draw)
    latent_noise = torch.randn(30_000, 12, generator=draw).mul(0.6)
    noise = torch.randn(30_000, 32, generator=draw).mul(0.05)
    val, test = world.splits["val"], world.splits["test"]
    for number, (x, label) in ((20_000, (val[0][0], val[1][0])), (29_999, (test[0][-1], test[1][-1]))):
        z = superclass[label // 4] + offset[label] + latent_noise[number]
        expected = 3 * torch.sin(1.5 * (z @ w1)) @ w2 + noise[number]
        torch.testing.assert_close(x, expected)
        assert label == target[number]


def test_superclass_splits_and_seeds():
    student, other, teacher = (
        SuperclassDataModule(train_size=size, seed=seed).splits for size, seed in ((1000, 0), (1000, 1), (None, 0))
    )
    assert [len(student[name][1]) for name in ("train", "val", "test")] == [1000, 5000, 5000]
    assert [len(teacher[name][1]) for name in ("train", "val", "test")] == [20_000, 5000, 5000]
    assert student["train"][0].shape[1] == SuperclassDataModule.num_features
    assert student["train"][0].dtype == torch.float32
    assert sorted(student["train"][1].unique().tolist()) == list(range(SuperclassDataModule.num_classes))
    for split in ("val", "test"):
        assert torch.equal(student[split][0], other[split][0])
        assert torch.equal(student[split][0], teacher[split][0])

    def rows(splits, *names):
        return {tuple(x) for name in names for x in splits[name][0].tolist()}

    pool, one, two = (rows(splits, "train") for splits in (teacher, student, other))
    assert one < pool
    assert two < pool
    assert len(one & two) < 100  # 50 expected by chance
    held_out = rows(teacher, "val", "test")
    assert len(held_out) == 10_000
    assert not held_out & pool


def test_superclass_worlds_differ_and_repeat_themselves():
    torch.manual_seed(5)
    first = SuperclassDataModule(world_seed=1).splits["train"][0]
    state = torch.manual_seed(6).get_state()
    assert torch.equal(SuperclassDataModule(world_seed=1).splits["train"][0], first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(SuperclassDataModule(world_seed=2).splits["train"][0], first)


@pytest.mark.parametrize("size", [0, 20_001])
def test_superclass_refuses_sizes_it_does_not_have(size):
    with pytest.raises(ValueError, match=f"train_size must be None or in 1 … 20000, got {size}"):
        SuperclassDataModule(train_size=size)


# --- the digits -----------------------------------------------------------------------------------


def test_digits_split_is_fixed_stratified_and_complete():
    datasets = pytest.importorskip("sklearn.datasets")
    splits = DigitsDataModule(seed=0).splits
    pixels, labels = datasets.load_digits(return_X_y=True)
    rows = [
        (label, *(image.flatten() * 16).tolist())
        for images, targets in splits.values()
        for image, label in zip(images, targets.tolist(), strict=True)
    ]
    assert sorted(rows) == sorted((label, *row) for label, row in zip(labels.tolist(), pixels.tolist(), strict=True))
    counts = torch.tensor(labels).bincount()
    for name, share in (("train", 0.4), ("val", 0.2), ("test", 0.4)):
        images, targets = splits[name]
        assert images.shape[1:] == (1, 8, 8)
        assert images.dtype == torch.float32
        assert images.min() == 0
        assert images.max() == 1
        assert (targets.bincount() - share * counts).abs().max() <= 1
    other = DigitsDataModule(seed=1).splits
    assert all(torch.equal(splits[name][0], other[name][0]) for name in splits)


def test_digits_labels_per_class_draws_from_the_training_split_by_seed():
    pytest.importorskip("sklearn")

    def draw(seed):
        images, targets = DigitsDataModule(labels_per_class=3, seed=seed).splits["train"]
        assert targets.bincount().tolist() == [3] * 10
        return {tuple(image.flatten().tolist()) for image in images}

    pool = {tuple(image.flatten().tolist()) for image in DigitsDataModule().splits["train"][0]}
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert draw(0) | draw(1) < pool


def test_digits_refuses_and_explains():
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="labels_per_class must be at least 1 or None, got 0"):
        DigitsDataModule(labels_per_class=0)
    with pytest.raises(ValueError, match=r"labels_per_class must be at most \d\d, .* got 100"):
        DigitsDataModule(labels_per_class=100).setup("fit")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        DigitsDataModule(batch_size=0)


def test_digits_without_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"lightning-methods\[demos\]\""):
        DigitsDataModule().setup("fit")


# --- both as datamodules --------------------------------------------------------------------------


def test_str_tells_the_sizes():
    world = SuperclassDataModule(train_size=7)
    assert str(world) == "SuperclassDataModule(not loaded yet)"
    world.setup("fit")
    assert str(world) == "SuperclassDataModule(train: 7, val: 5000, test: 5000)"


def test_loaders_shuffle_training_alone_and_follow_the_seed():
    world = SuperclassDataModule(train_size=50, seed=4)
    x, target = world.splits["train"]
    expected = TensorLoader(x, target, batch_size=64, shuffle=True, seed=4)
    for batch, reference in zip(world.train_dataloader(), expected, strict=True):
        assert torch.equal(batch[0], reference[0])
        assert not torch.equal(batch[0], x)
    for loader, split in ((world.val_dataloader(), "val"), (world.test_dataloader(), "test")):
        torch.testing.assert_close(torch.cat([batch[0] for batch in loader]), world.splits[split][0])


def test_each_process_of_a_trainer_gets_its_share():
    world = SuperclassDataModule(train_size=40)
    shares = []
    for rank in range(2):
        world.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        shares.append(torch.cat([x for x, _ in world.train_dataloader()]))
    assert [len(share) for share in shares] == [20, 20]
    assert {tuple(x) for share in shares for x in share.tolist()} == {
        tuple(x) for x in world.splits["train"][0].tolist()
    }


def test_importing_the_folder_loads_nothing_heavy():
    code = (
        "import sys, lightning_methods.datamodules;"
        "print({'torch', 'pytorch_lightning', 'timm', 'kornia', 'sklearn'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_unknown_names_are_refused_with_the_known_ones():
    import lightning_methods.datamodules as datamodules

    with pytest.raises(AttributeError, match=r"has no attribute 'Digit'; it has Arrow.*, DigitsDataModule"):
        _ = datamodules.Digit
    assert set(datamodules.__all__) <= set(dir(datamodules))
    assert all(callable(getattr(datamodules, name)) for name in datamodules.__all__)

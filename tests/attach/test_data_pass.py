"""Passes over the training data between epochs: complete, in eval mode, and without a trace in the training."""

import pytest
import torch
import torch.nn.functional as F
from plain import CLASSES, IN, Plain, fit, same, trainer
from pytorch_lightning import Callback, seed_everything
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_methods._modes import evaluating
from lightning_methods.attach._lightning import MisconfigurationException
from lightning_methods.attach.data_pass import training_batches
from lightning_methods.datamodules._tensors import TensorLoader

X = torch.randn(10, IN, generator=torch.Generator().manual_seed(3))
Y = torch.arange(10) % CLASSES


class Pass(Callback):
    """Goes through the training data after each epoch, and keeps what it saw."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        with evaluating(pl_module):
            batches = list(training_batches(trainer, pl_module))
            assert not any(part.training for part in pl_module.modules())
            assert not torch.is_grad_enabled()
        self.seen.append(batches)


class Noisy(Plain):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(1, 1).eval()
        self.order = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.order.append(y.tolist())
        return F.cross_entropy(F.dropout(self(x), 0.3), y)

    def on_train_epoch_start(self):
        self.frozen.eval()


def generator():
    return torch.Generator().manual_seed(5)


LOADERS = {
    "shuffled": lambda: DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True),
    "of the loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, generator=generator()),
    "of the sampler": lambda: DataLoader(
        TensorDataset(X, Y), batch_size=4, sampler=RandomSampler(X, generator=generator())
    ),
    "stateful": lambda: TensorLoader(X, Y, batch_size=4, shuffle=True, seed=2),
}


def trained(loader, *callbacks, **arguments):
    seed_everything(1, verbose=False)
    module = Noisy()
    trainer(*callbacks, max_epochs=3, **arguments).fit(module, loader)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_the_training_notices_nothing(loader):
    passes = Pass()
    without, attached = trained(loader()), trained(loader(), passes)
    assert attached.order == without.order
    assert same(attached, without)
    assert attached.training
    assert not attached.frozen.training
    for batches in passes.seen:
        rows = torch.cat([x for x, _ in batches])
        assert torch.equal(rows.sort(0).values, X.sort(0).values)


@pytest.mark.filterwarnings("ignore")
def test_no_more_batches_than_an_epoch_has():
    passes = Pass()
    trained(LOADERS["shuffled"](), passes, limit_train_batches=2)
    assert [len(batches) for batches in passes.seen] == [2, 2, 2]


def test_batches_are_those_of_a_training_step():
    class Transfers(Plain):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[0] + 1, batch[1]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 2, batch[1]

        def training_step(self, batch, batch_idx):
            self.last = batch[0].clone()
            return super().training_step(batch, batch_idx)

    module, passes = Transfers(), Pass()
    fit(module, passes, batches=[(X, Y)])
    assert torch.equal(passes.seen[0][0][0], module.last)
    assert torch.equal(module.last, (X + 1) * 2)


@pytest.mark.filterwarnings("ignore")
def test_several_loaders_are_refused():
    class Two(Plain):
        def train_dataloader(self):
            return {"a": LOADERS["stateful"](), "b": LOADERS["stateful"]()}

        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    with pytest.raises(MisconfigurationException, match=r"needs one training dataloader, but .* a dict of 2"):
        trainer(Pass()).fit(Two())


def test_modes_come_back_after_an_error():
    module = Noisy()
    with pytest.raises(RuntimeError, match="on purpose"), evaluating(module):
        raise RuntimeError("on purpose")
    assert module.training
    assert not module.frozen.training

"""Train a video classifier with StillMix: `python examples/stillmix.py`, a minute on a laptop.

The part to copy is the bank and the callback in `main`. `Net` and the data are a stand-in for yours; nothing in them
knows of StillMix. The world is synthetic: the label is the direction of a motion, but background and colours nearly
always tell it, too. On striped backgrounds only the motion does. Needs the extra `video`.
"""

import argparse

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_methods.callbacks import StillMix
from lightning_methods.datamodules import MovingShapesDataModule
from lightning_methods.modules import FrameBank, SingleFrameClassifier


def network(dims):
    conv, norm, pool = (getattr(nn, f"{kind}{dims}d") for kind in ("Conv", "BatchNorm", "AdaptiveAvgPool"))
    layers = []
    for before, after, stride in ((3, 16, (1, 2, 2)), (16, 32, (1, 2, 2)), (32, 64, (2, 2, 2))):
        layers += [conv(before, after, 3, stride[-dims:], padding=1, bias=False), norm(after), nn.ReLU()]
    return nn.Sequential(*layers, pool(1), nn.Flatten(), nn.Linear(64, 4))


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network(dims=3)

    def training_step(self, batch):
        videos, targets, *_ = batch
        return F.cross_entropy(self.net(videos), targets)

    def test_step(self, batch):
        videos, targets, *_ = batch
        self.log("accuracy", (self.net(videos).argmax(1) == targets).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def trainer(epochs, fast, *callbacks):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(max_epochs=epochs, callbacks=list(callbacks), fast_dev_run=fast, accelerator="cpu", **quiet)


def main(fast=False):
    data = MovingShapesDataModule(**({"train_size": 40, "test_size": 20} if fast else {}))
    seed_everything(0)
    # A network that sees single frames finds those that give their label away; the surest half of them, 512 at
    # random, make the bank. (With videos on disk: `lightning-methods score-frames`, then a FrameBankSpec.)
    videos, targets, *_ = data.splits["train"]  # (n, 3, 8, 24, 24), (n,)
    frames = TensorDataset(videos.transpose(1, 2).flatten(0, 1), targets.repeat_interleave(videos.shape[2]))
    reference = SingleFrameClassifier(network(dims=2), lr=0.2)
    trainer(2, fast).fit(reference, DataLoader(frames, batch_size=32, shuffle=True))
    bank = FrameBank.from_dataset(reference, frames, bank_size=64 if fast else 512)
    stillmix = StillMix(bank)  # blends a clip with probability 0.5

    accuracy = {}
    for name, callbacks in {"alone": [], "with StillMix": [stillmix]}.items():
        seed_everything(1)
        module, run = Net(), trainer(12, fast, *callbacks)
        run.fit(module, datamodule=data)
        accuracy[name] = [run.test(module, loader, verbose=False)[0]["accuracy"] for loader in data.test_dataloader()]
    for name, (like_training, _, _, stripes) in accuracy.items():
        print(f"{name:<14} {100 * like_training:.1f} % as in training, on stripes {100 * stripes:.1f} % test accuracy")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="one batch of everything, to see that it runs")
    main(parser.parse_args().fast)

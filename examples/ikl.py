"""Distil a trained network into a smaller one with IKL: `python examples/ikl.py`, half a minute on a laptop.

The part to copy is the callback in `main`. `Net` and the data are a stand-in for yours; nothing in them
knows of distillation. The data is a synthetic world of 20 classes: nothing to download.
"""

import argparse

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch import nn

from lightning_methods.callbacks import IKLDistillation
from lightning_methods.datamodules import SuperclassDataModule


class Net(LightningModule):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 20)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        x, target = batch
        return F.cross_entropy(self(x), target)

    def test_step(self, batch):
        x, target = batch
        self.log("accuracy", (self(x).argmax(1) == target).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def train(module, data, epochs, fast, callbacks=()):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=epochs, callbacks=list(callbacks), fast_dev_run=fast, accelerator="cpu", **quiet)
    trainer.fit(module, datamodule=data)
    return trainer.test(module, datamodule=data, verbose=False)[0]["accuracy"]


def main(fast=False):
    seed_everything(0)
    teacher = Net(width=256)
    accuracy = {"teacher": train(teacher, SuperclassDataModule(train_size=None, batch_size=128), 15, fast)}

    # The method. Its T = 4 and uniform weights (T_w = 100) are those of the published CIFAR-100 runs; the weight of
    # the wMSE and the warm-up are this small world's, not the paper's.
    ikl = IKLDistillation(
        teacher,
        class_wise=False,
        temperature=4.0,
        weight_temperature=100.0,
        wmse_weight=2.0,
        warmup_epochs=5,
    )
    for name, callbacks in {"student alone": [], "student with IKL": [ikl]}.items():
        seed_everything(1)
        accuracy[name] = train(Net(width=48), SuperclassDataModule(train_size=1000), 30, fast, callbacks)
    for name, value in accuracy.items():
        print(f"{name:<17} {100 * value:.1f} % test accuracy")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="one batch of everything, to see that it runs")
    main(parser.parse_args().fast)

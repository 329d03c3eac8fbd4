"""Train an anomaly detector on bags, with and without UMIL: `python examples/umil.py`, some seconds on a laptop.

The part to copy is the callback in `main`. `Detector` and the data are a stand-in for yours; nothing in them knows of
UMIL. The data is a made world in which the context of obvious anomalies misleads: nothing to download.
"""

import argparse

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch import nn
from torchmetrics.functional.classification import binary_auroc

from lightning_methods.callbacks import UMIL
from lightning_methods.datamodules import SyntheticBiasedBagsDataModule


class Detector(LightningModule):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(32, 1)  # one logit a snippet

    def forward(self, features):
        return self.head(features).squeeze(-1)

    def training_step(self, batch):
        highest = self(batch["features"]).amax(1)  # a bag is as abnormal as its most abnormal snippet
        return F.binary_cross_entropy_with_logits(highest, batch["label"].float())

    def test_step(self, batch):
        of_abnormal = batch["label"] > 0
        scores, target = self(batch["features"])[of_abnormal], batch["snippet_label"][of_abnormal]
        self.log("auc", binary_auroc(scores, target), batch_size=int(of_abnormal.sum()))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(data, fast, callbacks=()):
    seed_everything(0)
    detector = Detector()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=30, callbacks=list(callbacks), fast_dev_run=fast, accelerator="cpu", **quiet)
    trainer.fit(detector, datamodule=data)
    return trainer.test(detector, datamodule=data, verbose=False)[0]["auc"]


def main(fast=False):
    data = SyntheticBiasedBagsDataModule()

    # The method. It needs to know where the features of snippets are, their width, and how many bags there are. The
    # learning rate and the start in epoch 10 of 30 are for this small world; the authors start in epoch 30 of 40.
    umil = UMIL(
        features="module.head@input",
        logits="module",
        bag_labels="batch.label",
        bag_ids="batch.vid",
        in_features=32,
        num_videos=data.train_size,
        start_epoch=10,
    )
    auc = {name: train(data, fast, callbacks) for name, callbacks in {"MIL": [], "MIL with UMIL": [umil]}.items()}
    for name, value in auc.items():
        print(f"{name:<14} {100 * value:.1f} % AUC within abnormal bags of the test split")
    return auc


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="one batch of everything, to see that it runs")
    main(parser.parse_args().fast)

"""Give a Transformer learned clusters: `python examples/acf.py`, half a minute on a laptop.

The part to copy is the callback in `main`. `Tagger` and the data are a stand-in for yours; nothing in them knows of
clusters. The data is a synthetic world of tokens in phrases: nothing to download.
"""

import argparse

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch import nn

from lightning_methods.callbacks import AdaClustFormer
from lightning_methods.datamodules import PhrasesDataModule


class Tagger(LightningModule):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.embed, self.position = nn.Linear(7, 32), nn.Parameter(0.1 * torch.randn(24, 32))
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 6)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x) + self.position))

    def training_step(self, batch):
        x, target, _ = batch
        return F.cross_entropy(self(x).flatten(0, 1), target.flatten())

    def test_step(self, batch):
        x, target, _ = batch
        self.log("accuracy", (self(x).argmax(2) == target).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.05)


def main(fast=False):
    # The method: it takes the place of the encoder's self-attention. `init_bias=None` is for training from scratch;
    # in a pretrained model leave it out, and attention starts near what it was.
    acf = AdaClustFormer("module.encoder.layers.*.self_attn", init_bias=None)

    accuracy = {}
    for name, callbacks in {"plain attention": [], "with clusters": [acf]}.items():
        seed_everything(0)
        module, data = Tagger(), PhrasesDataModule()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        trainer = Trainer(max_epochs=40, callbacks=callbacks, fast_dev_run=fast, accelerator="cpu", **quiet)
        trainer.fit(module, datamodule=data)
        accuracy[name] = trainer.test(module, datamodule=data, verbose=False)[0]["accuracy"]
    for name, value in accuracy.items():
        print(f"{name:<16} {100 * value:.1f} % test accuracy")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="one batch of everything, to see that it runs")
    main(parser.parse_args().fast)

"""Let words follow trajectories through a video: `python examples/twbert.py`, a minute on a laptop.

The part to copy is the callback in `main`. `Answers` and the data are a stand-in for yours; nothing in them knows of
trajectories. The data is a synthetic world of short videos and questions: nothing to download.
"""

import argparse

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch import nn

from lightning_methods.callbacks import TrajectoryWordAlignment
from lightning_methods.datamodules import ObjectStatesDataModule


class Answers(LightningModule):
    """One attention over [4 words; video CLS; 8 frames of 16 patches]."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.words, self.patches = nn.Embedding(9, 32), nn.Linear(10, 32)
        self.position = nn.Parameter(0.02 * torch.randn(4 + 1 + 8 * 16, 32))
        self.fusion = nn.TransformerEncoder(layer, num_layers=1, enable_nested_tensor=False)
        self.head = nn.Linear(32, 4)

    def forward(self, video, text):
        words, patches = self.words(text), self.patches(video)
        tokens = torch.cat([words, torch.zeros_like(words[:, :1]), patches], dim=1)
        return self.head(self.fusion(tokens + self.position)[:, 1])

    def training_step(self, batch):
        video, text, target = batch
        return F.cross_entropy(self(video, text), target)

    def test_step(self, batch):
        video, text, target = batch
        self.log("accuracy", (self(video, text).argmax(1) == target).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(fast=False):
    # The method: it takes the place of the self-attention over words and patches.
    trajectories = TrajectoryWordAlignment("module.fusion.layers.*.self_attn", num_frames=8, patches_per_frame=16)

    accuracy = {}
    for name, callbacks in {"one attention": [], "trajectories": [trajectories]}.items():
        seed_everything(0)
        module, data = Answers(), ObjectStatesDataModule(train_size=16_000)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        trainer = Trainer(max_epochs=2, callbacks=callbacks, fast_dev_run=fast, accelerator="cpu", **quiet)
        trainer.fit(module, datamodule=data)
        accuracy[name] = trainer.test(module, datamodule=data, verbose=False)[0]["accuracy"]
    for name, value in accuracy.items():
        print(f"{name:<14} {100 * value:.1f} % test accuracy")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="one batch of everything, to see that it runs")
    main(parser.parse_args().fast)

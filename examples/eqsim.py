"""Train an image-text model to tell the smallest changes with EqSim: `python examples/eqsim.py`, seconds on a laptop.

The part to copy is the callback in `main`. `Net` and the data are a stand-in for yours; nothing in them knows of EqSim.
The data is a synthetic world: nothing to download.
"""

import argparse

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch import nn

from lightning_methods.callbacks import EqSim
from lightning_methods.datamodules import MinimalChangeDataModule
from lightning_methods.metrics import PairGroupScore


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.image_encoder = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))
        self.text_encoder = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.score = PairGroupScore()

    def forward(self, image, text):
        return F.normalize(self.image_encoder(image), dim=-1), F.normalize(self.text_encoder(text), dim=-1)

    def training_step(self, batch):
        image, text = self(*batch)
        logits = self.logit_scale.exp() * image @ text.T
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def test_step(self, batch, batch_idx, dataloader_idx=0):  # noqa: ARG002
        if dataloader_idx == 0:  # quadruples: two images and two texts in dim 1; the second loader is for retrieval
            image, text = self(*batch)
            self.score.update(*(image @ text.mT).flatten(1).unbind(1))

    def on_test_epoch_end(self):
        self.log("accuracy", self.score.compute()["group"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=1.0)


def main(fast=False):
    # The method. Scores are cosines here, so weight and margin are this small world's, not those of the released run,
    # which has softmax scores, weight 0.5 and margin 0.1.
    eqsim = EqSim(
        image="module.image_encoder",
        text="module.text_encoder",
        logit_scale="module.logit_scale",
        log_scale=True,
        activation=None,
        margin=0.0,
        weight=5.0,
    )
    accuracy = {}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    for name, callbacks in {"contrastive loss alone": [], "with EqSim": [eqsim]}.items():
        seed_everything(0)
        net, data = Net(), MinimalChangeDataModule(train_size=1500)
        trainer = Trainer(max_epochs=25, callbacks=callbacks, fast_dev_run=fast, **quiet)
        trainer.fit(net, datamodule=data)
        trainer.test(net, datamodule=data, verbose=False)
        accuracy[name] = trainer.callback_metrics["accuracy"].item()
    for name, value in accuracy.items():
        print(f"{name:<23} tells {100 * value:.1f} % of the quadruples, group score, % test accuracy")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="one batch of everything, to see that it runs")
    main(parser.parse_args().fast)

"""Fine-tune a pretrained classifier on biased data with ProReg: `python examples/proreg.py`, ten seconds on a laptop.

The part to copy is the callback in `main`, and the head that begins as text features. `CaptionedModel` stands for CLIP,
and a synthetic world in which the context gives the class away for your data: nothing to download.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer, seed_everything

from lightning_methods.callbacks import ProReg
from lightning_methods.datamodules import BiasedContextsDataModule, CaptionedContextsDataModule
from lightning_methods.demos.proreg_models import CaptionedModel
from lightning_methods.metrics import ShiftAccuracy
from lightning_methods.modules import PromptClassifier, prompt_param_groups


class Net(LightningModule):
    def __init__(self, encoder, text_features, logit_scale):
        super().__init__()
        self.visual = copy.deepcopy(encoder)
        self.head = PromptClassifier(text_features, logit_scale=logit_scale, trainable=True)
        self.accuracy = ShiftAccuracy()

    def forward(self, x):
        return self.head(self.visual(x))

    def training_step(self, batch):
        x, target, _ = batch
        return F.cross_entropy(self(x), target)

    def test_step(self, batch):
        x, target, group = batch
        self.accuracy.update(self(x), target, group)

    def configure_optimizers(self):
        return torch.optim.AdamW(prompt_param_groups(self, self.head, lr=3e-3, head_lr=9e-3))


def main(fast=False):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}

    def trainer(epochs, callbacks=()):
        return Trainer(max_epochs=epochs, callbacks=list(callbacks), limit_val_batches=0, fast_dev_run=fast, **quiet)

    seed_everything(0)
    clip = CaptionedModel()
    trainer(4).fit(clip, CaptionedContextsDataModule())

    # The classes' text features, in the order of the labels. Two classes have each other's word: prompts can be wrong.
    data = BiasedContextsDataModule(wrong_words=True)
    text_features, scale = clip.net.words.detach()[list(data.words)], clip.net.log_scale.exp().item()

    # The method. alpha = 2 is the authors' value for most of their sets.
    proreg = ProReg(snapshot="module.visual", text_features=text_features, logit_scale=scale, alpha=2.0)
    scores = {}
    for name, epochs, callbacks in (("zero-shot", 0, []), ("fine-tuning", 40, []), ("with ProReg", 40, [proreg])):
        seed_everything(1)
        net, run = Net(clip.net.encoder, text_features, scale), trainer(epochs, callbacks)
        if epochs:
            run.fit(net, data)
        run.test(net, data, verbose=False)
        scores[name] = net.accuracy.compute()
    for name, (usual, other, _) in scores.items():
        print(f"{name:<12} in usual contexts {100 * usual:.1f} %, in others {100 * other:.1f} % test accuracy")
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="one batch of everything, to see that it runs")
    main(parser.parse_args().fast)

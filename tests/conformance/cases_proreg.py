"""ProReg's cases: each way to come by prompt logits, each way to act on the loss."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods.callbacks import ProReg
from lightning_methods.testing import Case


class Tuned(LightningModule):
    """An encoder under a cosine head, as models for images and texts have it."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return 5 * F.linear(F.normalize(self.visual(x), dim=1), F.normalize(self.head.weight, dim=1))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        logits = self(batch["image"])
        return {"loss": F.cross_entropy(logits, batch["label"]), "logits": logits}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class LoadedInSetup(Tuned):
    """Gets its pretrained weights when the Trainer asks, after the callbacks' own `setup`."""

    def setup(self, stage: str) -> None:
        for number, parameter in enumerate(self.visual.parameters()):
            parameter.data *= 1.01 + 0.01 * number


def case(module: type[Tuned] = Tuned, **settings: Any) -> Case:
    torch.manual_seed(0)
    batch = {"image": torch.randn(8, 6), "label": torch.arange(8) % 5, "prompt_logits": 3 * torch.randn(8, 5)}
    return Case(ProReg("output.logits", "batch.label", **settings), module(), batch)


def classifier() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


COPY = {"snapshot": "module.visual", "text_features": "module.head.weight", "logit_scale": 5.0}

PROREG_CASES = {
    "ProReg": lambda: case(prompt="batch.prompt_logits", alpha=2.0),
    "ProReg-add": lambda: case(prompt="batch.prompt_logits", loss="add", weighting="loss", gamma=0.5),
    "ProReg-classifier": lambda: case(prompt=classifier(), inputs="batch.image", temperature=2.0, loss="add"),
    "ProReg-snapshot": lambda: case(**COPY),
    "ProReg-whole": lambda: case(snapshot="module", loss="add"),
    "ProReg-late": lambda: case(LoadedInSetup, **COPY, loss="add"),
}

PROREG_YAML = {
    "logits": "output.logits",
    "target": "batch.label",
    "inputs": "batch.image",
    "loss": "add",
    "snapshot": "module.clip:image_embeds",
    "text_features": "module.head.weight",
    "logit_scale": 20.0,
    "alpha": 2.0,
    "weighting": "loss",
    "gamma": 0.5,
    "log": "epoch",
}

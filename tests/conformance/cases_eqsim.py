"""Cases of EqSim: an image-text model of two linear encoders, and a batch with hard partners for its match scores."""

from __future__ import annotations

import math

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods.callbacks import EqSim
from lightning_methods.testing import Case


class DualEncoder(LightningModule):
    """Its own loss is a mean over pairs, so that it does not depend on how a batch is shared out."""

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = nn.Linear(6, 4)
        self.text_encoder = nn.Linear(5, 4)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(5.0)))

    def match(self, image: Tensor, text: Tensor) -> Tensor:
        return self.logit_scale.exp() * F.cosine_similarity(image, text)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        image, text = self.image_encoder(batch["image"]), self.text_encoder(batch["text"])
        hard_image, hard_text = self.image_encoder(batch["hard_image"]), self.text_encoder(batch["hard_text"])
        s00 = self.match(image, text)
        return {
            "loss": F.softplus(-s00).mean(),
            "image": image,
            "text": text,
            "similarity": self.logit_scale.exp() * F.normalize(image) @ F.normalize(text).T,
            "s00": s00,
            "s01": self.match(image, hard_text),
            "s10": self.match(hard_image, text),
            "s11": self.match(hard_image, hard_text),
        }

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def eqsim(**settings: object) -> Case:
    torch.manual_seed(0)
    names = {"image": 6, "text": 5, "hard_image": 6, "hard_text": 5}
    batch = {name: torch.randn(8, size) for name, size in names.items()} | {"id": torch.arange(8) // 2}
    return Case(EqSim(margin=0.0, **settings), DualEncoder(), batch)


_EMBEDDINGS = {"image": "output.image", "text": "output.text"}

EQSIM_CASES = {
    "EqSim": lambda: eqsim(
        **_EMBEDDINGS, logit_scale="module.logit_scale", log_scale=True, activation=None, warmup_steps=2
    ),
    "EqSim-all_pairs": lambda: eqsim(**_EMBEDDINGS, logit_scale=5.0, mode="all_pairs", weight=5.0, ids="batch.id"),
    "EqSim-similarity": lambda: eqsim(
        similarity="output.similarity", mode="close_only", num_samples=2, ids="batch.id", positive_reg=True
    ),
    "EqSim-itm": lambda: eqsim(
        scores=[f"output.{name}" for name in ("s00", "s01", "s10", "s11")], mode="itm", activation="sigmoid"
    ),
}

EQSIM_YAML = {
    "image": "module.image_encoder",
    "text": "module.text_encoder:0",
    "logit_scale": "module.logit_scale",
    "log_scale": True,
    "ids": "batch.id",
    "mode": "close_only",
    "weight": 5.0,
    "activation": None,
    "margin": 0.0,
    "num_samples": 8,
    "gather_grad": False,
    "warmup_steps": 100,
    "log": "epoch",
}

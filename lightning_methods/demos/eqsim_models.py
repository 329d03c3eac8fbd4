"""A plain contrastive image-text model, as anyone would have it. It knows nothing of EqSim."""

import math
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from lightning_methods.metrics import EquivarianceGap, PairGroupScore, RetrievalRecall

_LARGEST_SCALE = 100.0


class DualEncoder(LightningModule):
    """Two small networks into one space, trained with the symmetric contrastive loss at a learned scale.

    Training batches are (image, text). The first loader of an evaluation has quadruples, (images, texts) with two of
    each in dim 1; the second has pairs, (image, text, number).

    Args:
        features: Features of an image and of a text.
        lr: Learning rate of AdamW, constant.
        weight_decay: Of the matrices alone, or also of the scale.
        decay_scale: Whether the scale decays too, which lowers it.
    """

    def __init__(
        self, features: int = 64, lr: float = 2e-3, weight_decay: float = 2.0, decay_scale: bool = False
    ) -> None:
        super().__init__()
        self.lr = lr
        self.weight_decay = weight_decay
        self.decay_scale = decay_scale
        self.image_encoder = _encoder(features)
        self.text_encoder = _encoder(features)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.group = PairGroupScore()
        self.gap = EquivarianceGap()
        self.recall = RetrievalRecall(k=(1,))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of unit length."""
        return F.normalize(self.image_encoder(images), dim=-1), F.normalize(self.text_encoder(texts), dim=-1)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The symmetric contrastive loss of a batch."""
        image, text = self(*batch)
        logits = self.logit_scale.exp() * image @ text.T
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def on_train_batch_end(self, *_: object) -> None:
        """Called after an optimizer step: keeps the scale in its range, as CLIP does."""
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(_LARGEST_SCALE))

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """Adds a batch of quadruples or pairs to the metrics."""
        image, text = self(*batch[:2])
        if dataloader_idx:
            number = batch[2]
            self.recall.update(image, number, text, number, number)
        else:
            scores = (image @ text.mT).flatten(1).unbind(1)  # s00, s01, s10, s11
            self.group.update(*scores)
            self.gap.update(*scores)

    def on_validation_epoch_end(self) -> None:
        """Logs and resets the metrics."""
        group, gap, recall = self.group.compute(), self.gap.compute(), self.recall.compute()
        values = {
            "group": group["group"],
            "text": group["text"],
            "image": group["image"],
            "recall": (recall["text_recall@1"] + recall["image_recall@1"]) / 2,
            "gap": (gap["relative_text"] + gap["relative_image"]) / 2,
        }
        self.log_dict(values)
        for metric in (self.group, self.gap, self.recall):
            metric.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self) -> AdamW:
        """AdamW; biases do not decay."""
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": self.weight_decay},
            {"params": [], "weight_decay": 0.0},
        ]
        for parameter in self.parameters():
            decays = parameter.ndim > 1 or (self.decay_scale and parameter is self.logit_scale)
            groups[0 if decays else 1]["params"].append(parameter)
        return AdamW(groups, lr=self.lr)


def _encoder(features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, 128), nn.GELU(), nn.Linear(128, 32))

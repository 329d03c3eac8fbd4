"""Plain LightningModules, as anyone would have them: a model trained on captions, and a classifier tuned from it.

They know nothing of prompt regularisation.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from lightning_methods.metrics import ShiftAccuracy


class Cosines(nn.Module):
    """Scaled cosines of encoded inputs (N, 32) with words (K, 32).

    Args:
        encoder: Gives the features.
        words: (K, 32).
        log_scale: Logarithm of the scale.
    """

    def __init__(self, encoder: nn.Module, words: Tensor, log_scale: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.words = nn.Parameter(words)
        self.log_scale = nn.Parameter(log_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K)."""
        features = F.normalize(self.encoder(x), dim=1)
        logits: Tensor = self.log_scale.exp() * features @ F.normalize(self.words, dim=1).T
        return logits


class CaptionedModel(LightningModule):
    """Learns what objects and contexts are called: six words for each, and cross-entropy among either six."""

    def __init__(self) -> None:
        super().__init__()
        encoder = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.net = Cosines(encoder, 0.1 * torch.randn(12, 32), torch.tensor(10.0).log())

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Cross-entropy of the objects and of the contexts."""
        x, objects, contexts = batch
        logits = self.net(x)
        return F.cross_entropy(logits[:, :6], objects) + F.cross_entropy(logits[:, 6:], contexts)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        """Logs the loss of one batch."""
        self.log("val_loss", self.training_step(batch))

    def configure_optimizers(self) -> Optimizer:
        """AdamW."""
        return AdamW(self.parameters(), lr=3e-3)


class TunedClassifier(LightningModule):
    """Begins as the zero-shot classifier of a pretrained model and learns all of it by cross-entropy.

    Args:
        pretrained: The model to begin with; it is copied.
        words: For each class, which of its words names it.
        lr: Learning rate; that of the head is three times as high.
        weight_decay: Of all parameters.
    """

    def __init__(
        self, pretrained: CaptionedModel, words: Sequence[int], lr: float = 3e-3, weight_decay: float = 0.01
    ) -> None:
        super().__init__()
        net = pretrained.net
        start = net.words.detach()[list(words)].clone(), net.log_scale.detach().clone()
        self.net = Cosines(copy.deepcopy(net.encoder), *start)
        self.lr = lr
        self.weight_decay = weight_decay
        self.accuracy = ShiftAccuracy()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 6)."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Cross-entropy of one batch."""
        x, target, _ = batch
        return F.cross_entropy(self(x), target)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        """Counts a batch."""
        x, target, group = batch
        self.accuracy.update(self(x), target, group)

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        """Counts a batch."""
        self.validation_step(batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the accuracies, 0 to 1."""
        self.log_dict(self.accuracy.compute()._asdict())
        self.accuracy.reset()

    def on_test_epoch_end(self) -> None:
        """Logs the accuracies, 0 to 1."""
        self.on_validation_epoch_end()

    def configure_optimizers(self) -> Optimizer:
        """AdamW with a higher rate for the head."""
        head = [self.net.words, self.net.log_scale]
        groups: list[dict[str, Any]] = [
            {"params": self.net.encoder.parameters()},
            {"params": head, "lr": 3 * self.lr},
        ]
        return AdamW(groups, lr=self.lr, weight_decay=self.weight_decay)


class LogitEnsemble(TunedClassifier):
    """Logits of two classifiers, averaged after training.

    Args:
        tuned: One of them.
        zero_shot: The other.
        share: Weight of the other, 0 to 1.
    """

    def __init__(self, tuned: TunedClassifier, zero_shot: TunedClassifier, share: float) -> None:
        LightningModule.__init__(self)
        self.tuned = tuned
        self.zero_shot = zero_shot
        self.share = share
        self.accuracy = ShiftAccuracy()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 6)."""
        return torch.lerp(self.tuned(x), self.zero_shot(x), self.share)

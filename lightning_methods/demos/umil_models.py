"""A plain detector on bags of snippets, as anyone would have it. It knows nothing of UMIL."""

from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torchmetrics.functional.classification import binary_auroc

Batch = dict[str, Tensor]
_CONTEXT_ONLY, _SUBTLE = 3, 2  # kinds of snippets


class MILDetector(LightningModule):
    """Scores every snippet, and learns from the most abnormal one of each bag.

    The loss is the MIL baseline of UMIL's authors: cross-entropy of the most abnormal snippet, weighed by its own
    confidence, and weak priors for smooth and sparse scores.

    Args:
        lr: Learning rate.
        encoder: Train a layer of 32 ReLUs on the features; without it a linear detector on them as they are.
        weight_decay: Of AdamW.
    """

    def __init__(self, lr: float = 3e-3, encoder: bool = False, weight_decay: float = 1e-3) -> None:
        super().__init__()
        self.lr, self.weight_decay = lr, weight_decay
        self.encoder = nn.Sequential(nn.Linear(32, 32), nn.ReLU()) if encoder else nn.Identity()
        self.head = nn.Linear(32, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._seen: list[tuple[Tensor, ...]] = []

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, K, 2) of features (B, K, 32); class 1 is abnormal."""
        logits: Tensor = self.head(self.encoder(features))
        return logits

    def training_step(self, batch: Batch) -> Tensor:
        """The loss of one batch of bags."""
        logits: Tensor = self(batch["features"])
        probabilities = logits.softmax(-1)
        scores = probabilities[..., 1]
        highest = scores.argmax(1)
        bags = torch.arange(len(highest), device=highest.device)
        weight = probabilities[bags, highest].amax(-1)
        mil = weight * F.cross_entropy(logits[bags, highest], batch["label"], reduction="none")
        smooth, sparse = scores.diff(dim=1).square().sum(1), scores.sum(1)
        return (mil + 0.01 * smooth + 0.001 * sparse).mean()

    def validation_step(self, batch: Batch) -> None:
        """Keeps the scores of a batch."""
        self._keep(batch)

    def test_step(self, batch: Batch) -> None:
        """Keeps the scores of a batch."""
        self._keep(batch)

    def on_validation_epoch_end(self) -> None:
        """Logs what `figures` says of all batches."""
        self.log_dict(self._figures())

    def on_test_epoch_end(self) -> None:
        """Logs what `figures` says of all batches."""
        self.log_dict(self._figures())

    def configure_optimizers(self) -> Optimizer:
        """AdamW."""
        return AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    def _keep(self, batch: Batch) -> None:
        scores = self(batch["features"]).softmax(-1)[..., 1]
        self._seen.append((scores, batch["snippet_label"], batch["kind"], batch["label"]))

    def _figures(self) -> dict[str, Any]:
        scores, target, kind, bag = (torch.cat(column) for column in zip(*self._seen, strict=True))
        self._seen.clear()
        return figures(scores, target, kind, bag)


def figures(scores: Tensor, target: Tensor, kind: Tensor, bag: Tensor) -> dict[str, Tensor]:
    """How well snippets are told apart, in percent.

    Args:
        scores: Abnormal probabilities, (B, K).
        target: Labels of the snippets, (B, K).
        kind: Their kinds, (B, K).
        bag: Labels of the bags, (B,).

    Returns:
        `auc_abnormal`, the area under the ROC curve over the snippets of abnormal bags; `auc`, that over all snippets;
        `false_alarms`, the share of normal snippets that have an anomaly's context only and score above 0.5;
        `subtle_recall`, the share of subtle anomalies that do.
    """
    inside = bag > 0
    alarm = (scores > 0.5).float()
    return {
        "auc_abnormal": 100 * binary_auroc(scores[inside], target[inside]),
        "auc": 100 * binary_auroc(scores, target),
        "false_alarms": 100 * alarm[kind == _CONTEXT_ONLY].mean(),
        "subtle_recall": 100 * alarm[kind == _SUBTLE].mean(),
    }

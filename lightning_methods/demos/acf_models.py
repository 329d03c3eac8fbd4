"""A plain Transformer that labels tokens, as anyone would have it. It knows nothing of clusters."""

from __future__ import annotations

import math
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy


class Block(nn.Module):
    """A pre-norm Transformer block around torch's own attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class TokenTagger(LightningModule):
    """Gives every token of a sequence a class.

    Args:
        num_features: Channels of a token.
        num_classes: Classes.
        width: D.
        num_heads: Heads of the attention.
        num_layers: Blocks.
        lr: Peak of the one-cycle schedule of AdamW.
        weight_decay: Of AdamW.
    """

    def __init__(
        self,
        num_features: int = 7,
        num_classes: int = 6,
        *,
        width: int = 32,
        num_heads: int = 4,
        num_layers: int = 2,
        lr: float = 3e-3,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__()
        self.lr, self.weight_decay = lr, weight_decay
        self.embed = nn.Linear(num_features, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(num_layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, num_features) -> logits (B, N, num_classes)."""
        tokens = self.embed(x)
        logits: Tensor = self.head(self.blocks(tokens + sinusoids(*tokens.shape[1:]).to(tokens)))
        return logits

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Cross-entropy over all tokens."""
        x, target, *_ = batch
        return F.cross_entropy(self(x).flatten(0, 1), target.flatten())

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:  # noqa: ARG002
        """Adds a batch to `val_accuracy`."""
        self.val_accuracy(self(batch[0]).flatten(0, 1), batch[1].flatten())
        self.log("val_accuracy", self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:  # noqa: ARG002
        """Adds a batch to `test_accuracy`."""
        self.test_accuracy(self(batch[0]).flatten(0, 1), batch[1].flatten())
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self) -> Any:
        """AdamW with a one-cycle schedule over the steps."""
        return one_cycle(self, self.lr, self.weight_decay)


def one_cycle(module: LightningModule, lr: float, weight_decay: float) -> Any:
    """AdamW over all parameters, with torch's one-cycle schedule over the Trainer's steps."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay)
    steps = int(module.trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def sinusoids(length: int, width: int) -> Tensor:
    """Positions as sines and cosines (length, width), as in "Attention Is All You Need"."""
    angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)

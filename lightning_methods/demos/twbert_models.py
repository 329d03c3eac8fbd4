"""A plain question-answering model over video patches. It knows nothing of trajectories."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_methods.demos.acf_models import Block, one_cycle


class VideoQuestionModel(LightningModule):
    """Fuses a question and a video in one self-attention over [words; video CLS; patches] and answers.

    Args:
        num_features: Channels of a patch.
        num_words: Size of the vocabulary.
        num_classes: Answers.
        num_frames: T.
        patches_per_frame: S.
        text_length: L.
        width: D.
        num_heads: Heads of the attention.
        lr: Peak of the one-cycle schedule of AdamW.
    """

    def __init__(
        self,
        num_features: int = 10,
        num_words: int = 9,
        num_classes: int = 4,
        *,
        num_frames: int = 8,
        patches_per_frame: int = 16,
        text_length: int = 4,
        width: int = 32,
        num_heads: int = 2,
        lr: float = 3e-3,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.words = nn.Embedding(num_words, width)
        self.patches = nn.Linear(num_features, width)
        self.word_position = nn.Parameter(0.02 * torch.randn(text_length, width))
        self.frame_position = nn.Parameter(0.02 * torch.randn(num_frames, 1, width))
        self.patch_position = nn.Parameter(0.02 * torch.randn(1, patches_per_frame, width))
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.fusion = nn.Sequential(Block(width, num_heads))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        """Patches (B, T·S, num_features), frame by frame, and word numbers (B, L) -> logits (B, num_classes)."""
        words = self.words(text) + self.word_position
        patches = self.patches(video) + (self.frame_position + self.patch_position).flatten(0, 1)
        fused = self.fusion(torch.cat([words, self.cls.expand(len(words), -1, -1), patches], dim=1))
        logits: Tensor = self.head(fused[:, 1])  # the word that names the object
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Cross-entropy of one batch."""
        video, text, target = batch
        return F.cross_entropy(self(video, text), target)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Adds a batch to `val_accuracy`."""
        self.val_accuracy(self(*batch[:2]), batch[2])
        self.log("val_accuracy", self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Adds a batch to `test_accuracy`."""
        self.test_accuracy(self(*batch[:2]), batch[2])
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self) -> Any:
        """AdamW with a one-cycle schedule over the steps."""
        return one_cycle(self, self.lr, 0.01)


class FramesQuestionModel(VideoQuestionModel):
    """The same model for frames as they come from a file, which it cuts into patches.

    Args:
        patch_size: Side of a patch in pixels.
        options: Of `VideoQuestionModel`.
    """

    def __init__(self, patch_size: int = 4, **options: Any) -> None:
        super().__init__(3 * patch_size**2, **options)
        self.patch_size = patch_size

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        """Frames (B, T, 3, H, W) and word numbers (B, L) -> logits (B, num_classes)."""
        side = self.patch_size
        tiles = video.unfold(3, side, side).unfold(4, side, side)  # (B, T, 3, rows, columns, side, side)
        return super().forward(tiles.movedim(2, 4).flatten(4).flatten(1, 3), text)

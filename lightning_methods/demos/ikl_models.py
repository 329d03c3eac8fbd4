"""Plain LightningModules, as anyone would have them: teachers and students of the distillation demo.

They know nothing of distillation. What turns a student's training into distillation is a callback.
"""

import timm
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torchmetrics.classification import MulticlassAccuracy

Batch = tuple[Tensor, Tensor]
Optimizers = tuple[list[Optimizer], list[LRScheduler]]


class Classifier(LightningModule):
    """Cross-entropy training and accuracy in percent; subclasses bring `forward` and their optimizer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: Batch) -> Tensor:
        """Cross-entropy of one batch."""
        x, target = batch
        return F.cross_entropy(self(x), target)

    def validation_step(self, batch: Batch) -> None:
        """Adds a batch to `val_accuracy`."""
        x, target = batch
        self.val_accuracy(self(x), target)
        self.log("val_accuracy", self.val_accuracy)

    def test_step(self, batch: Batch) -> None:
        """Adds a batch to `test_accuracy`."""
        x, target = batch
        self.test_accuracy(self(x), target)
        self.log("test_accuracy", self.test_accuracy)


class ResNetTeacher(Classifier):
    """The smallest of timm's ResNets, 0.37 M parameters, on digits enlarged to 24 × 24 and shifted at random.

    Takes images (B, 1, 8, 8).
    """

    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__(num_classes=10)
        self.lr = lr
        self.net = timm.create_model("test_resnet", in_chans=1, num_classes=10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10)."""
        logits: Tensor = self.net(F.interpolate(images, scale_factor=3, mode="bilinear"))
        return logits

    def training_step(self, batch: Batch) -> Tensor:
        """Cross-entropy of one batch, shifted by up to a pixel each way."""
        images, target = batch
        top, left = torch.randint(3, (2,)).tolist()
        shifted = F.pad(images, (1, 1, 1, 1))[..., top : top + 8, left : left + 8]
        return super().training_step((shifted, target))

    def configure_optimizers(self) -> Optimizers:
        """AdamW with a cosine schedule over the epochs."""
        optimizer = AdamW(self.parameters(), lr=self.lr, weight_decay=0.05)
        return [optimizer], [CosineAnnealingLR(optimizer, self.trainer.max_epochs or 1)]


class ConvStudent(Classifier):
    """Two convolutions and a linear layer, 6,090 parameters, for images (B, 1, 8, 8)."""

    def __init__(self, lr: float = 0.005, weight_decay: float = 1.0) -> None:
        super().__init__(num_classes=10)
        self.lr = lr
        self.weight_decay = weight_decay
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10)."""
        logits: Tensor = self.net(images)
        return logits

    def configure_optimizers(self) -> Optimizers:
        """AdamW with a cosine schedule over the epochs."""
        optimizer = AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        return [optimizer], [CosineAnnealingLR(optimizer, self.trainer.max_epochs or 1)]


class MLP(Classifier):
    """Two hidden layers, for inputs (B, features); teacher or student by its width."""

    def __init__(self, width: int, features: int = 32, num_classes: int = 20, lr: float = 0.05) -> None:
        super().__init__(num_classes)
        self.lr = lr
        self.net = nn.Sequential(
            nn.Linear(features, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        logits: Tensor = self.net(x)
        return logits

    def configure_optimizers(self) -> Optimizers:
        """SGD with momentum and a cosine schedule over the epochs."""
        optimizer = SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        return [optimizer], [CosineAnnealingLR(optimizer, self.trainer.max_epochs or 1)]

"""Plain LightningModules, as anyone would have them: a video classifier, and a classifier of single frames.

They know nothing of StillMix. What mixes still frames into the training of the first is a callback.
"""

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_methods.functional import still_video
from lightning_methods.metrics import StaticBiasReport


def conv_net(dims: int, num_classes: int) -> nn.Sequential:
    """Three convolutions of 16, 32 and 64 channels, the mean over pixels and a linear layer; 2-D, or 3-D over time."""
    conv: Any = nn.Conv3d if dims == 3 else nn.Conv2d
    norm: Any = nn.BatchNorm3d if dims == 3 else nn.BatchNorm2d
    pool: Any = nn.AdaptiveAvgPool3d if dims == 3 else nn.AdaptiveAvgPool2d
    widths = (3, 16, 32, 64)
    strides = ((1, 2, 2), (1, 2, 2), (2, 2, 2))
    layers: list[nn.Module] = []
    for before, width, stride in zip(widths, widths[1:], strides, strict=False):
        layers += [conv(before, width, 3, stride[-dims:], padding=1, bias=False), norm(width), nn.ReLU()]
    return nn.Sequential(*layers, pool(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


class _Classifier(LightningModule):
    """A small network, Adam and one cycle of the learning rate; batches are (video (B, 3, T, H, W), target, ...)."""

    def __init__(self, dims: int, num_classes: int, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = conv_net(dims, num_classes)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, K)."""
        logits: Tensor = self.net(inputs)
        return logits

    def inputs(self, video: Tensor) -> Tensor:
        """What the network is fed of a batch of clips."""
        return video

    def training_step(self, batch: Sequence[Tensor]) -> Tensor:
        """Cross-entropy of one batch."""
        video, target, *_ = batch
        return F.cross_entropy(self(self.inputs(video)), target)

    def validation_step(self, batch: Sequence[Tensor]) -> None:
        """Adds a batch to `val_accuracy`."""
        video, target, *_ = batch
        self.val_accuracy(self(self.inputs(video)), target)
        self.log("val_accuracy", self.val_accuracy)

    def configure_optimizers(self) -> Any:
        """Adam, its learning rate up to `lr` and down again over the training."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ClipClassifier(_Classifier):
    """Classifies clips; tests on the sets of `StaticBiasDataModule`.

    Logs NAME/accuracy for each test set, and for SCUBA sets what `StaticBiasReport` says of the pairs.

    Args:
        test_names: Names of the test sets, by the number of their loader.
        scuba_names: Those that are SCUBA sets.
        num_classes: K.
        lr: Largest learning rate.
    """

    def __init__(
        self, test_names: Sequence[str], scuba_names: Sequence[str], num_classes: int = 4, lr: float = 3e-3
    ) -> None:
        super().__init__(3, num_classes, lr)
        self.test_names = tuple(test_names)
        self.report = StaticBiasReport(scuba_names)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """Counts one batch (video, target, index), with the frame of the SCUFO twin if there is one."""
        video, target, _, *frame = batch
        name = self.test_names[dataloader_idx]
        logits = self(video)
        accuracy = (logits.argmax(1) == target).float().mean()
        self.log(f"{name}/accuracy", accuracy, batch_size=len(target), add_dataloader_idx=False)
        if frame:
            self.report.update(name, logits, self(still_video(video, *frame)), target)

    def on_test_epoch_end(self) -> None:
        """Called after all test sets: logs the shares of pairs."""
        self.log_dict(self.report.compute())
        self.report.reset()


class FrameClassifier(_Classifier):
    """Classifies single frames (B, 3, H, W); trains on one frame of each clip, drawn anew in every epoch."""

    def __init__(self, num_classes: int = 4, lr: float = 3e-3) -> None:
        super().__init__(2, num_classes, lr)

    def inputs(self, video: Tensor) -> Tensor:
        """A random frame of each clip."""
        clip = torch.arange(len(video), device=video.device)
        return video[clip, :, torch.randint(video.shape[2], (len(video),), device=video.device)]

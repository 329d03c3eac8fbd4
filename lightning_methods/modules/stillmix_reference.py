"""StillMix's reference network: it sees single frames only, so what it recognises is static."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_methods.attach._lightning import package
from lightning_methods.functional._logits import check_positive

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule
else:
    LightningModule = package().LightningModule


class SingleFrameClassifier(LightningModule):
    """Trains a 2-D network by cross-entropy on single frames, with the authors' optimizer and schedule.

    Their recipe (from their code): one frame of each video an epoch, drawn uniformly; ImageNet weights to start with;
    SGD without momentum, 50 epochs, learning rate divided by 10 after epochs 20 and 40. The network is the 2-D twin of
    the video network: ResNet-50 for TSM (lr 0.04, batch 256), Swin-T for Video Swin (lr 0.01, batch 64).

    Args:
        model: Takes normalised frames (B, C, H, W) and returns logits (B, K); or the name of one in timm.
        num_classes: K, for a name.
        pretrained: For a name: start from ImageNet weights, which timm downloads; or a file of weights, of which all
            but the last layer are used.
        lr: Learning rate.
        weight_decay: Weight decay.
        milestones: Epochs after which the learning rate is divided by 10.
        mean: With `std` normalises frames that come as uint8, for values in [0, 1]; ImageNet's by default. Floating
            frames are taken as normalised.
        std: Likewise.

    Raises:
        ValueError: If an argument is out of its range, or a name comes without a number of classes.

    Example:
        >>> SingleFrameClassifier("test_resnet", num_classes=4, pretrained=False)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 4])
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        model: nn.Module | str,
        num_classes: int | None = None,
        *,
        pretrained: bool | str | Path = True,
        lr: float = 0.04,
        weight_decay: float = 1e-5,
        milestones: Sequence[int] = (20, 40),
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        check_positive(lr=lr)
        if isinstance(model, str):
            if num_classes is None:
                raise ValueError(f"`num_classes` is missing: the network {model!r} of timm is made for so many")
            model = _network(model, num_classes, pretrained)
        self.model: nn.Module = model
        self.lr = lr
        self.weight_decay = weight_decay
        self.milestones = tuple(milestones)
        for name, values in (("_mean", mean), ("_std", std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        """Logits (B, K) of frames (B, C, H, W)."""
        if frames.dtype == torch.uint8:
            frames = (frames / 255 - self._mean) / self._std
        logits: Tensor = self.model(frames)
        return logits

    def training_step(self, batch: Sequence[Any]) -> Tensor:
        """Cross-entropy of a batch (frames, targets, ...)."""
        frames, targets, *_ = batch
        loss = F.cross_entropy(self(frames), targets)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """SGD without momentum, and the steps of the learning rate."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, list(self.milestones))]


def _network(name: str, num_classes: int, pretrained: bool | str | Path) -> nn.Module:
    import timm

    file = None if isinstance(pretrained, bool) else {"file": str(pretrained)}
    network: nn.Module = timm.create_model(
        name, pretrained=bool(pretrained), num_classes=num_classes, pretrained_cfg_overlay=file
    )
    return network

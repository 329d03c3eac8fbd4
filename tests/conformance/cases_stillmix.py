"""Cases of StillMix and of the augmentations that it is compared with: clips of two frames."""

from __future__ import annotations

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods.callbacks import StillMix, VideoAugment
from lightning_methods.modules import ActorCutMix, Fame, FrameBank, FrameBankSpec, FrameScores, VideoMixup
from lightning_methods.testing import Case

CLASSES = 3


class ClipClassifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(96, CLASSES))

    def forward(self, videos: Tensor) -> Tensor:
        return self.net(videos)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def case(method: StillMix | VideoAugment) -> Case:
    torch.manual_seed(0)
    videos = torch.rand(8, 3, 2, 4, 4)
    return Case(method, ClipClassifier(), [videos, torch.arange(8) % CLASSES, videos[:, 0] > 0.5])


FRAMES = {f"clip{number}/img_{number}.png": torch.full((3, 4, 4), 8 * number, dtype=torch.uint8) for number in range(9)}


def read(key: str) -> tuple[Tensor, int]:
    return FRAMES[key], int(key[-5]) % CLASSES


class Reader:
    """Gives frames by key; can be named in a YAML file."""

    def __init__(self, scale: int = 8) -> None:
        self.scale = scale

    def __call__(self, key: str) -> Tensor:
        return FRAMES[key] // 8 * self.scale

    def __repr__(self) -> str:
        return f"Reader(scale={self.scale})"


def recipe() -> FrameBankSpec:
    probs = torch.linspace(0.1, 0.9, len(FRAMES))
    return FrameBankSpec(FrameScores(list(FRAMES), probs, probs), read, size=4, bank_size=3, low=0.2)


def bank() -> FrameBank:
    return FrameBank(torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)))


STILLMIX = {
    "StillMix": lambda: case(StillMix(bank(), alpha=2.0, beta=2.0)),
    "StillMix-recipe": lambda: case(
        StillMix(recipe(), refresh_every_n_epochs=1, label_weight=0.5, num_classes=CLASSES, p=1.0)
    ),
    "StillMix-batch": lambda: case(StillMix(source="batch", layout="btchw", per_sample_lam=True)),
    "VideoAugment": lambda: case(VideoAugment(VideoMixup(num_classes=CLASSES))),
    "VideoAugment-fame": lambda: case(VideoAugment(Fame(p=0.75))),
    "VideoAugment-masks": lambda: case(VideoAugment(ActorCutMix(num_classes=CLASSES), masks="batch.2")),
}

STILLMIX_YAML = {
    "StillMix": {
        "bank": {
            "class_path": "lightning_methods.modules.FrameBankSpec",
            "init_args": {
                "scores": "scores.npz",
                "reader": {"class_path": "conformance.cases_stillmix.Reader", "init_args": {"scale": 2}},
                "size": [4, 6],
                "mean": [0.4, 0.5, 0.6],
                "std": 0.2,
                "low": 0.25,
            },
        },
        "video": "batch.clip",
        "target": "batch.label",
        "layout": "btchw",
        "alpha": 20.0,
        "beta": 60.0,
        "p": 0.25,
        "label_weight": 0.5,
        "num_classes": 4,
        "refresh_every_n_epochs": 2,
        "start_epoch": 1,
        "resize": True,
        "seed": 7,
        "log": "epoch",
    },
    "VideoAugment": {
        "module": {
            "class_path": "lightning_methods.modules.VideoMixup",
            "init_args": {"p": 0.5, "num_classes": 4},
        },
        "video": "batch.clip",
        "target": "batch.label",
        "seed": 7,
    },
}

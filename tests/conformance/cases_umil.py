"""UMIL's cases: a detector on bags of features, and a method that has divided their snippets before the run begins."""

from __future__ import annotations

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods.callbacks import UMIL
from lightning_methods.modules import SnippetDivision
from lightning_methods.testing import Case

BAGS, SNIPPETS, WIDTH = 8, 4, 6


class Detector(LightningModule):
    """Max-pooled MIL with one logit a snippet."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 10), nn.Tanh())
        self.head = nn.Linear(10, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.encoder(features))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self(batch["features"]).squeeze(-1)
        return F.binary_cross_entropy_with_logits(logits.amax(1), batch["label"].to(logits.dtype))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class TwoViews(Detector):
    """Also puts the second view through."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + 0.1 * self(batch["features_strong"]).square().mean()


def bags() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(BAGS, SNIPPETS, WIDTH, generator=generator)
    return {
        "features": features,
        "features_strong": features + 0.3 * torch.randn(features.shape, generator=generator),
        "label": torch.arange(BAGS) % 2,
        "vid": torch.arange(BAGS),
        "frame": 10 * torch.arange(SNIPPETS).repeat(BAGS, 1) + torch.arange(BAGS)[:, None],
        "frames": torch.full((BAGS,), 10 * SNIPPETS + BAGS),
    }


def divided(method: UMIL) -> UMIL:
    """The method as a run of two epochs leaves it."""
    division = SnippetDivision(torch.full((BAGS,), SNIPPETS), ratio=0.5)
    generator = torch.Generator().manual_seed(1)
    cells = torch.arange(SNIPPETS).expand(BAGS, -1)
    for _ in range(2):
        scores = torch.rand(BAGS, SNIPPETS, generator=generator)
        division.update(torch.arange(BAGS), cells, scores, torch.arange(BAGS) % 2)
        division.end_epoch()
    method.load_state_dict({"helpers": {}, "open_epoch": None, "division": division.shared_state()})
    return method


def umil(module: type[Detector], **settings: object) -> Case:
    torch.manual_seed(0)
    given = {"in_features": 10, "features": "module.head@input", "num_videos": BAGS, "ratio": 0.5, "start_epoch": 0}
    return Case(divided(UMIL(**{**given, "similarity_threshold": 0.2, **settings})), module(), bags())


UMIL_CASES = {
    "UMIL": lambda: umil(Detector, gather=True, weight_variance=0.5, ramp_epochs=2),
    "UMIL-pass": lambda: umil(Detector, history="pass", update="heads", head="module.head", cluster_head="cosine"),
    "UMIL-views": lambda: umil(
        TwoViews,
        features="module.head@input#0",
        logits="module.head#0",
        strong_features="module.head@input#1",
        strong_logits="module.head#1",
        frame_index="batch.frame",
        total_frames="batch.frames",
        add_detector_terms=True,
        threshold=0.5,
        gather=True,
        weight_by_confidence=True,
    ),
}

UMIL_YAML = {
    "features": "module.head@input",
    "logits": "module.head",
    "bag_labels": "batch.1",
    "bag_ids": "batch.2",
    "in_features": 10,
    "frame_index": "batch.frame",
    "total_frames": "batch.frames",
    "num_videos": 2,
    "cells_per_video": [4, 5],
    "start_epoch": 30,
    "history": "pass",
    "inputs": "batch.0",
    "ramp_epochs": 2,
    "weight_variance": 0.5,
    "weight_smooth": 0.5,
    "add_detector_terms": True,
    "similarity_threshold": 0.5,
    "log": "epoch",
}

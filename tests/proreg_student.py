"""What ProReg's tests share: a module, its data, a `fit`, and the objective written out by hand."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods.callbacks import ProReg
from lightning_methods.testing._case import Batches

K, D = 4, 5
_GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 6, generator=_GENERATOR, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 3] * 3)
PROMPTS = 2 * torch.randn(12, K, generator=_GENERATOR, dtype=torch.float64) + 2 * F.one_hot(Y, K)
TEXT = torch.randn(K, D, generator=_GENERATOR, dtype=torch.float64)
ROWS = [slice(6), slice(6, 12)]
SCALE = 4.0


def batches(target: Tensor = Y) -> list[dict[str, Tensor]]:
    return [{"image": X[rows], "label": target[rows], "prompt_logits": PROMPTS[rows]} for rows in ROWS]


class Student(LightningModule):
    """An encoder under a cosine head that begins as the text features."""

    def __init__(self, penalty: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.visual = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, D)).double()
        self.head = nn.Parameter(TEXT.clone())
        self.penalty = penalty

    def forward(self, x: Tensor) -> Tensor:
        return SCALE * F.normalize(self.visual(x), dim=1) @ F.normalize(self.head, dim=1).T

    def own_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.numel() == len(target):
            target = target.flatten().long()
        return F.cross_entropy(logits, target) + self.penalty * self.head.square().sum()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.own_loss(self(batch["image"]), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def proreg(**settings: Any) -> ProReg:
    if "snapshot" not in settings:
        settings = {"prompt": "batch.prompt_logits", **settings}
    return ProReg(**{"target": "batch.label", **settings})


QUIET = {
    "max_epochs": 2,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}


def fit(method: Any, module: Any = None, data: Any = None, **settings: Any) -> Any:
    """Fits for two epochs; anything but Lightning's own advice is an error."""
    trainer = Trainer(**{**QUIET, "callbacks": [method] if method else [], **settings.pop("trainer", {})})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ProReg")
        trainer.fit(module or Student(), Batches(batches() if data is None else data), **settings)
    return trainer


def plain_loss(
    logits: Tensor, prompts: Tensor, target: Tensor, weighting: str, alpha: float, temperature: float
) -> Tensor:
    """The objective, one sample at a time, with torch's own losses."""
    total: Any = 0.0
    for z, m, y in zip(logits, prompts.detach(), target, strict=True):
        ce, pe = F.cross_entropy(z, y), F.cross_entropy(m, y)
        p, q = (-ce).exp().item(), (-pe).exp().item()
        w = {
            "probability": q / (p + q + 1e-5),
            "loss": ce.item() / (ce.item() + pe.item() + 1e-5),
            "constant": 0.5,
        }[weighting]
        kl = temperature**2 * F.cross_entropy(z / temperature, (m / temperature).softmax(0))
        total = total + (1 - w) * ce + alpha * w * kl
    return total / len(logits)


def by_hand(prompts_of: Any, weighting: str = "probability", alpha: float = 1.0, temperature: float = 1.0) -> Student:
    module = Student()
    optimizer = module.configure_optimizers()
    for _ in range(2):
        for rows in ROWS:
            loss = plain_loss(module(X[rows]), prompts_of(rows), Y[rows], weighting, alpha, temperature)
            loss = loss + module.penalty * module.head.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return module


def assert_same(first: nn.Module, second: nn.Module, **tolerance: float) -> None:
    for (name, value), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, msg=lambda text, name=name: f"{name}: {text}", **tolerance)

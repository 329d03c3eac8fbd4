"""One case for each exported callback: a module that knows nothing of the package, a method, a batch."""

from __future__ import annotations

import torch
from conformance import cases_acf, cases_twbert
from conformance.cases_eqsim import EQSIM_CASES, EQSIM_YAML
from conformance.cases_proreg import PROREG_CASES, PROREG_YAML
from conformance.cases_stillmix import STILLMIX, STILLMIX_YAML
from conformance.cases_umil import UMIL_CASES, UMIL_YAML
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_methods.attach import Method, Step, address
from lightning_methods.callbacks import IKLDistillation
from lightning_methods.testing import Case


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def classification() -> tuple[Classifier, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Classifier(), (torch.randn(8, 6), torch.arange(8) % 5)


def ikl(**settings: object) -> Case:
    module, batch = classification()
    teacher = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    return Case(IKLDistillation(teacher, **settings), module, batch)


CASES = {
    **EQSIM_CASES,
    **UMIL_CASES,
    "IKLDistillation": lambda: ikl(wmse_weight=2.0, temperature=2.0, warmup_epochs=2),
    "IKLDistillation-gkl": lambda: ikl(variant="gkl", gamma=0.5, class_wise=False),
    "IKLDistillation-dkl": lambda: ikl(variant="dkl", student_logits="module.net"),
    **cases_acf.CASES,
    **cases_twbert.CASES,
    **PROREG_CASES,
    **STILLMIX,
}

#: Arguments for each exported callback as a YAML file would give them, other than the defaults.
YAML = {
    "EqSim": EQSIM_YAML,
    "UMIL": UMIL_YAML,
    "IKLDistillation": {
        "teacher": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 6, "out_features": 5}},
        "inputs": "batch.image",
        "target": "batch.targets.label",
        "student_logits": "module.net:0",
        "variant": "gkl",
        "gamma": 0.5,
        "wmse_weight": 4.0,
        "warmup_epochs": 3.0,
        "log": "epoch",
    },
    **cases_acf.YAML,
    **cases_twbert.YAML,
    "ProReg": PROREG_YAML,
    **STILLMIX_YAML,
}


class Penalty(Method):
    """The smallest method: an L2 penalty on what the module returns."""

    def __init__(self) -> None:
        super().__init__(name="penalty", weights={"square": 0.1})
        self.values = address("module")

    def losses(self, step: Step) -> dict[str, Tensor]:
        return {"square": step[self.values].square().mean()}

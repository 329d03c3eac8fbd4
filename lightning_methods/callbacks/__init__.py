"""Methods as Lightning callbacks: add one to `Trainer(callbacks=[...])`."""

from lightning_methods.callbacks.acf import (
    AdaClustFormer,
)
from lightning_methods.callbacks.eqsim import (
    EqSim,
)
from lightning_methods.callbacks.ikl import (
    IKLDistillation,
)
from lightning_methods.callbacks.twbert import (
    AlignBeforeFuse,
    TrajectoryWordAlignment,
)

__all__ = [
    "AdaClustFormer",
    "AlignBeforeFuse",
    "EqSim",
    "IKLDistillation",
    "TrajectoryWordAlignment",
]

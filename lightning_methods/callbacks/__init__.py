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
from lightning_methods.callbacks.proreg import (
    ProReg,
)
from lightning_methods.callbacks.stillmix import (
    StillMix,
    VideoAugment,
)
from lightning_methods.callbacks.twbert import (
    AlignBeforeFuse,
    TrajectoryWordAlignment,
)
from lightning_methods.callbacks.umil import (
    UMIL,
)

__all__ = [
    "UMIL",
    "AdaClustFormer",
    "AlignBeforeFuse",
    "EqSim",
    "IKLDistillation",
    "ProReg",
    "StillMix",
    "TrajectoryWordAlignment",
    "VideoAugment",
]

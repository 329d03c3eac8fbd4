"""Methods as Lightning callbacks: add one to `Trainer(callbacks=[...])`."""

from lightning_methods.callbacks.ikl import IKLDistillation
from lightning_methods.callbacks.proreg import ProReg

__all__ = ["IKLDistillation", "ProReg"]

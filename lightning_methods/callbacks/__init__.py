"""Methods as Lightning callbacks: add one to `Trainer(callbacks=[...])`."""

from lightning_methods.callbacks.ikl import IKLDistillation
from lightning_methods.callbacks.umil import UMIL

__all__ = ["UMIL", "IKLDistillation"]

"""Methods as Lightning callbacks: add one to `Trainer(callbacks=[...])`."""

from lightning_methods.callbacks.eqsim import EqSim
from lightning_methods.callbacks.ikl import IKLDistillation

__all__ = ["EqSim", "IKLDistillation"]

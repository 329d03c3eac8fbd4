"""Methods as Lightning callbacks: add one to `Trainer(callbacks=[...])`."""

from lightning_methods.callbacks.ikl import IKLDistillation
from lightning_methods.callbacks.twbert import AlignBeforeFuse

__all__ = ["AlignBeforeFuse", "IKLDistillation"]

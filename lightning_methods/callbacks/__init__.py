"""Methods as Lightning callbacks: add one to `Trainer(callbacks=[...])`."""

from lightning_methods.callbacks.ikl import IKLDistillation
from lightning_methods.callbacks.stillmix import StillMix, VideoAugment

__all__ = ["IKLDistillation", "StillMix", "VideoAugment"]

"""Modules that own parameters, buffers or hyperparameters of a method."""

from lightning_methods.modules.eqsim import EqSimLoss
from lightning_methods.modules.ikl import IKLLoss

__all__ = ["EqSimLoss", "IKLLoss"]

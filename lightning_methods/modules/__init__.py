"""Modules that own parameters, buffers or hyperparameters of a method."""

from lightning_methods.modules.ikl import IKLLoss
from lightning_methods.modules.umil import ClusterHead, SnippetHistory

__all__ = ["ClusterHead", "IKLLoss", "SnippetHistory"]

"""Modules that own parameters, buffers or hyperparameters of a method."""

from lightning_methods.modules.ikl import IKLLoss
from lightning_methods.modules.umil import ClusterHead, SnippetHistory
from lightning_methods.modules.umil_division import DivisionFigures, SnippetDivision

__all__ = ["ClusterHead", "DivisionFigures", "IKLLoss", "SnippetDivision", "SnippetHistory"]

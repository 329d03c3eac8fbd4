"""Modules that own parameters, buffers or hyperparameters of a method."""

from lightning_methods.modules.ikl import IKLLoss
from lightning_methods.modules.proreg import PromptClassifier, PromptTeacher, ProRegLoss, prompt_param_groups

__all__ = ["IKLLoss", "ProRegLoss", "PromptClassifier", "PromptTeacher", "prompt_param_groups"]

"""Modules that own parameters, buffers or hyperparameters of a method.

`SingleFrameClassifier` is imported when it is first used: the others need no Lightning.
"""

from typing import TYPE_CHECKING, Any

from lightning_methods.modules.ikl import IKLLoss
from lightning_methods.modules.stillmix import StillMixAugment, VideoAugmentation
from lightning_methods.modules.stillmix_bank import FrameBank, FrameBankSpec
from lightning_methods.modules.stillmix_baselines import ActorCutMix, BackgroundErase, Fame, VideoMix, VideoMixup
from lightning_methods.modules.stillmix_scores import (
    FrameScores,
    load_frame_scores,
    save_frame_scores,
    score_frames,
)

if TYPE_CHECKING:
    from lightning_methods.modules.stillmix_reference import SingleFrameClassifier

__all__ = [
    "ActorCutMix",
    "BackgroundErase",
    "Fame",
    "FrameBank",
    "FrameBankSpec",
    "FrameScores",
    "IKLLoss",
    "SingleFrameClassifier",
    "StillMixAugment",
    "VideoAugmentation",
    "VideoMix",
    "VideoMixup",
    "load_frame_scores",
    "save_frame_scores",
    "score_frames",
]


def __getattr__(name: str) -> Any:
    if name != "SingleFrameClassifier":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    from lightning_methods.modules.stillmix_reference import SingleFrameClassifier

    return SingleFrameClassifier

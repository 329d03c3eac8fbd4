"""Modules that own parameters, buffers or hyperparameters of a method."""

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

__all__ = [
    "ActorCutMix",
    "BackgroundErase",
    "Fame",
    "FrameBank",
    "FrameBankSpec",
    "FrameScores",
    "IKLLoss",
    "StillMixAugment",
    "VideoAugmentation",
    "VideoMix",
    "VideoMixup",
    "load_frame_scores",
    "save_frame_scores",
    "score_frames",
]

"""Modules that own parameters, buffers or hyperparameters of a method.

`SingleFrameClassifier` is imported when it is first used: the others need no Lightning.
"""

from typing import TYPE_CHECKING, Any

from lightning_methods.modules.acf import (
    AnnotatedLayerNorm,
    ClusterLayer,
    ClusterSource,
    ClusterState,
    GridCluster,
    SpanCluster,
)
from lightning_methods.modules.acf_attention import (
    AdaClusterAttention,
    TimmAdaClusterAttention,
)
from lightning_methods.modules.acf_captioner import (
    ACFCaptioner,
    ACFDecoder,
    ACFEncoder,
    ACFLayer,
    Captions,
)
from lightning_methods.modules.acf_self_critical import (
    SelfCriticalLoss,
    SelfCriticalTerms,
    WritesCaptions,
)
from lightning_methods.modules.eqsim import (
    EqSimLoss,
)
from lightning_methods.modules.ikl import (
    IKLLoss,
)
from lightning_methods.modules.proreg import (
    PromptClassifier,
    PromptTeacher,
    ProRegLoss,
    prompt_param_groups,
)
from lightning_methods.modules.stillmix import (
    StillMixAugment,
    VideoAugmentation,
)
from lightning_methods.modules.stillmix_bank import (
    FrameBank,
    FrameBankSpec,
)
from lightning_methods.modules.stillmix_baselines import (
    ActorCutMix,
    BackgroundErase,
    Fame,
    VideoMix,
    VideoMixup,
)
from lightning_methods.modules.stillmix_scores import (
    FrameScores,
    load_frame_scores,
    save_frame_scores,
    score_frames,
)
from lightning_methods.modules.twbert import (
    HierarchicalFrameSelector,
    TrajectoryWordAttention,
    TrajectoryWordEncoder,
    TrajectoryWordLayer,
)
from lightning_methods.modules.twbert_dropin import (
    TimmTrajectoryWordAttention,
    TrajectoryWordSelfAttention,
)
from lightning_methods.modules.twbert_pairs import (
    MomentumQueue,
    VideoTextMatcher,
)
from lightning_methods.modules.umil import (
    ClusterHead,
    SnippetHistory,
)
from lightning_methods.modules.umil_division import (
    DivisionFigures,
    SnippetDivision,
)

if TYPE_CHECKING:
    from lightning_methods.modules.stillmix_reference import (
        SingleFrameClassifier,
    )

__all__ = [
    "ACFCaptioner",
    "ACFDecoder",
    "ACFEncoder",
    "ACFLayer",
    "ActorCutMix",
    "AdaClusterAttention",
    "AnnotatedLayerNorm",
    "BackgroundErase",
    "Captions",
    "ClusterHead",
    "ClusterLayer",
    "ClusterSource",
    "ClusterState",
    "DivisionFigures",
    "EqSimLoss",
    "Fame",
    "FrameBank",
    "FrameBankSpec",
    "FrameScores",
    "GridCluster",
    "HierarchicalFrameSelector",
    "IKLLoss",
    "MomentumQueue",
    "ProRegLoss",
    "PromptClassifier",
    "PromptTeacher",
    "SelfCriticalLoss",
    "SelfCriticalTerms",
    "SingleFrameClassifier",
    "SnippetDivision",
    "SnippetHistory",
    "SpanCluster",
    "StillMixAugment",
    "TimmAdaClusterAttention",
    "TimmTrajectoryWordAttention",
    "TrajectoryWordAttention",
    "TrajectoryWordEncoder",
    "TrajectoryWordLayer",
    "TrajectoryWordSelfAttention",
    "VideoAugmentation",
    "VideoMix",
    "VideoMixup",
    "VideoTextMatcher",
    "WritesCaptions",
    "load_frame_scores",
    "prompt_param_groups",
    "save_frame_scores",
    "score_frames",
]


def __getattr__(name: str) -> Any:
    if name != "SingleFrameClassifier":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    from lightning_methods.modules.stillmix_reference import SingleFrameClassifier

    return SingleFrameClassifier

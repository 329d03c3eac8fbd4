"""Modules that own parameters, buffers or hyperparameters of a method."""

from lightning_methods.modules.acf import (
    AnnotatedLayerNorm,
    ClusterLayer,
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
from lightning_methods.modules.twbert import (
    HierarchicalFrameSelector,
    MomentumQueue,
    TrajectoryWordAttention,
    TrajectoryWordEncoder,
    TrajectoryWordLayer,
)
from lightning_methods.modules.twbert_dropin import (
    TimmTrajectoryWordAttention,
    TrajectoryWordSelfAttention,
)
from lightning_methods.modules.umil import (
    ClusterHead,
    SnippetHistory,
)
from lightning_methods.modules.umil_division import (
    DivisionFigures,
    SnippetDivision,
)

__all__ = [
    "ACFCaptioner",
    "ACFDecoder",
    "ACFEncoder",
    "ACFLayer",
    "AdaClusterAttention",
    "AnnotatedLayerNorm",
    "Captions",
    "ClusterHead",
    "ClusterLayer",
    "ClusterState",
    "DivisionFigures",
    "EqSimLoss",
    "GridCluster",
    "HierarchicalFrameSelector",
    "IKLLoss",
    "MomentumQueue",
    "ProRegLoss",
    "PromptClassifier",
    "PromptTeacher",
    "SnippetDivision",
    "SnippetHistory",
    "SpanCluster",
    "TimmAdaClusterAttention",
    "TimmTrajectoryWordAttention",
    "TrajectoryWordAttention",
    "TrajectoryWordEncoder",
    "TrajectoryWordLayer",
    "TrajectoryWordSelfAttention",
    "prompt_param_groups",
]

"""Metrics of the methods: torchmetrics classes whose states merge over ranks."""

from lightning_methods.metrics.acf import (
    CaptionBLEU,
    CiderD,
)
from lightning_methods.metrics.eqsim import (
    EqBenScore,
    EquivarianceGap,
    FoilScore,
    PairGroupScore,
    RetrievalRecall,
)
from lightning_methods.metrics.ikl import (
    ClassMargin,
    ShotAccuracy,
    ShotScores,
    TeacherAgreement,
)
from lightning_methods.metrics.twbert import (
    TextVideoRecall,
    TwoStageRecall,
)
from lightning_methods.metrics.umil import (
    FrameLevelAUROC,
    FrameLevelAveragePrecision,
    FrameLevelFalseAlarmRate,
)

__all__ = [
    "CaptionBLEU",
    "CiderD",
    "ClassMargin",
    "EqBenScore",
    "EquivarianceGap",
    "FoilScore",
    "FrameLevelAUROC",
    "FrameLevelAveragePrecision",
    "FrameLevelFalseAlarmRate",
    "PairGroupScore",
    "RetrievalRecall",
    "ShotAccuracy",
    "ShotScores",
    "TeacherAgreement",
    "TextVideoRecall",
    "TwoStageRecall",
]

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
from lightning_methods.metrics.proreg import (
    GroupAccuracies,
    GroupAccuracy,
    ShiftAccuracy,
    ShiftScores,
)
from lightning_methods.metrics.stillmix import (
    ContrastedAccuracy,
    MeanClassAccuracy,
    PairedContrastedAccuracy,
    StaticBiasReport,
)
from lightning_methods.metrics.twbert import (
    AnswerAccuracy,
    TextVideoRecall,
    TwoStageRecall,
)
from lightning_methods.metrics.umil import (
    FrameLevelAUROC,
    FrameLevelAveragePrecision,
    FrameLevelFalseAlarmRate,
)

__all__ = [
    "AnswerAccuracy",
    "CaptionBLEU",
    "CiderD",
    "ClassMargin",
    "ContrastedAccuracy",
    "EqBenScore",
    "EquivarianceGap",
    "FoilScore",
    "FrameLevelAUROC",
    "FrameLevelAveragePrecision",
    "FrameLevelFalseAlarmRate",
    "GroupAccuracies",
    "GroupAccuracy",
    "MeanClassAccuracy",
    "PairGroupScore",
    "PairedContrastedAccuracy",
    "RetrievalRecall",
    "ShiftAccuracy",
    "ShiftScores",
    "ShotAccuracy",
    "ShotScores",
    "StaticBiasReport",
    "TeacherAgreement",
    "TextVideoRecall",
    "TwoStageRecall",
]

"""Metrics of the methods: torchmetrics classes whose states merge over ranks."""

from lightning_methods.metrics.acf import CaptionBLEU, CiderD
from lightning_methods.metrics.ikl import ClassMargin, ShotAccuracy, ShotScores, TeacherAgreement
from lightning_methods.metrics.twbert import TextVideoRecall, TwoStageRecall

__all__ = [
    "CaptionBLEU",
    "CiderD",
    "ClassMargin",
    "ShotAccuracy",
    "ShotScores",
    "TeacherAgreement",
    "TextVideoRecall",
    "TwoStageRecall",
]

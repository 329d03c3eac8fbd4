"""Metrics of the methods: torchmetrics classes whose states merge over ranks."""

from lightning_methods.metrics.ikl import ClassMargin, ShotAccuracy, ShotScores, TeacherAgreement
from lightning_methods.metrics.umil import FrameLevelAUROC, FrameLevelAveragePrecision, FrameLevelFalseAlarmRate

__all__ = [
    "ClassMargin",
    "FrameLevelAUROC",
    "FrameLevelAveragePrecision",
    "FrameLevelFalseAlarmRate",
    "ShotAccuracy",
    "ShotScores",
    "TeacherAgreement",
]

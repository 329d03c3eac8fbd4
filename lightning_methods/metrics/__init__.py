"""Metrics of the methods: torchmetrics classes whose states merge over ranks."""

from lightning_methods.metrics.ikl import ClassMargin, ShotAccuracy, ShotScores, TeacherAgreement
from lightning_methods.metrics.proreg import GroupAccuracies, GroupAccuracy, ShiftAccuracy, ShiftScores

__all__ = [
    "ClassMargin",
    "GroupAccuracies",
    "GroupAccuracy",
    "ShiftAccuracy",
    "ShiftScores",
    "ShotAccuracy",
    "ShotScores",
    "TeacherAgreement",
]

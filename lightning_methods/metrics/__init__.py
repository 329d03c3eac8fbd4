"""Metrics of the methods: torchmetrics classes whose states merge over ranks."""

from lightning_methods.metrics.ikl import ClassMargin, ShotAccuracy, ShotScores, TeacherAgreement
from lightning_methods.metrics.stillmix import (
    ContrastedAccuracy,
    MeanClassAccuracy,
    PairedContrastedAccuracy,
    StaticBiasReport,
)

__all__ = [
    "ClassMargin",
    "ContrastedAccuracy",
    "MeanClassAccuracy",
    "PairedContrastedAccuracy",
    "ShotAccuracy",
    "ShotScores",
    "StaticBiasReport",
    "TeacherAgreement",
]

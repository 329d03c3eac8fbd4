"""Metrics of the methods: torchmetrics classes whose states merge over ranks."""

from lightning_methods.metrics.eqsim import EqBenScore, EquivarianceGap, FoilScore, PairGroupScore, RetrievalRecall
from lightning_methods.metrics.ikl import ClassMargin, ShotAccuracy, ShotScores, TeacherAgreement

__all__ = [
    "ClassMargin",
    "EqBenScore",
    "EquivarianceGap",
    "FoilScore",
    "PairGroupScore",
    "RetrievalRecall",
    "ShotAccuracy",
    "ShotScores",
    "TeacherAgreement",
]

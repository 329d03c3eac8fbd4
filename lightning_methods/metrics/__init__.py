"""Metrics of the methods: torchmetrics classes whose states merge over ranks."""

from lightning_methods.metrics.ikl import ClassMargin, ShotAccuracy, ShotScores, TeacherAgreement

__all__ = ["ClassMargin", "ShotAccuracy", "ShotScores", "TeacherAgreement"]

"""LightningDataModules for the benchmarks' own on-disk layouts and for the small worlds of the demos.

Each name is imported when it is first used, so that `import lightning_methods.datamodules` loads neither
timm nor kornia.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_methods.datamodules.ikl import (
        CIFAR100DistillDataModule,
        ImageNetDataModule,
        ImageNetLTDataModule,
    )
    from lightning_methods.datamodules.ikl_worlds import DigitsDataModule, SuperclassDataModule
    from lightning_methods.datamodules.stillmix import StaticBiasDataModule, VideoListDataModule, VideoSource
    from lightning_methods.datamodules.stillmix_frames import VideoFrameReader
    from lightning_methods.datamodules.stillmix_scuba import build_scuba, build_scufo
    from lightning_methods.datamodules.stillmix_worlds import MovingShapesDataModule

__all__ = [
    "CIFAR100DistillDataModule",
    "DigitsDataModule",
    "ImageNetDataModule",
    "ImageNetLTDataModule",
    "MovingShapesDataModule",
    "StaticBiasDataModule",
    "SuperclassDataModule",
    "VideoFrameReader",
    "VideoListDataModule",
    "VideoSource",
    "build_scuba",
    "build_scufo",
]

_FILES = {
    "CIFAR100DistillDataModule": "ikl",
    "DigitsDataModule": "ikl_worlds",
    "ImageNetDataModule": "ikl",
    "ImageNetLTDataModule": "ikl",
    "MovingShapesDataModule": "stillmix_worlds",
    "StaticBiasDataModule": "stillmix",
    "SuperclassDataModule": "ikl_worlds",
    "VideoFrameReader": "stillmix_frames",
    "VideoListDataModule": "stillmix",
    "VideoSource": "stillmix",
    "build_scuba": "stillmix_scuba",
    "build_scufo": "stillmix_scuba",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

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
    from lightning_methods.datamodules.umil import (
        SnippetFeatureDataModule,
        TADDataModule,
        UCFCrimeDataModule,
        VideoRecord,
        read_temporal_annotations,
        read_wsvad_list,
    )
    from lightning_methods.datamodules.umil_worlds import SyntheticBiasedBagsDataModule

__all__ = [
    "CIFAR100DistillDataModule",
    "DigitsDataModule",
    "ImageNetDataModule",
    "ImageNetLTDataModule",
    "SnippetFeatureDataModule",
    "SuperclassDataModule",
    "SyntheticBiasedBagsDataModule",
    "TADDataModule",
    "UCFCrimeDataModule",
    "VideoRecord",
    "read_temporal_annotations",
    "read_wsvad_list",
]

_FILES = {
    "CIFAR100DistillDataModule": "ikl",
    "DigitsDataModule": "ikl_worlds",
    "ImageNetDataModule": "ikl",
    "ImageNetLTDataModule": "ikl",
    "SnippetFeatureDataModule": "umil",
    "SuperclassDataModule": "ikl_worlds",
    "SyntheticBiasedBagsDataModule": "umil_worlds",
    "TADDataModule": "umil",
    "UCFCrimeDataModule": "umil",
    "VideoRecord": "umil",
    "read_temporal_annotations": "umil",
    "read_wsvad_list": "umil",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

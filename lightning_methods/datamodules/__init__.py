"""LightningDataModules for the benchmarks' own on-disk layouts and for the small worlds of the demos.

Each name is imported when it is first used, so that `import lightning_methods.datamodules` loads neither
timm nor kornia.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_methods.datamodules._clips import (
        load_clip,
    )
    from lightning_methods.datamodules.acf import (
        CocoCaptionDataModule,
    )
    from lightning_methods.datamodules.acf_worlds import (
        PhrasesDataModule,
    )
    from lightning_methods.datamodules.eqsim import (
        EqBenDataModule,
        RetrievalDataModule,
        ValseDataModule,
        WinogroundDataModule,
    )
    from lightning_methods.datamodules.eqsim_scenes import (
        SyntheticEqBen,
        SyntheticEqBenDataModule,
    )
    from lightning_methods.datamodules.eqsim_worlds import (
        MinimalChangeDataModule,
    )
    from lightning_methods.datamodules.ikl import (
        CIFAR100DistillDataModule,
        ImageNetDataModule,
        ImageNetLTDataModule,
    )
    from lightning_methods.datamodules.ikl_worlds import (
        DigitsDataModule,
        SuperclassDataModule,
    )
    from lightning_methods.datamodules.proreg import (
        ArrowClassificationDataModule,
        BARDataModule,
        DomainNetDataModule,
        NICODataModule,
        PACSDataModule,
    )
    from lightning_methods.datamodules.proreg_worlds import (
        BiasedContextsDataModule,
        CaptionedContextsDataModule,
    )
    from lightning_methods.datamodules.stillmix import (
        StaticBiasDataModule,
        VideoListDataModule,
        VideoSource,
    )
    from lightning_methods.datamodules.stillmix_frames import (
        VideoFrameReader,
    )
    from lightning_methods.datamodules.stillmix_scuba import (
        build_scuba,
        build_scufo,
    )
    from lightning_methods.datamodules.stillmix_worlds import (
        MovingShapesDataModule,
    )
    from lightning_methods.datamodules.twbert import (
        VideoQADataModule,
        VideoTextDataModule,
    )
    from lightning_methods.datamodules.twbert_worlds import (
        ObjectStatesDataModule,
        ObjectVideosDataModule,
    )
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
    "ArrowClassificationDataModule",
    "BARDataModule",
    "BiasedContextsDataModule",
    "CIFAR100DistillDataModule",
    "CaptionedContextsDataModule",
    "CocoCaptionDataModule",
    "DigitsDataModule",
    "DomainNetDataModule",
    "EqBenDataModule",
    "ImageNetDataModule",
    "ImageNetLTDataModule",
    "MinimalChangeDataModule",
    "MovingShapesDataModule",
    "NICODataModule",
    "ObjectStatesDataModule",
    "ObjectVideosDataModule",
    "PACSDataModule",
    "PhrasesDataModule",
    "RetrievalDataModule",
    "SnippetFeatureDataModule",
    "StaticBiasDataModule",
    "SuperclassDataModule",
    "SyntheticBiasedBagsDataModule",
    "SyntheticEqBen",
    "SyntheticEqBenDataModule",
    "TADDataModule",
    "UCFCrimeDataModule",
    "ValseDataModule",
    "VideoFrameReader",
    "VideoListDataModule",
    "VideoQADataModule",
    "VideoRecord",
    "VideoSource",
    "VideoTextDataModule",
    "WinogroundDataModule",
    "build_scuba",
    "build_scufo",
    "load_clip",
    "read_temporal_annotations",
    "read_wsvad_list",
]

_FILES = {
    "ArrowClassificationDataModule": "proreg",
    "BARDataModule": "proreg",
    "BiasedContextsDataModule": "proreg_worlds",
    "CIFAR100DistillDataModule": "ikl",
    "CaptionedContextsDataModule": "proreg_worlds",
    "CocoCaptionDataModule": "acf",
    "DigitsDataModule": "ikl_worlds",
    "DomainNetDataModule": "proreg",
    "EqBenDataModule": "eqsim",
    "ImageNetDataModule": "ikl",
    "ImageNetLTDataModule": "ikl",
    "MinimalChangeDataModule": "eqsim_worlds",
    "MovingShapesDataModule": "stillmix_worlds",
    "NICODataModule": "proreg",
    "ObjectStatesDataModule": "twbert_worlds",
    "ObjectVideosDataModule": "twbert_worlds",
    "PACSDataModule": "proreg",
    "PhrasesDataModule": "acf_worlds",
    "RetrievalDataModule": "eqsim",
    "SnippetFeatureDataModule": "umil",
    "StaticBiasDataModule": "stillmix",
    "SuperclassDataModule": "ikl_worlds",
    "SyntheticBiasedBagsDataModule": "umil_worlds",
    "SyntheticEqBen": "eqsim_scenes",
    "SyntheticEqBenDataModule": "eqsim_scenes",
    "TADDataModule": "umil",
    "UCFCrimeDataModule": "umil",
    "ValseDataModule": "eqsim",
    "VideoFrameReader": "stillmix_frames",
    "VideoListDataModule": "stillmix",
    "VideoQADataModule": "twbert",
    "VideoRecord": "umil",
    "VideoSource": "stillmix",
    "VideoTextDataModule": "twbert",
    "WinogroundDataModule": "eqsim",
    "build_scuba": "stillmix_scuba",
    "build_scufo": "stillmix_scuba",
    "load_clip": "_clips",
    "read_temporal_annotations": "umil",
    "read_wsvad_list": "umil",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

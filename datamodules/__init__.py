"""Data sets in their official layouts, and in those that tools export, as Lightning DataModules.

A class is imported when it is first used, so that images need no sentencepiece, and text no OpenCV.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.detection.annotations import Categories as Categories
    from datamodules.detection.coco import COCODataModule as COCODataModule
    from datamodules.detection.datamodule import (
        DetectionBatch as DetectionBatch,
    )
    from datamodules.detection.datamodule import (
        DetectionDataModule as DetectionDataModule,
    )
    from datamodules.detection.merged import MergedDetectionDataModule as MergedDetectionDataModule
    from datamodules.detection.transforms import Augmentation as Augmentation
    from datamodules.detection.voc import VOCDetectionDataModule as VOCDetectionDataModule
    from datamodules.detection.yolo import YOLODetectionDataModule as YOLODetectionDataModule
    from datamodules.miniature.detection_datamodule import MiniatureDetectionDataModule as MiniatureDetectionDataModule
    from datamodules.miniature.segmentation_datamodule import (
        MiniatureSegmentationDataModule as MiniatureSegmentationDataModule,
    )
    from datamodules.miniature.street_detection_datamodule import (
        MiniatureStreetDetectionDataModule as MiniatureStreetDetectionDataModule,
    )
    from datamodules.miniature.translation_datamodule import (
        MiniatureTranslationDataModule as MiniatureTranslationDataModule,
    )
    from datamodules.multitask import MultitaskDataModule as MultitaskDataModule
    from datamodules.sampling.joint_batches import JointBatch as JointBatch
    from datamodules.segmentation.cityscapes import CityscapesDataModule as CityscapesDataModule
    from datamodules.segmentation.classes import SegmentationClasses as SegmentationClasses
    from datamodules.segmentation.datamodule import (
        SegmentationBatch as SegmentationBatch,
    )
    from datamodules.segmentation.datamodule import (
        SegmentationDataModule as SegmentationDataModule,
    )
    from datamodules.segmentation.folders import SegmentationFolderDataModule as SegmentationFolderDataModule
    from datamodules.segmentation.merged import MergedSegmentationDataModule as MergedSegmentationDataModule
    from datamodules.segmentation.transforms import SegmentationAugmentation as SegmentationAugmentation
    from datamodules.translation.batches import TranslationBatch as TranslationBatch
    from datamodules.translation.parallel_text import Cleaning as Cleaning
    from datamodules.translation.vocabulary import Vocabulary as Vocabulary
    from datamodules.translation.wmt14 import WMT14DataModule as WMT14DataModule

_MODULES = {
    "Categories": "detection.annotations",
    "COCODataModule": "detection.coco",
    "DetectionBatch": "detection.datamodule",
    "DetectionDataModule": "detection.datamodule",
    "MergedDetectionDataModule": "detection.merged",
    "Augmentation": "detection.transforms",
    "VOCDetectionDataModule": "detection.voc",
    "YOLODetectionDataModule": "detection.yolo",
    "MiniatureDetectionDataModule": "miniature.detection_datamodule",
    "MiniatureSegmentationDataModule": "miniature.segmentation_datamodule",
    "MiniatureStreetDetectionDataModule": "miniature.street_detection_datamodule",
    "MiniatureTranslationDataModule": "miniature.translation_datamodule",
    "MultitaskDataModule": "multitask",
    "JointBatch": "sampling.joint_batches",
    "CityscapesDataModule": "segmentation.cityscapes",
    "SegmentationClasses": "segmentation.classes",
    "SegmentationBatch": "segmentation.datamodule",
    "SegmentationDataModule": "segmentation.datamodule",
    "SegmentationFolderDataModule": "segmentation.folders",
    "MergedSegmentationDataModule": "segmentation.merged",
    "SegmentationAugmentation": "segmentation.transforms",
    "TranslationBatch": "translation.batches",
    "Cleaning": "translation.parallel_text",
    "Vocabulary": "translation.vocabulary",
    "WMT14DataModule": "translation.wmt14",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def import_all() -> None:
    """Imports every public class: jsonargparse knows those by their short names that have been imported."""
    for name in __all__:
        __getattr__(name)

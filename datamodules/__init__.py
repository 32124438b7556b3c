"""Data sets in their official layouts, and in those that tools export, as Lightning DataModules.

The package is `lightning_attn.datamodules`; `datamodules` is a second name of it, unless a folder of the user's own has
that name. A class is imported when it is first used, so that images need no sentencepiece, and text no OpenCV.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lightning_attn.alias import alias_package

if TYPE_CHECKING:
    from lightning_attn.datamodules.detection.annotations import Categories as Categories
    from lightning_attn.datamodules.detection.coco import COCODataModule as COCODataModule
    from lightning_attn.datamodules.detection.datamodule import (
        DetectionBatch as DetectionBatch,
    )
    from lightning_attn.datamodules.detection.datamodule import (
        DetectionDataModule as DetectionDataModule,
    )
    from lightning_attn.datamodules.detection.merged import MergedDetectionDataModule as MergedDetectionDataModule
    from lightning_attn.datamodules.detection.transforms import Augmentation as Augmentation
    from lightning_attn.datamodules.detection.voc import VOCDetectionDataModule as VOCDetectionDataModule
    from lightning_attn.datamodules.detection.yolo import YOLODetectionDataModule as YOLODetectionDataModule
    from lightning_attn.datamodules.miniature.detection_datamodule import (
        MiniatureDetectionDataModule as MiniatureDetectionDataModule,
    )
    from lightning_attn.datamodules.miniature.segmentation_datamodule import (
        MiniatureSegmentationDataModule as MiniatureSegmentationDataModule,
    )
    from lightning_attn.datamodules.miniature.street_detection_datamodule import (
        MiniatureStreetDetectionDataModule as MiniatureStreetDetectionDataModule,
    )
    from lightning_attn.datamodules.miniature.translation_datamodule import (
        MiniatureTranslationDataModule as MiniatureTranslationDataModule,
    )
    from lightning_attn.datamodules.multitask import MultitaskDataModule as MultitaskDataModule
    from lightning_attn.datamodules.sampling.joint_batches import JointBatch as JointBatch
    from lightning_attn.datamodules.segmentation.cityscapes import CityscapesDataModule as CityscapesDataModule
    from lightning_attn.datamodules.segmentation.classes import SegmentationClasses as SegmentationClasses
    from lightning_attn.datamodules.segmentation.datamodule import (
        SegmentationBatch as SegmentationBatch,
    )
    from lightning_attn.datamodules.segmentation.datamodule import (
        SegmentationDataModule as SegmentationDataModule,
    )
    from lightning_attn.datamodules.segmentation.folders import (
        SegmentationFolderDataModule as SegmentationFolderDataModule,
    )
    from lightning_attn.datamodules.segmentation.merged import (
        MergedSegmentationDataModule as MergedSegmentationDataModule,
    )
    from lightning_attn.datamodules.segmentation.transforms import SegmentationAugmentation as SegmentationAugmentation
    from lightning_attn.datamodules.translation.batches import TranslationBatch as TranslationBatch
    from lightning_attn.datamodules.translation.parallel_text import Cleaning as Cleaning
    from lightning_attn.datamodules.translation.vocabulary import Vocabulary as Vocabulary
    from lightning_attn.datamodules.translation.wmt14 import WMT14DataModule as WMT14DataModule

if __name__ == "datamodules":  # the top-level name, by which its modules are those of lightning_attn.datamodules
    alias_package(__name__, "lightning_attn.datamodules")

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

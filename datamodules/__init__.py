"""Data sets in their official layouts, as Lightning DataModules."""

from datamodules.cityscapes import CityscapesDataModule, MiniatureSegmentationDataModule, SegmentationBatch
from datamodules.cityscapes_labels import SegmentationClasses
from datamodules.coco import COCODataModule, DetectionBatch, MiniatureDetectionDataModule
from datamodules.coco_annotations import Categories
from datamodules.image_transforms import Augmentation
from datamodules.parallel_text import Cleaning
from datamodules.segmentation_transforms import SegmentationAugmentation
from datamodules.vocabulary import Vocabulary
from datamodules.wmt14 import MiniatureTranslationDataModule, TranslationBatch, WMT14DataModule

__all__ = [
    "Augmentation",
    "COCODataModule",
    "Categories",
    "CityscapesDataModule",
    "Cleaning",
    "DetectionBatch",
    "MiniatureDetectionDataModule",
    "MiniatureSegmentationDataModule",
    "MiniatureTranslationDataModule",
    "SegmentationAugmentation",
    "SegmentationBatch",
    "SegmentationClasses",
    "TranslationBatch",
    "Vocabulary",
    "WMT14DataModule",
]

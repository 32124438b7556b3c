"""Data sets in their official layouts, as Lightning DataModules."""

from datamodules.detection.annotations import Categories
from datamodules.detection.coco import COCODataModule, DetectionBatch, MiniatureDetectionDataModule
from datamodules.detection.transforms import Augmentation
from datamodules.parallel_text import Cleaning
from datamodules.segmentation.cityscapes import CityscapesDataModule, MiniatureSegmentationDataModule, SegmentationBatch
from datamodules.segmentation.classes import SegmentationClasses
from datamodules.segmentation.transforms import SegmentationAugmentation
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

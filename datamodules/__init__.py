"""Data sets in their official layouts, as Lightning DataModules."""

from datamodules.coco import COCODataModule, DetectionBatch, MiniatureDetectionDataModule
from datamodules.coco_annotations import Categories
from datamodules.image_transforms import Augmentation
from datamodules.parallel_text import Cleaning
from datamodules.vocabulary import Vocabulary
from datamodules.wmt14 import MiniatureTranslationDataModule, TranslationBatch, WMT14DataModule

__all__ = [
    "Augmentation",
    "COCODataModule",
    "Categories",
    "Cleaning",
    "DetectionBatch",
    "MiniatureDetectionDataModule",
    "MiniatureTranslationDataModule",
    "TranslationBatch",
    "Vocabulary",
    "WMT14DataModule",
]

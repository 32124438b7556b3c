"""Data sets in their official layouts, and in those that tools export, as Lightning DataModules."""

from datamodules.detection.annotations import Categories
from datamodules.detection.coco import COCODataModule, MiniatureDetectionDataModule
from datamodules.detection.datamodule import DetectionBatch, DetectionDataModule
from datamodules.detection.merged import MergedDetectionDataModule
from datamodules.detection.transforms import Augmentation
from datamodules.detection.voc import VOCDetectionDataModule
from datamodules.detection.yolo import YOLODetectionDataModule
from datamodules.segmentation.cityscapes import CityscapesDataModule, MiniatureSegmentationDataModule
from datamodules.segmentation.classes import SegmentationClasses
from datamodules.segmentation.datamodule import SegmentationBatch, SegmentationDataModule
from datamodules.segmentation.folders import SegmentationFolderDataModule
from datamodules.segmentation.merged import MergedSegmentationDataModule
from datamodules.segmentation.transforms import SegmentationAugmentation
from datamodules.translation.parallel_text import Cleaning
from datamodules.translation.vocabulary import Vocabulary
from datamodules.translation.wmt14 import MiniatureTranslationDataModule, TranslationBatch, WMT14DataModule

__all__ = [
    "Augmentation",
    "COCODataModule",
    "Categories",
    "CityscapesDataModule",
    "Cleaning",
    "DetectionBatch",
    "DetectionDataModule",
    "MergedDetectionDataModule",
    "MergedSegmentationDataModule",
    "MiniatureDetectionDataModule",
    "MiniatureSegmentationDataModule",
    "MiniatureTranslationDataModule",
    "SegmentationAugmentation",
    "SegmentationBatch",
    "SegmentationClasses",
    "SegmentationDataModule",
    "SegmentationFolderDataModule",
    "TranslationBatch",
    "VOCDetectionDataModule",
    "Vocabulary",
    "WMT14DataModule",
    "YOLODetectionDataModule",
]

"""Data sets in their official layouts, as Lightning DataModules."""

from datamodules.parallel_text import Cleaning
from datamodules.vocabulary import Vocabulary
from datamodules.wmt14 import MiniatureTranslationDataModule, TranslationBatch, WMT14DataModule

__all__ = ["Cleaning", "MiniatureTranslationDataModule", "TranslationBatch", "Vocabulary", "WMT14DataModule"]

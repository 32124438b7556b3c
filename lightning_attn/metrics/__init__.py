"""Metrics that are exact on any number of ranks: they gather by sample id, drop repeats, and score once."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_attn.metrics.gather import gather_by_id
from lightning_attn.metrics.segmentation import SegmentationMetrics, SegmentationScores
from lightning_attn.metrics.weighted_mean import WeightedMean

if TYPE_CHECKING:
    from lightning_attn.metrics.detection import CocoDetectionMetrics, DetectionScores
    from lightning_attn.metrics.translation import CorpusTranslationMetrics, TranslationScores, TranslationScoring

__all__ = [
    "CocoDetectionMetrics",
    "CorpusTranslationMetrics",
    "DetectionScores",
    "SegmentationMetrics",
    "SegmentationScores",
    "TranslationScores",
    "TranslationScoring",
    "WeightedMean",
    "gather_by_id",
]


def __getattr__(name: str) -> Any:
    """Imports metrics that need COCO's scorer or sacreBLEU on first access."""
    if name in __all__:
        file = "detection" if name in ("CocoDetectionMetrics", "DetectionScores") else "translation"
        return getattr(import_module(f"{__name__}.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

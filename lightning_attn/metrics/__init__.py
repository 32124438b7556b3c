"""Metrics that are exact on any number of ranks: gather by sample id, drop repeats, score once."""

from lightning_attn.metrics.gather import gather_by_id
from lightning_attn.metrics.translation import CorpusTranslationMetrics, TranslationScores, WeightedMean

__all__ = ["CorpusTranslationMetrics", "TranslationScores", "WeightedMean", "gather_by_id"]

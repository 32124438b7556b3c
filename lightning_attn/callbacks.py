"""Callbacks that users name in YAML, under `trainer.callbacks`."""

from lightning_attn.training.progress import ProgressLines, TrainingBar
from lightning_attn.training.weight_averaging import ExponentialAveraging, UniformWeightAveraging

__all__ = ["ExponentialAveraging", "ProgressLines", "TrainingBar", "UniformWeightAveraging"]

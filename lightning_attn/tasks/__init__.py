"""The LightningModules, one for each task, which connect networks, losses, metrics and files."""

from lightning_attn.tasks.base import BaseTask
from lightning_attn.tasks.detection import DetectionTask
from lightning_attn.tasks.multitask import MultitaskTask
from lightning_attn.tasks.segmentation import SegmentationTask
from lightning_attn.tasks.translation import TranslationTask
from lightning_attn.training.checkpoints import CheckpointError
from lightning_attn.training.optimization import OptimizerSpec, ScheduleSpec

__all__ = [
    "BaseTask",
    "CheckpointError",
    "DetectionTask",
    "MultitaskTask",
    "OptimizerSpec",
    "ScheduleSpec",
    "SegmentationTask",
    "TranslationTask",
]

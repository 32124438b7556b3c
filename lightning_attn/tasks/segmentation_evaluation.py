"""The evaluator of segmentation: mean IoU, pixel accuracy and the confusion matrix."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from lightning_attn.datamodules.segmentation.datamodule import SegmentationBatch
from lightning_attn.metrics.bootstrap import ResampledScores
from lightning_attn.metrics.segmentation import SegmentationMetrics
from lightning_attn.tasks.evaluation import Evaluator
from lightning_attn.tasks.image_evaluators import print_scores

if TYPE_CHECKING:
    from lightning_attn.tasks.segmentation import SegmentationTask

_TOTALS = ("miou", "pixel_accuracy")


class SegmentationEvaluator(Evaluator):
    """Mean IoU over the split, and the IoU of every class that occurs.

    Args:
        task: The task, whose steps return the label of every pixel.
    """

    shown: ClassVar[tuple[str, ...]] = _TOTALS
    prints_scores: ClassVar[bool] = True

    def __init__(self, task: "SegmentationTask") -> None:
        self._task = task

    @override
    def reset(self, split: str) -> None:
        super().reset(split)
        self._metrics = SegmentationMetrics(self._task.known_classes.names)

    @override
    def update(self, batch: SegmentationBatch, outputs: Mapping[str, Any]) -> None:
        self._metrics.update(batch.ids, outputs["results"], batch.labels)

    @override
    def compute(self) -> dict[str, Any]:
        self._metrics.compute()
        scores = self._metrics.scores()
        return {**scores, "confusion": scores["confusion"].tolist()}

    @override
    def logged(self, scores: dict[str, Any]) -> dict[str, float]:
        per_class = {f"iou/{name}": iou for name, iou in scores["iou_per_class"].items() if not math.isnan(iou)}
        return {name: scores[name] for name in _TOTALS} | per_class

    @override
    def resampled_scores(self) -> ResampledScores:
        return self._metrics.resampled_scores()

    @override
    def write(self, scores: dict[str, Any]) -> None:
        if self.split == "test":
            print_scores(scores, ("class", "IoU"), scores["iou_per_class"], _TOTALS)

    @override
    def clear(self) -> None:
        self._metrics.reset()

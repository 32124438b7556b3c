"""The evaluator of detection: COCO's metrics, files of detections, and an analysis of errors."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_attn.datamodules.detection.datamodule import DetectionBatch
from lightning_attn.datamodules.images.files import ExifPolicy, ImageArray, ImageError, read_image
from lightning_attn.datamodules.images.folders import unique_stems
from lightning_attn.io import unused_path, write_json
from lightning_attn.metrics.bootstrap import ResampledScores
from lightning_attn.metrics.detection import COCO_NUMBERS, CocoDetectionMetrics, ImageDetections
from lightning_attn.metrics.detection_analysis import DetectionAnalysis, analyse_detections
from lightning_attn.tasks.detection_files import write_analysis
from lightning_attn.tasks.evaluation import Evaluator
from lightning_attn.tasks.image_evaluators import print_scores
from lightning_attn.visualization.detection import draw_detection_errors
from lightning_attn.visualization.pictures import save_picture

if TYPE_CHECKING:
    from lightning_attn.tasks.detection import DetectionTask


class DetectionEvaluator(Evaluator):
    """COCO's twelve metrics; after a test also writes the detections, and an analysis of their errors.

    Args:
        task: The task, whose steps return detections of the network.
    """

    shown: ClassVar[tuple[str, ...]] = ("ap", "ap50")
    prints_scores: ClassVar[bool] = True

    def __init__(self, task: "DetectionTask") -> None:
        self._task = task

    @override
    def reset(self, split: str) -> None:
        super().reset(split)
        self._truth: Mapping[str, Any] = self._task.from_data("ground_truth")(split)
        self._metrics = CocoDetectionMetrics(self._truth, split)

    @override
    def update(self, batch: DetectionBatch, outputs: Mapping[str, Any]) -> None:
        self._metrics.update(batch.ids, self._task.in_original_pixels(batch, outputs["results"]))

    @override
    def compute(self) -> dict[str, Any]:
        self._metrics.compute()
        return dict(self._metrics.scores())

    @override
    def logged(self, scores: dict[str, Any]) -> dict[str, float]:
        return {name: scores[name] for name in COCO_NUMBERS}

    @override
    def resampled_scores(self) -> ResampledScores:
        return self._metrics.resampled_scores()

    @override
    def write(self, scores: dict[str, Any]) -> None:
        if self.split != "test":
            return
        folder = self._task.output_directory / "predictions"
        write_json(folder / "test_detections.json", self._metrics.records())
        print_scores(scores, ("category", "AP"), scores["ap_per_category"], COCO_NUMBERS)
        found = self._metrics.gathered()
        analysis = analyse_detections(self._truth, found, min_score=self._task.picture_score)
        errors = unused_path(folder / "test_errors")
        write_analysis(errors, analysis, {image["id"]: image["file_name"] for image in self._truth["images"]})
        self._draw_worst(errors / "worst_images", analysis, found)
        rank_zero_info(f"Confusion matrix, precision-recall curves and the images with most errors: {errors}")

    @override
    def clear(self) -> None:
        self._metrics.reset()

    def _draw_worst(self, folder: Path, analysis: DetectionAnalysis, found: Mapping[int, ImageDetections]) -> None:
        """Draws the images with most errors, the worst first, if the DataModule provides their files."""
        task, truth = self._task, self._truth
        locate = getattr(task.datamodule, "images_folder", None)
        if locate is None:
            return
        images = {image["id"]: image for image in truth["images"]}
        names = {category["id"]: category["name"] for category in truth["categories"]}
        for rank, errors in enumerate(analysis.images[: task.num_pictures], start=1):
            if not errors.errors:
                return
            image, detections = images[errors.image_id], found[errors.image_id]
            confident = detections.scores >= task.picture_score
            detected = zip(
                map(tuple, detections.boxes[confident].tolist()),
                [names[number] for number in detections.category_ids[confident].tolist()],
                detections.scores[confident].tolist(),
                errors.detections,
                strict=True,
            )
            objects = [
                ((x, y, x + width, y + height), names[one["category_id"]])
                for one in truth["annotations"]
                if one["image_id"] == errors.image_id
                for x, y, width, height in [one["bbox"]]
            ]
            path, size = str(locate("test") / image["file_name"]), (image["height"], image["width"])
            picture = draw_detection_errors(
                original_image(path, size, task.exif),
                list(detected),
                [(*one, outcome) for one, outcome in zip(objects, errors.objects, strict=True)],
                note=f"Nothing was detected with a score of at least {task.picture_score:g}. "
                f"{task.option('picture_score')} sets this threshold.",
            )
            save_picture(picture, folder / f"{rank:03d}_{unique_stems([image['file_name']])[0]}.png")


def rescaled(batch: DetectionBatch, index: int, boxes: dict[str, Tensor]) -> dict[str, Tensor]:
    """The boxes of one image of a batch in pixels of the original image."""
    (height, width), image = batch.sizes[index].tolist(), batch.images[index]
    x, y = boxes["boxes"].view(-1, 2, 2).unbind(2)
    # Factors as numbers: as a tensor, a GPU would make the host wait for them.
    scaled = torch.stack((x * (width / image.shape[2]), y * (height / image.shape[1])), dim=2)
    return boxes | {"boxes": scaled.view(-1, 4)}


def original_image(path: str, size: tuple[int, int], exif: ExifPolicy) -> ImageArray:
    """Reads an image file again; a grey image if it can no longer be read."""
    try:
        return read_image(Path(path), size, exif=exif)
    except (ImageError, OSError):
        return np.full((*size, 3), 128, dtype=np.uint8)

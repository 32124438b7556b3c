"""Semantic segmentation with an attended ResNet whose attention is chosen by spec (paper, sections 3 and 4)."""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from datamodules.images.files import ImageArray, channels_first
from datamodules.segmentation.classes import SegmentationClasses
from datamodules.segmentation.datamodule import SegmentationBatch
from lightning_attn.attention import AttentionSpec
from lightning_attn.export.graph import Program
from lightning_attn.io import write_file, write_table
from lightning_attn.metrics.segmentation import SegmentationMetrics
from lightning_attn.networks.images.backbone import ResNetSpec
from lightning_attn.networks.images.segmentation import Segmenter, SegmenterProgram, SegmenterSpec
from lightning_attn.networks.images.segmentation_inference import InferenceSpec, segment
from lightning_attn.tasks.images import ImageTask, number_or_none
from lightning_attn.training.checkpoints import OutputRows
from lightning_attn.training.optimization import OptimizerSpec, ScheduleSpec
from lightning_attn.visualization.pictures import Picture
from lightning_attn.visualization.segmentation import draw_segmentation, draw_segmentation_beside_truth


class SegmentationTask(ImageTask[SegmentationClasses, Segmenter]):
    """Trains, scores and runs a segmentation network; the defaults are the paper's, but for pretrained weights.

    The classes come from the DataModule, or from the checkpoint when there is none, and are stored in checkpoints.

    Args:
        attention: Attention of the backbone's residual blocks and of the head; `mechanism: none` leaves it out ("w/o").
        backbone: Which ResNet, its weights, and where the attention stands.
        segmenter: What stands on the backbone.
        inference: How whole images are segmented in validation, test and prediction.
        optimizer: The optimizer.
        schedule: The learning rate's course.
        num_pictures: How many images of a validation, test or prediction are drawn in the classes' colours.
    """

    task_name: ClassVar[str] = "segmentation"
    monitor: ClassVar[str] = "val/miou"
    monitor_mode: ClassVar[str] = "max"
    classes_type: ClassVar[type] = SegmentationClasses
    output_rows: ClassVar[Mapping[str, OutputRows]] = dict.fromkeys(
        ("classifier.weight", "classifier.bias"), OutputRows()
    )
    outputs_word: ClassVar[str] = "classes"

    def __init__(
        self,
        attention: AttentionSpec = AttentionSpec(),  # noqa: B008 - a frozen value
        backbone: ResNetSpec = ResNetSpec(),  # noqa: B008 - a frozen value
        segmenter: SegmenterSpec = SegmenterSpec(),  # noqa: B008 - a frozen value
        inference: InferenceSpec = InferenceSpec(),  # noqa: B008 - a frozen value
        optimizer: OptimizerSpec = OptimizerSpec(  # noqa: B008 - a frozen value
            name="sgd", learning_rate=0.005, weight_decay=1e-4, base_batch_size=8
        ),
        schedule: ScheduleSpec = ScheduleSpec(name="poly", warmup_steps=0),  # noqa: B008 - a frozen value
        num_pictures: int = 8,
    ) -> None:
        super().__init__(attention, backbone, optimizer, schedule, num_pictures)
        self.segmenter, self.inference = segmenter, inference
        self.check_sizes(len(segmenter.class_weights) or 1)
        self._metrics: SegmentationMetrics | None = None
        self._label_folder: Path | None = None

    def build_network(self, num_classes: int, backbone: ResNetSpec) -> Segmenter:
        """The segmentation network."""
        return Segmenter(num_classes, backbone, self.attention, self.segmenter)

    def programs(self, size: tuple[int, int] | None = None) -> dict[str, Program]:
        """The network for one image, as a whole and at one scale."""
        outputs = {"logits": "of the classes in model.json at every pixel, [classes, height, width]"}
        module = SegmenterProgram(self.built_network)
        return {"segmenter": Program(module, {"image": self.example_image(size)}, outputs)}

    # Training

    def training_step(self, batch: SegmentationBatch, batch_idx: int) -> Tensor:
        """The sum of the network's losses."""
        losses = self.built_network(batch.images, batch.labels)
        total = torch.stack(list(losses.values())).sum()
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(batch))
        if len(losses) > 1:
            parts = {f"train/{name}": loss.detach() for name, loss in losses.items() if name != "loss"}
            self.log_dict(parts | {"train/loss_head": losses["loss"].detach()}, batch_size=len(batch))
        return total

    # Validation and test

    def start_scoring(self, split: str) -> None:
        """Metrics of a pass."""
        self._metrics = SegmentationMetrics(self.known_classes.names)

    def score(self, batch: SegmentationBatch) -> None:
        """Segments the images of a batch."""
        assert self._metrics is not None
        predicted = self._segment(batch)
        self._keep_pictures(batch, predicted)
        self._metrics.update(batch.ids, predicted, batch.labels)

    def _segment(self, batch: SegmentationBatch) -> list[Tensor]:
        """A label for every pixel; a rank that has no images gets an empty batch."""
        return segment(self.built_network, batch.images, self.inference) if len(batch) else []

    def _keep_pictures(self, batch: SegmentationBatch, predicted: list[Tensor]) -> None:
        truths: list[Tensor | None] = [*batch.labels] or [None] * len(batch)
        for name, image, labels, truth in zip(batch.names, batch.images, predicted, truths, strict=True):
            if not self.wants_pictures:
                return
            draw = functools.partial(self._drawn, image.cpu(), labels.cpu(), None if truth is None else truth.cpu())
            self.keep_picture(name, draw)

    def _drawn(self, image: Tensor, labels: Tensor, truth: Tensor | None) -> Picture:
        classes = self.known_classes
        if truth is None:
            return draw_segmentation(image, labels, classes.colours, classes.names)
        return draw_segmentation_beside_truth(image, labels, truth, classes.colours, classes.names)

    def log_scores(self, stage: str) -> dict[str, Any]:
        """Logs the scores; returns them as plain values, with None for a class that does not occur."""
        assert self._metrics is not None
        self._metrics.compute()
        scores = self._metrics.scores()
        per_class = scores["iou_per_class"]
        shown = {f"{stage}/miou": scores["miou"], f"{stage}/pixel_accuracy": scores["pixel_accuracy"]}
        self.log_dict(shown, prog_bar=True, batch_size=1)
        there = {f"{stage}/iou/{name}": value for name, value in per_class.items() if not math.isnan(value)}
        self.log_dict(there, batch_size=1)
        return {
            **{name: number_or_none(value) for name, value in shown.items()},
            f"{stage}/iou_per_class": {name: number_or_none(value) for name, value in per_class.items()},
            f"{stage}/confusion": scores["confusion"].tolist(),
            f"{stage}/num_images": scores["num_images"],
        }

    def write_scores(self, results: dict[str, Any]) -> None:
        """Writes and prints the scores."""
        self.write_metrics(results, ("class", "IoU"), "iou_per_class", ("miou", "pixel_accuracy"))

    # Prediction

    def predict_images(self, images: list[ImageArray]) -> list[npt.NDArray[np.uint8]]:
        """The label 0..K-1 of every pixel, `[H, W]` for each image; `known_classes.names` are their names."""
        batch = [channels_first(image).to(self.device) for image in images]
        return [labels.cpu().numpy() for labels in segment(self.built_network, batch, self.inference)]

    def on_predict_epoch_start(self) -> None:
        """Chooses the folder for the labels, one for all ranks."""
        self._label_folder = self.begin_prediction("labels")

    def predict_step(self, batch: SegmentationBatch, batch_idx: int) -> None:
        """Segments a batch and writes `<name>_pred_labelIds.png` of each image, as Cityscapes' scorer reads them."""
        assert self._label_folder is not None
        self.note_bad_images(batch)
        predicted = self._segment(batch)
        self._keep_pictures(batch, predicted)
        for name, labels in zip(batch.names, predicted, strict=True):
            ids = self.known_classes.to_ids(labels.cpu().numpy())
            write_file(self._label_folder / f"{name}_pred_labelIds.png", _png(ids), replace=True)

    def on_predict_epoch_end(self) -> None:
        """Says which images could not be used, and draws pictures."""
        self.report_bad_images(self.output_directory / "predictions" / "bad_images.csv")
        if self.trainer.is_global_zero:
            classes = self.known_classes
            rows = [
                (number, name, *colour)
                for number, name, colour in zip(classes.ids, classes.names, classes.colours, strict=True)
            ]
            header = ("id", "class", "red", "green", "blue")
            path = write_table(self.output_directory / "predictions" / "classes.csv", header, rows)
            rank_zero_info(f"Label ids written into {self._label_folder}; {path.name} beside it says what they mean")
        self.save_pictures("predict")


def _png(ids: npt.NDArray[Any]) -> Callable[[BinaryIO], object]:
    return lambda file: Image.fromarray(ids).save(file, format="PNG")

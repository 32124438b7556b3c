"""Object detection with an attended ResNet whose attention is chosen by spec (paper, sections 3 and 4)."""

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from pytorch_lightning.utilities import rank_zero_info
from rich.console import Console
from rich.table import Table
from torch import Tensor

from datamodules.coco import DetectionBatch
from datamodules.coco_annotations import Categories
from lightning_attn.attention import AttentionSpec
from lightning_attn.files import unused_path, write_json
from lightning_attn.metrics.detection import COCO_NUMBERS, CocoDetectionMetrics, coco_records, image_detections
from lightning_attn.metrics.gather import gather_by_id
from lightning_attn.networks.detection import Detection, Detector, DetectorSpec
from lightning_attn.networks.resnet import ResNetSpec
from lightning_attn.tasks.base import BaseTask, require_network
from lightning_attn.tasks.checkpoints import CheckpointError, read_checkpoint
from lightning_attn.tasks.optimization import OptimizerSpec, ScheduleSpec
from lightning_attn.visualization.detection import (
    Picture,
    draw_detections,
    draw_detections_beside_truth,
    save_picture,
)

CATEGORIES_KEY = "categories"


class _Shown(NamedTuple):
    """An image with what was found in it, kept until the end of the pass."""

    name: str
    image: Tensor
    found: Detection
    target: dict[str, Tensor] | None


class DetectionTask(BaseTask):
    """Trains, scores and runs a detector; the defaults are the paper's, but for pretrained weights.

    The categories come from the DataModule, or from the checkpoint when there is none, and are stored in checkpoints.

    Args:
        attention: Attention of the backbone's residual blocks; `mechanism: none` leaves it out ("w/o").
        backbone: Which ResNet, its weights, and where the attention stands.
        detector: What stands on the backbone.
        optimizer: The optimizer.
        schedule: The learning rate's course.
        num_pictures: How many images of a validation, test or prediction are drawn with their boxes.
        picture_score: Detections of a lower score are not drawn.
    """

    task_name: ClassVar[str] = "detection"
    monitor: ClassVar[str] = "val/ap"
    monitor_mode: ClassVar[str] = "max"

    def __init__(
        self,
        attention: AttentionSpec = AttentionSpec(),  # noqa: B008 - a frozen value
        backbone: ResNetSpec = ResNetSpec(),  # noqa: B008 - a frozen value
        detector: DetectorSpec = DetectorSpec(),  # noqa: B008 - a frozen value
        optimizer: OptimizerSpec = OptimizerSpec(  # noqa: B008 - a frozen value
            name="sgd", learning_rate=0.02, weight_decay=1e-4, base_batch_size=16
        ),
        schedule: ScheduleSpec = ScheduleSpec(  # noqa: B008 - a frozen value
            name="multistep", warmup_steps=500, warmup_start=1 / 3, milestones=(8 / 12, 11 / 12)
        ),
        num_pictures: int = 8,
        picture_score: float = 0.5,
    ) -> None:
        super().__init__(optimizer, schedule)
        if num_pictures < 0 or not 0 <= picture_score <= 1:
            raise ValueError(
                "num_pictures must be at least 0 and picture_score between 0 and 1, got "
                f"{num_pictures} and {picture_score}."
            )
        self.attention, self.backbone, self.detector = attention, backbone, detector
        # The network waits for the number of categories; a size that does not fit should not wait for the data.
        with torch.device("meta"):
            Detector(1, _without_weights(backbone), attention, detector)
        self.num_pictures = num_pictures
        self.picture_score = picture_score
        self.categories: Categories | None = None
        self.network: Detector | None = None
        self._metrics: CocoDetectionMetrics | None = None
        self._shown: list[_Shown] = []
        self._predictions: dict[int, tuple[str, Detection]] = {}

    # Network and categories

    def configure_model(self) -> None:
        """Builds the network for the DataModule's categories, or the checkpoint's for a folder of images."""
        if self.network is not None:
            return
        if self.backbone.norm == "sync" and self.trainer.training and self.trainer.strategy.root_device.type == "cpu":
            raise ValueError(
                "backbone.norm='sync' shares statistics between GPUs, and this run has none. "
                "Use batch, frozen or group (--model.backbone.norm batch)."
            )
        categories = self.trainer.datamodule.categories  # type: ignore[attr-defined]
        if categories is None:
            if not self.checkpoint_path:
                raise ValueError(
                    "The data has no annotations, which name categories. Give a checkpoint, which has them "
                    "(--ckpt_path FILE)."
                )
            categories = _stored_categories(read_checkpoint(self.checkpoint_path))
        self._build(categories, self.backbone)

    def _build(self, categories: Categories, backbone: ResNetSpec) -> None:
        self.categories = categories
        self.network = Detector(len(categories.names), backbone, self.attention, self.detector)

    @property
    def built_network(self) -> Detector:
        """The network.

        Raises:
            RuntimeError: If `configure_model` or `load` has not built it yet.
        """
        return require_network(self.network)

    @property
    def known_categories(self) -> Categories:
        """Names and ids of what is detected.

        Raises:
            RuntimeError: As for `built_network`.
        """
        require_network(self.network)
        assert self.categories is not None
        return self.categories

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the categories, without which labels mean nothing."""
        super().on_save_checkpoint(checkpoint)
        categories = self.known_categories
        checkpoint[CATEGORIES_KEY] = {"names": list(categories.names), "ids": list(categories.ids)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also refuses a checkpoint whose labels mean other categories than the data's."""
        stored, current = _stored_categories(checkpoint), self.known_categories
        if stored != current:
            raise CheckpointError(
                f"The checkpoint was trained for {_described(stored)}, but the data has {_described(current)}. "
                "Use the data it was trained with."
            )
        super().on_load_checkpoint(checkpoint)

    def on_load_checkpoint_alone(self, checkpoint: dict[str, Any]) -> None:
        """Builds the network for the categories in the checkpoint, which also holds all weights."""
        self._build(_stored_categories(checkpoint), _without_weights(self.backbone))

    # Training

    def training_step(self, batch: DetectionBatch, batch_idx: int) -> Tensor:
        """The sum of the network's losses."""
        losses = self.built_network(batch.images, batch.targets)
        total = torch.stack(list(losses.values())).sum()
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(batch.images))
        self.log_dict({f"train/{name}": loss.detach() for name, loss in losses.items()}, batch_size=len(batch.images))
        return total

    # Validation and test

    def on_validation_epoch_start(self) -> None:
        """Forgets the images of an earlier pass."""
        self._reset_evaluation("val")

    def on_test_epoch_start(self) -> None:
        """Forgets the images of an earlier pass."""
        self._reset_evaluation("test")

    def _reset_evaluation(self, split: str) -> None:
        self._metrics = CocoDetectionMetrics(self.trainer.datamodule.ground_truth(split), split)  # type: ignore[attr-defined]
        self._shown = []

    def validation_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Detects the objects of a batch."""
        self._score(batch)

    def test_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Detects the objects of a batch."""
        self._score(batch)

    def _score(self, batch: DetectionBatch) -> None:
        assert self._metrics is not None
        found = self._detect(batch)
        self._keep_pictures(batch, found)
        self._metrics.update(batch.ids, self._in_original_pixels(batch, found))

    def _detect(self, batch: DetectionBatch) -> list[Detection]:
        """What is in the images; a rank that has none of them gets an empty batch."""
        return self.built_network(batch.images) if len(batch) else []

    def _in_original_pixels(self, batch: DetectionBatch, found: list[Detection]) -> list[Detection]:
        """Boxes in the image as it is stored, and the data's category ids in place of labels."""
        ids = torch.tensor((0, *self.known_categories.ids), device=self.device)
        moved = []
        for image, (height, width), detection in zip(batch.images, batch.sizes.tolist(), found, strict=True):
            factors = detection["boxes"].new_tensor([width / image.shape[2], height / image.shape[1]] * 2)
            moved.append(
                {
                    "boxes": detection["boxes"] * factors,
                    "labels": ids[detection["labels"]],
                    "scores": detection["scores"],
                }
            )
        return moved

    def _keep_pictures(self, batch: DetectionBatch, found: list[Detection]) -> None:
        """Keeps the first images of rank 0 with their boxes, to be drawn at the end of the pass."""
        if not self.trainer.is_global_zero:
            return
        targets: list[dict[str, Tensor] | None] = [*batch.targets] or [None] * len(batch)
        for name, image, detection, target in zip(batch.names, batch.images, found, targets, strict=True):
            if len(self._shown) == self.num_pictures:
                return
            self._shown.append(
                _Shown(Path(name).stem, image.cpu(), _on_cpu(detection), None if target is None else _on_cpu(target))
            )

    def _drawn(self, shown: _Shown) -> Picture:
        categories = self.known_categories.names
        names, true_names = (
            [] if boxes is None else [categories[label - 1] for label in boxes["labels"].tolist()]
            for boxes in (shown.found, shown.target)
        )
        found = (shown.image, shown.found["boxes"], names, shown.found["scores"])
        if shown.target is None:
            return draw_detections(*found, categories=categories, min_score=self.picture_score)
        truth = (shown.target["boxes"], true_names)
        return draw_detections_beside_truth(*found, *truth, categories=categories, min_score=self.picture_score)

    def on_validation_epoch_end(self) -> None:
        """Logs the AP of the whole set, the same on every rank, and shows pictures in TensorBoard."""
        self._log_scores("val")
        if not self.trainer.sanity_checking:
            for shown in self._shown:
                self.log_picture(f"val/{shown.name}", self._drawn(shown))
        self._shown = []

    def _log_scores(self, stage: str) -> dict[str, Any]:
        assert self._metrics is not None
        scores = self._metrics.compute()
        numbers = {f"{stage}/{name}": torch.tensor(scores[name]) for name in COCO_NUMBERS}  # type: ignore[literal-required]
        shown = (f"{stage}/ap", f"{stage}/ap50")
        self.log_dict({name: numbers[name] for name in shown}, prog_bar=True, batch_size=1)
        self.log_dict({name: value for name, value in numbers.items() if name not in shown}, batch_size=1)
        # Of what there is nothing to find, a score is NaN, which JSON has not.
        return {
            f"{stage}/{name}": None if isinstance(value, float) and math.isnan(value) else value
            for name, value in scores.items()
        }

    def on_test_epoch_end(self) -> None:
        """Logs the scores and writes them, the detections and pictures into the run directory."""
        results = self._log_scores("test")
        if not self.trainer.is_global_zero:
            return
        assert self._metrics is not None
        write_json(self.output_directory / "predictions" / "test_detections.json", self._metrics.records())
        path = write_json(self.output_directory / "test_metrics.json", results)
        _print_scores(results)
        rank_zero_info(f"Scores written to {path}")
        self._save_pictures("test")

    def _save_pictures(self, stage: str) -> None:
        if not self._shown:
            return
        folder = unused_path(self.output_directory / "predictions" / f"{stage}_pictures")
        for shown in self._shown:
            save_picture(self._drawn(shown), folder / f"{shown.name}.png")
        rank_zero_info(f"{len(self._shown)} pictures drawn into {folder}")
        self._shown = []

    # Prediction

    def on_predict_epoch_start(self) -> None:
        """Forgets the images of an earlier pass."""
        self._predictions, self._shown = {}, []

    def predict_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Detects the objects of a batch; all are kept until the end of the epoch."""
        found = self._detect(batch)
        self._keep_pictures(batch, found)
        for image_id, name, detection in zip(
            batch.ids.tolist(), batch.names, self._in_original_pixels(batch, found), strict=True
        ):
            self._predictions[image_id] = (name, _on_cpu(detection))

    def on_predict_epoch_end(self) -> None:
        """Writes `predictions/detections.json` as COCO's scorers read it, the images' names, and pictures."""
        predictions = gather_by_id(self._predictions)
        if not self.trainer.is_global_zero:
            return
        folder = self.output_directory / "predictions"
        found = {image_id: image_detections(image_id, detection) for image_id, (_, detection) in predictions.items()}
        path = write_json(folder / "detections.json", coco_records(found))
        images = [{"id": image_id, "file_name": name} for image_id, (name, _) in predictions.items()]
        write_json(folder / "images.json", images)
        rank_zero_info(f"Detections in {len(predictions)} images written to {path}")
        self._save_pictures("predict")


def _without_weights(backbone: ResNetSpec) -> ResNetSpec:
    """The backbone for weights that come from elsewhere."""
    return dataclasses.replace(backbone, weights="none")


def _stored_categories(checkpoint: dict[str, Any]) -> Categories:
    stored = checkpoint.get(CATEGORIES_KEY)
    if stored is None:
        raise CheckpointError("The checkpoint holds no categories: it was not written by a DetectionTask.")
    return Categories(names=tuple(stored["names"]), ids=tuple(stored["ids"]))


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _described(categories: Categories) -> str:
    """The categories, shortened."""
    pairs = [f"{name} ({number})" for name, number in zip(categories.names, categories.ids, strict=True)]
    shown = ", ".join(pairs[:6]) + (", ..." if len(pairs) > 6 else "")
    return f"{len(pairs)} categories: {shown}"


def _print_scores(results: dict[str, Any]) -> None:
    table = Table("category", "AP", title=f"Test set, {results['test/num_images']} images")
    for name, value in results["test/ap_per_category"].items():
        table.add_row(name, f"{value:.3f}")
    table.add_section()
    for name in COCO_NUMBERS:
        value = results[f"test/{name}"]
        table.add_row(name, "-" if value is None else f"{value:.3f}")
    Console().print(table)

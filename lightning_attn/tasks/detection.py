"""Object detection with an attended ResNet whose attention is chosen by spec (paper, sections 3 and 4)."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from datamodules.detection.annotations import Categories
from datamodules.detection.datamodule import DetectionBatch
from datamodules.images.files import ExifPolicy, ImageArray, ImageError, channels_first, read_image
from datamodules.images.folders import unique_stems
from datamodules.images.transforms import resize_image, resized_size
from lightning_attn.attention import AttentionSpec
from lightning_attn.errors import InputError
from lightning_attn.export.graph import Program
from lightning_attn.io import unused_path, write_json
from lightning_attn.metrics.detection import (
    COCO_NUMBERS,
    CocoDetectionMetrics,
    ImageDetections,
    coco_records,
    image_detections,
)
from lightning_attn.metrics.detection_analysis import DetectionAnalysis, analyse_detections
from lightning_attn.networks.images.backbone import ResNetSpec
from lightning_attn.networks.images.detection import Detection, Detector, DetectorProgram, DetectorSpec
from lightning_attn.networks.images.detection_inference import DetectionInferenceSpec, detect
from lightning_attn.networks.weights.torchvision_detectors import is_torchvision_detector, read_torchvision_detector
from lightning_attn.tasks.detection_files import write_analysis, write_detections
from lightning_attn.tasks.images import ImageTask, number_or_none
from lightning_attn.tasks.prediction_files import PartialResults
from lightning_attn.training.checkpoints import CheckpointError, OutputRows
from lightning_attn.training.optimization import OptimizerSpec, ScheduleSpec
from lightning_attn.visualization.detection import draw_detection_errors, draw_detections, draw_detections_beside_truth
from lightning_attn.visualization.pictures import Picture, save_picture


class DetectionTask(ImageTask[Categories, Detector]):
    """Trains, scores and runs a detector; the defaults are the paper's, but for pretrained weights.

    The categories come from the DataModule, or from the checkpoint when there is none, and are stored in checkpoints.

    Args:
        attention: Attention of the backbone's residual blocks; `mechanism: none` leaves it out ("w/o").
        backbone: Which ResNet, its weights, and where the attention stands.
        detector: What stands on the backbone.
        optimizer: The optimizer.
        schedule: The learning rate's course.
        num_pictures: How many images of a validation, test or prediction are drawn with their boxes.
        picture_score: Detections of a lower score are not drawn, and do not count in the confusion of categories.
        inference: How the objects of an image are found in validation, test and prediction.
    """

    task_name: ClassVar[str] = "detection"
    monitor: ClassVar[str] = "val/ap"
    monitor_mode: ClassVar[str] = "max"
    classes_key: ClassVar[str] = "categories"
    classes_type: ClassVar[type] = Categories
    output_rows: ClassVar[Mapping[str, OutputRows]] = {
        **dict.fromkeys(("cls_score.weight", "cls_score.bias"), OutputRows(background=True)),
        **dict.fromkeys(("bbox_pred.weight", "bbox_pred.bias"), OutputRows(each=4, background=True)),
        **dict.fromkeys(("cls_logits.weight", "cls_logits.bias"), OutputRows()),
    }
    outputs_word: ClassVar[str] = "categories"

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
        inference: DetectionInferenceSpec = DetectionInferenceSpec(),  # noqa: B008 - a frozen value
    ) -> None:
        super().__init__(attention, backbone, optimizer, schedule, num_pictures)
        if not 0 <= picture_score <= 1:
            raise InputError(f"picture_score must be between 0 and 1, got {picture_score}.")
        self.detector = detector
        self.picture_score = picture_score
        self.inference = inference
        self.check_sizes()
        self._metrics: CocoDetectionMetrics | None = None
        self._files: PartialResults | None = None

    def build_network(self, num_classes: int, backbone: ResNetSpec) -> Detector:
        """The detector."""
        return Detector(num_classes, backbone, self.attention, self.detector)

    def convert_external_weights(self, path: str) -> dict[str, Tensor] | None:
        """The weights of torchvision's detectors; see `read_torchvision_detector`."""
        head = self.detector.head
        if not is_torchvision_detector(path, head):
            return None
        classes = self.known_classes
        state = read_torchvision_detector(path, head, classes.names, classes.ids)
        return {f"network.network.{name}": value for name, value in state.items()}

    def programs(self, size: tuple[int, int] | None = None) -> dict[str, Program]:
        """The whole detector for one image; `size` is by default that which the data was resized to."""
        module = DetectorProgram(self.built_network)
        outputs = {
            "boxes": "x1, y1, x2, y2 in pixels of the image, [n, 4]",
            "labels": "numbers of the categories in model.json, from 1, [n]",
            "scores": "best first, [n]",
        }
        return {"detector": Program(module, {"image": self.example_image(size)}, outputs, ordered=False)}

    # Training

    def training_step(self, batch: DetectionBatch, batch_idx: int) -> Tensor:
        """The sum of the network's losses."""
        losses = self.built_network(batch.images, batch.targets)
        total = torch.stack(list(losses.values())).sum()
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(batch.images))
        self.log_dict({f"train/{name}": loss.detach() for name, loss in losses.items()}, batch_size=len(batch.images))
        return total

    # Validation and test

    def start_scoring(self, split: str) -> None:
        """Metrics of a pass."""
        self._metrics = CocoDetectionMetrics(self.trainer.datamodule.ground_truth(split), split)  # type: ignore[attr-defined]

    def score(self, batch: DetectionBatch) -> None:
        """Detects the objects of a batch."""
        assert self._metrics is not None
        found = self._detect(batch)
        self._keep_pictures(batch, found)
        self._metrics.update(batch.ids, self._in_original_pixels(batch, found))

    def _detect(self, batch: DetectionBatch) -> list[Detection]:
        """What is in the images; a rank that has none of them gets an empty batch."""
        return detect(self.built_network, batch.images, self.inference)

    def _in_original_pixels(self, batch: DetectionBatch, found: list[Detection]) -> list[Detection]:
        """Boxes in the image as it is stored, and the data's category ids in place of labels."""
        ids = torch.tensor((0, *self.known_classes.ids), device=self.device)
        return [
            one | {"labels": ids[one["labels"]]}
            for one in (self._enlarged(batch, place, detection) for place, detection in enumerate(found))
        ]

    @staticmethod
    def _enlarged(batch: DetectionBatch, place: int, boxes: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same with boxes in pixels of the image as it is stored."""
        (height, width), image = batch.sizes[place].tolist(), batch.images[place]
        factors = boxes["boxes"].new_tensor([width / image.shape[2], height / image.shape[1]] * 2)
        return boxes | {"boxes": boxes["boxes"] * factors}

    def _keep_pictures(self, batch: DetectionBatch, found: list[Detection]) -> None:
        targets: list[dict[str, Tensor] | None] = [*batch.targets] or [None] * len(batch)
        outputs = batch.outputs or [Path(name).stem for name in batch.names]
        for place, (output, detection, target) in enumerate(zip(outputs, found, targets, strict=True)):
            if not self.wants_pictures:
                return
            if batch.paths:  # drawn on the image itself, which has more to see than what the network gets
                size = batch.sizes[place].tolist()
                detection = self._enlarged(batch, place, detection)
                target = None if target is None else self._enlarged(batch, place, target)
                image: Callable[[], ImageArray | Tensor] = functools.partial(
                    _original, batch.paths[place], (size[0], size[1]), self.exif
                )
            else:
                image = functools.partial(Tensor.cpu, batch.images[place])
            truth = None if target is None else _on_cpu(target)
            self.keep_picture(output, functools.partial(self._drawn, image, _on_cpu(detection), truth))

    def _drawn(
        self, image: Callable[[], ImageArray | Tensor], found: Detection, target: dict[str, Tensor] | None
    ) -> Picture:
        categories = self.known_classes.names
        names, true_names = (
            [] if boxes is None else [categories[label - 1] for label in boxes["labels"].tolist()]
            for boxes in (found, target)
        )
        detected = (image(), found["boxes"], names, found["scores"])
        if target is None:
            return draw_detections(*detected, categories=categories, min_score=self.picture_score)
        truth = (target["boxes"], true_names)
        return draw_detections_beside_truth(*detected, *truth, categories=categories, min_score=self.picture_score)

    def log_scores(self, stage: str) -> dict[str, Any]:
        """Logs COCO's twelve numbers."""
        assert self._metrics is not None
        self._metrics.compute()
        scores = self._metrics.scores()
        numbers = {f"{stage}/{name}": torch.tensor(scores[name]) for name in COCO_NUMBERS}  # type: ignore[literal-required]
        shown = (f"{stage}/ap", f"{stage}/ap50")
        self.log_dict({name: numbers[name] for name in shown}, prog_bar=True, batch_size=1)
        self.log_dict({name: value for name, value in numbers.items() if name not in shown}, batch_size=1)
        return {f"{stage}/{name}": number_or_none(value) for name, value in scores.items()}

    def write_scores(self, results: dict[str, Any]) -> None:
        """Also writes the detections, and what is wrong with them."""
        assert self._metrics is not None
        folder = self.output_directory / "predictions"
        write_json(folder / "test_detections.json", self._metrics.records())
        self.write_metrics(results, ("category", "AP"), "ap_per_category", COCO_NUMBERS)
        truth = self.trainer.datamodule.ground_truth("test")  # type: ignore[attr-defined]
        found = self._metrics.gathered()
        analysis = analyse_detections(truth, found, min_score=self.picture_score)
        errors = unused_path(folder / "test_errors")
        write_analysis(errors, analysis, {image["id"]: image["file_name"] for image in truth["images"]})
        self._draw_worst(errors / "worst_images", analysis, truth, found)
        rank_zero_info(f"Confusion, precision by recall and the images with most errors: {errors}")

    def _draw_worst(
        self,
        folder: Path,
        analysis: DetectionAnalysis,
        truth: Mapping[str, Any],
        found: Mapping[int, ImageDetections],
    ) -> None:
        """Pictures of the images with most errors, the worst first, where the data says which files they are."""
        locate = getattr(self.trainer.datamodule, "images_folder", None)  # type: ignore[attr-defined]
        if locate is None:
            return
        images = {image["id"]: image for image in truth["images"]}
        names = {category["id"]: category["name"] for category in truth["categories"]}
        for place, errors in enumerate(analysis.images[: self.num_pictures], start=1):
            if not errors.errors:
                return
            image, detections = images[errors.image_id], found[errors.image_id]
            shown = detections.scores >= self.picture_score
            detected = zip(
                map(tuple, detections.boxes[shown].tolist()),
                [names[number] for number in detections.category_ids[shown].tolist()],
                detections.scores[shown].tolist(),
                errors.detections,
                strict=True,
            )
            objects = [
                ((x, y, x + width, y + height), names[one["category_id"]])
                for one in truth["annotations"]
                if one["image_id"] == errors.image_id
                for x, y, width, height in [one["bbox"]]
            ]
            picture = draw_detection_errors(
                _original(str(locate("test") / image["file_name"]), (image["height"], image["width"]), self.exif),
                list(detected),
                [(*one, outcome) for one, outcome in zip(objects, errors.objects, strict=True)],
            )
            save_picture(picture, folder / f"{place:03d}_{unique_stems([image['file_name']])[0]}.png")

    # Prediction

    def predict_images(self, images: list[ImageArray]) -> list[list[dict[str, Any]]]:
        """The objects in each image, best first: `category`, `score`, and `box` (x1, y1, x2, y2) in its pixels.

        Raises:
            CheckpointError: If the checkpoint does not say how images are resized.
        """
        if "min_size" not in self.preprocessing:
            raise CheckpointError("The checkpoint does not say how images are resized; evaluate it by the command.")
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        lengths = int(self.preprocessing["min_size"]), int(self.preprocessing["max_size"])
        resized = [
            channels_first(resize_image(image, resized_size(size, *lengths))).to(self.device)
            for image, size in zip(images, sizes, strict=True)
        ]
        ids = torch.arange(len(images))
        batch = DetectionBatch(ids, resized, [], torch.tensor(sizes))  # type: ignore[arg-type]
        names = dict(zip(self.known_classes.ids, self.known_classes.names, strict=True))
        return [
            [
                {"category": names[label], "score": score, "box": box}
                for label, score, box in zip(
                    one["labels"].tolist(), one["scores"].tolist(), one["boxes"].tolist(), strict=True
                )
            ]
            for one in self._in_original_pixels(batch, self._detect(batch))
        ]

    def on_predict_epoch_start(self) -> None:
        """Chooses where the detections of all ranks are written."""
        self._files = PartialResults(self.begin_prediction("detections_so_far"), self.global_rank)

    def interrupted_note(self) -> str:
        """Where the detections are that were made before a prediction was broken off."""
        if self._files is None:
            return ""
        self._files.flush()
        return f"Detections of {len(self._files.results()):,} images are in {self._files.folder}, in lines of JSON."

    def predict_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Detects the objects of a batch, and writes them."""
        assert self._files is not None
        self.note_bad_images(batch)
        found = self._detect(batch)
        self._keep_pictures(batch, found)
        for image_id, name, detection in zip(
            batch.ids.tolist(), batch.names, self._in_original_pixels(batch, found), strict=True
        ):
            records = coco_records({image_id: image_detections(image_id, detection)})
            self._files.add({"id": image_id, "file_name": name, "detections": records})
        self._files.flush()

    def on_predict_epoch_end(self) -> None:
        """Writes `predictions/detections.json` as COCO's scorers read it, the images' names, a table, and pictures."""
        assert self._files is not None
        self._files.close()
        self.report_bad_images(self.output_directory / "predictions" / "bad_images.csv")
        self.trainer.strategy.barrier()
        if not self.trainer.is_global_zero:
            return
        classes = self.known_classes
        results = self._files.results()
        names = dict(zip(classes.ids, classes.names, strict=True))
        path = write_detections(self._files.folder.parent, results, names)
        self._files.remove()
        rank_zero_info(f"Detections in {len(results):,} images written to {path} and {path.with_suffix('.csv').name}")
        self.save_pictures("predict")


def _original(path: str, size: tuple[int, int], exif: ExifPolicy) -> ImageArray:
    """The pixels of an image that was read before; grey if it is gone."""
    try:
        return read_image(Path(path), size, exif=exif)
    except (ImageError, OSError):
        return np.full((*size, 3), 128, dtype=np.uint8)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}

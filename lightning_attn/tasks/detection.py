"""The LightningModule of object detection, with a ResNet with attention (paper, sections 3 and 4)."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_attn.attention import AttentionSpec
from lightning_attn.datamodules.detection.annotations import Categories
from lightning_attn.datamodules.detection.datamodule import DetectionBatch
from lightning_attn.datamodules.images.files import ImageArray
from lightning_attn.datamodules.images.transforms import resize_image, resized_size
from lightning_attn.errors import InputError
from lightning_attn.metrics.detection import coco_records, image_detections
from lightning_attn.networks.compilation import CompileBackend
from lightning_attn.networks.images.backbone import ResNetSpec, build_backbone
from lightning_attn.networks.images.batching import ChannelsLast
from lightning_attn.networks.images.detection_inference import DetectionInferenceSpec, detect
from lightning_attn.networks.images.heads.detection import Detection, DetectorSpec
from lightning_attn.networks.images.network import Detector
from lightning_attn.networks.weights.torchvision_detectors import is_torchvision_detector, read_torchvision_detector
from lightning_attn.tasks.detection_evaluation import DetectionEvaluator, original_image, rescaled
from lightning_attn.tasks.detection_files import write_detections
from lightning_attn.tasks.evaluation import Evaluator
from lightning_attn.tasks.images import ImageTask, without_weights
from lightning_attn.tasks.prediction_files import PartialResults
from lightning_attn.tasks.workload import (
    Workload,
    WorkloadOptions,
    build_network,
    image_size,
    number_of_categories,
    random_boxes,
    random_images,
    total_loss,
    total_of_outputs,
)
from lightning_attn.training.checkpoints import CheckpointError, OutputRows
from lightning_attn.training.optimization import OptimizerSpec, ScheduleSpec
from lightning_attn.visualization.detection import draw_detections, draw_detections_beside_truth
from lightning_attn.visualization.pictures import Picture


class DetectionTask(ImageTask[Categories, Detector]):
    """Trains, evaluates and runs a detector; the defaults are the paper's, except for pretrained weights.

    The categories come from the DataModule, or from the checkpoint if it has none, and are stored in checkpoints.

    Args:
        attention: Attention of the backbone's residual blocks; `mechanism: none` for none ("w/o").
        backbone: Which ResNet, its weights, and which blocks have attention.
        detector: The detection head.
        optimizer: The optimizer.
        schedule: The learning rate schedule.
        num_pictures: Number of images of a validation, test or prediction that are drawn with their boxes.
        picture_score: Detections of a lower score are not drawn, and not included in the confusion matrix.
        inference: How objects are detected in validation, test and prediction.
        channels_last: Whether maps and weights lie in memory with the channels of a position side by side; "auto" where
            convolutions are made for that: on CPUs and on CUDA. See docs/gpu.md.
        compile: Whether training compiles the layers around attentions by `torch.compile`. See docs/gpu.md.
        activation_checkpointing: Whether residual blocks and a head with attention store their inputs only, and compute
            the rest again in the backward pass: less memory for more time, with the same results.
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
        channels_last: ChannelsLast = "auto",
        compile: bool | CompileBackend = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            attention,
            backbone,
            optimizer,
            schedule,
            num_pictures,
            channels_last=channels_last,
            compile=compile,
            activation_checkpointing=activation_checkpointing,
        )
        if not 0 <= picture_score <= 1:
            raise InputError(f"picture_score must be between 0 and 1, got {picture_score}.")
        self.detector = detector
        self.picture_score = picture_score
        self.inference = inference
        self.check_sizes()
        self._files: PartialResults | None = None

    @override
    def build_network(self, num_classes: int, backbone: ResNetSpec) -> Detector:
        return Detector(num_classes, build_backbone(backbone, self.attention), self.detector)

    @override
    def convert_external_weights(self, path: str) -> dict[str, Tensor] | None:
        """The weights of torchvision's detectors; see `read_torchvision_detector`."""
        head = self.detector.head
        if not is_torchvision_detector(path, head):
            return None
        classes = self.known_classes
        state = read_torchvision_detector(path, head, classes.names, classes.ids)
        return {f"network.{name}": value for name, value in state.items()}

    @override
    def workload(self, datamodule: pl.LightningDataModule, options: WorkloadOptions) -> Workload:
        device, size = options.device, image_size(datamodule, options)
        num_classes, note = number_of_categories(datamodule, options)
        network, notes = build_network(lambda: self.build_network(num_classes, without_weights(self.backbone)), device)
        batch_size = options.batch_size or int(getattr(datamodule, "batch_size", 1))
        images = random_images(batch_size, size, device)
        if device.type == "meta":
            head = network.head

            def outputs() -> list[Tensor]:
                return head.outputs(network.backbone(images, align_corners=head.align_corners))

            forward: Callable[[], object] = outputs
            loss = functools.partial(total_of_outputs, outputs)
            notes += ("without values: all layers, on as many regions as the options allow; no losses, no suppression",)
        else:
            targets = random_boxes(batch_size, size, num_classes, device)
            forward = functools.partial(network, images)
            loss = functools.partial(total_loss, network, images, targets)
            notes += ("made-up images and weights: how many regions are proposed is not as in a trained network",)
        return Workload(
            network,
            forward,
            loss,
            batch_size,
            "images",
            batch_size,
            f"{batch_size} x {size[0]}x{size[1]} pixels, {num_classes} categories",
            tuple(filter(None, (note, *notes))),
        )

    # Training, validation and test

    @override
    def modules_to_compile(self) -> Sequence[nn.Module]:
        return self.built_network.modules_to_compile()

    @override
    def check_targets(self, batch: DetectionBatch) -> None:
        self.built_network.head.check_values(batch.targets)

    @override
    def losses(self, batch: DetectionBatch) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.built_network(batch.images, batch.targets)
        return losses

    @override
    def infer(self, batch: DetectionBatch) -> list[Detection]:
        return detect(self.built_network, batch.images, self.inference)

    @override
    def configure_evaluators(self) -> list[Evaluator]:
        return [DetectionEvaluator(self), *super().configure_evaluators()]

    def in_original_pixels(self, batch: DetectionBatch, found: list[Detection]) -> list[Detection]:
        """Detections with boxes in pixels of the original images, and category ids instead of labels."""
        ids = _category_ids(self.known_classes.ids, self.device)
        return [
            one | {"labels": ids[one["labels"]]}
            for one in (rescaled(batch, index, detection) for index, detection in enumerate(found))
        ]

    @override
    def pictures(self, batch: DetectionBatch, results: list[Detection]) -> Iterator[tuple[str, Callable[[], Picture]]]:
        targets: list[dict[str, Tensor] | None] = [*batch.targets] or [None] * len(batch)
        outputs = batch.outputs or [Path(name).stem for name in batch.names]
        for index, (output, detection, target) in enumerate(zip(outputs, results, targets, strict=True)):
            if batch.paths:  # drawn on the original image, which has more detail than the network's input
                height, width = batch.sizes[index].tolist()
                detection = rescaled(batch, index, detection)
                target = None if target is None else rescaled(batch, index, target)
                image: Callable[[], ImageArray | Tensor] = functools.partial(
                    original_image, batch.paths[index], (height, width), self.exif
                )
            else:
                image = functools.partial(Tensor.cpu, batch.images[index])
            truth = None if target is None else _on_cpu(target)
            yield output, functools.partial(self._draw, image, _on_cpu(detection), truth)

    def _draw(
        self, image: Callable[[], ImageArray | Tensor], found: Detection, target: dict[str, Tensor] | None
    ) -> Picture:
        categories = self.known_classes.names
        names, true_names = (
            [] if boxes is None else [categories[label - 1] for label in boxes["labels"].tolist()]
            for boxes in (found, target)
        )
        detected = (image(), found["boxes"], names, found["scores"])
        if target is None:
            return draw_detections(
                *detected, categories=categories, min_score=self.picture_score, option=self.option("picture_score")
            )
        return draw_detections_beside_truth(
            *detected,
            target["boxes"],
            true_names,
            categories=categories,
            min_score=self.picture_score,
            option=self.option("picture_score"),
        )

    # Prediction

    @override
    def network_input(self, image: ImageArray) -> Tensor:
        """Resized as the data was.

        Raises:
            CheckpointError: If the checkpoint does not contain the image sizes of its data.
        """
        if "min_size" not in self.preprocessing:
            raise CheckpointError(
                "The checkpoint does not contain min_size of its data; evaluate it by the command line."
            )
        lengths = int(self.preprocessing["min_size"]), int(self.preprocessing["max_size"])
        return super().network_input(resize_image(image, resized_size((image.shape[0], image.shape[1]), *lengths)))

    def predict_images(self, images: list[ImageArray]) -> list[list[dict[str, Any]]]:
        """The objects in each image, best first: `category`, `score`, and `box` (x1, y1, x2, y2) in its pixels.

        Raises:
            CheckpointError: If the checkpoint does not contain the image sizes of its data.
        """
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        resized = [self.network_input(image) for image in images]
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
            for one in self.in_original_pixels(batch, self.infer(batch))
        ]

    @override
    def on_predict_epoch_start(self) -> None:
        self._files = PartialResults(self.begin_prediction("detections_so_far"), self.global_rank)

    @override
    def interrupted_note(self) -> str:
        if self._files is None:
            return ""
        self._files.flush()
        return f"Detections of {len(self._files.results()):,} images are in {self._files.folder}, as JSON lines."

    @override
    def predict_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        assert self._files is not None
        found = self.predict_batch(batch)
        for image_id, name, detection in zip(
            batch.ids.tolist(), batch.names, self.in_original_pixels(batch, found), strict=True
        ):
            records = coco_records({image_id: image_detections(image_id, detection)})
            self._files.add({"id": image_id, "file_name": name, "detections": records})
        self._files.flush()

    @override
    def on_predict_epoch_end(self) -> None:
        """Writes `predictions/detections.json` in COCO's format, the images' names, a table, and pictures."""
        assert self._files is not None
        self._files.close()
        self.bad_images.report(self.output_directory / "predictions" / "bad_images.csv")
        self.trainer.strategy.barrier()
        if not self.trainer.is_global_zero:
            return
        classes = self.known_classes
        results = self._files.results()
        names = dict(zip(classes.ids, classes.names, strict=True))
        path = write_detections(self._files.folder.parent, results, names)
        self._files.remove()
        rank_zero_info(f"Detections in {len(results):,} images written to {path} and {path.with_suffix('.csv').name}")
        self.picture_evaluator.write({})


@functools.lru_cache(maxsize=4)
def _category_ids(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """The category id of every label, on a device: moving them there for each batch would make the host wait."""
    with torch.inference_mode(False):
        return torch.tensor((0, *ids), device=device)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}

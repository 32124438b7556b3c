"""The LightningModule of semantic segmentation, with a ResNet with attention (paper, sections 3 and 4)."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_attn.attention import AttentionSpec
from lightning_attn.datamodules.images.files import ImageArray
from lightning_attn.datamodules.segmentation.classes import SegmentationClasses
from lightning_attn.datamodules.segmentation.datamodule import SegmentationBatch
from lightning_attn.errors import InputError
from lightning_attn.io import write_file, write_table
from lightning_attn.networks.compilation import CompileBackend
from lightning_attn.networks.images.backbone import ResNetSpec, build_backbone
from lightning_attn.networks.images.batching import ChannelsLast
from lightning_attn.networks.images.heads.segmentation import SegmenterSpec
from lightning_attn.networks.images.network import Segmenter
from lightning_attn.networks.images.segmentation_inference import InferenceSpec, segment
from lightning_attn.tasks.evaluation import Evaluator
from lightning_attn.tasks.images import ImageTask, without_weights
from lightning_attn.tasks.segmentation_evaluation import SegmentationEvaluator
from lightning_attn.tasks.workload import (
    Workload,
    WorkloadOptions,
    build_network,
    image_size,
    random_images,
    total_loss,
    total_of_outputs,
)
from lightning_attn.training.checkpoints import OutputRows
from lightning_attn.training.optimization import OptimizerSpec, ScheduleSpec
from lightning_attn.visualization.pictures import Picture
from lightning_attn.visualization.segmentation import draw_segmentation, draw_segmentation_beside_truth


class SegmentationTask(ImageTask[SegmentationClasses, Segmenter]):
    """Trains, evaluates and runs a segmentation network; the defaults are the paper's, except for pretrained weights.

    The classes come from the DataModule, or from the checkpoint if it has none, and are stored in checkpoints.

    Args:
        attention: Attention of the backbone's residual blocks and of the head; `mechanism: none` for none ("w/o").
        backbone: Which ResNet, its weights, and which blocks have attention.
        segmenter: The segmentation head.
        inference: How images are segmented in validation, test and prediction.
        optimizer: The optimizer.
        schedule: The learning rate schedule.
        num_pictures: Number of images of a validation, test or prediction that are drawn in the classes' colours.
        channels_last: Whether maps and weights lie in memory with the channels of a position side by side; "auto" where
            convolutions are made for that: on CPUs and on CUDA. See docs/gpu.md.
        compile: Whether training compiles the layers around attentions by `torch.compile`. See docs/gpu.md.
        activation_checkpointing: Whether residual blocks and a head with attention store their inputs only, and compute
            the rest again in the backward pass: less memory for more time, with the same results.
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
        self.segmenter, self.inference = segmenter, inference
        self.check_sizes(len(segmenter.class_weights) or 1)
        self._label_folder: Path | None = None

    @override
    def build_network(self, num_classes: int, backbone: ResNetSpec) -> Segmenter:
        built = build_backbone(backbone, self.attention, self.segmenter.output_stride)
        return Segmenter(num_classes, built, self.attention, self.segmenter)

    @override
    def workload(self, datamodule: pl.LightningDataModule, options: WorkloadOptions) -> Workload:
        device, size = options.device, image_size(datamodule, options)
        classes = getattr(datamodule, "classes", None)
        num_classes = options.num_classes or (len(classes.names) if classes is not None else 0)
        if not num_classes:
            raise InputError("num_classes: the data has no classes. Give their number (--num_classes 19).")
        network, notes = build_network(lambda: self.build_network(num_classes, without_weights(self.backbone)), device)
        batch_size = options.batch_size or int(getattr(datamodule, "batch_size", 1))
        images = random_images(batch_size, size, device)
        if device.type == "meta":

            def outputs() -> list[Tensor]:
                head = network.head
                maps = network.backbone(images, align_corners=head.align_corners).maps
                logits = [head(maps)]
                if network.training and head.auxiliary is not None:
                    logits.append(head.auxiliary(maps["c4"]))
                return logits

            forward: Callable[[], object] = outputs
            loss = functools.partial(total_of_outputs, outputs)
            notes += ("without values: all layers up to the logits; no losses",)
        else:
            generator = torch.Generator().manual_seed(1)
            labels = [
                torch.randint(num_classes, size, generator=generator, dtype=torch.uint8).to(device) for _ in images
            ]
            forward = functools.partial(network, images)
            loss = functools.partial(total_loss, network, images, labels)
        return Workload(
            network,
            forward,
            loss,
            batch_size,
            "images",
            batch_size,
            f"{batch_size} x {size[0]}x{size[1]} pixels, {num_classes} classes",
            notes,
        )

    # Training, validation and test

    @override
    def modules_to_compile(self) -> Sequence[nn.Module]:
        return self.built_network.modules_to_compile()

    @override
    def check_targets(self, batch: SegmentationBatch) -> None:
        self.built_network.head.check_values(batch.labels)

    @override
    def losses(self, batch: SegmentationBatch) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.built_network(batch.images, batch.labels)
        return losses

    @override
    def infer(self, batch: SegmentationBatch) -> list[Tensor]:
        return segment(self.built_network, batch.images, self.inference)

    @override
    def configure_evaluators(self) -> list[Evaluator]:
        return [SegmentationEvaluator(self), *super().configure_evaluators()]

    @override
    def pictures(self, batch: SegmentationBatch, results: list[Tensor]) -> Iterator[tuple[str, Callable[[], Picture]]]:
        truths: list[Tensor | None] = [*batch.labels] or [None] * len(batch)
        for name, image, labels, truth in zip(batch.names, batch.images, results, truths, strict=True):
            draw = functools.partial(self._draw, image.cpu(), labels.cpu(), None if truth is None else truth.cpu())
            yield name, draw

    def _draw(self, image: Tensor, labels: Tensor, truth: Tensor | None) -> Picture:
        classes = self.known_classes
        if truth is None:
            return draw_segmentation(image, labels, classes.colours, classes.names)
        return draw_segmentation_beside_truth(image, labels, truth, classes.colours, classes.names)

    # Prediction

    def predict_images(self, images: list[ImageArray]) -> list[npt.NDArray[np.uint8]]:
        """The label 0..K-1 of every pixel, `[H, W]` for each image; `known_classes.names` has their names."""
        batch = [self.network_input(image) for image in images]
        return [labels.cpu().numpy() for labels in segment(self.built_network, batch, self.inference)]

    @override
    def on_predict_epoch_start(self) -> None:
        self._label_folder = self.begin_prediction("labels")

    @override
    def predict_step(self, batch: SegmentationBatch, batch_idx: int) -> None:
        """Segments a batch and writes `<name>_pred_labelIds.png` of each image, in the format of Cityscapes' scorer."""
        assert self._label_folder is not None
        for name, labels in zip(batch.names, self.predict_batch(batch), strict=True):
            ids = self.known_classes.to_ids(labels.cpu().numpy())
            write_file(self._label_folder / f"{name}_pred_labelIds.png", _png(ids), replace=True)

    @override
    def on_predict_epoch_end(self) -> None:
        self.bad_images.report(self.output_directory / "predictions" / "bad_images.csv")
        if self.trainer.is_global_zero:
            classes = self.known_classes
            rows = [
                (number, name, *colour)
                for number, name, colour in zip(classes.ids, classes.names, classes.colours, strict=True)
            ]
            header = ("id", "class", "red", "green", "blue")
            path = write_table(self.output_directory / "predictions" / "classes.csv", header, rows)
            rank_zero_info(f"Label ids written to {self._label_folder}; their classes are in {path.name} beside it")
            self.picture_evaluator.write({})


def _png(ids: npt.NDArray[Any]) -> Callable[[BinaryIO], object]:
    return lambda file: Image.fromarray(ids).save(file, format="PNG")

"""The base class of tasks on images: a network for the data's classes, checkpoints, and inference."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor, nn
from typing_extensions import override

from lightning_attn.attention import AttentionSpec
from lightning_attn.datamodules.images.batches import ImageBatch
from lightning_attn.datamodules.images.files import ExifPolicy, ImageArray, channels_first, pixels_of
from lightning_attn.errors import InputError, MissingMethodError
from lightning_attn.io import unused_path
from lightning_attn.networks.compilation import CompileBackend
from lightning_attn.networks.images.backbone import ResNetSpec
from lightning_attn.networks.images.batching import ChannelsLast, use_channels_last
from lightning_attn.networks.recomputation import recompute_activations
from lightning_attn.tasks.base import (
    BaseTask,
    argument_default,
    check_checkpointing,
    evaluating,
    plain_value,
    require_network,
)
from lightning_attn.tasks.evaluation import Evaluator
from lightning_attn.tasks.image_evaluators import AttentionExample, BadImages, Pictures
from lightning_attn.training.checkpoint_keys import PREPROCESSING_KEY
from lightning_attn.training.checkpoints import CheckpointError, read_checkpoint
from lightning_attn.training.contents import require_plain
from lightning_attn.training.optimization import OptimizerSpec, ScheduleSpec
from lightning_attn.visualization.pictures import Picture


class Classes(Protocol):
    """The classes of a data set: a frozen dataclass of tuples of plain values."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names, in the order of the network's outputs."""

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids of the data set."""


_logger = logging.getLogger(__name__)

ClassesType = TypeVar("ClassesType", bound=Classes)
NetworkType = TypeVar("NetworkType", bound=nn.Module)


class ImageTask(BaseTask, Generic[ClassesType, NetworkType]):
    """Base class of tasks that predict classes in images by a ResNet with attention.

    The classes come from the DataModule's attribute `classes_key`, or from the checkpoint if the data has none, and
    are stored in checkpoints under the same key. A subclass sets `classes_key` and `classes_type`, and defines
    `build_network`, `losses`, `infer`, `pictures` and `predict_images`; its evaluators come before those of this class.

    Args:
        attention: Attention of the network; `mechanism: none` for none ("w/o").
        backbone: Which ResNet, its weights, and which blocks have attention.
        optimizer: The optimizer.
        schedule: The learning rate schedule.
        num_pictures: Number of images of a validation, test or prediction that are drawn with their results.
        channels_last: The memory format of maps and weights; see `NormalizedBatch`.
        compile: See `BaseTask`.
        activation_checkpointing: Whether residual blocks and a head with attention store their inputs only, and compute
            the rest again in the backward pass: less memory for more time, with the same results.

    Attributes:
        classes_key: Name of the classes in the DataModule and in checkpoints.
        classes_type: The dataclass of the classes.
        classes: The classes; None before the network is built.
        preprocessing: Settings of the DataModule's image preprocessing; stored in checkpoints for `predict`.
        bad_images: The evaluator that reports unusable images.
        picture_evaluator: The evaluator that draws pictures.
        network: The network; None before it is built.
    """

    backbone_name: ClassVar[str] = "network.backbone.body"
    classes_key: ClassVar[str] = "classes"
    classes_type: ClassVar[type]

    def __init__(
        self,
        attention: AttentionSpec,
        backbone: ResNetSpec,
        optimizer: OptimizerSpec,
        schedule: ScheduleSpec,
        num_pictures: int,
        *,
        channels_last: ChannelsLast = "auto",
        compile: bool | CompileBackend = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule, compile=compile)
        if channels_last not in (True, False, "auto"):
            raise InputError(f"channels_last must be true, false or auto, got {channels_last!r}.")
        if channels_last is False and compile in (True, "inductor"):
            raise InputError(
                f"channels_last=False with compile={compile!r}: convolutions of other maps are compiled again for each "
                "size of an image. Set channels_last to auto, or compile to false."
            )
        check_checkpointing(activation_checkpointing, compile)
        self._channels_last: ChannelsLast = channels_last
        self._recomputes_activations = activation_checkpointing
        if num_pictures < 0:
            raise InputError(f"num_pictures must be at least 0, got {num_pictures}.")
        self.attention, self.backbone = attention, backbone
        self.num_pictures = num_pictures
        self.classes: ClassesType | None = None
        self.preprocessing: dict[str, int | str] = {}
        self.bad_images = BadImages(self)
        self.picture_evaluator = Pictures(self, num_pictures)
        self.network: NetworkType | None = None

    def build_network(self, num_classes: int, backbone: ResNetSpec) -> NetworkType:
        """Builds the network for a number of classes; `backbone` is the task's, perhaps without pretrained weights."""
        raise MissingMethodError(f"{type(self).__name__} must define build_network.")

    def check_sizes(self, num_classes: int = 1) -> None:
        """Builds the network on the meta device; a subclass calls this at the end of its constructor.

        The actual network is built when the number of classes is known; invalid sizes are reported before that.

        Args:
            num_classes: Any number that the parts do not contradict.

        Raises:
            ValueError: If the parts do not fit one another.
        """
        self._checked_classes = num_classes
        with torch.device("meta"):
            self.build_network(num_classes, without_weights(self.backbone))

    @override
    def use_backbone(self, attention: AttentionSpec, backbone: ResNetSpec) -> None:
        for name, given in (("attention", attention), ("backbone", backbone)):
            own = getattr(self, name)
            if own != given and own is not argument_default(type(self), name):
                raise InputError(
                    f"{name}: {own} is not that of the joint training, {given}, which has one backbone for all tasks. "
                    f"Leave it out, and describe it once (--model.{name})."
                )
            setattr(self, name, given)
            self.arguments[name] = plain_value(name, given)
        self.check_sizes(self._checked_classes)

    # Network and classes

    @override
    def configure_model(self) -> None:
        """Builds the network for the DataModule's classes, or the checkpoint's for a folder of images."""
        if self.network is not None:
            return
        self._check_sync_norm()
        self.preprocessing = dict(getattr(self.datamodule, "preprocessing", {}))
        classes = self.from_data(self.classes_key)
        if classes is None:
            if not self.checkpoint_path:
                raise InputError(
                    f"The data has no annotations with {self.classes_key}. Give a checkpoint, which contains them "
                    "(--ckpt_path FILE)."
                )
            stored = read_checkpoint(self.checkpoint_path)
            if self.membership is not None:
                stored = self.membership.checkpoint(stored, self.checkpoint_path)
            classes = self._stored_classes(stored)
        self._build(classes, self.backbone)

    def _check_sync_norm(self) -> None:
        if not self.trainer.training or self.trainer.strategy.root_device.type != "cpu":
            return
        for part in self._arguments:
            if getattr(getattr(self, part, None), "norm", None) == "sync":
                option = "--model.backbone.norm" if part == "backbone" else self.option(f"{part}.norm")
                raise InputError(
                    f"{part}.norm='sync' synchronises statistics of GPUs, but this run has none. "
                    f"Use batch or group ({option} batch)."
                )

    def _build(self, classes: ClassesType, backbone: ResNetSpec) -> None:
        self.classes = classes
        self.require_size(lambda: self.build_network(len(classes.names), without_weights(self.backbone)))
        network = self.build_network(len(classes.names), backbone)
        if self._recomputes_activations:
            recompute_activations(network)
        device = torch.device("cpu") if self._trainer is None else self.trainer.strategy.root_device
        use_channels_last(network, self._channels_last, device)
        self.network = network

    @property
    def built_network(self) -> NetworkType:
        """The network.

        Raises:
            RuntimeError: If `configure_model` or `load` has not built it yet.
        """
        return require_network(self.network)

    @property
    def known_classes(self) -> ClassesType:
        """The classes.

        Raises:
            RuntimeError: As for `built_network`.
        """
        require_network(self.network)
        assert self.classes is not None
        return self.classes

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also stores the classes and the preprocessing."""
        super().on_save_checkpoint(checkpoint)
        stored = dataclasses.asdict(self.known_classes)  # type: ignore[call-overload]  # no protocol says "dataclass"
        checkpoint[self.classes_key] = {name: list(values) for name, values in stored.items()}
        checkpoint[PREPROCESSING_KEY] = self.preprocessing

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also refuses a checkpoint whose classes differ from the data's in names or order."""
        if self.classes_key in checkpoint:  # otherwise it is another task's, which the base class reports
            stored, current = self._stored_classes(checkpoint), self.known_classes
            if stored.names != current.names:
                fix = "Use the data it was trained with."
                if sorted(stored.names) == sorted(current.names):
                    fix = f"They are the same {self.classes_key} in another order: give them in that of the checkpoint."
                raise CheckpointError(
                    f"The checkpoint was trained for {self._described(stored)}, but the data has "
                    f"{self._described(current)}. {fix}"
                )
            if stored.ids != current.ids:  # used in files only, not by the network
                _logger.info(f"Ids of {self.classes_key} are the data's: {self._described(current)}.")
        super().on_load_checkpoint(checkpoint)

    @override
    def output_names(self) -> tuple[str, ...]:
        return self.known_classes.names

    @override
    def stored_output_names(self, checkpoint: dict[str, Any]) -> tuple[str, ...]:
        return self._stored_classes(checkpoint).names

    @override
    def build_from_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._build(self._stored_classes(checkpoint), without_weights(self.backbone))
        self.preprocessing = dict(checkpoint.get(PREPROCESSING_KEY, {}))

    def _stored_classes(self, checkpoint: dict[str, Any]) -> ClassesType:
        stored = checkpoint.get(self.classes_key)
        if stored is None:
            raise CheckpointError(
                f"The checkpoint has no {self.classes_key}: it was not written by a {type(self).__name__}. Use another."
            )
        try:
            require_plain(self.classes_key, stored)
            classes: ClassesType = self.classes_type(**{name: _tuples(values) for name, values in stored.items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"The checkpoint is damaged: its {self.classes_key} are not names and ids ({error}). Use another "
                "checkpoint of the same run."
            ) from error
        return classes

    def _described(self, classes: ClassesType) -> str:
        """The number of classes and the first names and ids."""
        pairs = [f"{name} ({number})" for name, number in zip(classes.names, classes.ids, strict=True)]
        return f"{len(pairs)} {self.classes_key}: {', '.join(pairs[:6])}{', ...' if len(pairs) > 6 else ''}"

    # Training, validation and test

    @override
    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        self.bad_images.update(batch, {})
        losses = self.losses(batch)
        total = torch.stack(list(losses.values())).sum()
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(batch))
        if len(losses) > 1:
            self.log_dict({f"train/{name}": loss.detach() for name, loss in losses.items()}, batch_size=len(batch))
        return total

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Checks targets for a GPU while they are on the CPU; on the GPU that would make the host wait."""
        if self.trainer.training and self.device.type != "cpu":
            self.check_targets(batch)
        return batch

    def check_targets(self, batch: Any) -> None:
        """Raises a ValueError for a training batch on the CPU whose targets have values that the network refuses."""

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The network's losses for a batch by name, to be summed."""
        raise MissingMethodError(f"{type(self).__name__} must define losses.")

    def infer(self, batch: Any) -> list[Any]:
        """The network's result for each image of a batch; a rank without images gets an empty batch."""
        raise MissingMethodError(f"{type(self).__name__} must define infer.")

    def pictures(self, batch: Any, results: list[Any]) -> Iterator[tuple[str, Callable[[], Picture]]]:
        """A unique file stem for each image of a batch, and a function that draws it later, from tensors on the CPU."""
        raise MissingMethodError(f"{type(self).__name__} must define pictures.")

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"results": self.infer(batch)}

    test_step = validation_step

    @override
    def configure_evaluators(self) -> list[Evaluator]:
        return [self.bad_images, self.picture_evaluator, AttentionExample(self)]

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.bad_images.reset("train")

    @override
    def on_fit_end(self) -> None:
        self.bad_images.report()

    # Prediction

    def begin_prediction(self, name: str) -> Path:
        """Starts a prediction, and returns a new folder below `predictions/`, the same for all ranks."""
        self.bad_images.reset("predict")
        self.picture_evaluator.reset("predict")
        folder = unused_path(self.output_directory / "predictions" / name)
        # Rank 0 decides: it may already have written files when another rank checks.
        return Path(self.trainer.strategy.broadcast(str(folder)))

    def predict_batch(self, batch: Any) -> list[Any]:
        """The results of a batch of a prediction, which are also passed to the evaluators of images."""
        results = self.infer(batch)
        for evaluator in (self.bad_images, self.picture_evaluator):
            evaluator.update(batch, {"results": results})
        return results

    def example_image(self, size: tuple[int, int] | None) -> Tensor:
        """A random image `[3, H, W]`, uint8, of this size, or of the size that the data was resized to.

        Raises:
            ValueError: If no size is known or it is not positive.
        """
        if size is None and self.preprocessing.get("min_size"):  # 0: not resized
            size = int(self.preprocessing["min_size"]), int(self.preprocessing["max_size"])
        if size is None or min(size) < 1:
            given = "none was given" if size is None else f"got {size[0]} {size[1]}"
            raise InputError(
                f"size: an exported graph is for images of one size, and {given}. Give height and width in pixels "
                "(--size 512 1024)."
            )
        return torch.randint(256, (3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def predict(self, inputs: Sequence[Image.Image | ImageArray | str | Path], batch_size: int = 1) -> list[Any]:
        """The results for images, as plain values, without a Trainer.

        Args:
            inputs: Pillow images, paths, or RGB pixels as uint8 `[H, W, 3]`, of any sizes.
            batch_size: Number of images per batch, which are padded to one size.

        Returns:
            For each image the result of the task's `predict_images`.

        Raises:
            RuntimeError: If the network is not built; `load` builds it.
            TypeError: If an input is not an image.
            ImageError: If a file cannot be used.
        """
        require_network(self.network)
        if isinstance(inputs, str | Path | Image.Image):
            raise TypeError("predict takes several images: give a list, [image] for one.")
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}.")
        found: list[Any] = []
        with evaluating(self):
            for begin in range(0, len(inputs), batch_size):
                chosen = inputs[begin : begin + batch_size]
                found += self.predict_images([pixels_of(image, self.exif) for image in chosen])
        return found

    @property
    def exif(self) -> ExifPolicy:
        """How EXIF orientations were handled in the training data."""
        return cast(ExifPolicy, self.preprocessing.get("exif", "apply"))

    def network_input(self, image: ImageArray) -> Tensor:
        """An original image `[H, W, 3]` as the network gets it, uint8 `[3, H', W']` on the task's device."""
        return channels_first(image).to(self.device)

    def predict_images(self, images: list[ImageArray]) -> list[Any]:
        """The results for original images `[H, W, 3]`; `predict` calls it, in evaluation mode."""
        raise MissingMethodError(f"{type(self).__name__} must define predict_images.")


def without_weights(backbone: ResNetSpec) -> ResNetSpec:
    """The backbone without pretrained weights, for weights of a checkpoint."""
    return dataclasses.replace(backbone, weights="none")


def _tuples(values: Any) -> Any:
    return tuple(_tuples(value) for value in values) if isinstance(values, list | tuple) else values

"""What the tasks on images share: a network for the data's classes, stored in checkpoints, and inference."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor, nn
from typing_extensions import override

from datamodules.images.batches import ImageBatch
from datamodules.images.files import ExifPolicy, ImageArray, pixels_of
from lightning_attn.attention import AttentionSpec
from lightning_attn.errors import InputError, MissingMethodError
from lightning_attn.io import unused_path
from lightning_attn.networks.images.backbone import ResNetSpec
from lightning_attn.tasks.base import BaseTask, evaluating, require_network
from lightning_attn.tasks.evaluation import Evaluator
from lightning_attn.tasks.image_evaluators import BadImages, Pictures
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
        """What the data calls them."""


_logger = logging.getLogger(__name__)

ClassesType = TypeVar("ClassesType", bound=Classes)
NetworkType = TypeVar("NetworkType", bound=nn.Module)


class ImageTask(BaseTask, Generic[ClassesType, NetworkType]):
    """Base of tasks that find classes in images with an attended ResNet.

    The classes come from the DataModule's attribute `classes_key`, or from the checkpoint when the data has none, and
    are stored in checkpoints under the same key. A subclass sets `classes_key` and `classes_type`, and defines
    `build_network`, `losses`, `infer`, `pictures` and `predict_images`; its evaluators come before those of this class.

    Args:
        attention: Attention of the network; `mechanism: none` leaves it out ("w/o").
        backbone: Which ResNet, its weights, and where the attention stands.
        optimizer: The optimizer.
        schedule: The learning rate's course.
        num_pictures: How many images of a validation, test or prediction are drawn with their results.

    Attributes:
        classes_key: Name of the classes in the DataModule and in checkpoints.
        classes_type: The dataclass that holds them.
        classes: They themselves, as soon as there is a network.
        preprocessing: What the DataModule does to every image first; stored in checkpoints too, for `predict`.
        bad_images: The images that could not be used in the last stage.
        kept_pictures: The pictures of the current pass.
        network: The network, as soon as it is built.
    """

    classes_key: ClassVar[str] = "classes"
    classes_type: ClassVar[type]

    def __init__(
        self,
        attention: AttentionSpec,
        backbone: ResNetSpec,
        optimizer: OptimizerSpec,
        schedule: ScheduleSpec,
        num_pictures: int,
    ) -> None:
        super().__init__(optimizer, schedule)
        if num_pictures < 0:
            raise InputError(f"num_pictures must be at least 0, got {num_pictures}.")
        self.attention, self.backbone = attention, backbone
        self.num_pictures = num_pictures
        self.classes: ClassesType | None = None
        self.preprocessing: dict[str, int | str] = {}
        self.bad_images = BadImages(self)
        self.kept_pictures = Pictures(self, num_pictures)
        self.network: NetworkType | None = None

    def build_network(self, num_classes: int, backbone: ResNetSpec) -> NetworkType:
        """The network for a number of classes; `backbone` is the task's own, or the same without pretrained weights."""
        raise MissingMethodError(f"{type(self).__name__} must define build_network.")

    def check_sizes(self, num_classes: int = 1) -> None:
        """Builds the network without numbers, for a subclass to call as soon as it knows its parts.

        The real network waits for the number of classes; a size that does not fit should not wait for the data.

        Args:
            num_classes: Any number that the parts do not contradict.

        Raises:
            ValueError: If the parts do not fit one another.
        """
        with torch.device("meta"):
            self.build_network(num_classes, _without_weights(self.backbone))

    # Network and classes

    def configure_model(self) -> None:
        """Builds the network for the DataModule's classes, or the checkpoint's for a folder of images."""
        if self.network is not None:
            return
        self._refuse_synchronised_statistics_on_cpus()
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        self.preprocessing = dict(getattr(datamodule, "preprocessing", {}))
        classes = getattr(datamodule, self.classes_key)
        if classes is None:
            if not self.checkpoint_path:
                raise InputError(
                    f"The data has no annotations, which name {self.classes_key}. Give a checkpoint, which has them "
                    "(--ckpt_path FILE)."
                )
            classes = self._stored_classes(read_checkpoint(self.checkpoint_path))
        self._build(classes, self.backbone)

    def _refuse_synchronised_statistics_on_cpus(self) -> None:
        if not self.trainer.training or self.trainer.strategy.root_device.type != "cpu":
            return
        for part in self._arguments:
            if getattr(getattr(self, part, None), "norm", None) == "sync":
                raise InputError(
                    f"{part}.norm='sync' shares statistics between GPUs, and this run has none. "
                    f"Use batch or group (--model.{part}.norm batch)."
                )

    def _build(self, classes: ClassesType, backbone: ResNetSpec) -> None:
        self.classes = classes
        self.require_size(lambda: self.build_network(len(classes.names), _without_weights(self.backbone)))
        self.network = self.build_network(len(classes.names), backbone)

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the classes, without which the network's outputs mean nothing."""
        super().on_save_checkpoint(checkpoint)
        stored = dataclasses.asdict(self.known_classes)  # type: ignore[call-overload]  # no protocol says "dataclass"
        checkpoint[self.classes_key] = {name: list(values) for name, values in stored.items()}
        checkpoint[PREPROCESSING_KEY] = self.preprocessing

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also refuses a checkpoint whose outputs mean other classes, by name and order, than the data's."""
        if self.classes_key in checkpoint:  # otherwise it is another task's, as the base class says
            stored, current = self._stored_classes(checkpoint), self.known_classes
            if stored.names != current.names:
                way = "Use the data it was trained with."
                if sorted(stored.names) == sorted(current.names):
                    way = f"They are the same {self.classes_key} in another order: give them in that of the checkpoint."
                raise CheckpointError(
                    f"The checkpoint was trained for {self._described(stored)}, but the data has "
                    f"{self._described(current)}. {way}"
                )
            if stored.ids != current.ids:  # numbers in files, which the network knows nothing of
                _logger.info(f"Ids of {self.classes_key} are the data's: {self._described(current)}.")
        super().on_load_checkpoint(checkpoint)

    def output_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.known_classes.names

    def stored_output_names(self, checkpoint: dict[str, Any]) -> tuple[str, ...]:
        """The same of a checkpoint."""
        return self._stored_classes(checkpoint).names

    def build_from_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Builds the network for the classes in the checkpoint, which also holds all weights."""
        self._build(self._stored_classes(checkpoint), _without_weights(self.backbone))
        self.preprocessing = dict(checkpoint.get(PREPROCESSING_KEY, {}))

    def _stored_classes(self, checkpoint: dict[str, Any]) -> ClassesType:
        stored = checkpoint.get(self.classes_key)
        if stored is None:
            raise CheckpointError(
                f"The checkpoint holds no {self.classes_key}: it was not written by a {type(self).__name__}."
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
        """The classes, shortened."""
        pairs = [f"{name} ({number})" for name, number in zip(classes.names, classes.ids, strict=True)]
        return f"{len(pairs)} {self.classes_key}: {', '.join(pairs[:6])}{', ...' if len(pairs) > 6 else ''}"

    # Training, validation and test

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """The sum of the network's losses."""
        self.bad_images.update(batch, {})
        losses = self.losses(batch)
        total = torch.stack(list(losses.values())).sum()
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(batch))
        if len(losses) > 1:
            self.log_dict({f"train/{name}": loss.detach() for name, loss in losses.items()}, batch_size=len(batch))
        return total

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The network's losses for a batch by name, to be summed."""
        raise MissingMethodError(f"{type(self).__name__} must define losses.")

    def infer(self, batch: Any) -> list[Any]:
        """The network's result for each image of a batch; a rank that has no images gets an empty batch."""
        raise MissingMethodError(f"{type(self).__name__} must define infer.")

    def pictures(self, batch: Any, results: list[Any]) -> Iterator[tuple[str, Callable[[], Picture]]]:
        """Name of each image of a batch, unique and fit for a file, and what draws it later from tensors on the CPU."""
        raise MissingMethodError(f"{type(self).__name__} must define pictures.")

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"results": self.infer(batch)}

    test_step = validation_step

    @override
    def configure_evaluators(self) -> list[Evaluator]:
        return [self.bad_images, self.kept_pictures]

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.bad_images.reset("train")

    @override
    def on_fit_end(self) -> None:
        self.bad_images.report()

    # Prediction

    def begin_prediction(self, name: str) -> Path:
        """Begins a pass, and chooses a folder below `predictions/`, the same for all ranks."""
        self.bad_images.reset("predict")
        self.kept_pictures.reset("predict")
        folder = unused_path(self.output_directory / "predictions" / name)
        # Rank 0 decides: by the time that another looks, it may have begun to write.
        return Path(self.trainer.strategy.broadcast(str(folder)))

    def predict_batch(self, batch: Any) -> list[Any]:
        """The results of a batch of a prediction, of which pictures are kept."""
        results = self.infer(batch)
        for evaluator in (self.bad_images, self.kept_pictures):
            evaluator.update(batch, {"results": results})
        return results

    def example_image(self, size: tuple[int, int] | None) -> Tensor:
        """A random image `[3, H, W]`, uint8, of a graph's size, or of the one that the data is resized to.

        Raises:
            ValueError: If no size is known or it is not positive.
        """
        if size is None and "min_size" in self.preprocessing:
            size = int(self.preprocessing["min_size"]), int(self.preprocessing["max_size"])
        if size is None or min(size) < 1:
            given = "none was given" if size is None else f"got {size[0]} {size[1]}"
            raise InputError(
                f"size: an exported graph is for images of one size, and {given}. Give height and width in pixels "
                "(--size 512 1024)."
            )
        return torch.randint(256, (3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def predict(self, inputs: Sequence[Image.Image | ImageArray | str | Path], batch_size: int = 1) -> list[Any]:
        """The results for some images, as plain values, without a Trainer.

        Args:
            inputs: Pillow images, paths, or RGB pixels as uint8 `[H, W, 3]`, of any sizes.
            batch_size: How many the network sees at a time. Images of a batch are padded to one size.

        Returns:
            For each image what `predict_images` of the task returns.

        Raises:
            RuntimeError: If there is no network yet; `load` makes one.
            TypeError: If something is not an image.
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
        """What the data that the network was trained with did about EXIF orientations."""
        return cast(ExifPolicy, self.preprocessing.get("exif", "apply"))

    def predict_images(self, images: list[ImageArray]) -> list[Any]:
        """The results for images `[H, W, 3]` as they were taken; `predict` calls it, in evaluation mode."""
        raise MissingMethodError(f"{type(self).__name__} must define predict_images.")


def _without_weights(backbone: ResNetSpec) -> ResNetSpec:
    """The backbone for weights that come from elsewhere."""
    return dataclasses.replace(backbone, weights="none")


def _tuples(values: Any) -> Any:
    return tuple(_tuples(value) for value in values) if isinstance(values, list | tuple) else values

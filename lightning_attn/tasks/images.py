"""What the tasks on images share: a network for the data's classes, stored in checkpoints, and pictures of results."""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

import torch
from PIL import Image
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from datamodules.images.files import ExifPolicy, ImageArray, pixels_of
from datamodules.images.folders import listed
from datamodules.sampling.image_batches import BadImage, ImageBatch
from lightning_attn.attention import AttentionSpec
from lightning_attn.errors import InputError, MissingMethodError
from lightning_attn.io import unused_path, write_json, write_table
from lightning_attn.metrics.gather import gather_by_id
from lightning_attn.networks.images.backbone import ResNetSpec
from lightning_attn.tasks.base import BaseTask, evaluating, require_network
from lightning_attn.training.checkpoint_keys import PREPROCESSING_KEY
from lightning_attn.training.checkpoints import CheckpointError, read_checkpoint
from lightning_attn.training.contents import require_plain
from lightning_attn.training.optimization import OptimizerSpec, ScheduleSpec
from lightning_attn.visualization.pictures import Picture, save_picture


class Classes(Protocol):
    """What is told apart: a frozen dataclass of tuples of plain values."""

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
    """Base of tasks that look at images with an attended ResNet and tell classes apart.

    The classes come from the DataModule's attribute `classes_key`, or from the checkpoint when the data has none, and
    are stored in checkpoints under the same word. A subclass sets `classes_key` and `classes_type`, and defines
    `build_network`, `training_step`, and for validation and test `start_scoring`, `score`, `log_scores` and
    `write_scores`.

    Args:
        attention: Attention of the network; `mechanism: none` leaves it out ("w/o").
        backbone: Which ResNet, its weights, and where the attention stands.
        optimizer: The optimizer.
        schedule: The learning rate's course.
        num_pictures: How many images of a validation, test or prediction are drawn with what was found.

    Attributes:
        classes_key: What the task calls its classes.
        classes_type: The dataclass that holds them.
        classes: They themselves, as soon as there is a network.
        preprocessing: What the DataModule does to every image first; stored in checkpoints too, for `predict`.
        bad_images: The images that could not be used in the last stage, with the reasons.
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
        self.bad_images: dict[BadImage, None] = {}
        self.network: NetworkType | None = None
        self._pictures: dict[str, Callable[[], Picture]] = {}

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
        """What is told apart.

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

    # Images that cannot be used

    def note_bad_images(self, batch: ImageBatch) -> None:
        """Keeps in mind, and says, which images of a batch could not be used."""
        for image in batch.bad:
            if image not in self.bad_images:
                self.bad_images[image] = None
                _logger.warning(f"Skipped: {image.reason}")

    def report_bad_images(self, path: Path | None = None) -> None:
        """Says at the end of a stage which images of all ranks could not be used; a collective.

        Args:
            path: A CSV file to write their names and the reasons into; None for none.
        """
        unreadable = dict.fromkeys(getattr(self.trainer.datamodule, "unreadable", ()))  # type: ignore[attr-defined]
        self.bad_images = gather_by_id(self.bad_images | unreadable)
        if not self.bad_images or not self.trainer.is_global_zero:
            return
        where = ""
        if path is not None:
            where = f", which {write_table(path, ('file_name', 'reason'), self.bad_images)} lists"
        _logger.warning(
            f"{len(self.bad_images):,} images could not be used and were skipped{where}: "
            f"{listed([image.name for image in self.bad_images], 20)}"
        )

    def on_fit_start(self) -> None:
        """Forgets the images of an earlier stage."""
        super().on_fit_start()
        self.bad_images = {}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Says which images were replaced."""
        self.note_bad_images(batch)

    def on_fit_end(self) -> None:
        """Says which images were replaced in the whole training."""
        self.report_bad_images()

    # Validation and test

    def start_scoring(self, split: str) -> None:
        """Makes the metrics of a pass over "val" or "test"."""
        raise MissingMethodError(f"{type(self).__name__} must define start_scoring.")

    def score(self, batch: Any) -> None:
        """Runs the network on a batch, and hands what it found to the metrics and to `keep_picture`."""
        raise MissingMethodError(f"{type(self).__name__} must define score.")

    def log_scores(self, stage: str) -> dict[str, Any]:
        """Logs the scores of the pass under `stage/`, the same on every rank; returns them as JSON can hold them."""
        raise MissingMethodError(f"{type(self).__name__} must define log_scores.")

    def write_scores(self, results: dict[str, Any]) -> None:
        """Writes and prints what `log_scores` returned of a test; on rank 0."""
        raise MissingMethodError(f"{type(self).__name__} must define write_scores.")

    def on_validation_epoch_start(self) -> None:
        """Forgets the images of an earlier pass."""
        self.start_scoring("val")
        self.forget_pictures()
        if self.trainer.state.fn != TrainerFn.FITTING:
            self.bad_images = {}

    def on_test_epoch_start(self) -> None:
        """Forgets the images of an earlier pass."""
        self.start_scoring("test")
        self.forget_pictures()
        self.bad_images = {}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Scores a batch."""
        self.note_bad_images(batch)
        self.score(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Scores a batch."""
        self.note_bad_images(batch)
        self.score(batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the scores of the whole set, and shows pictures in TensorBoard."""
        self.log_scores("val")
        self.log_pictures("val")

    def on_test_epoch_end(self) -> None:
        """Logs the scores of the whole set, and writes them and pictures into the run directory."""
        results = self.log_scores("test")
        self.report_bad_images()
        if self.trainer.is_global_zero:
            self.write_scores(results)
            self.save_pictures("test")

    def write_metrics(
        self, results: dict[str, Any], header: tuple[str, str], per_class: str, totals: Sequence[str]
    ) -> None:
        """Writes `test_metrics.json`, and prints a table.

        Args:
            results: Everything.
            header: Headings of the table's columns: what a row is, and its score.
            per_class: Which of the results, less `test/`, holds a score for each class.
            totals: Which of them, less `test/`, follow in the table.
        """
        path = write_json(self.output_directory / "test_metrics.json", results)
        table = Table(*header, title=f"Test set, {results['test/num_images']} images")
        for name, value in results[f"test/{per_class}"].items():
            table.add_row(escape(name), _shown(value))
        table.add_section()
        for name in totals:
            table.add_row(name, _shown(results[f"test/{name}"]))
        Console().print(table)
        rank_zero_info(f"Scores written to {path}")

    # Prediction

    def begin_prediction(self, name: str) -> Path:
        """Forgets an earlier pass, and chooses a folder below `predictions/`, the same for all ranks."""
        self.bad_images = {}
        self.forget_pictures()
        folder = unused_path(self.output_directory / "predictions" / name)
        # Rank 0 decides: by the time that another looks, it may have begun to write.
        return Path(self.trainer.strategy.broadcast(str(folder)))

    def example_image(self, size: tuple[int, int] | None) -> Tensor:
        """A random image `[3, H, W]`, uint8, of a program's size, or of the one that the data is resized to.

        Raises:
            ValueError: If no size is known or it is not positive.
        """
        if size is None and "min_size" in self.preprocessing:
            size = int(self.preprocessing["min_size"]), int(self.preprocessing["max_size"])
        if size is None or min(size) < 1:
            given = "none was given" if size is None else f"got {size[0]} {size[1]}"
            raise InputError(
                f"size: a program is for images of one size, and {given}. Give height and width in pixels "
                "(--size 512 1024)."
            )
        return torch.randint(256, (3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def predict(self, inputs: Sequence[Image.Image | ImageArray | str | Path], batch_size: int = 1) -> list[Any]:
        """What is in some images, as plain values, without a Trainer.

        Args:
            inputs: Pillow images, paths, or RGB pixels as uint8 `[H, W, 3]`, of any sizes.
            batch_size: How many the network sees at a time. Images of a batch are padded to one size.

        Returns:
            For each image what `predict_images` of the task says.

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
        """What is in images `[H, W, 3]` as they were taken; `predict` calls it, in evaluation mode."""
        raise MissingMethodError(f"{type(self).__name__} must define predict_images.")

    # Pictures

    @property
    def wants_pictures(self) -> bool:
        """Whether more pictures are to be kept: the first `num_pictures` of rank 0 are."""
        return self.trainer.is_global_zero and len(self._pictures) < self.num_pictures

    def keep_picture(self, name: str, draw: Callable[[], Picture]) -> None:
        """Keeps a picture, if more are wanted, to be drawn at the end of the pass.

        Args:
            name: Name of the image, each once and fit for a file; see `ImageBatch.outputs`.
            draw: Draws it; what it needs should be on the CPU.
        """
        if self.wants_pictures:
            self._pictures[name] = draw

    def forget_pictures(self) -> None:
        """Forgets those of an earlier pass, which may have been broken off."""
        self._pictures = {}

    def log_pictures(self, stage: str) -> None:
        """Shows the kept pictures in TensorBoard, unless this is Lightning's check before training."""
        if not self.trainer.sanity_checking:
            for name, draw in self._pictures.items():
                self.log_picture(f"{stage}/{name}", draw())
        self.forget_pictures()

    def save_pictures(self, stage: str) -> None:
        """Writes the kept pictures into the run directory."""
        if not self._pictures:
            return
        folder = unused_path(self.output_directory / "predictions" / f"{stage}_pictures")
        for name, draw in self._pictures.items():
            save_picture(draw(), folder / f"{name}.png")
        rank_zero_info(f"{len(self._pictures)} pictures drawn into {folder}")
        self.forget_pictures()


def number_or_none(value: Any) -> Any:
    """A value as JSON can hold it: of what is not there, a score is NaN, which JSON has not."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _shown(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"


def _without_weights(backbone: ResNetSpec) -> ResNetSpec:
    """The backbone for weights that come from elsewhere."""
    return dataclasses.replace(backbone, weights="none")


def _tuples(values: Any) -> Any:
    return tuple(_tuples(value) for value in values) if isinstance(values, list | tuple) else values

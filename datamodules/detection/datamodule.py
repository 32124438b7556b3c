"""Object detection data in any layout of files: batches, data set, and the base of the DataModules."""

import abc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import LongTensor, Tensor
from typing_extensions import override

from lightning_attn.datamodules.detection.annotations import (
    Categories,
    DetectionAnnotations,
    Integers,
    TargetStatus,
    check_categories,
    check_images,
    read_annotated,
)
from lightning_attn.datamodules.detection.transforms import Augmentation, EvaluationTransform, TrainingTransform
from lightning_attn.datamodules.images.batches import BadImage, BadImagePolicy, ImageBatch, ImageDataset
from lightning_attn.datamodules.images.datamodule import ImageDataModule, require_at_least
from lightning_attn.datamodules.images.files import ExifPolicy, ImageHeader, channels_first, read_image
from lightning_attn.datamodules.images.folders import PackedText, listed, printable, unique_stems
from lightning_attn.datamodules.sampling.grouped_batches import SampleRequest
from lightning_attn.errors import InputError

logger = logging.getLogger(__name__)

__all__ = ["DetectionBatch", "DetectionDataModule", "DetectionDataset"]


@dataclass
class DetectionBatch(ImageBatch):
    """Images, each of its own size, and their boxes; possibly no image.

    Args:
        ids: Image ids, `[B]`.
        images: RGB images as the network gets them, uint8 `[3, H, W]` each.
        targets: For each image `boxes`, float32 `[n, 4]` (x1, y1, x2, y2) in pixels of that image, and `labels`,
            `[n]` in 1..K; no entries at all in prediction.
        sizes: Height and width of each image before it was resized, `[B, 2]`.
        names: File names, below the folder of the split.
    """

    on_cpu: ClassVar[tuple[str, ...]] = (*ImageBatch.on_cpu, "sizes")

    targets: list[dict[str, Tensor]]
    sizes: LongTensor
    names: list[str] = field(default_factory=list)


class DetectionDataset(ImageDataset[DetectionBatch]):
    """Images and their boxes, read and transformed a batch at a time.

    Args:
        annotations: The annotations.
        folder: Folder of the images.
        transform: Applied to each image.
        chosen: Indices in `annotations` of the images of this data set, `[images]`.
        seed: Seed of the random changes, together with the epoch and the image.
        with_targets: Whether batches hold boxes.
        exif: See `ExifPolicy`.
        on_bad_image: See `BadImagePolicy`.
        replaces_bad_images: See `ImageDataset`.
        repeats: See `ImageDataset`.
    """

    def __init__(
        self,
        annotations: DetectionAnnotations,
        folder: Path,
        transform: TrainingTransform | EvaluationTransform,
        chosen: Integers,
        *,
        seed: int = 0,
        with_targets: bool = True,
        exif: ExifPolicy = "apply",
        on_bad_image: BadImagePolicy = "stop",
        replaces_bad_images: bool = False,
        repeats: npt.NDArray[np.float64] | None = None,
    ) -> None:
        self.annotations = annotations
        self.folder = folder
        self.transform = transform
        self.chosen = chosen
        self.seed = seed
        self.with_targets = with_targets
        self.exif = exif
        self.on_bad_image = on_bad_image
        self.replaces_bad_images = replaces_bad_images
        self.repeats = repeats
        self.outputs = PackedText(unique_stems([annotations.names[index] for index in range(len(annotations))]))

    @override
    def __len__(self) -> int:
        return len(self.chosen)

    @override
    def groups(self) -> Integers:
        """1 for wide images and 0 for tall ones, `[images]`."""
        sizes = self.annotations.sizes[self.chosen]
        return np.asarray(sizes[:, 1] >= sizes[:, 0], dtype=np.int64)

    @override
    def name(self, index: int) -> str:
        return printable(self.annotations.names[int(self.chosen[index])])

    @override
    def batch(self, requests: Sequence[SampleRequest]) -> DetectionBatch:
        annotations = self.annotations
        used, samples, bad = self.read_each(requests, self._sample)
        chosen = [int(self.chosen[request.index]) for request in used]
        return DetectionBatch(
            torch.from_numpy(annotations.image_ids[chosen]),  # type: ignore[arg-type]
            [image for image, _ in samples],
            [target for _, target in samples] if self.with_targets else [],
            torch.from_numpy(annotations.sizes[chosen].reshape(-1, 2)),  # type: ignore[arg-type]
            [self.name(request.index) for request in used],
            outputs=[self.outputs[index] for index in chosen],
            paths=[str(self.folder / annotations.names[index]) for index in chosen],
            bad=bad,
        )

    def _sample(self, request: SampleRequest) -> tuple[Tensor, dict[str, Tensor]]:
        """An image `[3, H, W]` and its target."""
        index = int(self.chosen[request.index])
        pixels = read_annotated(self.annotations, index, read_image, self.folder, self.exif)
        boxes, labels = self.annotations.targets(index)
        pixels, boxes, labels = self.transform(pixels, boxes, labels, (self.seed, request.epoch, index))
        return channels_first(pixels), {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)}


class DetectionDataModule(ImageDataModule, abc.ABC):
    """Base of the DataModules of object detection: a subclass reads the annotations of a split.

    Training targets are the boxes of single objects, cut at the borders of their image; crowds, and boxes without an
    area inside the image or smaller than a pixel when it has been resized, are not. Evaluation reads every annotation.

    Train with `Trainer(use_distributed_sampler=False)`: batches are planned here for all ranks.

    Args:
        root: Folder of the data.
        split_names: Names of the splits "train", "val" and "test"; see `ImageDataModule`.
        min_size: Length of the short side that images are resized to, in pixels; 0 leaves images as they are unless
            they are longer than `max_size`.
        max_size: Bound of the long side; 0 for none.
        augmentation: What is changed at random in training images.
        keep_empty: Whether training images without a box are used.
        repeat_threshold: Training images with a category that is in less than this share of the images come several
            times in an epoch: sqrt(threshold / share) times, by the rarest of their categories (repeat-factor sampling,
            Gupta et al., LVIS, 2019, which has 0.001); 0 for once each.
        options: Those of `ImageDataModule`.

    Raises:
        ValueError: If a value is out of range, or no split is named.
    """

    def __init__(
        self,
        root: str,
        split_names: dict[str, str],
        *,
        min_size: int = 800,
        max_size: int = 1333,
        augmentation: Augmentation = Augmentation(),  # noqa: B008 (frozen)
        keep_empty: bool = False,
        repeat_threshold: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(root, split_names, **options)
        require_at_least("min_size", min_size, 0)
        require_at_least("max_size", max_size, 0)
        if not 0 <= repeat_threshold <= 1:
            raise InputError(f"repeat_threshold: {repeat_threshold} is not between 0 and 1.")
        self.min_size = min_size
        self.max_size = max_size
        self.augmentation = augmentation
        self.keep_empty = keep_empty
        self.repeat_threshold = repeat_threshold
        self._splits: dict[str, tuple[DetectionAnnotations, Path]] = {}
        self._categories: Categories | None = None

    @abc.abstractmethod
    def read_split(self, split: str) -> tuple[DetectionAnnotations, Path]:
        """The annotations of "train", "val" or "test", and the folder that the names of their images are relative to.

        Raises:
            FileNotFoundError: If annotations or images are missing.
            ValueError: On bad annotations; the message names the file and the entry.
        """

    def read_categories(self) -> Categories | None:
        """The classes, when a folder is predicted; None if `root` has no annotations."""
        return None

    def image_weights(self) -> npt.NDArray[np.float64] | None:
        """How often each training image comes in an epoch, on average, by its data set; None for once."""
        return None

    @property
    def categories(self) -> Categories | None:
        """The classes; None where a folder is predicted and `root` has no annotations.

        Raises:
            RuntimeError: Before `setup`.
        """
        if not self._splits:
            raise RuntimeError(
                "the categories are known after setup(), which the Trainer calls; without one, call it yourself."
            )
        return self._categories

    @property
    @override
    def preprocessing(self) -> dict[str, int | str]:
        return {"min_size": self.min_size, "max_size": self.max_size} | super().preprocessing

    @property
    @override
    def unreadable(self) -> list[BadImage]:
        return [BadImage(*one) for annotations, _ in self._splits.values() for one in annotations.unreadable.items()]

    def annotations(self, split: str) -> DetectionAnnotations:
        """The annotations of a split as arrays.

        Args:
            split: "train", "val", "test" or "predict".

        Raises:
            RuntimeError: If `setup` has not read that split.
        """
        return self._split(split)[0]

    def images_folder(self, split: str) -> Path:
        """The folder of the images of a split; arguments and errors are those of `annotations`."""
        return self._split(split)[1]

    def ground_truth(self, split: str) -> dict[str, Any]:
        """The input of COCO's scorer: `images`, `annotations` and `categories`.

        Args:
            split: "train", "val" or "test".

        Raises:
            RuntimeError: If `setup` has not read that split.
        """
        return self._split(split)[0].ground_truth()

    @override
    def setup(self, stage: str) -> None:
        """Reads and checks the annotations that a stage needs, and checks their images without decoding all of them.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            FileNotFoundError: If annotations or images are missing.
            ValueError: On bad annotations or images; the message names the file and the entry or image id.
        """
        for split in self.splits_of(stage):
            if split == "predict" and self.predict_folder:
                folder = Path(self.predict_folder)
                self._splits[self._key(split)] = DetectionAnnotations.from_folder(folder, self.exif), folder
                if self._categories is None:
                    self._categories = self.read_categories()
            else:
                self._load("test" if split == "predict" else split)
        if stage == "fit":
            self._check_training()

    @override
    def training_dataset(self) -> DetectionDataset:
        """The training images, randomly changed, in groups of wide and of tall ones."""
        annotations, folder = self._split("train")
        chosen = np.arange(len(annotations)) if self.keep_empty else annotations.with_targets(*self.training_size)
        repeats = self._repeats(annotations)
        return DetectionDataset(
            annotations,
            folder,
            TrainingTransform(self.augmentation, self.min_size, self.max_size),
            chosen,
            seed=self.seed,
            exif=self.exif,
            on_bad_image=self.on_bad_image,
            replaces_bad_images=True,
            repeats=None if repeats is None else repeats[chosen],
        )

    @override
    def evaluation_dataset(self, split: str) -> DetectionDataset:
        """All images of "val", "test" or "predict", resized; without targets in prediction."""
        annotations, folder = self._split(split)
        return DetectionDataset(
            annotations,
            folder,
            EvaluationTransform(self.min_size, self.max_size),
            np.arange(len(annotations)),
            with_targets=split != "predict",
            exif=self.exif,
            on_bad_image="skip" if split == "predict" else self.on_bad_image,
        )

    @property
    def training_size(self) -> tuple[int, int]:
        """The largest `min_size` that training images are resized to, and `max_size`."""
        return max(self.augmentation.min_sizes or (self.min_size,)), self.max_size

    def _key(self, split: str) -> str:
        """Key of a split in `_splits`."""
        if split == "predict":
            return "" if self.predict_folder else self.split_names["test"]
        return self.split_names[split]

    def _split(self, split: str) -> tuple[DetectionAnnotations, Path]:
        if split not in (*self.split_names, "predict") or self._key(split) not in self._splits:
            raise RuntimeError(f"the annotations of {split!r} are known after setup() of its stage.")
        return self._splits[self._key(split)]

    def _load(self, split: str) -> None:
        name = self.split_names[split]
        if name in self._splits:
            return
        annotations, folder = self.read_split(split)
        if self._categories is None:
            self._categories = annotations.categories
        check_categories(annotations, self._categories)
        headers = check_images(annotations, folder, self.exif, self.on_bad_image)
        self._splits[name] = annotations, folder
        rank_zero_info(
            f"{name}: {len(annotations):,} images, {len(annotations.labels):,} annotations, "
            f"{len(annotations.categories)} categories ({annotations.path})"
        )
        for image, reason in annotations.unreadable.items():
            logger.warning(f"{name}: {image} is left out: {reason}")
        for remark in _remarks(annotations, headers, self.exif):
            rank_zero_info(f"{name}: note: {remark}")

    def _check_training(self) -> None:
        """Logs what is left out of training, and refuses data without a training target."""
        annotations, _ = self._split("train")
        statuses = annotations.statuses(*self.training_size)
        left_out = []
        for status in list(TargetStatus)[1:]:
            ids = annotations.annotation_ids[statuses == status]
            if not len(ids):
                continue
            named = f" (annotations {listed(ids, 5)})" if status != TargetStatus.CROWD else ""
            left_out.append(f"{len(ids):,} boxes {status.description}{named}")
        if not (statuses == TargetStatus.TARGET).any():
            found = (
                f"{len(statuses):,} annotations that cannot be learnt ({', '.join(left_out)})" if len(statuses) else ""
            )
            advice = "Correct it, or give another training split (--data.train_split NAME)."
            raise InputError(
                f"{annotations.path} has {found or 'no annotation'}: there is nothing to learn from. "
                f"{annotations.likely_mistake()} {advice}".replace("  ", " ")
            )
        cut = int((annotations.cut_at_borders() & (statuses == TargetStatus.TARGET)).sum())
        empty = len(annotations) - len(annotations.with_targets(*self.training_size))
        notes = [f"left out of training: {', '.join(left_out)}" if left_out else "all boxes are trained on"]
        if empty:
            notes.append(f"{empty:,} images without a box" + (" are kept" if self.keep_empty else " are left out"))
        if cut:
            notes.append(f"{cut:,} boxes are cut at a border of their image")
        rank_zero_info(f"{self.split_names['train']}: {'; '.join(notes)}")

    def _repeats(self, annotations: DetectionAnnotations) -> npt.NDArray[np.float64] | None:
        """How often each training image comes in an epoch, on average, `[N]`; None for once."""
        weights = self.image_weights()
        if not self.repeat_threshold:
            return weights
        pairs = annotations.images_of_labels(annotations.statuses(*self.training_size) == TargetStatus.TARGET)
        share = np.bincount(pairs[:, 1], minlength=len(annotations.categories) + 1) / len(annotations)
        with np.errstate(divide="ignore"):
            factors = np.maximum(1.0, np.sqrt(self.repeat_threshold / share))
        repeats = np.ones(len(annotations))
        np.maximum.at(repeats, pairs[:, 0], factors[pairs[:, 1]])
        raised = [
            f"{annotations.categories.names[label - 1]} {factors[label]:.2f}"
            for label in np.argsort(-factors[1:]) + 1
            if 1 < factors[label] < np.inf
        ]
        rank_zero_info(
            f"{self.split_names['train']}: repeat_threshold {self.repeat_threshold:g}: images come "
            f"{repeats.mean():.2f} times in an epoch on average; those with {listed(raised, 10) or 'no class'} times"
        )
        return repeats if weights is None else repeats * weights


def _remarks(annotations: DetectionAnnotations, headers: Sequence[ImageHeader], exif: ExifPolicy) -> list[str]:
    """Notes on a split that can be used."""
    remarks = []
    if likely_mistake := annotations.likely_mistake():
        remarks.append(likely_mistake)
    large = annotations.areas > 1.05 * np.prod(annotations.bboxes[:, 2:], axis=1) + 1
    if large.any():
        remarks.append(
            f"{int(large.sum()):,} annotations have an area larger than their box (such as annotation "
            f"{annotations.annotation_ids[large][0]}), by which the scores sort small, medium and large objects."
        )
    turned = sum(header.turned for header in headers)
    if turned:
        remarks.append(
            f"{turned:,} of the {len(headers):,} images that were checked have an EXIF orientation and are turned "
            "upright, as annotation tools show them; if yours annotated the stored pixels, use --data.exif ignore."
        )
    return remarks

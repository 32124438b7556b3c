"""Segmentation data in any layout of files: files, label census, batches, data set, and the base of the DataModules."""

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_attn.datamodules.images.batches import BadImagePolicy, ImageBatch, ImageDataset
from lightning_attn.datamodules.images.datamodule import ImageDataModule
from lightning_attn.datamodules.images.files import (
    ExifPolicy,
    ImageArray,
    ImageError,
    ImageHeader,
    Window,
    channels_first,
    image_header,
    image_size,
    read_image,
)
from lightning_attn.datamodules.images.folders import (
    PackedText,
    evenly_spaced,
    images_to_predict,
    listed,
    printable,
    unique_stems,
)
from lightning_attn.datamodules.sampling.grouped_batches import SampleRequest
from lightning_attn.datamodules.segmentation.classes import IGNORED, LabelMap, SegmentationClasses, value_counts
from lightning_attn.datamodules.segmentation.transforms import SegmentationAugmentation, SegmentationTransform
from lightning_attn.errors import InputError

__all__ = [
    "LabelCensus",
    "LabelReader",
    "SegmentationBatch",
    "SegmentationDataModule",
    "SegmentationDataset",
    "SegmentationFiles",
]

T = TypeVar("T")

_LABELS_CHECKED = 64  # files whose labels are counted before a stage begins


@dataclass
class SegmentationBatch(ImageBatch):
    """Images, each of its own size, and the class of every pixel; possibly no image.

    Args:
        ids: Index of each image in its split, `[B]`.
        images: RGB images, transformed for the network, uint8 `[3, H, W]` each.
        labels: For each image a label 0..K-1 or 255 (ignored), uint8 `[H, W]`; no entries at all in prediction.
        names: Names such as "frankfurt_000000_000294", unique in a split.
    """

    labels: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


# Files


class LabelReader(Protocol):
    """Reads the files with labels; picklable, for worker processes."""

    def size(self, path: Path) -> tuple[int, int]:
        """Height and width, from the header of a file.

        Raises:
            ImageError: If it is not a file with labels.
        """

    def values(self, path: Path) -> npt.NDArray[Any]:
        """The value of each pixel in the file, `[H, W]`: ids, or colours as 65536 (red + 1) + 256 green + blue.

        Raises:
            ImageError: If it is not a file with labels.
        """

    def labels(self, values: npt.NDArray[Any], path: Path) -> LabelMap:
        """The labels 0..K-1 and `IGNORED` of such values, `[H, W]`.

        Raises:
            ImageError: If a value is unknown, and unknown ones are refused.
        """

    @property
    def refuses_unknown(self) -> bool:
        """Whether `labels` raises an error on unknown values instead of ignoring them."""

    def is_known(self, value: int) -> bool:
        """Whether a value belongs to a class, or is ignored on purpose."""

    def described(self, value: int) -> str:
        """A value, for messages."""


@dataclass(frozen=True, eq=False)
class SegmentationFiles:
    """The files of a split; worker processes share the arrays that name them.

    Args:
        folder: Folder that the paths are relative to.
        images: Paths of the images.
        labels: Paths of the files with their labels; empty where only images are needed.
        names: A unique name for each image.
        readers: Readers of the labels.
        reader_of: Index of the reader of each image, `[images]`; None for the first.
    """

    folder: Path
    images: PackedText
    labels: PackedText
    names: PackedText
    readers: tuple[LabelReader, ...] = ()
    reader_of: npt.NDArray[np.int64] | None = None

    @classmethod
    def from_paths(
        cls,
        folder: Path,
        images: Sequence[str],
        labels: Sequence[str] = (),
        readers: Sequence[LabelReader] = (),
        reader_of: npt.NDArray[np.int64] | None = None,
        *,
        ending: str = "_leftImg8bit",
    ) -> "SegmentationFiles":
        """Images, and the files with their labels in the same order, if any, by their paths relative to a folder.

        Args:
            folder: That folder.
            images: Paths of the images.
            labels: Paths of the files with their labels.
            readers: See the class.
            reader_of: See the class.
            ending: Removed from the end of the stems of images, for their names here.
        """
        names = PackedText(unique_stems(images, ending=ending))
        return cls(folder, PackedText(images), PackedText(labels), names, tuple(readers), reader_of)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def has_labels(self) -> bool:
        """Whether there are files with labels."""
        return len(self.labels) > 0

    def image(self, index: int) -> Path:
        """Path of an image."""
        return self.folder / self.images[index]

    def label(self, index: int) -> Path:
        """Path of the file with its labels."""
        return self.folder / self.labels[index]

    def reader(self, index: int) -> LabelReader:
        """Reader of its labels."""
        return self.readers[0 if self.reader_of is None else int(self.reader_of[index])]

    def read_labels(self, index: int) -> LabelMap:
        """The labels 0..K-1 and `IGNORED` of an image, `[H, W]`.

        Raises:
            ImageError: If they cannot be used.
        """
        path, reader = self.label(index), self.reader(index)
        return reader.labels(reader.values(path), path)

    def sizes(self, exif: ExifPolicy) -> npt.NDArray[np.int64]:
        """Height and width of each image, `[images, 2]`, from the headers of all files; 0 if one cannot be read."""

        def size(index: int) -> tuple[int, int]:
            try:
                return image_size(self.image(index), exif=exif)
            except (ImageError, OSError):  # raised when it is read as a whole
                return 0, 0

        return np.array([size(index) for index in range(len(self))], dtype=np.int64).reshape(-1, 2)

    def check(self, exif: ExifPolicy, on_bad_image: BadImagePolicy = "stop") -> list[ImageHeader]:
        """Reads the headers of some images and files with labels.

        Returns:
            Those of the images.

        Raises:
            ImageError: If one of them is not an image, or not a file with labels, or their sizes differ, and bad images
                are not skipped.
            OSError: If one of them cannot be read, likewise.
        """
        headers = []
        for index in evenly_spaced(len(self)):
            try:
                size = self.reader(index).size(self.label(index)) if self.has_labels else None
                headers.append(self.read_with_labels(index, functools.partial(image_header, size=size, exif=exif)))
            except (ImageError, OSError):
                if on_bad_image == "stop":
                    raise
        return headers

    def read_with_labels(self, index: int, read: Callable[[Path], T]) -> T:
        """Reads an image that should have the size of its labels; an error then names the labels too.

        Raises:
            ImageError: If the image cannot be used.
        """
        try:
            return read(self.image(index))
        except ImageError as error:
            if not self.has_labels:
                raise
            raise ImageError(f"{error} (Its labels are {self.label(index)}.)") from error


@dataclass(frozen=True)
class LabelCensus:
    """Numbers of pixels of each label in some files.

    Attributes:
        files: Number of files that were read.
        labels: Pixels of each label 0..K-1, and last the ignored ones, `[K + 1]`.
        values: Pixels of each value in the files.
        unknown: Pixels of the values that belong to no class and are not ignored on purpose, by description.
    """

    files: int
    labels: npt.NDArray[np.int64]
    values: Mapping[int, int]
    unknown: Mapping[str, int]

    @classmethod
    def count(
        cls,
        files: SegmentationFiles,
        num_classes: int,
        chosen: Sequence[int],
        on_bad_image: BadImagePolicy = "stop",
    ) -> "LabelCensus":
        """Counts the pixels of some files.

        Raises:
            ImageError: If one of them cannot be used, and is not to be skipped.
            OSError: If one of them cannot be read, likewise.
        """
        counts = np.zeros(256, dtype=np.int64)
        values: dict[int, int] = {}
        unknown: dict[str, int] = {}
        read = 0
        for index in chosen:
            reader, path = files.reader(index), files.label(index)
            try:
                found = reader.values(path)
            except (ImageError, OSError):
                if on_bad_image == "stop":
                    raise
                continue
            read += 1
            for value, count in value_counts(found).items():
                values[value] = values.get(value, 0) + count
                if not reader.is_known(value):
                    text = reader.described(value)
                    unknown[text] = unknown.get(text, 0) + count
            try:
                counts += np.bincount(reader.labels(found, path).ravel(), minlength=256)
            except ImageError:  # unknown values, which are reported for all files together
                counts[IGNORED] += found.size
        return cls(read, np.append(counts[:num_classes], counts[IGNORED]), values, unknown)

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """Each label's share of all pixels, `[K + 1]`."""
        return self.labels / max(1, int(self.labels.sum()))

    def described(self, names: Sequence[str]) -> str:
        """The shares in a line, largest first."""
        pairs = sorted(zip((*names, "ignored"), self.shares.tolist(), strict=True), key=lambda pair: -pair[1])
        return ", ".join(f"{name} {100 * share:.3g} %" for name, share in pairs if share)

    def described_unknown(self) -> str:
        """The unknown values and their shares."""
        total = max(1, int(self.labels.sum()))
        pairs = sorted(self.unknown.items(), key=lambda pair: -pair[1])
        return listed([f"{value} ({100 * count / total:.3g} %)" for value, count in pairs], 10)

    def likely_encoding(self) -> str:
        """The usual meaning of files with such values, and the DataModule that reads them; empty if it is not known."""
        found = set(self.values) - {IGNORED}
        by_folder = "SegmentationFolderDataModule reads them, with your own names, ids and colours of classes"
        if len(self.values) == 2 and (set(self.values) == {0, 255} or set(self.values) == {0, 1}):
            return f"All values are {' and '.join(map(str, sorted(self.values)))}: these are binary masks. {by_folder}."
        if found and max(found) <= 18:
            return (
                f"All values are 0 to {max(found)} and 255, as in Cityscapes' *_labelTrainIds.png, or a numbering of "
                f"your own. {by_folder}."
            )
        if found and max(found) <= 20:
            return f"All values are 0 to {max(found)} and 255, as in Pascal VOC. {by_folder}."
        if max(self.values, default=0) > 255:
            return f"The files hold colours. {by_folder}."
        return ""


# Batches


class SegmentationDataset(ImageDataset[SegmentationBatch]):
    """Images and their labels, read and transformed a batch at a time.

    Args:
        files: The files.
        transform: Applied to each image; None for nothing.
        seed: Seed of the random changes, together with the epoch and the image.
        by_size: Whether batches are of images of one size.
        exif: See `ExifPolicy`.
        on_bad_image: See `BadImagePolicy`.
        replaces_bad_images: See `ImageDataset`.
        repeats: See `ImageDataset`.
    """

    def __init__(
        self,
        files: SegmentationFiles,
        transform: SegmentationTransform | None = None,
        *,
        seed: int = 0,
        by_size: bool = False,
        exif: ExifPolicy = "apply",
        on_bad_image: BadImagePolicy = "stop",
        replaces_bad_images: bool = False,
        repeats: npt.NDArray[np.float64] | None = None,
    ) -> None:
        self.files = files
        self.transform = transform
        self.seed = seed
        self.by_size = by_size
        self.exif = exif
        self.on_bad_image = on_bad_image
        self.replaces_bad_images = replaces_bad_images
        self.repeats = repeats

    @override
    def __len__(self) -> int:
        return len(self.files)

    @override
    def groups(self) -> npt.NDArray[np.int64]:
        """A number for each size of images, or 0 for all, `[images]`."""
        if not self.by_size:
            return np.zeros(len(self), dtype=np.int64)
        return np.unique(self.files.sizes(self.exif), axis=0, return_inverse=True)[1].reshape(-1)

    @override
    def name(self, index: int) -> str:
        return printable(self.files.images[index])

    @override
    def batch(self, requests: Sequence[SampleRequest]) -> SegmentationBatch:
        used, samples, bad = self.read_each(requests, self._sample)
        names = [self.files.names[request.index] for request in used]
        return SegmentationBatch(
            torch.tensor([request.index for request in used], dtype=torch.int64),  # type: ignore[arg-type]
            [image for image, _ in samples],
            [labels for _, labels in samples if labels is not None],
            names,
            outputs=names,
            paths=[str(self.files.image(request.index)) for request in used],
            bad=bad,
        )

    def _sample(self, request: SampleRequest) -> tuple[Tensor, Tensor | None]:
        """An image `[3, H, W]` and, if there are any, its labels `[H, W]`."""
        if not self.files.has_labels:
            return channels_first(read_image(self.files.image(request.index), exif=self.exif)), None
        pixels, labels = self._labelled(request)
        return channels_first(pixels), torch.from_numpy(labels)

    def _labelled(self, request: SampleRequest) -> tuple[ImageArray, LabelMap]:
        """An image `[H, W, 3]` and its labels `[H, W]`."""
        labels = self.files.read_labels(request.index)
        size = labels.shape[0], labels.shape[1]

        def read(window: Window | None) -> ImageArray:
            return self.files.read_with_labels(request.index, lambda path: read_image(path, size, window, self.exif))

        if self.transform is None:
            return read(None), labels
        return self.transform(read, labels, (self.seed, request.epoch, request.index))


class SegmentationDataModule(ImageDataModule, abc.ABC):
    """Base of the DataModules of segmentation: a subclass lists the files of a split, with readers of the labels.

    Training images are scaled, cropped, flipped and changed in colour at random; see `SegmentationTransform`.
    Evaluation does not change images. Pixels without a class are ignored.

    Train with `Trainer(use_distributed_sampler=False)`: batches are planned here for all ranks.

    Args:
        root: Folder of the data.
        split_names: Names of the splits "train", "val" and "test"; see `ImageDataModule`.
        classes: The classes that the network learns.
        crop_size: Height and width of training crops in pixels, or one number for both. Where a scaled image is
            smaller, the rest is filled and ignored. 0 means the height and width of each image.
        augmentation: What is changed at random in training images.
        eval_batch_size: Images in a batch of validation, test and prediction, which are of one size; 0 means
            `batch_size`.
        options: Those of `ImageDataModule`.

    Raises:
        ValueError: If a value is out of range, or no split is named.
    """

    def __init__(
        self,
        root: str,
        split_names: dict[str, str],
        classes: SegmentationClasses,
        *,
        crop_size: int | tuple[int, int] = 769,
        augmentation: SegmentationAugmentation = SegmentationAugmentation(),  # noqa: B008 (frozen)
        eval_batch_size: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(root, split_names, eval_batch_size=eval_batch_size, **options)
        sides = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
        if min(sides) < (0 if isinstance(crop_size, int) else 1):
            raise InputError(
                f"crop_size: {crop_size} is too small; give height and width in pixels, or 0 for those of the images "
                "(--data.crop_size 769)."
            )
        self.classes = classes
        self.crop_size = sides if min(sides) else None
        self.augmentation = augmentation
        self._files: dict[str, SegmentationFiles] = {}

    @abc.abstractmethod
    def list_files(self, split: str, *, with_labels: bool = True) -> SegmentationFiles:
        """The files of "train", "val" or "test".

        Raises:
            FileNotFoundError: If data are missing; the message says where to get them.
        """

    def image_weights(self) -> npt.NDArray[np.float64] | None:
        """How often each training image comes in an epoch, on average, `[images]`; None for once."""
        return None

    def encoding_hint(self, census: LabelCensus) -> str:
        """Advice on labels that seem to have another encoding; empty if there is none."""
        return census.likely_encoding()

    def likely_mistake(self, census: LabelCensus) -> str:
        """Why such labels are useless though some belong to a class, and the fix; usually empty."""
        return ""

    @override
    def setup(self, stage: str) -> None:
        """Lists the files that a stage needs, reads the headers of some, and counts the labels of a few.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            FileNotFoundError: If data are missing; the message says where to get them.
            ImageError: If one of the files that were read is not an image, or not a file with labels, or an image and
                its labels differ in size.
            ValueError: If no pixel of the training labels that were counted belongs to a class.
        """
        for split in self.splits_of(stage):
            if split in self._files:
                continue
            if split == "predict" and self.predict_folder:
                folder = Path(self.predict_folder)
                self._files[split] = SegmentationFiles.from_paths(folder, images_to_predict(folder))
                continue
            role = "test" if split == "predict" else split
            files = self.list_files(role, with_labels=split != "predict")
            name = self.split_names[role]
            rank_zero_info(f"{name}: {len(files):,} images, {len(self.classes)} classes ({files.folder})")
            headers = [] if split == "predict" else files.check(self.exif, self.on_bad_image)
            turned = sum(header.turned for header in headers)
            if turned:
                rank_zero_info(
                    f"{name}: note: {turned:,} of the {len(headers):,} images that were checked have an EXIF "
                    "orientation and are turned upright; if masks were made for the stored pixels, use --data.exif "
                    "ignore."
                )
            if files.has_labels:
                self._count_labels(split, files)
            self._files[split] = files

    def files(self, split: str) -> SegmentationFiles:
        """The files of a split.

        Args:
            split: "train", "val", "test" or "predict".

        Raises:
            RuntimeError: If `setup` has not listed that split.
        """
        if split not in self._files:
            raise RuntimeError(f"the files of {split!r} are known after setup() of its stage.")
        return self._files[split]

    @override
    def training_dataset(self) -> SegmentationDataset:
        return SegmentationDataset(
            self.files("train"),
            SegmentationTransform(self.augmentation, self.crop_size),
            seed=self.seed,
            by_size=self.crop_size is None and self.batch_size > 1,
            exif=self.exif,
            on_bad_image=self.on_bad_image,
            replaces_bad_images=True,
            repeats=self.image_weights(),
        )

    @override
    def evaluation_dataset(self, split: str) -> SegmentationDataset:
        return SegmentationDataset(
            self.files(split),
            by_size=self.eval_batch_size > 1,
            exif=self.exif,
            on_bad_image="skip" if split == "predict" else self.on_bad_image,
        )

    def _count_labels(self, split: str, files: SegmentationFiles) -> None:
        """Logs the labels of some files, and refuses those without a class."""
        chosen = evenly_spaced(len(files), _LABELS_CHECKED)
        census = LabelCensus.count(files, len(self.classes), chosen, self.on_bad_image)
        where = f"{split}_split: {census.files} files with labels were read in {files.folder}"
        hint = self.encoding_hint(census)
        if census.unknown and any(reader.refuses_unknown for reader in files.readers):
            raise InputError(f"{where}, which hold values of no class: {census.described_unknown()}. {hint}")
        name = self.split_names[split]
        if not census.labels[:-1].any():
            empty = (
                f"{where}, and no pixel belongs to one of the classes {listed(self.classes.names, 20)}: they hold "
                f"{_described_values(files, census)}. {hint}"
            )
            if split == "test":  # data sets are published with empty labels for their tests
                rank_zero_info(f"{name}: note: {empty}")
                return
            raise InputError(empty)
        if self.likely_mistake(census):  # perhaps only in the files that were chosen
            every = LabelCensus.count(files, len(self.classes), range(len(files)), self.on_bad_image)
            if mistake := self.likely_mistake(every):
                raise InputError(f"{split}_split: in all {every.files} files with labels in {files.folder}: {mistake}")
        rank_zero_info(f"{name}: pixels of {census.files} files: {census.described(self.classes.names)}")
        absent = [one for one, count in zip(self.classes.names, census.labels.tolist(), strict=False) if not count]
        if absent:
            rank_zero_info(f"{name}: note: no pixel in these files is of the classes {listed(absent, 20)}")
        if census.unknown:
            rank_zero_info(f"{name}: note: values that are of no class: {census.described_unknown()}. {hint}".rstrip())
        elif hint and census.shares[-1] > 0.5:
            rank_zero_info(f"{name}: note: {100 * census.shares[-1]:.3g} % of the pixels are ignored. {hint}")


def _described_values(files: SegmentationFiles, census: LabelCensus) -> str:
    reader = files.reader(0)
    if not census.values:
        return "nothing readable"
    return listed([reader.described(value) for value in sorted(census.values)], 10)

"""Semantic segmentation data in the layout of Cityscapes.

`root/leftImg8bit/{split}/{city}/{city}_{sequence}_{frame}_leftImg8bit.png` are the images, and
`root/gtFine/{split}/{city}/{city}_{sequence}_{frame}_gtFine_labelIds.png` their labels.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from datamodules.images.datamodule import STAGE_SPLITS, ImageDataModule
from datamodules.images.files import (
    ImageArray,
    ImageError,
    Window,
    channels_first,
    image_size,
    label_size,
    read_image,
    read_labels,
)
from datamodules.images.folders import PackedText, contents, listed, predicted_images, spread
from datamodules.images.sampling import Draw, ImageBatch, ImageDataset
from datamodules.segmentation.classes import HIGHEST_ID, IGNORED, LabelMap, SegmentationClasses
from datamodules.segmentation.transforms import SegmentationAugmentation, SegmentationTransform
from datamodules.token_cache import user_cache_folder

__all__ = [
    "CityscapesDataModule",
    "MiniatureSegmentationDataModule",
    "SegmentationBatch",
    "SegmentationDataset",
    "SegmentationFiles",
    "read_label_ids",
]

T = TypeVar("T")

_IMAGES, _FINE, _COARSE = "leftImg8bit", "gtFine", "gtCoarse"
_COARSE_SPLIT = "train_extra"

# Where the folders come from.
_ARCHIVES = {
    _FINE: ("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"),
    _COARSE: ("leftImg8bit_trainextra.zip", "gtCoarse.zip"),
}


@dataclass
class SegmentationBatch(ImageBatch):
    """Images, each of its own size, and the class of every pixel. It may hold no image.

    Args:
        ids: Place of each image in its split, `[B]`.
        images: RGB images as the network gets them, uint8 `[3, H, W]` each.
        labels: For each image a label 0..K-1 or 255 (ignored), uint8 `[H, W]`; no entries at all in prediction.
        names: Names such as "frankfurt_000000_000294", each once in a split.
    """

    labels: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def read_label_ids(path: Path) -> LabelMap:
    """Reads a label file.

    Args:
        path: A file `..._labelIds.png`.

    Returns:
        Cityscapes' ids 0 to 33, or 255 (license plates, whose id is -1), `[H, W]`.

    Raises:
        FileNotFoundError: If there is no such file.
        ImageError: If it is damaged, not an image of one 8-bit channel, or holds another number.
        OSError: If the file cannot be read.
    """
    label_ids = read_labels(path)
    if label_ids.max() > HIGHEST_ID:
        unknown = np.unique(label_ids[(label_ids > HIGHEST_ID) & (label_ids != IGNORED)])
        if len(unknown):
            raise ImageError(
                f"{path} holds {listed(unknown, 5)}, but the ids of Cityscapes' classes are 0 to {HIGHEST_ID} (and "
                f"{IGNORED} for license plates). Give the files that end in labelIds.png, or write such ids; colours, "
                "numbers of single objects and train ids are not meant."
            )
    return label_ids


# Files


@dataclass(frozen=True, eq=False)
class SegmentationFiles:
    """The files of a split; worker processes share the arrays that name them.

    Args:
        folder: What the paths are below.
        images: Paths of the images.
        labels: Paths of their label files; none where only images are wanted.
        names: A name for each image, each once.
    """

    folder: Path
    images: PackedText
    labels: PackedText
    names: PackedText

    @classmethod
    def of_paths(cls, folder: Path, images: Sequence[str], labels: Sequence[str] = ()) -> "SegmentationFiles":
        """Images, and their label files in the same order or none, by their paths below a folder."""
        return cls(folder, PackedText(images), PackedText(labels), PackedText(_unique_names(images)))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def has_labels(self) -> bool:
        """Whether there are label files."""
        return len(self.labels) > 0

    def image(self, index: int) -> Path:
        """Path of an image."""
        return self.folder / self.images[index]

    def label(self, index: int) -> Path:
        """Path of its label file."""
        return self.folder / self.labels[index]

    def sizes(self) -> npt.NDArray[np.int64]:
        """Height and width of each image, `[images, 2]`, from the headers of all files.

        Raises:
            ImageError: If one is no image.
            OSError: If one cannot be read.
        """
        return np.array([image_size(self.image(index)) for index in range(len(self))], dtype=np.int64).reshape(-1, 2)

    def check(self) -> None:
        """Looks into the headers of some images and label files.

        Raises:
            ImageError: If one of them is no image, or no label file, or its sizes differ.
            OSError: If one of them cannot be read.
        """
        for index in spread(len(self)):
            if self.has_labels:
                size = label_size(self.label(index))
                self.of_labels(index, lambda path, size=size: image_size(path, size))  # type: ignore[misc]
            else:
                image_size(self.image(index))

    def of_labels(self, index: int, read: Callable[[Path], T]) -> T:
        """Reads an image that should have the size of its labels; an error then names these too.

        Raises:
            ImageError: If the image cannot be used.
        """
        try:
            return read(self.image(index))
        except ImageError as error:
            raise ImageError(f"{error} (Its labels are {self.label(index)}.)") from error


def _unique_names(paths: Sequence[str]) -> list[str]:
    """File names without endings; where two are alike, with the folders that they are in, or else numbered."""
    bare = [PurePosixPath(path).with_suffix("").as_posix().removesuffix(f"_{_IMAGES}") for path in paths]
    counts = Counter(PurePosixPath(path).name for path in bare)
    names: dict[str, None] = {}
    for path in bare:
        stem = PurePosixPath(path).name
        name = wanted = stem if counts[stem] == 1 else path.replace("/", "_")
        number = 1
        while name in names:
            number += 1
            name = f"{wanted}-{number}"
        names[name] = None
    return list(names)


def _names(folder: Path, ending: str) -> list[str]:
    """`city/name` of the files with this ending, sorted."""
    return sorted(
        f"{city.name}/{file.removesuffix(ending)}"
        for city in folder.iterdir()
        if city.is_dir()
        for file in os.listdir(city)  # noqa: PTH208 (twenty thousand names)
        if file.endswith(ending)
    )


def _paths(root: Path, split: str, option: str, kind: str, *, with_labels: bool) -> tuple[list[str], list[str]]:
    """Images of a split and their label files, as paths below `root`.

    Args:
        root: Folder of the data.
        split: Name of the split.
        option: What the user calls it.
        kind: `gtFine` or `gtCoarse`.
        with_labels: Whether there must be label files.

    Raises:
        FileNotFoundError: If a folder is missing or empty, or an image has no labels, or labels no image.
    """
    image_folder, label_folder = root / _IMAGES / split, root / kind / split
    image_ending, label_ending = f"_{_IMAGES}.png", f"_{kind}_labelIds.png"
    for folder in (image_folder, label_folder)[: 1 + with_labels]:
        if not folder.is_dir():
            _raise_missing(root, folder, split, option, kind)
    names = _names(image_folder, image_ending)
    if not names:
        raise FileNotFoundError(
            f"{option}: {image_folder} holds no image (*/*{image_ending}), but {contents(image_folder)}. "
            f"{_way_out(split, option, kind)}"
        )
    if with_labels:
        labelled = _names(label_folder, label_ending)
        for what, there, other_folder, others, ending in (
            (f"images in {image_folder} have no labels", names, label_folder, labelled, label_ending),
            (f"label files in {label_folder} have no image", labelled, image_folder, names, image_ending),
        ):
            missing = [f"{name}{ending}" for name in sorted(set(there) - set(others))]
            if missing:
                raise FileNotFoundError(
                    f"{len(missing):,} of the {len(there):,} {what}. Missing in {other_folder}: {listed(missing, 5)}. "
                    "Copy these there, or take the others out."
                )
    return (
        [f"{_IMAGES}/{split}/{name}{image_ending}" for name in names],
        [f"{kind}/{split}/{name}{label_ending}" for name in names] if with_labels else [],
    )


def _raise_missing(root: Path, folder: Path, split: str, option: str, kind: str) -> None:
    if root.is_dir():
        above = next(parent for parent in folder.parents if parent.is_dir())
        what = f"{option}: {folder} is not there; {above} holds {contents(above)}."
    else:
        what = f"root: the folder {root} does not exist."
    raise FileNotFoundError(f"{what} {_way_out(split, option, kind)}")


def _way_out(split: str, option: str, kind: str) -> str:
    archives = _ARCHIVES[kind]
    other = "leave them out (--data.coarse false)" if kind == _COARSE else f"name another split (--data.{option} NAME)"
    return (
        f"Cityscapes is given to those who log in at www.cityscapes-dataset.com: get {' and '.join(archives)} there, "
        f"or by `csDownload {' '.join(archives)}` of the package cityscapesscripts, and unpack both in one folder, so "
        f"that it holds {_IMAGES}/{split}/ and {kind}/{split}/. Give that folder (--data.root FOLDER), or {other}."
    )


# Batches


class SegmentationDataset(ImageDataset[SegmentationBatch]):
    """Images and their labels, read and transformed a batch at a time.

    Args:
        files: What there is.
        classes: What the labels mean.
        transform: What is done to each image; None for nothing.
        seed: What random changes start from, together with the epoch and the image.
        by_size: Whether images of one size make batches.
    """

    def __init__(
        self,
        files: SegmentationFiles,
        classes: SegmentationClasses,
        transform: SegmentationTransform | None = None,
        *,
        seed: int = 0,
        by_size: bool = False,
    ) -> None:
        self.files = files
        self.classes = classes
        self.transform = transform
        self.seed = seed
        self.by_size = by_size

    def __len__(self) -> int:
        return len(self.files)

    def groups(self) -> npt.NDArray[np.int64]:
        """A number for each size of images, or 0 for all, `[images]`."""
        if not self.by_size:
            return np.zeros(len(self), dtype=np.int64)
        return np.unique(self.files.sizes(), axis=0, return_inverse=True)[1].reshape(-1)

    def batch(self, draws: Sequence[Draw]) -> SegmentationBatch:
        """One batch.

        Raises:
            ImageError: If an image or its labels cannot be used; the message names the file.
            OSError: If a file cannot be read.
        """
        images, labels = [], []
        for draw in draws:
            if self.files.has_labels:
                pixels, label_map = self._labelled(draw)
                labels.append(torch.from_numpy(label_map))
            else:
                pixels = read_image(self.files.image(draw.image))
            images.append(channels_first(pixels))
        ids = torch.tensor([draw.image for draw in draws], dtype=torch.int64)
        return SegmentationBatch(ids, images, labels, [self.files.names[draw.image] for draw in draws])  # type: ignore[arg-type]

    def _labelled(self, draw: Draw) -> tuple[ImageArray, LabelMap]:
        """An image `[H, W, 3]` and its labels `[H, W]`."""
        labels = self.classes.to_labels(read_label_ids(self.files.label(draw.image)))
        size = labels.shape[0], labels.shape[1]

        def read(window: Window | None) -> ImageArray:
            return self.files.of_labels(draw.image, lambda path: read_image(path, size, window))

        if self.transform is None:
            return read(None), labels
        return self.transform(read, labels, (self.seed, draw.epoch, draw.image))


class CityscapesDataModule(ImageDataModule):
    """Cityscapes, or any other segmentation data in the same layout, with the same ids in its label files.

    Training images are scaled, cropped, flipped and changed in colour at random; see `SegmentationTransform`.
    Evaluation has them as they are. Pixels of no class that was chosen are ignored.

    Train with `Trainer(use_distributed_sampler=False)`: batches are planned here for all ranks.

    Args:
        root: Folder of the data, which holds leftImg8bit/ and gtFine/.
        batch_size: Training images in a batch on one rank.
        num_workers: Processes that make batches; 0 makes them in the training process.
        train_split: Name of the training split.
        val_split: Name of the validation split.
        test_split: Name of the test split; "" means the validation split, as the labels of Cityscapes' own are not
            public. Prediction needs its images alone.
        classes: Names of the classes that are told apart, of Cityscapes' 19; none for all.
        coarse: Adds to the training images those of train_extra with their coarse labels, in gtCoarse/.
        crop_size: Height and width of training crops in pixels, or one number for both. Where a scaled image is
            smaller, the rest is filled and ignored. 0 means the height and width of each image.
        augmentation: What is changed at random in training images.
        seed: Decides, with the epoch, what is in a batch, the order of batches and the random changes.
        eval_batch_size: Images in a batch of validation, test and prediction; 0 means `batch_size`. Images of one size
            come together.
        predict_folder: Folder of images for prediction, with those of the folders in it; "" means the test split.

    Raises:
        ValueError: If a number is out of range, no split is named, or a class is unknown.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 1,
        num_workers: int = 0,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "",
        classes: tuple[str, ...] = (),
        coarse: bool = False,
        crop_size: int | tuple[int, int] = 769,
        augmentation: SegmentationAugmentation = SegmentationAugmentation(),  # noqa: B008 (frozen)
        seed: int = 0,
        eval_batch_size: int = 1,
        predict_folder: str = "",
    ) -> None:
        super().__init__(
            root,
            {"train": train_split, "val": val_split, "test": test_split},
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            eval_batch_size=eval_batch_size,
            predict_folder=predict_folder,
        )
        sides = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
        if min(sides) < (0 if isinstance(crop_size, int) else 1):
            raise ValueError(
                f"crop_size: {crop_size} is too small; give height and width in pixels, or 0 for those of the images "
                "(--data.crop_size 769)."
            )
        self.classes = SegmentationClasses.chosen(classes)
        self.coarse = coarse
        self.crop_size = sides if min(sides) else None
        self.augmentation = augmentation
        self._files: dict[str, SegmentationFiles] = {}

    def setup(self, stage: str) -> None:
        """Lists the files that a stage needs, and checks what can be told of them without decoding.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            FileNotFoundError: If data are missing; the message says where they come from.
            ImageError: If one of the files that were looked into is no image, or no label file, or an image and its
                labels differ in size.
        """
        for split in STAGE_SPLITS[stage]:
            if split not in self._files:
                files = self._listed(split)
                files.check()
                self._files[split] = files

    def training_dataset(self) -> SegmentationDataset:
        """The training images, randomly changed."""
        return SegmentationDataset(
            self._files["train"],
            self.classes,
            SegmentationTransform(self.augmentation, self.crop_size),
            seed=self.seed,
            by_size=self.crop_size is None and self.batch_size > 1,
        )

    def evaluation_dataset(self, split: str) -> SegmentationDataset:
        """All images of "val", "test" or "predict" as they are; without labels in prediction."""
        return SegmentationDataset(self._files[split], self.classes, by_size=self.eval_batch_size > 1)

    def browse_figure(self, split: str, num: int) -> Figure:
        """A sheet of the first `num` images of a split as the network gets them, with their labels in colours.

        Args:
            split: "train", "val", "test" or "predict".
            num: Most images to show.
        """
        from datamodules.browse import draw_segmentation_sheet, split_loader

        return draw_segmentation_sheet(
            split_loader(self, split), num, self.classes, f"{split} images of {self.predict_folder or self.root}"
        )

    def _listed(self, split: str) -> SegmentationFiles:
        if split == "predict" and self.predict_folder:
            folder = Path(self.predict_folder)
            return SegmentationFiles.of_paths(folder, predicted_images(folder, below=True))
        role = "test" if split == "predict" else split
        name = self.split_names[role]
        images, labels = _paths(self.root, name, f"{role}_split", _FINE, with_labels=split != "predict")
        text = f"{name}: {len(images):,} images"
        if split == "train" and self.coarse:
            more_images, more_labels = _paths(self.root, _COARSE_SPLIT, "coarse", _COARSE, with_labels=True)
            images, labels = images + more_images, labels + more_labels
            text += f" and {len(more_images):,} of {_COARSE_SPLIT} with coarse labels"
        rank_zero_info(f"{text}, {len(self.classes)} classes ({self.root / _IMAGES / name})")
        return SegmentationFiles.of_paths(self.root, images, labels)


class MiniatureSegmentationDataModule(CityscapesDataModule):
    """A small segmentation set drawn on the spot, without a network.

    It is written in the layout of Cityscapes into `root`, by default a folder of the user's cache, and read like any
    other. Its classes are those that it shows. See `CityscapesDataModule` for the arguments.
    """

    def __init__(
        self,
        root: str = "",
        batch_size: int = 8,
        num_workers: int = 0,
        classes: tuple[str, ...] = (),
        crop_size: int | tuple[int, int] = 0,
        augmentation: SegmentationAugmentation = SegmentationAugmentation(),  # noqa: B008 (frozen)
        seed: int = 0,
        eval_batch_size: int = 0,
        predict_folder: str = "",
    ) -> None:
        from datamodules.miniature_segmentation import MINIATURE_CLASSES

        super().__init__(
            root=root or str(user_cache_folder() / "miniature_segmentation"),
            batch_size=batch_size,
            num_workers=num_workers,
            test_split="test",
            classes=classes or MINIATURE_CLASSES,
            crop_size=crop_size,
            augmentation=augmentation,
            seed=seed,
            eval_batch_size=eval_batch_size,
            predict_folder=predict_folder,
        )

    def prepare_files(self, splits: Sequence[str]) -> None:
        """Draws the set, all of it."""
        from datamodules.miniature_segmentation import write_miniature_segmentation

        write_miniature_segmentation(self.root)

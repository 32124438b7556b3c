"""Semantic segmentation data in the layout of Cityscapes.

`root/leftImg8bit/{split}/{city}/{city}_{sequence}_{frame}_leftImg8bit.png` are the images, and
`root/gtFine/{split}/{city}/{city}_{sequence}_{frame}_gtFine_labelIds.png` their labels.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from lightning_attn.datamodules.images.files import ImageError, label_size, read_labels
from lightning_attn.datamodules.images.folders import contents, listed
from lightning_attn.datamodules.segmentation.classes import HIGHEST_ID, IGNORED, LabelMap, SegmentationClasses
from lightning_attn.datamodules.segmentation.datamodule import LabelReader, SegmentationDataModule, SegmentationFiles
from lightning_attn.errors import MissingFileError

__all__ = ["CityscapesDataModule", "CityscapesLabels", "read_label_ids"]

_IMAGES, _FINE, _COARSE = "leftImg8bit", "gtFine", "gtCoarse"
_COARSE_SPLIT = "train_extra"

# Where the folders come from.
_ARCHIVES = {
    _FINE: ("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"),
    _COARSE: ("leftImg8bit_trainextra.zip", "gtCoarse.zip"),
}


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
                f"{IGNORED} for license plates). Give the files that end in labelIds.png, or write such ids instead of "
                "colours, ids of single objects or train ids."
            )
    return label_ids


@dataclass(frozen=True)
class CityscapesLabels(LabelReader):
    """Reads Cityscapes' label files.

    Args:
        classes: The classes that the network learns; all other ids are ignored.
    """

    classes: SegmentationClasses

    @override
    def size(self, path: Path) -> tuple[int, int]:
        return label_size(path)

    @override
    def values(self, path: Path) -> LabelMap:
        return read_label_ids(path)

    @override
    def labels(self, values: LabelMap, path: Path) -> LabelMap:
        return self.classes.to_labels(values)

    @property
    @override
    def refuses_unknown(self) -> bool:
        return True  # when they are read

    @override
    def is_known(self, value: int) -> bool:
        return True  # and ignored if it is the id of no class

    @override
    def described(self, value: int) -> str:
        return str(value)


def _names(folder: Path, ending: str) -> list[str]:
    """`city/name` of the files with this ending, without it, sorted."""
    return sorted(
        f"{city.name}/{file.removesuffix(ending)}"
        for city in folder.iterdir()
        if city.is_dir()
        for file in os.listdir(city)  # noqa: PTH208 (twenty thousand names)
        if file.endswith(ending)
    )


def _paths(root: Path, split: str, option: str, kind: str, *, with_labels: bool) -> tuple[list[str], list[str]]:
    """Images of a split and their label files, as paths relative to `root`.

    Args:
        root: Folder of the data.
        split: Name of the split.
        option: Its option, for messages.
        kind: `gtFine` or `gtCoarse`.
        with_labels: Whether label files are needed.

    Raises:
        FileNotFoundError: If a folder is missing or empty, or an image or a label file has no counterpart.
    """
    image_folder, label_folder = root / _IMAGES / split, root / kind / split
    image_ending, label_ending = f"_{_IMAGES}.png", f"_{kind}_labelIds.png"
    for folder in (image_folder, label_folder)[: 1 + with_labels]:
        if not folder.is_dir():
            _raise_missing(root, folder, split, option, kind)
    names = _names(image_folder, image_ending)
    if not names:
        raise MissingFileError(
            f"{option}: {image_folder} holds no image (*/*{image_ending}), but {contents(image_folder)}. "
            f"{_advice(split, option, kind)}"
        )
    if with_labels:
        labelled = _names(label_folder, label_ending)
        for what, present, other_folder, others, ending in (
            (f"images in {image_folder} have no labels", names, label_folder, labelled, label_ending),
            (f"label files in {label_folder} have no image", labelled, image_folder, names, image_ending),
        ):
            missing = [f"{name}{ending}" for name in sorted(set(present) - set(others))]
            if missing:
                raise MissingFileError(
                    f"{len(missing):,} of the {len(present):,} {what}. Missing in {other_folder}: {listed(missing, 5)}."
                    " Copy these there, or take the others out."
                )
    return (
        [f"{_IMAGES}/{split}/{name}{image_ending}" for name in names],
        [f"{kind}/{split}/{name}{label_ending}" for name in names] if with_labels else [],
    )


def _raise_missing(root: Path, folder: Path, split: str, option: str, kind: str) -> None:
    if root.is_dir():
        above = next(parent for parent in folder.parents if parent.is_dir())
        what = f"{option}: {folder} does not exist; {above} holds {contents(above)}."
    else:
        what = f"root: the folder {root} does not exist."
    raise MissingFileError(f"{what} {_advice(split, option, kind)}")


def _advice(split: str, option: str, kind: str) -> str:
    archives = _ARCHIVES[kind]
    other = "leave them out (--data.coarse false)" if kind == _COARSE else f"name another split (--data.{option} NAME)"
    return (
        f"Cityscapes is available after a login at www.cityscapes-dataset.com: get {' and '.join(archives)} there, "
        f"or by `csDownload {' '.join(archives)}` of the package cityscapesscripts, and unpack both in one folder, so "
        f"that it holds {_IMAGES}/{split}/ and {kind}/{split}/. Give that folder (--data.root FOLDER), or {other}. "
        "Images and masks of your own, in plain folders and with your own classes, are read by "
        "SegmentationFolderDataModule."
    )


class CityscapesDataModule(SegmentationDataModule):
    """Cityscapes, or any other segmentation data in the same layout, with the same ids in its label files.

    Pixels of classes that are not in `classes` are ignored; for the transforms see `SegmentationDataModule`.

    Args:
        root: Folder of the data, which holds leftImg8bit/ and gtFine/.
        batch_size: Training images in a batch on one rank.
        num_workers: Processes that make batches; 0 makes them in the training process.
        train_split: Name of the training split.
        val_split: Name of the validation split; "" for none.
        test_split: Name of the test split; "" means the validation split, as the labels of Cityscapes' own are not
            public. Prediction needs its images alone.
        classes: Names of the classes to learn, of Cityscapes' 19; empty for all.
        coarse: Adds the images of train_extra with their coarse labels, in gtCoarse/, to the training images.
        options: Those of `SegmentationDataModule` and `ImageDataModule`.

    Raises:
        ValueError: If a value is out of range, no split is named, or a class is unknown.
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
        **options: Any,
    ) -> None:
        super().__init__(
            root,
            {"train": train_split, "val": val_split, "test": test_split},
            SegmentationClasses.chosen(classes),
            batch_size=batch_size,
            num_workers=num_workers,
            **options,
        )
        self.coarse = coarse

    @override
    def list_files(self, split: str, *, with_labels: bool = True) -> SegmentationFiles:
        name = self.split_names[split]
        images, labels = _paths(self.root, name, f"{split}_split", _FINE, with_labels=with_labels)
        if split == "train" and self.coarse:
            more_images, more_labels = _paths(self.root, _COARSE_SPLIT, "coarse", _COARSE, with_labels=True)
            images, labels = images + more_images, labels + more_labels
            rank_zero_info(f"{name}: {len(more_images):,} images of {_COARSE_SPLIT} with coarse labels are added")
        reader = CityscapesLabels(self.classes)
        return SegmentationFiles.from_paths(self.root, images, labels, (reader,))

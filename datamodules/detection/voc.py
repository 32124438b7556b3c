"""Object detection data in the layout of Pascal VOC: an XML file for each image."""

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from lightning_attn.datamodules.detection.annotations import Categories, DetectionAnnotations, sizes_of
from lightning_attn.datamodules.detection.datamodule import DetectionDataModule
from lightning_attn.datamodules.images.batches import BadImagePolicy
from lightning_attn.datamodules.images.files import IMAGE_SUFFIXES, ExifPolicy
from lightning_attn.datamodules.images.folders import contents, first_duplicate, listed, read_lines
from lightning_attn.errors import InputError, MissingFileError

__all__ = ["VOC_CLASSES", "VOCDetectionDataModule", "read_voc"]

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""The classes of Pascal VOC 2007 to 2012, in the order of their development kit."""

_IMAGES, _ANNOTATIONS, _SETS = "JPEGImages", "Annotations", Path("ImageSets") / "Main"


@dataclass(frozen=True)
class _Object:
    name: str
    bbox: tuple[float, float, float, float]  # x, y, width, height
    difficult: bool


class VOCDetectionDataModule(DetectionDataModule):
    """Pascal VOC, or any other detection data in the same layout.

    `root` holds `Annotations/*.xml`, `JPEGImages/` and `ImageSets/Main/{split}.txt`, which lists the names of the
    images of a split without endings. Corners count from 1 and are inside the box, as in VOC: a box covers the pixels
    xmin to xmax. Objects marked as difficult are no training targets and are ignored in the scores, as crowds are in
    COCO.

    Args:
        root: Folder of the data.
        batch_size: Training images in a batch on one rank.
        num_workers: Processes that make batches; 0 makes them in the training process.
        train_split: Name of the training split.
        val_split: Name of the validation split; "" for none.
        test_split: Name of the test split; "" means the validation split.
        classes: Names of the classes, in the order of their labels; empty for those that occur in `Annotations/`, in
            VOC's own order if all are VOC's, else in alphabetical order.
        corners_from: 1 where coordinates count from 1, as VOC's do; 0 for tools that count from 0 and write xmax and
            ymax as the border of the box.
        options: Those of `DetectionDataModule` and `ImageDataModule`.

    Raises:
        ValueError: If a value is out of range, or no split is named.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 2,
        num_workers: int = 0,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "",
        classes: tuple[str, ...] = (),
        corners_from: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(
            root,
            {"train": train_split, "val": val_split, "test": test_split},
            batch_size=batch_size,
            num_workers=num_workers,
            **options,
        )
        if corners_from not in (0, 1):
            raise InputError(f"corners_from: {corners_from} is neither 0 nor 1 (--data.corners_from 1).")
        self.classes = tuple(classes)
        self.corners_from = corners_from

    @override
    def read_split(self, split: str) -> tuple[DetectionAnnotations, Path]:
        name = self.split_names[split]
        listing = self.root / _SETS / f"{name}.txt"
        for needed, exists in (
            (listing, listing.is_file()),
            (self.root / _ANNOTATIONS, (self.root / _ANNOTATIONS).is_dir()),
            (self.root / _IMAGES, (self.root / _IMAGES).is_dir()),
        ):
            if not exists:
                above = next((parent for parent in needed.parents if parent.is_dir()), None)
                holds = "" if above is None else f"; {above} holds {contents(above)}"
                raise MissingFileError(
                    f"{split}_split: {needed} does not exist{holds}. Give the folder that holds {_ANNOTATIONS}/, "
                    f"{_IMAGES}/ and {_SETS.as_posix()}/ (--data.root FOLDER), and the name of a list in the last "
                    f"(--data.{split}_split NAME)."
                )
        # Collected once for all splits: that reads every annotation.
        classes = self.classes or (() if self._categories is None else self._categories.names)
        annotations = read_voc(self.root, name, classes, self.corners_from, self.exif, self.on_bad_image)
        return annotations, self.root / _IMAGES

    @override
    def read_categories(self) -> Categories | None:
        folder = self.root / _ANNOTATIONS
        if not self.classes and not folder.is_dir():
            return None
        names = self.classes or _annotated_classes(folder)
        return Categories(names, tuple(range(1, len(names) + 1)))


def read_voc(
    root: Path,
    split: str,
    classes: Sequence[str] = (),
    corners_from: int = 1,
    exif: ExifPolicy = "apply",
    on_bad_image: BadImagePolicy = "stop",
) -> DetectionAnnotations:
    """Reads the annotations of a split of Pascal VOC's layout.

    Args:
        root: Folder that holds `Annotations/`, `JPEGImages/` and `ImageSets/Main/`.
        split: Name of a list in `ImageSets/Main/`.
        classes: As in `VOCDetectionDataModule`.
        corners_from: As in `VOCDetectionDataModule`.
        exif: See `ExifPolicy`; for images whose annotation does not have their size.
        on_bad_image: See `BadImagePolicy`; for images whose size cannot be read then.

    Raises:
        FileNotFoundError: If the annotation of a listed image does not exist.
        ValueError: If an annotation cannot be read, or has a class that is not in `classes`.
    """
    listing = root / _SETS / f"{split}.txt"
    # A list of one class has a second column: 1, -1 or 0. Names may have blanks.
    stems = [re.sub(r"\s+(-1|0|1)$", "", line) for line in read_lines(listing)]
    if not stems:
        raise InputError(f"{listing} lists no image. Give a split that has some.")
    twice = first_duplicate(stems)
    if twice is not None:
        raise InputError(f"{listing} lists {twice!r} twice. Remove one.")
    missing = [stem for stem in stems if not (root / _ANNOTATIONS / f"{stem}.xml").is_file()]
    if missing:
        raise MissingFileError(
            f"{len(missing):,} of the {len(stems):,} images of {listing} have no annotation in {root / _ANNOTATIONS}: "
            f"{listed([f'{stem}.xml' for stem in missing], 5)}. Copy these there, or take them out of the list; an "
            "image without objects has a file without any."
        )
    names = tuple(classes) or _annotated_classes(root / _ANNOTATIONS)
    categories = Categories(names, tuple(range(1, len(names) + 1)))
    present = {
        path.stem: path.name
        for path in sorted((root / _IMAGES).iterdir(), reverse=True)
        if path.suffix.lower() in IMAGE_SUFFIXES
    }
    read = [_read_xml(root / _ANNOTATIONS / f"{stem}.xml", corners_from) for stem in stems]
    files = [present.get(stem, file or f"{stem}.jpg") for stem, (_, file, _) in zip(stems, read, strict=True)]
    unsized = [number for number, (size, _, _) in enumerate(read) if size is None]
    found, unreadable = sizes_of(root / _IMAGES, [files[number] for number in unsized], exif, on_bad_image)
    sizes = {number: size for number, (size, _, _) in enumerate(read) if size is not None}
    sizes |= {unsized[place]: size for place, size in found.items()}
    image_indices, objects = [], []
    for place, number in enumerate(sorted(sizes)):
        for one in read[number][2]:
            if one.name not in names:
                raise InputError(
                    f"{root / _ANNOTATIONS / stems[number]}.xml has an object {one.name!r}, which is not among the "
                    f"classes {listed(names, 30)}. Add it (--data.classes), or correct the file."
                )
            image_indices.append(place)
            objects.append(one)
    return DetectionAnnotations.from_objects(
        listing,
        categories,
        names=[files[number] for number in sorted(sizes)],
        sizes=np.array([sizes[number] for number in sorted(sizes)], dtype=np.int64).reshape(-1, 2),
        image_indices=np.array(image_indices, dtype=np.int64),
        bboxes=np.array([one.bbox for one in objects], dtype=np.float64).reshape(-1, 4),
        labels=np.array([names.index(one.name) + 1 for one in objects], dtype=np.int64),
        crowd=np.array([one.difficult for one in objects], dtype=np.bool_),
        unreadable=unreadable,
    )


def _annotated_classes(folder: Path) -> tuple[str, ...]:
    """The classes of all annotations of the folder, so that all splits have the same."""
    names = {one.name for path in sorted(folder.glob("*.xml")) for one in _read_xml(path, 1)[2]}
    if not names:
        raise InputError(f"{folder} has no object in its files *.xml. Name the classes (--data.classes).")
    return tuple(sorted(names, key=VOC_CLASSES.index if names <= set(VOC_CLASSES) else None))


def _read_xml(path: Path, corners_from: int) -> tuple[tuple[int, int] | None, str, list[_Object]]:
    """Height and width if they are given, the name of the image, and the objects of an annotation."""
    try:
        tree = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise InputError(f"{path} is not a complete XML file: {error}. Copy or download it again.") from error
    except (ValueError, LookupError) as error:  # of an encoding that the parser does not know
        raise InputError(f"{path} cannot be read: {error}. Save it as UTF-8.") from error
    if tree.tag != "annotation":
        raise InputError(f"{path} holds <{tree.tag}>, not the <annotation> of Pascal VOC. Give such files.")
    height, width = (_number(tree, f"size/{side}", path, optional=True) for side in ("height", "width"))
    size = (int(height), int(width)) if height and width else None
    objects = []
    for place, entry in enumerate(tree.iter("object")):
        name = (entry.findtext("name") or "").strip()
        if not name:
            raise InputError(f"{path}: object {place + 1} has no name. Give it one.")
        where = f"{path}: object {place + 1} ({name})"
        x1, y1, x2, y2 = (_corner(entry, key, where) for key in ("xmin", "ymin", "xmax", "ymax"))
        # The pixels x1 to x2, counted from 1, are those from x1 - 1 to x2 in coordinates of borders.
        bbox = (x1 - corners_from, y1 - corners_from, x2 - x1 + corners_from, y2 - y1 + corners_from)
        objects.append(_Object(name, bbox, (entry.findtext("difficult") or "0").strip() in ("1", "true", "True")))
    return size, (tree.findtext("filename") or "").strip(), objects


def _corner(entry: ElementTree.Element, key: str, where: str) -> float:
    value = _number(entry, f"bndbox/{key}", where)
    assert value is not None
    return value


def _number(entry: ElementTree.Element, key: str, where: Path | str, *, optional: bool = False) -> float | None:
    text = entry.findtext(key)
    if text is None and optional:
        return None
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where} has {key} {text!r}; it must be a finite number. Correct it.")
    return value

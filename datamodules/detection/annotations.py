"""Annotation files of COCO, read into arrays and checked, and the images that they name."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from datamodules.detection.transforms import Boxes, Labels
from datamodules.images.files import ImageError, image_size
from datamodules.images.folders import PackedText, listed, predicted_images, spread

__all__ = [
    "Categories",
    "CocoAnnotations",
    "check_categories",
    "check_images",
    "of_image",
]

Integers = npt.NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True)
class Categories:
    """What can be detected. A network's label is the position here plus 1; label 0 is background.

    Args:
        names: Name of each category.
        ids: Its id in the annotations; COCO's 80 have gaps between 1 and 90.

    Raises:
        ValueError: If a name or an id comes twice, or they differ in number.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.ids):
            raise ValueError(f"categories: {len(self.names)} names for {len(self.ids)} ids; give one each.")
        for what, values in (("name", self.names), ("id", self.ids)):
            twice = _first_repeated(values)
            if twice is not None:
                raise ValueError(f"categories: two have the {what} {twice!r}; give each its own.")

    def __len__(self) -> int:
        return len(self.ids)

    def label(self, category_id: int) -> int:
        """The label, 1..K, of a category id.

        Raises:
            ValueError: If there is no such category.
        """
        if category_id not in self.ids:
            raise ValueError(f"category id {category_id} is unknown; there are {listed(self.ids, 90)}.")
        return self.ids.index(category_id) + 1

    def category_id(self, label: int) -> int:
        """The category id of a label, 1..K.

        Raises:
            ValueError: If there is no such label.
        """
        if not 1 <= label <= len(self):
            raise ValueError(f"label {label} is not in 1..{len(self)}.")
        return self.ids[label - 1]


@dataclass(frozen=True, eq=False)
class CocoAnnotations:
    """The annotations of a split in arrays, which worker processes share without copying.

    N images in the order of the file, M annotations sorted by image, those of an image in the order of the file.

    Args:
        path: Where they are from.
        categories: What is annotated; none for a bare folder of images.
        image_ids: `[N]`.
        sizes: Height and width, `[N, 2]`.
        names: File names, N.
        starts: The annotations of image i are `starts[i]` to `starts[i + 1]`, `[N + 1]`.
        annotation_ids: `[M]`.
        bboxes: (x, y, width, height) as in the file, `[M, 4]`.
        labels: 1..K, `[M]`.
        areas: `[M]`.
        crowd: Whether it is a crowd, `[M]`.
    """

    path: Path
    categories: Categories
    image_ids: Integers
    sizes: Integers
    names: PackedText
    starts: Integers
    annotation_ids: Integers
    bboxes: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    areas: npt.NDArray[np.float64]
    crowd: npt.NDArray[np.bool_]

    @classmethod
    def read(cls, path: Path) -> "CocoAnnotations":
        """Reads and checks an annotation file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is cut off or no such file, an id comes twice or refers to nothing, a file name leads out
                of the folder, or a number is missing or none; the message names the file and the entry.
        """
        content = _read_json(path)
        images, annotations = content["images"], content["annotations"]
        categories = _categories(content["categories"], path)

        image_ids = _integers(images, "id", "images", path)
        _refuse_repeated(image_ids, "image id", path)
        sizes = np.stack([_integers(images, key, "images", path) for key in ("height", "width")], axis=1)
        for index in np.flatnonzero((sizes < 1).any(axis=1)):
            height, width = sizes[index]
            raise ValueError(
                f"{path}: image id {image_ids[index]} has width {width} and height {height}; both must be at least 1. "
                "Correct them."
            )
        names = _values(images, "file_name", "images", path)
        for image_id, name in zip(image_ids, names, strict=True):
            _check_name(name, image_id, path)

        annotation_ids = _integers(annotations, "id", "annotations", path)
        _refuse_repeated(annotation_ids, "annotation id", path)
        owners = _lookup(
            _integers(annotations, "image_id", "annotations", path), image_ids, annotation_ids, "image", path
        )
        labels = 1 + _lookup(
            _integers(annotations, "category_id", "annotations", path),
            np.array(categories.ids, dtype=np.int64),
            annotation_ids,
            "category",
            path,
        )
        bboxes = _bboxes(annotations, annotation_ids, image_ids[owners], path)
        areas = _areas(annotations, annotation_ids, bboxes, path)
        crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in annotations], dtype=np.bool_)

        order = np.argsort(owners, kind="stable")
        starts = np.searchsorted(owners[order], np.arange(len(images) + 1))
        return cls(
            path,
            categories,
            image_ids,
            sizes,
            PackedText(names),
            starts,
            annotation_ids[order],
            bboxes[order],
            labels[order],
            areas[order],
            crowd[order],
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "CocoAnnotations":
        """The images of a folder, without annotations, by name.

        Image ids are the numbers in the names if all names are numbers, as those of COCO are; otherwise 1, 2, 3, ...

        Raises:
            FileNotFoundError: If there is no such folder, or it holds no image.
            ImageError: If a file is no image.
        """
        names = predicted_images(folder)
        stems = [Path(name).stem for name in names]
        numbers = [int(stem) for stem in stems if stem.isdecimal() and len(stem) <= 18]
        image_ids = numbers if len(set(numbers)) == len(names) else range(1, len(names) + 1)
        none = np.empty(0, dtype=np.int64)
        return cls(
            folder,
            Categories((), ()),
            np.array(image_ids, dtype=np.int64),
            np.array([image_size(folder / name) for name in names], dtype=np.int64),
            PackedText(names),
            np.zeros(len(names) + 1, dtype=np.int64),
            annotation_ids=none,
            bboxes=np.empty((0, 4)),
            labels=none,
            areas=np.empty(0),
            crowd=np.empty(0, dtype=np.bool_),
        )

    def __len__(self) -> int:
        return len(self.image_ids)

    def owners(self) -> Integers:
        """Number of the image of each annotation, `[M]`."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def usable(self) -> npt.NDArray[np.bool_]:
        """Which annotations are training targets: those of single things with an area inside their image, `[M]`."""
        return _clipped(self.bboxes, self.sizes[self.owners()])[1] & ~self.crowd

    def with_targets(self) -> Integers:
        """Numbers of the images that have a training target."""
        return np.unique(self.owners()[self.usable()])

    def targets(self, index: int) -> tuple[Boxes, Labels]:
        """The training targets of an image: boxes (x1, y1, x2, y2), cut at its borders, `[n, 4]` and labels `[n]`."""
        part = slice(self.starts[index], self.starts[index + 1])
        boxes, inside = _clipped(self.bboxes[part], self.sizes[index])
        kept = inside & ~self.crowd[part]
        return boxes[kept], self.labels[part][kept]

    def ground_truth(self) -> dict[str, Any]:
        """What COCO's scorer reads, with every annotation as it is in the file; outlines are left out.

        Annotation ids are counted on by 1 if one of them is 0, which the scorer takes for "no match".
        """
        shift = int((self.annotation_ids == 0).any())
        category_ids = np.array(self.categories.ids, dtype=np.int64)[self.labels - 1]
        columns = (self.annotation_ids + shift, self.image_ids[self.owners()], category_ids, self.bboxes, self.areas)
        return {
            "images": [
                {"id": image_id, "file_name": self.names[index], "height": height, "width": width}
                for index, (image_id, (height, width)) in enumerate(
                    zip(self.image_ids.tolist(), self.sizes.tolist(), strict=True)
                )
            ],
            "annotations": [
                {"id": a, "image_id": i, "category_id": c, "bbox": box, "area": area, "iscrowd": int(crowd)}
                for a, i, c, box, area, crowd in zip(
                    *(column.tolist() for column in columns), self.crowd.tolist(), strict=True
                )
            ],
            "categories": [
                {"id": category_id, "name": name}
                for category_id, name in zip(self.categories.ids, self.categories.names, strict=True)
            ],
        }


def _clipped(bboxes: npt.NDArray[np.float64], sizes: Integers) -> tuple[Boxes, npt.NDArray[np.bool_]]:
    """Boxes (x1, y1, x2, y2) cut at the borders of their images, and which of them then have an area.

    Args:
        bboxes: (x, y, width, height), `[m, 4]`.
        sizes: Height and width of each one's image `[m, 2]`, or of the image of all `[2]`.
    """
    corners = np.concatenate([bboxes[:, :2], bboxes[:, :2] + bboxes[:, 2:]], axis=1)
    borders = np.concatenate([sizes[..., ::-1]] * 2, axis=-1)
    boxes = np.asarray(np.clip(corners, 0, borders), dtype=np.float32)
    inside: npt.NDArray[np.bool_] = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
    return boxes, inside


def _read_json(path: Path) -> dict[str, list[dict[str, Any]]]:
    def without_outline(entry: dict[str, Any]) -> dict[str, Any]:
        entry.pop("segmentation", None)  # most of the file; it need not be in memory all at once
        return entry

    try:
        with path.open(encoding="utf-8") as file:
            content = json.load(file, object_hook=without_outline)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is no whole JSON file: {error.msg} at character {error.pos:,} of {len(error.doc):,}. It may be "
            "cut off; copy or download it again."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start:,}). Copy or download it again.") from error
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        found = f"an object with {listed(list(content), 8)}" if isinstance(content, dict) else "another kind of value"
        raise ValueError(
            f"{path} holds {found}; an annotation file is an object with the lists {', '.join(keys)}. Give annotations "
            "in COCO's instances format."
        )
    if not content["images"]:
        raise ValueError(f"{path} has no image in its list images. Give a split that holds some.")
    return content


def _values(entries: list[dict[str, Any]], key: str, what: str, path: Path) -> list[Any]:
    try:
        return [entry[key] for entry in entries]
    except (KeyError, TypeError) as error:
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict) or key not in entry:
                raise ValueError(
                    f"{path}: {what}[{number}] has no {key!r}: {str(entry)[:100]}. Give it one, or take it out."
                ) from error
        raise


def _integers(entries: list[dict[str, Any]], key: str, what: str, path: Path) -> Integers:
    values = _values(entries, key, what, path)
    try:
        array = np.array(values)
    except ValueError:  # lists of different lengths; the loop below finds the first
        array = np.empty(0)
    if array.dtype == np.int64 and array.ndim == 1:
        return array
    whole = np.zeros(len(values), dtype=np.int64)
    for number, value in enumerate(values):
        # Some tools write whole numbers as 1.0.
        if not isinstance(value, int | float) or value != value // 1 or not abs(value) < 1 << 63:
            raise ValueError(f"{path}: {what}[{number}] has {key} {value!r}; it must be a whole number. Correct it.")
        whole[number] = value
    return whole


def _bboxes(
    annotations: list[dict[str, Any]], annotation_ids: Integers, image_ids: Integers, path: Path
) -> npt.NDArray[np.float64]:
    """(x, y, width, height) of each annotation, `[M, 4]`."""
    values = _values(annotations, "bbox", "annotations", path)
    try:
        bboxes = np.array(values, dtype=np.float64).reshape(len(values), 4)
    except (TypeError, ValueError):  # not four numbers each; the loop below finds which
        bboxes = np.full((len(values), 4), np.nan)
    if np.isfinite(bboxes).all():
        return bboxes
    for value, annotation_id, image_id in zip(values, annotation_ids, image_ids, strict=True):
        if not isinstance(value, list) or len(value) != 4 or not all(_is_finite(number) for number in value):
            raise ValueError(
                f"{path}: annotation id {annotation_id} of image id {image_id} has bbox {value!r}; it must be four "
                "finite numbers: x, y, width, height. Correct it, or take the annotation out."
            )
    return bboxes


def _areas(
    annotations: list[dict[str, Any]], annotation_ids: Integers, bboxes: npt.NDArray[np.float64], path: Path
) -> npt.NDArray[np.float64]:
    """The area of each annotation, that of the box where none is given, `[M]`."""
    products = (bboxes[:, 2] * bboxes[:, 3]).tolist()
    values = [entry.get("area", product) for entry, product in zip(annotations, products, strict=True)]
    for value, annotation_id in zip(values, annotation_ids, strict=True):
        if not _is_finite(value):
            raise ValueError(
                f"{path}: annotation id {annotation_id} has area {value!r}; it must be a finite number. Correct it, or "
                "take it out, which means the area of the box."
            )
    return np.array(values, dtype=np.float64)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _categories(entries: list[dict[str, Any]], path: Path) -> Categories:
    """In the order of their ids, whatever the order in the file."""
    ids = _integers(entries, "id", "categories", path).tolist()
    names = [str(name) for name in _values(entries, "name", "categories", path)]
    if not ids:
        raise ValueError(f"{path} has no category in its list categories. Name there what its boxes show.")
    order = sorted(range(len(ids)), key=ids.__getitem__)
    try:
        return Categories(tuple(names[index] for index in order), tuple(ids[index] for index in order))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _first_repeated(values: Sequence[Any]) -> Any:
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def _refuse_repeated(ids: Integers, what: str, path: Path) -> None:
    if len(np.unique(ids)) != len(ids):
        raise ValueError(
            f"{path}: {what} {_first_repeated(ids.tolist())} comes twice. Give each its own, or remove one."
        )


def _lookup(wanted: Integers, known: Integers, annotation_ids: Integers, what: str, path: Path) -> Integers:
    """Where each wanted id is in `known`."""
    order = np.argsort(known)
    place = np.minimum(np.searchsorted(known, wanted, sorter=order), len(known) - 1)
    unknown = np.flatnonzero(known[order[place]] != wanted)
    if len(unknown):
        first = unknown[0]
        raise ValueError(
            f"{path}: annotation id {annotation_ids[first]} has {what} id {wanted[first]}, which is not in the file's "
            f"list of these ({len(unknown):,} such annotations). Add the {what} there, or take the annotations out."
        )
    return np.asarray(order[place], dtype=np.int64)


def _check_name(name: Any, image_id: int, path: Path) -> None:
    parts = str(name).replace("\\", "/").split("/")
    if not isinstance(name, str) or not parts[-1] or parts[0] == "" or ".." in parts or ":" in parts[0]:
        raise ValueError(
            f"{path}: image id {image_id} has file_name {name!r}; it must be a path below the folder of the split, "
            "without '..'. Correct it."
        )


def check_categories(annotations: CocoAnnotations, categories: Categories) -> None:
    """Refuses annotations of other categories.

    Raises:
        ValueError: If ids or names differ; the message names the first that does.
    """
    here = dict(zip(annotations.categories.ids, annotations.categories.names, strict=True))
    there = dict(zip(categories.ids, categories.names, strict=True))
    different = sorted(set(here.items()) ^ set(there.items()))
    if different:
        number, name = different[0]
        raise ValueError(
            f"{annotations.path} has other categories than the split that was read before it: {len(here)} and "
            f"{len(there)}; id {number} ({name!r}) is not the same in both. Give all splits the same list categories."
        )


# Images


def check_images(annotations: CocoAnnotations, folder: Path) -> None:
    """Looks for every image by listing folders, and into the headers of some.

    Raises:
        FileNotFoundError: If images are missing; the message names the first five.
        ImageError: If one of those that were looked into is no image, or of another size than annotated.
    """
    names = [annotations.names[index] for index in range(len(annotations))]
    below = {os.path.dirname(name) for name in names}  # noqa: PTH120 (a hundred thousand names)
    present = {
        os.path.join(part, file)  # noqa: PTH118
        for part in below
        if (folder / part).is_dir()
        for file in os.listdir(folder / part)  # noqa: PTH208
    }
    missing = [index for index, name in enumerate(names) if name not in present]
    if missing:
        first = listed([f"{names[index]} (image id {annotations.image_ids[index]})" for index in missing], 5)
        raise FileNotFoundError(
            f"{len(missing):,} of the {len(names):,} images of {annotations.path} are missing in {folder}: {first}. "
            "Copy or download them, or take them out of the annotations."
        )
    for index in spread(len(annotations)):
        of_image(annotations, index, image_size, folder)


def of_image(annotations: CocoAnnotations, index: int, read: Callable[[Path, tuple[int, int]], T], folder: Path) -> T:
    """Applies `read_image` or `image_size` to an image; an error then says its image id.

    Raises:
        ImageError: If the image cannot be used.
        FileNotFoundError: If it is not there (any more).
    """
    size = int(annotations.sizes[index, 0]), int(annotations.sizes[index, 1])
    try:
        return read(folder / annotations.names[index], size)
    except ImageError as error:
        raise ImageError(f"image id {annotations.image_ids[index]}: {error}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"image id {annotations.image_ids[index]}: {error} Put it back.") from error

"""Reads and checks annotation files in COCO's format."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pytorch_lightning.utilities import rank_zero_info

from lightning_attn.datamodules.detection.annotations import Categories, DetectionAnnotations
from lightning_attn.datamodules.images.folders import first_duplicate, listed
from lightning_attn.errors import InputError

__all__ = ["read_coco"]

_HIGHEST = 1e300  # whole numbers in JSON may be larger than a float can be

Integers = npt.NDArray[np.int64]


def read_coco(path: Path, *, drop_root: bool = False) -> DetectionAnnotations:
    """Reads and checks an annotation file.

    Args:
        path: The file.
        drop_root: Leave out the root category that Roboflow writes, if nothing is annotated with it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is cut off or not such a file, an id is repeated or refers to nothing, a file name leads out
            of the folder, or a number is missing or invalid; the message names the file and the entry.
    """
    content = _read_json(path)
    images, annotations = content["images"], content["annotations"]
    root = _root_category(content["categories"], annotations) if drop_root else None
    categories = _categories([entry for entry in content["categories"] if entry is not root], path)
    if root is not None:
        rank_zero_info(f"{path}: the root category {root['name']!r} has no box and is left out")

    image_ids = _integers(images, "id", "images", path)
    _refuse_repeated(image_ids, "image id", path)
    sizes = np.stack([_integers(images, key, "images", path) for key in ("height", "width")], axis=1)
    for index in np.flatnonzero((sizes < 1).any(axis=1)):
        height, width = sizes[index]
        raise InputError(
            f"{path}: image id {image_ids[index]} has width {width} and height {height}; both must be at least 1. "
            "Correct them."
        )
    names = _values(images, "file_name", "images", path)
    for image_id, name in zip(image_ids, names, strict=True):
        _check_name(name, image_id, path)

    annotation_ids = _integers(annotations, "id", "annotations", path)
    _refuse_repeated(annotation_ids, "annotation id", path)
    image_indices = _lookup(
        _integers(annotations, "image_id", "annotations", path), image_ids, annotation_ids, "image", path
    )
    labels = 1 + _lookup(
        _integers(annotations, "category_id", "annotations", path),
        np.array(categories.ids, dtype=np.int64),
        annotation_ids,
        "category",
        path,
    )
    bboxes = _bboxes(annotations, annotation_ids, image_ids[image_indices], path)
    areas = _areas(annotations, annotation_ids, bboxes, path)
    crowd = _crowds(annotations, annotation_ids, path)
    return DetectionAnnotations.from_objects(
        path,
        categories,
        names=names,
        sizes=sizes,
        image_indices=image_indices,
        bboxes=bboxes,
        labels=labels,
        crowd=crowd,
        areas=areas,
        image_ids=image_ids,
        annotation_ids=annotation_ids,
    )


def _read_json(path: Path) -> dict[str, list[dict[str, Any]]]:
    def without_outline(entry: dict[str, Any]) -> dict[str, Any]:
        entry.pop("segmentation", None)  # most of the file; it need not be in memory at once
        return entry

    try:
        with path.open(encoding="utf-8-sig") as file:  # some tools begin with a byte-order mark
            content = json.load(file, object_hook=without_outline)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not a complete JSON file: {error.msg} at character {error.pos:,} of {len(error.doc):,}. It may "
            "be cut off; copy or download it again."
        ) from error
    except RecursionError as error:
        raise InputError(f"{path} is not an annotation file: lists or objects in it are nested too deeply.") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 (byte {error.start:,}); an older Windows program may have written it as Latin-1. "
            f"Convert it, for instance by: iconv -f latin1 -t utf-8 {path.name} > utf8.json"
        ) from error
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        found = f"an object with {listed(list(content), 8)}" if isinstance(content, dict) else "another kind of value"
        raise InputError(
            f"{path} holds {found}; an annotation file is an object with the lists {', '.join(keys)}. Give annotations "
            "in COCO's instances format."
        )
    if not content["images"]:
        raise InputError(f"{path} has no image in its list images. Give a split that holds some.")
    return content


def _values(entries: list[dict[str, Any]], key: str, what: str, path: Path) -> list[Any]:
    try:
        return [entry[key] for entry in entries]
    except (KeyError, TypeError) as error:
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict) or key not in entry:
                raise InputError(
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
            hint = "Correct it."
            if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
                hint = "It is text: converters from VIA or CSV files often write so; take the quotation marks away."
            raise InputError(f"{path}: {what}[{number}] has {key} {value!r}; it must be a whole number. {hint}")
        whole[number] = value
    return whole


def _bboxes(
    annotations: list[dict[str, Any]], annotation_ids: Integers, image_ids: Integers, path: Path
) -> npt.NDArray[np.float64]:
    """(x, y, width, height) of each annotation, `[M, 4]`."""
    values = _values(annotations, "bbox", "annotations", path)
    try:
        bboxes = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):  # not four numbers each; the loop below finds which
        bboxes = np.full((len(values), 4), np.nan)
    if not len(values):
        return bboxes.reshape(0, 4)
    if bboxes.shape == (len(values), 4) and np.isfinite(bboxes).all():
        return bboxes
    for value, annotation_id, image_id in zip(values, annotation_ids, image_ids, strict=True):
        if not isinstance(value, list) or len(value) != 4 or not all(_is_finite(number) for number in value):
            raise InputError(
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
            raise InputError(
                f"{path}: annotation id {annotation_id} has area {value!r}; it must be a finite number. Correct it, or "
                "take it out, which means the area of the box."
            )
    return np.array(values, dtype=np.float64)


def _crowds(annotations: list[dict[str, Any]], annotation_ids: Integers, path: Path) -> npt.NDArray[np.bool_]:
    """Whether each annotation is of a crowd, `[M]`; no where nothing is said."""
    values = [entry.get("iscrowd", 0) for entry in annotations]
    for value, annotation_id in zip(values, annotation_ids, strict=True):
        if not isinstance(value, int | float) or value not in (0, 1):
            raise InputError(
                f"{path}: annotation id {annotation_id} has iscrowd {value!r}; it must be 0 or 1. Correct it, or take "
                "it out, which means 0."
            )
    return np.array(values, dtype=np.bool_)


def _root_category(entries: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The category that is the supercategory of all others and has no annotation, if there is one."""
    for entry in entries:
        others = [other for other in entries if other is not entry]
        is_root = others and all(other.get("supercategory") == entry.get("name") for other in others)
        if is_root and entry.get("supercategory") in (None, "", "none"):
            return None if any(one.get("category_id") == entry.get("id") for one in annotations) else entry
    return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < _HIGHEST and math.isfinite(value)


def _categories(entries: list[dict[str, Any]], path: Path) -> Categories:
    """In the order of their ids, whatever the order in the file."""
    ids = _integers(entries, "id", "categories", path).tolist()
    names = [str(name) for name in _values(entries, "name", "categories", path)]
    if not ids:
        raise InputError(f"{path} has no category in its list categories. Name there what its boxes show.")
    order = sorted(range(len(ids)), key=ids.__getitem__)
    try:
        return Categories(tuple(names[index] for index in order), tuple(ids[index] for index in order))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _refuse_repeated(ids: Integers, what: str, path: Path) -> None:
    if len(np.unique(ids)) != len(ids):
        raise InputError(
            f"{path}: {what} {first_duplicate(ids.tolist())} is repeated. Give each its own, or remove one."
        )


def _lookup(wanted: Integers, known: Integers, annotation_ids: Integers, what: str, path: Path) -> Integers:
    """Position of each wanted id in `known`."""
    order = np.argsort(known)
    place = np.minimum(np.searchsorted(known, wanted, sorter=order), len(known) - 1)
    unknown = np.flatnonzero(known[order[place]] != wanted)
    if len(unknown):
        first = unknown[0]
        raise InputError(
            f"{path}: annotation id {annotation_ids[first]} has {what} id {wanted[first]}, which is not in the file's "
            f"list of these ({len(unknown):,} such annotations). Add the {what} there, or take the annotations out."
        )
    return np.asarray(order[place], dtype=np.int64)


def _check_name(name: Any, image_id: int, path: Path) -> None:
    parts = str(name).replace("\\", "/").split("/")
    if not isinstance(name, str) or not parts[-1] or parts[0] == "" or ".." in parts or ":" in parts[0]:
        raise InputError(
            f"{path}: image id {image_id} has file_name {name!r}; it must be a path below the folder of the split, "
            "without '..'. Correct it."
        )

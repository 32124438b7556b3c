"""Object detection data in the layout of YOLO: a text file of normalised boxes for each image, and `data.yaml`."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from typing_extensions import override

from lightning_attn.datamodules.detection.annotations import Categories, DetectionAnnotations, sizes_of
from lightning_attn.datamodules.detection.datamodule import DetectionDataModule
from lightning_attn.datamodules.images.batches import BadImagePolicy
from lightning_attn.datamodules.images.files import IMAGE_SUFFIXES, ExifPolicy
from lightning_attn.datamodules.images.folders import contents, images_below, listed, read_lines, read_text
from lightning_attn.errors import InputError, MissingFileError

__all__ = ["YOLODetectionDataModule", "read_yolo", "read_yolo_description"]

_SPLITS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}


class YOLODetectionDataModule(DetectionDataModule):
    """Detection data as the YOLO family of detectors reads it.

    `root/data.yaml` (or the only other YAML file in `root`) names the classes and, for each split, a folder of images,
    a list of them in a text file, or several of these. Labels are in text files of the same names, in the folder whose
    path has `labels` instead of the last `images` (or beside the images): a line `class x y width height` for each box,
    its centre and size relative to those of the image, or a class and the corners of an outline, whose bounding box is
    used. An image without a file has no objects.

    Args:
        root: Folder of the data.
        batch_size: Training images in a batch on one rank.
        num_workers: Processes that make batches; 0 makes them in the training process.
        train_split: Name of the training split in `data.yaml`.
        val_split: Name of the validation split in `data.yaml` (`val` finds `valid` too); "" for none.
        test_split: Name of the test split; "" means the validation split.
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
        **options: Any,
    ) -> None:
        super().__init__(
            root,
            {"train": train_split, "val": val_split, "test": test_split},
            batch_size=batch_size,
            num_workers=num_workers,
            **options,
        )

    @override
    def read_split(self, split: str) -> tuple[DetectionAnnotations, Path]:
        return read_yolo(self.root, self.split_names[split], self.exif, self.on_bad_image)

    @override
    def read_categories(self) -> Categories | None:
        return read_yolo_description(self.root)[1] if self.root.exists() else None


def read_yolo_description(root: Path) -> tuple[dict[str, Any], Categories, Path]:
    """The content of `data.yaml`, the classes in it, and its path.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it names no classes.
    """
    path = root if root.is_file() else root / "data.yaml"
    if not path.is_file():
        others = sorted([*root.glob("*.yaml"), *root.glob("*.yml")]) if root.is_dir() else []
        if len(others) != 1:
            holds = f"; {root} holds {contents(root)}" if root.is_dir() else ""
            raise MissingFileError(
                f"root: {path} does not exist{holds}. Give the folder that holds data.yaml (--data.root FOLDER)."
            )
        path = others[0]
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = yaml.safe_load(text)
        as_written = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a YAML file: {error}. Correct it.") from error
    names = as_written.get("names") if isinstance(as_written, dict) else None
    if isinstance(names, dict) and sorted(names) == sorted(map(str, range(len(names)))):
        names = [names[str(number)] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise InputError(
            f"{path}: names is {names!r}; it must be a list of the names of the classes, or a mapping from 0, 1, 2, "
            "... to them. Correct it."
        )
    count = content.get("nc", len(names))
    if count != len(names):
        raise InputError(f"{path}: nc is {count!r}, but there are {len(names)} names. Correct one of them.")
    try:
        return content, Categories(tuple(map(str, names)), tuple(range(len(names)))), path
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def read_yolo(
    root: Path, split: str, exif: ExifPolicy = "apply", on_bad_image: BadImagePolicy = "stop"
) -> tuple[DetectionAnnotations, Path]:
    """Reads the annotations of a split of YOLO's layout.

    Args:
        root: Folder that holds `data.yaml`, or that file.
        split: Name of the split in that file.
        exif: See `ExifPolicy`; for the sizes of images.
        on_bad_image: See `BadImagePolicy`; for images whose size cannot be read.

    Returns:
        The annotations, whose category ids are YOLO's, from 0, and the folder that the names of images are relative to.

    Raises:
        FileNotFoundError: If there is no such split, or a folder or file does not exist.
        ValueError: If a file cannot be read; the message names it and the line.
    """
    content, categories, description = read_yolo_description(root)
    images = _images(description.parent, content, split, description)
    folder = _common_folder(images)
    names = [path.relative_to(folder).as_posix() for path in images]
    sizes_by_number, unreadable = sizes_of(folder, names, exif, on_bad_image)
    readable = sorted(sizes_by_number)
    sizes = np.array([sizes_by_number[number] for number in readable], dtype=np.int64).reshape(-1, 2)
    image_indices: list[int] = []
    rows: list[tuple[int, float, float, float, float]] = []
    keypoints = _keypoint_values(content, description)
    labels = [_label_path(path) for path in images]
    labelled = [path.is_file() for path in labels]
    if not any(labelled):
        raise MissingFileError(
            f"none of the {len(images):,} images of {split!r} in {description} has a file of labels, such as "
            f"{labels[0]}. Put the labels there: the path of the image with labels instead of images."
        )
    for place, number in enumerate(readable):
        if labelled[number]:
            found = _read_labels(labels[number], len(categories), keypoints)
            image_indices += [place] * len(found)
            rows += found
    values = np.array(rows, dtype=np.float64).reshape(-1, 5)
    image_index = np.array(image_indices, dtype=np.int64)
    scale = np.tile(sizes[image_index][:, ::-1], 2)
    centres, sides = values[:, 1:3], values[:, 3:5]
    annotations = DetectionAnnotations.from_objects(
        description,
        categories,
        names=[names[number] for number in readable],
        sizes=sizes,
        image_indices=image_index,
        bboxes=np.concatenate([centres - sides / 2, sides], axis=1) * scale,
        labels=values[:, 0].astype(np.int64) + 1,
        unreadable=unreadable,
    )
    return annotations, folder


def _keypoint_values(content: dict[str, Any], description: Path) -> int | None:
    """How many numbers of keypoints follow each box; None if outlines may follow."""
    shape = content.get("kpt_shape")
    if shape is None:
        return None
    if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(one, int) and one > 0 for one in shape)):
        raise InputError(f"{description}: kpt_shape is {shape!r}; it must be two numbers such as [17, 3]. Correct it.")
    return int(shape[0] * shape[1])


def _images(root: Path, content: dict[str, Any], split: str, description: Path) -> list[Path]:
    """The images of a split, sorted."""
    key = next((name for name in _SPLITS.get(split, (split,)) if content.get(name)), None)
    if key is None:
        others = ("names", "path", "download")
        known = [name for name, value in content.items() if isinstance(value, str | list) and name not in others]
        known = [name for name in known if name in ("train", "val", "valid", "test")] or known
        raise MissingFileError(
            f"{description} names no split {split!r}, but {listed(known, 8) or 'none at all'}. Give one of them "
            "(--data.train_split, --data.val_split or --data.test_split NAME)."
        )
    named = content[key] if isinstance(content[key], list) else [content[key]]
    found = [path for one in named for path in _images_of(_resolved(root, content, str(one), description), description)]
    if not found:
        raise MissingFileError(f"{description}: {key}: {named} holds no image ({', '.join(IMAGE_SUFFIXES)}).")
    return sorted(set(found))


def _resolved(root: Path, content: dict[str, Any], named: str, description: Path) -> Path:
    """A path of `data.yaml`: relative to its `path`, to `root`, or as tools write it, to a folder beside `root`."""
    base = Path(str(content.get("path") or ""))
    without_dots = named
    while without_dots.startswith("../"):  # exports say ../train/images where train/ is beside data.yaml
        without_dots = without_dots.removeprefix("../")
    candidates = [
        root / base / named,
        root / named,
        root / without_dots,
        root / base.name / named,
    ]
    if Path(named).is_absolute():  # of another machine; two folder names must agree
        parts = Path(named).parts[1:]
        shortest = 1 if Path(named).suffix == ".txt" else 2
        candidates += [root.joinpath(*parts[begin:]) for begin in range(1, len(parts) - shortest + 1)]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    tried = listed(list(dict.fromkeys(map(str, candidates[:3]))), 3)
    raise MissingFileError(
        f"{description} names {named!r}, and none of {tried} exists; {root} holds {contents(root)}. Correct the path."
    )


def _images_of(place: Path, description: Path) -> Iterable[Path]:
    """The images of a folder and its subfolders, or of a list."""
    if place.is_dir():
        return (place / name for name in images_below(place))
    paths = [place.parent / line for line in read_lines(place)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise MissingFileError(
            f"{place} (of {description}) lists {len(missing):,} images that do not exist: {listed(missing, 3)}. Put "
            "them there, or take them out of the list."
        )
    return paths


def _label_path(image: Path) -> Path:
    """Path of the labels of an image."""
    parts = list(image.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            return Path(*parts).with_suffix(".txt")
    return image.with_suffix(".txt")


def _read_labels(path: Path, num_classes: int, keypoints: int | None) -> list[tuple[int, float, float, float, float]]:
    """Class, centre and size of each object."""
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}: {line.strip()[:60]!r}"
        try:
            values = [float(word) for word in line.split()]
        except ValueError:
            values = []
        if keypoints is not None and len(values) == 5 + keypoints:
            values = values[:5]
        elif keypoints is not None and len(values) != 5:
            raise InputError(
                f"{where} has {len(values)} numbers, but kpt_shape in data.yaml asks for 5 and {keypoints}. Correct "
                "one of them."
            )
        if not np.isfinite(values).all() or not (len(values) == 5 or (len(values) >= 7 and len(values) % 2)):
            raise InputError(
                f"{where} is neither a class with x, y, width and height nor a class with the corners of an outline. "
                "Correct it."
            )
        label, *numbers = values
        if label != int(label) or not 0 <= label < num_classes:
            raise InputError(
                f"{where} has the class {label:g}, but data.yaml names the classes 0 to {num_classes - 1}. Correct one "
                "of them."
            )
        if max(numbers) > 2:
            raise InputError(
                f"{where} has numbers far above 1, but YOLO's are relative to the image's width and height. Divide "
                "them by these."
            )
        x, y, width, height = numbers if len(numbers) == 4 else _bounds(numbers)
        rows.append((int(label), x, y, width, height))
    return rows


def _bounds(outline: Sequence[float]) -> tuple[float, float, float, float]:
    """Centre and size of the bounding box of an outline x1 y1 x2 y2 ..."""
    xs, ys = outline[::2], outline[1::2]
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)


def _common_folder(paths: Sequence[Path]) -> Path:
    """The deepest folder that holds all."""
    folder = paths[0].parent
    while not all(path.is_relative_to(folder) for path in paths):
        folder = folder.parent
    return folder

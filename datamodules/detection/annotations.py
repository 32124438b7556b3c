"""Boxes of a split in arrays, from any format of files, and checks of them and of their images."""

import enum
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lightning_attn.datamodules.detection.transforms import MIN_BOX_SIDE, Boxes, Labels
from lightning_attn.datamodules.images.batches import BadImagePolicy
from lightning_attn.datamodules.images.files import ExifPolicy, ImageError, ImageHeader, image_header, image_size
from lightning_attn.datamodules.images.folders import (
    PackedText,
    evenly_spaced,
    first_duplicate,
    images_to_predict,
    listed,
    printable,
)
from lightning_attn.datamodules.images.transforms import resized_sizes
from lightning_attn.errors import InputError, MissingFileError

__all__ = [
    "Categories",
    "DetectionAnnotations",
    "TargetStatus",
    "check_categories",
    "check_images",
    "read_annotated",
    "sizes_of",
]

Integers = npt.NDArray[np.int64]
T = TypeVar("T")

_LEAST_SIDE = 0.01  # of a box in pixels


@dataclass(frozen=True)
class Categories:
    """The classes to detect. The label of a class is its position here plus 1; label 0 is background.

    Args:
        names: Name of each category.
        ids: Its id in the annotations; COCO's 80 have gaps between 1 and 90.

    Raises:
        ValueError: If a name or an id is repeated, or they differ in number.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.ids):
            raise InputError(f"categories: {len(self.names)} names for {len(self.ids)} ids; give one each.")
        twice = first_duplicate(self.ids)
        if twice is not None:
            raise InputError(f"categories: two have the id {twice!r}; give each its own.")
        twice = first_duplicate(self.names)
        if twice is not None:
            ids = [number for name, number in zip(self.names, self.ids, strict=True) if name == twice]
            raise InputError(
                f"categories: the ids {listed(ids, 5)} all have the name {twice!r}; give each its own, or make them "
                "one category."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def label(self, category_id: int) -> int:
        """The label, 1..K, of a category id.

        Raises:
            ValueError: If there is no such category.
        """
        if category_id not in self.ids:
            raise InputError(f"category id {category_id} is unknown; there are {listed(self.ids, 90)}.")
        return self.ids.index(category_id) + 1

    def category_id(self, label: int) -> int:
        """The category id of a label, 1..K.

        Raises:
            ValueError: If there is no such label.
        """
        if not 1 <= label <= len(self):
            raise InputError(f"label {label} is not in 1..{len(self)}.")
        return self.ids[label - 1]


class TargetStatus(enum.IntEnum):
    """Whether an annotation is a training target, or why not; of several reasons the smallest value is given."""

    TARGET = 0
    CROWD = 1
    WITHOUT_AREA = 2
    OUTSIDE = 3
    TOO_SMALL = 4

    @property
    def description(self) -> str:
        """The reason, after a number of boxes."""
        return {
            TargetStatus.TARGET: "used",
            TargetStatus.CROWD: "of crowds",
            TargetStatus.WITHOUT_AREA: "without area",
            TargetStatus.OUTSIDE: "outside of their image",
            TargetStatus.TOO_SMALL: "smaller than a pixel at the network's size",
        }[self]


@dataclass(frozen=True, eq=False)
class DetectionAnnotations:
    """The annotations of a split in arrays, which worker processes share without copying.

    N images in the order of their file or folder, M annotations sorted by image.

    Args:
        path: The file or folder that they were read from.
        categories: The annotated classes; none for a folder of images alone.
        image_ids: `[N]`.
        sizes: Height and width, `[N, 2]`.
        names: File names, N.
        starts: The annotations of image i are `starts[i]` to `starts[i + 1]`, `[N + 1]`.
        annotation_ids: `[M]`.
        bboxes: (x, y, width, height) as in the file, `[M, 4]`.
        labels: 1..K, `[M]`.
        areas: `[M]`.
        crowd: Whether it is a crowd, `[M]`.
        numbered: Whether the image ids were generated here, so that they mean nothing to the user.
        unreadable: Images that are left out because their size cannot be read, with the reason.
    """

    path: Path
    categories: Categories
    image_ids: Integers
    sizes: Integers
    names: PackedText
    starts: Integers
    annotation_ids: Integers
    bboxes: npt.NDArray[np.float64]
    labels: Labels
    areas: npt.NDArray[np.float64]
    crowd: npt.NDArray[np.bool_]
    numbered: bool = False
    unreadable: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_objects(
        cls,
        path: Path,
        categories: Categories,
        *,
        names: Sequence[str],
        sizes: Integers,
        image_indices: Integers,
        bboxes: npt.NDArray[np.float64],
        labels: Labels,
        crowd: npt.NDArray[np.bool_] | None = None,
        areas: npt.NDArray[np.float64] | None = None,
        image_ids: Integers | None = None,
        annotation_ids: Integers | None = None,
        unreadable: Mapping[str, str] | None = None,
    ) -> "DetectionAnnotations":
        """From annotations in any order; the order within an image is kept.

        Args:
            path: See the class, as all others.
            categories: See the class.
            names: File names of the images.
            sizes: `[N, 2]`.
            image_indices: Index of the image of each annotation, `[M]`.
            bboxes: `[M, 4]`.
            labels: `[M]`.
            crowd: `[M]`; None for no crowds.
            areas: `[M]`; None for those of the boxes.
            image_ids: `[N]`; None for 1, 2, 3, ...
            annotation_ids: `[M]`; None for 1, 2, 3, ...
            unreadable: See the class.
        """
        order = np.argsort(image_indices, kind="stable")
        starts = np.searchsorted(image_indices[order], np.arange(len(names) + 1))
        crowd = np.zeros(len(image_indices), dtype=np.bool_) if crowd is None else crowd
        areas = np.asarray(bboxes[:, 2] * bboxes[:, 3]) if areas is None else areas
        counted = np.arange(1, len(image_indices) + 1, dtype=np.int64) if annotation_ids is None else annotation_ids
        return cls(
            path,
            categories,
            np.arange(1, len(names) + 1, dtype=np.int64) if image_ids is None else image_ids,
            sizes,
            PackedText(names),
            np.asarray(starts, dtype=np.int64),
            counted[order],
            bboxes[order],
            labels[order],
            areas[order],
            crowd[order],
            numbered=image_ids is None,
            unreadable=unreadable or {},
        )

    @classmethod
    def from_folder(cls, folder: Path, exif: ExifPolicy = "apply") -> "DetectionAnnotations":
        """The images of a folder and of its subfolders, without annotations, sorted by name.

        Image ids are the numbers in the names if all names are numbers, as those of COCO are; otherwise 1, 2, 3, ...
        A file that is not an image is only found when it is read.

        Raises:
            FileNotFoundError: If there is no such folder, or it holds no file with the ending of an image.
        """
        names = images_to_predict(folder)
        stems = [Path(name).stem for name in names]
        numbers = [int(stem) for stem in stems if stem.isdecimal() and len(stem) <= 18]
        by_name = len(set(numbers)) == len(names)
        none = np.empty(0, dtype=np.int64)
        return cls(
            folder,
            Categories((), ()),
            np.array(numbers if by_name else range(1, len(names) + 1), dtype=np.int64),
            np.array([_size_or_one(folder / name, exif) for name in names], dtype=np.int64),
            PackedText(names),
            np.zeros(len(names) + 1, dtype=np.int64),
            annotation_ids=none,
            bboxes=np.empty((0, 4)),
            labels=none,
            areas=np.empty(0),
            crowd=np.empty(0, dtype=np.bool_),
            numbered=not by_name,
        )

    def __len__(self) -> int:
        return len(self.image_ids)

    def image_indices(self) -> Integers:
        """Index of the image of each annotation, `[M]`."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def statuses(self, min_size: int = 0, max_size: int = 0) -> npt.NDArray[np.int8]:
        """The `TargetStatus` of each annotation, `[M]`.

        Args:
            min_size: Images are resized as `resized_size` says.
            max_size: The same.
        """
        sizes = self.sizes[self.image_indices()]
        boxes, inside = _clipped(self.bboxes, sizes)
        scales = (resized_sizes(self.sizes, min_size, max_size) / self.sizes)[self.image_indices()][:, ::-1]
        statuses = np.full(len(self.bboxes), TargetStatus.TARGET, dtype=np.int8)
        statuses[((boxes[:, 2:] - boxes[:, :2]) * scales < MIN_BOX_SIDE).any(axis=1)] = TargetStatus.TOO_SMALL
        statuses[~inside] = TargetStatus.OUTSIDE
        statuses[(self.bboxes[:, 2:] <= 0).any(axis=1)] = TargetStatus.WITHOUT_AREA
        statuses[self.crowd] = TargetStatus.CROWD
        return statuses

    def with_targets(self, min_size: int = 0, max_size: int = 0) -> Integers:
        """Indices of the images that have a training target; arguments are those of `statuses`."""
        return np.unique(self.image_indices()[self.statuses(min_size, max_size) == TargetStatus.TARGET])

    def images_of_labels(self, chosen: npt.NDArray[np.bool_]) -> Integers:
        """The distinct pairs of image and label of some annotations, `[n, 2]`.

        Args:
            chosen: Which annotations, `[M]`.
        """
        return np.unique(np.stack([self.image_indices(), self.labels], axis=1)[chosen], axis=0)

    def cut_at_borders(self) -> npt.NDArray[np.bool_]:
        """Which boxes reach beyond their image by more than a pixel, `[M]`."""
        corners, borders = _corners(self.bboxes, self.sizes[self.image_indices()])
        return np.asarray(((corners < -1) | (corners > borders + 1)).any(axis=1))

    def likely_mistake(self) -> str:
        """What to correct if the boxes seem not to be x, y, width and height in pixels; empty otherwise."""
        if not len(self.bboxes):
            return ""
        normalised = (self.bboxes.max(axis=1) <= 1) & (self.bboxes[:, 2:] > 0).any(axis=1)
        if normalised.sum() >= 0.5 * len(self.bboxes) and self.sizes.min() > 2:
            return (
                f"The coordinates of {int(normalised.sum()):,} of {len(normalised):,} boxes are between 0 and 1, so "
                "they look normalised by the size of the image: multiply them with its width and height."
            )
        corners, borders = _corners(self.bboxes, self.sizes[self.image_indices()])
        beyond = (corners[:, 2:] > 1.02 * borders[:, 2:] + 1).any(axis=1)
        as_corners = (self.bboxes <= borders + 1).all(axis=1) & (self.bboxes[:, 2:] > self.bboxes[:, :2]).all(axis=1)
        if beyond.sum() >= max(3, 0.1 * len(corners)) and as_corners.all():
            return (
                f"{int(beyond.sum()):,} of {len(corners):,} boxes reach beyond the right or lower border of their "
                "image, and all would fit as x1, y1, x2, y2: they look like corners, where width and height are meant."
            )
        return ""

    def targets(self, index: int) -> tuple[Boxes, Labels]:
        """The training targets of an image: boxes (x1, y1, x2, y2), cut at its borders, `[n, 4]` and labels `[n]`."""
        part = slice(self.starts[index], self.starts[index + 1])
        boxes, inside = _clipped(self.bboxes[part], self.sizes[index])
        # A box of the size of a rounding error is no target at any image size.
        kept = inside & ~self.crowd[part] & ((boxes[:, 2:] - boxes[:, :2]) > _LEAST_SIDE).all(axis=1)
        return boxes[kept], self.labels[part][kept]

    def ground_truth(self) -> dict[str, Any]:
        """The input of COCO's scorer, with every annotation as it is in the file; outlines are left out.

        Annotation ids are increased by 1 if one of them is 0, which the scorer takes for "no match".
        """
        shift = int((self.annotation_ids == 0).any())
        category_ids = np.array(self.categories.ids, dtype=np.int64)[self.labels - 1]
        columns = (
            self.annotation_ids + shift,
            self.image_ids[self.image_indices()],
            category_ids,
            self.bboxes,
            self.areas,
        )
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


def _corners(bboxes: npt.NDArray[np.float64], sizes: Integers) -> tuple[npt.NDArray[np.float64], Integers]:
    """Boxes as (x1, y1, x2, y2), and the right and lower borders that each of these may reach."""
    corners = np.concatenate([bboxes[:, :2], bboxes[:, :2] + bboxes[:, 2:]], axis=1)
    return corners, np.concatenate([sizes[..., ::-1]] * 2, axis=-1)


def _clipped(bboxes: npt.NDArray[np.float64], sizes: Integers) -> tuple[Boxes, npt.NDArray[np.bool_]]:
    """Boxes (x1, y1, x2, y2) cut at the borders of their images, and which of them then have an area.

    Args:
        bboxes: (x, y, width, height), `[m, 4]`.
        sizes: Height and width of each one's image `[m, 2]`, or of the image of all `[2]`.
    """
    corners, borders = _corners(bboxes, sizes)
    boxes = np.asarray(np.clip(corners, 0, borders), dtype=np.float32)
    inside: npt.NDArray[np.bool_] = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
    return boxes, inside


def sizes_of(
    folder: Path, names: Sequence[str], exif: ExifPolicy, on_bad_image: BadImagePolicy
) -> tuple[dict[int, tuple[int, int]], dict[str, str]]:
    """Sizes of images whose annotations do not have them.

    Args:
        folder: Folder that the names are relative to.
        names: File names.
        exif: See `ExifPolicy`.
        on_bad_image: See `BadImagePolicy`.

    Returns:
        Height and width by the index of the image, and the errors of those that cannot be read, by their names.

    Raises:
        ImageError: If one cannot be read, and is not to be skipped.
        OSError: Likewise.
    """
    sizes, unreadable = {}, {}
    for number, name in enumerate(names):
        try:
            sizes[number] = image_size(folder / name, exif=exif)
        except (ImageError, OSError) as error:
            if on_bad_image == "stop":
                raise
            unreadable[printable(name)] = printable(str(error))
    return sizes, unreadable


def _size_or_one(path: Path, exif: ExifPolicy) -> tuple[int, int]:
    """The size of an image, or 1 x 1 if it cannot be read: the error is raised when it is read as a whole."""
    try:
        return image_size(path, exif=exif)
    except (ImageError, OSError):
        return 1, 1


def check_categories(annotations: DetectionAnnotations, categories: Categories) -> None:
    """Refuses annotations of other categories.

    Raises:
        ValueError: If ids or names differ; the message names the first that does.
    """
    here = dict(zip(annotations.categories.ids, annotations.categories.names, strict=True))
    there = dict(zip(categories.ids, categories.names, strict=True))
    different = sorted(set(here.items()) ^ set(there.items()))
    if different:
        number, name = different[0]
        raise InputError(
            f"{annotations.path} has other categories than the split that was read before it: {len(here)} and "
            f"{len(there)}; id {number} ({name!r}) is not the same in both. Give all splits the same list categories."
        )


# Images


def check_images(
    annotations: DetectionAnnotations,
    folder: Path,
    exif: ExifPolicy = "apply",
    on_bad_image: BadImagePolicy = "stop",
) -> list[ImageHeader]:
    """Checks that every image exists, by listing folders, and reads the headers of some.

    Returns:
        The headers that were read.

    Raises:
        FileNotFoundError: If images are missing; the message names the first five.
        ImageError: If one of these files is not an image, or of another size than annotated, and bad images are not
            skipped.
    """
    names = [annotations.names[index] for index in range(len(annotations))]
    below = {os.path.dirname(name) for name in names}  # noqa: PTH120 (a hundred thousand names)
    present = {
        os.path.join(part, file)  # noqa: PTH118
        for part in below
        if (folder / part).is_dir()
        for file in os.listdir(folder / part)  # noqa: PTH208
    }
    missing = [index for index, name in enumerate(names) if name not in present and not (folder / name).is_file()]
    if missing:
        first = listed([f"{names[index]} (image id {annotations.image_ids[index]})" for index in missing], 5)
        hint = ""
        if any("\\" in names[index] for index in missing):
            hint = " Their names have backslashes, which are Windows' separators of folders: write / instead."
        elif odd := next((name for name in sorted(present) if printable(name) != name), None):
            hint = f" Names of files there are not UTF-8, such as {printable(odd)!r}: rename these."
        raise MissingFileError(
            f"{len(missing):,} of the {len(names):,} images of {annotations.path} are missing in {folder}: {first}. "
            f"Copy or download them, or take them out of the annotations.{hint}"
        )
    headers = []
    for index in evenly_spaced(len(annotations)):
        try:
            headers.append(read_annotated(annotations, index, image_header, folder, exif))
        except ImageError:
            if on_bad_image == "stop":
                raise
    return headers


def read_annotated(
    annotations: DetectionAnnotations,
    index: int,
    read: Callable[..., T],
    folder: Path,
    exif: ExifPolicy = "apply",
) -> T:
    """Applies `read_image` or `image_header` to an image; an error then has its image id, if the user gave it one.

    Raises:
        ImageError: If the image cannot be used.
        FileNotFoundError: If it does not exist (any more).
    """
    size = int(annotations.sizes[index, 0]), int(annotations.sizes[index, 1])
    which = "" if annotations.numbered else f"image id {annotations.image_ids[index]}: "
    try:
        return read(folder / annotations.names[index], size, exif=exif)
    except ImageError as error:
        raise ImageError(f"{which}{error}") from error
    except FileNotFoundError as error:
        raise MissingFileError(f"{which}{error} Put it back.") from error

"""Classes of pixels: names, ids in label files, colours; those of Cityscapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from lightning_attn.errors import InputError

__all__ = [
    "CITYSCAPES_CLASSES",
    "HIGHEST_ID",
    "IGNORED",
    "LabelClass",
    "LabelMap",
    "SegmentationClasses",
    "distinct_colours",
    "value_counts",
]

LabelMap = npt.NDArray[np.uint8]

IGNORED = 255
"""The label of pixels that do not count."""

HIGHEST_ID = 33
"""Ids in label files are 0 to this. License plates have id -1, which 8 bits hold as 255."""

# The id "unlabeled", for pixels of a prediction without a class.
_UNLABELLED_ID = 0


@dataclass(frozen=True)
class LabelClass:
    """A class that is scored.

    Args:
        name: Its name.
        id: Its id in label files, and in those that the scorer reads.
        train_id: Its index among the classes that are scored.
        colour: Red, green and blue in pictures, 0 to 255 each.
    """

    name: str
    id: int
    train_id: int
    colour: tuple[int, int, int]


_FACTS = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)

CITYSCAPES_CLASSES = tuple(LabelClass(name, id, place, colour) for place, (name, id, colour) in enumerate(_FACTS))
"""The 19 classes that are scored, in the order of their train ids. All other ids are ignored."""


def distinct_colours(colours: Sequence[tuple[int, int, int] | None]) -> tuple[tuple[int, int, int], ...]:
    """Colours for pictures: those that are missing or repeated are chosen from a palette."""
    from matplotlib import colormaps

    palette = [tuple(round(255 * part) for part in colormaps["tab20"](place)[:3]) for place in range(20)]
    strong_first = [*palette[::2], *palette[1::2]]
    found: list[tuple[int, int, int]] = []
    for place, colour in enumerate(colours):
        others = {*found, *(one for one in colours[place + 1 :] if one is not None)}
        if colour is None or colour in found:
            free = [one for one in strong_first if one not in others]
            colour = free[0] if free else strong_first[place % len(strong_first)]  # type: ignore[assignment]
        found.append(colour)  # type: ignore[arg-type]
    return tuple(found)


@dataclass(frozen=True)
class SegmentationClasses:
    """The classes to learn. The label of a class is its position here; every other id becomes `IGNORED`.

    Args:
        names: Name of each class.
        ids: Its id in label files.
        colours: Its red, green and blue in pictures, 0 to 255 each.

    Raises:
        ValueError: If there is no class, they differ in number, or a name or id is repeated.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    colours: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.ids) == len(self.colours) > 0:
            raise InputError(
                f"classes: {len(self.names)} names, {len(self.ids)} ids and {len(self.colours)} colours; give one of "
                "each for every class, and at least one class."
            )
        if not all(0 <= number < 1 << 16 for number in self.ids):
            raise InputError(f"classes: the ids {list(self.ids)} must be from 0 to 65535.")
        if len(self.names) > IGNORED:
            raise InputError(f"classes: there are {len(self.names)}, and at most {IGNORED} are supported.")
        for what, values in (("name", self.names), ("id", self.ids)):
            twice = [value for place, value in enumerate(values) if value in values[:place]]
            if twice:
                raise InputError(f"classes: two have the {what} {twice[0]!r}; give each its own.")

    @classmethod
    def chosen(cls, names: Sequence[str] = ()) -> "SegmentationClasses":
        """Some of Cityscapes' 19 classes, in the order of their train ids.

        Args:
            names: Their names, in any order; empty for all 19.

        Raises:
            ValueError: If a name is unknown or repeated.
        """
        known = [one.name for one in CITYSCAPES_CLASSES]
        for place, name in enumerate(names):
            if name not in known:
                raise InputError(f"classes: {name!r} is unknown; there are {', '.join(known)}.")
            if name in names[:place]:
                raise InputError(f"classes: {name!r} is repeated; give each class once.")
        found = [one for one in CITYSCAPES_CLASSES if not names or one.name in names]
        return cls(tuple(one.name for one in found), tuple(one.id for one in found), tuple(one.colour for one in found))

    def __len__(self) -> int:
        return len(self.names)

    def to_labels(self, label_ids: LabelMap) -> LabelMap:
        """The labels 0..K-1 of ids, and `IGNORED` for all other ids.

        Args:
            label_ids: The ids of a label file, `[H, W]`.
        """
        table = np.full(256, IGNORED, dtype=np.uint8)
        for label, number in enumerate(self.ids):
            if number < 256:
                table[number] = label
        return _looked_up(table, label_ids)

    def to_ids(self, labels: LabelMap) -> npt.NDArray[Any]:
        """The ids of labels, for label files and the scorer; 0, "unlabeled", for labels other than 0..K-1.

        They are uint8, or uint16 where an id is above 255.

        Args:
            labels: `[H, W]`.
        """
        table = np.full(256, _UNLABELLED_ID, dtype=np.uint8 if max(self.ids) < 256 else np.uint16)
        table[: len(self)] = self.ids
        return _looked_up(table, labels)


def value_counts(values: npt.NDArray[Any]) -> dict[int, int]:
    """Number of pixels of each value that occurs."""
    if values.dtype == np.uint8:  # a tenth of the time of sorting them
        counts = np.bincount(values.ravel(), minlength=256)
        return {value: int(counts[value]) for value in np.flatnonzero(counts).tolist()}
    present, numbers = np.unique(values, return_counts=True)
    return dict(zip(present.tolist(), numbers.tolist(), strict=True))


def _looked_up(table: npt.NDArray[Any], values: LabelMap) -> npt.NDArray[Any]:
    # NumPy would convert every index to eight bytes first; OpenCV takes a tenth of its time.
    return np.asarray(cv2.LUT(values, table))

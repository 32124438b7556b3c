"""Folders of images: what is in them, and which of many files are looked into before the work starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.images.files import IMAGE_SUFFIXES

__all__ = ["PackedText", "contents", "listed", "predicted_images", "spread"]

_FILES_CHECKED = 256


class PackedText:
    """Many strings in two arrays: worker processes share them, while each string object would be copied to each."""

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [string.encode() for string in strings]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._bytes[self._ends[index] : self._ends[index + 1]].tobytes().decode()


def predicted_images(folder: Path, *, below: bool = False) -> list[str]:
    """The images of the folder that is named as `predict_folder`, sorted, as paths below it.

    Args:
        folder: The folder.
        below: Whether those of the folders in it belong to it.

    Raises:
        FileNotFoundError: If there is no such folder, or it holds no image.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"predict_folder: {folder} is not a folder. Give a folder of images (--data.predict_folder FOLDER), or "
            '"" for the test split.'
        )
    paths = folder.rglob("*") if below else folder.iterdir()
    images = (path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir())
    names = sorted(path.relative_to(folder).as_posix() for path in images)
    if not names:
        raise FileNotFoundError(
            f"predict_folder: {folder} holds no image ({', '.join(IMAGE_SUFFIXES)}), but {contents(folder)}."
        )
    return names


def spread(count: int) -> range:
    """Numbers of at most 256 of `count` files, evenly spread, whose headers are looked into in advance."""
    return range(0, count, max(1, -(-count // _FILES_CHECKED)))


def contents(folder: Path) -> str:
    """What is in a folder, for a message."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    return listed(names, 8) if names else "nothing"


def listed(values: Sequence[Any] | npt.NDArray[Any], most: int) -> str:
    """The first of some values, for a message."""
    return ", ".join(str(value) for value in values[:most]) + (", ..." if len(values) > most else "")

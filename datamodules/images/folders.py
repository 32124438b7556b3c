"""Folders of images: what is in them, and which of many files are looked into before the work starts."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.images.files import IMAGE_SUFFIXES

__all__ = ["PackedText", "contents", "listed", "predicted_images", "printable", "spread", "unique_stems"]

_FILES_CHECKED = 256


class PackedText:
    """Many strings in two arrays: worker processes share them, while each string object would be copied to each."""

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [string.encode(errors="surrogateescape") for string in strings]  # as the system names files
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._bytes[self._ends[index] : self._ends[index + 1]].tobytes().decode(errors="surrogateescape")


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


def printable(name: str) -> str:
    """A file name for people and text files: bytes that are no UTF-8 become question marks in a black square."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def unique_stems(paths: Sequence[str], *, ending: str = "") -> list[str]:
    """A name for what is written about each of some images: their file names without endings, each once.

    Only the last ending is taken away, so `frame.0001.jpg` gives `frame.0001`. Where two would be alike, also on file
    systems that do not tell capitals apart, the names have the folders that the images are in, or the endings, or
    else a number.

    Args:
        paths: Of the images below a folder.
        ending: Also taken away, of what is left.
    """
    paths = [printable(path) for path in paths]
    bare = [PurePosixPath(path).with_suffix("").as_posix().removesuffix(ending) for path in paths]
    whole = [path.replace("/", "_") for path in paths]
    candidates = [[PurePosixPath(path).name for path in bare], [path.replace("/", "_") for path in bare], whole]
    counts = [Counter(name.casefold() for name in names) for names in candidates]
    stems: list[str] = []
    taken: set[str] = set()
    for choices in zip(*candidates, strict=True):
        stem = next(
            (name for name, count in zip(choices, counts, strict=True) if count[name.casefold()] == 1), choices[-1]
        )
        name, number = stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        stems.append(name)
    return stems


def spread(count: int, most: int = _FILES_CHECKED) -> range:
    """Numbers of at most `most` of `count` files, evenly spread, which are looked into in advance."""
    return range(0, count, max(1, -(-count // most)))


def contents(folder: Path) -> str:
    """What is in a folder, for a message."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    return listed(names, 8) if names else "nothing"


def listed(values: Sequence[Any] | npt.NDArray[Any], most: int) -> str:
    """The first of some values, for a message."""
    return ", ".join(str(value) for value in values[:most]) + (", ..." if len(values) > most else "")

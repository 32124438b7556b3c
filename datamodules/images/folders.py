"""Folders of images: listing them, names of output files, and helpers for messages about them."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_attn.datamodules.images.files import IMAGE_SUFFIXES
from lightning_attn.errors import InputError, MissingFileError

__all__ = [
    "PackedText",
    "contents",
    "evenly_spaced",
    "first_duplicate",
    "images_below",
    "images_to_predict",
    "listed",
    "printable",
    "read_lines",
    "read_text",
    "unique_stems",
]

logger = logging.getLogger(__name__)

_FILES_CHECKED = 256
_LONGEST_STEM = 160  # bytes; file systems allow 255 in a name, prefixes and suffixes included
# Image formats that are not read here: files with these suffixes are reported, not silently ignored.
_OTHER_IMAGE_SUFFIXES = (
    *(".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dng", ".exr", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".nef"),
    *(".npy", ".pgm", ".ppm", ".psd", ".raw", ".svg", ".tga"),
)


class PackedText:
    """Many strings in two arrays, which worker processes share; string objects would be copied to each of them."""

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [string.encode(errors="surrogateescape") for string in strings]  # as the system names files
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._bytes[self._ends[index] : self._ends[index + 1]].tobytes().decode(errors="surrogateescape")


def images_below(folder: Path) -> list[str]:
    """The images of a folder and its subfolders, links included, as sorted paths relative to it.

    Images of other formats are reported in the log.
    """
    found: list[str] = []
    others: Counter[str] = Counter()
    for above, folders, files in os.walk(folder, followlinks=True):
        below = Path(above).relative_to(folder)
        if any((folder / parent).samefile(above) for parent in below.parents if parent != below):
            folders.clear()  # a link to a parent folder, which would be followed for ever
            continue
        for name in files:
            suffix = Path(name).suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                found.append((below / name).as_posix())
            elif suffix in _OTHER_IMAGE_SUFFIXES:
                others[suffix] += 1
    if others:
        logger.warning(
            f"{folder}: {sum(others.values()):,} files with the endings {', '.join(sorted(others))} are left out; "
            f"convert them to one of {', '.join(IMAGE_SUFFIXES)}."
        )
    return sorted(found)


def images_to_predict(folder: Path) -> list[str]:
    """The images of `predict_folder`, by `images_below`.

    Raises:
        FileNotFoundError: If there is no such folder, or it holds no image.
    """
    if not folder.is_dir():
        raise MissingFileError(
            f"predict_folder: {folder} is not a folder. Give a folder of images (--data.predict_folder FOLDER), or "
            '"" for the test split.'
        )
    names = images_below(folder)
    if not names:
        raise MissingFileError(
            f"predict_folder: {folder} holds no image ({', '.join(IMAGE_SUFFIXES)}), but {contents(folder)}."
        )
    return names


def read_text(path: Path) -> str:
    """The contents of a text file, without a byte-order mark.

    Raises:
        ValueError: If it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 (byte {error.start:,}); Windows programs may have written it as UTF-16 or Latin-1. "
            "Save it as UTF-8."
        ) from error


def read_lines(path: Path) -> list[str]:
    """The stripped lines of a text file that are not blank; errors are those of `read_text`."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def printable(name: str) -> str:
    """A file name for messages and text files: bytes that are not UTF-8 become replacement characters."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def unique_stems(paths: Sequence[str], *, ending: str = "") -> list[str]:
    """A unique stem for the output files of each image: its file name without suffix.

    Only the last suffix is removed, so `frame.0001.jpg` gives `frame.0001`. Where two would be equal, also on
    case-insensitive file systems, they get the folders of the images, or the suffixes, or else a number. Very long ones
    are truncated, and end in a digest of the path.

    Args:
        paths: Paths of the images, relative to a folder.
        ending: Also removed, after the suffix.
    """
    paths = [printable(path) for path in paths]
    bare = [_without_suffix(path).removesuffix(ending) for path in paths]
    candidates = [
        [_shortened(name, path) for name, path in zip(names, paths, strict=True)]
        for names in (
            [PurePosixPath(name).name for name in bare],
            [name.replace("/", "_") for name in bare],
            [path.replace("/", "_") for path in paths],
        )
    ]
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


def _without_suffix(path: str) -> str:
    """A path without its last suffix; a name of nothing but dots and a suffix keeps that."""
    stem, _ = os.path.splitext(path)  # noqa: PTH122
    return path.lstrip("./") if not PurePosixPath(stem).name.strip(".") else stem


def _shortened(name: str, path: str) -> str:
    encoded = name.encode()
    if len(encoded) <= _LONGEST_STEM:
        return name
    return f"{encoded[: _LONGEST_STEM - 9].decode(errors='ignore')}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def evenly_spaced(count: int, most: int = _FILES_CHECKED) -> range:
    """Indices of at most `most` of `count` files, evenly spaced, for checks in advance."""
    return range(0, count, max(1, -(-count // most)))


def contents(folder: Path) -> str:
    """The contents of a folder, for a message."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    return listed(names, 8) if names else "nothing"


def listed(values: Sequence[Any] | npt.NDArray[Any], most: int) -> str:
    """The first of some values, separated by commas, for a message."""
    return ", ".join(str(value) for value in values[:most]) + (", ..." if len(values) > most else "")


def first_duplicate(values: Sequence[Any]) -> Any:
    """The first value that equals an earlier one, or None."""
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None

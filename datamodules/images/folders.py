"""Folders of images: what is in them, and which of many files are looked into before the work starts."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.images.files import IMAGE_SUFFIXES
from lightning_attn.errors import InputError, MissingFileError

__all__ = [
    "PackedText",
    "contents",
    "first_repeated",
    "images_below",
    "listed",
    "predicted_images",
    "printable",
    "read_lines",
    "read_text",
    "spread",
    "unique_stems",
]

logger = logging.getLogger(__name__)

_FILES_CHECKED = 256
_LONGEST_STEM = 160  # bytes; file systems take 255 in a name, with what is written before and behind it
# Images that nothing here reads, or only with further software: they are named, and not passed over in silence.
_OTHER_IMAGE_SUFFIXES = (
    *(".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dng", ".exr", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".nef"),
    *(".npy", ".pgm", ".ppm", ".psd", ".raw", ".svg", ".tga"),
)


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


def images_below(folder: Path) -> list[str]:
    """The images of a folder and of those in it, also where these are links, as paths below it, sorted.

    Images of other formats are named in the log.
    """
    found: list[str] = []
    others: Counter[str] = Counter()
    for above, folders, files in os.walk(folder, followlinks=True):
        below = Path(above).relative_to(folder)
        if any((folder / parent).samefile(above) for parent in below.parents if parent != below):
            folders.clear()  # a link to a folder above it, which would be followed for ever
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


def predicted_images(folder: Path) -> list[str]:
    """The images of the folder that is named as `predict_folder`, with those of the folders in it, by `images_below`.

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
    """The lines of a text file that are not blank, without blanks around them; errors as of `read_text`."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def printable(name: str) -> str:
    """A file name for people and text files: bytes that are no UTF-8 become question marks in a black square."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def unique_stems(paths: Sequence[str], *, ending: str = "") -> list[str]:
    """A name for what is written about each of some images: their file names without endings, each once.

    Only the last ending is taken away, so `frame.0001.jpg` gives `frame.0001`. Where two would be alike, also on file
    systems that do not tell capitals apart, the names have the folders that the images are in, or the endings, or
    else a number. Very long ones are cut, and end in a digest of the path.

    Args:
        paths: Of the images below a folder.
        ending: Also taken away, of what is left.
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
    """A path without its last ending; a name of nothing but points and an ending keeps that."""
    stem, _ = os.path.splitext(path)  # noqa: PTH122
    return path.lstrip("./") if not PurePosixPath(stem).name.strip(".") else stem


def _shortened(name: str, path: str) -> str:
    encoded = name.encode()
    if len(encoded) <= _LONGEST_STEM:
        return name
    return f"{encoded[: _LONGEST_STEM - 9].decode(errors='ignore')}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


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


def first_repeated(values: Sequence[Any]) -> Any:
    """The first of some values that was there before, or None."""
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None

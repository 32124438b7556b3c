"""Results of a prediction, written as they come: memory does not grow with them, and nothing is lost when it stops."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from lightning_attn.io import naming, write_file

__all__ = ["PartialResults", "Results", "differing_origin", "write_json_list"]

_ORIGIN = "origin.json"


class PartialResults:
    """A line of JSON for each result, in a file of each rank until all are done.

    A prediction that is broken off leaves these files, and beside them what it was of.

    Args:
        folder: Where the files of all ranks are; it is made.
        rank: Number of this rank.
        origin: What the results depend on, as plain values by the words that a message has for them.
    """

    def __init__(self, folder: Path, rank: int, origin: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.origin = origin
        self._path = folder / f"rank-{rank}.jsonl"
        self._file: TextIO | None = None

    def add(self, record: dict[str, Any]) -> None:
        """Writes a result, which has an `id`."""
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            _drop_broken_line(self._path)
            if self.origin is not None and not (self.folder / _ORIGIN).exists():
                # Ranks write the same; one replaces the file of the other.
                write_file(
                    self.folder / _ORIGIN, lambda file: file.write(json.dumps(self.origin).encode()), replace=True
                )
            self._file = self._path.open("a", encoding="utf-8")
        with naming(self._path):
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def flush(self) -> None:
        """Hands what was added to the system.

        Raises:
            FileNotFoundError: If somebody has removed the file meanwhile.
        """
        if self._file is not None:
            with naming(self._path):
                self._file.flush()
            if not self._path.exists():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._path))

    def close(self) -> None:
        """Ends writing; every rank does this before one reads the files."""
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None

    def results(self) -> "Results":
        """What all ranks have written."""
        return Results(sorted(self.folder.glob("rank-*.jsonl")) if self.folder.is_dir() else [])

    def remove(self) -> None:
        """Removes the files of all ranks, whose contents are elsewhere by now."""
        for path in self.folder.glob("rank-*.jsonl") if self.folder.is_dir() else ():
            path.unlink()
        if self.folder.is_dir():
            (self.folder / _ORIGIN).unlink(missing_ok=True)
            self.folder.rmdir()


def differing_origin(folder: Path, origin: dict[str, Any]) -> list[str]:
    """What results that were left in a folder depend on, and is another now; by the words for it."""
    try:
        stored = json.loads((folder / _ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ["something that is not noted"]
    if not isinstance(stored, dict):
        return ["something that is not noted"]
    now = json.loads(json.dumps(origin))
    return [word for word in now if stored.get(word) != now[word]]


def _drop_broken_line(path: Path) -> None:
    """Cuts off what follows the last line end: a process was killed while it wrote that."""
    if path.is_file():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


class Results:
    """The results in the files of all ranks, each once and in the order of their ids; only places are in memory.

    A last line that is not whole, as a kill leaves it, does not count.
    """

    def __init__(self, parts: list[Path]) -> None:
        self._places: dict[int, tuple[Path, int]] = {}
        for path in parts:
            with path.open("rb") as file:
                place = 0
                for line in file:
                    if line.endswith(b"\n"):
                        self._places.setdefault(json.loads(line)["id"], (path, place))
                    place += len(line)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        files: dict[Path, BinaryIO] = {}
        try:
            for _, (path, place) in sorted(self._places.items()):
                file = files.get(path) or files.setdefault(path, path.open("rb"))
                file.seek(place)
                yield json.loads(file.readline())
        finally:
            for file in files.values():
                file.close()


def write_json_list(file: BinaryIO, values: Iterator[Any]) -> None:
    """A JSON list with one value in a line."""
    file.write(b"[")
    for number, value in enumerate(values):
        file.write(b",\n" if number else b"\n")
        file.write(json.dumps(value, ensure_ascii=False).encode())
    file.write(b"\n]\n")

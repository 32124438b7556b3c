"""Incremental files of a prediction's results, which bound memory and survive an interruption."""

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
    """A line of JSON for each result, in one file per rank until the prediction is complete.

    An interrupted prediction leaves these files, with a file of the inputs that the results depend on.

    Args:
        folder: The folder of the files of all ranks, created if necessary.
        rank: Index of this rank.
        origin: The inputs that the results depend on, as plain values by a word for messages.
    """

    def __init__(self, folder: Path, rank: int, origin: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.origin = origin
        self._path = folder / f"rank-{rank}.jsonl"
        self._file: TextIO | None = None

    def add(self, record: dict[str, Any]) -> None:
        """Appends a result, which has an `id`."""
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            _drop_incomplete_line(self._path)
            if self.origin is not None and not (self.folder / _ORIGIN).exists():
                # All ranks write the same contents and may replace each other's file.
                write_file(
                    self.folder / _ORIGIN, lambda file: file.write(json.dumps(self.origin).encode()), replace=True
                )
            self._file = self._path.open("a", encoding="utf-8")
        with naming(self._path):
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def flush(self) -> None:
        """Flushes the results to the file.

        Raises:
            FileNotFoundError: If the file was removed in the meantime.
        """
        if self._file is not None:
            with naming(self._path):
                self._file.flush()
            if not self._path.exists():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._path))

    def close(self) -> None:
        """Closes the file; every rank must do this before one reads the files."""
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None

    def results(self) -> "Results":
        """The results of all ranks."""
        return Results(sorted(self.folder.glob("rank-*.jsonl")) if self.folder.is_dir() else [])

    def remove(self) -> None:
        """Removes the files of all ranks, after their contents were written to the final files."""
        for path in self.folder.glob("rank-*.jsonl") if self.folder.is_dir() else ():
            path.unlink()
        if self.folder.is_dir():
            (self.folder / _ORIGIN).unlink(missing_ok=True)
            self.folder.rmdir()


def differing_origin(folder: Path, origin: dict[str, Any]) -> list[str]:
    """The words of `origin` whose values differ from those of the partial results in a folder."""
    try:
        stored = json.loads((folder / _ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ["unknown origin"]
    if not isinstance(stored, dict):
        return ["unknown origin"]
    current = json.loads(json.dumps(origin))
    return [word for word in current if stored.get(word) != current[word]]


def _drop_incomplete_line(path: Path) -> None:
    """Truncates a file after its last line break: a killed process may leave an incomplete line."""
    if path.is_file():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


class Results:
    """The results in the files of all ranks, each once and in the order of their ids; only offsets are in memory.

    An incomplete last line, left by a killed process, is ignored.
    """

    def __init__(self, parts: list[Path]) -> None:
        self._offsets: dict[int, tuple[Path, int]] = {}
        for path in parts:
            with path.open("rb") as file:
                offset = 0
                for line in file:
                    if line.endswith(b"\n"):
                        self._offsets.setdefault(json.loads(line)["id"], (path, offset))
                    offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        files: dict[Path, BinaryIO] = {}
        try:
            for _, (path, offset) in sorted(self._offsets.items()):
                file = files.get(path) or files.setdefault(path, path.open("rb"))
                file.seek(offset)
                yield json.loads(file.readline())
        finally:
            for file in files.values():
                file.close()


def write_json_list(file: BinaryIO, values: Iterator[Any]) -> None:
    """Writes a JSON list with one value per line."""
    file.write(b"[")
    for number, value in enumerate(values):
        file.write(b",\n" if number else b"\n")
        file.write(json.dumps(value, ensure_ascii=False).encode())
    file.write(b"\n]\n")

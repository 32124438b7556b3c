"""Reading of files that runs leave: any may be missing, half-written, of an older form, or no file at all."""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_attn.io import oldest_first

__all__ = ["array", "finite", "newest", "read_columns", "read_head", "read_json", "read_tail", "text"]

_MOST_BYTES = 64 * 2**20  # of a JSON file: what is larger is not ours
_LARGEST_STEP = 2**53
_MOST_ROWS = 20_000  # of a CSV file; of a longer one, rows at even distances


def newest(folder: Path, pattern: str) -> Path | None:
    """The file of a pattern that was written last; None if there is none."""
    try:
        files = [path for path in oldest_first(folder, pattern) if path.is_file()]
    except OSError:  # such as a link that leads nowhere
        return None
    return files[-1] if files else None


def read_json(path: Path | None, damages: list[str]) -> Any:
    """What a JSON file holds; None if it is missing, or cannot be read, which is added to `damages`."""
    if path is None or not path.is_file():
        return None
    try:
        if path.stat().st_size > _MOST_BYTES:
            damages.append(f"{path.name} is too large ({path.stat().st_size / 2**20:.0f} MiB)")
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        damages.append(f"{path.name} cannot be read ({type(error).__name__})")
        return None


def finite(value: Any) -> float | None:
    """A number as such; None for anything else, and for what is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def array(value: Any) -> npt.NDArray[np.float64] | None:
    """Lists of numbers, perhaps nested, with NaN for null and for what is not finite; None if they are not that."""
    try:
        found = np.array(value, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        return None
    found[~np.isfinite(found)] = np.nan
    return found


def text(value: Any, longest: int = 400) -> str:
    """A string, cut to a length; empty for anything else."""
    if not isinstance(value, str):
        return ""
    return value if len(value) <= longest else value[: longest - 1] + "…"


def read_head(path: Path, size: int = 8192) -> str:
    """The beginning of a text file; empty if there is none."""
    return _part(path, 0, size)


def read_tail(path: Path, size: int = 8192) -> str:
    """The end of a text file; empty if there is none."""
    try:
        return _part(path, max(0, path.stat().st_size - size), size)
    except OSError:
        return ""


def _part(path: Path, start: int, size: int) -> str:
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size).decode("utf-8", errors="replace")
    except OSError:
        return ""


def read_columns(path: Path, wanted: Sequence[str], damages: list[str]) -> dict[str, list[tuple[int, float]]]:
    """Columns of a run's `metrics.csv` by their names, each as steps and values; rows without a value are left out."""
    found: dict[str, dict[int, float]] = {name: {} for name in wanted}
    if not path.is_file():
        return {}
    try:
        for row in _rows(path, wanted):
            step = int(row["step"])
            if abs(step) > _LARGEST_STEP:
                raise ValueError("too large")
            for name in wanted:
                if value := row.get(name):
                    number = float(value)
                    if math.isfinite(number):
                        found[name][step] = number
    except (OSError, ValueError, KeyError, csv.Error) as error:
        damages.append(f"{path.name} cannot be read in full ({type(error).__name__})")
    return {name: sorted(values.items()) for name, values in found.items() if values}


def _rows(path: Path, wanted: Sequence[str]) -> Iterator[Mapping[str, str]]:
    """Complete rows, of the named columns alone."""
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError("too large")
    content = path.read_text(encoding="utf-8")
    lines = content[: content.rfind("\n") + 1].splitlines()
    names = next(csv.reader(lines[:1]), [])
    places = {name: names.index(name) for name in ("step", *wanted) if name in names}
    rows = lines[1:]
    if len(rows) > _MOST_ROWS:
        # Rows of a validation are rare, and must not be among those that are skipped.
        rare = [places[name] for name in wanted if name in places and not name.startswith("train/")]
        distance = len(rows) // _MOST_ROWS + 1
        rows = [
            row
            for number, row in enumerate(rows)
            if number % distance == 0 or any(row.split(",", place + 1)[place : place + 1] != [""] for place in rare)
        ]
    for values in csv.reader(rows):
        if len(values) == len(names):
            yield {name: values[place] for name, place in places.items()}

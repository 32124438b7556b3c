"""Writing results so that nothing is half-written and nothing is overwritten."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def unused_path(path: Path) -> Path:
    """`path`, or `<stem>-2<suffix>`, `-3` and so on if it is taken."""
    candidate, number = path, 2
    while candidate.exists():
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return candidate


def write_text(path: Path, text: str) -> Path:
    """Writes a new UTF-8 file whole or not at all; returns its path, which is another if `path` is taken.

    Raises:
        OSError: If the folder cannot be written to or is full; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        path = unused_path(path)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_json(path: Path, value: Any) -> Path:
    """Writes a new JSON file; as `write_text`."""
    return write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")

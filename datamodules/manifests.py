"""Manifests: small JSON files that say which files of a folder this project has written, and that they are whole."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.file_errors import naming


def read_manifest(path: Path) -> dict[str, Any] | None:
    """What a manifest says; nothing (`{}`) if it is damaged, None if there is none.

    A damaged one marks the folder as ours all the same: everything is then looked at again.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def replace_manifest(path: Path, content: Mapping[str, Any], scratch: Path | None = None) -> None:
    """Writes a manifest whole or not at all.

    Args:
        path: The manifest.
        content: What it says.
        scratch: Folder on the same disk where it is written first; that of `path` if None.
    """
    temporary = path.with_name(f".{path.name}.part") if scratch is None else scratch / path.name
    try:
        with naming(path):
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

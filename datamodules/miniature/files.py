"""How the drawn miniature image sets come to lie in their folders: whole, only once, and over nothing of others."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_attn.errors import ExistingFileError, InputError
from lightning_attn.io import naming, read_manifest, replace_manifest

__all__ = ["write_set"]


def write_set(
    root: Path,
    counts: Mapping[str, int],
    draw: Callable[[Path, Mapping[str, int]], None],
    *,
    parts: Sequence[str],
    official: Sequence[str],
    pictures: Sequence[str],
    manifest_name: str,
    drawing_version: int,
) -> None:
    """Draws a set in a folder of its own and then moves it to where it belongs.

    Nothing is done if the same set is already there. A set of other counts, of another drawing or of other library
    releases is replaced as a whole: while files are being exchanged, the manifest says that it is incomplete. Several
    processes may do this at the same time, as they all write the same.

    Args:
        root: Folder of the set; made if it is missing.
        counts: Number of pictures of each part.
        draw: Writes the set into the folder that it is given, with those counts.
        parts: The parts that `counts` has to name.
        official: Files and folders below `root` that belong to somebody else if they are there without a manifest.
        pictures: Patterns below `root` of the names that a set of any counts has; what matches and is not in this set
            is removed.
        manifest_name: Name of the manifest in `root`.
        drawing_version: A set on disk of another version is drawn anew.

    Raises:
        ValueError: `counts` lacks a part, names an unknown one or asks for less than one picture.
        FileExistsError: `root` holds files of somebody else; they are left alone.
    """
    if set(counts) != set(parts) or min(counts.values()) < 1:
        raise InputError(f"counts={dict(counts)}: give at least 1 for each of {', '.join(parts)}.")
    settings = {
        "drawing": drawing_version,
        "counts": {part: counts[part] for part in parts},
        **{library: version(library) for library in ("numpy", "pillow", "scikit-image")},
    }
    # In this order: another process that is drawing writes its manifest before the first of these.
    present = [name for name in official if (root / name).exists()]
    manifest = read_manifest(root / manifest_name)
    if manifest is not None and manifest.get("settings") == settings and _is_whole(root, manifest):
        return
    if manifest is None and present:
        raise ExistingFileError(
            f"{root} already holds {', '.join(present)}, and no {manifest_name} that marks them as the miniature set. "
            "They are left as they are: give the miniature set a folder of its own, or remove them."
        )
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".miniature-", dir=root))
    try:
        with naming(root):
            draw(scratch, counts)
        hashes = {
            path.relative_to(scratch).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(scratch.rglob("*.*"))
        }
        replace_manifest(root / manifest_name, {"settings": settings}, scratch)
        for name in hashes:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).replace(root / name)
        for pattern in pictures:  # those of an earlier, larger set
            for path in root.glob(pattern):
                if path.relative_to(root).as_posix() not in hashes:
                    path.unlink(missing_ok=True)
        replace_manifest(root / manifest_name, {"settings": settings, "sha256": hashes}, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_whole(root: Path, manifest: Mapping[str, Any]) -> bool:
    hashes = manifest.get("sha256")
    if not isinstance(hashes, dict):
        return False
    return all(
        (root / name).is_file() and hashlib.sha256((root / name).read_bytes()).hexdigest() == expected
        for name, expected in hashes.items()
    )

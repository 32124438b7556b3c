"""Generated data sets on disk: written atomically, only once, and never over foreign files."""

import hashlib
import importlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lightning_attn.errors import ExistingFileError, InputError, MissingPackageError
from lightning_attn.io import naming, read_manifest, write_json

__all__ = ["check_counts", "coco_image", "write_coco_part", "write_generated"]

_MODULES = {"pillow": "PIL", "scikit-image": "skimage"}  # of packages that are called otherwise


def check_counts(name: str, counts: Mapping[str, int], parts: Mapping[str, int]) -> None:
    """Refuses numbers of samples that do not name every part, or are below 1.

    Args:
        name: Name of the argument.
        counts: Samples of each part.
        parts: The parts, with their default numbers.

    Raises:
        ValueError: If a part is missing or unknown, or a number is below 1.
    """
    if set(counts) != set(parts) or min(counts.values()) < 1:
        raise InputError(f"{name}={dict(counts)}: give at least 1 for each of {', '.join(parts)}.")


def write_generated(
    root: Path,
    write: Callable[[Path], None],
    *,
    settings: Mapping[str, Any],
    libraries: Sequence[str],
    owned: Sequence[str],
    stale: Sequence[str] = (),
    manifest_name: str,
    what: str,
) -> None:
    """Generates a data set in a temporary folder and then moves its files into `root`.

    Nothing is done if the same set exists. A set of other settings or library releases is replaced as a
    whole: while files are being exchanged, the manifest marks it as incomplete. Several processes may do this at
    the same time, as they all write the same.

    Args:
        root: Folder of the set; created if it is missing.
        write: Writes the set into the folder that it is given.
        settings: What the content depends on.
        libraries: Packages whose releases it depends on too.
        owned: Files and folders in `root` that are foreign if they exist without a manifest.
        stale: Patterns of files in `root` that an earlier set of other settings may have left; they are removed.
        manifest_name: Name of the manifest in `root`.
        what: Its name in messages.

    Raises:
        FileExistsError: `root` holds foreign files; they are not changed.
        ImportError: One of the libraries is not installed.
    """
    try:
        settings = {**settings, **{library: version(library) for library in libraries}}
    except PackageNotFoundError as error:
        raise _missing(what, error.name) from error
    # In this order: another process that generates the set writes its manifest before the first of its files.
    present = [name for name in owned if (root / name).exists()]
    manifest = read_manifest(root / manifest_name)
    if manifest is not None and manifest.get("settings") == settings and _is_complete(root, manifest):
        return
    if manifest is None and present:
        raise ExistingFileError(
            f"{root} already holds {', '.join(present)}, and no {manifest_name} that marks them as the {what}. They "
            f"are not changed: give the {what} a folder of its own, or remove them."
        )
    for library in libraries:
        try:
            importlib.import_module(_MODULES.get(library, library))
        except ImportError as error:
            raise _missing(what, library) from error
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".miniature-", dir=root))
    try:
        with naming(root):
            write(scratch)
        hashes = {
            path.relative_to(scratch).as_posix(): _sha256(path) for path in sorted(scratch.rglob("*")) if path.is_file()
        }
        write_json(root / manifest_name, {"settings": settings}, replace=True)
        for name in hashes:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).replace(root / name)
        for pattern in stale:
            for path in root.glob(pattern):
                if path.relative_to(root).as_posix() not in hashes:
                    path.unlink(missing_ok=True)
        write_json(root / manifest_name, {"settings": settings, "sha256": hashes}, replace=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def coco_image(folder: Path, part: str, image_id: int, pixels: npt.NDArray[np.uint8]) -> dict[str, Any]:
    """Writes a picture of a set in COCO's layout.

    Args:
        folder: Root of the set.
        part: "train", "val" or "test".
        image_id: Its number.
        pixels: RGB, `[H, W, 3]`.

    Returns:
        Its entry in the annotations.
    """
    name = f"{image_id:012d}.png"
    (folder / f"{part}2017").mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{part}2017" / name, compress_level=1)
    height, width = pixels.shape[:2]
    return {"id": image_id, "file_name": name, "height": height, "width": width}


def write_coco_part(folder: Path, part: str, content: Mapping[str, Any]) -> None:
    """Writes the annotations of a part of a set in COCO's layout."""
    (folder / "annotations").mkdir(exist_ok=True)
    path = folder / "annotations" / f"instances_{part}2017.json"
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8", newline="\n")


def _missing(what: str, library: str) -> MissingPackageError:
    return MissingPackageError(
        f"The {what} is generated with {library}, which is not installed: pip install "
        '"generalized-attention[miniature]"'
    )


def _is_complete(root: Path, manifest: Mapping[str, Any]) -> bool:
    hashes = manifest.get("sha256")
    return isinstance(hashes, dict) and all(
        (root / name).is_file() and _sha256(root / name) == expected for name, expected in hashes.items()
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

"""Atomic writing of files, without overwriting by default, and reading of manifests."""

import contextlib
import csv
import difflib
import errno
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lightning_attn.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # slow to import

# Suffix of temporary files, which remain only if the process is killed.
_PART = ".part"


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Adds a file's name to errors of writing it that the system raises without one, such as for a full disk.

    Raises:
        OSError: The error raised inside, of the same kind, with `filename`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def unused_path(path: Path) -> Path:
    """`path`, or `<stem>-2<suffix>`, `-3` and so on if it exists."""
    candidate, number = path, 2
    while os.path.lexists(candidate):
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return candidate


def write_file(path: Path, write: Callable[[BinaryIO], object], *, replace: bool = False) -> Path:
    """Writes a file atomically.

    Args:
        path: The file; missing folders are created.
        write: Writes the contents to the open file.
        replace: Replace an existing file; otherwise it stays, and the new file gets an `unused_path`.

    Returns:
        The path of the written file.

    Raises:
        OSError: If the folder cannot be written to or is full; no partial file remains, and `filename` is the path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with naming(path), os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        path = _replace(Path(temporary), path) if replace else _rename_unused(Path(temporary), path)
        sync(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _replace(temporary: Path, path: Path) -> Path:
    temporary.replace(path)
    return path


def _rename_unused(temporary: Path, path: Path) -> Path:
    """Renames a file to an unused path, without races between processes."""
    while True:
        candidate = unused_path(path)
        try:
            os.link(temporary, candidate)
        except FileExistsError:
            continue
        except OSError:  # a file system without hard links
            return _replace(temporary, candidate)
        temporary.unlink()
        return candidate


def sync(path: Path) -> None:
    """Waits until a file's contents, or a folder's entries, are on the disk (fsync); not on Windows."""
    if sys.platform == "win32":  # which opens no folder, and syncs no file that is open for reading only
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def written_together(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder, whose files are moved to `folder` on success, and removed on an error.

    Raises:
        FileExistsError: If `folder` then has a file of the same name, which is not replaced.
        OSError: If a file cannot be written; no file remains.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".", suffix=_PART))
    moved: list[Path] = []
    try:
        yield scratch
        for path in sorted(scratch.iterdir()):
            target = folder / path.name
            if target.exists():
                raise FileExistsError(errno.EEXIST, "already exists and is not overwritten", str(target))
            moved.append(path.rename(target))
        sync(folder)
    except BaseException as error:
        for path in moved:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and str(error.filename).startswith(f"{scratch}/"):
            target = folder / Path(str(error.filename)).relative_to(scratch)
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def remove_parts(folder: Path) -> None:
    """Removes temporary files that killed processes have left in a folder."""
    for path in folder.glob(f".*{_PART}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, replace: bool = False) -> Path:
    """Writes a text file in UTF-8, with the line breaks of `text`; as `write_file`.

    Undecodable bytes of file names become question marks instead of an error.
    """
    return write_file(path, lambda file: file.write(text.encode("utf-8", errors="replace")), replace=replace)


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Writes a new CSV file; as `write_text`."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    return write_text(path, text.getvalue())


def write_figure(path: Path, figure: "Figure") -> Path:
    """Writes a figure to a new file in the format of its suffix; as `write_file`, without `replace`.

    Raises:
        ValueError: If the suffix is not a format of figures.
        OSError: If it cannot be written; no partial file remains.
    """
    kind = path.suffix[1:].lower()
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise InputError(f"output: {path} has no suffix of a figure format; use one of .{', .'.join(sorted(known))}.")
    return write_file(path, lambda file: figure.savefig(file, format=kind))


def write_json(path: Path, value: Any, *, replace: bool = False) -> Path:
    """Writes a JSON file; as `write_text`."""
    return write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", replace=replace)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The contents of a manifest; `{}` if it is damaged, None if it does not exist.

    A damaged one still marks the folder as ours: every file is then checked again.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def oldest_first(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that match a pattern, by when they were written."""
    return sorted(folder.glob(pattern), key=lambda one: one.stat().st_mtime_ns)


def missing_checkpoint(path: Path) -> str:
    """What to say of a checkpoint that is not there; nothing if it is."""
    if path.is_file():
        return ""
    if path.is_dir():
        return f"{path} is a folder. {neighbours(path / '-', '*.ckpt')} Give a file."
    why = " best.ckpt is written after a validation." if path.name == "best.ckpt" and path.parent.is_dir() else ""
    return f"There is no checkpoint at {path}. {neighbours(path, '*.ckpt')}{why}"


def neighbours(path: Path, pattern: str) -> str:
    """Which files exist beside one that is missing, and which of them may be meant."""
    folder = path.parent
    if not folder.is_dir():
        return f"There is no folder {folder}."
    called = "The current folder" if folder == Path() else str(folder)
    names = sorted(one.name for one in folder.glob(pattern))
    if not names:
        return f"{called} has no {pattern}."
    # By the name alone: all have the same ending.
    stems = {Path(name).stem: name for name in names}
    close = difflib.get_close_matches(path.stem, stems, n=1, cutoff=0.6)
    hint = f" Did you mean {folder / stems[close[0]]}?" if close else ""
    return f"{called} holds {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}.{hint}"

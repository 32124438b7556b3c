"""The folder that holds everything a run writes."""

import errno
import functools
import glob
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_only

import lightning_attn
from lightning_attn import locks
from lightning_attn.errors import ExistingFileError, NotAFolderError, UnusableFileError, UserError
from lightning_attn.io import remove_parts, write_json
from lightning_attn.training.code_version import code_version

MARKER = "run.json"
_VARIABLE = "LIGHTNING_ATTN_RUN_DIRECTORY"
_LOCK = ".lock"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system
_claimed: list[Path] = []
_locks: dict[Path, int] = {}  # descriptors of those that this process holds


class RunInUseError(UserError, BlockingIOError):
    """Another process trains in a run directory."""


def claim(root: Path, task_name: str, name: str) -> Path:
    """Makes a new run directory `root/task_name/name`, or `name-2` and so on if that is taken.

    Only rank 0 makes one; processes that it starts find it by the environment, and other ranks, which write no files,
    get the name that it would have.

    Raises:
        OSError: If the folder cannot be made.
    """
    wanted = root / task_name / name
    if not is_rank_zero():
        return Path(os.environ.get(_VARIABLE, str(wanted)))
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotAFolderError(
            f"run.root: {wanted.parent} cannot be a folder, since a part of its path is a file. Give a folder "
            "(--run.root FOLDER)."
        ) from error
    path, number = wanted, 1
    while True:
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
            path = wanted.with_name(f"{name}-{number}")
        else:
            break
    os.environ[_VARIABLE] = str(path)
    _claimed.append(path)
    _lock(path)
    write_json(path / MARKER, origin() | {"name": name, "number": number, "command": shlex.join(sys.argv)})
    return path


def newest(root: Path, task_name: str, name: str, file: str) -> Path | None:
    """The file of that name which was written last in `root/task_name/name`, `name-2` and so on, if there is one."""
    files = [folder / file for folder in _of_name(root, task_name, name) if (folder / file).is_file()]
    return max(files, key=lambda path: path.stat().st_mtime_ns, default=None)


def newest_with(root: Path, task_name: str, name: str, pattern: str) -> Path | None:
    """The run directory of that name, or with a number behind it, in which something was written last, if any."""
    folders = _of_name(root, task_name, name)
    found = [(path.stat().st_mtime_ns, folder) for folder in folders for path in folder.glob(pattern)]
    return max(found)[1] if found else None


def _of_name(root: Path, task_name: str, name: str) -> list[Path]:
    """The run directories `name`, `name-2` and so on that are there."""
    return [folder for folder in (root / task_name).glob(f"{glob.escape(name)}*") if is_named(folder, name)]


def is_named(folder: Path, name: str) -> bool:
    """Whether a run directory is of a name, perhaps with a number behind it because that was taken.

    `run.json` says so: `seed-2` may be the second run of `seed` or the first of `seed-2`. A directory that was renamed
    has the name that it has now.
    """
    try:
        stored = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        given, number = stored["name"], stored["number"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return folder.name == name
    is_renamed = folder.name != (given if number == 1 else f"{given}-{number}")
    return name == (folder.name if is_renamed else given)


def reopen(path: Path) -> Path:
    """Takes the directory of a run that is resumed for this process.

    Raises:
        RunInUseError: If another process trains in it.
    """
    if is_rank_zero():
        require_own_entries(path)
        _lock(path)
        os.environ[_VARIABLE] = str(path)
        remove_parts(path)
    return path


def require_own_entries(path: Path, *, reading: bool = False) -> None:
    """Refuses a run directory that holds a link to elsewhere, or what is neither a file nor a folder, such as a pipe.

    Args:
        path: The directory.
        reading: Whether files in it are only to be read.

    Raises:
        FileExistsError: Names what is in it.
    """
    if reading:
        why = "and files of a run are read from its own directory only. Remove it, or put a copy in its place."
    else:
        why = "and results would be written there. Remove it, or give another place: --run.root FOLDER."
    root = path.resolve()
    for one in sorted(path.iterdir()):
        what = ""
        if one.is_symlink() and not (one.exists() and one.resolve().is_relative_to(root)):
            what = f"is a link out of the directory (to {one.readlink()})"
        elif not (one.is_file() or one.is_dir()):
            what = "is neither a file nor a folder"
        if what:
            raise ExistingFileError(f"{path}: {one.name} in it {what}, {why}")


def require_writable(path: Path) -> Path:
    """The directory, if results can be written into it.

    Raises:
        PermissionError: If not.
        FileExistsError: If something in it leads elsewhere.
    """
    if not is_rank_zero():
        return path
    require_own_entries(path)
    if not os.access(path, os.W_OK):
        raise UnusableFileError(
            f"{path} cannot be written to, and is where results go: beside the checkpoint. Give another place: "
            "--run.root FOLDER."
        )
    return path


def _lock(path: Path) -> None:
    """Keeps other processes out of a run directory until this one ends, however it ends."""
    if _holds(path / _LOCK):
        return
    try:
        descriptor = locks.take(path / _LOCK)
    except OSError as error:
        if error.errno in _WITHOUT_LOCKS:
            return
        raise
    if descriptor is None:
        raise RunInUseError(
            f"Another process is training in {path}. Wait for it or end it, or begin a new run, without --ckpt_path."
        )
    _locks[path.resolve()] = descriptor


def _holds(file: Path) -> bool:
    """Whether this process has this lock, also of a directory that was moved since."""
    return file.is_file() and any(os.path.samestat(os.fstat(held), file.stat()) for held in _locks.values())


def _unlock(path: Path) -> None:
    """Lets go of a run directory, if this process holds it."""
    descriptor = _locks.pop(path.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


def _forget_locks() -> None:
    """Leaves the locks to the process that took them: those that it forks, such as workers, may outlive it."""
    while _locks:
        os.close(_locks.popitem()[1])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def is_rank_zero() -> bool:
    """Whether this process is the one that writes files; known from the environment before anything is started."""
    return getattr(rank_zero_only, "rank", 0) in (0, None)


def discard_if_unused() -> None:
    """Removes directories that this process claimed and that hold no result, such as after a mistake in the data."""
    while _claimed:
        path = _claimed.pop()
        files = {file.name for file in path.iterdir()} if path.is_dir() else set()
        if files and all(name.startswith((MARKER, _LOCK, "config_", "events.", "hparams.")) for name in files):
            _unlock(path)  # Windows removes no file that is open
            shutil.rmtree(path)
    os.environ.pop(_VARIABLE, None)


def owner(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint lies in, or None if it has been moved out of one."""
    return checkpoint.parent if (checkpoint.parent / MARKER).is_file() else None


@functools.cache
def origin() -> dict[str, Any]:
    """Versions and the state of the source tree, so that a run can be traced back."""
    return {
        "lightning_attn": lightning_attn.__version__,
        "torch": metadata.version("torch"),
        "pytorch_lightning": metadata.version("pytorch-lightning"),
        "python": platform.python_version(),
        "code": code_version(),
        "git": _git("describe", "--always", "--dirty", "--abbrev=12"),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None

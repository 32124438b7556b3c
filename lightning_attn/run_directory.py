"""The folder that holds everything a run leaves behind."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_only

import lightning_attn
from lightning_attn.files import unused_path, write_json

MARKER = "run.json"
_VARIABLE = "LIGHTNING_ATTN_RUN_DIRECTORY"
_claimed: list[Path] = []


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
    wanted.parent.mkdir(parents=True, exist_ok=True)
    while True:
        path = unused_path(wanted)
        try:
            path.mkdir()
        except FileExistsError:  # another run was quicker
            continue
        break
    os.environ[_VARIABLE] = str(path)
    _claimed.append(path)
    write_json(path / MARKER, _origin())
    return path


def is_rank_zero() -> bool:
    """Whether this process is the one that writes files; known from the environment before anything is started."""
    return getattr(rank_zero_only, "rank", 0) in (0, None)


def discard_if_unused() -> None:
    """Removes directories that this process claimed and that hold no result, such as after a mistake in the data."""
    while _claimed:
        path = _claimed.pop()
        files = {file.name for file in path.iterdir()} if path.is_dir() else set()
        if files and all(name.startswith((MARKER, "config_", "events.")) for name in files):
            shutil.rmtree(path)
    os.environ.pop(_VARIABLE, None)


def owner(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint lies in, or None if it has been moved out of one."""
    return checkpoint.parent if (checkpoint.parent / MARKER).is_file() else None


def _origin() -> dict[str, Any]:
    """Versions and the state of the source tree, so that a run can be traced back."""
    return {
        "lightning_attn": lightning_attn.__version__,
        "torch": metadata.version("torch"),
        "pytorch_lightning": metadata.version("pytorch-lightning"),
        "python": platform.python_version(),
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

"""What the machine offers: its processor and cores, and a folder of the user's cache."""

import contextlib
import os
import platform
from pathlib import Path

from lightning_attn.errors import NotAFolderError

__all__ = ["available_cores", "processor_name", "user_cache_folder"]


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """The model of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def user_cache_folder() -> Path:
    """`$XDG_CACHE_HOME/lightning_attn`, by default `~/.cache/lightning_attn`.

    Raises:
        NotADirectoryError: If neither the variable is set nor the user has a home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "lightning_attn"
    except RuntimeError as error:
        raise NotAFolderError(
            "cache_dir: this user has no home directory, where the cache would be. Set XDG_CACHE_HOME or HOME to a "
            "folder, or give one (--data.cache_dir FOLDER for text, --data.root FOLDER for miniature data)."
        ) from error

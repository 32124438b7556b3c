"""Whether another process of this host is running."""

import contextlib
import os
from pathlib import Path

__all__ = ["is_running", "start_of"]


def is_running(process: int, start: str = "") -> bool:
    """Whether a process is running.

    Args:
        process: Its number.
        start: What `start_of` returned for it, as the system uses numbers again; empty for any process of that number.
    """
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return not start or start == start_of(process)


def start_of(process: int) -> str:
    """When a process was started, in the system's ticks; empty where that is unknown."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""

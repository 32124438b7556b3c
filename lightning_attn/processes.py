"""Whether another process of this host is running, and the signals that ask one to end."""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

__all__ = ["STOP_SIGNALS", "is_running", "start_of", "stop_signals"]

# Windows has no SIGHUP: of a terminal that was closed.
STOP_SIGNALS: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)


def stop_signals() -> list[int]:
    """Those of STOP_SIGNALS that this process heeds: nohup has it ignore SIGHUP."""
    always = (signal.SIGTERM, signal.SIGINT)
    return [one for one in STOP_SIGNALS if one in always or signal.getsignal(one) != signal.SIG_IGN]


def is_running(process: int, start: str = "") -> bool:
    """Whether a process is running.

    Args:
        process: Its number.
        start: What `start_of` returned for it, as the system uses numbers again; empty for any process of that number.
    """
    if sys.platform == "win32":
        return _is_running_on_windows(process)
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


if sys.platform == "win32":

    def _is_running_on_windows(process: int) -> bool:
        """By a wait of no time: there os.kill sends no signal but ends a process, whatever the number."""
        synchronize, timed_out = 0x00100000, 0x102  # of OpenProcess; WAIT_TIMEOUT
        kernel = ctypes.windll.kernel32
        handle = kernel.OpenProcess(synchronize, False, process)
        if not handle:
            return False
        try:
            return bool(kernel.WaitForSingleObject(handle, 0) == timed_out)
        finally:
            kernel.CloseHandle(handle)

"""Locks on files, kept by the operating system: they end with the process that holds them, however it ends."""

import errno
import os
import time
from pathlib import Path

import filelock

__all__ = ["is_held", "take"]

_PAUSE = 0.025  # seconds between tries
_LOOKS, _LOOK_PAUSE = 5, 0.004  # others look at a lock by taking it for some microseconds
# Neither a link nor a pipe of others is followed or waited for; Windows has neither flag.
_NO_OTHER_FILE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def take(path: Path, seconds: float = 1.0) -> int | None:
    """Takes a lock for this process.

    Args:
        path: The file of the lock, which is made if it is not there, and stays.
        seconds: How long to try; others may only be looking at it.

    Returns:
        A file descriptor, which no program inherits unless it is passed on: the lock is held until that is closed here
        and, where it was passed on, there (Windows passes none on). None if the lock is taken.

    Raises:
        OSError: If the file cannot be written to, or its file system has no locks, with `filename`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_OTHER_FILE, 0o644)
    try:
        until = time.monotonic() + seconds
        while not _try(descriptor, path):
            if time.monotonic() > until:
                os.close(descriptor)
                return None
            time.sleep(_PAUSE)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_held(path: Path) -> bool:
    """Whether a process holds a lock.

    Nobody who takes it meanwhile is refused, since `take` tries again. Where this process may not write, the file
    system has to allow a lock on a file that is only read; network file systems do not, and the answer is no.
    """
    if not path.is_file() or path.is_symlink():
        return False
    try:
        try:
            descriptor = os.open(path, os.O_RDWR | _NO_OTHER_FILE)
        except OSError:
            descriptor = os.open(path, os.O_RDONLY | _NO_OTHER_FILE)
        try:
            for look in range(_LOOKS):
                if look:
                    time.sleep(_LOOK_PAUSE)
                if _try(descriptor, path):
                    return False
            return True
        finally:
            os.close(descriptor)
    except OSError:  # removed meanwhile, not to be read, or without locks
        return False


def _try(descriptor: int, path: Path) -> bool:
    try:
        return filelock.lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        raise OSError(error.errno or errno.ENOLCK, error.strerror or "has no locks", str(path)) from error

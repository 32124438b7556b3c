"""Errors of the system that say which file they are about."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["naming"]


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Names a file in the errors of writing it, which the system raises without a name, as when a disk is full.

    Raises:
        OSError: What is raised inside, of the same kind, with `filename`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error

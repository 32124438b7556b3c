"""Calls the command in copies of this process, which has imported everything, and says how each ended."""

import contextlib
import dataclasses
import logging
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_attn.cli import (
    main,
    subcommands,  # noqa: F401 - imported here once, and not in every copy
)

TRACEBACK = 99  # status of a copy that ended by an error
_MOST_OUTPUT = 50 << 20  # bytes, before a copy counts as one that never stops


@dataclasses.dataclass(frozen=True)
class Trial:
    """How one ended: its status (minus the signal that ended it), what it printed, how long and how much it took."""

    status: int
    printed: str
    seconds: float
    memory: int

    @property
    def errors(self) -> list[str]:
        """What it said of a mistake."""
        lines = self.printed.splitlines()
        return [line for line in lines if line.startswith("error:") or "could not be used and were skipped" in line]

    @property
    def is_sound(self) -> bool:
        """Whether it ended with a result or one message; neither by a signal, nor with a traceback."""
        if "Traceback (most recent call last)" in self.printed:
            return False
        return self.status == 0 or (self.status in (1, 2) and len(self.errors) == 1)


def attempt(
    arguments: Sequence[object], folder: Path, *, seconds: float = 60, prepare: Callable[[], None] = lambda: None
) -> Trial:
    """Calls the command in a folder; after `seconds` it is killed, which is a status of -9."""
    begun = time.monotonic()
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        _child([str(one) for one in arguments], folder, prepare, writing)
    os.close(writing)
    printed = bytearray()
    while (left := begun + seconds - time.monotonic()) > 0 and len(printed) < _MOST_OUTPUT:
        if select.select([reading], [], [], left)[0]:
            block = os.read(reading, 1 << 16)
            if not block:
                break
            printed += block
    else:
        os.kill(process, signal.SIGKILL)
    os.close(reading)
    _, status, usage = os.wait4(process, 0)
    code = os.waitstatus_to_exitcode(status)
    return Trial(code, printed.decode(errors="replace"), time.monotonic() - begun, usage.ru_maxrss * 1024)


def _child(arguments: list[str], folder: Path, prepare: Callable[[], None], output: int) -> None:
    status = TRACEBACK
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", errors="replace", buffering=1)  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", errors="replace", buffering=1)  # noqa: SIM115
        logging.getLogger().handlers.clear()  # pytest's
        os.chdir(folder)
        sys.argv = ["train.py", *arguments]
        prepare()
        try:
            main(arguments)
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def limit_files(size: int) -> Callable[[], None]:
    """Lets no file of a copy grow beyond a size in bytes, as on a disk that is full by then."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

"""Profiles of a study's networks: the public command `profile`, once for each group, whose cells share the file."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shlex
import stat
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from lightning_attn import locks
from lightning_attn.errors import InputError
from lightning_attn.io import write_file
from lightning_attn.study.children import StopRequests, kill_child, start_child, visible_gpus
from lightning_attn.study.grid import Cell, Group, Study

__all__ = ["PROFILE_FILE", "Profiler", "copy_profile", "is_profile", "require_configuration", "step_seconds"]

PROFILE_FILE, LOG_FILE = "profile.json", "profile.log"  # in a cell's folder
_LOCK_FILE = ".profiling"  # in the study's folder
_POLL = 0.1  # seconds between looks at the processes
_MOST_BYTES = 16 * 2**20  # of a profile
_MOST_ALIKE = 2  # groups that fail for the same reason, before the rest is not tried


@dataclasses.dataclass
class _Job:
    """A process that profiles a group."""

    group: Group
    folder: Path
    process: subprocess.Popen[bytes]


class Profiler:
    """Profiles the groups of a study that have no profile yet.

    Args:
        study: The study.
        root: Folder of its cells.
        command: What the arguments are given to, such as `["python", "train.py"]`.
        jobs: Processes at a time, which share the machine as cells do.
        console: For messages.
    """

    def __init__(
        self, study: Study, root: Path, command: Sequence[str], *, jobs: int = 1, console: Console | None = None
    ) -> None:
        self.study, self.root, self.command, self.jobs = study, root, list(command), min(jobs, len(study.cells))
        self.console = console or Console()
        self._requests = StopRequests()
        self._gpus = visible_gpus(os.environ)
        self._running: dict[int, _Job] = {}  # by slot
        self._failed: dict[Group, tuple[str, Path]] = {}  # reasons and logs

    @property
    def failed(self) -> Sequence[Group]:
        """Groups that could not be profiled, in the order of their failures."""
        return list(self._failed)

    @property
    def received(self) -> int | None:
        """The first signal that asked to stop; None if none did."""
        return self._requests.first

    def run(self, cells: Sequence[Cell]) -> None:
        """Profiles their groups, until all have a profile or a signal asks to stop; that ends the processes at once.

        A group that cannot be profiled stops nothing: one warning says why.
        """
        cells_of: dict[Group, list[Cell]] = {}
        for cell in cells:
            cells_of.setdefault(cell.group, []).append(cell)
        if not self._without(cells_of):
            return
        with self._requests.received(), self._lock() as lock:
            # Another runner may have profiled them meanwhile.
            pending = [] if lock is None else self._without(cells_of)
            number = len(pending)
            with self._progress(number) as report:
                while pending or self._running:
                    if self.received is not None:
                        pending.clear()
                        self._kill()
                    for slot in [slot for slot, job in self._running.items() if job.process.poll() is not None]:
                        self._finish(slot, cells_of)
                        report(number - len(pending) - len(self._running))
                    if max(Counter(reason for reason, _ in self._failed.values()).values(), default=0) >= _MOST_ALIKE:
                        pending.clear()
                    free = [slot for slot in range(self.jobs) if slot not in self._running]
                    for slot, group in zip(free, list(pending), strict=False):
                        assert lock is not None, "nothing is pending without it"
                        pending.remove(group)
                        self._launch(slot, group, cells_of[group][0], lock)
                    time.sleep(_POLL)
            if self._failed and self.received is None:
                self._warn(len(self._without(cells_of)))

    def _without(self, cells_of: dict[Group, list[Cell]]) -> list[Group]:
        """The groups that have no profile; where one of a group's cells has it, the others get a copy."""
        found = []
        for group, cells in cells_of.items():
            folders = [self.root / cell.name for cell in self.study.cells if cell.group == group]
            source = next((folder for folder in folders if is_profile(folder / PROFILE_FILE)), None)
            if source is None:
                found.append(group)
            else:
                self._share(source, cells)
        return found

    def _share(self, source: Path, cells: Sequence[Cell]) -> None:
        """Gives a profile to cells, and to those of the same group that have been run before."""
        for cell in self.study.cells:
            folder = self.root / cell.name
            if cell in cells or (cell.group == cells[0].group and folder.is_dir()):
                copy_profile(source, folder)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[int | None]:
        """Held by one runner at a time, and by what it has started: profiles beside profiles would measure less.

        None if a signal has asked to stop before it was free.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = locks.take(self.root / _LOCK_FILE, seconds=0)
        if descriptor is None:
            self.console.print("Waiting for another process, which profiles this study")
        while descriptor is None and self.received is None:
            descriptor = locks.take(self.root / _LOCK_FILE, seconds=_POLL)
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _launch(self, slot: int, group: Group, cell: Cell, lock: int) -> None:
        folder = self.root / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / PROFILE_FILE
        output.unlink(missing_ok=True)  # damaged, or it would not be here
        words = [*self.command, *cell.profile_arguments(output)]
        with (folder / LOG_FILE).open("wb") as log:
            log.write(f"$ {shlex.join(words)}\n".encode())
            log.flush()
            process = start_child(words, log, lock, slot=slot, jobs=self.jobs, gpus=self._gpus)
        self._running[slot] = _Job(group, folder, process)

    def _finish(self, slot: int, cells_of: dict[Group, list[Cell]]) -> None:
        """Gives the profile to all cells of its group."""
        job = self._running.pop(slot)
        if not is_profile(job.folder / PROFILE_FILE):
            log = job.folder / LOG_FILE
            self._failed[job.group] = _reason(log, job.process.returncode), log
            return
        self._share(job.folder, cells_of[job.group])

    def _kill(self) -> None:
        """Ends what runs: there is nothing that it could save."""
        for job in self._running.values():
            kill_child(job.process)

    @contextlib.contextmanager
    def _progress(self, number: int) -> Iterator[Any]:
        """Shows how many groups are profiled."""
        what = f"{number} network{'s' if number > 1 else ''} to profile"
        if not number:
            yield lambda done: None
        elif self.console.is_terminal:
            with self.console.status(what) as status:
                yield lambda done: status.update(f"{what}, {done} done")
        else:
            self.console.print(what, highlight=False)
            yield lambda done: None

    def _warn(self, number: int) -> None:
        """Says which groups have no profile, and why the first of them has none."""
        group, (reason, log) = next(iter(self._failed.items()))
        what = (
            f"{self.study.title(group)} and {number - 1} more have" if number > 1 else f"{self.study.title(group)} has"
        )
        self.console.print(
            f"[yellow]warning[/]: {escape(f'{what} no profile: {reason}')}",
            highlight=False,
            soft_wrap=True,
        )
        self.console.print(escape(f"The whole log: {log}"), soft_wrap=True)


def require_configuration(study: Study, cell: Cell, root: Path, command: Sequence[str]) -> None:
    """Has the public command read a cell's configuration, without training.

    Args:
        study: The study.
        cell: The cell.
        root: Folder of the study's cells.
        command: As for `Profiler`.

    Raises:
        ValueError: If it is no configuration, with the command's own message.
    """
    words = [*command, *cell.arguments("fit", root / cell.name), "--print_config"]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode > 0:
        raise InputError(f"{study.path}: {study.title(cell.group)}: {_message(done.stdout + done.stderr)}")


def copy_profile(source: Path, target: Path) -> None:
    """Gives the profile in one cell's folder to another cell, unless that has one."""
    if is_profile(source / PROFILE_FILE) and not is_profile(target / PROFILE_FILE):
        content = (source / PROFILE_FILE).read_bytes()
        write_file(target / PROFILE_FILE, lambda file: file.write(content), replace=True)


def is_profile(path: Path) -> bool:
    """Whether a file is there and can be read."""
    return _content(path) is not None


def step_seconds(path: Path) -> float | None:
    """The median time of a training step; None if the file does not say it."""
    content = _content(path)
    return None if content is None else content.step


@dataclasses.dataclass(frozen=True)
class _Content:
    """What is used of a profile: the seconds of a training step, if they were measured."""

    step: float | None


def _content(path: Path) -> _Content | None:
    """The content of a profile, read again only when it has changed; None if it is missing or damaged."""
    try:
        state = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(state.st_mode) or state.st_size > _MOST_BYTES:
        return None
    return _parsed(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=4096)
def _parsed(path: Path, changed: int, size: int) -> _Content | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    try:
        median = float(content["training_step"]["latency"]["median"])
    except (ValueError, KeyError, TypeError, OverflowError):  # such as of a profile on the meta device
        return _Content(None)
    return _Content(median if math.isfinite(median) and median > 0 else None)


def _reason(log: Path, code: int) -> str:
    """Why a process has written no profile: its message, or else the last line that it printed."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    except OSError:
        lines = []
    return f"{_message(chr(10).join(lines))} (status {code})" if code else f"it ended without {PROFILE_FILE}"


def _message(printed: str) -> str:
    """The line with the error of a command, or else its last one."""
    told = [line.strip() for line in printed.splitlines() if line.strip()]
    return next((line for line in told if line.startswith("error:")), told[-1] if told else "it printed nothing")

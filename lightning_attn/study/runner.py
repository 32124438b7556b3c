"""Runs the cells of a study: each the public command in a process of its own."""

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.live import Live
from rich.markup import escape

from lightning_attn.errors import InputError
from lightning_attn.io import naming
from lightning_attn.study.children import StopRequests, kill_child, start_child, visible_gpus
from lightning_attn.study.estimate import estimated_seconds
from lightning_attn.study.grid import Cell, Study, format_duration
from lightning_attn.study.profiling import copy_profile
from lightning_attn.study.states import COMMAND_MARK, Attempt, CellFolder, CellStatus, read_statuses
from lightning_attn.study.tables import live_table

__all__ = ["Runner"]

_POLL = 0.1  # seconds between looks at the processes
_REFRESH = 2.0  # seconds between looks at their files, or more:
_LEAST_PAUSE = 20.0  # times as long as a look takes, as the trainings need the processors


@dataclasses.dataclass
class _Job:
    """A process of a cell."""

    cell: Cell
    folder: CellFolder
    lock: int
    process: subprocess.Popen[bytes]
    attempts: list[Attempt]


class Runner:
    """Runs the cells of a study that are not done.

    Args:
        study: The study.
        root: Folder of its cells.
        command: What the arguments of a cell are given to, such as `["python", "train.py"]`.
        jobs: Cells at a time. They share the processors (OMP_NUM_THREADS, unless it is set) and the GPUs
            (CUDA_VISIBLE_DEVICES).
        retry_failed: Whether failed cells are run again; they resume from their last checkpoint.
        rerun_stale: Whether cells that another version of the code ran are begun anew; the older folders are kept.
        fail_fast: Whether the first failure ends the others, which save.
        console: For messages and the table.
    """

    def __init__(
        self,
        study: Study,
        root: Path,
        command: Sequence[str],
        *,
        jobs: int = 1,
        retry_failed: bool = False,
        rerun_stale: bool = False,
        fail_fast: bool = False,
        console: Console | None = None,
    ) -> None:
        if jobs < 1:
            raise InputError(f"jobs must be at least 1, got {jobs}.")
        self.study, self.root, self.command, self.jobs = study, root, list(command), min(jobs, len(study.cells))
        self.retry_failed, self.rerun_stale, self.fail_fast = retry_failed, rerun_stale, fail_fast
        self.console = console or Console()
        self._requests = StopRequests()
        self._is_stopping = False
        self._running: dict[int, _Job] = {}  # by slot
        self._gpus = visible_gpus(os.environ)

    @property
    def received(self) -> int | None:
        """The first signal that asked to stop; None if none did."""
        return self._requests.first

    def needed(self, statuses: Sequence[CellStatus]) -> list[CellStatus]:
        """Those that are to be run."""
        return [status for status in statuses if self._is_needed(status)]

    def _is_needed(self, status: CellStatus) -> bool:
        if status.job:
            return False
        if status.state == "stale":
            return self.rerun_stale
        return status.state in ("waiting", "interrupted", "running") or (status.state == "failed" and self.retry_failed)

    def run(self, cells: Sequence[Cell]) -> list[CellStatus]:
        """Runs what is needed of some cells, until nothing is left or a signal asks to stop.

        The first Ctrl-C, SIGTERM or SIGHUP is passed on to the cells, which save and end; the second ends them at
        once; a third kills them.

        Returns:
            The states afterwards.
        """
        pending = [status.cell for status in self.needed(read_statuses(self.study, self.root, cells))]
        shown, pause = 0.0, _REFRESH
        with self._requests.received(), self._ending(), self._display(cells) as refresh:
            handled = 0
            while pending or self._running:
                if self._requests.count > handled:
                    handled = self._requests.count
                    pending.clear()
                    self._stop(self.received or signal.SIGTERM, kill=handled > 2)
                for slot in [slot for slot, job in self._running.items() if job.process.poll() is not None]:
                    if self._finish(slot) and self.fail_fast and not self._is_stopping:
                        pending.clear()
                        self._stop(signal.SIGTERM)
                if not self._is_stopping:
                    self._start(pending)
                if time.monotonic() - shown > pause:
                    begun = time.monotonic()
                    refresh()
                    shown = time.monotonic()
                    pause = max(_REFRESH, _LEAST_PAUSE * (shown - begun))
                time.sleep(_POLL)
            refresh()
        return read_statuses(self.study, self.root, cells)

    def _start(self, pending: list[Cell]) -> None:
        """Starts cells in free slots; those that other processes work on are left for later."""
        free = [slot for slot in range(self.jobs) if slot not in self._running]
        orphans = 0  # cells of a runner that was killed: each uses a slot until it ends
        for cell in list(pending):
            if len(free) <= orphans:
                return
            folder = CellFolder(self.root / cell.name)
            lock = None if folder.is_taken() else folder.acquire()
            if lock is None:
                attempts = folder.attempts()
                orphans += bool(attempts) and not attempts[-1].is_of_living_runner
                continue
            pending.remove(cell)
            status = CellStatus.read(self.study, cell, self.root, is_ours=True)
            if not self._is_needed(status):  # another process has finished it meanwhile
                os.close(lock)
                continue
            if not cell.is_current():
                self._say_changed(cell)
                os.close(lock)
                continue
            if status.is_finished:
                older = folder.set_aside()
                self.console.print(escape(f"{cell.name}: the older run is kept in {older.name}"))
                os.close(lock)
                lock = folder.acquire()
                if lock is None:
                    continue
                copy_profile(older, folder.path)
            attempts = folder.attempts()
            fitted = any(one.stage == "fit" and one.exit_code == 0 for one in attempts) and folder.run_directory()
            self._launch(free.pop(0), cell, folder, lock, "test" if fitted else "fit", attempts)

    def _launch(
        self,
        slot: int,
        cell: Cell,
        folder: CellFolder,
        lock: int,
        stage: Literal["fit", "test"],
        attempts: list[Attempt],
    ) -> None:
        words = [*self.command, *cell.arguments(stage, folder.path)]
        attempts.append(Attempt(stage, time.time()))
        folder.write_attempts(cell, attempts)
        with naming(folder.log), folder.log.open("ab") as log:
            log.write(f"{COMMAND_MARK}{shlex.join(words)}\n".encode())
            log.flush()
            process = start_child(words, log, lock, slot=slot, jobs=self.jobs, gpus=self._gpus)
        self._running[slot] = _Job(cell, folder, lock, process, attempts)
        self._say(f"{cell.name}: {stage} started")

    def _finish(self, slot: int) -> bool:
        """Records how a process ended, and starts the test after a training; returns whether it failed."""
        job = self._running.pop(slot)
        last = job.attempts[-1]
        last.ended, last.exit_code = time.time(), job.process.returncode
        job.folder.write_attempts(job.cell, job.attempts)
        took = format_duration(last.ended - last.started)
        is_next = last.exit_code == 0 and last.stage == "fit" and not self._is_stopping
        if is_next and not job.cell.is_current():
            self._say_changed(job.cell)
        elif is_next:
            self._launch(slot, job.cell, job.folder, job.lock, "test", job.attempts)
            return False
        os.close(job.lock)
        status = CellStatus.read(self.study, job.cell, self.root)
        if status.is_finished:
            self._say(f"{job.cell.name}: done, {self.study.metric} {status.score:.4g}")
        elif status.state != "failed":
            self._say(f"{job.cell.name}: {last.stage} {status.state} after {took} {status.reason}".rstrip())
        else:
            self.console.print(f"[bold red]failed[/] {escape(job.cell.name)}: {escape(status.reason)} after {took}")
            self.console.print(escape(job.folder.end_of_log()), highlight=False)
            self.console.print(escape(f"The whole log: {job.folder.log}"))
        return status.state == "failed"

    def _stop(self, number: int, *, kill: bool = False) -> None:
        """Passes a signal on to the cells: a training saves its state and ends."""
        self._is_stopping = True
        for job in self._running.values():
            job.attempts[-1].asked_to_stop = True
            if kill:
                kill_child(job.process)
            else:
                with contextlib.suppress(ProcessLookupError):
                    job.process.send_signal(number)

    def _say_changed(self, cell: Cell) -> None:
        self.console.print(
            escape(f"{cell.name}: left, as its configuration files have changed; the same command reads them again"),
            soft_wrap=True,
        )

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Ends the cells, which save, if this process cannot go on: for a full disk, or an output that was closed."""
        try:
            yield
        except BaseException:
            self._stop(signal.SIGTERM)
            asked = self._requests.count
            while any(job.process.poll() is None for job in self._running.values()):
                if self._requests.count > asked:
                    asked = self._requests.count
                    self._stop(signal.SIGTERM, kill=True)
                time.sleep(_POLL)
            for job in self._running.values():
                last = job.attempts[-1]
                last.ended, last.exit_code = time.time(), job.process.returncode
                with contextlib.suppress(OSError):
                    job.folder.write_attempts(job.cell, job.attempts)
                os.close(job.lock)
            self._running.clear()
            raise

    @contextlib.contextmanager
    def _display(self, cells: Sequence[Cell]) -> Iterator[Callable[[], None]]:
        """What draws a table of the cells again; nothing where the output is no terminal."""
        if not self.console.is_terminal:
            yield lambda: None
            return
        with Live(console=self.console, auto_refresh=False) as live:

            def draw() -> None:
                statuses = read_statuses(self.study, self.root, cells)
                seconds = estimated_seconds(self.study, statuses, self.needed(statuses), self.jobs)
                live.update(live_table(self.study, statuses, seconds), refresh=True)

            yield draw

    def _say(self, line: str) -> None:
        if not self.console.is_terminal:  # there the table shows it
            self.console.print(escape(line), highlight=False, soft_wrap=True)

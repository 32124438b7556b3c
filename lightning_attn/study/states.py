"""The state of every cell, read from the files that it and its runs leave: there is no database.

A cell's folder, `<root>/<study>/<cell>/`, holds the run directory `<task>/run`, `output.log` with everything that its
processes printed, `cell.json` with its attempts, and `.lock`, which its process holds as long as it lives.
"""

import collections
import contextlib
import csv
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from lightning_attn import locks
from lightning_attn.errors import InputError, UnusableFileError
from lightning_attn.io import oldest_first, write_json
from lightning_attn.processes import is_running, start_of
from lightning_attn.study.grid import RUN_NAME, Cell, Group, Study
from lightning_attn.training.code_version import code_version

__all__ = [
    "COMMAND_MARK",
    "EXIT_CODE_FILE",
    "JOB_FILE",
    "STATES",
    "Attempt",
    "CellFolder",
    "CellStatus",
    "State",
    "older_code_of",
    "queued_jobs",
    "read_statuses",
    "scores_of",
]

State: TypeAlias = Literal["waiting", "running", "interrupted", "failed", "done", "stale"]
STATES: tuple[State, ...] = ("done", "running", "waiting", "interrupted", "failed", "stale")

_RUNNING_JOBS = ("RUNNING", "COMPLETING", "CONFIGURING")
_TAIL = 16 * 1024  # bytes at the end of a file that are read
_MOST_BYTES = 16 * 2**20  # of a JSON file that is read
_LARGEST_SCORE = 1e100  # its square is finite
_LARGEST_TIME, _LARGEST_INTEGER = 1e15, 2**31
_LONGEST_REASON = 400
_STOPPED = {-number for number in range(1, 65)} | {128 + number for number in (1, 2, 9, 10, 15)}  # by signals
_PROGRESS = re.compile(r"step (\d+)/(\d+) ETA (\S+ min|unknown)")
JOB_FILE, EXIT_CODE_FILE = "slurm_job", "exit_code"  # of a cell that was submitted to SLURM
COMMAND_MARK = "\n$ "  # in the log, before each command


@dataclasses.dataclass
class Attempt:
    """One process of a cell.

    Attributes:
        stage: "fit" or "test".
        started: Seconds since 1970.
        ended: The same; None if the runner did not see it end.
        exit_code: Of the process; negative for a signal.
        asked_to_stop: Whether the runner did that.
        code: Version of the code.
        host: Where.
        runner: Process of the runner.
        runner_started: When that was started, as the system uses numbers again.
    """

    stage: Literal["fit", "test"]
    started: float
    ended: float | None = None
    exit_code: int | None = None
    asked_to_stop: bool = False
    code: str = dataclasses.field(default_factory=code_version)
    host: str = dataclasses.field(default_factory=socket.gethostname)
    runner: int = dataclasses.field(default_factory=os.getpid)
    runner_started: str = dataclasses.field(default_factory=lambda: start_of(os.getpid()))

    def __post_init__(self) -> None:
        """Refuses what a damaged file may say."""
        words = (self.stage, self.code, self.host, self.runner_started)
        times = [one for one in (self.started, self.ended) if one is not None]
        numbers = [one for one in (self.exit_code, self.runner) if one is not None]
        good = all(isinstance(one, str) for one in words) and self.stage in ("fit", "test") and self.started is not None
        good = good and all(isinstance(one, int) and abs(one) < _LARGEST_INTEGER for one in numbers)
        if not good or not all(isinstance(one, int | float) and abs(one) < _LARGEST_TIME for one in times):
            raise InputError(f"attempt: {self} cannot be one.")

    @property
    def is_of_living_runner(self) -> bool:
        """Whether its runner is known to run; other hosts' are taken to."""
        return self.host != socket.gethostname() or is_running(self.runner, self.runner_started)

    @property
    def has_failed(self) -> bool:
        """Whether it ended on its own with an error."""
        return self.exit_code not in (None, 0) and self.exit_code not in _STOPPED and not self.asked_to_stop


@dataclasses.dataclass(frozen=True)
class CellFolder:
    """The folder of a cell.

    Attributes:
        path: The folder, which need not exist.
    """

    path: Path

    @property
    def log(self) -> Path:
        """What its processes printed."""
        return self.path / "output.log"

    def attempts(self) -> list[Attempt]:
        """Processes so far; none if the file is missing or damaged."""
        try:
            stored = json.loads(_read(self.path / "cell.json"))
            return [Attempt(**one) for one in stored["attempts"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return []

    def write_attempts(self, cell: Cell, attempts: Sequence[Attempt]) -> None:
        """Writes the file of attempts atomically."""
        content = {"cell": cell.labels, "seed": cell.seed}
        write_json(
            self.path / "cell.json", content | {"attempts": [dataclasses.asdict(one) for one in attempts]}, replace=True
        )

    def run_directory(self) -> Path | None:
        """The run directory that was written to last, if any."""
        found = [path.parent for path in self.path.glob(f"*/{RUN_NAME}*/run.json")]
        return max(found, key=_last_change, default=None)

    def is_begun(self) -> bool:
        """Whether it holds a training, or an attempt at one."""
        return bool(self.attempts()) or self.run_directory() is not None

    def acquire(self) -> int | None:
        """Takes the cell for this process and those that inherit the descriptor, until the last of them ends.

        Returns:
            A file descriptor; None if the cell is taken.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        return locks.take(self.path / ".lock")

    def is_taken(self) -> bool:
        """Whether a process works on the cell, started by a runner or by hand."""
        return any(locks.is_held(path) for path in (self.path / ".lock", *self.path.glob(f"*/{RUN_NAME}*/.lock")))

    def set_aside(self) -> Path:
        """Renames the folder, to begin anew; nothing is deleted."""
        number = 1
        while True:
            target = self.path.with_name(f"{self.path.name}.old-{number}")
            if not target.exists():
                return self.path.rename(target)
            number += 1

    def word(self, name: str) -> str:
        """What a small file of the folder says; empty if there is none."""
        try:
            return _read(self.path / name).strip()
        except (OSError, UnicodeDecodeError):
            return ""

    def end_of_log(self, lines: int = 12) -> str:
        """The last lines of the log."""
        return "\n".join(_tail(self.log).rstrip().splitlines()[-lines:])


@dataclasses.dataclass(frozen=True)
class CellStatus:
    """What the files of a cell say.

    Attributes:
        cell: The cell.
        folder: Its folder.
        state: Its state.
        reason: Why, where the state alone does not say it.
        score: The judged score of its test in the unit of the paper; None before.
        step: Optimizer steps done; None if unknown.
        validation: The newest value of the same score in validation, in the same unit.
        eta: Time left as the training prints it; empty if unknown.
        seconds: Of its processes so far; None if no runner measured them, or not all of a finished cell.
        job: Number of its SLURM job in the queue; empty if there is none.
        older_code: Version of the code that ran it; empty if that is the present one, or unknown.
    """

    cell: Cell
    folder: CellFolder
    state: State
    reason: str
    score: float | None
    step: int | None
    validation: float | None
    eta: str
    seconds: float | None
    job: str
    older_code: str

    @property
    def is_finished(self) -> bool:
        """Whether it has a score: done, perhaps by an older version of the code."""
        return self.score is not None

    @classmethod
    def read(
        cls,
        study: Study,
        cell: Cell,
        root: Path,
        others: Mapping[str, str] | None = None,
        *,
        jobs: Mapping[str, str] | None = None,
        is_ours: bool = False,
    ) -> "CellStatus":
        """Reads the state of one cell.

        Args:
            study: Its study.
            cell: The cell.
            root: Folder of the study's cells.
            others: Folders of the same readable name but another configuration, by that name.
            jobs: Of SLURM's queue, their states.
            is_ours: Whether this process itself holds the lock.
        """
        folder = CellFolder(root / cell.name)
        attempts = folder.attempts()
        run = folder.run_directory()
        score, damage = _test_score(run, study)
        step, validation = _progress(run, study.metric.replace("test/", "val/", 1), study.scale)
        taken = not is_ours and folder.is_taken()
        eta = ""
        if taken:
            log = _tail(folder.log).rpartition(COMMAND_MARK)[2]
            if printed := _PROGRESS.findall(log):
                step, eta = max(step or 0, int(printed[-1][0])), printed[-1][2].replace("unknown", "")
        if score is not None:
            step = cell.total_steps or step
        job = folder.word(JOB_FILE)
        queued = (jobs or {}).get(job, "") if job else ""
        # Not below zero, as clocks are set back.
        ended = [max(0.0, one.ended - one.started) for one in attempts if one.ended is not None]
        state, reason = _state(cell, attempts, run, score, damage, taken, (others or {}).get(cell.readable_name))
        code = folder.word(EXIT_CODE_FILE)
        if queued and state != "done":
            state, reason = "running" if queued in _RUNNING_JOBS else "waiting", f"SLURM job {job} is {queued}"
        elif (
            job
            and state in ("waiting", "interrupted")
            and re.fullmatch("[0-9]{1,3}", code)
            and int(code) not in {0, *_STOPPED}
        ):
            state, reason = "failed", f"SLURM job {job} ended with status {code}"
        is_seen = bool(ended) and (score is None or len(ended) == len(attempts))  # or the time of some was not measured
        seconds = math.fsum(ended) if is_seen else None
        older = next((one for one in _codes_of(run, attempts) if one not in ("", code_version())), "")
        return cls(cell, folder, state, reason, score, step, validation, eta, seconds, job if queued else "", older)


def read_statuses(study: Study, root: Path, cells: Sequence[Cell] | None = None) -> list[CellStatus]:
    """The states of cells.

    Args:
        study: Their study.
        root: Folder of the study's cells.
        cells: Which; all by default.
    """
    known = {cell.name for cell in study.cells}
    others = {}
    for name in sorted(path.name for path in root.iterdir()) if root.is_dir() else []:
        match = None if name in known else re.fullmatch(r"(.+)_[0-9a-f]{8}", name)
        if match is not None and CellFolder(root / name).is_begun():  # one with a profile alone is nothing yet
            others[match[1]] = name
    chosen = study.cells if cells is None else cells
    jobs = queued_jobs() if any((root / cell.name / JOB_FILE).is_file() for cell in chosen) else {}
    return [CellStatus.read(study, cell, root, others, jobs=jobs) for cell in chosen]


def queued_jobs() -> dict[str, str]:
    """This user's jobs in SLURM's queue: numbers and states such as PENDING; none where there is no SLURM."""
    program = shutil.which("squeue")
    if program is None:
        return {}
    words = [program, "--noheader", "--me", "--format=%i|%T"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise UnusableFileError(
            f"slurm: squeue does not say which jobs are in the queue ({error}). Try again."
        ) from error
    lines = (line.strip().partition("|") for line in done.stdout.splitlines())
    return {number: state for number, _, state in lines if number}


def older_code_of(statuses: Sequence[CellStatus]) -> str:
    """The older version of the code that compared scores are of: the most common, if no cell is of the present code.

    Returns:
        The version; empty if cells of the present code are compared, or none.
    """
    if any(status.state == "done" for status in statuses):
        return ""
    codes = collections.Counter(status.older_code for status in statuses if status.state == "stale")
    del codes[""]
    return codes.most_common(1)[0][0] if codes else ""


def scores_of(statuses: Sequence[CellStatus]) -> dict[Group, dict[int, float]]:
    """Scores that are compared, by group and seed: of the present code, or else of the most common older one."""
    older = older_code_of(statuses)
    found: dict[Group, dict[int, float]] = {}
    for status in statuses:
        is_compared = status.state == "stale" and status.older_code == older if older else status.state == "done"
        if status.score is not None and is_compared:
            found.setdefault(status.cell.group, {})[status.cell.seed] = status.score
    return found


def _state(
    cell: Cell,
    attempts: Sequence[Attempt],
    run: Path | None,
    score: float | None,
    damage: str,
    taken: bool,
    other: str | None,
) -> tuple[State, str]:
    if taken:
        last = attempts[-1] if attempts else None
        orphan = last is not None and last.ended is None and not last.is_of_living_runner
        return "running", "its runner has ended" if orphan else ""
    if score is not None:
        if set(_codes_of(run, attempts)) != {code_version()}:
            return "stale", "run by another version of the code"
        return "done", ""
    if damage:
        return "failed", damage
    if attempts and attempts[-1].has_failed:
        return "failed", f"{attempts[-1].stage} ended with status {attempts[-1].exit_code}"
    if attempts and attempts[-1].stage == "test" and attempts[-1].exit_code == 0:
        return "failed", "the test has written no test_metrics.json"
    if attempts or run is not None:
        last = attempts[-1] if attempts else None
        killed = last is not None and last.exit_code == -9 and not last.asked_to_stop
        return "interrupted", "killed (SIGKILL), perhaps for lack of memory" if killed else ""
    return "waiting", "" if other is None else f"an older configuration's folder is kept: {other}"


def _test_score(run: Path | None, study: Study) -> tuple[float | None, str]:
    """The score of the newest test, or what is wrong with its file."""
    name = "test_metrics.json"
    try:
        tests = [] if run is None else oldest_first(run, "test_metrics*.json")
        if not tests:
            return None, ""
        name = tests[-1].name
        scores = json.loads(_read(tests[-1]))
        value = scores[study.metric]
        if value is None or isinstance(value, bool) or not abs(value * study.scale) < _LARGEST_SCORE:
            return None, f"{name}: {study.metric} is {value}"
        return float(value) * study.scale, ""
    except KeyError:
        # In ASCII, as a terminal cannot show half of a surrogate pair.
        names = ascii(", ".join(sorted(scores)))[1:-1]
        shown = names if len(names) <= _LONGEST_REASON else f"{names[:_LONGEST_REASON]} ..."
        return None, f"{name} has no {study.metric}; it has {shown}"
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        return None, f"{name} cannot be read ({type(error).__name__})"


def _codes_of(run: Path | None, attempts: Sequence[Attempt]) -> list[str]:
    """Versions of the code of a training and of its processes; empty ones are unknown."""
    try:
        own = str(json.loads(_read((run or Path()) / "run.json"))["code"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        own = ""
    return [own, *(one.code for one in attempts)]


def _progress(run: Path | None, name: str, scale: float) -> tuple[int | None, float | None]:
    """Steps done and the newest value of a score, from the end of `metrics.csv`."""
    if run is None:
        return None, None
    step, value = None, None
    with contextlib.suppress(OSError, ValueError, KeyError, csv.Error):
        if not (run / "metrics.csv").is_file():
            return None, None
        with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
            names = next(csv.reader([file.readline(_TAIL)]), [])
        for row in _last_rows(run / "metrics.csv", names):
            step = max(step or 0, int(row["step"]) + 1)
            number = float(row[name]) * scale if row.get(name) else math.nan
            value = number if math.isfinite(number) else value
    return step, value


def _last_rows(path: Path, names: Sequence[str]) -> Iterator[dict[str, str]]:
    """Complete lines at the end of a CSV file."""
    text = _tail(path)
    lines = text[: text.rfind("\n") + 1].splitlines()[1:]  # the first is the names, or a part of a line
    for values in csv.reader(lines):
        if len(values) == len(names):
            yield dict(zip(names, values, strict=True))


def _read(path: Path) -> str:
    """A text file as a whole.

    Raises:
        OSError: If it is no file, such as a pipe, which would be waited for; or far larger than any of ours.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode) or state.st_size > _MOST_BYTES:
        raise OSError(errno.EINVAL, "is no file of ours", str(path))
    return path.read_text(encoding="utf-8")


def _tail(path: Path) -> str:
    """The end of a text file; empty if there is none."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _last_change(run: Path) -> int:
    return max((one.stat().st_mtime_ns for one in run.iterdir() if one.is_file()), default=0)

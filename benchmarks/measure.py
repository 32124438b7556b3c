"""Time and memory of several implementations of one thing, measured side by side on one machine."""

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).parents[1]

# glibc raises its threshold for mmap while a process runs, and how far depends on what ran before. Pinned, a freed
# tensor goes back to the system at once, so that resident memory is the memory in use, whoever allocates it.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}

# Bytes of the program's files that may leave memory during a measurement.
_LOST_PAGES = 1_000_000


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of repeated runs of one thing, in the order they ran."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of the runs, in seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between these lies the middle half of the runs, in seconds."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return lower, upper


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process of its own, in bytes."""

    before: int
    peak: int

    @property
    def increase(self) -> int:
        """What the measured steps added at their peak to the program, its modules and inputs, in bytes."""
        return self.peak - self.before


@dataclass
class Side:
    """What one implementation cost in one case.

    Attributes:
        timing: Of its steps.
        memory: Of a fresh process.
        error: Why one of them is missing.
    """

    timing: Timing | None = None
    memory: Memory | None = None
    error: str | None = None

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> "Side":
        """From what `dataclasses.asdict` made of one."""
        timing, memory = figures["timing"], figures["memory"]
        return cls(
            timing=None if timing is None else Timing(tuple(timing["seconds"])),
            memory=None if memory is None else Memory(**memory),
            error=figures["error"],
        )


@dataclass(frozen=True)
class Target:
    """A figure beside its bound.

    Attributes:
        name: What the figure is.
        value: The figure; None if it could not be measured.
        bound: What it should reach.
        at_least: Whether the bound is a lower one.
        noise: Whether the two sides' middle halves overlap, where the bound is that one is not slower than the other.
    """

    name: str
    value: float | None
    bound: float
    at_least: bool
    noise: bool = False

    @property
    def verdict(self) -> str:
        """`met`, `met within noise`, `not met` or `not measured`."""
        if self.value is None:
            return "not measured"
        if self.value >= self.bound if self.at_least else self.value <= self.bound:
            return "met"
        return "met within noise" if self.noise else "not met"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the verdict is added."""
        return asdict(self) | {"verdict": self.verdict}

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> "Target":
        """From `as_dict`."""
        return cls(**{field.name: figures[field.name] for field in fields(cls)})

    def __str__(self) -> str:
        figure = "-" if self.value is None else f"{self.value:.2f}"
        return f"{self.name} {figure} ({'>=' if self.at_least else '<='} {self.bound:g}): {self.verdict}"


def ratio(numerator: Side | None, denominator: Side | None, figure: Literal["time", "memory"]) -> float | None:
    """One side's median time, or increase of memory, divided by another's; None where one is missing."""
    if numerator is None or denominator is None:
        return None
    if figure == "time":
        if numerator.timing is None or denominator.timing is None:
            return None
        return numerator.timing.median / denominator.timing.median
    if numerator.memory is None or denominator.memory is None or denominator.memory.increase == 0:
        return None
    return numerator.memory.increase / denominator.memory.increase


def overlap(one: Side | None, other: Side | None) -> bool:
    """Whether the middle halves of two sides' times overlap."""
    if one is None or other is None or one.timing is None or other.timing is None:
        return False
    (lower, upper), (other_lower, other_upper) = one.timing.quartiles, other.timing.quartiles
    return lower <= other_upper and other_lower <= upper


def comma_separated(text: str) -> tuple[str, ...]:
    """Type of an argument: names with commas between."""
    return tuple(name for name in text.split(",") if name)


def positive_int(text: str) -> int:
    """Type of an argument: a whole number from 1 upwards.

    Raises:
        argparse.ArgumentTypeError: If it is less.
        ValueError: If it is no whole number.
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that all benchmarks of time and memory have; `--child` is the request of `run_child`."""
    parser.add_argument("--threads", type=positive_int, default=2, help="threads of the tensor operations (2)")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder of the results")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)


def output_console(width: int) -> Console:
    """The output, of this width where it is a file, which has none."""
    return Console() if sys.stdout.isatty() else Console(width=width)


def print_target(console: Console, target: Target) -> None:
    """A line, in red if the bound is not met."""
    console.print(f"  {target}", style=None if target.verdict == "met" else "red", highlight=False)


def print_results(
    title: str, header: Sequence[str], cells: Sequence[Sequence[str]], targets: Sequence[Target], file: Path
) -> None:
    """A table, targets below it, and the name that the files of the results share, from one of them."""
    console = output_console(width=100)
    styled = Table(*header, title=title, title_justify="left")
    for line in cells:
        styled.add_row(*line)
    console.print(styled)
    for target in targets:
        print_target(console, target)
    print(f"Results: {file.with_suffix('')}.*")


def markdown_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *cells)]


def markdown_settings(settings: Mapping[str, object]) -> str:
    """A list item that names settings and their values."""
    return "- " + ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in settings.items())


def require(*modules: str) -> None:
    """Ends the program with the way to install what a benchmark compares with, if any of it is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"Not installed: {', '.join(missing)}. This benchmark needs it: "
            "python -m pip install -c constraints.txt -e '.[bench]'"
        )


def describe(error: BaseException) -> str:
    """An exception on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def timed_in_turn(
    steps: Mapping[str, Callable[[], object]],
    *,
    repetitions: int,
    budget: float = 12.0,
    least: int = 5,
    unmeasured: int = 3,
) -> dict[str, Timing | str]:
    """Times each step in turn, again and again, so that whatever else the machine does falls on all of them alike.

    The order turns by one in every round, so that none always finds the cache that the same other left.

    Args:
        steps: What to run, by name.
        repetitions: Measured rounds at most.
        budget: Seconds after which no further round starts.
        least: Rounds that run in any case (if `repetitions` is not fewer).
        unmeasured: Runs of each step before, at most; fewer once they have taken a second.

    Returns:
        For each name its timing, or the error of a step that failed.
    """
    errors: dict[str, str] = {}
    seconds: dict[str, list[float]] = {name: [] for name in steps}

    def run(name: str) -> float:
        start = time.perf_counter()
        try:
            steps[name]()
        except Exception as error:  # a peer that fails is a result
            errors[name] = describe(error)
        return time.perf_counter() - start

    for name in steps:
        spent, runs = 0.0, 0
        while runs < unmeasured and spent < 1.0 and name not in errors:
            spent, runs = spent + run(name), runs + 1
    gc.collect()
    first = time.perf_counter()
    for turn in range(repetitions):
        running = [name for name in steps if name not in errors]
        if not running or (turn >= least and time.perf_counter() - first > budget):
            break
        shift = turn % len(running)
        for name in running[shift:] + running[:shift]:
            seconds[name].append(run(name))
    return {name: errors.get(name) or Timing(tuple(runs)) for name, runs in seconds.items()}


def peak_memory(
    step: Callable[[], object], *, steps: int = 2, warm_up: Callable[[], object] | None = None
) -> tuple[Memory, Timing]:
    """Peak resident memory of this process while a step runs; call it in a process of its own.

    Linux keeps the exact peak and lets a process reset it. Elsewhere another thread looks every millisecond.

    Args:
        step: What to run.
        steps: How often; the last run counts, by which time all code is loaded. Some more follow where the system took
            pages of the program's files away meanwhile, which would hide as much of what the step needs.
        warm_up: Runs before: a small problem that starts the thread pools.

    Returns:
        The memory, and how long each step took.
    """
    if warm_up is not None:
        warm_up()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    exact = status.exists() and os.access(reset, os.W_OK)
    seconds: list[float] = []
    found: list[tuple[int, Memory]] = []

    def run() -> None:
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)

    while len(found) < steps or (min(lost for lost, _ in found) > _LOST_PAGES and len(found) < steps + 3):
        gc.collect()
        if exact:
            reset.write_text("5", encoding="ascii")  # VmHWM becomes VmRSS; see proc_pid_clear_refs(5)
            before, of_files = _status_bytes(status, "VmRSS"), _status_bytes(status, "RssFile")
            run()
            lost = max(0, of_files - _status_bytes(status, "RssFile"))
            found.append((lost, Memory(before, max(before, _status_bytes(status, "VmHWM")))))
        else:
            found.append((0, _watched_memory(run)))
    _, memory = min(reversed(found), key=lambda pair: pair[0])
    return memory, Timing(tuple(seconds))


def _watched_memory(run: Callable[[], object]) -> Memory:
    import psutil

    process = psutil.Process()
    before = peak = process.memory_info().rss
    finished = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not finished.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        run()
    finally:
        finished.set()
        watcher.join()
    return Memory(before, peak)


def _status_bytes(status: Path, field: str) -> int:
    for line in status.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{status} has no field {field}.")


def run_child(
    module: str, arguments: Sequence[str], *, threads: int, limit: int | None = None, timeout: float = 600.0
) -> dict[str, Any] | str:
    """Runs `python -m module arguments` in a fresh process, whose last line of output is a JSON object.

    Args:
        module: Name of the benchmark.
        arguments: Its command line; the child answers with `answer_parent`.
        threads: Threads of its tensor operations.
        limit: Bytes of data it may allocate; more is an error in it, not a danger to the machine.
        timeout: Seconds after which it is ended.

    Returns:
        The object, or the error it ended with.
    """
    environment = os.environ | _MALLOC | {"OMP_NUM_THREADS": str(threads)}
    if limit is not None:
        environment["BENCHMARK_DATA_LIMIT"] = str(limit)
    try:
        run = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"ended after {timeout:.0f} s"
    if run.returncode < 0:
        return f"ended by signal {-run.returncode}"
    if run.returncode > 0:
        return (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
    figures: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return figures


def answer_parent(measure: Callable[[], Mapping[str, Any]]) -> None:
    """The child's side of `run_child`: keeps to the limit, measures, prints the figures or ends with the error."""
    limit = os.environ.get("BENCHMARK_DATA_LIMIT")
    if limit is not None and sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        print(json.dumps(measure()))
    except Exception as error:
        raise SystemExit(describe(error)) from error


def machine(*packages: str) -> dict[str, str | int]:
    """What the figures depend on: processor, cores, memory, versions, date, commit."""
    described: dict[str, str | int] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for name in packages:
        try:
            described[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            described[name] = "not installed"
    commit = _git("rev-parse", "HEAD")
    if commit:
        described["commit"] = commit + (" with changes" if _git("status", "--porcelain") else "")
    return described


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""

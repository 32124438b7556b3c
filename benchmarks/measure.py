"""How time and memory are measured: steps timed in turn, and the peak of the memory of a process."""

import gc
import threading
import time
from collections.abc import Callable, Mapping

from benchmarks.fresh_process import describe
from benchmarks.results import Memory, Timing
from lightning_attn.study.memory import PROCESS_STATUS, ProcessStatus

# Bytes of the program's files that may leave memory during a measurement.
_LOST_PAGES = 1_000_000


def timed_in_turn(
    steps: Mapping[str, Callable[[], object]],
    *,
    repetitions: int,
    budget: float = 12.0,
    least: int = 5,
    unmeasured: int = 3,
    check: Callable[[Mapping[str, object]], Mapping[str, str]] = lambda results: {},
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing | str]:
    """Times each step in turn, again and again, so that whatever else the machine does falls on all of them alike.

    The order turns by one in every round, so that none always finds the cache that the same other left.

    Args:
        steps: What to run, by name.
        repetitions: Measured rounds at most.
        budget: Seconds after which no further round starts.
        least: Rounds that run in any case (if `repetitions` is not fewer).
        unmeasured: Runs of each step before, at most; fewer once they have taken a second.
        check: Called between these and the rounds with what each step returned last; returns the errors of steps that
            are not to be timed.
        clock: Gives the time in seconds.

    Returns:
        For each name its timing, or the error of a step that failed.
    """
    errors: dict[str, str] = {}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    results: dict[str, object] = {}

    def run(name: str, *, keep: bool) -> float:
        start = clock()
        try:
            result = steps[name]()
            if keep:
                results[name] = result
            del result  # while the clock still runs
        except Exception as error:  # a peer that fails is a result
            errors[name] = describe(error)
        return clock() - start

    for name in steps:
        spent, runs = 0.0, 0
        while runs < unmeasured and spent < 1.0 and name not in errors:
            spent, runs = spent + run(name, keep=True), runs + 1
    errors.update(check(results))
    results.clear()
    gc.collect()
    first = clock()
    for turn in range(repetitions):
        running = [name for name in steps if name not in errors]
        if not running or (turn >= least and clock() - first > budget):
            break
        shift = turn % len(running)
        for name in running[shift:] + running[:shift]:
            seconds[name].append(run(name, keep=False))
    return {name: errors.get(name) or Timing(tuple(runs)) for name, runs in seconds.items()}


def peak_memory(
    step: Callable[[], object],
    *,
    steps: int = 2,
    warm_up: Callable[[], object] | None = None,
    status: ProcessStatus | None = PROCESS_STATUS,
) -> tuple[Memory, Timing]:
    """Peak resident memory of this process while a step runs; call it in a process of its own.

    Args:
        step: What to run.
        steps: How often; the last run counts, by which time all code is loaded. Some more follow where the system took
            pages of the program's files away meanwhile, which would hide as much of what the step needs.
        warm_up: Runs before: a small problem that starts the thread pools.
        status: Gives the exact peak; without it another thread looks every millisecond.

    Returns:
        The memory, and how long each step took.
    """
    if warm_up is not None:
        warm_up()
    seconds: list[float] = []
    found: list[tuple[int, Memory]] = []

    def run() -> None:
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)

    while len(found) < steps or (min(lost for lost, _ in found) > _LOST_PAGES and len(found) < steps + 3):
        gc.collect()
        if status is None:
            found.append((0, _watched_memory(run)))
            continue
        status.reset_peak()
        before, of_files = status.read("VmRSS"), status.read("RssFile")
        run()
        lost = max(0, of_files - status.read("RssFile"))
        found.append((lost, Memory(before, max(before, status.read("VmHWM")))))
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

"""Checks that run one after the other within a time limit; one that fails is recorded, and the rest still run."""

import contextlib
import dataclasses
import math
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

from benchmarks.case import Run
from benchmarks.fresh_process import REPOSITORY, describe
from benchmarks.results import Comparison

NO_TIME = "no time left"
_OURS = ("benchmarks", "lightning_attn")
_LONGEST_REASON = 300


class OutOfTimeError(BaseException):
    """The time limit of a check. Like an interrupt, it is no `Exception`, which code under test may catch."""


@dataclasses.dataclass(frozen=True)
class Check:
    """Something that is measured or compared.

    Attributes:
        name: Of its comparison.
        fill: Puts what it finds into the comparison as it finds it, so that an error or a limit loses only the rest.
        seconds: Roughly how long it takes: with less time left it does not start.
    """

    name: str
    fill: Callable[[Comparison], object]
    seconds: float = 1.0


def run_checks(checks: Iterable[Check], run: Run) -> Iterator[Comparison]:
    """The comparison of each check, in turn; those that an interrupted run has measured are taken from it."""
    for check in checks:
        found = run.earlier.get(check.name)
        if found is None:
            found = Comparison(check.name)
            _perform(check, found, run)
        yield found


def _perform(check: Check, found: Comparison, run: Run) -> None:
    left = run.time_left()
    if left < check.seconds:
        found.outcome, found.reason = "not run", NO_TIME
        return
    run.report(check.name)
    start = run.clock()
    try:
        with time_limit(left):
            check.fill(found)
    except OutOfTimeError:
        _end(found, "not run", f"{NO_TIME}: ended after {run.clock() - start:.0f} s")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in _OURS:
            _end(found, "failed", describe(error))
        else:
            _end(found, "not run", f"package {package} missing")
    except Exception as error:
        _end(found, "failed", f"{describe(error)[:_LONGEST_REASON]} ({_place(error)})")


def _end(found: Comparison, outcome: str, reason: str) -> None:
    """Sets the outcome of a check that did not come to its end; an incorrect value stays the outcome."""
    if found.outcome == "wrong":
        found.add_wrong(reason)
    else:
        found.outcome, found.reason = ("failed" if outcome == "failed" else "not run"), reason


def _place(error: BaseException) -> str:
    """The innermost line of this project that an exception came through."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename.startswith(str(REPOSITORY))] or list(frames)
    return f"{inside[-1].filename.removeprefix(f'{REPOSITORY}/')}:{inside[-1].lineno}"


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises an `OutOfTimeError` inside after so many seconds, as soon as Python runs; in the main thread only.

    A timer that was set before is set again afterwards.
    """
    if math.isinf(seconds) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    handler = signal.signal(signal.SIGALRM, stop)
    earlier, interval = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    start = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if earlier:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, earlier - (time.monotonic() - start)), interval)

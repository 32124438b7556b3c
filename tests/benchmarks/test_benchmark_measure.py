"""Times, memory and fresh processes; no time that is measured here is looked at."""

import dataclasses
import importlib
import json
import os
import signal
import time

import pytest
import torch

from benchmarks.fresh_process import FreshProcessError, in_fresh_process
from benchmarks.measure import peak_memory, timed_in_turn
from benchmarks.results import Comparison, Memory, Result, Side, Target, Timing, overlap, ratio
from lightning_attn.study.memory import PROCESS_STATUS


def side(*seconds, increase=None):
    memory = None if increase is None else Memory(before=500_000_000, peak=500_000_000 + increase)
    return Side(timing=Timing(seconds), memory=memory)


def test_median_and_quartiles():
    timing = Timing((5.0, 1.0, 4.0, 2.0, 3.0))
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)
    assert Timing((2.0,)).quartiles == (2.0, 2.0)


def test_ratio_of_medians_and_of_increases():
    slow, fast = side(6.0, 600.0, 5.0, increase=800), side(2.0, 3.0, 1.0, increase=100)
    assert ratio(slow, fast, "time") == 3.0
    assert ratio(slow, fast, "memory") == 8.0
    assert ratio(Side(error="fails"), fast, "time") is None
    assert ratio(slow, Side(error="fails"), "memory") is None
    assert ratio(None, fast, "time") is None


def test_overlap_of_the_middle_halves():
    assert overlap(side(1.0, 2.0, 3.0), side(1.8, 2.8, 4.0))
    assert not overlap(side(1.0, 2.0, 3.0), side(3.0, 4.0, 5.0))
    assert not overlap(Side(error="fails"), side(1.0))


@pytest.mark.parametrize(
    ("value", "at_least", "noise", "verdict"),
    [
        (3.0, True, False, "met"),
        (2.99, True, False, "not met"),
        (2.99, True, True, "met within noise"),
        (3.0, False, False, "met"),
        (3.01, False, False, "not met"),
        (None, True, True, "not measured"),
    ],
)
def test_verdict(value, at_least, noise, verdict):
    assert Target("x", value, 3.0, at_least=at_least, noise=noise).verdict == verdict


def test_rounds_interleave_and_the_order_turns():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = timed_in_turn(steps, repetitions=4)
    assert order[:9] == ["a"] * 3 + ["b"] * 3 + ["c"] * 3, "unmeasured runs come first"
    assert "".join(order[9:]) == "abc" + "bca" + "cab" + "abc"
    assert all(len(timing.seconds) == 4 for timing in timings.values())


def test_times_are_those_of_the_clock():
    now = iter(range(100))
    timings = timed_in_turn({"a": lambda: None}, repetitions=2, unmeasured=0, clock=lambda: float(next(now)))
    assert timings == {"a": Timing((1.0, 1.0))}


def test_what_is_not_right_is_not_timed():
    seen = {}

    def check(results):
        seen.update(results)
        return {"b": "wrong"}

    timings = timed_in_turn({"a": lambda: 1, "b": lambda: 2}, repetitions=2, check=check)
    assert seen == {"a": 1, "b": 2}
    assert timings["b"] == "wrong"
    assert len(timings["a"].seconds) == 2


def test_a_step_that_fails_is_reported_and_left_out():
    def failing():
        raise RuntimeError("sizes\n  do not match")

    timings = timed_in_turn({"bad": failing, "good": lambda: None}, repetitions=2)
    assert timings["bad"] == "RuntimeError: sizes do not match"
    assert len(timings["good"].seconds) == 2


def test_a_step_may_fail_later_too():
    turns = iter("ab")
    timings = timed_in_turn({"bad": lambda: next(turns)}, repetitions=5, unmeasured=0)
    assert timings == {"bad": "StopIteration"}


def test_the_budget_ends_the_rounds_after_the_least():
    count = []
    timings = timed_in_turn({"a": lambda: count.append(1)}, repetitions=50, budget=0.0, least=4)
    assert len(timings["a"].seconds) == 4


@pytest.mark.parametrize("exact", [True, False])
def test_peak_memory_sees_what_a_step_frees_again(exact):
    if not exact:
        pytest.importorskip("psutil")
    elif PROCESS_STATUS is None:
        pytest.skip("only Linux knows the peak of a process")
    status = PROCESS_STATUS if exact else None
    size = 100_000_000  # bytes; large enough to be mapped and unmapped by itself

    def step(size=size):
        tensor = torch.ones(size // 4)
        time.sleep(0.05)  # so that a thread that looks at the memory has a chance to see it
        del tensor

    memory, timing = peak_memory(step, status=status)
    assert 0.95 * size <= memory.increase < 1.5 * size
    assert len(timing.seconds) >= 2
    smaller, _ = peak_memory(lambda: step(size // 2), status=status)
    assert smaller.increase < 0.75 * size, "the peak of before is forgotten"


def test_pages_that_the_system_takes_away_do_not_hide_memory():
    class Status:
        """Of a process whose step needs 20 MB, while the system takes pages of its files."""

        files, lost, losses = 50_000_000, 0, iter([50_000_000, 45_000_000, 0])

        def reset_peak(self):
            self.files = 50_000_000

        def read(self, field):
            rss = 100_000_000
            return {"VmRSS": rss, "RssFile": self.files, "VmHWM": rss + 20_000_000 - self.lost}[field]

        def step(self):
            self.lost = next(self.losses)
            self.files -= self.lost

    status = Status()
    memory, timing = peak_memory(status.step, status=status)
    assert memory.increase == 20_000_000
    assert len(timing.seconds) == 3, "two were disturbed"


def test_the_peak_counts_from_its_reset():
    if PROCESS_STATUS is None:
        pytest.skip("only Linux knows the peak of a process")
    PROCESS_STATUS.reset_peak()
    assert PROCESS_STATUS.read("VmHWM") >= PROCESS_STATUS.read("VmRSS") > 10_000_000
    with pytest.raises(OSError, match="has no field VmNothing"):
        PROCESS_STATUS.read("VmNothing")


def test_a_function_is_called_in_a_fresh_process():
    assert in_fresh_process(os.getpid) != os.getpid()
    assert in_fresh_process(os.getenv, "OMP_NUM_THREADS", threads=3) == "3"


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (importlib.import_module, ["no_such_module"], "ModuleNotFoundError: No module named 'no_such_module'"),
        (os._exit, [3], "exit status 3"),
        (signal.raise_signal, [signal.SIGKILL], "ended by signal 9"),
    ],
)
def test_a_process_that_fails_says_why(function, arguments, message):
    with pytest.raises(FreshProcessError, match=message):
        in_fresh_process(function, *arguments)


def test_a_process_that_takes_too_long_is_ended():
    with pytest.raises(FreshProcessError, match="ended after 0 s"):
        in_fresh_process(time.sleep, 60, timeout=0.5)


def test_results_are_read_back_as_they_were_written():
    sides = {"a": side(1.0, 2.0, increase=10), "b": Side(error="fails")}
    comparison = Comparison("c", sides, 0.5, {"losses": [1.0]}, [Target("a / b", None, 1.0)])
    result = Result("x.y", "title", "sizes", {"height": 3}, [comparison])
    values = json.loads(json.dumps(dataclasses.asdict(result)))
    assert values["comparisons"][0]["targets"][0]["verdict"] == "not measured"
    assert Result.from_dict(values) == result

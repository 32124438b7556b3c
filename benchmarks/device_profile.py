"""Where the time of a step goes on the device: its kernels by time, and how much of the step the device is busy.

A figure that misses its target is explained by these tables. Steps are those of the sections attention and tasks.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.attention_shape import Shape
from benchmarks.case import Case, Run, Table
from benchmarks.checks import Check
from benchmarks.device import free_memory, on_gpu, synchronize
from benchmarks.device_attention import MAPS, measured, step_of
from benchmarks.device_correctness import outcome_notes
from benchmarks.device_tasks import NONE, build_faster_rcnn, build_translation, training_step
from benchmarks.device_tasks import Problem as NetworkProblem
from benchmarks.peers.attention import build_module
from benchmarks.results import Comparison, Result

_STEPS = 2  # that are profiled
_LISTED = 24  # kernels in the files
_SHOWN = 8  # in the table


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is profiled.

    Attributes:
        maps: Names of `Shape`s.
        images: In a batch of the detector.
        sentences: In a batch of the Transformer.
        small: Whether the networks are small ones, for a CPU.
    """

    maps: tuple[str, ...] = (f"{MAPS[0]}-bf16", f"{MAPS[3]}-bf16")
    images: int = 16
    sentences: int = 256
    small: bool = False

    def __str__(self) -> str:
        return f"attention at {', '.join(self.maps)}; {self.images} images; {self.sentences} sentences"


def checks(case: Case, run: Run) -> Iterator[Check]:
    """One for each step."""
    problem: Problem = case.problem
    steps: dict[str, Callable[[], Callable[[], object]]] = {}
    for shape in problem.maps:
        for side, terms in (("floor", "1111"), ("ours", "1111"), ("ours", "0110"), ("ours", "0011")):
            steps[f"{shape} {side} {terms}"] = partial(_attention_step, shape, side, terms)
    images = NetworkProblem((problem.images,))
    if problem.small:
        images = NetworkProblem((problem.images,), 64, 96, small=True)
    text = NetworkProblem((problem.sentences,), small=problem.small)
    for side in ("1111", "torch.nn.Transformer"):
        steps[f"translation {side}"] = partial(_network_step, build_translation, text, side, problem.sentences)
    for side in (NONE, "1111"):
        steps[f"detection {side}"] = partial(_network_step, build_faster_rcnn, images, side, problem.images)
    steps["deformable"] = partial(_attention_step, problem.maps[0], "ours", "deformable")
    for name, build in steps.items():
        yield Check(name, partial(_profile, build, run), seconds=6.0)


def _attention_step(shape: str, side: str, terms: str) -> Callable[[], object]:
    parsed = Shape.parse(shape)
    torch.manual_seed(1)
    x = parsed.tensor()
    return step_of(build_module(side, parsed, terms), x, torch.randn(x.shape), "bf16")


def _network_step(
    build: Callable[[NetworkProblem, str, int], Any], problem: NetworkProblem, side: str, batch: int
) -> Callable[[], object]:
    network, loss, _ = build(problem, side, batch)
    return training_step(network, loss)


def _profile(build: Callable[[], Callable[[], object]], run: Run, found: Comparison) -> None:
    step = build()
    for _ in range(3):
        step()
    synchronize()
    start = run.clock()
    step()
    sent = run.clock()
    synchronize()
    ended = run.clock()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu() else [])]
    with profile(activities=activities) as profiled:
        for _ in range(_STEPS):
            step()
        synchronize()
    events = profiled.key_averages()
    kind = "CUDA" if on_gpu() else "CPU"
    times = {
        event.key: (event.self_device_time_total if on_gpu() else event.self_cpu_time_total, event.count)
        for event in events
        if event.device_type.name == kind
    }
    ordered = sorted(times.items(), key=lambda item: -item[1][0])
    found.figures |= {
        "step, ms": 1e3 * (ended - start),
        "host, ms": 1e3 * (sent - start),
        "busy, ms": sum(value for value, _ in times.values()) / _STEPS / 1e3,
        "kernels": [
            {"name": name[:160], "ms": value / _STEPS / 1e3, "calls": count / _STEPS}
            for name, (value, count) in ordered[:_LISTED]
        ],
    }
    del step
    free_memory()


def table(result: Result) -> Table:
    """A line for each step, and one for each of its longest kernels."""
    cells = []
    for found in result.comparisons:
        if "kernels" not in found.figures:
            continue
        times = [f"{found.figures[name]:.3f}" for name in ("step, ms", "host, ms", "busy, ms")]
        cells.append([f"**{found.name}**", *times, ""])
        for kernel in found.figures["kernels"][:_SHOWN]:
            name = kernel["name"].replace("|", "/")[:100]
            cells.append([name, "", "", f"{kernel['ms']:.3f}", f"{kernel['calls']:.1f}"])
    header = ["step, and its longest kernels", "step ms", "host ms", "busy ms", "calls"]
    return Table(header, cells, outcome_notes(result))


_PROBLEM = Problem()

CASES = (
    Case(
        "device_check.profile.steps",
        "kernels of steps by time",
        measured(checks),
        _PROBLEM,
        table=table,
        quick={"problem": Problem(("1x64x5x6s1-bf16",), images=2, sentences=2, small=True)},
    ),
)

"""What a case of a benchmark is, and the two standard ways of measuring one."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.fresh_process import FreshProcessError, in_fresh_process
from benchmarks.measure import peak_memory, timed_in_turn
from benchmarks.results import Comparison, Result, Side, Target, Timing, ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Steps = Mapping[str, Callable[[], object]]
"""What the sides run, by their names."""


@dataclasses.dataclass(frozen=True)
class Run:
    """How cases are measured, all alike.

    Attributes:
        threads: Threads of the tensor operations.
        memory: Whether memory is measured too.
        report: Called with what is measured next.
        clock: Gives the time in seconds.
        isolate: Calls a function in a fresh process, as `in_fresh_process`.
        time_left: Seconds until the end of the run.
        earlier: What an interrupted run has measured of the case, by name.
    """

    threads: int = 2
    memory: bool = True
    report: Callable[[str], object] = lambda text: None
    clock: Callable[[], float] = time.perf_counter
    isolate: Callable[..., Any] = in_fresh_process
    time_left: Callable[[], float] = lambda: math.inf
    earlier: Mapping[str, Comparison] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Table:
    """A case's results as text.

    Attributes:
        header: Names of the columns.
        cells: The lines.
        notes: What is said below: targets and sentences.
        missed: Lines that missed a target.
    """

    header: Sequence[str]
    cells: Sequence[Sequence[str]]
    notes: Sequence[Target | str] = ()
    missed: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Case:
    """Something that is compared, and how.

    Attributes:
        name: `benchmark.case`.
        title: What is compared, in a line.
        measure: Yields its comparisons: `interleaved`, `in_processes` or a function of the case's own.
        problem: Sizes and settings, a frozen dataclass; its text is what results say of it. Fields whose metadata have
            the keywords of `ArgumentParser.add_argument` are options of the command line.
        complete: Completes a problem after these are set; raises a `ValueError` for what cannot be measured.
        build: Makes the steps of all sides that are named, on the same input. A function that its module has by name,
            for fresh processes to find.
        sides: What is compared.
        further_sides: What can be compared if it is asked for.
        base: The side that the others are divided by, which is always measured; None for none.
        difference: How far what a side's step returned, plain values, lies from what the base's did, relative to the
            largest value. It is asked before any side is timed; None where the sides do not compute the same.
        tolerance: A side that differs by more is not timed.
        rates: Further columns: a figure from the problem and the median seconds.
        bounds: At most what a side's time divided by the base's should be.
        peaks: At most what a side's process should need, in GB.
        judge: Sets the targets of a result in place of these two.
        table: Makes the table; None for one line a side.
        notes: Sentences below the table.
        repetitions: Measured rounds, or processes of each side, at most.
        budget: Seconds after which no further round starts.
        unmeasured: Runs of each step before the first round.
        steps: Steps of a process whose memory is measured.
        memory: Whether `interleaved` measures the memory of each side, in a fresh process.
        only_memory: Whether there is nothing to measure without memory.
        needs: Modules to be installed for it.
        by_default: Whether it runs if no case is named.
        quick: Fields of its quick variant, of all that differ.
    """

    name: str
    title: str
    measure: Callable[["Case", Run], Iterator[Comparison]]
    problem: Any
    complete: Callable[[Any], Any] = lambda problem: problem
    build: Callable[[Any, Sequence[str]], Steps] | None = None
    sides: tuple[str, ...] = ()
    further_sides: tuple[str, ...] = ()
    base: str | None = None
    difference: Callable[[Any, Any], float] | None = None
    tolerance: float = 0.0
    rates: Mapping[str, Callable[[Mapping[str, Any], float], float]] = dataclasses.field(default_factory=dict)
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    peaks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    judge: Callable[[Result], None] | None = None
    table: Callable[[Result], Table] | None = None
    notes: Callable[[Result], Sequence[str]] = lambda result: ()
    repetitions: int = 9
    budget: float = math.inf
    unmeasured: int = 3
    steps: int = 2
    memory: bool = False
    only_memory: bool = False
    needs: tuple[str, ...] = ()
    by_default: bool = True
    quick: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def measured_sides(self) -> tuple[str, ...]:
        """The sides, the base first."""
        return tuple(dict.fromkeys(([] if self.base is None else [self.base]) + list(self.sides)))

    def set_targets(self, result: Result) -> None:
        """Sets the figures of a result beside their bounds."""
        if self.judge is not None:
            self.judge(result)
            return
        for comparison in result.comparisons:
            for name, side in comparison.sides.items():
                if name in self.bounds:
                    value = ratio(side, comparison.sides.get(self.base or ""), "time")
                    comparison.targets.append(Target(f"{name} / {self.base}", value, self.bounds[name]))
                if name in self.peaks:
                    peak = None if side.memory is None else side.memory.peak / 1e9
                    comparison.targets.append(Target(f"{name}, GB", peak, self.peaks[name]))


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Cases of one subject, whose results are written together.

    Attributes:
        name: Of its module and its files.
        title: Of its report.
        description: What it measures and against what.
        method: How, for the reader of the results.
        cases: Its cases.
        packages: Distributions whose versions the figures depend on, beside torch, torchvision and Lightning.
        find: Cases by a name that none of `cases` has; raises a `ValueError` for what is no case.
        draw: Makes a figure of results, if there is anything to draw.
        command: Runs it from a command line of its own; None for that of all benchmarks, `runner.main`.
    """

    name: str
    title: str
    description: str
    method: str
    cases: tuple[Case, ...]
    packages: tuple[str, ...] = ()
    find: Callable[[str], Sequence[Case]] | None = None
    draw: Callable[[Sequence[Result]], "Figure | None"] | None = None
    command: Callable[[Sequence[str]], object] | None = None

    def cases_named(self, name: str) -> Sequence[Case]:
        """The cases of a name, which may leave out the benchmark's.

        Raises:
            ValueError: If there is none.
        """
        short = name.removeprefix(f"{self.name}.")
        found = [case for case in self.cases if case.name == f"{self.name}.{short}"]
        if found:
            return found
        if self.find is not None:
            return self.find(short)
        known = ",".join(case.name.removeprefix(f"{self.name}.") for case in self.cases)
        raise ValueError(f"{self.name} has no case {short}: there are {known}")


def no_targets(result: Result) -> None:
    """A judge for quick variants: bounds are those of the full problem."""


def interleaved(case: Case, run: Run) -> Iterator[Comparison]:
    """Times all sides in turn in this process, once they are found to compute the same, then their memory."""
    assert case.build is not None
    sides, comparison = case.measured_sides(), Comparison()
    run.report("time")

    def check(results: Mapping[str, object]) -> Mapping[str, str]:
        errors: dict[str, str] = {}
        if case.difference is not None and sides[0] in results:
            comparison.figures["results"] = {side: results[side] for side in sides if side in results}
            for side, result in comparison.figures["results"].items():
                difference = case.difference(results[sides[0]], result)
                if difference <= case.tolerance:
                    comparison.difference = max(difference, comparison.difference or 0.0)
                else:  # NaN too
                    errors[side] = f"wrong: {difference:.1g} of the largest value away from {case.base}"
        return errors

    timings = timed_in_turn(
        case.build(case.problem, sides),
        repetitions=case.repetitions,
        budget=case.budget,
        unmeasured=case.unmeasured,
        check=check,
        clock=run.clock,
    )
    comparison.sides = {name: Side.of(timing) for name, timing in timings.items()}
    for name, side in comparison.sides.items():
        if case.memory and run.memory and side.timing is not None and name in sides:
            run.report(f"memory of {name}")
            cost = cost_in_process(case, name, run)
            side.memory, side.error = cost.memory, cost.error
    yield comparison


def in_processes(case: Case, run: Run) -> Iterator[Comparison]:
    """Runs sides that are too large to take turns in one process in processes of their own, which take turns.

    The time of a side is that of its steps in all processes but the first step of each; its memory is the largest peak.
    """
    comparison = Comparison()
    for turn in range(case.repetitions):
        for name in case.measured_sides():
            run.report(f"{name}, process {turn + 1} of {case.repetitions}")
            earlier, cost = comparison.sides.get(name, Side()), cost_in_process(case, name, run)
            comparison.sides[name] = cost if cost.error else put_together(earlier, cost)
    yield comparison


def put_together(earlier: Side, cost: Side) -> Side:
    """A side's cost in processes so far and in one more."""
    assert cost.timing is not None
    assert cost.memory is not None
    before = () if earlier.timing is None else earlier.timing.seconds
    peaks = [memory for memory in (earlier.memory, cost.memory) if memory is not None]
    seconds = cost.timing.seconds[1:] or cost.timing.seconds
    return Side(Timing(before + seconds), max(peaks, key=lambda memory: memory.peak))


def cost_in_process(case: Case, side: str, run: Run) -> Side:
    """Memory of a side in a fresh process and the time of its steps, or the error that it ended with."""
    [cost] = costs_in_process(case, [(case.problem, case.steps, None)], side, run)
    return cost


def costs_in_process(
    case: Case, problems: Sequence[tuple[Any, int, Any]], side: str, run: Run, limit: int | None = None
) -> list[Side]:
    """The same for several problems one after the other in one process.

    Args:
        case: Which.
        problems: For each the number of its steps, and the problem of one step before them, or None.
        side: Which.
        run: How.
        limit: Bytes of data that the process may allocate.
    """
    try:
        found: list[Side] = run.isolate(
            measure_costs, case.build, problems, side, threads=run.threads, limit=limit, timeout=1800.0
        )
    except FreshProcessError as error:
        return [Side(error=str(error)) for _ in problems]
    return found


def measure_costs(
    build: Callable[[Any, Sequence[str]], Steps], problems: Sequence[tuple[Any, int, Any]], side: str
) -> list[Side]:
    """What `costs_in_process` asks of its fresh process."""
    found = []
    for problem, steps, small in problems:
        warm_up = None if small is None else build(small, [side])[side]
        memory, timing = peak_memory(build(problem, [side])[side], steps=steps, warm_up=warm_up)
        found.append(Side(timing, memory))
    return found

"""What attention costs on the device, forward and backward, eager and as a replayed graph, beside its peers.

The floor is E1 alone by torch's fused attention between the same projections (`benchmarks/peers/attention.py`). mmcv's
module is the authors'; where it is not installed its column says so. Sides run in turn on the same input. Values at
these sizes are compared with `algorithm="dense"` in float64 on the device.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from benchmarks.attention_shape import HEADS, Shape
from benchmarks.case import Case, Run, Table
from benchmarks.checks import Check, run_checks
from benchmarks.device import autocast, device, free_memory, graphed, on_gpu, peak_memory, synchronized, without_tf32
from benchmarks.device_behaviour import convolution_algorithms
from benchmarks.device_correctness import TOLERANCE, outcome_notes
from benchmarks.fresh_process import describe
from benchmarks.measure import timed_in_turn
from benchmarks.peers.attention import build_module
from benchmarks.report import milliseconds
from benchmarks.results import Comparison, Result, Side, Target, ratio
from lightning_attn.attention import DeformableConv, DynamicConv, GatedResidual, TransformerAttention, deformable
from lightning_attn.attention.spec import TERM_SETS

GRAPH, EAGER = "", " eager"
"""What follows the name of a side: a replayed graph has the plain name."""

MAPS = ("2x256x50x84s1", "2x256x50x84s2", "2x512x25x42s1", "2x512x96x96s1")
SENTENCES = ("sentences:128x30x512", "sentences:8x512x512")

# At most our time divided by the floor's, asked for and aimed at, of all four maps in bfloat16 (on an H100).
FLOOR: Mapping[str, tuple[float, float | None]] = {
    "1111": (1.6, 1.2),
    **dict.fromkeys(("0111", "0110", "0101", "0100"), (1.6, 1.0)),
    **dict.fromkeys(("0011", "0001"), (0.5, None)),
    "0010": (0.2, None),
}
MMCV_SPEED, MMCV_MEMORY = (10.0, 20.0), 20.0  # at least, of 1111 on the first map
DEFORMABLE = (1.5, 3.0)  # torchvision's time divided by ours, at least
DYNAMIC = (4.0, 1.0)  # dynamic 31x31's time divided by that of 1111, at most


@dataclasses.dataclass(frozen=True)
class Problem:
    """Attention at one size.

    Attributes:
        shape: Name of its `Shape`; bfloat16 by autocast with `-bf16`.
        sets: Term sets.
        causal: Whether later keys are hidden.
        mmcv: Term sets that mmcv's module is measured in; it is wrong with E2 without E4.
        rounds: Measured rounds.
    """

    shape: str
    sets: tuple[str, ...] = tuple(reversed(TERM_SETS))
    causal: bool = False
    mmcv: tuple[str, ...] = ()
    rounds: int = 15

    def __str__(self) -> str:
        return f"{Shape.parse(self.shape).describe()}{', causal' if self.causal else ''}"

    @property
    def precision(self) -> str:
        """A name of `device.PRECISIONS`."""
        return "bf16" if Shape.parse(self.shape).bfloat16 else "float32"


def step_of(module: nn.Module, x: Tensor, gradient: Tensor, precision: str) -> Callable[[], tuple[Tensor, ...]]:
    """A step forward and backward, which returns the output and the gradients of input and parameters."""
    module = module.to(device())
    leaf = x.detach().to(device()).requires_grad_()
    gradient = gradient.to(device())
    leaves = [leaf, *module.parameters()]

    def step() -> tuple[Tensor, ...]:
        with autocast(precision):
            out = module(leaf)
        return (out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out.dtype)))

    return step


def time_sides(
    found: Comparison,
    builds: Mapping[str, Callable[[], nn.Module]],
    x: Tensor,
    precision: str,
    *,
    rounds: int,
    run: Run,
    budget: float = 3.0,
) -> None:
    """Times sides in turn, eager and as graphs, and measures their memory; a side that fails says so.

    Args:
        found: Gets the sides: by the names of `builds` those of graphs, and with `EAGER` behind the others.
        builds: Modules by name.
        x: Input of all.
        precision: Of `device.PRECISIONS`.
        rounds: Measured rounds.
        run: How; its memory says whether that is measured.
        budget: Seconds after which no further round starts.
    """
    gradient = torch.randn(x.shape)
    steps: dict[str, Callable[[], object]] = {}
    for name, build in builds.items():
        try:
            step = step_of(build(), x, gradient, precision)
            step()
        except ModuleNotFoundError as error:
            found.sides[name] = Side(error=f"absent: package {(error.name or '').partition('.')[0]} missing")
            continue
        except Exception as error:  # a side that fails is a result
            found.sides[name + EAGER] = Side(error=describe(error)[:200])
            continue
        memory = peak_memory(step) if run.memory else None
        found.sides[name + EAGER] = Side(memory=memory)
        steps[name + EAGER] = synchronized(step)
        if on_gpu():
            try:
                steps[name + GRAPH] = synchronized(graphed(step))
            except Exception as error:
                found.sides[name + GRAPH] = Side(error=f"no graph: {describe(error)[:160]}")
    timings = timed_in_turn(steps, repetitions=rounds, budget=budget, unmeasured=3, clock=run.clock)
    for name, timing in timings.items():
        memory = found.sides.get(name, Side()).memory
        found.sides[name] = dataclasses.replace(Side.of(timing), memory=memory)
    steps.clear()
    free_memory()


def set_checks(case: Case, run: Run) -> Iterator[Check]:
    """Ours and the floor under every term set."""
    for terms in case.problem.sets:
        yield Check(terms, partial(_measure_set, case.problem, terms, run), seconds=3.0)


def _measure_set(problem: Problem, terms: str, run: Run, found: Comparison) -> None:
    shape = Shape.parse(problem.shape)
    sides = ["ours", "floor", *(["mmcv"] if terms in problem.mmcv else [])]
    builds = {side: partial(build_module, side, shape, terms, causal=problem.causal) for side in sides}
    torch.manual_seed(1)
    time_sides(found, builds, shape.tensor(), problem.precision, rounds=problem.rounds, run=run)
    _compare_values(problem, builds["ours"], found)
    free_memory()


@torch.no_grad()
def _compare_values(problem: Problem, build: Callable[[], nn.Module], found: Comparison) -> None:
    """The output of one sample beside the dense algorithm in float64 on the device."""
    shape = Shape.parse(problem.shape)
    torch.manual_seed(2)
    x = dataclasses.replace(shape, batch=1).tensor().to(device())
    module = build().to(device()).eval()
    with without_tf32(), autocast(problem.precision):
        value = module(x)
    definition = build().to(device()).double().eval()
    inner = definition.attention if isinstance(definition, GatedResidual) else definition
    assert isinstance(inner, TransformerAttention)
    inner.algorithm = "dense"
    try:
        expected = definition(x.double())
    except torch.OutOfMemoryError:
        found.figures["error"] = "too large for float64"
        return
    found.figures["error"] = error = relative_error(value, expected)
    if not error <= TOLERANCE[problem.precision]:
        found.add_wrong(f"the output is {error:.1e} of the largest value away from float64")


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference divided by the largest value; 1e9 for what is not finite, which JSON cannot hold."""
    error = float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
    return error if error < 1e9 else 1e9


# --- Windows, deformable and dynamic convolution ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class WindowProblem(Problem):
    """Attention in windows.

    Attributes:
        windows: Their widths.
    """

    windows: tuple[int, ...] = (13, 31)


def window_checks(case: Case, run: Run) -> Iterator[Check]:
    """Windows beside a plain unfold, and beside the fused attention with E1 alone and a mask."""
    problem: WindowProblem = case.problem
    for window in problem.windows:
        for terms in problem.sets:
            fill = partial(_measure_window, problem, terms, window, run)
            yield Check(f"window {window} {terms}", fill, seconds=4.0)


def _measure_window(problem: WindowProblem, terms: str, window: int, run: Run, found: Comparison) -> None:
    shape = Shape.parse(problem.shape)
    builds = {side: partial(build_module, side, shape, terms, window=window) for side in ("ours", "floor", "unfold")}
    torch.manual_seed(1)
    x = shape.tensor()
    time_sides(found, builds, x, problem.precision, rounds=problem.rounds, run=run)
    with torch.no_grad(), without_tf32(), autocast(problem.precision):
        ours, theirs = (builds[side]().to(device())(x.to(device())) for side in ("ours", "unfold"))
    found.difference = error = relative_error(ours, theirs)
    if not error <= 2 * TOLERANCE[problem.precision]:  # both are rounded
        found.add_wrong(f"the output is {error:.1e} of the largest value away from the unfolded one")


@dataclasses.dataclass(frozen=True)
class ConvolutionProblem(Problem):
    """Deformable and dynamic convolution.

    Attributes:
        kernels: Widths of the dynamic convolution's kernels.
    """

    kernels: tuple[int, ...] = (31, 13, 3)


def convolution_checks(case: Case, run: Run) -> Iterator[Check]:
    """Deformable convolution beside torchvision's operator, and dynamic convolution beside 1111."""
    problem: ConvolutionProblem = case.problem
    yield Check("deformable 3x3", partial(_measure_deformable, problem, run), seconds=4.0)
    for kernel in problem.kernels:
        yield Check(f"dynamic {kernel}x{kernel}", partial(_measure_dynamic, problem, kernel, run), seconds=4.0)


def _with_algorithm(build: Callable[[], nn.Module], algorithm: str) -> nn.Module:
    module = build()
    assert isinstance(module, DeformableConv | DynamicConv)
    module.algorithm = algorithm  # type: ignore[assignment]  # of those that there are
    return module


def _measure_deformable(problem: ConvolutionProblem, run: Run, found: Comparison) -> None:
    shape = Shape.parse(problem.shape)
    ours = partial(build_module, "ours", shape, "deformable")
    builds: dict[str, Callable[[], nn.Module]] = {"ours": ours}
    builds |= {side: partial(build_module, side, shape, "deformable") for side in ("torchvision", "floor")}
    for name in (one for one in get_args(deformable.Algorithm) if one not in ("auto", "reference")):
        builds[f"ours {name}"] = partial(_with_algorithm, ours, name)
    torch.manual_seed(1)
    time_sides(found, builds, shape.tensor(), problem.precision, rounds=problem.rounds, run=run, budget=6.0)


def _measure_dynamic(problem: ConvolutionProblem, kernel: int, run: Run, found: Comparison) -> None:
    shape = Shape.parse(problem.shape)
    ours = partial(DynamicConv, shape.channels, kernel, ndim=2)
    builds: dict[str, Callable[[], nn.Module]] = {
        "ours": ours,
        "1111": partial(TransformerAttention, shape.channels, HEADS, "1111", ndim=2),
    }
    algorithms = convolution_algorithms("dynamic", 2)
    if len(algorithms) > 1:
        builds |= {f"ours {name}": partial(_with_algorithm, ours, name) for name in algorithms}
    torch.manual_seed(1)
    time_sides(found, builds, shape.tensor(), problem.precision, rounds=problem.rounds, run=run, budget=6.0)


# --- Targets and tables ----------------------------------------------------------------------------------------------


def device_ratio(found: Comparison, one: str, other: str) -> tuple[str, float | None]:
    """One side's time divided by another's: of graphs where both have one, else eager; and which it is."""
    by_graph = ratio(found.sides.get(one + GRAPH), found.sides.get(other + GRAPH), "time")
    if by_graph is not None:
        return "graph", by_graph
    return "eager", ratio(found.sides.get(one + EAGER), found.sides.get(other + EAGER), "time")


def bounded(name: str, value: float | None, bound: float, aim: float | None, *, at_least: bool = False) -> list[Target]:
    """A figure beside what is asked for and, where there is more, what is aimed at."""
    targets = [Target(name, value, bound, at_least)]
    return targets if aim is None else [*targets, Target(f"{name}, aim", value, aim, at_least)]


def judge_sets(result: Result) -> None:
    """Ours beside the floor, and 1111 beside mmcv's module on the first map."""
    shape = result.problem["shape"]
    if shape not in {f"{name}-bf16" for name in MAPS}:
        return
    for found in result.comparisons:
        if found.outcome not in ("measured", "wrong"):
            continue
        found.targets = []
        if found.name in FLOOR:
            way, value = device_ratio(found, "ours", "floor")
            found.targets += bounded(f"{shape} {found.name}: ours / floor ({way})", value, *FLOOR[found.name])
        if shape == f"{MAPS[0]}-bf16" and found.name == "1111":
            way, value = device_ratio(found, "mmcv", "ours")
            name = f"{shape} 1111: mmcv / ours ({way})"
            found.targets += bounded(name, value, *MMCV_SPEED, at_least=True)
            less = ratio(found.sides.get("mmcv" + EAGER), found.sides.get("ours" + EAGER), "memory")
            found.targets.append(Target(f"{shape} 1111: memory mmcv / ours", less, MMCV_MEMORY, at_least=True))


def judge_convolutions(result: Result) -> None:
    """Deformable beside torchvision's, and dynamic 31x31 beside 1111."""
    shape = result.problem["shape"]
    for found in result.comparisons if shape == f"{MAPS[0]}-bf16" else ():
        if found.outcome not in ("measured", "wrong"):
            continue
        if found.name == "deformable 3x3":
            way, value = device_ratio(found, "torchvision", "ours")
            name = f"{shape} deformable: torchvision / ours ({way})"
            found.targets = bounded(name, value, *DEFORMABLE, at_least=True)
        if found.name == "dynamic 31x31":
            way, value = device_ratio(found, "ours", "1111")
            found.targets = bounded(f"{shape} dynamic 31x31 / 1111 ({way})", value, *DYNAMIC)


def table(result: Result) -> Table:
    """A line for each comparison: times of every side, ours beside the others, memory, and the error of values."""
    rows = result.comparisons
    names = list(dict.fromkeys(side for row in rows for side in row.sides))
    timed = [name for name in names if any(row.sides.get(name, Side()).timing is not None for row in rows)]
    weighed = [name for name in names if any(row.sides.get(name, Side()).memory is not None for row in rows)]
    plain = list(dict.fromkeys(name.removesuffix(EAGER) for name in timed))
    others = [name for name in plain if name != "ours" and not name.startswith("ours ")] if "ours" in plain else []
    header = ["", *(f"{name} ms" for name in timed), *(f"ours / {name}" for name in others)]
    header += [f"{name.removesuffix(EAGER)} MB" for name in weighed]
    header += ["error"] if any("error" in row.figures or row.difference is not None for row in rows) else []
    cells = []
    for row in rows:
        line = [row.name, *(_milliseconds(row.sides.get(name)) for name in timed)]
        for name in others:
            _, value = device_ratio(row, "ours", name)
            line.append("" if value is None else f"{value:.2f}")
        line += [_megabytes(row.sides.get(name)) for name in weighed]
        if "error" in header:
            error = row.figures.get("error", row.difference)
            line.append(f"{error:.1e}" if isinstance(error, float) else str(error or ""))
        cells.append(line)
    targets = [target for row in rows for target in row.targets]
    return Table(header, cells, [*targets, *_errors_of_sides(rows), *outcome_notes(result)])


def _milliseconds(side: Side | None) -> str:
    return "" if side is None or side.timing is None else milliseconds(side.timing.median)


def _megabytes(side: Side | None) -> str:
    return "" if side is None or side.memory is None else f"{side.memory.increase / 2**20:.0f}"


def _errors_of_sides(rows: Sequence[Comparison]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for name, side in row.sides.items():
            if side.error is not None:
                reasons.setdefault(f"{name.strip()}: {side.error}", []).append(row.name)
    return [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]


def measured(checks: Callable[[Case, Run], Iterator[Check]]) -> Callable[[Case, Run], Iterator[Comparison]]:
    """The `measure` of a case that consists of checks."""
    return lambda case, run: run_checks(checks(case, run), run)


def _case(shape: str, problem: Problem, quick: str) -> Case:
    name = shape.replace("sentences:", "sentences-") + ("-causal" if problem.causal else "")
    small = dataclasses.replace(problem, shape=quick, sets=("1111", "0011"), rounds=3)
    return Case(
        f"device_check.attention.{name}",
        "forward and backward pass of every set",
        measured(set_checks),
        problem,
        judge=judge_sets,
        table=table,
        quick={"problem": small},
    )


def _cases(suffix: str) -> Iterator[Case]:
    bf16 = suffix == "-bf16"
    for shape in MAPS:
        mmcv = ("1111", "1000", "0011", "0010") if shape == MAPS[0] else ()
        yield _case(shape + suffix, Problem(shape + suffix, mmcv=mmcv), f"1x64x5x6{shape[-2:]}{suffix}")
    for shape in SENTENCES:
        yield _case(shape + suffix, Problem(shape + suffix), f"sentences:2x7x64{suffix}")
    if bf16:
        problem = Problem(SENTENCES[0] + suffix, sets=("1111", "0111", "0011", "0010"), causal=True)
        yield _case(SENTENCES[0] + suffix, problem, f"sentences:2x7x64{suffix}")
    windows = WindowProblem(MAPS[0] + suffix, sets=("1111", "0100"))
    yield Case(
        f"device_check.attention.windows{suffix}",
        "windows beside a plain unfold, and beside E1 with a mask",
        measured(window_checks),
        windows,
        table=table,
        quick={"problem": dataclasses.replace(windows, shape=f"1x64x6x7s1{suffix}", windows=(3,), rounds=3)},
    )
    convolutions = ConvolutionProblem(MAPS[0] + suffix, sets=())
    small = dataclasses.replace(convolutions, shape=f"1x64x6x7s1{suffix}", kernels=(31,), rounds=3)
    yield Case(
        f"device_check.attention.convolutions{suffix}",
        "deformable convolution beside torchvision's, dynamic beside 1111",
        measured(convolution_checks),
        convolutions,
        judge=judge_convolutions,
        table=table,
        quick={"problem": small},
    )


CASES = (*_cases("-bf16"), *_cases(""))

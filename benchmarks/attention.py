"""Time and peak memory of every attention beside its peers, forward and backward, on this machine.

The peers are the authors' released module (mmcv's ``GeneralizedAttention``), the plain way of computing it,
torchvision's deformable convolution, and as the floor torch's ``scaled_dot_product_attention`` with E1 alone between
the same projections. Choose with ``--cases`` and ``--sets``:

    python -m benchmarks.attention --cases 256x50x84s2 --sets 1111,0001 --no-memory
    python -m benchmarks.attention --cases small --threads 1

A case is a map ``CxHxWsS`` (channels, height, width, stride of keys and values) or ``BxCxHxWsS``, ``sentences:BxLxC``,
each with ``-bf16`` for autocast to bfloat16 (any values), ``growth`` (three sizes, each of four times the tokens of the
one before), ``deformable`` (a 3x3 convolution), or ``small`` or ``large`` for all of ours of that kind;
``growth:CxHxWsS`` and ``deformable:CxHxW`` set their size. Sides run in turn in one process with the same input,
weights and gradient of the output. Memory is that of a fresh process for each side; small cases have none.
``--report FILE...`` makes tables and figure again from files.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.attention_shape import Shape, terms_and_size
from benchmarks.case import Benchmark, Case, Run, Steps, Table, costs_in_process
from benchmarks.fresh_process import describe
from benchmarks.measure import timed_in_turn
from benchmarks.peers.attention import build_module
from benchmarks.report import milliseconds
from benchmarks.results import Comparison, Result, Side, Target, overlap, ratio
from benchmarks.runner import comma_separated, run_as_command
from lightning_attn.attention.spec import TERM_SETS, parse_terms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUICK_SETS = ("1111", "1000", "0100", "0011", "0010", "0001")
LARGE_CASES = ("256x50x84s2", "512x25x42s2", "256x50x84s1", "512x96x96s1", "growth", "deformable")
SMALL_CASES = (
    "512x7x7s1",
    "256x14x14s1",
    "8x384x14x14s1",
    "8x384x14x14s1-bf16",
    "sentences:64x25x512",
    "sentences:64x25x512-bf16",
)
GROWTH_SETS = ("1111", "0011", "0010")
GROWTH_DEFAULT, DEFORMABLE_DEFAULT = "256x25x42s2", "256x50x84"
PEERS = ("mmcv", "torchvision", "naive")
"""The first of them that a comparison has is the one that it is about."""

# The least that is asked for: mmcv's time divided by ours, by case and term set; of all others, that no peer is faster.
SPEED = {
    "256x50x84s2": dict.fromkeys(("1111", "1101", "1011", "1001"), 3.0)
    | dict.fromkeys(("1000", "1010", "0101", "0111"), 2.5)
    | dict.fromkeys(("0001", "0011"), 9.0),
    "256x50x84s1": {"1111": 3.0},
}
NOT_SLOWER = 0.95  # a peer's time divided by ours: less is more than noise
# Our time divided by the floor's, at most.
FLOOR = {
    "256x50x84s2": {"1111": 1.4, "0111": 1.15},
    "256x50x84s1": {"1111": 1.25},
    "512x25x42s2": {"1111": 1.5},
}
MEMORY = {"256x50x84s1": {"1111": 8.0}}  # mmcv's increase divided by ours, at least
PEAK_GB = {"512x96x96s1": 4.0}  # the whole process, every set
GROWTH_TIME = {"0010": 4.6, "0011": 9.0, "1111": 18.0}  # for four times the tokens
GROWTH_MEMORY = {"0010": 4.6, "0011": 8.5, "1111": 8.5}
DEFORMABLE = 4.0
# Of outputs and gradients, relative to the largest: float32 through thousands of sums, and eight bits of bfloat16.
TOLERANCE, TOLERANCE_BFLOAT16 = 1e-4, 5e-2


@dataclasses.dataclass(frozen=True)
class Problem:
    """One attention at one size.

    Attributes:
        shape: Of its input.
        terms: Its term set, or `deformable` for a deformable convolution in its place.
    """

    shape: Shape
    terms: str

    def resized(self, shape: Shape) -> "Problem":
        """The same at another size."""
        return dataclasses.replace(self, shape=shape)

    @property
    def needed_by_peer(self) -> int:
        """Roughly the bytes that mmcv adds at its peak: three to four N_q x N_k maps, save for E3 alone."""
        return 0 if self.terms in ("deformable", "0010") else 4 * self.shape.energy_bytes

    @property
    def twin(self) -> str | None:
        """The set that is compared with instead where mmcv fails, E2 without E4: the same with E4."""
        if self.terms == "deformable":
            return None
        _, e2, _, e4 = parse_terms(self.terms)
        return self.terms[:-1] + "1" if e2 and not e4 else None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a case compares.

    Attributes:
        sizes: Names of shapes.
        sets: Term sets; of several sizes, those of `GROWTH_SETS` if there are any.
        deformable: Whether it is about the deformable convolution in their place.
        rounds: Of one repetition: many where steps take milliseconds.
        large_peers: Whether peers run that need most of the machine.
        alone_bytes: A peer that needs more runs once, alone, in a process with a limit.
        free_bytes: How much it may need; None for what is free then.
    """

    sizes: tuple[str, ...]
    sets: tuple[str, ...] = dataclasses.field(
        default=tuple(reversed(TERM_SETS)),
        metadata={"type": comma_separated, "help": "term sets with commas between; all by default"},
    )
    deformable: bool = False
    rounds: int = 1
    large_peers: bool = True
    alone_bytes: float = 2.5e9
    free_bytes: int | None = None

    def __post_init__(self) -> None:
        for terms in self.sets:
            parse_terms(terms)

    def __str__(self) -> str:
        return ", ".join(self.sizes)

    def problems(self) -> dict[str, Problem]:
        """The attentions by the names of their comparisons."""
        if len(self.sizes) == 1:
            shape = Shape.parse(self.sizes[0])
            return {terms: Problem(shape, terms) for terms in (("deformable",) if self.deformable else self.sets)}
        sets = [terms for terms in self.sets if terms in GROWTH_SETS] or self.sets
        return {f"{terms} at {size}": Problem(Shape.parse(size), terms) for terms in sets for size in self.sizes}


def training_step(module: nn.Module, x: Tensor, gradient: Tensor, bfloat16: bool) -> Callable[[], tuple[Tensor, ...]]:
    """A step forward and backward; returns the output, then the gradients of the input and of all parameters."""
    x = x.detach().requires_grad_()
    leaves = [x, *module.parameters()]

    def step() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            out = module(x)
        return (out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out.dtype)))

    return step


def build_steps(problem: Problem, sides: Sequence[str]) -> Steps:
    """Steps of sides with the same input and gradient; the side `twin` is ours with another set."""
    shape = problem.shape
    torch.manual_seed(1)
    x, gradient = shape.tensor(), shape.tensor()
    modules = {
        side: build_module("ours", shape, problem.twin or "")
        if side == "twin"
        else build_module(side, shape, problem.terms)
        for side in sides
    }
    return {side: training_step(module, x, gradient, shape.bfloat16) for side, module in modules.items()}


def compare(build: Callable[[Any, Sequence[str]], Steps], problem: Problem, peer: str) -> float | str:
    """How far output and input gradient of the peer lie from ours, relative to their largest value; or its error.

    At the size of the problem, or one of the same form that is small enough to take no time.
    """
    while problem.shape.energy_bytes > 2e8:
        problem = problem.resized(problem.shape.scaled(0.5))
    ours: Any = build(problem, ["ours"])["ours"]()
    try:
        theirs: Any = build(problem, [peer])[peer]()
    except Exception as error:  # a peer that fails is a result
        return describe(error)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(ours[:2], theirs[:2], strict=True))


def measure(case: Case, run: Run) -> Iterator[Comparison]:
    """The comparisons of a case, each once its time is measured; their memory is added in the end."""
    plan: Plan = case.problem
    problems = plan.problems()
    found: dict[str, Comparison] = {}
    for number, (name, problem) in enumerate(problems.items()):
        run.report(f"{name} ({number + 1} of {len(problems)})")
        same_size = (found[other].sides for other in found if problems[other].shape == problem.shape)
        floor = next((sides["floor"] for sides in same_size), None)
        found[name] = measure_time(case, name, problem, run, floor)
        yield found[name]
    if case.memory and run.memory:
        run.report("memory")
        for shape in dict.fromkeys(problem.shape for problem in problems.values()):
            _add_memory(case, {problems[name]: found[name] for name in found if problems[name].shape == shape}, run)


def measure_time(case: Case, name: str, problem: Problem, run: Run, floor: Side | None = None) -> Comparison:
    """Times all sides of one attention in turn, once the peers' results have been found to be ours.

    Args:
        case: Whose.
        name: Of the comparison.
        problem: Which attention.
        run: How.
        floor: Of the same size; where the peer is so large that it runs alone, it is not measured again.
    """
    plan: Plan = case.problem
    assert case.build is not None
    peers = _peers(plan, problem)
    found = Comparison(name)
    alone = problem.needed_by_peer > plan.alone_bytes
    sides = ["ours", "floor"]
    for peer in peers:
        difference = compare(case.build, problem, peer)
        if isinstance(difference, str):
            found.sides[peer] = Side(error=f"fails: {difference}")
        elif not difference <= (TOLERANCE_BFLOAT16 if problem.shape.bfloat16 else TOLERANCE):  # NaN too
            found.sides[peer] = Side(
                error=f"wrong: {difference:.1g} of the largest value away from ours, which the tests hold to the "
                "definition"
            )
        else:
            found.difference = max(difference, found.difference or 0.0)
            if not alone:
                sides.append(peer)
    if "mmcv" in found.sides and problem.twin is not None and not alone:
        sides.append("twin")
    if alone and floor is not None:
        found.sides["floor"] = dataclasses.replace(floor)
        sides.remove("floor")
    if alone:  # steps of many seconds: a small map warms up, and a few rounds are enough
        for step in case.build(problem.resized(problem.shape.smallest()), sides).values():
            step()
        rounds, unmeasured = min(2, case.repetitions), 0
    else:
        rounds, unmeasured = plan.rounds * case.repetitions, case.unmeasured
    steps = case.build(problem, sides)
    timings = timed_in_turn(
        steps, repetitions=rounds, budget=case.budget, unmeasured=unmeasured, clock=run.clock, least=5
    )
    for side, timing in timings.items():
        found.sides[side] = Side(error=f"fails: {timing}") if isinstance(timing, str) else Side(timing)
    if alone and peers[0] not in found.sides:
        del steps
        found.sides[peers[0]] = _measure_alone(case, problem, peers[0], run)
    return found


def _peers(plan: Plan, problem: Problem) -> tuple[str, ...]:
    """Who computes the same; the first is the one that the comparison is about."""
    if problem.terms == "deformable":
        return ("torchvision",)
    if problem.shape.ndim == 1:
        return ("naive",)
    return ("mmcv",) if problem.needed_by_peer > plan.alone_bytes else ("mmcv", "naive")


def _measure_alone(case: Case, problem: Problem, peer: str, run: Run) -> Side:
    """A peer that needs most of the machine: one step in the process that measures its memory, if it can fit."""
    import psutil

    plan: Plan = case.problem
    if not plan.large_peers:
        return Side(error="not run: left out of a quick run")
    free = int(0.9 * psutil.virtual_memory().available) if plan.free_bytes is None else plan.free_bytes
    if problem.needed_by_peer > free:
        needed = problem.needed_by_peer / 1e9
        return Side(error=f"does not fit: needs about {needed:.0f} GB of {free / 1e9:.0f} GB free")
    [cost] = _costs(case, [problem], peer, run, limit=free)
    if cost.error is not None:
        cost.error = f"fails: {cost.error}"
    return cost


def _costs(case: Case, problems: Sequence[Problem], peer: str, run: Run, limit: int | None = None) -> list[Side]:
    """Peak memory of one side of several attentions, each after a step at a small size, and the steps' times."""
    once = [problem.needed_by_peer > case.problem.alone_bytes for problem in problems]
    asked = [
        (problem, 1 if alone else 2, problem.resized(problem.shape.smallest()))
        for problem, alone in zip(problems, once, strict=True)
    ]
    return costs_in_process(case, asked, peer, run, limit)


def _add_memory(case: Case, comparisons: dict[Problem, Comparison], run: Run) -> None:
    """Measures the memory of comparisons of one size, one fresh process for each side but the plain way."""
    for side in {name: None for found in comparisons.values() for name in found.sides if name not in ("twin", "naive")}:
        missing = {
            problem: found.sides[side]
            for problem, found in comparisons.items()
            if side in found.sides and found.sides[side].error is None and found.sides[side].memory is None
        }
        # The floor is the same for every set.
        asked = list(missing)[:1] if side == "floor" else list(missing)
        measured = _costs(case, asked, side, run) if asked else []
        for earlier, cost in zip(missing.values(), measured * len(missing), strict=False):
            earlier.memory, earlier.error = cost.memory, cost.error


def judge(result: Result) -> None:
    """Sets figures beside what is asked for in their cases and sets."""
    case = result.case.removeprefix("attention.")
    for found in result.comparisons:
        found.targets = _targets(case, found)
    if case == "growth":
        for _, same_set in itertools.groupby(result.comparisons, key=lambda found: terms_and_size(found.name)[0]):
            for before, after in itertools.pairwise(same_set):
                after.targets = _growth_targets(before, after)


def _targets(case: str, found: Comparison) -> list[Target]:
    if case not in LARGE_CASES + SMALL_CASES or case == "growth":
        return []
    targets = []
    terms, sides = found.name, found.sides
    ours = sides.get("ours")

    def speed(peer: str, bound: float) -> Target:
        return Target(f"{peer} / ours", ratio(sides[peer], ours, "time"), bound, at_least=True)

    if case == "deformable":
        return [speed("torchvision", DEFORMABLE)]
    if "twin" in sides:
        twin = Problem(Shape.parse(case), terms).twin
        same, noise = ratio(sides["twin"], ours, "time"), overlap(sides["twin"], ours)
        targets.append(Target(f"ours {twin} / ours", same, 1.0, at_least=True, noise=noise))
    for peer in ("mmcv", "naive"):
        if peer in sides and sides[peer].error is None:
            targets.append(speed(peer, SPEED.get(case, {}).get(terms, NOT_SLOWER) if peer == "mmcv" else NOT_SLOWER))
    if terms in FLOOR.get(case, {}):
        targets.append(Target("ours / floor", ratio(ours, sides.get("floor"), "time"), FLOOR[case][terms]))
    if terms in MEMORY.get(case, {}):
        less = ratio(sides.get("mmcv"), ours, "memory")
        targets.append(Target("memory mmcv / ours", less, MEMORY[case][terms], at_least=True))
    if case in PEAK_GB:
        peak = ours.memory.peak / 1e9 if ours is not None and ours.memory is not None else None
        targets.append(Target("GB in all", peak, PEAK_GB[case]))
    return targets


def _growth_targets(before: Comparison, after: Comparison) -> list[Target]:
    """Compares a size with the one before, which has a quarter of the tokens."""
    terms, _ = terms_and_size(after.name)
    limits: tuple[tuple[Literal["time", "memory"], dict[str, float]], ...]
    limits = (("time", GROWTH_TIME), ("memory", GROWTH_MEMORY))
    return [
        Target(
            f"{figure} for 4x the tokens",
            ratio(after.sides["ours"], before.sides["ours"], figure),
            bounds[terms],
        )
        for figure, bounds in limits
        if terms in bounds
    ]


def table(result: Result) -> Table:
    """A line for each set; a side has columns where it was measured."""
    rows = result.comparisons
    measured = {name for row in rows for name in row.sides}
    peers = [name for name in PEERS if name in measured]
    names = ["ours", *peers, "floor"]
    weighed = [name for name in names if any(row.sides.get(name, Side()).memory is not None for row in rows)]
    against = peers[0] if peers and {"ours", peers[0]} <= set(weighed) else None
    header = ["set", *(f"{name} ms" for name in names), *(f"{peer} / ours" for peer in peers), "ours / floor"]
    header += [f"{name} MB" for name in weighed] + ([] if against is None else [f"{against} / ours MB"]) + ["targets"]
    cells = []
    for row in rows:
        sides = {name: row.sides.get(name) for name in names}
        line = [row.name, *(_milliseconds(sides[name]) for name in names)]
        line += [_factor(ratio(sides[peer], sides["ours"], "time")) for peer in peers]
        line.append(_factor(ratio(sides["ours"], sides["floor"], "time")))
        line += [_megabytes(sides[name]) for name in weighed]
        if against is not None:
            line.append(_factor(ratio(sides[against], sides["ours"], "memory")))
        cells.append([*line, "; ".join(map(str, row.targets))])
    missed = [any(target.verdict in ("not met", "not measured") for target in row.targets) for row in rows]
    return Table(header, cells, _notes(rows), frozenset(index for index, red in enumerate(missed) if red))


def _milliseconds(side: Side | None) -> str:
    if side is None or side.timing is None:
        return "" if side is None else (side.error or "-").split(":")[0]
    if len(side.timing.seconds) == 1:
        return f"{milliseconds(side.timing.median)} (once)"
    return f"{milliseconds(side.timing.median)} ({'-'.join(map(milliseconds, side.timing.quartiles))})"


def _megabytes(side: Side | None) -> str:
    return "" if side is None or side.memory is None else f"{side.memory.increase / 1e6:.0f}"


def _factor(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _notes(rows: Sequence[Comparison]) -> list[str]:
    """What the cells have no room for."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for name, side in row.sides.items():
            if side.error is not None:
                reasons.setdefault(f"{name} {side.error}", []).append(terms_and_size(row.name)[0])
    notes = [f"{', '.join(dict.fromkeys(sets))}: {reason}" for reason, sets in reasons.items()]
    differences = [row.difference for row in rows if row.difference is not None]
    if differences:
        notes.append(
            f"Output and input gradient of ours and of the peer differ by at most {max(differences):.1g} of the "
            "largest value."
        )
    return notes


def make_case(name: str) -> Case:
    """The case of a name.

    Raises:
        ValueError: If there is none.
    """
    kind, _, size = name.partition(":")
    budget = 12.0
    needs: tuple[str, ...] = ("mmcv", "psutil")
    if kind == "growth":
        start = Shape.parse(size or GROWTH_DEFAULT)
        plan = Plan(tuple(str(start.scaled(2**step)) for step in range(3)))
        title = "growth with the size of the map" + (f", {size}" if size else "")
    elif kind == "deformable":
        plan, needs = Plan((str(Shape.parse(size or DEFORMABLE_DEFAULT)),), deformable=True), ("psutil",)
        title = "deformable 3x3 convolution" + (f", {size}" if size else "")
    else:
        shape = Shape.parse(name)
        small = name in SMALL_CASES
        plan = Plan((name,), rounds=20 if small else 1)
        budget = budget / 3 if small else budget  # steps of milliseconds
        needs = needs if shape.ndim == 2 else ("psutil",)
        title = shape.describe()
    return Case(
        f"attention.{name}",
        title,
        measure,
        plan,
        build=build_steps,
        judge=judge,
        table=table,
        repetitions=15,
        budget=budget,
        memory=name not in SMALL_CASES,
        needs=needs,
        quick={
            "problem": dataclasses.replace(plan, sets=QUICK_SETS, large_peers=False),
            "repetitions": 5,
            "budget": budget / 3,
        },
    )


def find(name: str) -> Sequence[Case]:
    """Cases by a name of any size, or of a kind."""
    return [make_case(one) for one in {"small": SMALL_CASES, "large": LARGE_CASES}.get(name, (name,))]


def draw(results: Sequence[Result]) -> "Figure | None":
    """The figure of `attention_figure`."""
    from benchmarks.attention_figure import draw_results  # matplotlib: not in the processes whose memory is measured

    return draw_results(results)


BENCHMARK = Benchmark(
    name="attention",
    title="Attention: time and memory, forward and backward",
    description=__doc__,
    method="Median of interleaved repetitions (lower to upper quartile); memory is what the steps add at their peak to "
    "a process that has only made the module and its input. Batch 1 and float32 unless a heading says otherwise; 8 "
    "heads. The floor is E1 alone by torch's scaled_dot_product_attention between the same projections (for the "
    "deformable convolution: a regular one), which computes less; naive is all energies of a set added up, one "
    'softmax, one product. "(once)": a peer too large to run beside the others, one step in the process that measures '
    "its memory.",
    cases=tuple(make_case(name) for name in LARGE_CASES + SMALL_CASES),
    packages=("mmcv-lite",),
    find=find,
    draw=draw,
)

if __name__ == "__main__":
    run_as_command("attention")

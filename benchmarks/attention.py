"""Time and peak memory of every attention beside its peers, forward and backward, on this machine.

``python -m benchmarks.attention`` prints tables and writes JSON, Markdown and a figure. The peers are the authors'
released module (mmcv's ``GeneralizedAttention``), the plain way of computing it, torchvision's deformable convolution,
and as the floor torch's ``scaled_dot_product_attention`` with E1 alone between the same projections. Choose with
``--cases`` and ``--sets``:

    python -m benchmarks.attention --cases 256x50x84s2 --sets 1111,0001 --no-memory
    python -m benchmarks.attention --cases small --threads 1

A case is a map ``CxHxWsS`` (channels, height, width, stride of keys and values) or ``BxCxHxWsS``, ``sentences:BxLxC``,
each with ``-bf16`` for autocast to bfloat16 (any values), ``growth`` (three sizes, each of four times the tokens of the
one before), ``deformable`` (a 3x3 convolution), or ``small`` or ``large`` for all of ours of that kind;
``growth:CxHxWsS`` and ``deformable:CxHxW`` set their size. Sides run in turn in one process with the same input,
weights and gradient of the output. Memory is that of a fresh process for each side; small cases have none.
``--report FILE...`` makes tables and figure again from files.
"""

import argparse
import dataclasses
import itertools
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from benchmarks.attention_report import Row, Run, by_group, markdown, print_table, read_run
from benchmarks.attention_sides import Shape, build
from benchmarks.measure import (
    Side,
    Target,
    Timing,
    add_arguments,
    answer_parent,
    comma_separated,
    describe,
    machine,
    output_console,
    overlap,
    peak_memory,
    positive_int,
    ratio,
    require,
    run_child,
    timed_in_turn,
)
from lightning_attn.attention.spec import TERM_SETS, parse_terms
from lightning_attn.io import unused_path, write_json, write_text

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
CASES = LARGE_CASES + SMALL_CASES
GROWTH_SETS = ("1111", "0011", "0010")
GROWTH_DEFAULT, DEFORMABLE_DEFAULT = "256x25x42s2", "256x50x84"
REPORT_WIDTH = 220  # characters

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

# A peer that needs more bytes runs once, alone, in a process with a limit.
_ALONE = 2.5e9


@dataclasses.dataclass(frozen=True)
class Options:
    """How much is measured."""

    repetitions: int = 15
    budget: float = 12.0
    threads: int = 2
    memory: bool = True
    large_peers: bool = True


def training_step(module: nn.Module, x: Tensor, gradient: Tensor, bfloat16: bool) -> Callable[[], tuple[Tensor, ...]]:
    """A step forward and backward; returns the output, then the gradients of the input and of all parameters."""
    x = x.detach().requires_grad_()
    leaves = [x, *module.parameters()]

    def step() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            out = module(x)
        return (out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out.dtype)))

    return step


def compare(shape: Shape, kind: str, peer: str) -> float | str:
    """How far output and input gradient of the peer lie from ours, relative to their largest value; or its error.

    On the map of the case, or one of the same form that is small enough to take no time.
    """
    while shape.energy_bytes > 2e8:
        shape = shape.scaled(0.5)
    torch.manual_seed(1)
    x, gradient = shape.tensor(), shape.tensor()
    ours = training_step(build("ours", shape, kind), x, gradient, shape.bfloat16)()[:2]
    try:
        theirs = training_step(build(peer, shape, kind), x, gradient, shape.bfloat16)()[:2]
    except Exception as error:  # a peer that fails is a result
        return describe(error)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(ours, theirs, strict=True))


def needed_by_peer(shape: Shape, kind: str) -> int:
    """Roughly the bytes that the peer adds at its peak: mmcv holds three to four N_q x N_k maps, save for E3 alone."""
    return 0 if kind in ("deformable", "0010") else 4 * shape.energy_bytes


def twin(kind: str) -> str | None:
    """The set that is compared with instead where mmcv fails, E2 without E4: the same with E4."""
    if kind == "deformable":
        return None
    _, e2, _, e4 = parse_terms(kind)
    return kind[:-1] + "1" if e2 and not e4 else None


def measure(group: str, shape: Shape, kind: str, options: Options, floor: Side | None = None) -> Row:
    """Times all sides of one case in turn, once the peer's result has been found to be ours.

    Args:
        group: The case of the command line.
        shape: Size of the problem.
        kind: Term set, or `deformable`.
        options: How much is measured.
        floor: Of the same size; on a map that is so large that the peer runs alone, it is not measured again.
    """
    peers = _peers(shape, kind)
    row = Row(group=group, case=str(shape), kind=kind, peer=peers[0], sides={})
    alone = needed_by_peer(shape, kind) > _ALONE
    names = {"ours": kind, "floor": kind}
    for peer in peers:
        difference = compare(shape, kind, peer)
        if isinstance(difference, str):
            row.sides[peer] = Side(error=f"fails: {difference}")
        elif not difference <= (TOLERANCE_BFLOAT16 if shape.bfloat16 else TOLERANCE):  # NaN too
            row.sides[peer] = Side(
                error=f"wrong: {difference:.1g} of the largest value away from ours, which the tests hold to the "
                "definition"
            )
        else:
            row.difference = max(difference, row.difference or 0.0)
            if not alone:
                names[peer] = kind
    other = twin(kind)
    if "mmcv" in row.sides and other is not None and not alone:
        names["twin"] = other
    if alone and floor is not None:
        row.sides["floor"] = dataclasses.replace(floor)
        del names["floor"]
    torch.manual_seed(1)
    x, gradient = shape.tensor(), shape.tensor()
    modules = {name: build("ours" if name == "twin" else name, shape, what) for name, what in names.items()}
    steps = {name: training_step(module, x, gradient, shape.bfloat16) for name, module in modules.items()}
    if alone:  # steps of many seconds: a small map warms them up, and a few rounds tell enough
        small = shape.smallest()
        for module in modules.values():
            training_step(module, small.tensor(), small.tensor(), shape.bfloat16)()
        timings = timed_in_turn(steps, repetitions=min(2, options.repetitions), unmeasured=0)
    elif group in SMALL_CASES:  # steps of milliseconds
        timings = timed_in_turn(steps, repetitions=20 * options.repetitions, budget=options.budget / 3)
    else:
        timings = timed_in_turn(steps, repetitions=options.repetitions, budget=options.budget)
    for name, timing in timings.items():
        row.sides[name] = Side(timing=timing) if isinstance(timing, Timing) else Side(error=f"fails: {timing}")
    if alone and row.peer not in row.sides:
        row.sides[row.peer] = _measure_alone(shape, kind, row.peer, options)
    return row


def _peers(shape: Shape, kind: str) -> tuple[str, ...]:
    """Who computes the same; the first is the one that the row is about."""
    if kind == "deformable":
        return ("torchvision",)
    if shape.ndim == 1:
        return ("naive",)
    return ("mmcv",) if needed_by_peer(shape, kind) > _ALONE else ("mmcv", "naive")


def _measure_alone(shape: Shape, kind: str, peer: str, options: Options) -> Side:
    """A peer that needs most of the machine: one step in the process that measures its memory, if it can fit."""
    import psutil

    if not options.large_peers:
        return Side(error="not run: left out of a quick run")
    needed, free = needed_by_peer(shape, kind), int(0.9 * psutil.virtual_memory().available)
    if needed > free:
        return Side(error=f"does not fit: needs about {needed / 1e9:.0f} GB of {free / 1e9:.0f} GB free")
    figures = memory_of(peer, shape, [kind], options.threads, limit=free)[kind]
    if figures.error is not None:
        figures.error = f"fails: {figures.error}"
    return figures


def memory_of(side: str, shape: Shape, kinds: Sequence[str], threads: int, limit: int | None = None) -> dict[str, Side]:
    """Peak memory of one side for several term sets, in a fresh process; also the times of the measured steps."""
    request = {"side": side, "case": str(shape), "kinds": list(kinds)}
    figures = run_child("benchmarks.attention", ["--child", json.dumps(request)], threads=threads, limit=limit)
    if isinstance(figures, str):
        return {kind: Side(error=figures) for kind in kinds}
    return {kind: Side.from_dict(figures[kind]) for kind in kinds}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What `memory_of` asks of its fresh process."""
    shape = Shape.parse(request["case"])
    small = shape.smallest()
    figures = {}
    for kind in request["kinds"]:
        module = build(request["side"], shape, kind)
        warm_up = training_step(module, small.tensor(), small.tensor(), shape.bfloat16)
        step = training_step(module, shape.tensor(), shape.tensor(), shape.bfloat16)
        memory, timing = peak_memory(step, steps=1 if needed_by_peer(shape, kind) > _ALONE else 2, warm_up=warm_up)
        figures[kind] = dataclasses.asdict(Side(timing=timing, memory=memory))
    return figures


def add_memory(rows: Sequence[Row], options: Options) -> None:
    """Measures the memory of all rows of one case, one fresh process for each side but the plain way."""
    for side in {name: None for row in rows for name in row.sides if name not in ("twin", "naive")}:
        missing = [row for row in rows if side in row.sides and row.sides[side].error is None]
        missing = [row for row in missing if row.sides[side].memory is None]
        if not missing:
            continue
        kinds = [row.kind for row in missing]
        if side == "floor" and kinds[0] != "deformable":
            kinds = kinds[:1]  # the floor is the same for every set
        figures = memory_of(side, Shape.parse(missing[0].case), kinds, options.threads)
        for row in missing:
            found = figures.get(row.kind, figures[kinds[0]])
            row.sides[side].memory = found.memory
            row.sides[side].error = found.error


def judge(rows: Sequence[Row]) -> None:
    """Sets the figures of rows beside what is asked for in their cases and sets."""
    for row in rows:
        row.targets = _targets(row)
    growth = [row for row in rows if row.group == "growth"]
    for kind in dict.fromkeys(row.kind for row in growth):
        for before, after in itertools.pairwise(row for row in growth if row.kind == kind):
            after.targets = _growth_targets(before, after)


def _targets(row: Row) -> list[Target]:
    targets = []
    ours, floor = row.sides.get("ours"), row.sides.get("floor")

    def speed(peer: str, bound: float) -> Target:
        return Target(f"{peer} / ours", ratio(row.sides[peer], ours, "time"), bound, at_least=True)

    if row.group == "deformable":
        targets.append(speed(row.peer, DEFORMABLE))
    elif row.group in CASES:
        if "twin" in row.sides:
            same, noise = ratio(row.sides["twin"], ours, "time"), overlap(row.sides["twin"], ours)
            targets.append(Target(f"ours {twin(row.kind)} / ours", same, 1.0, at_least=True, noise=noise))
        for peer in ("mmcv", "naive"):
            if peer in row.sides and row.sides[peer].error is None and row.group != "growth":
                asked = SPEED.get(row.group, {}).get(row.kind, NOT_SLOWER) if peer == "mmcv" else NOT_SLOWER
                targets.append(speed(peer, asked))
        if row.kind in FLOOR.get(row.group, {}):
            bound = FLOOR[row.group][row.kind]
            targets.append(Target("ours / floor", ratio(ours, floor, "time"), bound, at_least=False))
        if row.kind in MEMORY.get(row.group, {}):
            bound = MEMORY[row.group][row.kind]
            less = ratio(row.sides.get(row.peer), ours, "memory")
            targets.append(Target(f"memory {row.peer} / ours", less, bound, at_least=True))
        if row.group in PEAK_GB:
            peak = ours.memory.peak / 1e9 if ours is not None and ours.memory is not None else None
            targets.append(Target("GB in all", peak, PEAK_GB[row.group], at_least=False))
    return targets


def _growth_targets(before: Row, after: Row) -> list[Target]:
    """Compares a size with the one before, which has a quarter of the tokens."""
    limits: tuple[tuple[Literal["time", "memory"], dict[str, float]], ...]
    limits = (("time", GROWTH_TIME), ("memory", GROWTH_MEMORY))
    return [
        Target(
            f"{figure} for 4x the tokens",
            ratio(after.sides["ours"], before.sides["ours"], figure),
            bounds[after.kind],
            at_least=False,
        )
        for figure, bounds in limits
        if after.kind in bounds
    ]


def run_case(case: str, sets: Sequence[str] | None, options: Options, advance: Callable[[str], None]) -> Iterator[Row]:
    """The rows of a case, each once its time is measured; their memory is added in the end.

    Args:
        case: As on the command line.
        sets: The term sets; None for those of the case.
        options: How much is measured.
        advance: Is told what comes next before each row.
    """
    rows: list[Row] = []
    for group, shape, kind in plan(case, sets):
        advance(f"{group}: {kind} at {shape}")
        floor = next((row.sides["floor"] for row in rows if row.case == str(shape)), None)
        rows.append(measure(group, shape, kind, options, floor))
        yield rows[-1]
    if options.memory and case not in SMALL_CASES:
        advance(f"{case}: memory")
        for size in dict.fromkeys(row.case for row in rows):
            add_memory([row for row in rows if row.case == size], options)


def plan(case: str, sets: Sequence[str] | None) -> list[tuple[str, Shape, str]]:
    """Group, shape and term set of each row of a case.

    Raises:
        ValueError: If there is no such case or set.
    """
    for terms in sets or ():
        parse_terms(terms)
    group, _, size = case.partition(":")
    if group == "growth":
        start = Shape.parse(size or GROWTH_DEFAULT)
        chosen = [terms for terms in sets or GROWTH_SETS if terms in GROWTH_SETS] or sets or GROWTH_SETS
        return [(case, start.scaled(2**step), terms) for terms in chosen for step in range(3)]
    if group == "deformable":
        return [(case, Shape.parse(size or DEFORMABLE_DEFAULT), group)]
    return [(case, Shape.parse(case), terms) for terms in sets or reversed(TERM_SETS)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", type=comma_separated, default=CASES, help="names with commas between; all by default"
    )
    parser.add_argument("--sets", type=comma_separated, help="term sets with commas between; all by default")
    parser.add_argument("--repetitions", type=positive_int, help="measured rounds of a row at most (15)")
    parser.add_argument("--budget", type=float, help="seconds after which a row starts no further round (12)")
    parser.add_argument("--quick", action="store_true", help="a few minutes: fewer sets and rounds, no large peers")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="no measuring: results of earlier runs")
    add_arguments(parser)
    chosen = parser.parse_args(arguments)
    if chosen.child is not None:
        answer_parent(lambda: answer(chosen.child))
        return
    if chosen.report:
        try:
            report(chosen.report, chosen.output)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        return
    require("mmcv", "psutil")
    chosen.cases = [
        case for name in chosen.cases for case in {"small": SMALL_CASES, "large": LARGE_CASES}.get(name, (name,))
    ]
    if chosen.sets is None and chosen.quick:
        chosen.sets = QUICK_SETS
    try:
        planned = sum(len(plan(case, chosen.sets)) + (not chosen.no_memory) for case in chosen.cases)
    except ValueError as error:
        parser.error(str(error))
    options = Options(
        repetitions=chosen.repetitions or (5 if chosen.quick else 15),
        budget=chosen.budget or (4.0 if chosen.quick else 12.0),
        threads=chosen.threads,
        memory=not chosen.no_memory,
        large_peers=not chosen.quick,
    )
    torch.set_num_threads(options.threads)
    run = Run(machine("torch", "mmcv-lite", "torchvision"), dataclasses.asdict(options), [])
    console = output_console(REPORT_WIDTH)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    # Tables go to the output even where only the errors, with the bar, are a terminal.
    bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), redirect_stdout=sys.stdout.isatty())
    started = itertools.count()
    try:
        with bar:
            task = bar.add_task("", total=planned)
            for case in chosen.cases:
                done = len(run.rows)
                for row in run_case(
                    case, chosen.sets, options, lambda text: bar.update(task, description=text, completed=next(started))
                ):
                    run.rows.append(row)
                judge(run.rows)
                print_table(console, run.rows[done:])
    finally:
        if run.rows:  # also of a run that was interrupted
            judge(run.rows)
            files = unused_path(chosen.output / "attention.json")
            write_json(files, run.as_dict())
            write_report([run], files)


def write_report(runs: Sequence[Run], file: Path) -> None:
    """Markdown and figure beside the JSON file of this name; prints where they are."""
    from benchmarks.attention_figure import write_figure  # not in the processes whose memory is measured

    write_text(file.with_suffix(".md"), markdown(runs))
    write_figure(runs, file.with_suffix(".png"))
    print(f"Results: {file.parent / file.stem}.*")


def report(files: Sequence[Path], folder: Path) -> None:
    """Tables and figure of earlier runs, as one."""
    runs = [read_run(file) for file in files]
    console = output_console(REPORT_WIDTH)
    for rows in by_group(runs).values():
        print_table(console, rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_report(runs, unused_path(folder / "attention-report.md"))


if __name__ == "__main__":
    # Ended from outside, it still ends its child and keeps what it measured.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main()

"""Time and peak memory of every attention beside its peers, forward and backward, on this machine.

``python -m benchmarks.attention`` prints tables and writes JSON, Markdown and a figure. The peers are the authors'
released module (mmcv's ``GeneralizedAttention``), torchvision's deformable convolution, and as the floor torch's
``scaled_dot_product_attention`` with E1 alone between the same projections. Choose with ``--cases`` and ``--sets``:

    python -m benchmarks.attention --cases 256x50x84s2 --sets 1111,0001 --no-memory

A case is ``CxHxWsS`` (channels, height, width, stride of keys and values; any values), ``growth`` (three sizes, each of
four times the tokens of the one before) or ``deformable`` (a 3x3 convolution); ``growth:CxHxWsS`` and
``deformable:CxHxW`` set their size. Sides run in turn in one process with the same input, weights and gradient of the
output. Memory is that of a fresh process for each side. ``--report FILE...`` makes tables and figure again from files.
"""

import argparse
import dataclasses
import itertools
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from benchmarks.attention_report import Row, Run, by_group, markdown, print_table, read_run
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
from lightning_attn.attention import DeformableConv, GatedResidual, TransformerAttention
from lightning_attn.attention.spec import TERM_SETS, parse_terms
from lightning_attn.files import unused_path, write_json, write_text
from lightning_attn.interop.mmcv import to_mmcv

HEADS = 8
QUICK_SETS = ("1111", "1000", "0100", "0011", "0010", "0001")
CASES = ("256x50x84s2", "512x25x42s2", "256x50x84s1", "512x96x96s1", "growth", "deformable")
GROWTH_SETS = ("1111", "0011", "0010")
GROWTH_DEFAULT, DEFORMABLE_DEFAULT = "256x25x42s2", "256x50x84"
REPORT_WIDTH = 220  # characters

# The least that is asked for: mmcv's time divided by ours, by case and term set.
SPEED = {
    "256x50x84s2": dict.fromkeys(("1111", "1101", "1011", "1001"), 3.0)
    | dict.fromkeys(("1000", "1010", "0101", "0111"), 2.5)
    | dict.fromkeys(("0001", "0011"), 9.0)
    | {"0010": 1.0},
    "512x25x42s2": dict.fromkeys(TERM_SETS, 1.0),
    "256x50x84s1": {"1111": 3.0},
}
FLOOR = {"256x50x84s2": {"1111": 1.6}}  # our time divided by the floor's, at most
MEMORY = {"256x50x84s1": {"1111": 8.0}}  # mmcv's increase divided by ours, at least
PEAK_GB = {"512x96x96s1": 4.0}  # the whole process, every set
GROWTH_TIME = {"0010": 4.6, "0011": 9.0, "1111": 18.0}  # for four times the tokens
GROWTH_MEMORY = {"0010": 4.6, "0011": 8.5, "1111": 8.5}
DEFORMABLE = 4.0
TOLERANCE = 1e-4  # of outputs and gradients, relative to the largest; float32 through thousands of sums

# A peer that needs more bytes runs once, alone, in a process with a limit.
_ALONE = 2.5e9


@dataclasses.dataclass(frozen=True)
class MapShape:
    """Size of the problem: a map of one image."""

    channels: int
    height: int
    width: int
    kv_stride: int = 1

    @classmethod
    def parse(cls, name: str) -> "MapShape":
        """The shape of a name such as `256x50x84s2`; without the last part the stride is 1.

        Raises:
            ValueError: If the name does not read so.
        """
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:s(\d+))?", name)
        if match is None or "0" in match.groups():
            raise ValueError(
                f"case {name!r} is neither channels x height x width s stride, such as 256x50x84s2, nor one of "
                f"{', '.join(CASES)}."
            )
        return cls(*(int(number) for number in match.groups(default="1")))

    def __str__(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}s{self.kv_stride}"

    @property
    def energy_bytes(self) -> int:
        """Size of an N_q x N_k map in float32 for all heads."""
        keys = -(-self.height // self.kv_stride) * -(-self.width // self.kv_stride)
        return 4 * HEADS * self.height * self.width * keys

    def scaled(self, factor: float) -> "MapShape":
        """The same with so many times the rows and columns."""
        return dataclasses.replace(self, height=round(factor * self.height), width=round(factor * self.width))

    def smallest(self) -> "MapShape":
        """The same channels and stride on a map with 2 x 2 keys."""
        return dataclasses.replace(self, height=2 * self.kv_stride, width=2 * self.kv_stride)

    def tensor(self) -> Tensor:
        """Values of this shape, `[1, C, H, W]`."""
        return torch.randn(1, self.channels, self.height, self.width)


@dataclasses.dataclass(frozen=True)
class Options:
    """How much is measured."""

    repetitions: int = 15
    budget: float = 12.0
    threads: int = 2
    memory: bool = True
    large_peers: bool = True


class FloorAttention(nn.Module):
    """E1 alone by torch's fused attention, with projections, gated residual and stride as in the modules compared."""

    def __init__(self, dim: int, kv_stride: int) -> None:
        super().__init__()
        self.kv_stride = kv_stride
        self.query, self.key, self.value = (nn.Conv2d(dim, dim, 1, bias=False) for _ in range(3))
        self.out = nn.Conv2d(dim, dim, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same."""
        keys = x[..., :: self.kv_stride, :: self.kv_stride]
        query, key, value = self._heads(self.query(x)), self._heads(self.key(keys)), self._heads(self.value(keys))
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        out: Tensor = self.out(attended.transpose(2, 3).reshape(x.shape))
        return x + self.gamma * out

    @staticmethod
    def _heads(projected: Tensor) -> Tensor:
        batch, dim = projected.shape[:2]
        return projected.view(batch, HEADS, dim // HEADS, -1).transpose(2, 3).contiguous()


class TorchvisionDeformable(nn.Module):
    """torchvision's operator with a convolution that makes its offsets."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(channels, 18, 3, padding=1)
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same."""
        from torchvision.ops import deform_conv2d

        out: Tensor = deform_conv2d(x, self.offset(x), self.weight, self.bias, padding=1)
        return out


def build(side: str, shape: MapShape, kind: str) -> nn.Module:
    """The module of a side; the same seed gives all sides of a kind the same weights.

    Args:
        side: `"ours"`, `"mmcv"`, `"torchvision"` or `"floor"`.
        shape: Size of the problem.
        kind: Term set, or `"deformable"`.
    """
    torch.manual_seed(0)
    if kind == "deformable":
        return _build_deformable(side, shape.channels)
    if side == "floor":
        module: nn.Module = FloorAttention(shape.channels, shape.kv_stride)
        module.get_parameter("gamma").data.fill_(0.5)
        return module
    attention = TransformerAttention(shape.channels, HEADS, kind, ndim=2, kv_stride=shape.kv_stride)
    ours = GatedResidual(attention)
    ours.gamma.data.fill_(0.5)  # at its start value, 0, the attention would have no gradient
    if side == "ours":
        return ours
    from mmcv.cnn.bricks import GeneralizedAttention

    theirs: nn.Module = GeneralizedAttention(
        shape.channels, num_heads=HEADS, kv_stride=shape.kv_stride, attention_type=kind
    )
    theirs.load_state_dict(to_mmcv(ours))
    return theirs


def _build_deformable(side: str, channels: int) -> nn.Module:
    if side == "floor":
        return nn.Conv2d(channels, channels, 3, padding=1)
    ours = DeformableConv(channels, channels, 3, ndim=2)
    nn.init.normal_(ours.offset.get_parameter("weight"), std=2 / (9 * channels) ** 0.5)  # offsets of about two pixels
    if side == "ours":
        return ours
    theirs = TorchvisionDeformable(channels)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def training_step(module: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A step forward and backward; returns the output, then the gradients of the input and of all parameters."""
    x = x.detach().requires_grad_()
    leaves = [x, *module.parameters()]

    def step() -> tuple[Tensor, ...]:
        out = module(x)
        return (out.detach(), *torch.autograd.grad(out, leaves, gradient))

    return step


def compare(shape: MapShape, kind: str, peer: str) -> float | str:
    """How far output and input gradient of the peer lie from ours, relative to their largest value; or its error.

    On the map of the case, or one of the same form that is small enough to take no time.
    """
    while shape.energy_bytes > 2e8:
        shape = shape.scaled(0.5)
    torch.manual_seed(1)
    x, gradient = shape.tensor(), shape.tensor()
    ours = training_step(build("ours", shape, kind), x, gradient)()[:2]
    try:
        theirs = training_step(build(peer, shape, kind), x, gradient)()[:2]
    except Exception as error:  # a peer that fails is a result
        return describe(error)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(ours, theirs, strict=True))


def needed_by_peer(shape: MapShape, kind: str) -> int:
    """Roughly the bytes that the peer adds at its peak: mmcv holds three to four N_q x N_k maps, save for E3 alone."""
    return 0 if kind in ("deformable", "0010") else 4 * shape.energy_bytes


def twin(kind: str) -> str | None:
    """The set that is compared with instead where mmcv fails, E2 without E4: the same with E4."""
    if kind == "deformable":
        return None
    _, e2, _, e4 = parse_terms(kind)
    return kind[:-1] + "1" if e2 and not e4 else None


def measure(group: str, shape: MapShape, kind: str, options: Options, floor: Side | None = None) -> Row:
    """Times all sides of one case in turn, once the peer's result has been found to be ours.

    Args:
        group: The case of the command line.
        shape: Size of the problem.
        kind: Term set, or `deformable`.
        options: How much is measured.
        floor: Of the same size; on a map that is so large that the peer runs alone, it is not measured again.
    """
    peer = "torchvision" if kind == "deformable" else "mmcv"
    row = Row(group=group, case=str(shape), kind=kind, peer=peer, sides={})
    alone = needed_by_peer(shape, kind) > _ALONE
    names = {"ours": kind, "floor": kind}
    difference = compare(shape, kind, peer)
    if isinstance(difference, str):
        row.sides[peer] = Side(error=f"fails: {difference}")
    elif not difference <= TOLERANCE:  # NaN too
        row.sides[peer] = Side(
            error=f"wrong: {difference:.1g} of the largest value away from ours, which the tests hold to the definition"
        )
    else:
        row.difference = difference
        if not alone:
            names = {"ours": kind, peer: kind, "floor": kind}
    other = twin(kind)
    if peer in row.sides and other is not None and not alone:
        names["twin"] = other
    if alone and floor is not None:
        row.sides["floor"] = dataclasses.replace(floor)
        del names["floor"]
    torch.manual_seed(1)
    x, gradient = shape.tensor(), shape.tensor()
    modules = {name: build("ours" if name == "twin" else name, shape, what) for name, what in names.items()}
    steps = {name: training_step(module, x, gradient) for name, module in modules.items()}
    if alone:  # steps of many seconds: a small map warms them up, and a few rounds tell enough
        small = shape.smallest()
        for module in modules.values():
            training_step(module, small.tensor(), small.tensor())()
        timings = timed_in_turn(steps, repetitions=min(2, options.repetitions), unmeasured=0)
    else:
        timings = timed_in_turn(steps, repetitions=options.repetitions, budget=options.budget)
    for name, timing in timings.items():
        row.sides[name] = Side(timing=timing) if isinstance(timing, Timing) else Side(error=f"fails: {timing}")
    if alone and peer not in row.sides:
        row.sides[peer] = _measure_alone(shape, kind, peer, options)
    return row


def _measure_alone(shape: MapShape, kind: str, peer: str, options: Options) -> Side:
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


def memory_of(
    side: str, shape: MapShape, kinds: Sequence[str], threads: int, limit: int | None = None
) -> dict[str, Side]:
    """Peak memory of one side for several term sets, in a fresh process; also the times of the measured steps."""
    request = {"side": side, "case": str(shape), "kinds": list(kinds)}
    figures = run_child("benchmarks.attention", ["--child", json.dumps(request)], threads=threads, limit=limit)
    if isinstance(figures, str):
        return {kind: Side(error=figures) for kind in kinds}
    return {kind: Side.from_dict(figures[kind]) for kind in kinds}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What `memory_of` asks of its fresh process."""
    shape = MapShape.parse(request["case"])
    small = shape.smallest()
    figures = {}
    for kind in request["kinds"]:
        module = build(request["side"], shape, kind)
        warm_up = training_step(module, small.tensor(), small.tensor())
        step = training_step(module, shape.tensor(), shape.tensor())
        memory, timing = peak_memory(step, steps=1 if needed_by_peer(shape, kind) > _ALONE else 2, warm_up=warm_up)
        figures[kind] = dataclasses.asdict(Side(timing=timing, memory=memory))
    return figures


def add_memory(rows: Sequence[Row], options: Options) -> None:
    """Measures the memory of all rows of one case, one fresh process for each side."""
    for side in {name: None for row in rows for name in row.sides if name != "twin"}:
        missing = [row for row in rows if side in row.sides and row.sides[side].error is None]
        missing = [row for row in missing if row.sides[side].memory is None]
        if not missing:
            continue
        kinds = [row.kind for row in missing]
        if side == "floor" and kinds[0] != "deformable":
            kinds = kinds[:1]  # the floor is the same for every set
        figures = memory_of(side, MapShape.parse(missing[0].case), kinds, options.threads)
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
    ours, peer, floor = (row.sides.get(name) for name in ("ours", row.peer, "floor"))

    def speed(bound: float) -> Target:
        noise = bound == 1.0 and overlap(peer, ours)
        return Target(f"{row.peer} / ours", ratio(peer, ours, "time"), bound, at_least=True, noise=noise)

    if row.group == "deformable":
        targets.append(speed(DEFORMABLE))
    elif row.group in CASES:
        if "twin" in row.sides:
            same, noise = ratio(row.sides["twin"], ours, "time"), overlap(row.sides["twin"], ours)
            targets.append(Target(f"ours {twin(row.kind)} / ours", same, 1.0, at_least=True, noise=noise))
        elif row.kind in SPEED.get(row.group, {}):
            targets.append(speed(SPEED[row.group][row.kind]))
        if row.kind in FLOOR.get(row.group, {}):
            bound = FLOOR[row.group][row.kind]
            targets.append(Target("ours / floor", ratio(ours, floor, "time"), bound, at_least=False))
        if row.kind in MEMORY.get(row.group, {}):
            bound = MEMORY[row.group][row.kind]
            less = ratio(peer, ours, "memory")
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
    if options.memory:
        advance(f"{case}: memory")
        for size in dict.fromkeys(row.case for row in rows):
            add_memory([row for row in rows if row.case == size], options)


def plan(case: str, sets: Sequence[str] | None) -> list[tuple[str, MapShape, str]]:
    """Group, shape and term set of each row of a case.

    Raises:
        ValueError: If there is no such case or set.
    """
    for terms in sets or ():
        parse_terms(terms)
    group, _, size = case.partition(":")
    if group == "growth":
        start = MapShape.parse(size or GROWTH_DEFAULT)
        chosen = [terms for terms in sets or GROWTH_SETS if terms in GROWTH_SETS] or sets or GROWTH_SETS
        return [(case, start.scaled(2**step), terms) for terms in chosen for step in range(3)]
    if group == "deformable":
        return [(case, MapShape.parse(size or DEFORMABLE_DEFAULT), group)]
    return [(case, MapShape.parse(case), terms) for terms in sets or reversed(TERM_SETS)]


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

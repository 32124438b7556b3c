"""Tables of `benchmarks.attention`, made only from the JSON files that its runs left."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.attention_sides import Shape
from benchmarks.measure import Side, Target, markdown_settings, markdown_table, ratio


@dataclasses.dataclass
class Row:
    """One case and term set, all sides.

    Attributes:
        group: The case of the command line.
        case: Its size, such as `256x50x84s2`.
        kind: Term set, or `deformable`.
        peer: Name of the side that ours is compared with.
        sides: What each side cost: `ours`, `naive`, the peer, `floor`, and where the peer fails `twin`.
        difference: Largest difference of output and input gradient between ours and its peers, relative to the largest
            value; None where all of them fail.
        targets: Figures beside their bounds.
    """

    group: str
    case: str
    kind: str
    peer: str
    sides: dict[str, Side]
    difference: float | None = None
    targets: list[Target] = dataclasses.field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the verdict on each target is added."""
        return dataclasses.asdict(self) | {"targets": [target.as_dict() for target in self.targets]}

    @classmethod
    def from_dict(cls, figures: dict[str, Any]) -> "Row":
        """From `as_dict`."""
        sides = {name: Side.from_dict(side) for name, side in figures["sides"].items()}
        targets = [Target.from_dict(target) for target in figures["targets"]]
        return cls(**(figures | {"sides": sides, "targets": targets}))


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run measured, where and how."""

    machine: dict[str, Any]
    options: dict[str, Any]
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"machine": self.machine, "options": self.options, "rows": [row.as_dict() for row in self.rows]}


def read_run(path: Path) -> Run:
    """A run from its file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not hold a run.
    """
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        return Run(figures["machine"], figures["options"], [Row.from_dict(row) for row in figures["rows"]])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a result of benchmarks.attention ({type(error).__name__}: {error}). "
            "Give the JSON files that it wrote."
        ) from error


def title(group: str) -> str:
    """A heading for the rows of a case."""
    name, _, size = group.partition(":")
    if name in ("growth", "deformable"):
        heading = "growth with the size of the map" if name == "growth" else "deformable 3x3 convolution"
        return heading + (f", {size}" if size else "")
    return Shape.parse(group).describe()


def _milliseconds(side: Side | None) -> str:
    if side is None:
        return ""
    if side.timing is None:
        return (side.error or "-").split(":")[0]
    lower, upper = side.timing.quartiles
    digits = 2 if side.timing.median < 0.01 else 1 if side.timing.median < 0.1 else 0
    if len(side.timing.seconds) == 1:
        return f"{1e3 * side.timing.median:.{digits}f} (once)"
    return f"{1e3 * side.timing.median:.{digits}f} ({1e3 * lower:.{digits}f}-{1e3 * upper:.{digits}f})"


def _megabytes(side: Side | None) -> str:
    if side is None or side.memory is None:
        return ""
    return f"{side.memory.increase / 1e6:.0f}"


def _factor(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the rows of one case; a side has columns where it was measured."""
    peers = list(dict.fromkeys([rows[0].peer, *(name for row in rows for name in row.sides if name == "naive")]))
    names = ["ours", *peers, "floor"]
    weighed = [name for name in names if any(row.sides.get(name, Side()).memory is not None for row in rows)]
    header = ["set", *(f"{name} ms" for name in names), *(f"{peer} / ours" for peer in peers), "ours / floor"]
    header += [f"{name} MB" for name in weighed]
    if {"ours", rows[0].peer} <= set(weighed):
        header.append(f"{rows[0].peer} / ours MB")
    header.append("targets")
    cells = []
    for row in rows:
        sides = {name: row.sides.get(name) for name in names}
        ours, theirs = sides["ours"], sides[row.peer]
        name = f"{row.kind} at {row.case}" if row.group.partition(":")[0] == "growth" else row.kind
        line = [name, *(_milliseconds(sides[name]) for name in names)]
        line += [_factor(ratio(sides[peer], ours, "time")) for peer in peers]
        line.append(_factor(ratio(ours, sides["floor"], "time")))
        line += [_megabytes(sides[name]) for name in weighed]
        if {"ours", rows[0].peer} <= set(weighed):
            line.append(_factor(ratio(theirs, ours, "memory")))
        cells.append([*line, "; ".join(map(str, row.targets))])
    return header, cells


def _notes(rows: Iterable[Row]) -> list[str]:
    """What the cells have no room for."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for name, side in row.sides.items():
            if side.error is not None:
                reasons.setdefault(f"{name} {side.error}", []).append(row.kind)
    notes = [f"{', '.join(dict.fromkeys(kinds))}: {reason}" for reason, kinds in reasons.items()]
    differences = [row.difference for row in rows if row.difference is not None]
    if differences:
        notes.append(
            f"Output and input gradient of ours and of the peer differ by at most {max(differences):.1g} of the "
            "largest value."
        )
    return notes


def print_table(console: Console, rows: Sequence[Row]) -> None:
    """The rows of one case on the terminal."""
    header, cells = table(rows)
    styled = Table(title=title(rows[0].group), title_justify="left", show_lines=False)
    for index, name in enumerate(header):
        styled.add_column(name, justify="left" if index in (0, len(header) - 1) else "right")
    for line, row in zip(cells, rows, strict=True):
        missed = any(target.verdict in ("not met", "not measured") for target in row.targets)
        styled.add_row(*line[:-1], line[-1].replace("; ", "\n"), style="red" if missed else None)
    console.print(styled)
    for note in _notes(rows):
        console.print(f"  {note}", style="dim", highlight=False, markup=False)


def by_group(runs: Sequence[Run]) -> dict[str, list[Row]]:
    """The rows of all runs by case; of a row that several runs measured, the last."""
    groups: dict[str, dict[tuple[str, str], Row]] = {}
    for run in runs:
        for row in run.rows:
            groups.setdefault(row.group, {})[row.case, row.kind] = row
    return {group: list(rows.values()) for group, rows in groups.items()}


def markdown(runs: Sequence[Run]) -> str:
    """All tables, the machine, and how it was measured."""
    lines = ["# Attention: time and memory, forward and backward", ""]
    settings = [run.machine | run.options | {"memory_bytes": f"{run.machine['memory_bytes']:,}"} for run in runs]
    shared = {name: value for name, value in settings[0].items() if all(other.get(name) == value for other in settings)}
    for items in (shared, *({name: run[name] for name in run if name not in shared} for run in settings)):
        if items:
            lines.append(markdown_settings(items))
    lines += [
        "",
        "Median of interleaved repetitions (lower to upper quartile); memory is what the steps add at their peak to a "
        "process that has only made the module and its input. Batch 1 and float32 unless a heading says otherwise; 8 "
        "heads. The floor is E1 alone by torch's scaled_dot_product_attention between the same projections (for the "
        "deformable convolution: a regular one), which computes less; naive is all energies of a set added up, one "
        "softmax, one product. "
        '"(once)": a peer too large to run beside the others, one step in the process that measures its memory.',
    ]
    for group, rows in by_group(runs).items():
        header, cells = table(rows)
        lines += ["", f"## {title(group).capitalize()}", "", *markdown_table(header, cells)]
        notes = _notes(rows)
        if notes:
            lines += [""] + [f"- {note}" for note in notes]
    return "\n".join(lines) + "\n"

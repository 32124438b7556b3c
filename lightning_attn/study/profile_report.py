"""A profile for people (a table and a tree on the terminal) and for programs (JSON and CSV)."""

import dataclasses
import math
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_attn.errors import InputError
from lightning_attn.io import write_json, write_table
from lightning_attn.study.network_profile import NetworkProfile, Part, Pass

__all__ = ["LEGEND", "ProfileReport", "check_output"]

LEGEND: Mapping[str, str] = {
    "multiply-adds (m-adds)": (
        "done by this network here: one multiplication and one addition are 1 (FLOPs / 2). Matrix products, "
        "convolutions, fused attention, sampling and element-wise products; the training step's are those of forward "
        "and backward pass."
    ),
    "paper's count (paper's)": (
        "as the paper counts GFLOPs (Zhu et al. 2019, Tables 2 and 3): each attention by a formula, other layers by "
        "their products, a multiply-add as 1; forward pass only. Offset branches, gates, normalisation and, in "
        "translation, the output projection are free."
    ),
    "added by attention": (
        "the part that a network without any attention would not have; in translation also without that of the decoder "
        "to the source."
    ),
    "time": (
        "wall time of one batch: median and quartiles of runs without any hook. The tree is from separate "
        "runs of the forward pass, in which each part is timed, and which are slower."
    ),
    "peak memory": (
        "weights, gradients and optimizer state, and what a pass adds at its peak: torch's allocations on CUDA, the "
        "growth of resident memory on the CPU."
    ),
    "training step": "forward and backward pass and the optimizer, in training mode.",
    "tree": (
        "a part contains those below it; (itself) is what it does outside them. Equal neighbours are one row. Parts "
        "below 0.5 % in every column are in the files only (--output), as are deeper ones (--depth)."
    ),
}
_UNCOUNTED_MEANING = (
    "no multiply-adds are counted for these; their share of time is in that of the part that calls them"
)
_MOST_OPERATORS = 8
_LEAST_SHARE = 0.005  # of any column: what has less is in the files only


class _Column(NamedTuple):
    """A quantity of the tree: its heading, the attributes of `Part`, and how it is shown."""

    heading: str
    total: str
    own: str
    shown: Callable[[float], str]

    def cells(self, values: Mapping[str, float | None], root: Part) -> tuple[str, str]:
        """Value and share in percent; nothing for zero."""
        value, whole = values[self.total], getattr(root, self.total)
        if not value or not whole:
            return "", ""
        return self.shown(value), f"{100 * value / whole:.1f}"


@dataclasses.dataclass(frozen=True)
class ProfileReport:
    """A profile and where it is from.

    Attributes:
        profile: The measurements.
        facts: Task, network, inputs, device, precision, command, date and versions, as plain values.
        batch_size: Images, or pairs of sentences, in a batch.
        sample: What one of them is called.
        unit: What speed is counted in.
        notes: Where numbers were assumed.
    """

    profile: NetworkProfile
    facts: Mapping[str, Any]
    batch_size: int
    sample: str
    unit: str
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        profile, root = self.profile, self.profile.parts[0]
        return {
            "format": 1,
            **self.facts,
            "batch_size": self.batch_size,
            "sample": self.sample,
            "unit": self.unit,
            "notes": list(self.notes),
            "parameters": profile.parameters,
            "trained_parameters": profile.trained_parameters,
            "forward": dataclasses.asdict(profile.forward),
            "training_step": dataclasses.asdict(profile.training_step),
            "parts": [dataclasses.asdict(part) | {"shares": _shares(part, root)} for part in profile.parts],
            "legend": dict(LEGEND),
        }

    def write(self, path: Path) -> Path:
        """Writes everything (.json) or the parts, of which the first is the whole (.csv).

        Returns:
            The file, which has another name if that was taken.

        Raises:
            ValueError: If the suffix is no format.
        """
        check_output(path)
        if path.suffix == ".json":
            return write_json(path, self.as_dict())
        root = self.profile.parts[0]
        names = [field.name for field in dataclasses.fields(Part)]
        columns = ["parameters", "multiply_adds", "paper_multiply_adds", "seconds"]
        rows = []
        for part in self.profile.parts:
            shares = _shares(part, root)
            rows.append([*(getattr(part, name) for name in names), *(shares[column] for column in columns)])
        return write_table(path, [*names, *(f"{column}_share" for column in columns)], rows)

    def print(self, depth: int, console: Console | None = None) -> None:
        """Prints totals, the tree and the legend.

        Args:
            depth: Levels of the tree below the whole.
            console: Where to; None for the standard output.
        """
        console = console or Console()
        facts = self.facts
        console.print(f"[bold]{escape(str(facts['task']))}[/bold], {escape(str(facts['inputs']))}")
        console.print(escape(f"{facts['device']}, {facts['precision']}, torch {facts['versions']['torch']}"))
        for note in self.notes:
            console.print(f"[dim]- {escape(note)}[/dim]", highlight=False)
        console.print()
        console.print(self._totals())
        console.print()
        console.print(self._tree(depth, console.width))
        self._print_uncounted(console)
        console.print()
        for word, meaning in LEGEND.items():
            console.print(f"[bold]{word}[/bold]: {meaning}", style="dim", highlight=False)

    def _totals(self) -> Table:
        profile, number = self.profile, self.batch_size
        forward, step = profile.forward, profile.training_step
        table = Table(box=None, pad_edge=False, title="Totals", title_justify="left", title_style="bold")
        table.add_column("")
        table.add_column("forward", justify="right")
        table.add_column("training step", justify="right")

        def row(name: str, value: Callable[[Pass], str]) -> None:
            shown = value(forward), value(step)
            if shown != ("-", "-"):
                table.add_row(name, *shown)

        table.add_row("parameters", scaled(profile.parameters), f"{scaled(profile.trained_parameters)} trained")
        row("multiply-adds", lambda one: scaled(one.multiply_adds))
        if number > 1:
            row(f"  per {self.sample}", lambda one: scaled(one.multiply_adds / number))
        row(
            f"  added by attention, per {self.sample}",
            lambda one: _or_dash(one.attention, lambda x: scaled(x / number)),
        )
        row(
            f"paper's count, per {self.sample}",
            lambda one: _or_dash(one.paper_multiply_adds, lambda x: scaled(x / number)),
        )
        row("  added by attention", lambda one: _or_dash(one.paper_attention, lambda x: scaled(x / number)))
        row("time, median", lambda one: _or_dash(one.latency, lambda x: duration(x.median)))
        row(
            "  quartiles (runs)",
            lambda one: _or_dash(
                one.latency, lambda x: f"{duration(x.lower_quartile)} .. {duration(x.upper_quartile)} ({x.runs})"
            ),
        )
        row(
            f"{self.unit} per second",
            lambda one: _or_dash(one.per_second, lambda x: f"{x:,.4g}" if x < 1e4 else f"{x:,.0f}"),
        )
        row("peak memory", lambda one: _or_dash(one.peak_memory, bytes_of))
        return table

    def _tree(self, depth: int, width: int) -> Table:
        root = self.profile.parts[0]
        columns = [column for column in _COLUMNS if getattr(root, column.total) is not None]
        rows = [
            (label, kind, [column.cells(values, root) for column in columns])
            for label, kind, values in self._rows(depth)
        ]
        table = Table(
            box=None,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            title="Forward pass by part",
            title_justify="left",
            title_style="bold",
        )
        cells: list[list[str]] = [[text for pair in row[2] for text in pair] for row in rows]
        heads = [text for column in columns for text in (column.heading, "%")]
        widths = [max(len(head), *(len(row[place]) for row in cells)) for place, head in enumerate(heads)]
        used = sum(widths) + len(widths)  # one space between columns
        names = [f"{label} {kind}".rstrip() for label, kind, _ in rows]
        room = max(16, width - used)
        with_kinds = max(map(len, names)) <= room
        table.add_column("part", overflow="fold", max_width=room)
        for place, (head, least) in enumerate(zip(heads, widths, strict=True)):
            table.add_column(head, justify="right", no_wrap=True, min_width=least, style="cyan" if place % 2 else "")
        for (label, kind, _), row in zip(rows, cells, strict=True):
            table.add_row(f"{escape(label)} [dim]{escape(kind)}[/dim]" if with_kinds and kind else escape(label), *row)
        return table

    def _rows(self, depth: int) -> list[tuple[str, str, Mapping[str, float | None]]]:
        """Indented label, class, and values of every row of the tree."""
        parts = self.profile.parts
        root = parts[0]
        children: dict[str, list[Part]] = {part.name: [] for part in parts}
        for part in parts[1:]:
            children[_parent(part.name, children)].append(part)
        rows: list[tuple[str, str, Mapping[str, float | None]]] = []

        def add(group: Sequence[Part], label: str, level: int) -> None:
            """Adds like parts as one row, and the rows below them."""
            first = group[0]
            total, own = _summed(group, [one.total for one in _COLUMNS]), _summed(group, [one.own for one in _COLUMNS])
            if level and not _is_worth_a_row(total, root):
                return
            rows.append(("  " * level + label, first.kind if level else "", total))
            if level >= depth or not children[first.name]:
                return
            renamed = {one.total: own[one.own] for one in _COLUMNS}
            if _is_worth_a_row(renamed, root):
                rows.append(("  " * (level + 1) + "(itself)", "", renamed))
            for places in _alike(children[first.name], children):
                inner = [children[part.name][place] for part in group for place in places]
                begin, end = (
                    children[first.name][place].name[len(first.name) :].lstrip(".") for place in (places[0], places[-1])
                )
                add(inner, f"{begin}-{end} ({len(places)}x)" if len(places) > 1 else begin, level + 1)

        add([root], "whole", 0)
        return rows

    def _print_uncounted(self, console: Console) -> None:
        found = sorted(self.profile.forward.uncounted.items(), key=lambda pair: (pair[0].startswith("aten."), -pair[1]))
        if not found:
            return
        listed = [f"{name.removeprefix('aten.')} ({scaled(number)})" for name, number in found[:_MOST_OPERATORS]]
        more = f", and {len(found) - len(listed)} more (in JSON)" if len(found) > len(listed) else ""
        console.print()
        console.print(
            f"[bold]Not counted[/bold]: {escape(', '.join(listed))}{more} - numbers written in the forward pass; "
            f"{_UNCOUNTED_MEANING}.",
            highlight=False,
        )


def scaled(number: float) -> str:
    """A count with three digits and a prefix: k, M, G, T."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * factor:
            return f"{_three_digits(number / factor)} {prefix}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """A time in s, ms or us."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= 0.9995 * factor:
            return f"{_three_digits(seconds / factor)} {unit}"
    return f"{seconds * 1e6:.0f} us"


def bytes_of(number: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def _three_digits(number: float) -> str:
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"


_COLUMNS = (
    _Column("params", "parameters", "own_parameters", scaled),
    _Column("m-adds", "multiply_adds", "own_multiply_adds", scaled),
    _Column("paper's", "paper_multiply_adds", "own_paper_multiply_adds", scaled),
    _Column("time", "seconds", "own_seconds", duration),
)


def check_output(path: Path) -> None:
    """Refuses a file that is neither JSON nor CSV, before anything is measured.

    Raises:
        ValueError: Names the two.
    """
    if path.suffix not in (".json", ".csv"):
        raise InputError(f"output: {path} must end in .json (everything) or .csv (the parts).")


def _or_dash(value: Any, shown: Callable[[Any], str]) -> str:
    return "-" if value is None else shown(value)


def _parent(name: str, names: Container[str]) -> str:
    """The closest module around one, among those that are listed."""
    while name:
        name = name.rpartition(".")[0]
        if name in names:
            break
    return name


def _alike(parts: Sequence[Part], children: Mapping[str, Sequence[Part]]) -> list[list[int]]:
    """Places of neighbours that are equal in everything but time, together."""

    def signature(part: Part) -> tuple[object, ...]:
        inner = tuple((one.name[len(part.name) :], signature(one)) for one in children[part.name])
        return (part.kind, part.parameters, part.multiply_adds, part.paper_multiply_adds, inner)

    groups: list[list[int]] = []
    for place, part in enumerate(parts):
        numbered = part.name.rpartition(".")[2].isdecimal()
        if groups and numbered and signature(parts[groups[-1][-1]]) == signature(part):
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _summed(group: Sequence[Part], names: Sequence[str]) -> dict[str, float | None]:
    sums: dict[str, float | None] = {}
    for name in names:
        values = [getattr(part, name) for part in group]
        sums[name] = None if None in values else sum(values)
    return sums


def _is_worth_a_row(values: Mapping[str, float | None], root: Part) -> bool:
    return any((value or 0) >= _LEAST_SHARE * (getattr(root, name) or math.inf) for name, value in values.items())


def _shares(part: Part, root: Part) -> dict[str, float | None]:
    """The fractions of the whole."""
    shares: dict[str, float | None] = {}
    for name in ("parameters", "multiply_adds", "paper_multiply_adds", "seconds"):
        value, whole = getattr(part, name), getattr(root, name)
        shares[name] = value / whole if value is not None and whole else None
    return shares

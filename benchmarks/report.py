"""The one writer of results: JSON, Markdown and tables on the terminal, all with the same header."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks.case import Benchmark, Case, Table
from benchmarks.fresh_process import REPOSITORY
from benchmarks.results import Result, Target, ratio
from lightning_attn.datamodules.machine import available_cores, processor_name
from lightning_attn.io import unused_path, write_figure, write_json, write_text

if TYPE_CHECKING:
    from rich.console import Console  # what a terminal needs; files are written without it

_WIDTH = 220  # characters of the output where it is a file, which has no width of its own


class Report(NamedTuple):
    """What one run measured, where (see `machine`) and with which options of the command line."""

    machine: Mapping[str, Any]
    options: Mapping[str, Any]
    results: Sequence[Result]


def machine(*packages: str) -> dict[str, str | int]:
    """What the figures depend on: processor, cores, memory, versions, date, commit."""
    described: dict[str, str | int] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor_name(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for name in ("torch", "torchvision", "pytorch-lightning", *packages):
        try:
            described[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            described[name] = "not installed"
    commit = _git("rev-parse", "HEAD")
    if commit:
        described["commit"] = commit + (" with changes" if _git("status", "--porcelain") else "")
    return described


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def milliseconds(seconds: float) -> str:
    """With three digits or so."""
    return f"{1e3 * seconds:.{2 if seconds < 0.01 else 1 if seconds < 0.1 else 0}f}"


def tabulate(case: Case, result: Result) -> Table:
    """The table of a result: the case's own, or a line for each side."""
    if case.table is not None:
        return case.table(result)
    rows = [(comparison, name, side) for comparison in result.comparisons for name, side in comparison.sides.items()]
    several = len(result.comparisons) > 1
    slow = all(side.timing is None or side.timing.median > 1 for *_, side in rows)
    weighed = any(side.memory is not None or (side.timing is not None and side.error) for *_, side in rows)
    shown = "{:.2f}".format if slow else milliseconds
    header = [*([""] if several else []), "side", "s" if slow else "ms", "quartiles", *case.rates]
    header += ([] if case.base is None else [f"time / {case.base}"]) + (["GB in all", "MB added"] if weighed else [])
    cells = []
    for comparison, name, side in rows:
        line = [*([comparison.name] if several else []), name]
        if side.timing is None:
            line.append(side.error or "-")
        else:
            line += [shown(side.timing.median), "-".join(map(shown, side.timing.quartiles))]
            line += [f"{rate(result.problem, side.timing.median):.1f}" for rate in case.rates.values()]
            if case.base is not None:
                relative = ratio(side, comparison.sides.get(case.base), "time")
                line.append("" if relative is None else f"{relative:.3f}")
            if side.memory is not None:
                line += [f"{side.memory.peak / 1e9:.2f}", f"{side.memory.increase / 1e6:.0f}"]
            elif weighed:
                line.append(side.error or "")
        cells.append(line + [""] * (len(header) - len(line)))
    notes: list[Target | str] = [target for comparison in result.comparisons for target in comparison.targets]
    notes += [
        f"results differ by at most {comparison.difference:.1g} of the largest value"
        for comparison in result.comparisons
        if comparison.difference is not None
    ]
    return Table(header, cells, [*notes, *case.notes(result)])


def output_console() -> "Console":
    """The output, wide where it is a file."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=_WIDTH)


def print_result(console: "Console", case: Case, result: Result) -> None:
    """A table with its notes; red is what missed its target."""
    from rich.table import Table as StyledTable

    table = tabulate(case, result)
    console.print(f"{result.case}: {result.title}", style="italic", highlight=False, markup=False)
    styled = StyledTable()
    for index, name in enumerate(table.header):
        first_or_words = index == 0 or not any(line[index][:1].isdigit() for line in table.cells)
        styled.add_column(name, justify="left" if first_or_words else "right")
    for index, line in enumerate(table.cells):
        styled.add_row(*(cell.replace("; ", "\n") for cell in line), style="red" if index in table.missed else None)
    console.print(styled)
    for note in table.notes:
        red = isinstance(note, Target) and note.verdict != "met"
        console.print(f"  {note}", style="red" if red else None, highlight=False, markup=False)


def markdown_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *cells)]


def settings(values: Mapping[str, object]) -> str:
    """Settings and their values on one line."""
    return ", ".join(
        f"{name.replace('_', ' ')}: {f'{value:,}' if name == 'memory_bytes' else value}"
        for name, value in values.items()
    )


def markdown(benchmark: Benchmark, reports: Sequence[Report]) -> str:
    """All tables, the machine, and how it was measured; of several reports as one."""
    of_runs = [{**report.machine, **report.options} for report in reports]
    shared = {name: value for name, value in of_runs[0].items() if all(run.get(name) == value for run in of_runs)}
    lines = [f"# {benchmark.title}", ""]
    for items in (shared, *({name: run[name] for name in run if name not in shared} for run in of_runs)):
        if items:
            lines.append(f"- {settings(items)}")
    lines += ["", benchmark.method]
    for result in merged(reports):
        table = tabulate(benchmark.cases_named(result.case)[0], result)
        lines += ["", f"## {result.case}: {result.title}", ""]
        rounds = {
            len(side.timing.seconds)
            for comparison in result.comparisons
            for side in comparison.sides.values()
            if side.timing is not None
        }
        described = [result.sizes] if result.sizes else []
        described += ["times of each side: " + "-".join(map(str, sorted({min(rounds), max(rounds)})))] if rounds else []
        lines += ["; ".join(described), ""] if described else []
        lines += markdown_table(table.header, table.cells)
        if table.notes:
            lines += ["", *(f"- {note}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def merged(reports: Sequence[Report]) -> list[Result]:
    """The results of all reports; of what several runs measured at the same sizes, the last counts."""
    found: dict[tuple[str, str], Result] = {}
    for result in (result for report in reports for result in report.results):
        earlier = found.get((result.case, result.sizes))
        comparisons = {comparison.name: comparison for comparison in (earlier.comparisons if earlier else [])}
        comparisons |= {comparison.name: comparison for comparison in result.comparisons}
        found[result.case, result.sizes] = dataclasses.replace(result, comparisons=list(comparisons.values()))
    return list(found.values())


def read_report(path: Path) -> Report:
    """A report from its JSON file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not hold a report.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Report(values["machine"], values["options"], [Result.from_dict(found) for found in values["results"]])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a result of python -m benchmarks ({type(error).__name__}: {error}). "
            "Give the JSON files that it wrote."
        ) from error


def write_report(benchmark: Benchmark, reports: Sequence[Report], folder: Path, stem: str) -> Path:
    """Writes Markdown, the figure where there is one, and of a single report JSON; prints where they are.

    Returns:
        The Markdown's path; the others differ in their endings.
    """
    path = unused_path(folder / f"{stem}.md")
    if len(reports) == 1:
        path = write_json(unused_path(folder / f"{stem}.json"), _values(reports[0])).with_suffix(".md")
    write_text(path, markdown(benchmark, reports))
    figure = None if benchmark.draw is None else benchmark.draw(merged(reports))
    if figure is not None:
        write_figure(path.with_suffix(".png"), figure)
    print(f"Results: {path.with_suffix('')}.*")
    return path


def update_report(benchmark: Benchmark, report: Report, path: Path) -> None:
    """Replaces the JSON file `path` of a run in progress, and the Markdown beside it; each is complete at any time."""
    write_json(path, _values(report), replace=True)
    write_text(path.with_suffix(".md"), markdown(benchmark, [report]), replace=True)


def _values(report: Report) -> dict[str, Any]:
    return report._asdict() | {"results": [dataclasses.asdict(result) for result in report.results]}

"""Tables of a study on a terminal, and the same as data."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Group as Stack
from rich.markup import escape
from rich.table import Table

from lightning_attn.study.grid import Study, format_duration
from lightning_attn.study.states import STATES, CellStatus, State, older_code_of, scores_of
from lightning_attn.study.statistics import Judgement, Summary, judge, summarize

__all__ = ["as_data", "cells_table", "counts_line", "findings_table", "groups_table", "live_table"]

_COLOURS = {
    **{"done": "green", "running": "cyan", "waiting": "dim", "interrupted": "yellow", "failed": "bold red"},
    **{"stale": "magenta", "supported": "green", "contradicted": "bold red", "undecided": "yellow", "not run": "dim"},
}
_MOST_ROWS = 12  # of the live table


def counts_line(statuses: Sequence[CellStatus]) -> str:
    """How many cells are in which state, such as "12 done, 2 running"."""
    return ", ".join(f"{number} {state}" for state, number in _counts(statuses).items() if number) or "no cells"


def cells_table(study: Study, statuses: Sequence[CellStatus], title: str = "") -> Table:
    """A row a cell: state, step, score in validation and test, time left."""
    table = Table("cell", "seed", "state", "step", "validation", escape(study.metric), "ETA")
    table.title, table.title_justify = escape(title), "left"
    table.columns[2].min_width = max(map(len, STATES))
    for status in statuses:
        state = _coloured(status.state) + (f": {escape(status.reason)}" if status.reason else "")
        step = "-" if status.step is None else f"{status.step:,}"
        total = f"/{status.cell.total_steps:,}" if status.cell.total_steps else ""
        table.add_row(
            escape(study.title(status.cell.group)),
            str(status.cell.seed),
            state,
            step + total,
            _number(status.validation),
            _number(status.score),
            escape(status.eta) or ("" if status.seconds is None else f"took {format_duration(status.seconds)}"),
        )
    return table


def live_table(study: Study, statuses: Sequence[CellStatus], seconds: float | None) -> Stack:
    """What runs, the newest of the rest, and how many cells are in which state.

    Args:
        study: The study.
        statuses: Of its cells.
        seconds: Until all are done; None if unknown.
    """
    active = [status for status in statuses if status.state == "running"]
    others = [status for status in statuses if status.state in ("failed", "interrupted")]
    done = [status for status in statuses if status.state == "done"]
    rows = (active + others + done)[:_MOST_ROWS]
    left = "" if seconds is None or not active else f"; about {format_duration(seconds)} left"
    return Stack(cells_table(study, rows), f"{escape(study.name)}: {counts_line(statuses)}{left}")


def groups_table(study: Study, statuses: Sequence[CellStatus]) -> Table:
    """A row a group: mean, spread and interval over seeds beside the paper's numbers."""
    names = _reference_names(study)
    metric, papers = escape(study.metric), (escape(f"paper: {one}") for one in names)
    table = Table("cell", "n", f"{metric}, mean", "spread", "95 % interval", *papers)
    _say_which_code(table, statuses)
    for group, summary in _summaries(study, statuses).items():
        reference = study.reference.get(group, {})
        numbers = ["-" if one not in reference else f"{reference[one]:g}" for one in names]
        interval = f"{summary.low:.4g} to {summary.high:.4g}" if summary.n > 1 else "one run" if summary.n else "-"
        table.add_row(
            escape(study.title(group)),
            str(summary.n),
            _number(summary.mean),
            _number(summary.spread),
            interval,
            *numbers,
        )
    return table


def findings_table(study: Study, statuses: Sequence[CellStatus]) -> Table:
    """A row a finding: verdict, difference with its interval, number of seeds."""
    table = Table("finding", "expected", "difference", "95 % interval", "n", "p (Holm)", "verdict")
    _say_which_code(table, statuses)
    for one in judge(study.findings, scores_of(statuses)):
        difference = one.difference
        interval = f"{difference.low:+.3g} to {difference.high:+.3g}" if difference.n > 1 else "-"
        table.add_row(
            escape(one.finding.claim),
            _expectation(one),
            "-" if not difference.n else f"{difference.mean:+.3g}",
            interval,
            str(difference.n),
            "-" if one.note else f"{one.p:.2g}",
            _coloured(one.verdict) + (f": {escape(one.note)}" if one.note and difference.n else ""),
        )
    return table


def as_data(study: Study, statuses: Sequence[CellStatus]) -> dict[str, Any]:
    """Everything that the tables show, as JSON can hold it.

    `older_code` is the version of the code that means and verdicts are of, if that is not the present one.
    """
    return {
        "study": study.name,
        "metric": study.metric,
        "counts": _counts(statuses),
        "older_code": older_code_of(statuses) or None,
        "cells": [
            {
                "cell": status.cell.labels,
                "seed": status.cell.seed,
                "folder": str(status.folder.path),
                "state": status.state,
                "reason": status.reason,
                "step": status.step,
                "total_steps": status.cell.total_steps,
                "validation": status.validation,
                "score": status.score,
                "eta": status.eta,
                "seconds": status.seconds,
            }
            for status in statuses
        ],
        "groups": [
            {
                "cell": dict(zip(study.axes, group, strict=True)),
                "reference": dict(study.reference.get(group, {})),
                **_plain(summary),
            }
            for group, summary in _summaries(study, statuses).items()
        ],
        "findings": [
            {
                "claim": one.finding.claim,
                "expected": one.finding.expected,
                "margin": one.finding.margin,
                "verdict": one.verdict,
                "note": one.note,
                "p": one.p,
                "difference": _plain(one.difference),
            }
            for one in judge(study.findings, scores_of(statuses))
        ],
    }


def _counts(statuses: Sequence[CellStatus]) -> dict[State, int]:
    return {state: sum(status.state == state for status in statuses) for state in STATES}


def _say_which_code(table: Table, statuses: Sequence[CellStatus]) -> None:
    """Below a table, which cells its numbers are of, where they are not of all that have been tested."""
    stale = [status for status in statuses if status.state == "stale"]
    if older := older_code_of(statuses):
        number = sum(status.older_code == older for status in stale)
        table.caption = (
            f"None of these cells is of the present code: this is of {number} stale, of code {escape(older)}."
        )
    elif stale:
        table.caption = f"{len(stale)} stale, by other code, left out."
    table.caption_justify = "left"


def _summaries(study: Study, statuses: Sequence[CellStatus]) -> dict[tuple[str, ...], Summary]:
    scores = scores_of(statuses)
    return {group: summarize(list(scores.get(group, {}).values())) for group in study.groups}


def _reference_names(study: Study) -> list[str]:
    return list(dict.fromkeys(name for numbers in study.reference.values() for name in numbers))


def _expectation(judgement: Judgement) -> str:
    finding = judgement.finding
    if finding.expected == "equal":
        return f"within {finding.margin:g}"
    return f"{finding.expected} by {finding.margin:g}" if finding.margin else finding.expected


def _plain(summary: Summary) -> dict[str, float | int | None]:
    values: dict[str, float | int] = dataclasses.asdict(summary)
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"


def _coloured(word: str) -> str:
    return f"[{_COLOURS[word]}]{word}[/]"

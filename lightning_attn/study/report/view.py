"""What a report shows of a study: the values that the template needs, and the plots."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_attn.configurations import shown
from lightning_attn.study.grid import Finding
from lightning_attn.study.report import formatting
from lightning_attn.study.report.charts import (
    Panel,
    Point,
    Row,
    curve_panel,
    curve_scales,
    draw_curves,
    draw_forest,
    draw_forest_row,
    draw_scatter,
    forest_scale,
    front_of,
    thinned,
)
from lightning_attn.study.report.collecting import COSTS, CellRecord, CostKind, Curve, GroupRecord, StudyRecord
from lightning_attn.study.report.reading import read_tail
from lightning_attn.study.report.svg import element, path
from lightning_attn.study.states import STATES
from lightning_attn.study.statistics import Summary, Verdict
from lightning_attn.training.scores import best_mode

__all__ = ["View", "view_of"]

_KINDS = {
    **{"done": "good", "running": "info", "waiting": "mute", "interrupted": "warn", "failed": "bad", "stale": "other"},
    **{"supported": "good", "contradicted": "bad", "undecided": "warn", "not run": "mute"},
}
_SIGNS = {"good": "✓", "bad": "✕", "warn": "?", "mute": "–", "info": "…", "other": "≠"}
_VERDICTS: tuple[Verdict, ...] = ("supported", "contradicted", "undecided", "not run")
_EXAMPLES = 6
_MOST_COMPARED = 20  # groups of which any two are compared: as many squared are the words for it
_PROBLEMS = 12  # of which the end of the log is shown


@dataclasses.dataclass(frozen=True)
class View:
    """What is shown of a study, and its plots.

    Attributes:
        record: The study.
        values: What the template needs.
        plots: By the name of their file.
    """

    record: StudyRecord
    values: Mapping[str, Any]
    plots: Mapping[str, Panel]


def view_of(record: StudyRecord, place: int, command: str, *, is_alone: bool = True) -> View:
    """What the page shows of a study.

    Args:
        record: The study.
        place: Its number in the page.
        command: How the command is called, such as `python train.py`.
        is_alone: Whether the page has no other study.
    """
    return _Viewer(record, place, command, is_alone=is_alone).view()


class _Viewer:
    """Turns a study's record into what the template shows."""

    def __init__(self, record: StudyRecord, place: int, command: str, *, is_alone: bool) -> None:
        self.record, self.study = record, record.study
        self.is_alone = is_alone
        self.name, self.command = f"s{place}", command.split()
        scores = [score for group in record.groups for score in group.scores.values()]
        if record.is_same_score:
            name = record.reference_score
            scores += [one.reference[name] for one in record.groups if name in one.reference]
        self.places = formatting.decimals(scores)
        self.more_is_better = self.study.mode == "max"
        self.plots: dict[str, Panel] = {}
        self.fronts: dict[str, set[int]] = {}
        self.place_of = {group.group: number for number, group in enumerate(record.groups)}
        self.colour_axis = self._colour_axis()

    def view(self) -> View:
        record = self.record
        accuracy = self._accuracy()
        values = {
            "id": self.name,
            "name": self.study.name,
            "description": self.study.description,
            "file": str(self.study.path),
            "root": str(record.root),
            "axes": list(self.study.axes),
            "seeds": len(self.study.seeds),
            "metric": self.study.metric,
            "score_name": record.score_name,
            "scale": self.study.scale,
            "more_is_better": self.more_is_better,
            "counts": [
                {"state": state, "number": number, "kind": _KINDS[state]}
                for state in STATES
                if (number := sum(one.status.state == state for one in record.cells))
            ],
            "by_state": {state: sum(one.status.state == state for one in record.cells) for state in STATES},
            "by_verdict": self._by_verdict(),
            "num_cells": len(record.cells),
            "older_code": record.older_code,
            "num_compared": sum(one.summary.n for one in record.groups),
            "is_new": all(one.status.state == "waiting" for one in record.cells),
            "num_groups": len(record.groups),
            "time": self._time(),
            "best": self._best(),
            "verdicts": self._verdicts(),
            "notes": self._notes(),
            "problems": self._problems(),
            "accuracy": accuracy,
            "paper": self._paper(),
            "groups": self._groups(),
            "group_columns": self._group_columns(),
            "pairs": self._pairs(),
            "findings": self._findings(),
            "has_test_intervals": any(one.test_interval for one in record.groups)
            or any(one.test_interval for one in record.findings),
            "examples": self._examples(),
            "curves": self._curves(),
            "cells": [self._cell(one, place) for place, one in enumerate(record.cells)],
            "again": f"{' '.join(self.command)} study run {shown(self.study.path)}",
        }
        return View(record, values, self.plots)

    def score(self, value: float | None) -> str:
        return formatting.fixed(value, self.places)

    def between(self, low: float, high: float, *, sign: bool = False) -> str:
        shown: Callable[[float | None, int], str] = formatting.signed if sign else formatting.fixed
        return f"{shown(low, self.places)} to\N{NO-BREAK SPACE}{shown(high, self.places)}"  # a line may break before it

    def _colour_axis(self) -> int | None:
        """The axis that colours tell, where several are."""
        sizes = [(len(levels), place) for place, levels in enumerate(self.study.axes.values()) if len(levels) > 1]
        fit = [(size, place) for size, place in sizes if size <= 6]
        return min(fit)[1] if len(sizes) > 1 and fit else None

    def _label(self, group: GroupRecord) -> str:
        varied = [place for place, levels in enumerate(self.study.axes.values()) if len(levels) > 1] or [0]
        return " ".join(group.group[place] for place in varied if place != self.colour_axis)

    def _series(self, group: GroupRecord) -> int:
        if self.colour_axis is None:
            return 0
        levels = [level.label for level in list(self.study.axes.values())[self.colour_axis]]
        return levels.index(group.group[self.colour_axis])

    def _series_names(self) -> list[str]:
        if self.colour_axis is None:
            return []
        axis, levels = list(self.study.axes.items())[self.colour_axis]
        return [f"{axis}: {level.label}" for level in levels]

    def _time(self) -> dict[str, str]:
        seconds = [one.status.seconds for one in self.record.cells if one.status.seconds is not None]
        moments = [one.origin.started for one in self.record.cells if one.origin.started is not None]
        return {
            "total": formatting.duration(math.fsum(seconds)) if seconds else "",
            "mean": formatting.duration(math.fsum(seconds) / len(seconds)) if seconds else "",
            "first": formatting.date(min(moments)) if moments else "",
            "last": formatting.date(max(moments)) if moments else "",
        }

    def _best(self) -> dict[str, Any] | None:
        known = [(place, one) for place, one in enumerate(self.record.groups) if one.summary.n]
        if not known:
            return None
        sign = 1 if self.more_is_better else -1
        place, best = max(known, key=lambda one: sign * one[1].summary.mean)
        costs = [
            {
                "title": kind.title,
                "value": self._cost_text(kind, value),
                "explanation": kind.explanation,
                "is_unsteady": kind.key == "latency" and best.cost.is_unsteady,
            }
            for kind in COSTS
            if best.cost is not None and (value := best.cost.value(kind)) is not None
        ]
        return {
            "place": place,
            "title": best.title,
            "score": self._mean_text(best.summary),
            "seeds": best.summary.n,
            "costs": costs,
            "sample": best.cost.sample if best.cost else "",
            "parameters": formatting.count(best.cost.parameters) if best.cost and best.cost.parameters else "",
        }

    def _mean_text(self, summary: Summary) -> str:
        if summary.n < 2:
            return self.score(summary.mean)
        return f"{self.score(summary.mean)} ± {self.score(summary.high - summary.mean)}"

    @staticmethod
    def _cost_text(kind: CostKind, value: float | None) -> str:
        return formatting.duration(value) if kind.key == "latency" else formatting.count(value)

    def _by_verdict(self) -> dict[Verdict, int]:
        return {one: sum(each.judgement.verdict == one for each in self.record.findings) for one in _VERDICTS}

    def _verdicts(self) -> list[dict[str, Any]]:
        return [
            {"verdict": name, "number": number, "kind": _KINDS[name], "sign": _SIGNS[_KINDS[name]]}
            for name, number in self._by_verdict().items()
            if number
        ]

    def _notes(self) -> list[str]:
        """What makes the numbers less comparable than they look."""
        counted = [one for group in self.record.groups for one in group.cells if one.status.cell.seed in group.scores]
        notes = []
        for what, values in (
            ("commits", [one.origin.commit for one in counted]),
            ("devices", [one.origin.device for one in counted]),
            ("versions of torch", [one.origin.versions.get("torch", "") for one in counted]),
        ):
            different = sorted({value for value in values if value})
            if len(different) > 1:
                notes.append(f"The finished cells are of {len(different)} {what}: {', '.join(different[:6])}.")
        if any(commit.endswith("-dirty") for commit in (one.origin.commit for one in counted)):
            notes.append("Some cells ran from a source tree with changes that were not committed (-dirty).")
        stale = sum(one.status.state == "stale" and one.status.is_finished for one in self.record.cells)
        if self.record.older_code:
            notes.append(
                f"No cell is of the present code: means and verdicts are of {len(counted)} stale ones, all of code "
                f"{self.record.older_code}."
            )
        elif stale:
            notes.append(f"{stale} stale, by other code: shown below, left out of means and verdicts.")
        other = sum(
            one.status.state == "waiting" and "older configuration" in one.status.reason for one in self.record.cells
        )
        if other:
            notes.append(f"{other} waiting have an older configuration's folder, which is kept and not used here.")
        run = " ".join([*self.command, "study run", shown(self.study.path)])
        tested = [one for one in self.record.groups if one.summary.n]
        missing = sum(one.cost is None for one in tested)
        if missing:
            notes.append(
                f"{missing} of {len(tested)} tested groups have no profile, so their cost is not known: `{run}` "
                "measures it."
            )
        unsteady = [one.title for one in tested if one.cost and one.cost.is_unsteady]
        if unsteady:
            few = ", ".join(unsteady[:6]) + (", …" if len(unsteady) > 6 else "")
            notes.append(
                f"The measured time of {len(unsteady)} group{'' if len(unsteady) == 1 else 's'} is unsteady ({few}): "
                "its quartiles are further apart than a third of the median. To measure again, on a machine that does "
                f"nothing else, delete the profile.json of all of its cells and call `{run}`."
            )
        return notes

    def _problems(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for one in self.record.cells:
            status = one.status
            bad = status.state in ("failed", "interrupted")
            if bad or one.damages:
                log = read_tail(status.folder.log, 4096) if bad and len(found) < _PROBLEMS else ""
                found.append(
                    {
                        "title": f"{self.study.title(status.cell.group)}, seed {status.cell.seed}",
                        "state": status.state,
                        "kind": _KINDS[status.state],
                        "reason": status.reason,
                        "damages": one.damages,
                        "log": "\n".join(log.rstrip().splitlines()[-12:]),
                    }
                )
        return found

    def _accuracy(self) -> list[dict[str, Any]]:
        """The plots of score over each cost."""
        axes: list[tuple[str, str, str, dict[int, float], float]] = []
        groups = self.record.groups
        for kind in COSTS:
            costs = {
                place: value
                for place, group in enumerate(groups)
                if group.cost and group.summary.n and (value := group.cost.value(kind)) is not None
            }
            if costs:
                scale, prefix = _prefix(max(costs.values()), kind.key == "latency")
                sample = next(group.cost.sample for group in groups if group.cost)
                unit = {
                    "paper": f"{prefix} multiply-adds per {sample}, as the paper counts".strip(),
                    "done": f"{prefix} multiply-adds per {sample}, done here".strip(),
                    "latency": f"{prefix}s per {sample}, forward pass",
                }[kind.key]
                axes.append(
                    (kind.key, kind.title, unit, {place: value / scale for place, value in costs.items()}, scale)
                )
        if not axes and self.record.reference_cost:
            name = self.record.reference_cost
            given = {
                place: group.reference[name]
                for place, group in enumerate(groups)
                if group.summary.n and name in group.reference
            }
            if given:
                axes.append(("printed", "The paper's network", f"{name} of the paper's network", given, 1.0))
        return [self._accuracy_over(*axis) for axis in axes]

    def _accuracy_over(
        self, key: str, title: str, unit: str, costs: Mapping[int, float], scale: float
    ) -> dict[str, Any]:
        groups = self.record.groups
        places = list(costs)
        front = front_of(
            [(costs[place], groups[place].summary.mean) for place in places], more_is_better=self.more_is_better
        )
        self.fronts[key] = {places[one] for one in front}
        is_single = any(groups[place].summary.n < 2 for place in self.fronts[key])
        points = []
        for place in places:
            group, summary = groups[place], groups[place].summary
            low, high = (summary.low, summary.high) if summary.n > 1 else (math.nan, math.nan)
            on_front = place in self.fronts[key]
            lines = [
                group.title + (" (on the envelope)" if on_front else ""),
                f"{self.record.score_name} {self._mean_text(summary)}"
                + (f" (95 %, {summary.n} seeds)" if summary.n > 1 else " (one run)"),
            ]
            if len(group.scores) > 1:
                lines.append("seeds " + ", ".join(map(self.score, group.scores.values())))
            if group.test_interval:
                lines.append(f"test set {self.between(group.test_interval.low, group.test_interval.high)}")
            lines.append(f"{formatting.count(costs[place], 4).strip()} {unit}")
            quartiles = group.cost.quartiles if group.cost and key == "latency" else None
            x_low, x_high = (one / scale for one in quartiles) if quartiles else (math.nan, math.nan)
            unsteady = ", unsteady" if group.cost and group.cost.is_unsteady else ""
            if quartiles:
                lines.append(f"quartiles {formatting.durations(*quartiles)}{unsteady}")
            seeds = list(group.scores.values()) if summary.n > 1 else []
            points.append(
                Point(
                    place=place,
                    label=self._label(group) + (" (unsteady)" if quartiles and unsteady else ""),
                    x=costs[place],
                    y=summary.mean,
                    low=low,
                    high=high,
                    seeds=seeds,
                    tip="\n".join(lines),
                    series=self._series(group),
                    is_on_front=on_front,
                    x_low=x_low,
                    x_high=x_high,
                )
            )
        return {
            "key": key,
            "title": title,
            "has_quartiles": any(math.isfinite(one.x_low) for one in points),
            "is_single": is_single,
            **self._scatter(
                points,
                f"accuracy_{key}",
                unit,
                self.record.score_name,
                more_is_better=self.more_is_better,
                is_single=is_single,
                in_overview=not self.is_alone and len(self.fronts) == 1,
            ),
        }

    def _scatter(
        self,
        points: Sequence[Point],
        name: str,
        x_title: str,
        y_title: str,
        *,
        more_is_better: bool,
        is_single: bool = False,
        in_overview: bool = False,
    ) -> dict[str, Any]:
        heading = f"{self.study.name}: {y_title} over {x_title}"

        def draw(width: float, height: float) -> Panel:
            return draw_scatter(
                points,
                x_title=x_title,
                y_title=y_title + ("" if more_is_better else " (less is better)"),
                title=heading,
                more_is_better=more_is_better,
                is_single=is_single,
                series=self._series_names(),
                width=width,
                height=height,
            )

        self.plots[name] = draw(640, 430)
        return {
            "wide": self.plots[name].inline(f"{self.name}-{name}"),
            "narrow": draw(350, 400).inline(f"{self.name}-{name}-narrow"),
            "small": draw(400, 320).inline(f"{self.name}-{name}-small") if in_overview else "",
        }

    def _paper(self) -> dict[str, Any] | None:
        """The paper's panel, from `reference`."""
        cost, score = self.record.reference_cost, self.record.reference_score
        groups = [
            (place, one)
            for place, one in enumerate(self.record.groups)
            if cost in one.reference and score in one.reference
        ]
        if not cost or not score or not groups:
            return None
        mode = best_mode(score.lower())
        more_is_better = self.more_is_better if mode is None else mode == "max"
        front = front_of(
            [(one.reference[cost], one.reference[score]) for _, one in groups], more_is_better=more_is_better
        )
        points = []
        for rank, (place, group) in enumerate(groups):
            x, y = group.reference[cost], group.reference[score]
            tip = f"{group.title} in the paper" + (" (on the envelope)" if rank in front else "")
            points.append(
                Point(
                    place=place,
                    label=self._label(group),
                    x=x,
                    y=y,
                    low=math.nan,
                    high=math.nan,
                    seeds=(),
                    tip=f"{tip}\n{score} {y:g}\n{x:g} {cost}",
                    series=self._series(group),
                    is_on_front=rank in front,
                )
            )
        titles = f"{cost}, the paper's numbers", f"{score}, the paper's numbers"
        return self._scatter(points, "paper", *titles, more_is_better=more_is_better)

    def _group_columns(self) -> list[dict[str, str]]:
        record = self.record
        name = record.score_name
        columns = [{"key": axis, "title": axis, "unit": "", "align": "left"} for axis in self.study.axes]
        columns += [
            {"key": "n", "title": "seeds", "unit": "older code" if record.older_code else "done", "align": "right"},
            {"key": "mean", "title": name, "unit": "mean", "align": "right"},
            {"key": "interval", "title": "95 % interval", "unit": "over seeds", "align": "right"},
            {"key": "spread", "title": "spread", "unit": "over seeds", "align": "right"},
        ]
        if any(one.test_interval for one in record.groups):
            columns.append({"key": "test", "title": "95 % interval", "unit": "test set", "align": "right"})
        for one in self._reference_names():
            columns.append({"key": f"reference-{one}", "title": one, "unit": "paper", "align": "right"})
        for kind in COSTS:
            if any(group.cost and group.cost.value(kind) is not None for group in record.groups):
                unit = {"paper": "multiply-adds", "done": "multiply-adds", "latency": "forward"}[kind.key]
                columns.append({"key": kind.key, "title": kind.title, "unit": unit, "align": "right"})
        if any(group.cost and group.cost.parameters for group in record.groups):
            columns.append({"key": "parameters", "title": "parameters", "unit": "", "align": "right"})
        return columns

    def _pairs(self) -> dict[str, Any]:
        """What is told of any two groups, by their places; empty if there are too many."""
        tested = [(place, one) for place, one in enumerate(self.record.groups) if one.scores]
        if not 2 <= len(tested) <= _MOST_COMPARED:
            return {}
        names = [{"place": place, "title": one.title} for place, one in tested]
        return {
            "groups": names,
            "words": {f"{i} {j}": self._pair(one, two) for i, one in tested for j, two in tested if i != j},
        }

    def _pair(self, first: GroupRecord, second: GroupRecord) -> list[str]:
        difference, test = self.record.difference(first, second)
        if not difference.n:
            return ["They have no seed in common."]
        number = "one shared seed, so no interval over seeds"
        if difference.n > 1:
            between = self.between(difference.low, difference.high, sign=True)
            number = f"95 % interval over {difference.n} shared seeds: {between}"
        parts = [f"{formatting.signed(difference.mean, self.places)} {self.record.score_name}", number]
        if test:
            parts.append(f"of the test set: {self.between(test.low, test.high, sign=True)}")
        for kind in COSTS:
            costs = [one.cost.value(kind) if one.cost else None for one in (first, second)]
            if costs[0] is not None and costs[1]:
                parts.append(f"{kind.title.lower()}: {costs[0] / costs[1]:.2f} times")
        return parts

    def _reference_names(self) -> list[str]:
        return list(dict.fromkeys(name for one in self.record.groups for name in one.reference))

    def _groups(self) -> list[dict[str, Any]]:
        rows = []
        fronts = next(iter(self.fronts.values()), set())
        best = self._best()
        shown_states = ("failed", "interrupted") if self.record.older_code else ("failed", "interrupted", "stale")
        for place, group in enumerate(self.record.groups):
            summary = group.summary
            cells: dict[str, tuple[Any, ...]] = {  # what it is sorted by, what is shown, and what below that
                axis: (label, label) for axis, label in zip(self.study.axes, group.group, strict=True)
            }
            total = len(group.cells)
            cells["n"] = (summary.n, f"{summary.n} of {total}")
            cells["mean"] = (_sortable(summary.mean), self.score(summary.mean))
            half = summary.high - summary.mean if summary.n > 1 else math.nan
            cells["interval"] = (
                _sortable(half),
                self.between(summary.low, summary.high) if summary.n > 1 else "one run" if summary.n else "–",
            )
            cells["spread"] = (_sortable(summary.spread), self.score(summary.spread))
            test = group.test_interval
            cells["test"] = (
                _sortable(test.high - test.low) if test else "",
                self.between(test.low, test.high) if test else "–",
            )
            for name in self._reference_names():
                value = group.reference.get(name)
                cells[f"reference-{name}"] = ("" if value is None else value, "–" if value is None else f"{value:,g}")
            for kind in COSTS:
                cost = group.cost.value(kind) if group.cost else None
                cells[kind.key] = ("" if cost is None else cost, self._cost_text(kind, cost))
                if kind.key == "latency" and group.cost and (quartiles := group.cost.quartiles):
                    cells[kind.key] += (formatting.durations(*quartiles), group.cost.is_unsteady)
            number_of = group.cost.parameters if group.cost else None
            cells["parameters"] = ("" if number_of is None else number_of, formatting.count(number_of))
            states = {one.status.state for one in group.cells}
            rows.append(
                {
                    "place": place,
                    "cells": cells,
                    "on_front": place in fronts,
                    "is_best": best is not None and best["place"] == place,
                    "bad": next((state for state in shown_states if state in states), ""),
                }
            )
        return rows

    def _findings(self) -> dict[str, Any]:
        rows, values = [], []
        for one in self.record.findings:
            judgement, difference = one.judgement, one.judgement.difference
            finding, test = judgement.finding, one.test_interval
            kind = _KINDS[judgement.verdict]
            expected = f"within ±{finding.margin:g}" if finding.expected == "equal" else str(finding.expected)
            if finding.margin and finding.expected != "equal":
                expected += f" by {finding.margin:g}"
            shown = formatting.signed(difference.mean, self.places) if difference.n else "–"
            why_not = judgement.note if difference.n else self._missing(finding)
            verdict = judgement.verdict + (f": {why_not}" if why_not else "")
            row = Row(
                claim=finding.claim,
                mean=difference.mean if difference.n else math.nan,
                low=difference.low if difference.n > 1 else math.nan,
                high=difference.high if difference.n > 1 else math.nan,
                test_low=test.low if test else math.nan,
                test_high=test.high if test else math.nan,
                margin=finding.margin,
                kind=kind if kind in ("good", "bad") else "warn",
                verdict=f"{verdict} · expected {expected}" + (f" · difference {shown}" if difference.n else ""),
            )
            rows.append(row)
            title = self.study.title
            formula = f"{title(finding.minuend)} {formatting.MINUS} {title(finding.subtrahend)}"
            if finding.beyond:
                beyond = f"{title(finding.beyond[0])} {formatting.MINUS} {title(finding.beyond[1])}"
                formula = f"({formula}) {formatting.MINUS} ({beyond})"
            values.append(
                {
                    "claim": finding.claim,
                    "formula": formula,
                    "expected": expected,
                    "verdict": judgement.verdict,
                    "kind": kind,
                    "sign": _SIGNS[kind],
                    "note": why_not,
                    "difference": shown,
                    "difference_key": _sortable(difference.mean),
                    "interval_key": _sortable(difference.high - difference.low) if difference.n > 1 else "",
                    "interval": self.between(difference.low, difference.high, sign=True) if difference.n > 1 else "–",
                    "test": self.between(test.low, test.high, sign=True) if test else "–",
                    "test_key": _sortable(test.high - test.low) if test else "",
                    "num_samples": test.num_samples if test else "",
                    "n": difference.n,
                    "p": "–" if judgement.note else "< 0.001" if judgement.p < 0.001 else f"{judgement.p:.3g}",
                    "p_key": "" if judgement.note else judgement.p,
                    "rank": _VERDICTS.index(judgement.verdict),
                }
            )
        if not rows:
            return {"rows": []}
        scale = forest_scale(rows, 8, 252)
        for row, value in zip(rows, values, strict=True):
            drawing = element(
                "svg",
                draw_forest_row(row, scale, 20, 40),
                **{"class": "chart mini", "viewBox": "0 0 260 40", "role": "img"},
                aria_label=f"Difference {value['difference']}, 95 % interval {value['interval']}",
            )
            value["drawing"] = drawing
        ticks = [
            element("text", shown, x=scale(at), y=12, text_anchor="middle", class_="tick")
            for at, shown in scale.ticks()
        ]
        axis = element("svg", *ticks, **{"class": "chart mini", "viewBox": "0 0 260 16", "aria-hidden": "true"})
        legend = {
            "seeds": any(math.isfinite(row.low) for row in rows),
            "test": any(math.isfinite(row.test_low) for row in rows),
            "margin": any(row.margin for row in rows),
            "any": any(math.isfinite(row.mean) for row in rows),
        }
        bars = [words for key, words in (("seeds", "over seeds"), ("test", "of the test set, grey")) if legend[key]]
        unit = f"Difference of {self.record.score_name}"
        if bars:
            unit += f"; 95 % interval{'' if len(bars) == 1 else 's'} {', below it '.join(bars)}"
        self.plots["findings"] = draw_forest(rows, unit, f"{self.study.name}: findings")
        return {"rows": values, "axis": axis, "legend": legend}

    def _missing(self, finding: Finding) -> str:
        """The groups that a finding waits for."""
        lacking = [
            one.title
            for group, _ in finding.weights
            for one in self.record.groups
            if one.group == group and not one.scores
        ]
        return (
            f"no run of {', '.join(dict.fromkeys(lacking))}"
            if lacking
            else "no seed that all of its cells were run with"
        )

    def _examples(self) -> list[dict[str, Any]]:
        """Translations of the same sentences; groups of the same translation together."""
        found: dict[str, dict[str, Any]] = {}
        for group in self.record.groups:
            cell = group.shown_cell
            for one in cell.examples if cell else ():
                if one["id"] not in found:
                    if len(found) == _EXAMPLES:
                        continue
                    found[one["id"]] = {**one, "variants": {}}
                found[one["id"]]["variants"].setdefault(one["hypothesis"], []).append(group)
        examples = []
        for one in found.values():
            sign = -1 if self.more_is_better else 1
            variants = [
                {
                    "groups": [self.study.title(each.group) for each in groups],
                    "words": _compared(words, one["reference"]),
                }
                for words, groups in sorted(
                    one["variants"].items(),
                    key=lambda item: (
                        min(sign * each.summary.mean for each in item[1])
                        if all(each.summary.n for each in item[1])
                        else math.inf
                    ),
                )
            ]
            examples.append(
                {"id": one["id"], "source": one["source"], "reference": one["reference"], "variants": variants}
            )
        return examples

    def _curves(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        score = self.study.metric.replace("test/", "val/", 1)
        for name in self.record.curve_names:
            factor = self.study.scale if name == score else 1.0
            by_group = [
                [
                    [(step + 1, value * factor) for step, value in cell.curves[name]]  # loggers count from 0
                    for cell in group.cells
                    if name in cell.curves
                ]
                for group in self.record.groups
            ]
            if not any(by_group):
                continue
            title = f"{self.record.score_name} in validation" if name == score else name
            everything: list[Curve] = [curve for curves in by_group for curve in curves]
            x_scale, y_scale = curve_scales(everything, 40, 212, 112, 10)
            shared = f"{self.name}-all-{len(found)}"
            others = "".join(
                path(
                    [
                        (x_scale.clip(step), y_scale.clip(value))
                        for step, value in thinned(curves[0])[:: 1 + len(everything) // 100]
                    ]
                )
                for curves in by_group
                if curves
            )
            panels = []
            missing = []
            for place, (group, curves) in enumerate(zip(self.record.groups, by_group, strict=True)):
                if not curves:
                    missing.append(group.title)
                    continue
                last = [curve[-1][1] for curve in curves]
                drawing = element(
                    "svg",
                    element("use", href=f"#{shared}"),
                    curve_panel(curves, x_scale, y_scale, series=self._series(group)),
                    **{"class": "chart", "viewBox": "0 0 220 132", "role": "img"},
                    aria_label=f"{title} over steps of {group.title}, {len(curves)} runs",
                )
                mean = formatting.fixed(math.fsum(last) / len(last), formatting.decimals(last))
                panels.append({"place": place, "title": group.title, "drawing": drawing, "last": mean})
            defs = element(
                "svg",
                element("g", element("defs", element("path", id=shared, d=others, class_="others")), class_="chart"),
                **{"class": "shared", "width": 0, "height": 0, "aria-hidden": "true"},
            )
            found.append({"title": title, "panels": panels, "missing": missing, "defs": defs})
            key = name.replace("/", "_")
            drawn = {group.title: curves for group, curves in zip(self.record.groups, by_group, strict=True) if curves}
            self.plots[f"curves_{key}"] = draw_curves(drawn, title, self.study.name)
        return found

    def _cell(self, one: CellRecord, place: int) -> dict[str, Any]:
        status, origin = one.status, one.origin
        versions = " · ".join(
            f"{name.replace('pytorch_lightning', 'lightning').replace('lightning_attn', 'this package')} {version}"
            for name, version in origin.versions.items()
        )
        total = status.cell.total_steps
        step = "–" if status.step is None else f"{status.step:,}" + (f" / {total:,}" if total else "")
        return {
            "place": place,
            "group": self.place_of[one.status.cell.group],
            "labels": status.cell.group,
            "title": self.study.title(status.cell.group),
            "seed": status.cell.seed,
            "state": status.state,
            "kind": _KINDS[status.state],
            "rank": STATES.index(status.state),
            "reason": status.reason,
            "damages": one.damages,
            "score": self.score(status.score),
            "score_key": "" if status.score is None else status.score,
            "validation": self.score(status.validation),
            "validation_key": "" if status.validation is None else status.validation,
            "step": step,
            "step_key": "" if status.step is None else status.step,
            "eta": status.eta,
            "time": formatting.duration(status.seconds),
            "time_key": "" if status.seconds is None else status.seconds,
            "date": formatting.date(origin.started),
            "date_key": "" if origin.started is None else origin.started,
            "ended": formatting.date(origin.ended),
            "commit": origin.commit or "–",
            "device": origin.device or "–",
            "host": origin.host,
            "code": origin.code,
            "torch": origin.versions.get("torch", "–"),
            "versions": versions,
            "attempts": origin.attempts,
            "folder": str(status.folder.path),
            "as_run": origin.commands,
            "command": status.cell.shell_line(self.command, status.folder.path),
            "profiled": one.cost.device if one.cost else "",
        }


def _prefix(largest: float, is_time: bool) -> tuple[float, str]:
    """A unit's size and prefix that suit a value."""
    sizes = ((1.0, ""), (1e-3, "m"), (1e-6, "µ")) if is_time else ((1e9, "G"), (1e6, "M"), (1e3, "k"))
    return next((one for one in sizes if largest >= one[0]), sizes[-1])


def _sortable(value: float) -> float | str:
    return value if math.isfinite(value) else ""


def _compared(words: str, reference: str) -> list[dict[str, Any]]:
    """Runs of words, and whether they are in the reference at their place."""
    own, other = words.split(), reference.split()
    parts = []
    for tag, start, end, _, _ in difflib.SequenceMatcher(None, own, other, autojunk=False).get_opcodes():
        if start < end:
            parts.append({"text": " ".join(own[start:end]), "same": tag == "equal"})
    return parts

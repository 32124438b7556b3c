"""What the folders of a study's cells hold, as plain values for tables and plots."""

import dataclasses
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_attn.io import oldest_first
from lightning_attn.study.grid import Finding, Group, Study
from lightning_attn.study.report.reading import (
    array,
    finite,
    newest,
    read_columns,
    read_head,
    read_json,
    text,
)
from lightning_attn.study.states import COMMAND_MARK, CellStatus, older_code_of, read_statuses, scores_of
from lightning_attn.study.statistics import Judgement, Summary, judge, summarize

__all__ = [
    "COSTS",
    "CellRecord",
    "Cost",
    "CostKind",
    "Curve",
    "FindingRecord",
    "GroupRecord",
    "Interval",
    "Origin",
    "StudyRecord",
    "collect",
]

Curve: TypeAlias = Sequence[tuple[int, float]]  # optimizer steps and values

_DEVICE = re.compile(r"GPU available: (\w+)(?: \((\w+)\))?, used: (\w+)")
_LEVEL = 0.95
_UNSTEADY = 1 / 3  # of the median, between the quartiles
_SPELLINGS = {"bleu": "BLEU", "chrf": "chrF", "ap": "AP", "ap50": "AP50", "ap75": "AP75", "miou": "mean IoU"}
_SPELLINGS |= {"pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy"}


@dataclasses.dataclass(frozen=True)
class CostKind:
    """A measure of cost.

    Attributes:
        key: The attribute of `Cost`.
        title: Of an axis.
        unit: What is behind the numbers of its axis.
        scale: What they are divided by.
        explanation: In a sentence.
    """

    key: str
    title: str
    unit: str
    scale: float
    explanation: str


COSTS: tuple[CostKind, ...] = (
    CostKind("paper", "Paper's count", "G multiply-adds", 1e9, "multiply-adds of a sample as the paper counts them"),
    CostKind("done", "Done here", "G multiply-adds", 1e9, "multiply-adds that our algorithms do for a sample"),
    CostKind("latency", "Measured time", "ms", 1e-3, "median time of a forward pass, divided by the batch size"),
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a cell's network costs, by its profile.

    Attributes:
        parameters: Number of them.
        paper: Multiply-adds of a sample by the paper's rules.
        done: Those that are done.
        latency: Seconds of the forward pass for a sample, on `device`: the median.
        latency_low: Lower quartile of the same.
        latency_high: Upper quartile.
        step: Seconds of a training step.
        memory: Bytes at the peak of a training step.
        sample: What is counted: an image or a pair.
        device: What was measured.
    """

    parameters: float | None
    paper: float | None
    done: float | None
    latency: float | None
    latency_low: float | None
    latency_high: float | None
    step: float | None
    memory: float | None
    sample: str
    device: str

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """Of the measured time; None if they are not known, or no quartiles of it."""
        low, middle, high = self.latency_low, self.latency, self.latency_high
        return (
            (low, high)
            if low is not None and middle is not None and high is not None and low <= middle <= high
            else None
        )

    @property
    def is_unsteady(self) -> bool:
        """Whether the quartiles are further apart than a third of the median."""
        found = self.quartiles
        return found is not None and found[1] - found[0] > _UNSTEADY * (self.latency or 0.0)

    def value(self, kind: CostKind) -> float | None:
        """One of the measures, unscaled."""
        found: float | None = getattr(self, kind.key)
        return found


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a cell's numbers are from.

    Attributes:
        versions: Of packages, by name.
        commit: Of the source tree.
        code: Digest of the sources.
        device: What it ran on.
        host: Where.
        started: Seconds since 1970 of the first process.
        ended: Of the last; None if it was not seen to end.
        commands: Of the training and of the test.
        attempts: Number of processes.
    """

    versions: Mapping[str, str]
    commit: str
    code: str
    device: str
    host: str
    started: float | None
    ended: float | None
    commands: tuple[str, ...]
    attempts: int


@dataclasses.dataclass(frozen=True)
class Resampled:
    """Scores of resampled test sets, comparable between cells of equal `key`."""

    key: tuple[Any, ...]
    num_samples: int
    scores: npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A percentile interval from resampled test sets.

    Attributes:
        low: Lower end.
        high: Upper end.
        num_samples: Samples in the test set.
    """

    low: float
    high: float
    num_samples: int


@dataclasses.dataclass(frozen=True)
class CellRecord:
    """A cell's files.

    Attributes:
        status: Its state and score.
        run: Its newest run directory.
        origin: Where its numbers are from.
        cost: By its profile, if there is one.
        curves: By name, in the unit in which they were logged.
        resampled: Scores of resampled test sets.
        damages: Files that cannot be read.
        attention: Of `test_attention.json`; None if there is none.
        examples: Of `test_examples.json`.
        pictures: Files by their stems.
    """

    status: CellStatus
    run: Path | None
    origin: Origin
    cost: Cost | None
    curves: Mapping[str, Curve]
    resampled: Resampled | None
    damages: tuple[str, ...]
    attention: Path | None
    examples: Sequence[Mapping[str, str]]
    pictures: Mapping[str, Path]


@dataclasses.dataclass(frozen=True)
class GroupRecord:
    """Cells that differ only in the seed.

    Attributes:
        group: Its labels.
        title: In words.
        cells: Its cells, by seed.
        scores: By seed, of those that count.
        summary: Of the scores, over seeds.
        test_interval: From resampled test sets; None if not all that count have one of the same samples.
        cost: Of the first cells that know it; times are medians.
        reference: Others' numbers.
    """

    group: Group
    title: str
    cells: Sequence[CellRecord]
    scores: Mapping[int, float]
    summary: Summary
    test_interval: Interval | None
    cost: Cost | None
    reference: Mapping[str, float]

    @property
    def shown_cell(self) -> CellRecord | None:
        """The cell whose pictures and maps stand for the group: the first that counts, or else that has been tested."""
        tested = [cell for cell in self.cells if cell.status.is_finished]
        return next((cell for cell in tested if cell.status.cell.seed in self.scores), tested[0] if tested else None)


@dataclasses.dataclass(frozen=True)
class FindingRecord:
    """A finding's verdict, and what the test set's own uncertainty is."""

    judgement: Judgement
    test_interval: Interval | None


@dataclasses.dataclass(frozen=True)
class StudyRecord:
    """Everything that a study's page shows.

    Attributes:
        study: The study.
        root: Folder of its cells.
        cells: All, in the study's order.
        groups: The same by group.
        findings: With verdicts.
        score_name: What the score is called.
        reference_cost: Name of the cost in `reference`; empty if there is none.
        reference_score: Name of the score in it.
        is_same_score: Whether that is the study's own score.
        curve_names: Curves that at least one cell has.
        older_code: Version of the code that the scores are of; empty for the present one.
    """

    study: Study
    root: Path
    cells: Sequence[CellRecord]
    groups: Sequence[GroupRecord]
    findings: Sequence[FindingRecord]
    score_name: str
    reference_cost: str
    reference_score: str
    is_same_score: bool
    curve_names: Sequence[str]
    older_code: str

    def difference(self, first: GroupRecord, second: GroupRecord) -> tuple[Summary, Interval | None]:
        """What one group's scores are more than another's: over seeds that both have, and of resampled test sets."""
        seeds = sorted(set(first.scores) & set(second.scores))
        cells = {one.group: one.cells for one in (first, second)}
        weights = [(first.group, 1.0), (second.group, -1.0)]
        interval = _interval(self.study, cells, weights, seeds) if seeds else None
        return summarize([first.scores[seed] - second.scores[seed] for seed in seeds]), interval


def collect(study: Study, root: Path) -> StudyRecord:
    """Reads a study's cells.

    Args:
        study: The study.
        root: Folder of its cells.
    """
    statuses = read_statuses(study, root)
    names = [study.metric.replace("test/", "val/", 1), "train/loss", "val/loss"]
    if study.member:
        names[1:1] = [f"train/{study.member}/loss", f"val/{study.member}/loss"]
    cells = [_cell(study, status, list(dict.fromkeys(names))) for status in statuses]
    scores = scores_of(statuses)
    groups = []
    by_group: dict[Group, list[CellRecord]] = {}
    for cell in cells:
        by_group.setdefault(cell.status.cell.group, []).append(cell)
    for group, members in by_group.items():
        own = scores.get(group, {})
        groups.append(
            GroupRecord(
                group,
                study.title(group),
                members,
                own,
                summarize(list(own.values())),
                _interval(study, by_group, [(group, 1.0)], sorted(own)),
                _common_cost(members),
                study.reference.get(group, {}),
            )
        )
    findings = [
        FindingRecord(one, _interval(study, by_group, one.finding.weights, _shared_seeds(one.finding, scores)))
        for one in judge(study.findings, scores)
    ]
    cost_name, score_name = _reference_names(study)
    has = {name for cell in cells for name in cell.curves}
    metric = study.metric.rpartition("/")[2]
    is_same = _is_called(score_name, metric)
    label = _SPELLINGS.get(metric, score_name if is_same else metric)
    return StudyRecord(
        *(study, root, cells, groups, findings, label, cost_name, score_name, is_same),
        [name for name in dict.fromkeys(names) if name in has],
        older_code_of(statuses),
    )


def _cell(study: Study, status: CellStatus, curve_names: Sequence[str]) -> CellRecord:
    folder = status.folder.path
    run = status.folder.run_directory()
    damages: list[str] = []
    directory = run or folder
    if study.member and (directory / study.member).is_dir():
        directory /= study.member
    predictions = directory / "predictions"
    curves = {} if run is None else read_columns(run / "metrics.csv", curve_names, damages)
    resampled = None if run is None else _resampled(newest(predictions, "test_bootstrap*.json"), study, damages)
    if (folder / "cell.json").is_file():
        read_json(folder / "cell.json", damages)
    return CellRecord(
        status=status,
        run=run,
        origin=_origin(status, run, damages),
        cost=_cost(newest(folder, "profile*.json"), damages),
        curves=curves,
        resampled=resampled,
        attention=None if run is None else newest(predictions, "test_attention*.json"),
        examples=[] if run is None else _examples(newest(predictions, "test_examples*.json"), damages),
        pictures={} if run is None else _pictures(predictions),
        damages=tuple(damages),
    )


def _origin(status: CellStatus, run: Path | None, damages: list[str]) -> Origin:
    stored = read_json(None if run is None else run / "run.json", damages)
    stored = stored if isinstance(stored, dict) else {}
    attempts = status.folder.attempts()
    head = read_head(status.folder.log)
    device = text(stored.get("device"))
    if not device and (match := _DEVICE.search(head)):
        device = f"GPU ({match[2] or 'cuda'})" if match[3] == "True" else "CPU"
    commands = [text(stored.get("command"), 4000)] if stored.get("command") else []
    if not commands:
        marked = (line for part in f"\n{head}".split(COMMAND_MARK)[1:] for line in part.splitlines()[:1])
        commands = [text(line, 4000) for line in marked][:1]
    known = {"lightning_attn", "torch", "pytorch_lightning", "python"}
    ends = [one.ended for one in attempts]
    return Origin(
        versions={name: text(stored[name]) for name in sorted(known & set(stored)) if text(stored[name])},
        commit=text(stored.get("git")),
        code=text(stored.get("code")),
        device=device,
        host=", ".join(dict.fromkeys(text(one.host) for one in attempts)),
        started=min((one for one in (finite(each.started) for each in attempts) if one), default=None),
        ended=finite(ends[-1]) if ends else None,
        commands=tuple(command for command in commands if command),
        attempts=len(attempts),
    )


def _cost(path: Path | None, damages: list[str]) -> Cost | None:
    stored = read_json(path, damages)
    if not isinstance(stored, dict):
        return None

    def value(*names: str) -> float | None:
        found: Any = stored
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        number = finite(found)
        return number if number is not None and number >= 0 else None

    batch = value("batch_size") or 0.0

    def each(*names: str) -> float | None:
        number = value(*names)
        return finite(number / batch) if number and batch else None

    return Cost(
        parameters=value("parameters"),
        paper=each("forward", "paper_multiply_adds"),
        done=each("forward", "multiply_adds"),
        latency=each("forward", "latency", "median"),
        latency_low=each("forward", "latency", "lower_quartile"),
        latency_high=each("forward", "latency", "upper_quartile"),
        step=value("training_step", "latency", "median"),
        memory=value("training_step", "peak_memory"),
        sample=text(stored.get("sample")) or "sample",
        device=text(stored.get("device")),
    )


def _common_cost(cells: Sequence[CellRecord]) -> Cost | None:
    known = [cell.cost for cell in cells if cell.cost is not None]
    if not known:
        return None

    def middle(values: Sequence[float | None]) -> float | None:
        measured = [value for value in values if value is not None]
        return statistics.median(measured) if measured else None

    return dataclasses.replace(
        known[0],
        latency=middle([one.latency for one in known]),
        latency_low=middle([one.latency_low for one in known]),
        latency_high=middle([one.latency_high for one in known]),
    )


def _resampled(path: Path | None, study: Study, damages: list[str]) -> Resampled | None:
    stored = read_json(path, damages)
    if path is None or not isinstance(stored, dict):
        return None
    scores = stored.get("scores")
    values = array(scores.get(f"test/{study.metric.rpartition('/')[2]}")) if isinstance(scores, dict) else None
    number, samples = finite(stored.get("num_samples")), stored.get("samples")
    if values is None or values.ndim != 1 or number is None or not isinstance(samples, str):
        return None
    key = (samples, number, finite(stored.get("seed")), len(values))
    return Resampled(key, int(number), values * study.scale)


def _interval(
    study: Study,
    cells: Mapping[Group, Sequence[CellRecord]],
    weights: Sequence[tuple[Group, float]],
    seeds: Sequence[int],
) -> Interval | None:
    """Percentiles of a weighted sum of groups' scores, each the mean over seeds, in resampled test sets."""
    total: Any = 0.0
    keys = set()
    number = 0
    for group, weight in weights:
        members = {cell.status.cell.seed: cell.resampled for cell in cells.get(group, ())}
        for seed in seeds:
            one = members.get(seed)
            if one is None:
                return None
            keys.add(one.key)
            number = one.num_samples
            if len(keys) > 1:
                return None
            total = total + one.scores * (weight / len(seeds))
    if not keys:
        return None
    known = total[np.isfinite(total)]
    if len(known) < 2:
        return None
    low, high = np.percentile(known, [50 - 50 * _LEVEL, 50 + 50 * _LEVEL])
    return Interval(float(low), float(high), number)


def _shared_seeds(finding: Finding, scores: Mapping[Group, Mapping[int, float]]) -> list[int]:
    return sorted(set.intersection(*(set(scores.get(group, {})) for group, _ in finding.weights)))


def _reference_names(study: Study) -> tuple[str, str]:
    """What the cost and the score of `reference` are called."""
    names = list(dict.fromkeys(name for one in study.reference.values() for name in one))
    costs = [name for name in names if "flop" in name.lower() or "mac" in name.lower().split("_")]
    scores = [name for name in names if name not in costs]
    return (costs[0] if costs else ""), (scores[0] if scores else "")


def _is_called(name: str, metric: str) -> bool:
    """Whether a name in print, such as mAP, is that of a metric, such as ap."""
    return name.lower().removeprefix("m") == metric.lower().removeprefix("m")


def _examples(path: Path | None, damages: list[str]) -> list[dict[str, str]]:
    stored = read_json(path, damages)
    given = stored.get("examples") if isinstance(stored, dict) else None
    found = []
    for one in given if isinstance(given, list) else []:
        if isinstance(one, dict) and isinstance(one.get("hypothesis"), str):
            words = {name: text(one.get(name), 600) for name in ("source", "reference", "hypothesis")}
            found.append(words | {"id": str(one.get("id"))[:40]})
    return found


def _pictures(predictions: Path) -> dict[str, Path]:
    try:
        folders = [path for path in oldest_first(predictions, "test_pictures*") if path.is_dir()]
        return {path.stem: path for path in sorted(folders[-1].glob("*.png")) if path.is_file()} if folders else {}
    except OSError:
        return {}

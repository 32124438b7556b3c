"""What differs between runs: configuration, scores, cost and curves."""

import contextlib
import csv
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_attn.cli.member_options import MEMBERS
from lightning_attn.errors import InputError, MissingFileError
from lightning_attn.io import oldest_first, write_figure, write_table
from lightning_attn.training.contents import require_plain
from lightning_attn.training.run_directory import require_own_entries
from lightning_attn.training.scores import best_mode

__all__ = ["Comparison", "RunRecord", "compare_runs"]

_MOST_CURVES = 6
_DIGEST = re.compile(r"(?<=\d)_[0-9a-f]{8}$")  # of a study's cells, ..._seed=0_09cf41ab
_UNINTERESTING = ("run.name", "run.root", "ckpt_path")


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run directory says of a run.

    Attributes:
        path: The directory.
        configuration: Every option by its dotted name.
        curves: What was logged, by name: steps and values.
        scores: Of its last test.
    """

    path: Path
    configuration: dict[str, Any]
    curves: dict[str, list[tuple[int, float]]]
    scores: dict[str, float]

    @classmethod
    def read(cls, path: Path) -> "RunRecord":
        """Reads a run directory.

        Raises:
            FileNotFoundError: If it is none.
            ValueError: If a file in it cannot be read.
        """
        if not path.is_dir():
            raise MissingFileError(
                f"compare: {path} is no run directory. Give some, such as checkpoints/<task>/<name>."
            )
        require_own_entries(path, reading=True)
        # The newest of config_fit.yaml, config_fit-2.yaml and so on is from when the training was resumed last.
        configurations = oldest_first(path, "config_fit*.yaml")
        if not configurations:
            raise MissingFileError(f"compare: {path} holds no config_fit.yaml: nothing was trained in it.")
        with _named(configurations[-1]):
            configuration = _flat(_mapping(yaml.safe_load(configurations[-1].read_text(encoding="utf-8"))))
        tests = oldest_first(path, "test_metrics*.json")
        numbers: dict[str, float] = {}
        if tests:
            with _named(tests[-1]):
                scores = _mapping(json.loads(tests[-1].read_text(encoding="utf-8")))
                numbers = {name: float(value) for name, value in scores.items() if isinstance(value, int | float)}
        return cls(path, configuration, _read_curves(path / "metrics.csv"), numbers)

    def best(self, name: str) -> tuple[float, int] | None:
        """The best value of a curve, and after how many optimizer steps it was; loggers count them from 0."""
        points = [(value, step + 1) for step, value in self.curves.get(name, []) if not math.isnan(value)]
        if not points:
            return None
        return min(points) if best_mode(name) == "min" else max(points, key=lambda point: point[0])

    @property
    def members(self) -> dict[str, str]:
        """Of a joint training, the class of each task by its name."""
        found = (re.fullmatch(r"model\.tasks\.(\w+)\.class_path", name) for name in self.configuration)
        return {one[1]: self.configuration[one[0]] for one in found if one}

    def as_member(self, name: str, joint: "RunRecord") -> "RunRecord":
        """A training of one task, with the names that the joint training has for the same task.

        Args:
            name: The task's there.
            joint: The joint training, which has some options for all tasks.
        """
        options = {}
        for option, value in self.configuration.items():
            section, _, rest = option.partition(".")
            of_all = f"model.tasks.{name}.{rest}" not in joint.configuration and option in joint.configuration
            if section == "data" or (section == "model" and (rest == "class_path" or not of_all)):
                option = f"{section}.{MEMBERS[section]}.{name}.{rest}"
            options[option] = value

        def named(score: str) -> str:
            stage, slash, rest = score.partition("/")
            return f"{stage}/{name}/{rest}" if slash and stage in ("train", "val", "test") else score

        curves = {named(score): points for score, points in self.curves.items()}
        return RunRecord(self.path, options, curves, {named(score): value for score, value in self.scores.items()})

    def lacks(self, option: str) -> bool:
        """Whether an option is of a task that this training does not have."""
        found = re.match(r"((?:model\.tasks|data\.members)\.\w+)(\.|$)", option)
        prefix = "" if found is None else found[1]
        return bool(prefix) and not any(one.startswith(f"{prefix}.") for one in self.configuration)

    @property
    def steps(self) -> int | None:
        """Optimizer steps that were logged; None if nothing was."""
        return max((points[-1][0] + 1 for points in self.curves.values() if points), default=None)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several runs beside each other.

    Attributes:
        names: What the runs are called, each once.
        runs: The runs.
    """

    names: tuple[str, ...]
    runs: tuple[RunRecord, ...]

    def differences(self) -> list[tuple[str, ...]]:
        """Options that are not the same in all runs: name, and the value in each.

        Of a task that only some of the runs have, the class, and what differs between these.
        """
        options = sorted({name for run in self.runs for name in run.configuration} - set(_UNINTERESTING))
        rows = [(name, *(_text(run.configuration.get(name, "-")) for run in self.runs)) for name in options]
        return [row for row in rows if self._differs(row)]

    def _differs(self, row: tuple[str, ...]) -> bool:
        having = {value for run, value in zip(self.runs, row[1:], strict=True) if not run.lacks(row[0])}
        return len(having) > 1 or (len(set(row[1:])) > 1 and row[0].endswith(".class_path"))

    def scores(self) -> list[tuple[str, ...]]:
        """Steps, best validation scores with their steps, and test scores: name, and the value in each run."""
        steps = ["-" if run.steps is None else f"{run.steps:,}" for run in self.runs]
        rows: list[tuple[str, ...]] = [("steps", *steps)]
        for name in sorted({name for run in self.runs for name in run.curves if name.startswith("val/")}):
            found = [run.best(name) for run in self.runs]
            rows.append((f"{name}, best", *("-" if one is None else f"{one[0]:.5g} at {one[1]:,}" for one in found)))
        for name in sorted({name for run in self.runs for name in run.scores}):
            rows.append((name, *(f"{run.scores[name]:.5g}" if name in run.scores else "-" for run in self.runs)))
        speeds = [run.curves.get("train/tokens_per_second", []) for run in self.runs]
        if any(speeds):
            means = ["-" if not one else f"{sum(value for _, value in one) / len(one):,.0f}" for one in speeds]
            rows.append(("train/tokens_per_second, mean", *means))
        return rows

    def print(self) -> None:
        """Tables on the standard output."""
        console = Console()
        for title, rows in (("Options that differ", self.differences()), ("Scores", self.scores())):
            table = Table("", *map(escape, self.names), title=title, title_justify="left")
            for row in rows:
                table.add_row(*map(escape, row))
            console.print(table if rows else f"{title}: none")

    def write(self, path: Path) -> Path:
        """Writes the tables (.csv) or the curves as a figure.

        Returns:
            The file, which has another name if that was taken.

        Raises:
            ValueError: If the ending is no format, or there is nothing to draw.
        """
        if path.suffix == ".csv":
            rows = [*self.differences(), *self.scores()]
            return write_table(path, ("", *self.names), rows)
        if not self._curve_names():
            raise InputError(f"--output: {path} would be empty: no run has logged a loss or a score. Write a .csv.")
        return write_figure(path, self.figure())

    def _curve_names(self) -> list[str]:
        lengths = {name: len(points) for run in self.runs for name, points in run.curves.items() if points}
        logged = {name for name, length in lengths.items() if length > 1} or lengths
        names = [name for name in ("train/loss",) if name in logged]
        return [*names, *sorted(name for name in logged if name.startswith("val/"))][:_MOST_CURVES]

    def figure(self) -> Figure:
        """The curves of training loss and validation scores of all runs."""
        names = self._curve_names()
        columns = max(1, min(3, len(names)))
        rows = max(1, -(-len(names) // columns))
        figure = Figure(figsize=(4.4 * columns, 3.2 * rows + 0.5), dpi=120, layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, name in zip(panels, names, strict=False):
            for number, (label, run) in enumerate(zip(self.names, self.runs, strict=True)):
                points = run.curves.get(name, [])
                steps, values = [step + 1 for step, _ in points], [value for _, value in points]
                marker = "o" if len(points) < 30 else None
                axes.plot(steps, values, color=f"C{number}", label=label, linewidth=1.2, marker=marker, markersize=3)
            axes.set_title(name, fontsize=10, loc="left")
            axes.set_xlabel("step", fontsize=9)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        if names:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8)
        return figure


def compare_runs(paths: Sequence[str | Path]) -> Comparison:
    """Reads run directories to be compared; one of a single task beside a joint one as the same task of that.

    Args:
        paths: Run directories.

    Raises:
        FileNotFoundError: If one is none.
        ValueError: If there are fewer than two.
    """
    if len(paths) < 2:
        raise InputError(f"compare: {len(paths)} run has nothing to be compared with; give two or more.")
    runs = tuple(RunRecord.read(Path(path)) for path in paths)
    names = _names([run.path for run in runs])
    joint = next((run for run in runs if run.members), None)
    if joint is not None:
        for place, run in enumerate(runs):
            fitting = [
                name for name, kind in joint.members.items() if kind == run.configuration.get("model.class_path")
            ]
            if len(fitting) == 1 and not run.members:
                runs = (*runs[:place], run.as_member(fitting[0], joint), *runs[place + 1 :])
                names = (*names[:place], f"{names[place]} (as {fitting[0]})", *names[place + 1 :])
    return Comparison(names, runs)


def _names(paths: Sequence[Path]) -> tuple[str, ...]:
    """Names of runs: those of their folders, or of the parts of their paths that differ, such as cells of a study."""
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        parts = [path.absolute().parts for path in paths]
        if len(set(parts)) < len(parts) or len({len(one) for one in parts}) > 1:
            return tuple(map(str, paths))
        differing = [place for place, values in enumerate(zip(*parts, strict=True)) if len(set(values)) > 1]
        names = ["/".join(one[place] for place in differing) for one in parts]
    return _shortened(names)


def _shortened(names: Sequence[str]) -> tuple[str, ...]:
    """Without digits at the end of cells unless they tell two apart, and without words that all begin with."""
    plain = [_DIGEST.sub("", name) for name in names]
    if len(set(plain)) < len(plain):
        plain = list(names)
    first, last = min(plain), max(plain)  # what these begin with, all do
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    shared = "".join(letter for letter, _ in same)
    if "=" not in shared:  # names that users gave
        return tuple(plain)
    start = shared.rstrip("=").rfind("_") + 1 if shared.endswith("=") else shared.rpartition("=")[0].rfind("_") + 1
    return tuple(name[start:] for name in plain)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Makes one kind of error, which names the file, of all that damaged contents lead to."""
    try:
        yield
    except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError, OverflowError, csv.Error) as error:
        raise InputError(f"compare: {path} cannot be read ({' '.join(str(error).split())}).") from error


def _mapping(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise TypeError(f"it holds a {type(content).__name__}, not options or scores by name")
    require_plain("it", content)
    return content


def _read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    if path.is_file():
        with _named(path), path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name is None:
                        raise InputError("a line has more values than there are names")
                    if value and name not in ("step", "epoch") and not name.startswith("lr-"):
                        curves.setdefault(name, []).append((int(float(row["step"])), float(value)))
    return curves


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested options by dotted names."""
    if not isinstance(values, dict):
        return {prefix: values}
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = prefix if name == "init_args" else f"{prefix}.{name}".lstrip(".")
        found |= _flat(value, inner)
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

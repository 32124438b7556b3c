"""A study: one YAML file that says which trainings are compared, and what is expected of them.

Nothing here imports torch: the state of hundreds of cells is shown in a second.
"""

import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import yaml

from lightning_attn.configurations import located, packaged
from lightning_attn.errors import InputError, MissingFileError
from lightning_attn.io import neighbours
from lightning_attn.training.scores import best_mode

__all__ = ["REPORT_NAME", "Cell", "Expected", "Finding", "Group", "Level", "Study", "format_duration"]

Expected: TypeAlias = Literal["greater", "less", "equal"]
Group: TypeAlias = tuple[str, ...]  # one label for each axis: cells that differ only in the seed

REPORT_NAME = "report"  # of the folder with the page of several studies, beside those of the studies
RUN_NAME = "run"  # of the run directory in a cell's folder, <cell>/<task>/run

_KEYS = (
    *("description", "base", "options", "axes", "exclude", "seeds", "metric", "mode", "scale", "test_checkpoint"),
    *("cells", "budget", "time_per_cell", "reference", "findings"),
)
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_AXIS = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_OPTION = re.compile(r"(model|data|trainer)\.[\w.]+\+?")
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|d)\s*")
_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_LARGEST = 1e100  # of numbers in a study file
_LONGEST_NAME = 200  # bytes of a cell's folder; its run directory and files lie in it


@dataclasses.dataclass(frozen=True)
class Level:
    """A value of an axis.

    Attributes:
        label: What it is called.
        overlays: Configuration files that are merged over the base.
        options: Options of the command by their dotted names, such as `model.attention.terms`.
    """

    label: str
    overlays: tuple[Path, ...]
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training and its test.

    Attributes:
        axes: Names of the axes.
        group: The label on each axis.
        seed: Of the run.
        files: Configuration files, the base first.
        options: Options of the command, which overrule the files.
        digest: Eight hexadecimal digits of the merged files, the options and the seed.
        total_steps: Optimizer steps of the training, if the configuration says so.
        batches_per_step: Of which gradients are accumulated.
        accelerator: As the trainer has it, such as "auto" or "cpu".
        test_checkpoint: Which checkpoint is tested.
    """

    axes: tuple[str, ...]
    group: Group
    seed: int
    files: tuple[Path, ...]
    options: Mapping[str, Any]
    digest: str
    total_steps: int | None
    batches_per_step: int
    accelerator: str
    test_checkpoint: str

    @property
    def labels(self) -> dict[str, str]:
        """The label on each axis, by its name."""
        return dict(zip(self.axes, self.group, strict=True))

    @property
    def readable_name(self) -> str:
        """Labels and seed: what stays the same when the configuration behind a label is edited."""
        return "_".join(f"{axis}={label}" for axis, label in {**self.labels, "seed": self.seed}.items())

    @property
    def name(self) -> str:
        """Of the cell's folder."""
        return f"{self.readable_name}_{self.digest}"

    def arguments(self, stage: Literal["fit", "test"], folder: Path) -> list[str]:
        """Arguments of the public command.

        Args:
            stage: The subcommand.
            folder: The cell's own, which the run directory is made in.
        """
        options = dict(self.options) | {"seed_everything": self.seed, "run.root": str(folder), "run.name": RUN_NAME}
        options["ckpt_path"] = "auto" if stage == "fit" else self.test_checkpoint
        return [stage, *self._words(options)]

    def profile_arguments(self, output: Path) -> list[str]:
        """Arguments of the public command that measures what the cell's network costs, whatever the seed.

        Args:
            output: The file that it writes.
        """
        options = dict(self.options) | {"output": str(output)}
        if self.accelerator == "cpu":
            options["device"] = "cpu"
        return ["profile", *self._words(options)]

    def _words(self, options: Mapping[str, Any]) -> list[str]:
        files = [word for path in self.files for word in ("-c", _shown(path))]
        return [*files, *(word for name, value in options.items() for word in (f"--{name}", _text(value)))]

    def is_current(self) -> bool:
        """Whether its configuration files still say what they said when the study was read."""
        try:
            return _digest(_merged(self.files), self.options, self.seed, self.test_checkpoint) == self.digest
        except (OSError, ValueError, TypeError, RecursionError):
            return False

    def shell_line(self, command: Sequence[str], folder: Path) -> str:
        """The cell as one line of a shell: training, and if that succeeds the test."""
        return " && ".join(shlex.join([*command, *self.arguments(stage, folder)]) for stage in ("fit", "test"))


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim about a difference of scores: of `minuend` over `subtrahend`, perhaps beyond another such difference.

    Attributes:
        claim: In words.
        minuend: Cells whose scores count as they are.
        subtrahend: Cells whose scores are subtracted.
        beyond: Two more groups (C, D): the difference (A - B) - (C - D) is judged; None for A - B.
        expected: Sign of the difference; "equal" for at most `margin` on either side.
        margin: In units of the score; what a difference must exceed, or must not exceed to be none.
    """

    claim: str
    minuend: Group
    subtrahend: Group
    beyond: tuple[Group, Group] | None
    expected: Expected
    margin: float

    @property
    def weights(self) -> list[tuple[Group, float]]:
        """The difference as a sum: groups and what their scores are multiplied by."""
        terms = [(self.minuend, 1.0), (self.subtrahend, -1.0)]
        return terms + ([(self.beyond[0], -1.0), (self.beyond[1], 1.0)] if self.beyond else [])


@dataclasses.dataclass(frozen=True)
class Study:
    """What a study file says.

    Attributes:
        path: The file; its stem is the study's name, and the name of its cells' folder unless the file gives one.
        description: For readers.
        axes: Levels by axis.
        seeds: Of each group.
        cells: All that are not excluded, in the order of axes, then seeds.
        metric: Name of the score in `test_metrics.json`, such as `test/bleu`.
        mode: Whether more ("max") or less ("min") of it is better.
        scale: What scores are multiplied by, to have the unit of the paper's numbers.
        budget: Seconds that `run` may take without asking; None for any.
        time_per_cell: Expected seconds of a cell if nothing was measured; None if unknown.
        reference: Numbers of the paper by group and name.
        findings: What is expected.
        folder: Of the cells, below that of all studies. Studies that name the same share the cells that both have.
    """

    path: Path
    description: str
    axes: Mapping[str, tuple[Level, ...]]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    metric: str
    mode: Literal["min", "max"]
    scale: float
    budget: float | None
    time_per_cell: float | None
    reference: Mapping[Group, Mapping[str, float]]
    findings: tuple[Finding, ...]
    folder: str

    @property
    def name(self) -> str:
        """Of the study, and of the folder of its report."""
        return self.path.stem

    @property
    def member(self) -> str:
        """The task of a joint training whose score is compared, in `test/<member>/<score>`; else empty."""
        first, slash, _ = self.metric.removeprefix("test/").partition("/")
        return first if slash and first != ".." else ""

    @property
    def groups(self) -> list[Group]:
        """Groups in the order of their cells."""
        return list(dict.fromkeys(cell.group for cell in self.cells))

    def title(self, group: Group) -> str:
        """A group in words: its label, with the axis if there are several."""
        if len(self.axes) == 1:
            return group[0]
        return ", ".join(f"{axis}={label}" for axis, label in zip(self.axes, group, strict=True))

    @classmethod
    def read(cls, path: str | Path) -> "Study":
        """Reads a study file, or a study of the package, such as `studies/figure_3c_miniature`.

        Raises:
            FileNotFoundError: If it, or a configuration that it names, is not there.
            ValueError: If something in it cannot be used; names the file, the key and the value.
        """
        path = Path(located(str(path)))
        if not path.is_file():
            raise MissingFileError(f"study: {path} is not there. {neighbours(path, '*.yaml')}")
        return _Reader(path).study()

    def select(self, only: Iterable[str]) -> list[Cell]:
        """The cells that `axis=label` words leave; several of one axis are alternatives.

        Raises:
            ValueError: If there is no such axis or label.
        """
        wanted: dict[str, set[str]] = {}
        for word in only:
            axis, equals, label = word.partition("=")
            known = {name: [level.label for level in levels] for name, levels in self.axes.items()}
            known["seed"] = [str(seed) for seed in self.seeds]
            if not equals or axis not in known:
                raise InputError(f"only: {word!r} is not AXIS=LABEL with an axis of {self.path}: {', '.join(known)}.")
            if label not in known[axis]:
                raise InputError(f"only: {axis} has no {label!r}; it has {', '.join(known[axis])}.")
            wanted.setdefault(axis, set()).add(label)
        chosen = []
        for cell in self.cells:
            labels = cell.labels | {"seed": str(cell.seed)}
            if all(labels[axis] in some for axis, some in wanted.items()):
                chosen.append(cell)
        return chosen


class _Reader:
    """Makes a study of a file's content, with errors that say where they are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = _load(path)
        if not isinstance(content, dict):
            raise InputError(f"{path}: holds a {type(content).__name__}, not keys such as base, axes and seeds.")
        self.content = content

    def fail(self, key: str, message: str) -> InputError:
        return InputError(f"{self.path}: {key}: {message}")

    def study(self) -> Study:
        if self.path.stem == REPORT_NAME:
            raise InputError(f"{self.path}: this is the name of the folder of reports. Give the file another name.")
        self._known_keys("", self.content, _KEYS)
        base = self._files("base", self.content.get("base"))
        if not base:
            raise self.fail("base", "name at least one configuration file, such as ../miniature/translation.yaml.")
        options = self._options("options", self.content.get("options") or {})
        self.axes = self._axes(options)
        seeds = self._seeds()
        metric, mode = self._metric()
        checkpoint = self.content.get("test_checkpoint", "best")
        if checkpoint not in ("best", "last"):
            raise self.fail("test_checkpoint", f"{checkpoint!r} is neither best nor last.")
        cells = self._cells(base, options, seeds, checkpoint)
        self.groups = {cell.group for cell in cells}
        return Study(
            path=self.path,
            description=str(self.content.get("description") or ""),
            axes=self.axes,
            seeds=seeds,
            cells=tuple(cells),
            metric=metric,
            mode=mode,
            scale=self._number("scale", self.content.get("scale", 1.0), positive=True),
            budget=self._duration("budget"),
            time_per_cell=self._duration("time_per_cell"),
            reference=self._reference(),
            findings=tuple(self._finding(*one) for one in enumerate(self._list("findings"))),
            folder=self._folder(),
        )

    def _known_keys(self, place: str, mapping: Mapping[Any, Any], known: Sequence[str]) -> None:
        for key in mapping:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise self.fail(f"{place}{key}", f"there is no such key; there are {', '.join(known)}.{hint}")

    def _list(self, key: str) -> list[Any]:
        value = self.content.get(key) or []
        if not isinstance(value, list):
            raise self.fail(key, f"must be a list, got {value!r}.")
        return value

    def _files(self, key: str, value: Any) -> tuple[Path, ...]:
        names = value if isinstance(value, list) else [] if value is None else [value]
        files = []
        for name in names:
            if not isinstance(name, str):
                raise self.fail(key, f"{name!r} is no file name.")
            file = self.path.parent / name
            if not file.is_file() and (bundled := packaged(name)) is not None:
                file = bundled
            if not file.is_file():
                hint = neighbours(file, "*.yaml")
                raise self.fail(
                    key,
                    f"{name} is not there (relative to the study's folder), nor in the package. {hint}",
                )
            if not isinstance(_load(file), dict):
                raise self.fail(key, f"{name} holds no options.")
            files.append(file)
        return tuple(files)

    def _options(self, key: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(key, f"must hold options such as trainer.max_steps, got {value!r}.")
        for option, given in value.items():
            try:
                json.dumps(given, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise self.fail(f"{key}.{option}", f"{given!r} cannot be given to the command: quote it.") from error
            if not isinstance(option, str) or not _OPTION.fullmatch(option):
                raise self.fail(
                    f"{key}.{option}", "is no option such as model.dim, data.batch_size, trainer.max_steps."
                )
        return value

    def _axes(self, options: Mapping[str, Any]) -> dict[str, tuple[Level, ...]]:
        axes = self.content.get("axes")
        if not isinstance(axes, dict) or not axes:
            raise self.fail("axes", f"must hold labelled values by axis, got {axes!r}.")
        found: dict[str, tuple[Level, ...]] = {}
        setters = dict.fromkeys(options, "options sets for every cell")
        for axis, levels in axes.items():
            if not isinstance(axis, str) or not _AXIS.fullmatch(axis) or axis == "seed":
                raise self.fail(
                    f"axes.{axis}", "an axis is named by letters, digits, '_', '.' and '-', and not 'seed'."
                )
            if not isinstance(levels, dict) or not levels:
                raise self.fail(f"axes.{axis}", f"must hold overlays or options by label, got {levels!r}.")
            found[axis] = tuple(self._level(axis, label, value) for label, value in levels.items())
            for option in {option for level in found[axis] for option in level.options}:
                if option in setters:
                    raise self.fail(f"axes.{axis}", f"sets {option}, which {setters[option]}. Set it in one place.")
                setters[option] = f"the axis {axis} sets too"
        return found

    def _level(self, axis: str, label: Any, value: Any) -> Level:
        key = f"axes.{axis}.{label}"
        if not isinstance(label, str):
            raise self.fail(key, f"the label is read as the {type(label).__name__} {label!r}: quote it.")
        if not _LABEL.fullmatch(label):
            raise self.fail(key, "a label has letters, digits, '_', '.', '+' and '-', as it names folders.")
        overlays: list[Path] = []
        options: dict[str, Any] = {}
        for part in value if isinstance(value, list) else [value]:
            if not isinstance(part, dict):
                overlays += self._files(key, part)
                continue
            options |= self._options(key, part)
        return Level(label, tuple(overlays), options)

    def _seeds(self) -> tuple[int, ...]:
        seeds = self.content.get("seeds", [0])
        good = isinstance(seeds, list) and seeds and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
        if not good or len(set(seeds)) < len(seeds):
            raise self.fail(
                "seeds", f"must be a list of different numbers from 0 to 4294967295, such as [0, 1, 2], got {seeds!r}."
            )
        return tuple(seeds)

    def _metric(self) -> tuple[str, Literal["min", "max"]]:
        metric = self.content.get("metric")
        if not isinstance(metric, str) or not metric.startswith("test/"):
            raise self.fail("metric", f"must be a score of test_metrics.json such as test/bleu, got {metric!r}.")
        mode = self.content.get("mode", best_mode(metric))
        if mode == "max" or mode == "min":
            return metric, mode
        raise self.fail("mode", f"say whether the 'max' or the 'min' of {metric} is better, got {mode!r}.")

    def _folder(self) -> str:
        folder = self.content.get("cells", self.path.stem)
        if not isinstance(folder, str) or not _LABEL.fullmatch(folder) or folder == REPORT_NAME:
            raise self.fail("cells", f"must be the name of a folder for the cells, such as joint, got {folder!r}.")
        return folder

    def _duration(self, key: str) -> float | None:
        value = self.content.get(key)
        if value is None:
            return None
        match = _DURATION.fullmatch(str(value))
        if match is None or not 0 < float(match[1]) < _LARGEST:
            raise self.fail(key, f"must be a time such as '90 s', '45 min', '2 h' or '3 d', got {value!r}.")
        return float(match[1]) * _UNITS[match[2]]

    def _number(self, key: str, value: Any, *, positive: bool = False) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST
        if not good or (positive and value <= 0):
            raise self.fail(key, f"must be a {'positive ' if positive else ''}number, got {value!r}.")
        return float(value)

    def _cells(
        self, base: tuple[Path, ...], common: Mapping[str, Any], seeds: tuple[int, ...], checkpoint: str
    ) -> list[Cell]:
        excluded = [self._selection(f"exclude[{number}]", one) for number, one in enumerate(self._list("exclude"))]
        names = tuple(self.axes)
        cells = []
        for levels in itertools.product(*self.axes.values()):
            labels = {axis: level.label for axis, level in zip(names, levels, strict=True)}
            if any(all(labels[axis] in some for axis, some in one.items()) for one in excluded):
                continue
            files = (*base, *(path for level in levels for path in level.overlays))
            options = dict(common) | {name: value for level in levels for name, value in level.options.items()}
            merged = _merged(files)
            trainer = _options_of("trainer", merged, options)
            if checkpoint == "best" and not _is_validated(trainer):
                raise self.fail(
                    "test_checkpoint",
                    f"best is chosen in validations, but trainer.val_check_interval {trainer['val_check_interval']} "
                    f"is more than trainer.max_steps {trainer['max_steps']}. Set it to less, or test_checkpoint: last.",
                )
            for seed in seeds:
                digest = _digest(merged, options, seed, checkpoint)
                cell = Cell(
                    *(names, tuple(labels.values()), seed, files, options, digest),
                    total_steps=_positive(trainer.get("max_steps")),
                    batches_per_step=_positive(trainer.get("accumulate_grad_batches")) or 1,
                    accelerator=str(trainer.get("accelerator", "auto")),
                    test_checkpoint=checkpoint,
                )
                if len(cell.name.encode()) > _LONGEST_NAME:
                    raise self.fail("axes", f"the folder {cell.name} has too long a name. Give shorter labels.")
                cells.append(cell)
        if not cells:
            raise self.fail("exclude", "no cell is left. Exclude less.")
        return cells

    def _selection(self, key: str, value: Any) -> dict[str, list[str]]:
        if not isinstance(value, dict) or not value:
            raise self.fail(key, f"must give labels by axis, such as {{attention: '1111'}}, got {value!r}.")
        chosen = {}
        for axis, labels in value.items():
            if axis not in self.axes:
                raise self.fail(f"{key}.{axis}", f"there is no such axis; there are {', '.join(self.axes)}.")
            chosen[axis] = labels if isinstance(labels, list) else [labels]
            for label in chosen[axis]:
                self._require_label(f"{key}.{axis}", axis, label)
        return chosen

    def _require_label(self, key: str, axis: str, label: Any) -> None:
        known = [level.label for level in self.axes[axis]]
        if label not in known:
            quote = "" if isinstance(label, str) else " Quote it."
            raise self.fail(key, f"{axis} has no label {label!r}; it has {', '.join(known)}.{quote}")

    def _group(self, key: str, value: Any) -> Group:
        """A group by its label, if there is one axis, or by a label for every axis."""
        if not isinstance(value, dict):
            if len(self.axes) > 1:
                raise self.fail(key, f"must give a label for each of {', '.join(self.axes)}, got {value!r}.")
            value = {next(iter(self.axes)): value}
        chosen = self._selection(key, value)
        group = tuple(str(chosen[axis][0]) for axis in self.axes if len(chosen.get(axis, [])) == 1)
        if len(group) < len(self.axes):
            raise self.fail(key, f"must give one label for each of {', '.join(self.axes)}, got {value!r}.")
        if group not in self.groups:
            raise self.fail(key, f"{value!r} is excluded.")
        return group

    def _reference(self) -> dict[Group, dict[str, float]]:
        found: dict[Group, dict[str, float]] = {}
        for number, one in enumerate(self._list("reference")):
            key = f"reference[{number}]"
            if not isinstance(one, dict) or "cell" not in one:
                raise self.fail(key, f"must be a cell with numbers, such as {{cell: none, BLEU: 20.9}}, got {one!r}.")
            group = self._group(f"{key}.cell", one["cell"])
            if group in found:
                raise self.fail(f"{key}.cell", f"{one['cell']!r} is there twice.")
            found[group] = {
                str(name): self._number(f"{key}.{name}", value) for name, value in one.items() if name != "cell"
            }
        return found

    def _finding(self, number: int, one: Any) -> Finding:
        key = f"findings[{number}]"
        if not isinstance(one, dict):
            raise self.fail(key, f"must have claim, cells and expected, got {one!r}.")
        self._known_keys(f"{key}.", one, ("claim", "cells", "beyond", "expected", "margin"))
        if not isinstance(one.get("claim"), str):
            raise self.fail(f"{key}.claim", f"must be a sentence, got {one.get('claim')!r}.")
        expected: Any = one.get("expected")
        if expected not in get_args(Expected):
            raise self.fail(f"{key}.expected", f"must be {', '.join(get_args(Expected))}, got {expected!r}.")
        margin = self._number(f"{key}.margin", one.get("margin", 0))
        if margin < 0 or (expected == "equal" and margin == 0):
            raise self.fail(f"{key}.margin", f"must be at least 0, and more where equality is expected, got {margin}.")
        pairs = [self._pair(f"{key}.{name}", one[name]) for name in ("cells", "beyond") if name in one]
        if "cells" not in one:
            raise self.fail(f"{key}.cells", "name the two cells whose difference is judged.")
        (first, second), beyond = pairs[0], pairs[1] if len(pairs) > 1 else None
        return Finding(one["claim"], first, second, beyond, expected, margin)

    def _pair(self, key: str, value: Any) -> tuple[Group, Group]:
        if not isinstance(value, list) or len(value) != 2:
            raise self.fail(key, f"must be two cells, the first minus the second, got {value!r}.")
        first, second = (self._group(key, one) for one in value)
        if first == second:
            raise self.fail(key, f"both are {value[0]!r}.")
        return first, second


def format_duration(seconds: float) -> str:
    """Seconds in the largest fitting unit, such as "45 min"."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


@functools.lru_cache(maxsize=512)
def _parsed(path: Path, changed: int, size: int) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)


def _load(path: Path) -> Any:
    """The content of a YAML file, read again only when it has changed."""
    state = path.stat()
    try:
        return _parsed(path, state.st_mtime_ns, state.st_size)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is no YAML file: {' '.join(str(error).split())}. Correct it.") from error


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):  # type: ignore[misc]
    """Refuses a key that is there twice, of which YAML takes the last: a group of cells would be missing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if repeated := next((key for place, key in enumerate(keys) if key in keys[:place]), None):
            raise yaml.constructor.ConstructorError(None, None, f"{repeated!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _merged(files: Iterable[Path]) -> dict[str, Any]:
    """What configuration files say together.

    Raises:
        ValueError: If one of them is damaged, or has a mapping that contains itself.
    """
    merged: dict[str, Any] = functools.reduce(_merge, map(_load, files), {})
    return merged


def _digest(merged: Any, options: Mapping[str, Any], seed: int, checkpoint: str) -> str:
    try:
        content = json.dumps([merged, options, seed, checkpoint], sort_keys=True, default=str)
    except TypeError:  # keys of different types have no order
        content = json.dumps([merged, options, seed, checkpoint], default=str)
    except (ValueError, RecursionError) as error:
        raise InputError("base: a value of the configuration files contains itself. Correct them.") from error
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def _merge(below: Any, above: Any) -> Any:
    """Nested options, of which those of the later file win."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {name: _merge(below.get(name), value) for name, value in above.items()}


def _options_of(part: str, merged: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What files and options give a part of the configuration, such as the trainer."""
    given = merged.get(part)
    own = {name.removeprefix(f"{part}."): value for name, value in options.items() if name.startswith(f"{part}.")}
    return (given if isinstance(given, dict) else {}) | own


def _is_validated(trainer: Mapping[str, Any]) -> bool:
    """Whether a training may have a validation: not if its steps are known, and too few for the first one."""
    steps, every = _positive(trainer.get("max_steps")), _positive(trainer.get("val_check_interval"))
    counts_batches = trainer.get("check_val_every_n_epoch", 1) is None
    batches = _positive(trainer.get("accumulate_grad_batches")) or 1
    return steps is None or every is None or not counts_batches or steps * batches >= every


def _positive(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _shown(path: Path) -> str:
    """A path as the user would write it: from the current folder, if it is below it."""
    absolute = Path(os.path.normpath(path.absolute()))
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)

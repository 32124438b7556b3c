"""Cells of the studies of translation on Multi30k, by the public command, in the order of worth.

Each group is one check: its three seeds train at the same time, in processes that share the device. What `study report`
needs is copied to the output, without checkpoints, so that the report can be made elsewhere; `studies.tar.gz` beside it
holds the same in one file:

    python train.py study report configs/studies/figure_3d_small.yaml --root DIR/studies
"""

import contextlib
import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.case import Case, Run, Table
from benchmarks.checks import NO_TIME, Check, run_checks
from benchmarks.device_correctness import outcome_notes
from benchmarks.device_training import missing_package
from benchmarks.fresh_process import REPOSITORY
from benchmarks.results import Comparison, Result
from lightning_attn.io import write_file

STUDIES = REPOSITORY / "configs" / "studies"
DATA = "data/multi30k-ende"  # where the configurations of these studies have it, from the current folder
FILES = tuple(f"{split}.{language}" for split in ("train", "valid", "test") for language in ("en", "de"))

_FIRST_SECONDS = 60.0  # of a group, before one was measured
_ENDING_SECONDS = 20.0  # that are kept for ending cells and copying their files
_BETWEEN_COPIES = 5.0  # seconds, so that a run that is killed has what was done before
_LARGEST_FILE = 2 << 20  # bytes; what is larger is no result that a report shows
_LEFT_OUT = (".ckpt", ".part", ".lock", ".profiling", "attention.png")  # the last is drawn from numbers that are copied
_PATIENCE = (5.0, 3.0, 3.0)  # seconds after each signal: save, end, be killed


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is run.

    Attributes:
        groups: Study, axis and label of each, in the order of worth.
        jobs: Cells at a time.
        data: Folder of Multi30k; None if it was not given.
        output: Folder of the results.
        options: Options of every cell that differ from the study's; with them it is another study, whose file is
            written beside its cells.
        command: The script that trains.
    """

    groups: tuple[tuple[str, str, str], ...]
    jobs: int = 3
    data: str | None = None
    output: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    command: str = str(REPOSITORY / "train.py")

    def __str__(self) -> str:
        return f"{len(self.groups)} groups of three seeds, {self.jobs} cells at a time"


class Cells:
    """Runs groups of cells in a scratch folder, and keeps their small files.

    Args:
        problem: What is run.
        run: The time that is left.
        scratch: Of the checkpoints, and of a link to the data.
    """

    def __init__(self, problem: Problem, run: Run, scratch: Path) -> None:
        self.problem, self.run, self.scratch = problem, run, scratch
        self.kept = Path(problem.output or "build/benchmarks").absolute() / "studies"
        self.slowest = 0.0  # seconds of a group so far

    def link_data(self) -> None:
        """Lets the cells find the data where their configuration has it."""
        link = self.scratch / DATA
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(self.problem.data or "").absolute(), target_is_directory=True)

    def file(self, study: str) -> Path:
        """The study's file: the shipped one, or a smaller one made of it."""
        shipped = STUDIES / f"{study}.yaml"
        if not self.problem.options:
            return shipped
        yaml = importlib.import_module("yaml")  # what it needs need not be installed
        content = yaml.safe_load(shipped.read_text(encoding="utf-8"))
        place = self.kept / shipped.name
        folder = shipped.parent
        content["base"] = _moved(content["base"], folder, place.parent)
        content["options"] = content.get("options", {}) | self.problem.options
        content["axes"] = {
            axis: {label: _moved(value, folder, place.parent) for label, value in levels.items()}
            for axis, levels in content["axes"].items()
        }
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return place

    def fill(self, found: Comparison, *, study: str, axis: str, label: str) -> None:
        """Runs a group: scores and seconds by seed."""
        if self.slowest > self.run.time_left():
            found.outcome, found.reason = "not run", f"{NO_TIME}: a group took {self.slowest:.0f} s"
            return
        file, only = self.file(study), ("--only", f"{axis}={label}")
        start = self.run.clock()
        jobs = str(self.problem.jobs)
        printed, is_ended = self._run_study(self._words("run", file, *only, "--yes", "--jobs", jobs))
        seconds = self.run.clock() - start
        if error := missing_package(printed):
            raise error
        cells = self._states(self._words("status", file, *only, "--json"))
        done = [cell for cell in cells if cell["state"] == "done"]
        found.figures |= {
            "cells done": len(done),
            "seconds in all": round(seconds, 1),
            "scores": {str(cell["seed"]): cell["score"] for cell in done},
            "seconds": {str(cell["seed"]): round(cell["seconds"] or 0.0, 1) for cell in done},
        }
        failed = next((cell["reason"] for cell in cells if cell["state"] == "failed"), None)
        if failed is not None:
            found.outcome, found.reason = "failed", failed
        elif len(done) < len(cells):
            told = f"{NO_TIME}: ended after {seconds:.0f} s" if is_ended else _last_line(printed)
            found.outcome, found.reason = ("not run" if is_ended else "failed"), told
        else:
            self.slowest = max(self.slowest, seconds)

    def _words(self, what: str, file: Path, *options: str) -> list[str]:
        """A call of `study`."""
        place = ("--root", str(self.scratch / "studies"))
        return [sys.executable, self.problem.command, "study", what, str(file), *place, *options]

    def _run_study(self, words: Sequence[str]) -> tuple[str, bool]:
        """What it prints, and whether it was ended for lack of time."""
        with subprocess.Popen(
            words,
            cwd=self.scratch,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # an interrupt of this process reaches it once, by the lines below
        ) as process:
            try:
                return self._wait(process)
            except BaseException:
                _stop(process)
                raise
            finally:
                self._keep()
                self._pack()

    def _states(self, words: Sequence[str]) -> list[dict[str, Any]]:
        done = subprocess.run(words, cwd=self.scratch, env=_environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(_last_line(done.stderr))
        cells: list[dict[str, Any]] = json.loads(done.stdout)["cells"]
        return cells

    def _wait(self, process: "subprocess.Popen[str]") -> tuple[str, bool]:
        """Copies files until a process ends or is ended."""
        while True:
            left = self.run.time_left() - _ENDING_SECONDS
            if left <= 0:
                return _stop(process), True
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.communicate(timeout=min(_BETWEEN_COPIES, left))[0], False
            self._keep()

    def _keep(self) -> None:
        """Copies the small files of all cells."""
        source = self.scratch / "studies"
        for path in sorted(source.rglob("*")):
            target = self.kept / path.relative_to(source)
            with contextlib.suppress(FileNotFoundError):  # one that was temporary
                state = path.stat()
                if not path.is_file() or path.name.endswith(_LEFT_OUT) or state.st_size > _LARGEST_FILE:
                    continue
                if target.exists() and target.stat().st_mtime_ns == state.st_mtime_ns:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)

    def _pack(self) -> None:
        """Writes what was copied into one file as well, for machines that give back few."""

        def write(file: BinaryIO) -> None:
            with tarfile.open(fileobj=file, mode="w:gz") as archive:
                archive.add(self.kept, arcname=self.kept.name)

        if self.kept.is_dir():
            write_file(self.kept.with_name(f"{self.kept.name}.tar.gz"), write, replace=True)


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path}


def _stop(process: "subprocess.Popen[str]") -> str:
    """Asks the runner to stop, then to end its cells, then to kill them; what it has printed."""
    for patience in _PATIENCE:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=patience)[0]
    process.kill()
    return process.communicate()[0]


def _moved(value: Any, before: Path, after: Path) -> Any:
    """A level of an axis, whose overlays are named from another folder."""
    if isinstance(value, list):
        return [_moved(one, before, after) for one in value]
    return os.path.relpath(before / value, after) if isinstance(value, str) else value


def _last_line(printed: str) -> str:
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("error:")), lines[-1] if lines else "it printed nothing")


def missing_data(folder: str | None) -> str:
    """Why there is nothing to train on; empty if there is."""
    if folder is None:
        return "no data: give --multi30k FOLDER"
    missing = [name for name in FILES if not (Path(folder) / name).is_file()]
    return f"no data: {folder} has no {', '.join(missing)}" if missing else ""


def checks(case: Case, cells: Cells) -> Iterator[Check]:
    """In the order of worth."""
    for study, axis, label in case.problem.groups:
        fill = partial(cells.fill, study=study, axis=axis, label=label)
        yield Check(f"{study} {label}", fill, seconds=_FIRST_SECONDS)


def measure(case: Case, run: Run) -> Iterator[Comparison]:
    """All groups."""
    reason = missing_data(case.problem.data)
    if reason:
        names = [f"{study} {label}" for study, _, label in case.problem.groups]
        yield from (Comparison(name, outcome="not run", reason=reason) for name in names)
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        cells = Cells(case.problem, run, Path(folder))
        cells.link_data()
        yield from run_checks(checks(case, cells), run)


def table(result: Result) -> Table:
    """A line for each group."""
    rows = []
    for found in result.comparisons:
        scores, figures = found.figures.get("scores", {}), found.figures
        shown = ", ".join(f"{score:.2f}" for score in scores.values())
        rows.append([found.name, found.outcome, shown or "-", str(figures.get("seconds in all", "-"))])
    return Table(["group", "outcome", "test BLEU by seed", "s"], rows, outcome_notes(result))


def _groups(study: str, axis: str, labels: Sequence[str]) -> tuple[tuple[str, str, str], ...]:
    return tuple((study, axis, label) for label in labels)


# Encoder-decoder attention, where the paper's claim is the largest; then what the findings on self-attention compare.
GROUPS = (
    *_groups("figure_3d_small", "cross_attention", ("1111", "0111", "1000")),
    *_groups("figure_3c_small", "self_attention", ("1111", "none", "0011", "0110", "0111", "0100", "1100", "0010")),
    *_groups("figure_3c_small", "self_attention", ("deformable_0010", "1000", "0001")),
    *_groups("figure_3d_small", "cross_attention", ("0110", "0011", "0100", "1100", "0010", "0001")),
)
_SMALL: Mapping[str, Any] = {
    **{"trainer.max_steps": 4, "trainer.val_check_interval": 4, "trainer.precision": "32-true", "model.dim": 16},
    **{"model.hidden_dim": 32, "model.encoder_layers": 1, "model.decoder_layers": 1, "model.decoding.beam_size": 1},
    **{"model.schedule.warmup_steps": 1, "trainer.limit_val_batches": 1, "trainer.limit_test_batches": 1},
    "data.vocabulary_size": 600,
}
CASES = (
    Case(
        "device_check.study.multi30k",
        "terms of encoder-decoder and self-attention, trained on Multi30k and tested",
        measure,
        Problem(GROUPS),
        table=table,
        quick={"problem": Problem(GROUPS[:2], options=_SMALL)},
    ),
)

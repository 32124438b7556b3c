"""Trainings by the public command on the device: interrupted and resumed, through NCCL, and the quickstart's.

The miniature translation is trained, as by `make quickstart`; with deterministic algorithms and dropout where runs are
compared bit by bit.
"""

import contextlib
import csv
import dataclasses
import importlib
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.case import Case, Run, Table
from benchmarks.checks import Check, run_checks
from benchmarks.device_correctness import outcome_notes
from benchmarks.fresh_process import REPOSITORY, FreshProcessError
from benchmarks.results import Comparison, Result

CONFIG = REPOSITORY / "configs" / "miniature" / "translation.yaml"
SAME = 1e-6  # of the largest weight: how far a rank of one may lie from no rank
_CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # without it, cuBLAS is not deterministic


@dataclasses.dataclass(frozen=True)
class Problem:
    """How long is trained.

    Attributes:
        steps: Of a training that is compared; it is interrupted after half of them.
        quickstart: Steps of the quickstart's.
        options: Further options of the command.
    """

    steps: int = 12
    quickstart: int = 150
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.steps} steps that are compared, {self.quickstart} of the quickstart"


class Trained(NamedTuple):
    """What a training left: its losses, and the weights of `last.ckpt` by name."""

    losses: list[float]
    weights: Mapping[str, Tensor]


def train(arguments: Sequence[str]) -> None:
    """Runs the command in this process.

    Raises:
        RuntimeError: If it ends with another status than 0.
    """
    run_command = importlib.import_module("lightning_attn.cli").main  # what it needs need not be installed
    os.environ.update(_CUBLAS)
    try:
        run_command(list(arguments))
    except SystemExit as error:
        if error.code not in (0, None):
            raise RuntimeError(f"train.py {' '.join(arguments[:1])} ended with status {error.code}") from error


class Trainings:
    """Trainings of the miniature translation in one folder.

    Args:
        folder: Of their runs and data.
        problem: How long.
        run: How processes are started, and the time that is left.
    """

    def __init__(self, folder: Path, problem: Problem, run: Run) -> None:
        self.folder, self.run = folder, run
        self.common = [
            *("fit", "-c", str(CONFIG), "--run.root", str(folder / "runs"), "--data.root", str(folder / "corpus")),
            *("--trainer.accelerator", "auto", "--trainer.devices", "1", "--trainer.log_every_n_steps", "1"),
            *problem.options,
        ]
        # Another length of the run must not change the schedule, and random numbers must matter.
        self.compared = [
            *("--seed_everything", "1", "--trainer.deterministic", "true", "--model.dropout", "0.1"),
            *("--model.schedule.name", "constant", "--model.schedule.warmup_steps", "0"),
        ]

    def arguments(self, name: str, steps: int, *options: str) -> list[str]:
        """The command line of a training."""
        return [*self.common, "--run.name", name, "--trainer.max_steps", str(steps), *options]

    def fit(self, name: str, steps: int, *options: str) -> None:
        """Trains in a fresh process."""
        self.run.report(f"training {name}")
        try:
            self.run.isolate(train, self.arguments(name, steps, *options), timeout=_limit(self.run))
        except FreshProcessError as error:
            raise missing_package(str(error)) or error from error

    def fit_by_torchrun(self, name: str, steps: int, *options: str) -> None:
        """Trains as the one rank that `torchrun` starts; through NCCL on a GPU, else gloo."""
        self.run.report(f"training {name}")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        command = [*torchrun, str(REPOSITORY / "train.py"), *self.arguments(name, steps, *options)]
        command += ["--trainer.strategy", "ddp"]
        path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        status, errors = _ended(command, os.environ | _CUBLAS | {"PYTHONPATH": path}, _limit(self.run))
        if status:
            lines = errors.strip().splitlines()
            told = next((line for line in lines if "Error" in line or line.startswith("error:")), f"{lines[-1:]}")
            raise missing_package(told) or RuntimeError(f"torchrun ended with status {status}: {told}")

    def trained(self, name: str) -> Trained:
        """What a training left."""
        directory = self.folder / "runs" / "translation" / name
        with (directory / "metrics.csv").open(encoding="utf-8") as file:
            losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
        checkpoint = torch.load(directory / "last.ckpt", weights_only=True, map_location="cpu")
        return Trained(losses, checkpoint["state_dict"])


def _limit(run: Run) -> float:
    """The time limit of a process, in seconds; that of the check comes first."""
    return min(600.0, max(0.0, run.time_left()) + 5.0)


def _ended(command: Sequence[str], environment: Mapping[str, str], timeout: float) -> tuple[int, str]:
    """Status and errors of a process, which is ended with all that it started where time is out."""
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _, errors = process.communicate(timeout=timeout)
        except BaseException:  # an interrupt too: torchrun ends its ranks if it is asked to end, not if it is killed
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            raise
    return process.returncode, errors


def missing_package(message: str) -> ModuleNotFoundError | None:
    """The error of another process that a module is missing, if it was that."""
    if "No module named" not in message:
        return None
    name = message.split("No module named", 1)[1].strip().split()[0].strip("'\";.")
    return ModuleNotFoundError(message, name=name)


def largest_difference(one: Trained, other: Trained) -> float:
    """Between weights, relative to the largest weight; infinite if they are others."""
    if one.weights.keys() != other.weights.keys():
        return math.inf
    largest = max(float(weight.abs().max()) for weight in one.weights.values() if weight.numel())
    pairs = ((weight.double(), other.weights[name].double()) for name, weight in one.weights.items())
    return max(float((a - b).abs().max()) for a, b in pairs if a.numel()) / largest


def _check_resumed(problem: Problem, run: Run, found: Comparison) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainings = Trainings(Path(folder), problem, run)
        trainings.fit("unbroken", problem.steps, *trainings.compared)
        trainings.fit("first", problem.steps // 2, *trainings.compared)
        checkpoint = Path(folder) / "runs" / "translation" / "first" / "last.ckpt"
        trainings.fit("second", problem.steps, *trainings.compared, "--ckpt_path", str(checkpoint))
        unbroken, second = trainings.trained("unbroken"), trainings.trained("second")
    found.figures |= {"losses": unbroken.losses, "resumed losses": second.losses}
    found.figures["difference"] = difference = largest_difference(unbroken, second)
    if difference or second.losses != unbroken.losses[-len(second.losses) :]:
        found.add_wrong(f"a resumed training differs: weights by {difference:.1e} of the largest")


def _check_torchrun(problem: Problem, run: Run, found: Comparison) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainings = Trainings(Path(folder), problem, run)
        trainings.fit("alone", problem.steps, *trainings.compared)
        trainings.fit_by_torchrun("rank", problem.steps, *trainings.compared)
        alone, rank = trainings.trained("alone"), trainings.trained("rank")
    found.figures |= {"losses": alone.losses, "losses by torchrun": rank.losses}
    found.figures["difference"] = difference = largest_difference(alone, rank)
    if not difference <= SAME:
        found.add_wrong(f"one rank differs from none: weights by {difference:.1e} of the largest")


def _check_quickstart(problem: Problem, run: Run, found: Comparison) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainings = Trainings(Path(folder), problem, run)
        start = run.clock()
        trainings.fit("quickstart", problem.quickstart)
        seconds = run.clock() - start
        losses = trainings.trained("quickstart").losses
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    found.figures |= {"steps": len(losses), "seconds in all": round(seconds, 1), "first loss": first, "last loss": last}
    if not last < first:
        found.add_wrong(f"the loss went from {first:.3f} to {last:.3f}")


def checks(case: Case, run: Run) -> Iterator[Check]:
    """In the order of worth."""
    yield Check("quickstart", partial(_check_quickstart, case.problem, run), seconds=25.0)
    yield Check("resumed", partial(_check_resumed, case.problem, run), seconds=40.0)
    yield Check("torchrun", partial(_check_torchrun, case.problem, run), seconds=30.0)


def measure(case: Case, run: Run) -> Iterator[Comparison]:
    """All trainings."""
    yield from run_checks((check for check in checks(case, run) if check.name in case.sides), run)


def table(result: Result) -> Table:
    """A line for each training."""
    cells = []
    for found in result.comparisons:
        shown = {name: value for name, value in found.figures.items() if not isinstance(value, list)}
        cells.append([found.name, found.outcome, ", ".join(f"{name} {_short(value)}" for name, value in shown.items())])
    return Table(["training", "outcome", "figures"], cells, outcome_notes(result))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_SMALL = (
    *("--model.dim", "16", "--model.hidden_dim", "32", "--model.encoder_layers", "1", "--model.decoder_layers", "1"),
    *("--model.self_attention.num_heads", "2", "--model.cross_attention.num_heads", "2"),
    *("--data.max_tokens", "400", "--trainer.num_sanity_val_steps", "0", "--model.schedule.warmup_steps", "0"),
    *("--model.optimizer.learning_rate", "0.02"),
)
CASES = (
    Case(
        "device_check.tasks.trainings",
        "the miniature translation, trained by the command",
        measure,
        Problem(),
        sides=("quickstart", "resumed", "torchrun"),
        table=table,
        quick={"problem": Problem(steps=4, quickstart=12, options=_SMALL)},
    ),
)

"""Whether memory stays flat in a long training.

Each miniature task is trained for 2,000 steps through the real command, each in a process of its own. Its resident
memory after step 200, by which time all code is loaded and a validation is over, is compared with that after the last
step. It takes long; ``--steps`` and ``--sides`` make it shorter.
"""

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytorch_lightning as pl

from benchmarks.case import Benchmark, Case, Run, Table, no_targets
from benchmarks.fresh_process import FreshProcessError
from benchmarks.report import settings
from benchmarks.results import Comparison, Result, Side, Target
from benchmarks.runner import positive_int, run_as_command
from lightning_attn.cli import main as run_command

CONFIGS = Path(__file__).parents[1] / "configs" / "miniature"
TASKS = ("translation", "detection", "segmentation")
MOST_GROWTH = 0.02


@dataclasses.dataclass(frozen=True)
class Problem:
    """How a miniature task is trained.

    Attributes:
        steps: Optimizer steps.
        settled: The step after which memory should not grow.
        validate_every: Steps from one validation to the next; one is over before `settled`.
        every: Steps from one look at the memory to the next.
        options: Further options of the command.
    """

    steps: int = dataclasses.field(default=2000, metadata={"type": positive_int, "help": "optimizer steps (2000)"})
    settled: int = 200
    validate_every: int = 180
    every: int = 20
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.steps <= self.settled:
            raise ValueError(f"--steps {self.steps} ends before memory is compared: give more than {self.settled}.")

    def __str__(self) -> str:
        return settings({name: value for name, value in dataclasses.asdict(self).items() if value})


class WatchMemory(pl.Callback):
    """Writes the resident memory of the process into a file, after every so many steps.

    Args:
        path: Lines of a step and the bytes after it.
        every: How many steps.
    """

    def __init__(self, path: str, every: int) -> None:
        self.path, self.every = Path(path), every

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: object) -> None:
        """Looks."""
        if trainer.global_step % self.every == 0:
            with self.path.open("a", encoding="ascii") as file:
                file.write(f"{trainer.global_step} {psutil.Process().memory_info().rss}\n")


def train(task: str, problem: Problem) -> dict[str, int]:
    """Trains a miniature task in this process.

    Returns:
        Bytes by step.
    """
    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder) / "seen"
        watch: dict[str, Any] = {"class_path": "benchmarks.memory_growth.WatchMemory"}
        watch |= {"init_args": {"path": str(seen), "every": problem.every}}
        trainer = {
            "max_steps": problem.steps,
            "val_check_interval": problem.validate_every,
            "check_val_every_n_epoch": None,
            "callbacks+": [watch],
        }
        overlay = Path(folder) / "overlay.yaml"
        overlay.write_text(json.dumps({"trainer": trainer}), encoding="utf-8")  # which is YAML too
        configs = ["-c", str(CONFIGS / f"{task}.yaml"), "-c", str(overlay)]
        run_command(["fit", *configs, "--run.root", folder, *problem.options])
        lines = [line.split() for line in seen.read_text(encoding="ascii").splitlines()]
    return {step: int(size) for step, size in lines}


def measure(case: Case, run: Run) -> Iterator[Comparison]:
    """Trains each task in a fresh process."""
    comparison = Comparison()
    yield comparison  # before it is complete: an interrupt keeps the tasks that are done
    for task in case.sides:
        run.report(task)
        comparison.sides[task] = Side()
        try:
            comparison.figures[task] = run.isolate(train, task, case.problem, threads=run.threads, timeout=7200.0)
        except FreshProcessError as error:
            comparison.sides[task].error = str(error)


def growth(seen: Mapping[str, int], settled: int) -> tuple[list[int], float | None]:
    """The bytes from a step on, in the order of the steps, and by what share the last exceeds the first."""
    later = [size for step, size in sorted((int(step), size) for step, size in seen.items()) if step >= settled]
    return later, later[-1] / later[0] - 1 if len(later) > 1 else None


def judge(result: Result) -> None:
    """The growth after the settled step is at most 2 %."""
    for comparison in result.comparisons:
        comparison.targets = [
            Target(f"{task}: growth of resident memory", growth(seen, result.problem["settled"])[1], MOST_GROWTH)
            for task, seen in comparison.figures.items()
        ]


def table(result: Result) -> Table:
    """A line for each task."""
    [comparison] = result.comparisons
    settled = result.problem["settled"]
    cells = []
    for task, side in comparison.sides.items():
        later, share = growth(comparison.figures.get(task, {}), settled)
        if share is None:
            cells.append([task, side.error or "-", "", "", ""])
        else:
            shown = (f"{size / 2**20:,.0f}" for size in (later[0], later[-1], max(later)))
            cells.append([task, *shown, f"{share:+.1%}"])
    return Table(["task", f"MiB after step {settled}", "at the end", "at most", "growth"], cells, comparison.targets)


BENCHMARK = Benchmark(
    name="memory_growth",
    title="Resident memory of long trainings",
    description=__doc__,
    method="One training of each task, in a process of its own.",
    cases=(
        Case(
            "memory_growth.training",
            "resident memory of the miniature tasks, early and late",
            measure,
            Problem(),
            sides=TASKS,
            judge=judge,
            table=table,
            only_memory=True,
            quick={"problem": Problem(steps=100, settled=40, validate_every=30), "judge": no_targets},
        ),
    ),
)

if __name__ == "__main__":
    run_as_command("memory_growth")

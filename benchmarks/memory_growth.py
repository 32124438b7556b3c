"""Whether memory stays flat in a long training.

``python -m benchmarks.memory_growth`` trains each miniature task for 2,000 steps through the real command, each in a
process of its own, and compares its resident memory after step 200, by which time all code is loaded and a validation
is over, with that after the last step. It prints a table and writes JSON and Markdown. It takes long; ``--steps`` and
``--tasks`` make it shorter.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytorch_lightning as pl
import torch

from benchmarks.measure import (
    Target,
    answer_parent,
    comma_separated,
    machine,
    markdown_settings,
    markdown_table,
    positive_int,
    print_results,
    run_child,
)
from lightning_attn.cli import main as run_command
from lightning_attn.io import unused_path, write_json, write_text

CONFIGS = Path(__file__).parents[1] / "configs" / "miniature"
TASKS = ("translation", "detection", "segmentation")
MOST_GROWTH = 0.02


@dataclasses.dataclass(frozen=True)
class Problem:
    """How long is trained.

    Attributes:
        steps: Optimizer steps.
        settled: The step after which memory should not grow.
        validate_every: Steps from one validation to the next; one is over before `settled`.
        every: Steps from one look at the memory to the next.
    """

    steps: int = 2000
    settled: int = 200
    validate_every: int = 180
    every: int = 20


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


def train(task: str, problem: Problem, options: Sequence[str] = ()) -> dict[str, int]:
    """Trains a miniature task in this process; bytes by step.

    Args:
        task: Which.
        problem: How long.
        options: Further ones of the command.
    """
    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder) / "seen"
        watch = {"class_path": "benchmarks.memory_growth.WatchMemory"}
        watch |= {"init_args": {"path": str(seen), "every": problem.every}}  # type: ignore[dict-item]
        trainer = {
            "max_steps": problem.steps,
            "val_check_interval": problem.validate_every,
            "check_val_every_n_epoch": None,
            "callbacks+": [watch],
        }
        overlay = Path(folder) / "overlay.yaml"
        overlay.write_text(json.dumps({"trainer": trainer}), encoding="utf-8")  # which is YAML too
        configs = ["-c", str(CONFIGS / f"{task}.yaml"), "-c", str(overlay)]
        run_command(["fit", *configs, "--run.root", folder, *options])
        lines = [line.split() for line in seen.read_text(encoding="ascii").splitlines()]
    return {step: int(size) for step, size in lines}


def judge(task: str, seen: Mapping[str, int], settled: int) -> Target:
    """The growth after `settled` beside its bound."""
    later = _settled(seen, settled)
    growth = later[-1] / later[0] - 1 if len(later) > 1 else None
    return Target(f"{task}: growth of resident memory", growth, MOST_GROWTH, at_least=False)


def _settled(seen: Mapping[str, int], settled: int) -> list[int]:
    """The bytes from a step on, in the order of the steps."""
    return [size for step, size in sorted((int(step), size) for step, size in seen.items()) if step >= settled]


def table(results: Mapping[str, Mapping[str, int] | str], settled: int) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    cells = []
    for task, seen in results.items():
        if isinstance(seen, str):
            cells.append([task, seen, "", "", ""])
            continue
        later = _settled(seen, settled)
        first, last, most = later[0], later[-1], max(later)
        cells.append([task, *(f"{size / 2**20:,.0f}" for size in (first, last, most)), f"{last / first - 1:+.1%}"])
    return ["task", f"MiB after step {settled}", "at the end", "at most", "growth"], cells


def main(arguments: Sequence[str] | None = None, problem: Problem = Problem()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=comma_separated, default=TASKS, help=",".join(TASKS))
    parser.add_argument("--steps", type=positive_int, default=problem.steps, help="optimizer steps (2000)")
    parser.add_argument("--threads", type=positive_int, default=2, help="threads of the tensor operations (2)")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder of the results")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child is not None:
        torch.set_num_threads(chosen.threads)
        answer_parent(lambda: train(chosen.child["task"], Problem(**chosen.child["problem"]), chosen.child["options"]))
        return
    unknown = set(chosen.tasks) - set(TASKS)
    if unknown:
        parser.error(f"--tasks: {', '.join(sorted(unknown))} is none of {', '.join(TASKS)}.")
    if chosen.steps <= problem.settled:
        parser.error(f"--steps {chosen.steps} ends before memory is compared: give more than {problem.settled}.")
    problem = dataclasses.replace(problem, steps=chosen.steps)
    results: dict[str, dict[str, int] | str] = {}
    for task in chosen.tasks:
        request = {"task": task, "problem": dataclasses.asdict(problem), "options": []}
        results[task] = measure(request, chosen.threads)
        print(f"{task}: done", file=sys.stderr)
    targets = [judge(task, seen, problem.settled) for task, seen in results.items() if not isinstance(seen, str)]
    header, cells = table(results, problem.settled)
    run: dict[str, Any] = {
        "machine": machine("torch", "pytorch-lightning"),
        "problem": dataclasses.asdict(problem),
        "results": results,
        "targets": [target.as_dict() for target in targets],
    }
    file = write_json(unused_path(chosen.output / "memory_growth.json"), run)
    lines = ["# Resident memory of long trainings", ""]
    lines += [markdown_settings(run[name]) for name in ("machine", "problem")]
    lines += ["", *markdown_table(header, cells), "", *(f"- {target}" for target in targets), ""]
    write_text(file.with_suffix(".md"), "\n".join(lines))
    print_results("memory", header, cells, targets, file)


def measure(request: Mapping[str, Any], threads: int) -> dict[str, int] | str:
    """Trains in a fresh process; bytes by step, or why there are none."""
    arguments = ["--child", json.dumps(request), "--threads", str(threads)]
    return run_child("benchmarks.memory_growth", arguments, threads=threads, timeout=7200.0)


if __name__ == "__main__":
    main()

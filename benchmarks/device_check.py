"""Everything that has to be seen on a GPU, in one run: what is right, what it costs, and whether trainings work.

    python -m benchmarks.device_check --minutes 6 --output DIR
    python -m benchmarks.device_check --only attention,tasks.detection
    python -m benchmarks.device_check --minutes 10 --only study --multi30k data/multi30k-ende --output DIR
    python -m benchmarks.device_check --resume DIR/device_check_h100_2026-12-01.json

Sections, in the order of worth, each with its share of the minutes, of which what is left goes to the next:

  correctness  values and gradients of all 15 term sets on maps and sentences, with every mask, in float32 without TF32,
               bfloat16 and float16, by every algorithm, beside float64; deformable and dynamic convolution; dropout;
               host synchronisations of training steps; determinism; torch.library.opcheck of this project's operators
  first_look   what was measured when the project first ran on a GPU, beside those figures (benchmarks/results)
  attention    eager and graph-replayed time, and memory, of all sets at six sizes, windows, deformable and dynamic
               convolution, beside the fused attention with E1 alone, mmcv's module, torchvision's operator and unfold
  tasks        training steps of Faster R-CNN, the base Transformer and segmentation beside torchvision's and torch's
               networks; the quickstart's training, a resumed training beside an unbroken one, one rank by torchrun
  profile      the kernels of steps by time: attention, detection and translation, ours beside the floor and torch's
  study        cells of the studies on Multi30k, three seeds of a group at a time, by the public command; their files,
               without checkpoints, are in DIR/studies, for `study report` elsewhere. Only with --multi30k FOLDER

Without a GPU everything runs at small sizes, to try it. JSON and Markdown are written
all the time, so that a killed run loses two seconds at most; `--resume` runs the rest of it, with the same code. What
does not fit into the minutes is listed as not run, as is what needs a package that is not installed: correctness,
first_look and attention need torch, torchvision, numpy and typing_extensions only. An error is recorded, and the rest
goes on. The exit status is 1 if a value is incorrect, and only then.
"""

import argparse
import dataclasses
import datetime
import functools
import gc
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    device_attention,
    device_behaviour,
    device_correctness,
    device_first_look,
    device_kernels,
    device_profile,
    device_study,
    device_tasks,
    device_training,
)
from benchmarks.case import Benchmark, Case, Run
from benchmarks.checks import NO_TIME
from benchmarks.device import answers, card_slug, describe_card, on_gpu
from benchmarks.fresh_process import describe
from benchmarks.report import Report, machine, markdown_table, merged, read_report, settings, tabulate, update_report
from benchmarks.results import Comparison, Result, Target
from benchmarks.runner import comma_separated, positive_float
from lightning_attn.io import unused_path

SECTIONS: Mapping[str, float] = {
    **{"correctness": 0.18, "first_look": 0.24, "attention": 0.42, "tasks": 0.6, "profile": 0.66},
    "study": 1.0,
}
"""Each section's end as a share of the minutes, if all run; of several that are chosen, the shares are stretched."""

_SECONDS_BETWEEN_WRITES = 2.0
_FRESH_START_SECONDS = 15.0  # with less time left, a run whose GPU no longer answers is not started anew


def _command(arguments: Sequence[str]) -> None:
    status = main(arguments)
    if status:
        raise SystemExit(status)


BENCHMARK = Benchmark(
    name="device_check",
    title="Device check",
    description=__doc__,
    method="Forward and backward pass; medians of steps that run in turn, each until the device is done. A side is "
    "a replayed CUDA graph, which has no host's share, unless it is called eager. Memory is what a step adds to what "
    "the allocator holds. Errors are the largest difference divided by the largest value.",
    cases=(
        *(case for case in device_correctness.CASES if case.name.endswith((".maps", ".sentences"))),
        *device_behaviour.CASES[:1],
        *(case for case in device_correctness.CASES if not case.name.endswith((".maps", ".sentences"))),
        *device_behaviour.CASES[1:],
        *device_first_look.CASES,
        *device_attention.CASES,
        *device_kernels.CASES,
        *device_tasks.CASES,
        *device_training.CASES,
        *device_profile.CASES,
        *device_study.CASES,
    ),
    packages=("triton", "mmcv-lite", "torchmetrics", "jsonargparse"),
    command=_command,
)


def section_of(case: Case) -> str:
    """The section that a case belongs to."""
    return case.name.split(".")[1]


def chosen_cases(names: Sequence[str], *, small: bool) -> list[Case]:
    """The cases of sections, or single ones such as `tasks.detection`, in the order of worth.

    Args:
        names: Which; empty for all.
        small: Whether they are for a CPU.

    Raises:
        ValueError: If there is no such section or case.
    """
    known = {case.name.removeprefix(f"{BENCHMARK.name}."): case for case in BENCHMARK.cases}
    names = [name.removeprefix(f"{BENCHMARK.name}.") for name in names]
    for name in names:
        if name not in SECTIONS and name not in known:
            raise ValueError(f"--only {name}: there are the sections {', '.join(SECTIONS)}, and {', '.join(known)}.")
    chosen = [case for name, case in known.items() if not names or name in names or section_of(case) in names]
    return [dataclasses.replace(case, **(case.quick if small else {})) for case in chosen]


class Deadlines:
    """How much time is left for each section.

    Args:
        minutes: Of the whole run.
        sections: Those that run.
        clock: Gives the time in seconds.
    """

    def __init__(self, minutes: float, sections: Sequence[str], clock: Callable[[], float]) -> None:
        self.clock, self.start, self.seconds = clock, clock(), 60 * minutes
        shares, before = {}, 0.0
        for section, end in SECTIONS.items():
            if section in sections:
                shares[section] = end - before
            before = end
        whole, reached = sum(shares.values()), 0.0
        self.ends = {}
        for section, share in shares.items():
            reached += share / whole
            self.ends[section] = self.seconds * reached

    def left(self, section: str) -> float:
        """Seconds until the end of a section's share."""
        return self.start + self.ends[section] - self.clock()

    def left_in_all(self) -> float:
        """Seconds until the end of the run."""
        return self.start + self.seconds - self.clock()


def measure(
    cases: Sequence[Case], run: Run, deadlines: Deadlines, earlier: Mapping[str, Mapping[str, Comparison]]
) -> Iterator[tuple[Result, Comparison]]:
    """The comparisons of all cases, each with the result that it has been added to.

    Args:
        cases: Which, in this order.
        run: How.
        deadlines: Until when.
        earlier: What an interrupted run measured, by case and name.
    """
    for case in cases:
        result = Result(case.name, case.title, str(case.problem), dataclasses.asdict(case.problem))
        time_left = functools.partial(deadlines.left, section_of(case))
        of_case = dataclasses.replace(run, time_left=time_left, earlier=earlier.get(case.name, {}))
        for comparison in _to_the_end(case, of_case):
            result.comparisons.append(comparison)
            case.set_targets(result)
            yield result, comparison


def _to_the_end(case: Case, run: Run) -> Iterator[Comparison]:
    """The comparisons of a case; an error between its checks is one more."""
    try:
        yield from case.measure(case, run)
    except Exception as error:
        yield Comparison("the case itself", outcome="failed", reason=describe(error))


class Record:
    """What a run has found, and its files.

    Args:
        header: What figures depend on.
        options: Of the command line.
        path: The JSON file; the Markdown lies beside it.
        earlier: The reports of an interrupted run, which stay in the files.
        clock: Gives the time in seconds.

    Attributes:
        results: Those of the earlier run and of this one.
        seconds: How long each case has taken in this run.
    """

    def __init__(
        self,
        header: Mapping[str, Any],
        options: Mapping[str, Any],
        path: Path,
        earlier: Sequence[Report],
        clock: Callable[[], float],
    ) -> None:
        self.header, self.options, self.path, self.earlier = header, options, path, earlier
        self.results = merged(earlier)
        self.seconds: dict[str, float] = {}
        self._found: dict[str, Result] = {}
        self._clock, self._written = clock, -math.inf

    def add(self, result: Result, seconds: float) -> None:
        """Adds a result, or takes in that it has one comparison more, which took so long."""
        self._found[result.case] = result
        self.seconds[result.case] = self.seconds.get(result.case, 0.0) + seconds
        self.results = merged([*self.earlier, Report(self.header, self.options, list(self._found.values()))])

    def write(self) -> None:
        """Replaces the files."""
        update_report(BENCHMARK, Report(self.header, self.options, self.results), self.path)
        self._written = self._clock()

    def write_if_due(self) -> None:
        """The same, if that was not just now: quick checks would take less time than their files."""
        if self._clock() - self._written > _SECONDS_BETWEEN_WRITES:
            self.write()


def ended_before(reports: Sequence[Report]) -> dict[str, dict[str, Comparison]]:
    """What earlier runs have measured, or failed in, by case and name; only what they did not run is still to do."""
    return {
        result.case: {one.name: one for one in result.comparisons if one.outcome != "not run"}
        for report in reports
        for result in report.results
    }


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=positive_float, default=6.0, help="after which it ends (6)")
    parser.add_argument(
        "--only",
        "--cases",
        type=comma_separated,
        default=(),
        help=f"sections ({', '.join(SECTIONS)}) or cases such as tasks.detection, with commas between; all by default",
    )
    parser.add_argument(
        "--output", type=Path, help="folder of the results ($OUT if that is set, else build/benchmarks)"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="JSON", help="of an interrupted run, which is continued in place"
    )
    parser.add_argument(
        "--multi30k", metavar="FOLDER", help="of Multi30k, train.en and so on; runs the section study too"
    )
    parser.add_argument("--no-memory", action="store_true", help="time only")
    return parser


def main(
    arguments: Sequence[str],
    *,
    restart: Callable[[list[str]], object] = lambda command: os.execv(sys.executable, command),
    **fields: Any,
) -> int:
    """Runs the checks from the command line.

    Args:
        arguments: The command line.
        restart: Replaces this process by another, whose command line it gets: after an illegal access, the GPU answers
            no call of the process that made it.
        **fields: Further fields of `Run`.

    Returns:
        The exit status: 1 if a value is incorrect, 130 after an interrupt, else 0.

    Raises:
        SystemExit: If the arguments are wrong.
    """
    parser = argument_parser()
    options = parser.parse_args(arguments)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without it
    clock: Callable[[], float] = fields.setdefault("clock", time.perf_counter)
    try:
        cases = chosen_cases(options.only, small=not on_gpu())
        if not options.only and options.multi30k is None:
            cases = [case for case in cases if section_of(case) != "study"]
        reports = [] if options.resume is None else [read_report(options.resume)]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    deadlines = Deadlines(options.minutes, [section_of(case) for case in cases], clock)
    header = machine(*BENCHMARK.packages) | describe_card()
    given = {"minutes": options.minutes, "only": ",".join(options.only) or "everything"}
    record = Record(header, given, options.resume or _new_file(options.output), reports, clock)
    cases = [_with_data(case, options.multi30k, record.path.parent) for case in cases]
    print(settings(describe_card() | {name: header[name] for name in ("torch", "torchvision", "triton")}), flush=True)
    run = Run(torch.get_num_threads(), not options.no_memory, **fields)
    interrupted = False
    gc.collect()
    gc.freeze()  # measuring collects garbage all the time
    try:
        before = clock()
        for result, comparison in measure(cases, run, deadlines, ended_before(reports)):
            record.add(result, clock() - before)
            before = clock()
            if (comparison.outcome, comparison.reason) == ("not run", NO_TIME):
                continue  # hundreds of them take no time, and are written in the end
            record.write_if_due()
            if comparison.outcome in ("wrong", "failed"):
                print(f"{comparison.outcome}: {result.case} | {comparison.name}: {comparison.reason}", flush=True)
            if comparison.outcome != "measured" and not answers():
                record.write()
                _start_anew(options, record.path, deadlines.left_in_all(), restart)
                break
    except KeyboardInterrupt:
        interrupted = True
    finally:
        gc.unfreeze()
        record.write()
    _print_summary(record)
    wrong = any(one.outcome == "wrong" for result in record.results for one in result.comparisons)
    return 1 if wrong else 130 if interrupted else 0


def _start_anew(options: argparse.Namespace, path: Path, left: float, restart: Callable[[list[str]], object]) -> None:
    """Resumes the run in a new process, if there is time for it."""
    if left > _FRESH_START_SECONDS:
        print("The GPU no longer answers: a new process runs the rest.", flush=True)
        same = ["--only", ",".join(options.only)] if options.only else []
        same += ["--no-memory"] if options.no_memory else []
        same += ["--multi30k", options.multi30k] if options.multi30k else []
        again = [*same, "--minutes", f"{left / 60:.3f}", "--resume", str(path)]
        restart([sys.executable, "-m", "benchmarks.device_check", *again])
    else:
        print("The GPU no longer answers, and there is no time to start anew: the rest was not run.")


def _with_data(case: Case, folder: str | None, output: Path) -> Case:
    """A case of the section `study` with its data and the folder of its results; others as they are."""
    if section_of(case) != "study":
        return case
    return dataclasses.replace(case, problem=dataclasses.replace(case.problem, data=folder, output=str(output)))


def _new_file(folder: Path | None) -> Path:
    folder = folder or Path(os.environ.get("OUT") or "build/benchmarks")
    date = datetime.datetime.now(datetime.UTC).date()
    return unused_path(folder / f"device_check_{card_slug()}_{date}.json")


def _print_summary(record: Record) -> None:
    """Tables of figures, all targets, and how the checks of each case ended."""
    for result in record.results:
        [case] = BENCHMARK.cases_named(result.case)
        found = tabulate(case, result)
        print(f"\n{result.case}: {result.title}; {result.sizes} ({record.seconds.get(result.case, 0.0):.0f} s)")
        if found.cells and section_of(case) in ("attention", "tasks", "profile", "study"):
            print("\n".join(markdown_table(found.header, found.cells)))
        for note in found.notes:
            if not isinstance(note, Target):
                print(f"  {note}")
    targets = [target for result in record.results for one in result.comparisons for target in one.targets]
    if targets:
        print("\nTargets")
        for target in targets:
            print(f"  {target}")
    print(f"\nResults: {record.path.with_suffix('')}.*")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside, it says what it has
    raise SystemExit(main(sys.argv[1:]))

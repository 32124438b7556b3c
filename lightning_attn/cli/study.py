"""The subcommand `study`, which does not import torch: the cells' own processes do."""

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from typing_extensions import override

from lightning_attn.cli.front import SUBCOMMANDS, command_name
from lightning_attn.errors import InputError, UserError
from lightning_attn.study.estimate import estimated_seconds
from lightning_attn.study.grid import REPORT_NAME, Cell, Study, format_duration
from lightning_attn.study.profiling import Profiler, require_configuration
from lightning_attn.study.runner import Runner
from lightning_attn.study.slurm import submit_cells
from lightning_attn.study.states import CellStatus, read_statuses
from lightning_attn.study.tables import as_data, cells_table, counts_line, findings_table, groups_table

__all__ = ["run_study_command"]

_ROOT = "checkpoints/studies"


class _Parser(argparse.ArgumentParser):
    @override
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}. See {self.prog} --help.")


def run_study_command(arguments: Sequence[str]) -> None:
    """Runs `study run`, `study status`, `study report` or `study commands`.

    Args:
        arguments: Behind the word `study`.

    Raises:
        SystemExit: With status 2 and a message on the standard error if the file or an option is wrong; of `run` with 1
            if a cell failed, and 128 and the signal's number if a signal stopped it.
    """
    try:
        options = _parser().parse_args(arguments)
        if options.what == "report":
            _report(options)
            return
        study = Study.read(options.file)
        root = Path(options.root) / study.folder
        cells = study.select(options.only)
        if options.what == "run":
            _run(study, root, cells, options)
        elif options.what == "status":
            _status(study, root, cells, as_json=options.json)
        else:
            for cell in cells:
                print(cell.shell_line(_command(), root / cell.name))
    except KeyboardInterrupt as stop:  # outside of a run, which ends in its own way
        raise SystemExit(128 + signal.SIGINT) from stop
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise SystemExit(1) from error  # such as of `| head`
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=f"{command_name()} study", description=f"study: {SUBCOMMANDS['study']}.", allow_abbrev=False)
    whats = parser.add_subparsers(
        dest="what", required=True, metavar="run|status|report|commands", parser_class=_Parser
    )
    helps = {
        "run": "run what is not done yet; interrupted anywhere, the next call resumes",
        "status": "the state of every cell, scores and verdicts",
        "report": "an HTML page with plots and tables, from what the cells left behind",
        "commands": "one shell line a cell, for job arrays and other machines",
    }
    parts = {
        name: whats.add_parser(name, help=what, description=what, allow_abbrev=False) for name, what in helps.items()
    }
    for name, part in parts.items():
        part.add_argument("--root", default=_ROOT, metavar="FOLDER", help=f"folder of all studies ({_ROOT})")
        if name == "report":
            part.add_argument("files", nargs="+", metavar="FILE", help="one study or more, which share a page")
            part.add_argument(
                "--output", metavar="DIR", help="of the report (FOLDER/STUDY/report; of several FOLDER/report)"
            )
            continue
        part.add_argument("file", metavar="FILE", help="the study, such as configs/studies/figure_3c_miniature.yaml")
        part.add_argument(
            *("--only",), action="append", default=[], metavar="AXIS=LABEL", help="only some cells; repeat for more"
        )
    run = parts["run"]
    run.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time, which share CPUs and GPUs (1)")
    run.add_argument("--retry-failed", action="store_true", help="run failed cells again, from their last checkpoint")
    run.add_argument("--rerun-stale", action="store_true", help="begin cells anew that older code ran; those are kept")
    run.add_argument("--fail-fast", action="store_true", help="end, saving, after the first failure")
    run.add_argument("--no-profile", action="store_true", help="do not measure what the networks cost")
    run.add_argument("--dry-run", action="store_true", help="only show what would be run, and how long it would take")
    run.add_argument("--slurm", action="store_true", help="submit one SLURM job a cell instead, and end")
    run.add_argument(
        *("--sbatch",), action="append", default=[], metavar="OPTION", help="of these jobs: --sbatch=--time=4:00:00"
    )
    run.add_argument("--yes", action="store_true", help="run past the study's budget without asking")
    parts["status"].add_argument("--json", action="store_true", help="as JSON")
    return parser


def _run(study: Study, root: Path, cells: Sequence[Cell], options: argparse.Namespace) -> None:
    if not options.slurm and options.sbatch:
        raise InputError(f"sbatch: {options.sbatch[0]} is an option of jobs. Give --slurm too, or leave it out.")
    if options.slurm and (options.jobs != 1 or options.fail_fast):
        raise InputError("slurm: SLURM decides what runs at a time. Leave out --jobs and --fail-fast.")
    console = Console()
    runner = Runner(
        study,
        root,
        _command(),
        jobs=options.jobs,
        retry_failed=options.retry_failed,
        rerun_stale=options.rerun_stale,
        fail_fast=options.fail_fast,
        console=console,
    )
    before = read_statuses(study, root)
    chosen = {cell.name for cell in cells}
    selected = [status for status in before if status.cell.name in chosen]
    needed = runner.needed(selected)
    seconds = estimated_seconds(study, before, needed, options.jobs)
    if not (options.no_profile or options.slurm) and (seconds is None or not options.dry_run):
        finished = [] if options.dry_run else [status for status in selected if status.is_finished]
        _profile(study, root, [*needed, *finished], options.jobs, console)
        seconds = estimated_seconds(study, before, needed, options.jobs)
    estimate = "of unknown duration" if seconds is None else f"about {format_duration(seconds)}"
    plan = f"{len(needed)} to run, {estimate}" if needed else "nothing to run"
    console.print(escape(f"{study.name}: {counts_line(selected)}; {plan}"))
    _say_left(console, selected, runner)
    if options.dry_run:
        for status in needed:
            console.print(escape(f"{status.state:<12}{status.cell.name}"), soft_wrap=True, highlight=False)
        return
    if needed and study.budget is not None and not options.yes and (seconds is None or seconds > study.budget):
        _require_consent(study, seconds, study.budget)
    if options.slurm:
        for cell, number in submit_cells(needed, _command(), options.sbatch):
            console.print(escape(f"job {number}: {cell.name}"), soft_wrap=True, highlight=False)
        return
    after = runner.run([status.cell for status in selected])
    if needed:
        everything = read_statuses(study, root)
        console.print(groups_table(study, everything))
        if study.findings:
            console.print(findings_table(study, everything))
    console.print(escape(f"{study.name}: {counts_line(after)}. Files: {root}"))
    if runner.received is not None:
        console.print("Stopped. Steps that were done are saved; the same command resumes.")
        raise SystemExit(128 + runner.received)
    if any(status.state == "failed" for status in after):
        raise SystemExit(1)


def _say_left(console: Console, statuses: Sequence[CellStatus], runner: Runner) -> None:
    """What is not run unless it is asked for."""
    failed = sum(status.state == "failed" for status in statuses)
    stale = sum(status.state == "stale" and status.is_finished for status in statuses)
    if failed and not runner.retry_failed:
        console.print(f"{failed} failed; --retry-failed runs them again")
    if stale and not runner.rerun_stale:
        console.print(f"{stale} run by another version of the code; --rerun-stale begins anew")


def _profile(study: Study, root: Path, statuses: Sequence[CellStatus], jobs: int, console: Console) -> None:
    """Measures what the networks cost: how long they train, and for the report also of cells that have been trained."""
    profiler = Profiler(study, root, _command(), jobs=jobs, console=console)
    profiler.run([status.cell for status in statuses])
    for group in profiler.failed[
        :1
    ]:  # perhaps for lack of data; but a mistake in its options would stop its training too
        require_configuration(study, next(one for one in study.cells if one.group == group), root, _command())
    if profiler.received is not None:
        console.print("Stopped. No cell was begun; profiles that are there are kept.")
        raise SystemExit(128 + profiler.received)


def _require_consent(study: Study, seconds: float | None, budget: float) -> None:
    time = "an unknown time" if seconds is None else f"about {format_duration(seconds)}"
    question = f"{time}, and its budget is {format_duration(budget)}"
    if not sys.stdin.isatty():
        raise InputError(
            f"{study.path}: this would take {question}. Give --yes to run it all the same, fewer cells (--only "
            "AXIS=LABEL), or more --jobs."
        )
    print(f"{study.name}: this would take {question}. Continue? [y/N] ", end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise SystemExit(1)


def _status(study: Study, root: Path, cells: Sequence[Cell], *, as_json: bool) -> None:
    statuses = read_statuses(study, root, cells)
    if as_json:
        print(json.dumps(as_data(study, statuses), indent=2))
        return
    console = Console()
    console.print(cells_table(study, statuses, f"{study.name}: {counts_line(statuses)}"))
    console.print(groups_table(study, statuses))
    if study.findings:
        console.print(findings_table(study, statuses))


def _report(options: argparse.Namespace) -> None:
    from lightning_attn.study.report.writing import (
        write_report,
    )  # with Jinja2 and matplotlib, which `status` does not need

    studies = [Study.read(file) for file in options.files]
    names = [study.name for study in studies]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"file: {repeated[0]} is given twice; two studies need files of different names.")
    root = Path(options.root)
    parent = root if len(studies) > 1 else root / names[0]
    output = Path(options.output) if options.output else parent / REPORT_NAME
    print(f"Written to {write_report(studies, root, output, command_name())}")


def _command() -> list[str]:
    """How the cells call the command: as this process was called."""
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        return [sys.executable, "-m", "lightning_attn"]
    if script.suffix == ".py":
        return [sys.executable, str(script)]
    return [shutil.which(str(script)) or str(script)]

"""The one runner of all benchmarks, and its command line."""

import argparse
import dataclasses
import functools
import importlib.util
import math
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import registry
from benchmarks.case import Benchmark, Case, Run
from benchmarks.report import Report, machine, merged, output_console, print_result, read_report, write_report
from benchmarks.results import Result


def comma_separated(text: str) -> tuple[str, ...]:
    """Type of an argument: names with commas between."""
    return tuple(name for name in text.split(",") if name)


def positive_int(text: str) -> int:
    """Type of an argument: a whole number from 1 upwards.

    Raises:
        argparse.ArgumentTypeError: If it is less.
        ValueError: If it is no whole number.
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def positive_float(text: str) -> float:
    """Type of an argument: a number above 0.

    Raises:
        argparse.ArgumentTypeError: If it is not.
        ValueError: If it is no number.
    """
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def require(*modules: str) -> None:
    """Ends the program with the way to install what a benchmark compares with, if any of it is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"Not installed: {', '.join(missing)}. This benchmark needs it: "
            "python -m pip install -c constraints.txt -e '.[bench]'"
        )


def argument_parser(benchmark: Benchmark) -> argparse.ArgumentParser:
    """The command line of a benchmark: options that all have, and its own."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark.name}",
        description=benchmark.description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ",".join(case.name.removeprefix(f"{benchmark.name}.") for case in benchmark.cases)
    parser.add_argument("--cases", type=comma_separated, help=f"names with commas between: {known}")
    parser.add_argument("--sides", type=comma_separated, help="of the cases that have them; names with commas between")
    parser.add_argument("--repetitions", type=positive_int, help="measured rounds, or processes of each side; at most")
    parser.add_argument("--budget", type=positive_float, help="seconds after which no further round starts")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and smaller problems where these are large")
    parser.add_argument("--threads", type=positive_int, default=2, help="threads of the tensor operations (2)")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="folder of the results")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="no measuring: results of earlier runs")
    for option in _options(benchmark.cases):
        flag = f"--{option.name.replace('_', '-')}"
        parser.add_argument(flag, **{"default": argparse.SUPPRESS, **option.metadata})
    return parser


def _options(cases: Sequence[Case]) -> list["dataclasses.Field[Any]"]:
    """The fields of the cases' problems that are options, each once."""
    found = {field.name: field for case in cases for field in dataclasses.fields(case.problem) if field.metadata}
    return list(found.values())


def choose_cases(benchmark: Benchmark, options: argparse.Namespace) -> list[Case]:
    """The cases that the options name, as the options have them.

    Raises:
        ValueError: If there is no such case or side, or a case cannot use an option.
    """
    if options.cases:
        cases = [case for name in options.cases for case in benchmark.cases_named(name)]
    else:
        cases = [case for case in benchmark.cases if case.by_default]
    known = dict.fromkeys(side for case in cases for side in (*case.sides, *case.further_sides))
    unknown = [side for side in options.sides or () if side not in known]
    if unknown:
        raise ValueError(f"--sides {','.join(unknown)}: there are {','.join(known) or 'none'}")
    chosen = []
    for case in cases:
        if options.no_memory and case.only_memory:
            continue
        case = dataclasses.replace(case, **(case.quick if options.quick else {}))
        changes: dict[str, Any] = {}
        if options.repetitions and case.repetitions > 1:
            changes["repetitions"] = options.repetitions
        if options.budget:
            changes["budget"] = options.budget
        sides = tuple(side for side in options.sides or () if side in (*case.sides, *case.further_sides))
        given = {field.name: getattr(options, field.name) for field in _options([case]) if hasattr(options, field.name)}
        problem = case.complete(dataclasses.replace(case.problem, **given))
        chosen.append(dataclasses.replace(case, **changes, problem=problem, sides=sides or case.sides))
    return chosen


def main(benchmark: Benchmark, arguments: Sequence[str], **settings: Any) -> list[Result]:
    """Runs a benchmark from the command line: measures, prints and writes.

    Args:
        benchmark: Which.
        arguments: The command line.
        settings: Further fields of `Run`.

    Returns:
        The results.

    Raises:
        SystemExit: If the arguments are wrong, something is not installed, or with 130 after an interrupt, when what
            was measured is written.
    """
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    parser = argument_parser(benchmark)
    options = parser.parse_args(arguments)
    console = output_console()
    try:
        if options.report:
            reports = [read_report(file) for file in options.report]
            for result in merged(reports):
                print_result(console, benchmark.cases_named(result.case)[0], result)
            write_report(benchmark, reports, options.output, f"{benchmark.name}-report")
            return merged(reports)
        cases = choose_cases(benchmark, options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    weighed = not options.no_memory and any(case.memory for case in cases)
    require(*(["psutil"] if weighed else []), *dict.fromkeys(module for case in cases for module in case.needs))
    torch.set_num_threads(options.threads)
    header = machine(*benchmark.packages)
    given = {name: _text(value) for name, value in vars(options).items() if value and name not in ("output", "threads")}
    results: list[Result] = []
    errors = Console(stderr=True)
    # Tables go to the output even where only the errors, with the progress, are a terminal.
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, redirect_stdout=sys.stdout.isatty()) as progress:
        task = progress.add_task("")

        def progress_of(case: Case) -> Callable[[str], None]:
            def report(text: str) -> None:
                progress.update(task, description=f"{case.name}: {text}")
                if not errors.is_terminal:
                    errors.print(f"{case.name}: {text}", highlight=False)

            return report

        run = Run(options.threads, not options.no_memory, **settings)
        interrupted = False
        try:
            for case in cases:
                result = Result(case.name, case.title, str(case.problem), dataclasses.asdict(case.problem))
                try:
                    for comparison in case.measure(case, dataclasses.replace(run, report=progress_of(case))):
                        if not result.comparisons:
                            results.append(result)  # from now on, an interrupt loses nothing
                        result.comparisons.append(comparison)
                finally:
                    case.set_targets(result)
                    if result.comparisons:
                        print_result(console, case, result)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if results:
                write_report(benchmark, [Report(header, given, results)], options.output, benchmark.name)
    if interrupted:
        raise SystemExit(130)
    return results


def _text(value: object) -> object:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, Path) else value


def run_as_command(name: str) -> None:
    """`python -m benchmarks.NAME`, whose module is imported under its own name, for fresh processes to find."""
    # Ended from outside, it still ends its child and keeps what it measured, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main(registry.load(name), sys.argv[1:])


def list_cases() -> None:
    """Prints all cases."""
    from rich.table import Table as StyledTable

    table = StyledTable(
        "case", "what is compared", title="python -m benchmarks CASE... [options]", title_justify="left"
    )
    for name in registry.NAMES:
        for case in registry.load(name).cases:
            table.add_row(case.name, case.title)
    output_console().print(table)
    print("A benchmark's name runs its cases; python -m benchmarks NAME --help shows its options.")


def run_named(arguments: Sequence[str]) -> None:
    """`python -m benchmarks CASE... [options]`: cases of any benchmarks, with the same options; a list without any.

    Raises:
        SystemExit: If there is no such case, or as `main`.
    """
    names = []
    for argument in arguments:
        if argument.startswith("-"):
            break
        names.append(argument)
    options = list(arguments[len(names) :])
    if not names:
        if set(options) - {"-h", "--help"}:
            raise SystemExit(f"Name a benchmark or a case before {options[0]}; python -m benchmarks lists them.")
        list_cases()
        return
    chosen: dict[str, tuple[Benchmark, list[str]]] = {}
    try:
        for name in names:
            benchmark = registry.load(name)
            cases = chosen.setdefault(benchmark.name, (benchmark, []))[1]
            if name != benchmark.name:
                benchmark.cases_named(name)
                cases.append(name)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    for benchmark, _ in chosen.values():
        if benchmark.command is None:
            argument_parser(benchmark).parse_args(options)  # no benchmark starts before the options of all are read
    for benchmark, cases in chosen.values():
        run = functools.partial(main, benchmark) if benchmark.command is None else benchmark.command
        run([*options, *(["--cases", ",".join(cases)] if cases else [])])

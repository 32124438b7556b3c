"""One runner, one writer: with cases made up here, whose times a clock of ours gives."""

import dataclasses
import importlib.util
import itertools
import json

import pytest
import torch

from benchmarks import registry
from benchmarks.case import Benchmark, Case, Run, Table, in_processes, interleaved, put_together
from benchmarks.fresh_process import FreshProcessError
from benchmarks.report import machine, markdown, read_report
from benchmarks.results import Memory, Result, Side, Timing
from benchmarks.runner import main, run_named


@dataclasses.dataclass(frozen=True)
class Problem:
    cost: float = 1.0
    results: dict = dataclasses.field(default_factory=dict)
    sentences: int = dataclasses.field(default=6, metadata={"type": int, "help": "how many"})

    def __str__(self):
        return f"{self.sentences} sentences"


class Clock:
    """Goes on by what a step costs."""

    now = 0.0

    def __call__(self):
        return self.now


CLOCK = Clock()


def build(problem, sides):
    def step(side):
        def run():
            CLOCK.now += problem.cost * (1 + len(side))
            if side == "bad":
                raise RuntimeError("sizes do not match")
            return problem.results.get(side, 1.0)

        return run

    return {side: step(side) for side in sides}


CASE = Case(
    "made.up",
    "sides that cost their names' lengths",
    interleaved,
    Problem(),
    build=build,
    sides=("aaa", "bad"),
    further_sides=("aa",),
    base="a",
    difference=lambda base, result: abs(base - result),
    tolerance=0.01,
    rates={"sentences/s": lambda problem, seconds: problem["sentences"] / seconds},
    bounds={"aaa": 1.5},
    repetitions=3,
    quick={"repetitions": 2},
)
OTHER = dataclasses.replace(CASE, name="made.other", by_default=False)
MADE = Benchmark("made", "Made up", "What.", "How.", (CASE, OTHER))


def run(tmp_path, *arguments, benchmark=MADE, **settings):
    return main(benchmark, [*arguments, "--threads", "1", "--output", str(tmp_path)], clock=CLOCK, **settings)


def test_sides_are_timed_beside_the_base(tmp_path, capsys):
    [result] = run(tmp_path)
    [comparison] = result.comparisons
    assert {name: side.timing for name, side in comparison.sides.items()} == {
        "a": Timing((2.0,) * 3),
        "aaa": Timing((4.0,) * 3),
        "bad": None,
    }
    assert comparison.sides["bad"].error == "RuntimeError: sizes do not match"
    assert [(target.name, target.value, target.verdict) for target in comparison.targets] == [
        ("aaa / a", 2.0, "not met")
    ]
    assert "aaa / a 2.00 (<= 1.5): not met" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"made.json", "made.md"}
    text = (tmp_path / "made.md").read_text()
    for part in (
        "# Made up\n",
        "## made.up: sides that cost their names' lengths\n\n6 sentences; times of each side: 3\n",
        "| side | s | quartiles | sentences/s | time / a |",
        "| aaa | 4.00 | 4.00-4.00 | 1.5 | 2.000 |",
        "| bad | RuntimeError: sizes do not match |  |  |  |",
        "- aaa / a 2.00 (<= 1.5): not met",
        "- results differ by at most 0 of the largest value",
    ):
        assert part in text
    report = read_report(tmp_path / "made.json")
    assert report.results == [result]
    for header in (report.machine, json.loads((tmp_path / "made.json").read_text())["machine"]):
        assert header.keys() >= {"date", "processor", "cores", "threads", "memory_bytes", "python", "torch", "commit"}
    assert f"torch: {report.machine['torch']}" in text


def test_a_side_that_computes_something_else_is_not_timed(tmp_path):
    benchmark = dataclasses.replace(MADE, cases=(dataclasses.replace(CASE, problem=Problem(results={"aaa": 1.5})),))
    [result] = run(tmp_path, benchmark=benchmark)
    assert result.comparisons[0].sides["aaa"] == Side(error="wrong: 0.5 of the largest value away from a")
    assert result.comparisons[0].targets[0].verdict == "not measured"
    benchmark.cases[0].problem.results["aaa"] = float("nan")
    assert run(tmp_path, benchmark=benchmark)[0].comparisons[0].sides["aaa"].error.startswith("wrong: nan")


def test_options_change_cases(tmp_path):
    [result] = run(tmp_path, "--sides", "aa", "--quick", "--sentences", "12")
    assert list(result.comparisons[0].sides) == ["a", "aa"]
    assert len(result.comparisons[0].sides["aa"].timing.seconds) == 2
    assert result.problem["sentences"] == 12
    assert read_report(tmp_path / "made.json").options == {"sides": "aa", "quick": True, "sentences": 12}
    [result] = run(tmp_path, "--cases", "other", "--repetitions", "7")
    assert result.case == "made.other"
    assert len(result.comparisons[0].sides["aaa"].timing.seconds) == 7
    assert len(run(tmp_path, "--budget", "1")[0].comparisons[0].sides["a"].timing.seconds) == 3
    assert {path.name for path in tmp_path.glob("*.json")} == {"made.json", "made-2.json", "made-3.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "missing"], "made has no case missing: there are up,other"),
        (["--sides", "a,cc"], "--sides a,cc: there are aaa,bad,aa"),
        (["--repetitions", "0"], "0 is less than 1"),
        (["--budget", "0"], "0 is not a number above 0"),
        (["--sentences", "few"], "invalid int value: 'few'"),
        (["--report", "no/such/file.json"], "no/such/file.json"),
    ],
)
def test_bad_arguments_are_named(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_missing_is_named_with_how_to_install_it(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "mmcv" else find(name))
    benchmark = dataclasses.replace(MADE, cases=(dataclasses.replace(CASE, needs=("json", "mmcv")),))
    with pytest.raises(SystemExit, match=r"Not installed: mmcv\. .*pip install .* -e '\.\[bench\]'"):
        run(tmp_path, benchmark=benchmark)


def test_memory_is_that_of_a_process_for_each_side(tmp_path, here):
    benchmark = dataclasses.replace(MADE, cases=(dataclasses.replace(CASE, memory=True, difference=None),))
    [result] = run(tmp_path, "--sides", "aaa", benchmark=benchmark, isolate=here)
    assert all(side.memory.peak > 50_000_000 for side in result.comparisons[0].sides.values())
    assert (
        "| side | s | quartiles | sentences/s | time / a | GB in all | MB added |" in (tmp_path / "made.md").read_text()
    )
    [result] = run(tmp_path, "--no-memory", benchmark=benchmark)
    assert all(side.memory is None for side in result.comparisons[0].sides.values())

    def killed(*_, **__):
        raise FreshProcessError("ended by signal 9")

    [result] = run(tmp_path, "--sides", "aaa", benchmark=benchmark, isolate=killed)
    assert result.comparisons[0].sides["aaa"].timing is not None
    assert "| ended by signal 9 |" in (tmp_path / "made-3.md").read_text()


def test_processes_take_turns():
    asked, times = [], itertools.count(1)

    def isolate(function, build, problems, side, **settings):
        asked.append((side, settings["threads"]))
        if side == "bad":
            raise FreshProcessError("ended by signal 9")
        turn = next(times)
        return [Side(Timing((100.0, float(turn))), Memory(10, 20 + turn))]

    case = dataclasses.replace(CASE, measure=in_processes, repetitions=2, peaks={"a": 1e-9})
    [comparison] = in_processes(case, Run(threads=5, isolate=isolate))
    assert asked == [("a", 5), ("aaa", 5), ("bad", 5)] * 2
    assert comparison.sides["a"] == Side(Timing((1.0, 3.0)), Memory(10, 23))
    assert comparison.sides["bad"] == Side(error="ended by signal 9")
    result = Result(case.name, case.title, comparisons=[comparison])
    case.set_targets(result)
    assert [str(target) for target in comparison.targets] == [
        "a, GB 0.00 (<= 1e-09): not met",
        "aaa / a 1.50 (<= 1.5): met",
    ]


def test_rounds_are_put_together():
    first = put_together(Side(), Side(Timing((9.0, 2.0, 3.0)), Memory(10, 50)))
    both = put_together(first, Side(Timing((8.0, 4.0)), Memory(10, 40)))
    assert both.timing.seconds == (2.0, 3.0, 4.0), "the first step of a process is not counted"
    assert both.memory.peak == 50
    once = put_together(Side(), Side(Timing((9.0,)), Memory(1, 2)))
    assert once.timing.seconds == (9.0,), "unless it is the only one"


def test_cases_of_memory_alone_are_left_out_without_it(tmp_path):
    benchmark = dataclasses.replace(MADE, cases=(CASE, dataclasses.replace(OTHER, only_memory=True, by_default=True)))
    assert [result.case for result in run(tmp_path, "--no-memory", benchmark=benchmark)] == ["made.up"]


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, capsys):
    def measure(case, run):
        yield from interleaved(case, run)
        raise KeyboardInterrupt

    benchmark = dataclasses.replace(MADE, cases=(dataclasses.replace(CASE, measure=measure), CASE))
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, benchmark=benchmark)
    assert stopped.value.code == 130
    [result] = read_report(tmp_path / "made.json").results
    assert [target.verdict for target in result.comparisons[0].targets] == ["not met"]
    assert "aaa / a 2.00" in capsys.readouterr().out


def test_a_run_that_fails_keeps_what_it_measured(tmp_path):
    def measure(case, run):
        raise RuntimeError("broken")
        yield

    benchmark = dataclasses.replace(MADE, cases=(CASE, dataclasses.replace(CASE, measure=measure)))
    with pytest.raises(RuntimeError, match="broken"):
        run(tmp_path, benchmark=benchmark)
    assert len(read_report(tmp_path / "made.json").results) == 1


def test_several_runs_become_one_report(tmp_path, capsys):
    run(tmp_path, "--repetitions", "3")
    run(tmp_path, "--cases", "up,other", "--sides", "aaa")
    files = [str(tmp_path / "made.json"), str(tmp_path / "made-2.json")]
    results = run(tmp_path / "out", "--report", *files)
    assert [result.case for result in results] == ["made.up", "made.other"]
    assert list(results[0].comparisons[0].sides) == ["a", "aaa"], "of what was measured twice, the last counts"
    run(tmp_path / "out", "--report", *files)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["made-report-2.md", "made-report.md"]
    text = (tmp_path / "out" / "made-report.md").read_text()
    assert "- repetitions: 3\n" in text.replace(", ", "\n- ")
    assert text.count("torch: ") == 1, "what all runs share is there once"
    assert "made.other" in capsys.readouterr().out


def test_a_file_of_something_else_is_refused(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text('{"results": []}')
    with pytest.raises(SystemExit):
        run(tmp_path, "--report", str(file))
    assert "other.json is not a result of python -m benchmarks (KeyError: 'machine')" in capsys.readouterr().err


def test_a_table_of_its_own(tmp_path):
    case = dataclasses.replace(CASE, table=lambda result: Table(["x"], [[result.case]], ["a note"]))
    benchmark = dataclasses.replace(MADE, cases=(case,))
    run(tmp_path, benchmark=benchmark)
    text = markdown(benchmark, [read_report(tmp_path / "made.json")])
    assert text.endswith("| x |\n| --- |\n| made.up |\n\n- a note\n")


def test_machine_names_what_figures_depend_on():
    described = machine("no-such-package")
    assert described["torch"] == torch.__version__.partition("+")[0] or described["torch"] == torch.__version__
    assert described["no-such-package"] == "not installed"
    assert described["cores"] >= 1
    assert described["memory_bytes"] > 1e8
    assert described["processor"]


# python -m benchmarks


def test_all_cases_are_listed(capsys):
    run_named([])
    printed = capsys.readouterr().out
    for name in ("attention.256x50x84s2", "detection.torchvision", "memory_growth.training", "wmt14_data.epoch"):
        assert name in printed


def test_registered_benchmarks_are_complete():
    for name in registry.NAMES:
        benchmark = registry.load(name)
        assert benchmark.name == name
        for case in benchmark.cases:
            assert case.name.startswith(f"{name}.")
            assert benchmark.cases_named(case.name) == [case]
            assert dataclasses.replace(case, **case.quick) != case or not case.quick


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speech"], "There is no benchmark speech: there are attention, translation"),
        (["detection.training"], "detection has no case training: there are overhead,attention,memory,torchvision"),
        (["--quick"], "Name a benchmark or a case before --quick"),
    ],
)
def test_bad_names_are_named(arguments, message):
    with pytest.raises(SystemExit, match=message):
        run_named(arguments)


def test_no_benchmark_starts_before_all_options_are_read(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_named(["memory_growth", "segmentation", "--steps", "300", "--output", str(tmp_path)])
    assert "unrecognized arguments: --steps 300" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

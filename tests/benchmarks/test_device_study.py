"""The studies of a device check, with a command in the place of train.py that trains nothing."""

import dataclasses
import json
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import device_check, device_study
from benchmarks.case import Run
from benchmarks.device_study import FILES, GROUPS, STUDIES, Problem
from benchmarks.fresh_process import REPOSITORY
from benchmarks.report import read_report
from lightning_attn.study.grid import Study
from lightning_attn.study.states import read_statuses

TRAIN = f"""
import json, sys, time
from pathlib import Path

sys.path.insert(0, {str(REPOSITORY)!r})
if sys.argv[1] == "study":
    from lightning_attn.cli import main

    main()
    raise SystemExit
from lightning_attn.training.code_version import code_version

stage, *words = sys.argv[1:]
options = dict(zip(words[::2], words[1::2]))
if stage == "profile":
    Path(options["--output"]).write_text(json.dumps({{"training_step": {{"latency": {{"median": 0.01}}}}}}))
    raise SystemExit
assert Path("data/multi30k-ende/train.de").is_file()
run = Path(options["--run.root"]) / "translation" / "run"
if stage == "fit":
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({{"code": code_version()}}))
    (run / "last.ckpt").write_bytes(b"weights")
    (run / "large.json").write_text("1" * (3 << 20))
    BREAK
else:
    scores = {{"test/bleu": 20.0 + int(options["--seed_everything"])}}
    (run / "test_metrics.json").write_text(json.dumps(scores))
"""

FIRST = GROUPS[0], next(group for group in GROUPS if group[0] == "figure_3c_small")


@pytest.fixture
def cells(tmp_path):
    """Runs a case of two groups, one of each study, with a command that does something in the training."""
    data = tmp_path / "multi30k"
    data.mkdir()
    for name in FILES:
        (data / name).write_text("a b\n")

    def call(break_with="pass", **settings):
        command = tmp_path / "train.py"
        command.write_text(TRAIN.replace("BREAK", break_with))
        problem = Problem(FIRST, data=str(data), output=str(tmp_path / "out"), command=str(command))
        [case] = device_study.CASES
        return list(device_study.measure(dataclasses.replace(case, problem=problem), Run(**settings)))

    return call


def kept(tmp_path, study):
    """The states of the cells in the output, as another machine would see them."""
    return read_statuses(Study.read(STUDIES / f"{study}.yaml"), tmp_path / "out/studies" / study)


def test_groups_run_in_order_and_leave_their_small_files(cells, tmp_path):
    found = cells()
    assert [one.name for one in found] == [f"{study} {label}" for study, _, label in FIRST]
    for one, (study, axis, label) in zip(found, FIRST, strict=True):
        assert (one.outcome, one.reason) == ("measured", "")
        assert one.figures["scores"] == {"0": 20.0, "1": 21.0, "2": 22.0}
        done = [status for status in kept(tmp_path, study) if status.state == "done"]
        assert [(status.cell.labels, status.cell.seed) for status in done] == [
            ({axis: label}, seed) for seed in range(3)
        ]
        assert all((status.folder.path / "profile.json").is_file() for status in done)
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"cell.json", "output.log", "run.json", "test_metrics.json"} <= names
    assert not names & {"last.ckpt", "large.json", ".lock", ".profiling"}
    with tarfile.open(tmp_path / "out/studies.tar.gz") as archive:
        assert {Path(name).name for name in archive.getnames() if Path(name).suffix} >= names - {"studies.tar.gz"}


def test_what_fails_is_said_and_the_rest_runs(cells):
    only_first = 'if "--model.cross_attention.terms" in options: raise SystemExit("error: no luck")'
    first, second = cells(only_first)
    assert (first.outcome, first.reason) == ("failed", "fit ended with status 1")
    assert second.outcome == "measured"


def test_a_missing_package_is_no_error(cells):
    first, _ = cells("import surely_missing")
    assert (first.outcome, first.reason) == ("not run", "package surely_missing missing")


def test_the_end_of_the_time_ends_the_cells(cells, tmp_path):
    start = time.monotonic()
    first, second = cells(
        "Path('pid').write_text(str(__import__('os').getpid())); time.sleep(100)",
        time_left=lambda: 85 - 20 * (time.monotonic() - start),  # 20 s are kept for ending
    )
    assert first.outcome == "not run"
    assert first.reason.startswith("no time left: ended after")
    assert first.figures["cells done"] == 0
    assert second.reason == "no time left"
    assert time.monotonic() - start < 60
    assert [status.state for status in kept(tmp_path, FIRST[0][0])].count("interrupted") == 3


def test_a_group_that_would_take_too_long_is_not_begun(cells):
    def time_left():
        return 1000.0

    problem_clock = iter([0.0, 0.0, 5000.0])  # of the check, and before and after the group
    first, second = cells(clock=lambda: next(problem_clock, 5000.0), time_left=time_left)
    assert first.outcome == "measured"
    assert (second.outcome, second.reason) == ("not run", "no time left: a group took 5000 s")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no data: give --multi30k FOLDER"),
        (["--multi30k", "empty"], "no data: empty has no train.en, train.de, valid"),
    ],
)
def test_without_data_nothing_runs(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert device_check.main(["--only", "study", "--output", "out", *options]) == 0
    [path] = Path("out").glob("*.json")
    [result] = read_report(path).results
    assert {one.outcome for one in result.comparisons} == {"not run"}
    assert result.comparisons[0].reason.startswith(message)
    assert not Path("out/studies").exists()


def test_the_section_runs_by_default_only_with_data(monkeypatch, tmp_path):
    begun = []

    def measure(cases, *_):
        begun.append([device_check.section_of(case) for case in cases])
        yield from ()

    monkeypatch.setattr(device_check, "measure", measure)
    device_check.main(["--output", str(tmp_path)])
    device_check.main(["--output", str(tmp_path), "--multi30k", str(tmp_path)])
    assert "study" not in begun[0]
    assert begun[1] == [*begun[0], "study"]


def test_every_group_is_in_its_study():
    assert len(set(GROUPS)) == len(GROUPS)
    for study, axis, label in GROUPS:
        assert label in [level.label for level in Study.read(STUDIES / f"{study}.yaml").axes[axis]]


def test_the_small_studies_are_the_same_but_for_their_options(tmp_path):
    [case] = device_check.chosen_cases(["study"], small=True)
    problem = dataclasses.replace(case.problem, data=str(tmp_path), output=str(tmp_path))
    for study in ("figure_3c_small", "figure_3d_small"):
        shipped, small = (
            Study.read(path)
            for path in (STUDIES / f"{study}.yaml", device_study.Cells(problem, Run(), tmp_path).file(study))
        )
        assert small.groups == shipped.groups
        assert small.cells[0].options.items() >= case.problem.options.items()
        assert [file.resolve() for file in small.cells[0].files] == [file.resolve() for file in shipped.cells[0].files]


@pytest.mark.slow
def test_cells_in_processes(tmp_path, corpus, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    status = device_check.main(
        ["--only", "study", "--minutes", "20", "--multi30k", str(corpus), "--output", str(tmp_path / "out")]
    )
    assert status == 0
    [path] = (tmp_path / "out").glob("*.json")
    [result] = read_report(path).results
    assert {one.reason for one in result.comparisons} == {""}
    assert {len(one.figures["scores"]) for one in result.comparisons} == {3}
    small = Study.read(tmp_path / "out/studies/figure_3d_small.yaml")
    statuses = read_statuses(small, tmp_path / "out/studies/figure_3d_small")
    assert [one.state for one in statuses].count("done") == 3 * len(result.comparisons)
    assert not list((tmp_path / "out").rglob("*.ckpt"))
    json.loads((statuses[-1].folder.path / "profile.json").read_text())

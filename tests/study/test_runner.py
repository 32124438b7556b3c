"""The runner and the states, with a command in the place of train.py that trains nothing and keeps the same files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cell_command import TRAIN
from rich.console import Console

from lightning_attn.study.children import visible_gpus
from lightning_attn.study.estimate import estimated_seconds
from lightning_attn.study.grid import Study
from lightning_attn.study.runner import Runner
from lightning_attn.study.states import CellFolder, read_statuses, scores_of
from lightning_attn.study.tables import as_data


@pytest.fixture
def write(in_folder):
    """Writes a study of four groups or fewer, and the command."""
    Path("train.py").write_text(TRAIN)
    Path("base.yaml").write_text("model: {class_path: none}\n")

    def call(*, pause=0.0, steps=3, seeds=(0,), fail=(), more=""):
        groups = ""
        for number, label in enumerate("abc"):
            failing = f", model.fail: {dict(fail)[label]}" if label in dict(fail) else ""
            groups += f"    {label}: {{model.quality: {number}{failing}}}\n"
        Path("study.yaml").write_text(
            f"base: base.yaml\naxes:\n  group:\n{groups}  length:\n    short: {{trainer.max_steps: {steps}, "
            f"model.pause: {pause}}}\nseeds: {list(seeds)}\nmetric: test/bleu\nscale: 100\n{more}"
        )
        return Study.read("study.yaml")

    return call


def run_all(study, *, cells=None, **options):
    with Path("printed.txt").open("w") as file:
        runner = Runner(study, Path("cells"), [sys.executable, "train.py"], console=Console(file=file), **options)
        return runner.run(study.cells if cells is None else cells)


def states(study, root="cells"):
    return [status.state for status in read_statuses(study, Path(root))]


def events():
    return [json.loads(line) for line in Path("events.log").read_text().splitlines()]


def steps_of(cell, root="cells"):
    """The steps that a cell's trainings have done, in order."""
    lines = (Path(root) / cell.name / "translation/run/metrics.csv").read_text().splitlines()
    return [int(line.partition(",")[0]) for line in lines[1:]]


def start_study(*arguments):
    command = [sys.executable, "train.py", "study", "run", "study.yaml", "--root", ".", *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_cells_are_trained_then_tested_and_never_again(write):
    study = write(seeds=(0, 1))
    assert states(study) == ["waiting"] * 6
    assert [status.state for status in run_all(study)] == ["done"] * 6
    assert scores_of(read_statuses(study, Path("cells"))) == {
        ("a", "short"): {0: 0.0, 1: 10.0},
        ("b", "short"): {0: 100.0, 1: pytest.approx(110.0)},
        ("c", "short"): {0: 200.0, 1: pytest.approx(210.0)},
    }
    assert [event[:2] for event in events()] == [
        [stage, cell.name] for cell in study.cells for stage in ("fit", "test")
    ]
    run_all(study)
    assert len(events()) == 12


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_failed_cell_stops_nothing_and_is_retried_when_asked_to(write, stage):
    study = write(fail={"b": stage})
    assert [status.state for status in run_all(study)] == ["done", "failed", "done"]
    printed = Path("printed.txt").read_text()
    assert "error: model.fail: this was to be expected" in printed
    assert f"{stage} ended with status 2" in printed
    number = len(events())
    run_all(study)
    assert (len(events()), states(study)) == (number, ["done", "failed", "done"])
    Path("repaired").touch()
    run_all(study, retry_failed=True)
    assert states(study) == ["done"] * 3
    # What succeeded is not repeated: after a failed test only the test.
    assert [event[0] for event in events()[number:]] == ["fit", "test"][["fit", "test"].index(stage) :]


def test_a_test_that_leaves_no_scores_has_failed(write):
    study = write()
    Path("train.py").write_text(TRAIN.replace('"test_metrics.json").write', '"other.json").write'))
    statuses = run_all(study, cells=study.cells[:1])
    assert (statuses[0].state, statuses[0].reason) == ("failed", "the test has written no test_metrics.json")


def test_fail_fast(write):
    study = write(fail={"a": "fit"}, pause=0.1, steps=100)
    assert [status.state for status in run_all(study, jobs=2, fail_fast=True)] == ["failed", "interrupted", "waiting"]


def test_jobs_share_processors_and_gpus(write, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,4")
    run_all(write(pause=0.1), jobs=2)
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert {event[3] for event in events()} == {threads}
    assert {event[4] for event in events()} == {"0,4", "1"}
    assert [event[0] for event in events()[:2]] == ["fit", "fit"]


def test_more_jobs_than_gpus_and_threads_of_the_user(write, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    run_all(write(), jobs=3)
    assert {tuple(event[3:]) for event in events()} == {("7", "3")}
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        run_all(write(), jobs=0)


def test_a_killed_cell_is_resumed_by_the_next_run(write):
    study = write(pause=0.05, steps=20)
    process = start_study()
    cell = study.cells[0]
    wait_until(
        lambda: Path("events.log").exists() and events() and CellFolder(Path("study") / cell.name).run_directory()
    )
    wait_until(lambda: len(steps_of(cell, "study")) > 2)
    os.kill(events()[0][2], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert states(study, "study") == ["interrupted", "done", "done"]
    assert "killed (SIGKILL)" in output
    assert process.returncode == 0
    again = start_study()
    again.communicate(timeout=60)
    assert states(study, "study") == ["done"] * 3
    assert [event[1] for event in events()].count(cell.name) == 3  # fit, fit, test
    assert all(steps_of(one, "study") == list(range(20)) for one in study.cells)


def test_a_killed_runner_leaves_its_cell_running_and_the_next_one_waits_for_it(write):
    study = write(pause=0.05, steps=30)
    first = start_study()
    cell = study.cells[0]
    wait_until(lambda: (Path("study") / cell.name / "translation/run/metrics.csv").exists())
    first.kill()
    first.communicate(timeout=60)
    status = read_statuses(study, Path("study"))[0]
    assert (status.state, status.reason) == ("running", "its runner has ended")
    output = start_study().communicate(timeout=60)[0]
    assert states(study, "study") == ["done"] * 3, output
    assert all(steps_of(one, "study") == list(range(30)) for one in study.cells)
    # How long the first took is not known: nobody saw it end.
    assert [one.seconds is None for one in read_statuses(study, Path("study"))] == [True, False, False]
    # With one job, nothing ran beside the cell that was left over.
    assert [event[1] for event in events()].index(study.cells[1].name) == 1 + (events()[1][1] == cell.name) * 2
    assert [event[:2] for event in events()].count(["test", cell.name]) == 1


def test_everything_killed_at_once(write):
    study = write(pause=0.05, steps=20)
    first = start_study("--jobs", "3")
    wait_until(lambda: all((Path("study") / one.name / "translation/run/metrics.csv").exists() for one in study.cells))
    for process in [first.pid, *(event[2] for event in events())]:
        os.kill(process, signal.SIGKILL)
    first.communicate(timeout=60)
    wait_until(lambda: states(study, "study") == ["interrupted"] * 3)
    start_study("--jobs", "3").communicate(timeout=60)
    assert states(study, "study") == ["done"] * 3
    assert all(steps_of(one, "study") == list(range(20)) for one in study.cells)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_cells_which_save(write, number):
    study = write(pause=0.05, steps=40)
    process = start_study("--jobs", "2")
    wait_until(
        lambda: all((Path("study") / one.name / "translation/run/metrics.csv").exists() for one in study.cells[:2])
    )
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number
    assert "the same command resumes" in output
    assert states(study, "study") == ["interrupted", "interrupted", "waiting"]
    assert 0 < len(steps_of(study.cells[0], "study")) < 40
    start_study("--jobs", "2").communicate(timeout=60)
    assert states(study, "study") == ["done"] * 3
    assert all(steps_of(one, "study") == list(range(40)) for one in study.cells)


def test_two_runners_at_a_time_do_nothing_twice(write):
    study = write(pause=0.02, steps=5, seeds=(0, 1))
    both = [start_study("--jobs", "2"), start_study("--jobs", "2")]
    outputs = [one.communicate(timeout=120)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], outputs
    assert states(study, "study") == ["done"] * 6
    done = [tuple(event[:2]) for event in events()]
    assert sorted(done) == sorted((stage, cell.name) for cell in study.cells for stage in ("fit", "test"))


def test_a_cell_of_other_code_is_stale_and_kept(write):
    study = write()
    run_all(study)
    run = Path("cells") / study.cells[1].name / "translation/run"
    (run / "run.json").write_text('{"code": "000000000000"}')
    assert states(study) == ["done", "stale", "done"]
    assert ("b", "short") not in scores_of(read_statuses(study, Path("cells")))
    number = len(events())
    run_all(study)
    assert len(events()) == number
    run_all(study, rerun_stale=True)
    assert states(study) == ["done"] * 3
    older = Path("cells") / f"{study.cells[1].name}.old-1"
    assert json.loads((older / "translation/run/run.json").read_text()) == {"code": "000000000000"}


def test_a_cell_of_another_configuration_is_waiting_and_run(write):
    study = write()
    run_all(study)
    Path("base.yaml").write_text("model: {class_path: other}\n")
    changed = Study.read("study.yaml")
    before = read_statuses(changed, Path("cells"))
    assert [status.state for status in before] == ["waiting"] * 3
    assert before[0].reason == f"an older configuration's folder is kept: {study.cells[0].name}"
    run_all(changed)
    assert states(changed) == ["done"] * 3
    assert states(study) == ["done"] * 3  # the older ones are still there


def test_states_of_damaged_and_foreign_files(write):
    study = write()
    run_all(study)
    folders = [Path("cells") / cell.name for cell in study.cells]
    (folders[0] / "translation/run/test_metrics.json").write_text('{"test/chrf": 1.0}')
    (folders[1] / "translation/run/test_metrics.json").write_text('{"test/bl')
    (folders[2] / "cell.json").write_text("[")
    statuses = read_statuses(study, Path("cells"))
    assert [status.state for status in statuses] == ["failed", "failed", "done"]
    assert statuses[0].reason == "test_metrics.json has no test/bleu; it has test/chrf"
    assert "cannot be read" in statuses[1].reason
    (folders[2] / "translation/run/test_metrics.json").unlink()
    with (folders[2] / "translation/run/metrics.csv").open("a") as file:
        file.write("3,0.")  # as a process that was killed leaves it
    status = read_statuses(study, Path("cells"))[2]
    assert (status.state, status.step, status.validation) == ("interrupted", 3, pytest.approx(2.0))
    # A training that was started by hand has the lock of its run directory only.
    holder = (
        "import pathlib, sys; from lightning_attn import locks; locks.take(pathlib.Path(sys.argv[1])); print(); input()"
    )
    lock = folders[2] / "translation/run/.lock"
    command = [sys.executable, "-u", "-c", holder, lock]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        assert states(study)[2] == "running"
    finally:
        process.kill()
        process.communicate()
    assert states(study)[2] == "interrupted"


def test_looking_at_a_running_cell_disturbs_nothing(write):
    study = write(pause=0.05, steps=10)
    process = start_study()
    wait_until(lambda: "running" in states(study, "study"))
    wait_until(lambda: read_statuses(study, Path("study"))[0].eta)
    status = read_statuses(study, Path("study"))[0]
    assert (status.state, status.eta) == ("running", "1.5 min")
    while process.poll() is None:
        states(study, "study")
    assert process.communicate()[0].count("done") >= 3
    assert states(study, "study") == ["done"] * 3


def test_the_estimate_comes_from_cells_that_are_done(write):
    study = write(seeds=(0, 1), more="time_per_cell: 50 s\n")
    statuses = read_statuses(study, Path("cells"))
    assert estimated_seconds(study, statuses, statuses, 1) == 300.0
    assert estimated_seconds(study, statuses, statuses, 4) == 75.0
    run_all(study, cells=study.select(["group=a", "seed=0"]))
    statuses = read_statuses(study, Path("cells"))
    took = statuses[0].seconds
    assert 0 < took < 50
    assert estimated_seconds(study, statuses, statuses[1:], 1) == pytest.approx(5 * took)
    assert estimated_seconds(write(), [], [], 1) == 0.0
    study = write()
    assert estimated_seconds(study, [], read_statuses(study, Path("other")), 1) is None


def test_the_lock_ends_with_the_last_process_that_has_it(write):
    folder = CellFolder(Path("one"))
    descriptor = folder.acquire()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(descriptor,))
    os.close(descriptor)
    assert folder.is_taken()
    assert folder.acquire() is None
    child.communicate(b"\n")
    assert not folder.is_taken()


def test_status_as_data(write):
    findings = (
        "findings:\n- {claim: more, cells: [{group: b, length: short}, {group: a, length: short}], expected: greater}\n"
    )
    study = write(seeds=(0, 1, 2), more=findings)
    run_all(study, cells=study.select(["group=a", "group=b"])[:-1])
    data = json.loads(json.dumps(as_data(study, read_statuses(study, Path("cells")))))
    assert data["counts"] == {"done": 5, "running": 0, "waiting": 4, "interrupted": 0, "failed": 0, "stale": 0}
    assert data["groups"][0]["mean"] == pytest.approx(10.0)
    assert data["groups"][2] | {"reference": {}} == data["groups"][2]
    assert (data["groups"][2]["n"], data["groups"][2]["mean"]) == (0, None)
    (finding,) = data["findings"]
    assert (finding["verdict"], finding["difference"]["n"]) == ("undecided", 2)  # the same difference twice
    assert finding["difference"]["mean"] == pytest.approx(100.0)


def test_the_table_on_a_terminal(write):
    study = write(pause=0.5, steps=6, fail={"b": "test"})
    with Path("printed.txt").open("w") as file:
        console = Console(file=file, force_terminal=True, width=160)
        runner = Runner(study, Path("cells"), [sys.executable, "train.py"], jobs=3, console=console)
        statuses = runner.run(study.cells)
    assert [status.state for status in statuses] == ["done", "failed", "done"]
    printed = re.sub("\x1b[^a-zA-Z]*[a-zA-Z]", "", Path("printed.txt").read_text())  # without colours
    assert "3 running" in printed
    assert "1.5 min" in printed  # what the trainings say is left
    assert printed.strip().endswith("study: 2 done, 1 failed")
    assert "this was to be expected" in printed

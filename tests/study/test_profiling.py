"""Profiles of a study's groups and the time that they tell, with a command in the place of train.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cell_command import TRAIN

from lightning_attn.study.estimate import estimated_seconds
from lightning_attn.study.grid import Study
from lightning_attn.study.states import read_statuses

ROOT = Path("studies/study")


@pytest.fixture
def write(in_folder, monkeypatch):
    """Writes a study of the groups a, b and c, whose training steps take 1, 2 and 3 seconds by their profiles."""
    monkeypatch.setenv("COLUMNS", "160")
    Path("train.py").write_text(TRAIN)
    Path("base.yaml").write_text("trainer: {accumulate_grad_batches: 4}\n")

    def call(*, seeds=(0, 1), options="", steps=100, more=""):
        groups = "".join(
            f"    {label}: {{model.quality: {number}, model.step_seconds: {number}{options}}}\n"
            for number, label in enumerate("abc", start=1)
        )
        Path("study.yaml").write_text(
            f"base: base.yaml\naxes:\n  group:\n{groups}  length:\n    short: {{trainer.max_steps: {steps}}}\n"
            f"seeds: {list(seeds)}\nmetric: test/bleu\n{more}"
        )
        return Study.read("study.yaml")

    return call


def start(*arguments, file="study.yaml"):
    return subprocess.Popen(
        [sys.executable, "train.py", "study", "run", file, "--root", "studies", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_study(*arguments, status=0):
    process = start(*arguments)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == status, printed
    return printed


def profiled():
    """Output, threads, process and words of each call of `profile`."""
    log = Path("profiles.log")
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def statuses(study):
    return read_statuses(study, ROOT)


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(process):
    """Whether a process that may be nobody's child any more still runs."""
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def finish(study, label, seconds):
    """Makes the cells of a group look as if they had ended after so many seconds."""
    for status in statuses(study):
        if status.cell.group[0] == label:
            content = json.loads((status.folder.path / "cell.json").read_text())
            for attempt in content["attempts"]:
                attempt["ended"] = attempt["started"] + seconds / 2  # a training and a test
            (status.folder.path / "cell.json").write_text(json.dumps(content))


def test_each_group_once_before_the_cells(write):
    study = write()
    assert "3 networks to profile" in run_study("--jobs", "2", "--only", "seed=0")
    (output, threads, _, words), *others = sorted(profiled())  # by the folder, and so by the group
    assert len(others) == 2
    assert words == [
        *("-c", "base.yaml", "--model.quality", "1", "--model.step_seconds", "1", "--trainer.max_steps", "100"),
        *("--output", output),
    ]
    assert output == str(ROOT / study.cells[0].name / "profile.json")
    expected = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert threads == expected
    last = max(Path(output).stat().st_mtime_ns for output, *_ in profiled())
    assert last < min((status.folder.path / "cell.json").stat().st_mtime_ns for status in statuses(study)[::2])
    # Another seed has the same network, and a finished study needs nothing.
    assert "profile" not in run_study()
    assert "profile" not in run_study()
    assert len(profiled()) == 3
    for status in statuses(study):
        content = json.loads((status.folder.path / "profile.json").read_text())
        assert content["training_step"]["latency"]["median"] == "abc".index(status.cell.group[0]) + 1
    assert [status.state for status in statuses(study)] == ["done"] * 6


def test_the_estimate_is_of_the_steps_that_are_profiled(write):
    study = write(seeds=(0,), more="time_per_cell: 1 s\n")
    printed = run_study("--dry-run")
    assert "about 3 s" in printed  # which is known without a profile, so that nothing is written
    assert not ROOT.exists()
    run_study("--only", "group=a")
    finish(study, "a", 400.0)
    assert estimated_seconds(study, statuses(study), statuses(study)[:1], 1) == pytest.approx(400.0)
    # Without a profile of their own, what the others took.
    assert estimated_seconds(study, statuses(study), statuses(study)[1:], 1) == pytest.approx(800.0)
    study = write(seeds=(0,))
    Path("studies").rename("others")
    assert "3 networks to profile" in run_study("--dry-run")
    assert [status.state for status in statuses(study)] == ["waiting"] * 3
    for number, status in enumerate(statuses(study), start=1):
        steps = number * 4 * 100  # gradients of four batches are accumulated in each step
        told = estimated_seconds(study, statuses(study), [status], 1)
        assert steps < told < 1.3 * steps + 60
    one, two, three = (estimated_seconds(study, statuses(study), [status], 1) for status in statuses(study))
    assert estimated_seconds(study, statuses(study), statuses(study), 1) == pytest.approx(one + two + three)
    assert estimated_seconds(study, statuses(study), statuses(study), 3) == pytest.approx((one + two + three) / 3)
    # A cell that was trained says how wrong the profiles are, for all.
    run_study("--only", "group=a")
    finish(study, "a", 3 * one)
    assert estimated_seconds(study, statuses(study), statuses(study)[1:], 1) == pytest.approx(3 * (two + three))


def test_trainings_of_unknown_length_are_compared_by_their_profiles(write):
    write(seeds=(0,), steps=-1)  # until something else ends it
    printed = run_study("--dry-run")
    assert "of unknown duration" in printed
    run_study("--only", "group=b")
    study = Study.read("study.yaml")
    finish(study, "b", 100.0)
    assert estimated_seconds(study, statuses(study), statuses(study), 1) == pytest.approx(50.0 + 100.0 + 150.0)


def test_a_budget_is_compared_with_the_profiles(write):
    write(seeds=(0,), more="budget: 30 min\n")
    printed = run_study(status=2)
    assert "this would take about 4" in printed  # 2,400 s and something
    assert "its budget is 30 min. Give --yes" in printed
    assert "Stopped" not in printed
    printed = run_study("--no-profile", "--only", "group=a")
    assert "about 8 min" in printed or "about 7" in printed
    write(seeds=(7,), options=", model.other: 1", more="budget: 30 min\n")
    assert "this would take an unknown time, and its budget is 30 min" in run_study("--no-profile", status=2)
    assert len(profiled()) == 3


def test_a_profile_that_fails_stops_nothing(write):
    study = write(options=", model.no_profile: 1")
    printed = run_study()
    assert printed.count("warning") == 1
    assert (
        "warning: group=a, length=short and 2 more have no profile: error: data: there is no file of pieces "
        "(status 2)" in printed
    )
    log = statuses(study)[0].folder.path / "profile.log"
    assert str(log) in printed
    assert "there is no file of pieces" in log.read_text()
    assert len(profiled()) == 2  # the third would say the same
    assert [status.state for status in statuses(study)] == ["done"] * 6


def test_an_option_that_does_not_exist_stops_the_study_before_it_trains(write):
    study = write(options=", model.no_option: 1")
    printed = run_study(status=2)
    assert "group=a, length=short: error: model.no_option: there is no such option" in printed
    assert [status.state for status in statuses(study)] == ["waiting"] * 6


def test_a_command_that_cannot_profile(write):
    study = write(seeds=(0,))
    Path("train.py").write_text(TRAIN.replace('if stage == "profile":', 'if stage == "profile":\n    1 / 0'))
    assert "have no profile: ZeroDivisionError: division by zero (status 1)" in run_study()
    Path("train.py").write_text(TRAIN.replace('if stage == "profile":', 'if stage == "profile":\n    raise SystemExit'))
    study = write(seeds=(1,))
    assert "has no profile: it ended without profile.json" in run_study("--only", "group=a")
    assert [status.state for status in statuses(study)] == ["done", "waiting", "waiting"]


@pytest.mark.parametrize("content", ["", '{"training_step": {"lat', "[]"])
def test_a_damaged_profile_is_made_again(write, content):
    study = write(seeds=(0, 1))
    run_study("--only", "group=a", "--only", "seed=0")
    first, second = (status.folder.path / "profile.json" for status in statuses(study)[:2])
    first.write_text(content)
    run_study("--only", "group=a")
    assert len(profiled()) == 2
    assert json.loads(second.read_text())["training_step"]["latency"]["median"] == 1
    first.write_text(content)  # this cell is done
    assert estimated_seconds(study, statuses(study), statuses(study)[1:2], 1) is not None


def test_a_profile_without_times_is_kept_and_tells_none(write):
    study = write(seeds=(0,), more="time_per_cell: 7 s\n")
    for status in statuses(study):
        status.folder.path.mkdir(parents=True)
        (status.folder.path / "profile.json").write_text('{"training_step": {"latency": null}}')  # the meta device's
    assert "about 21 s" in run_study()
    assert profiled() == []


def test_cells_that_are_begun_anew_keep_their_profile(write):
    study = write(seeds=(0,))
    run_study("--only", "group=a")
    folder = statuses(study)[0].folder.path
    (folder / "translation/run/run.json").write_text('{"code": "000000000000"}')
    run_study("--rerun-stale", "--only", "group=a")
    assert len(profiled()) == 1
    assert json.loads((folder / "profile.json").read_text())
    assert folder.with_name(f"{folder.name}.old-1").is_dir()


def test_an_edited_configuration_is_profiled_and_its_cells_are_not_stale(write):
    write(seeds=(0,))
    run_study("--dry-run")
    Path("base.yaml").write_text("model: {dim: 3}\n")
    study = Study.read("study.yaml")
    assert [status.state for status in statuses(study)] == ["waiting"] * 3
    run_study("--dry-run")
    assert len(profiled()) == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_profiles(write, number):
    study = write(options=", model.profile_pause: 60")
    process = start("--jobs", "2")
    wait_until(lambda: len(profiled()) == 2)
    process.send_signal(number)
    printed = process.communicate(timeout=30)[0]
    assert process.returncode == 128 + number
    assert "Stopped. No cell was begun" in printed
    assert "warning" not in printed
    assert "Traceback" not in printed
    assert not any(is_alive(one) for _, _, one, _ in profiled())
    assert [status.state for status in statuses(study)] == ["waiting"] * 6


def test_two_runners_profile_once(write):
    study = write(seeds=(0,), options=", model.profile_pause: 0.3")
    both = [start(), start()]
    printed = [one.communicate(timeout=120)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], printed
    assert len(profiled()) == 3
    assert "Waiting for another process" in "".join(printed)
    assert [status.state for status in statuses(study)] == ["done"] * 3


def test_a_killed_runner_leaves_its_profile_to_the_next(write):
    study = write(seeds=(0,), options=", model.profile_pause: 1")
    process = start()
    wait_until(lambda: len(profiled()) == 1)
    process.kill()
    process.communicate()
    run_study()
    assert len(profiled()) == 3
    assert [status.state for status in statuses(study)] == ["done"] * 3


def test_lines_of_a_shell_do_not_profile(write, run):
    write()
    printed = run("study", "commands", "study.yaml")
    assert len(printed.splitlines()) == 6
    assert "profile" not in printed


def test_the_accelerator_of_the_trainer_is_profiled(write):
    Path("base.yaml").write_text("trainer: {accelerator: cpu}\n")
    words = write().cells[0].profile_arguments(Path("one.json"))
    assert words[-2:] == ["--device", "cpu"]

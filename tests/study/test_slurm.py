"""Jobs of a study, with programs in the place of SLURM's and of train.py."""

import os
import re
import signal
import stat
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from lightning_attn.study.grid import Study
from lightning_attn.study.states import read_statuses

REPOSITORY = Path(__file__).parents[2]

SLURM = f"""#!{sys.executable}
# sbatch starts a job at once, squeue lists those that run, scontrol starts one again when it has ended.
import os, subprocess, sys
from pathlib import Path

program, place = Path(sys.argv[0]).name, Path(__file__).parent / "jobs"
place.mkdir(exist_ok=True)


def start(number):
    script = (place / number).read_text()
    options = [line[10:] for line in script.splitlines() if line.startswith("#SBATCH --")]
    given = dict(option.split("=", 1) for option in options if "=" in option)
    with open(given["output"], "a") as output:
        process = subprocess.Popen(
            ["bash", str(place / number)], stdout=output, stderr=output, env=os.environ | {{"SLURM_JOB_ID": number}},
            stdin=subprocess.DEVNULL, start_new_session=True,
        )
    (place / f"{{number}}.pid").write_text(str(process.pid))


if program == "sbatch":
    if "--partition=none" in Path(sys.argv[-1]).read_text():
        raise SystemExit("invalid partition")
    number = str(100 + len(list(place.glob("*.pid"))))
    (place / number).write_text(Path(sys.argv[-1]).read_text())
    start(number)
    print(f"{{number}};cluster")
elif program == "squeue":
    for path in sorted(place.glob("*.pid")):
        state = Path("/proc", path.read_text(), "stat")
        if state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
            print(f"{{path.stem}}|RUNNING")
elif program == "scontrol":
    (place / "requeued").write_text(sys.argv[2])
    start(sys.argv[2])
else:
    os.execvp(sys.argv[1], sys.argv[1:])
"""

TRAIN = f"""
import json, os, signal, subprocess, sys, time
from pathlib import Path

sys.path.insert(0, {str(REPOSITORY)!r})
from lightning_attn.training.code_version import code_version

stage, *words = sys.argv[1:]
options = dict(zip(words[::2], words[1::2]))
run = Path(options["--run.root"]) / "translation" / "run"
run.mkdir(parents=True, exist_ok=True)
if stage == "test":
    (run / "test_metrics.json").write_text(json.dumps({{"test/bleu": 1.0}}))
    raise SystemExit
if "--model.fail" in options:
    raise SystemExit(2)
(run / "run.json").write_text(json.dumps({{"code": code_version()}}))
received = []
signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
(run / "pid").write_text(str(os.getpid()))
done = run / "metrics.csv"
if not done.exists():
    done.write_text("step,val/bleu\\n")
for step in range(len(done.read_text().splitlines()) - 1, 10):
    time.sleep(float(options["--model.pause"]))
    with done.open("a") as file:
        file.write(f"{{step}},1.0\\n")
    if received:
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        raise SystemExit(128 + signal.SIGUSR1)
"""


@pytest.fixture
def study(in_folder, monkeypatch):
    Path("bin").mkdir()
    for name in ("sbatch", "squeue", "scontrol", "srun"):
        path = Path("bin") / name
        path.write_text(SLURM)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{Path('bin').absolute()}:{os.environ['PATH']}")
    Path("train.py").write_text(TRAIN)
    Path("base.yaml").write_text("trainer: {max_steps: 10}\n")
    Path("study.yaml").write_text(
        "base: base.yaml\naxes: {pause: {short: {model.pause: 0.0}, long: {model.pause: 0.2}}}\nmetric: test/bleu\n"
    )
    return Study.read("study.yaml")


@pytest.fixture
def submit(study, run):
    return partial(run, "study", "run", "study.yaml", "--slurm")


def statuses(study):
    return read_statuses(study, Path("checkpoints/studies/study"))


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_job_a_cell_and_none_twice(study, submit):
    printed = submit("--sbatch=--time=4:00:00", "--sbatch=--gres=gpu:1")
    assert f"job 100: {study.cells[0].name}" in printed
    assert f"job 101: {study.cells[1].name}" in printed
    script = (statuses(study)[1].folder.path / "job.sh").read_text()
    assert "#SBATCH --signal=SIGUSR1@120\n#SBATCH --time=4:00:00\n#SBATCH --gres=gpu:1\n" in script
    status = statuses(study)[1]
    assert (status.state, status.job, status.reason) == ("running", "101", "SLURM job 101 is RUNNING")
    assert "job 101" not in submit()
    wait_until(lambda: [one.state for one in statuses(study)] == ["done", "done"])
    assert "nothing to run" in submit()
    assert len(list(Path("bin/jobs").glob("*.pid"))) == 2


def test_a_job_that_is_requeued_resumes(study, submit):
    submit("--only", "pause=long")
    run = statuses(study)[1].folder.path / "translation/run"
    wait_until(lambda: (run / "metrics.csv").exists() and len((run / "metrics.csv").read_text().splitlines()) > 2)
    os.kill(int((run / "pid").read_text()), signal.SIGUSR1)
    wait_until(lambda: Path("bin/jobs/requeued").exists())
    wait_until(lambda: statuses(study)[1].state == "done")
    steps = [line.partition(",")[0] for line in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == [str(step) for step in range(10)]


def test_failed_and_killed_jobs(study, submit):
    text = Path("study.yaml").read_text()
    Path("study.yaml").write_text(text.replace("{model.pause: 0.0}", "{model.pause: 0.0, model.fail: 1}"))
    changed = Study.read("study.yaml")
    submit()
    wait_until(lambda: statuses(changed)[0].state == "failed")
    assert statuses(changed)[0].reason == "SLURM job 100 ended with status 2"
    run = statuses(changed)[1].folder.path / "translation/run"
    wait_until(lambda: (run / "pid").exists())
    os.killpg(int(Path("bin/jobs/101.pid").read_text()), signal.SIGKILL)
    wait_until(lambda: statuses(changed)[1].state == "interrupted")
    printed = submit()
    assert "1 failed; --retry-failed runs them again" in printed
    assert f"job 102: {changed.cells[1].name}" in printed
    assert printed.count("job ") == 1
    assert f"job 103: {changed.cells[0].name}" in submit("--retry-failed")
    wait_until(lambda: [one.state for one in statuses(changed)] == ["failed", "done"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sbatch=--partition=none"], "slurm: sbatch refused .*job.sh: invalid partition"),
        (["--sbatch=time"], "sbatch: 'time' cannot be used"),
        (["--sbatch=--signal=USR2@90"], "sbatch: '--signal=USR2@90' cannot be used"),
        (["--jobs", "2"], "Leave out --jobs and --fail-fast"),
    ],
)
def test_mistakes_end_with_a_message(submit, options, message):
    assert re.search(message, submit(*options, status=2))


def test_without_slurm(study, submit, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert "there is no program sbatch here" in submit(status=2)
    assert [one.state for one in statuses(study)] == ["waiting", "waiting"]

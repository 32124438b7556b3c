"""SIGKILL at random moments, of the runner, of one of its processes or of all: nothing is done twice or lost."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cell_command import TRAIN

from lightning_attn.study.grid import Study
from lightning_attn.study.states import read_statuses

SEED = os.environ.get("LONG_SEED", "1")
KILLS = int(os.environ.get("LONG_KILLS", "100"))
STEPS = 12
ROOT = Path("studies/study")

STUDY = f"""
base: base.yaml
axes:
  group: {{a: {{model.quality: 1}}, b: {{model.quality: 2}}, c: {{model.quality: 3}}}}
  length: {{short: {{trainer.max_steps: {STEPS}, model.pause: 0.04, model.profile_pause: 0.2}}}}
seeds: [0, 1]
metric: test/bleu
"""


def start(log):
    words = [sys.executable, "train.py", "study", "run", "study.yaml", "--root", "studies", "--jobs", "2"]
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def lines_of(name):
    path = Path(name)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def living_children():
    """The processes of cells and profiles that run in this folder."""
    found = []
    for process in {event[2] for event in lines_of("events.log") + lines_of("profiles.log")}:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{process}/cwd").resolve() == Path.cwd():  # the number may be another process's by now
                found.append(process)
    return found


def kill(processes):
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def finished(study):
    """Cells that are done, with how many processes they have needed."""
    events = lines_of("events.log")
    return {
        status.cell.name: sum(event[1] == status.cell.name for event in events)
        for status in read_statuses(study, ROOT)
        if status.state == "done"
    }


def require_whole(study):
    """Each step was done once, by whichever process, and no profile is damaged."""
    for status in read_statuses(study, ROOT):
        rows = (status.folder.path / "translation/run/metrics.csv").read_text().splitlines()[1:]
        assert [int(row.partition(",")[0]) for row in rows] == list(range(STEPS))
        assert status.state == "done"
        assert status.score == pytest.approx("abc".index(status.cell.group[0]) + 1 + 0.1 * status.cell.seed)
        profile = status.folder.path / "profile.json"  # missing if each process that measured it was killed
        assert not profile.exists() or json.loads(profile.read_text())
    # No process found another one at work on its cell.
    assert "BlockingIOError" not in "".join(path.read_text() for path in Path().rglob("output.log"))


@pytest.mark.parametrize("kills", [6, pytest.param(KILLS, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_nothing_is_done_twice_or_lost(in_folder, kills):
    Path("train.py").write_text(TRAIN)
    Path("base.yaml").write_text("model: {}\n")
    Path("study.yaml").write_text(STUDY)
    study = Study.read("study.yaml")
    chance = random.Random(f"{SEED}-{kills}")
    done, runs, victims = 0, 0, {"runner": 0, "child": 0, "all": 0}
    with Path("log.txt").open("w") as log:
        while done < kills:
            if Path("studies").exists() and len(finished(study)) == len(study.cells):
                require_whole(study)
                Path("studies").rename(f"studies-{runs}")  # begin again, with new folders
                Path("events.log").rename(f"events-{runs}.log")
            runs += 1
            process = start(log)
            ended = finished(study)
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(chance.uniform(0.1, 3.0))
                while process.poll() is None and done < kills:
                    children = living_children()
                    victim = chance.choice(["runner", "child", "all"])
                    if victim != "runner":
                        kill(children if victim == "all" else chance.sample(children, min(1, len(children))))
                    if victim != "child":
                        kill([process.pid])
                        process.wait()
                    victims[victim] += 1
                    done += 1
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(chance.uniform(0.1, 2.0))
            finally:
                kill([process.pid])
                process.wait()
            for cell, number in ended.items():
                assert finished(study)[cell] == number, f"{cell} was done, and run again"
        end = time.monotonic() + 120
        while len(finished(study)) < len(study.cells):
            assert time.monotonic() < end, Path("log.txt").read_text()[-3000:]
            assert start(log).wait(120) == 0, Path("log.txt").read_text()[-3000:]
    require_whole(study)
    assert not living_children()
    print(f"\nseed {SEED}: {victims} killed in {runs} runs")

"""SIGKILL at random moments, of one rank or all: a resumed run is bitwise identical to an uninterrupted one."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.long, pytest.mark.timeout(6000)]
REPOSITORY = Path(__file__).parents[2]
SEED = int(os.environ.get("LONG_SEED", "1"))
KILLS = int(os.environ.get("LONG_KILLS", "12"))  # of each case


def command(config, name, ranks, *more):
    options = [
        "--run.name",
        name,
        "--trainer.devices",
        ranks,
        "--trainer.max_steps",
        12,
        "--trainer.val_check_interval",
        4,
    ]
    options += ["--run.checkpoint_every_n_steps", 1, *(["--trainer.strategy", "ddp"] if ranks > 1 else []), *more]
    return [sys.executable, str(REPOSITORY / "train.py"), "fit", "-c", str(config), *map(str, options)]


def started(arguments, log):
    return subprocess.Popen(arguments, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def ranks_of(process):
    """The processes of the other ranks."""
    try:
        found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [int(one) for one in found if b"train.py" in Path(f"/proc/{one}/cmdline").read_bytes()]
    except OSError:
        return []


def results(run):
    """Everything of a finished run that must be the same; the speed is not."""
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    with (run / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if "per_second" not in k and v} for row in csv.DictReader(file)]
    kept = {
        name: checkpoint[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks")
    }
    return kept, rows


def differing(one, other, key=""):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), key
        return [found for name in one for found in differing(one[name], other[name], f"{key}.{name}")]
    if isinstance(one, list):
        return [
            found for n, pair in enumerate(zip(one, other, strict=True)) for found in differing(*pair, f"{key}[{n}]")
        ]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [key]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("config", ["tiny_config", "detection_config", "segmentation_config"])
def test_kills_change_nothing(request, in_folder, config, ranks):
    config = request.getfixturevalue(config)
    chance = random.Random(f"{SEED}-{config.name}-{config.parent.name}-{ranks}")
    with Path("log.txt").open("w") as log:
        begun = time.monotonic()
        assert started(command(config, "whole", ranks), log).wait() == 0, Path("log.txt").read_text()
        usual = time.monotonic() - begun
        (whole,) = in_folder.glob("checkpoints/*/whole")
        expected = results(whole)
        kills, runs, restarts = 0, 0, 0
        while kills < KILLS:
            name, process = f"broken-{runs}-x", None
            runs += 1
            for _ in range(40):
                restarts += 1
                process = started(command(config, name, ranks, "--ckpt_path", "auto"), log)
                if kills >= KILLS or chance.random() < 0.15:
                    break
                try:
                    process.wait(chance.uniform(0.0, 1.05 * usual))
                except subprocess.TimeoutExpired:
                    others = ranks_of(process)
                    victim = chance.choice([process.pid, *others])
                    os.kill(victim, signal.SIGKILL)
                    kills += 1
                    process.wait(90)  # a rank of its own is noticed, and takes the others with it
                    until = time.monotonic() + 10
                    while any(Path(f"/proc/{one}").is_dir() for one in others) and time.monotonic() < until:
                        time.sleep(0.1)
                    assert not [one for one in others if Path(f"/proc/{one}").is_dir()], "an orphan"
                else:
                    break
            assert process is not None
            assert process.wait() == 0, Path("log.txt").read_text()[-3000:]
            (run,) = [one for one in whole.parent.glob(f"{name}*") if (one / "last.ckpt").is_file()]
            found = results(run)
            assert found[1] == expected[1], "metrics.csv"
            assert differing(found[0], expected[0]) == []
            assert not list(run.rglob("*.part"))
    what = f"{config.parent.name}, {ranks} ranks"
    print(f"\nseed {SEED}, {what}: {kills} kills in {runs} runs ({restarts} starts), all equal")

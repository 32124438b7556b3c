"""What goes wrong in the middle of a training ends it with a message, and what was saved is whole."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
EVERY_STEP = [
    "--run.checkpoint_every_n_steps",
    1,
    "--trainer.val_check_interval",
    100,
    "--trainer.limit_val_batches",
    0,
]


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


def callbacks(*entries):
    """A configuration file with callbacks of `crashing`."""
    lines = [f"    - class_path: crashing.{name}\n      init_args: {arguments}\n" for name, arguments in entries]
    Path("callbacks.yaml").write_text("trainer:\n  callbacks:\n" + "".join(lines))
    return ["-c", "callbacks.yaml"]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanishes(run, detection_config, coco, in_folder, workers):
    root = shutil.copytree(coco, in_folder / "data")
    path = sorted((root / "train2017").iterdir())[0]
    kept = path.read_bytes()
    common = ["fit", "-c", detection_config, *EVERY_STEP, "--data.root", root, "--data.num_workers", workers]
    common += ["--trainer.max_steps", 12]
    printed = run(*common, *callbacks(("RemoveFile", f"{{path: {path}}}")), status=2)
    error = printed[printed.index("error: ") :]
    assert f"{path} does not exist" in error
    assert "image id" in error
    assert "Traceback" not in printed
    last = in_folder / "checkpoints" / "detection" / "tiny" / "last.ckpt"
    assert 1 <= step_of(last) < 12
    path.write_bytes(kept)
    run(*common, "--ckpt_path", "last")
    assert step_of(last) == 12


LOADER = """
import sys
from datamodules import COCODataModule

module = COCODataModule(sys.argv[1], batch_size=1, num_workers=2, min_size=48, max_size=64)
module.setup("fit")
batches = iter(module.train_dataloader())
next(batches)
print("one batch", flush=True)
"""


def test_a_script_ends_that_has_not_used_up_its_batches(coco):
    """Workers pass over SIGTERM, by which Python would end them, and wait for them."""
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(coco)], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.stdout == "one batch\n", done.stderr
    assert done.returncode == 0
    assert "Exception ignored" not in done.stderr


def test_a_worker_that_dies(run_process, detection_config, in_folder):
    common = ["fit", "-c", detection_config, *EVERY_STEP, "--data.num_workers", 2, "--trainer.max_steps", 12]
    done = run_process(*common, *callbacks(("KillWorker", "{}")), status=2)
    # Torch says either, by whether the signal or the end of the queue is noticed first.
    assert re.search(r"is killed by signal: Killed|worker \(pid\(s\) \d+\) exited unexpectedly", done.stderr)
    assert "A process that makes batches has died" in done.stderr
    assert "Traceback" not in done.stderr
    last = in_folder / "checkpoints" / "detection" / "tiny" / "last.ckpt"
    assert step_of(last) >= 1
    run_process(*common, "--ckpt_path", "last")
    assert step_of(last) == 12


@pytest.mark.ddp
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other(run_process, tiny_config, in_folder, rank):
    """Within a minute; on this machine in seconds."""
    two = ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--trainer.max_steps", 50]
    kill = ("SignalAt", f"{{step: 2, number: {int(signal.SIGKILL)}, rank: {rank}}}")
    # What the launcher started is rank 0 itself.
    done = run_process(
        *("fit", "-c", tiny_config, *EVERY_STEP, *two, *callbacks(("NoteProcess", "{}"), kill)),
        status=2 if rank else -signal.SIGKILL,
    )
    ended = time.monotonic()
    survivor = int(Path(f"rank{1 - rank}.pid").read_text())
    while (Path("/proc") / str(survivor)).is_dir() and time.monotonic() - ended < 60:
        time.sleep(0.1)
    assert not (Path("/proc") / str(survivor)).is_dir(), "the other rank has ended too"
    if rank:
        process = Path("rank1.pid").read_text()
        assert f"rank 1 (process {process}) was ended by SIGKILL" in done.stderr
        assert "resume with --ckpt_path auto" in done.stderr
    assert step_of(in_folder / "checkpoints" / "translation" / "tiny" / "last.ckpt") in (1, 2)


@pytest.mark.ddp
def test_a_rank_that_ends_by_itself_is_named(run_process, tiny_config, in_folder):
    two = ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--trainer.max_steps", 50]
    leave = ("LeaveAt", "{step: 2, code: 3, rank: 1}")
    done = run_process("fit", "-c", tiny_config, *EVERY_STEP, *two, *callbacks(leave), status=2)
    assert "rank 1 (process " in done.stderr
    assert "ended with exit code 3; its own message is above" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.ddp
@pytest.mark.parametrize("seconds", [0.0, 1.0, 6.0, 12.0])
def test_no_rank_outlives_its_launcher(tiny_config, in_folder, seconds):
    """Whenever that is killed: while the other imports, while they look for one another, or later."""
    command = [sys.executable, str(REPOSITORY / "train.py"), "fit", "-c", str(tiny_config)]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "100000"]
    with Path("out.txt").open("w") as out:
        launcher = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})
    children: list[int] = []
    try:
        while not children and launcher.poll() is None:
            children = [
                int(one) for one in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
            ]
            children = [one for one in children if b"train.py" in Path(f"/proc/{one}/cmdline").read_bytes()]
            time.sleep(0.05)
        assert children, Path("out.txt").read_text()
        time.sleep(seconds)
    finally:
        launcher.kill()
        launcher.wait()
    killed = time.monotonic()
    while any(Path(f"/proc/{one}").is_dir() for one in children) and time.monotonic() - killed < 30:
        time.sleep(0.1)
    left = [one for one in children if Path(f"/proc/{one}").is_dir()]
    for one in left:
        os.kill(one, signal.SIGKILL)
    assert not left


def test_ranks_that_do_not_find_one_another_say_so():
    script = (
        "import os, time; os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='1234')\n"
        "from lightning_attn.cli.launching import watch_rendezvous\n"
        "watch_rendezvous(1, 3, seconds=0.2)\ntime.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert "rank 1 of 3 has waited 0 s for the others at 127.0.0.1:1234" in done.stderr

"""A training that was broken off and goes on ends like one that was not: to the bit, for every task."""

import csv
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from crashing import Crash, CrashAt

from lightning_attn.training.checkpoints import AtomicCheckpointIO
from lightning_attn.training.loggers import MetricsLogger

CONFIGURATIONS = {
    "translation": ("tiny_config", "--model.dropout", "0.1", "--trainer.limit_val_batches", "2"),
    "detection": ("detection_config", "--data.augmentation.brightness", "0.3"),
    "segmentation": ("segmentation_config", "--model.segmenter.dropout", "0.5"),
    # The shorter set has begun anew in the middle of the epoch.
    "multitask": ("multitask_config", "--data.members.detection.init_args.augmentation.brightness", "0.3"),
}
# Validations between accumulated batches too, and epochs that end in between.
SCHEDULE = [
    *("--trainer.max_steps", "7", "--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "5"),
    *("--run.checkpoint_every_n_steps", "2", "--trainer.num_sanity_val_steps", "1"),
]
NOT_RESTORED = ("train/tokens_per_second",)  # a speed


class Training:
    """Runs of one configuration in this process."""

    def __init__(self, run, folder, task, config, options):
        self.run, self.folder, self.task = run, folder / "runs", task
        self.arguments = ["fit", "-c", config, "--run.root", self.folder, *SCHEDULE, *options]

    def fit(self, name, *options, at=None):
        """Whether it came to its end."""
        CrashAt.calls.clear()
        CrashAt.at = at
        callback = ["--trainer.callbacks+", "crashing.CrashAt"]
        try:
            self.run(*self.arguments, *callback, "--run.name", name, *options)
        except Crash:
            return False
        return True

    def directory(self, name):
        """The newest: what broke off before anything was saved leaves an empty one."""
        return max((self.folder / self.task).glob(f"{name}*"), key=lambda path: (len(path.name), path.name))

    def results(self, name):
        return stored(self.directory(name)), lines(self.directory(name))


def stored(directory):
    checkpoint = torch.load(directory / "last.ckpt", weights_only=True)
    for lightnings_own in ("callbacks", "run"):  # paths, and a score that is not restored
        checkpoint.pop(lightnings_own)
    return checkpoint


def lines(directory):
    with (directory / "metrics.csv").open(newline="") as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [{name: value for name, value in row.items() if name not in NOT_RESTORED} for row in rows]


def differences(one, other, name=""):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), name
        return [found for key in one for found in differences(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, list | tuple):
        assert len(one) == len(other), name
        return [
            found
            for i, (a, b) in enumerate(zip(one, other, strict=True))
            for found in differences(a, b, f"{name}[{i}]")
        ]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [name]


@pytest.fixture
def training(request, run, tmp_path):
    def make(task, *options):
        config, *settings = CONFIGURATIONS[task]
        return Training(run, tmp_path, task, request.getfixturevalue(config), [*settings, *options])

    return make


def check_crashes(training, number, seed):
    assert training.fit("whole")
    moments = len(CrashAt.calls)
    checkpoint, logged = training.results("whole")
    assert any("val/" in name for row in logged for name in row)
    assert len(checkpoint["random_streams"]) == 1
    draw = random.Random(seed)
    for index in range(number):
        first, second = draw.randint(1, moments), draw.randint(1, moments)
        name = f"broken{index}"
        ended = training.fit(name, at=first)
        for at in (second, None):
            if not ended:
                ended = training.fit(name, "--ckpt_path", "auto", at=at)
        assert ended
        found, found_lines = training.results(name)
        assert found_lines == logged, (first, second)
        assert differences(checkpoint, found) == [], (first, second)


AVERAGED = ("--trainer.callbacks+", "lightning_attn.callbacks.ExponentialAveraging")


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("translation", AVERAGED),
        ("detection", ()),
        ("segmentation", ("--data.num_workers", "2")),
        ("multitask", (*AVERAGED, "--data.num_workers", "2", "--model.balancing.name", "uncertainty")),
        ("multitask", ("--data.order", "alternating", "--model.balancing.name", "dynamic_average")),
    ],
)
def test_crashes_change_nothing(training, task, options):
    check_crashes(training(task, *options), number=1 if task == "multitask" else 2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("task", CONFIGURATIONS)
@pytest.mark.parametrize("options", [AVERAGED, ("--data.num_workers", "2")], ids=["average", "workers"])
def test_many_crashes_change_nothing(training, task, options):
    check_crashes(training(task, *options), number=8, seed=2)


# Signals, in processes of their own


@pytest.fixture
def process(run_process, tiny_config, in_folder, monkeypatch):
    """Runs of the command that end, are stopped, and go on."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # for crashing.SignalAt

    def call(name, *options, status=0):
        longer = ["--trainer.val_check_interval", 100, "--trainer.max_steps", 6]
        return run_process("fit", "-c", tiny_config, *longer, "--run.name", name, *options, status=status)

    call.runs = in_folder / "checkpoints" / "translation"
    return call


def signal_at(step, number, rank=0):
    arguments = f"{{step: {step}, number: {int(number)}, rank: {rank}}}"
    Path("signal.yaml").write_text(
        f"trainer:\n  callbacks:\n    - class_path: crashing.SignalAt\n      init_args: {arguments}\n"
    )
    return ["-c", "signal.yaml"]


def check_the_same(whole, other):
    """The same lines and weights in two run directories."""
    assert lines(other) == lines(whole)
    weights = [torch.load(run / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, other)]
    assert differences(*weights) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_after_the_step_and_lose_nothing(process, number):
    process("whole")
    stopped = process("stopped", *signal_at(3, number), status=128 + number)
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    assert "Stopping after this step" in stopped.stderr
    assert f"Stopped by {name} after step 4" in stopped.stderr
    assert "--ckpt_path last" in stopped.stderr
    assert torch.load(process.runs / "stopped" / "last.ckpt", weights_only=True)["global_step"] == 4
    process("stopped", "--ckpt_path", "last")
    check_the_same(process.runs / "whole", process.runs / "stopped")
    assert sorted(path.name for path in process.runs.iterdir()) == ["stopped", "whole"]


def test_a_killed_process_leaves_what_it_saved(process):
    every = ["--run.checkpoint_every_n_steps", 1]
    process("whole")
    process("killed", *every, *signal_at(3, signal.SIGKILL), status=-signal.SIGKILL)
    (process.runs / "killed" / ".last.ckpt.abc.part").write_bytes(b"half a checkpoint")
    process("killed", "--ckpt_path", "last")
    assert not list((process.runs / "killed").glob(".*.part"))
    check_the_same(process.runs / "whole", process.runs / "killed")


class Killer:
    """Runs of one configuration in processes of their own, which are killed at any moment of the training.

    Args:
        arguments: Of the command.
        draw: What chooses the moments.
        ranks: How many processes.
    """

    def __init__(self, arguments, draw, ranks):
        callbacks = "trainer:\n  callbacks+:\n    - class_path: crashing.NoteProcess\n"
        Path("note.yaml").write_text(callbacks)
        self.arguments = [*map(str, arguments), "-c", "note.yaml"]
        if ranks > 1:
            self.arguments += ["--trainer.devices", str(ranks), "--trainer.strategy", "ddp"]
        self.draw, self.ranks = draw, ranks
        self.longest = 0.0

    def fit(self, name, *, kill):
        """Whether it ended by itself; otherwise it was killed between the start of its training and its end."""
        notes = [Path(f"rank{rank}.pid") for rank in range(self.ranks)]
        for note in notes:
            note.unlink(missing_ok=True)
        command = [sys.executable, str(Path(__file__).parents[2] / "train.py"), *self.arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        with (
            Path("output.txt").open("w") as output,
            subprocess.Popen(
                [*command, "--run.name", name, "--ckpt_path", "auto"], env=environment, stdout=output, stderr=output
            ) as process,
        ):
            while not all(note.is_file() and note.read_text() for note in notes) and process.poll() is None:
                time.sleep(0.01)
            begin = time.monotonic()
            try:
                process.wait(self.draw.uniform(0, self.longest) if kill else 240)
            except subprocess.TimeoutExpired:
                process.kill()
            process.wait()
        if process.returncode == 0:
            self.longest = max(self.longest, time.monotonic() - begin)
            return True
        assert process.returncode == -signal.SIGKILL, Path("output.txt").read_text()
        for note in notes[1:]:  # the other ranks notice
            while (Path("/proc") / note.read_text()).is_dir():
                time.sleep(0.1)
        return False


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("task", "options", "ranks"),
    [
        ("translation", AVERAGED, 1),
        ("detection", (), 1),
        ("segmentation", ("--data.num_workers", "2"), 1),
        ("translation", ("--data.num_workers", "2"), 2),
        ("detection", AVERAGED, 2),
        ("segmentation", (), 2),
    ],
)
def test_kills_at_any_moment_change_nothing(request, in_folder, task, options, ranks):
    """Eight kills each, also while a checkpoint is written: there is one after each step."""
    config, *settings = CONFIGURATIONS[task]
    arguments = ["fit", "-c", request.getfixturevalue(config), *SCHEDULE, *settings, *options]
    killer = Killer([*arguments, "--run.checkpoint_every_n_steps", 1], random.Random(3), ranks)
    runs = in_folder / "checkpoints" / task
    assert killer.fit("whole", kill=False)
    kills = number = 0
    while kills < 8:
        number += 1
        while not killer.fit(f"killed{number}", kill=True):
            kills += 1
        (path,) = (path.parent for path in runs.glob(f"killed{number}*/last.ckpt"))
        assert lines(path) == lines(runs / "whole")
        assert differences(stored(runs / "whole"), stored(path)) == []


def test_slurm_requeues_after_the_step(process, monkeypatch, in_folder):
    """With variables as SLURM sets them, and a command in the place of its own."""
    scontrol = in_folder / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {in_folder}/calls\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=os.pathsep)
    process("whole")
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NODELIST": "localhost"}
    for name, value in (job | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}).items():
        monkeypatch.setenv(name, value)
    process("queued", *signal_at(3, signal.SIGUSR1), "--ckpt_path", "auto", status=128 + signal.SIGUSR1)
    assert (in_folder / "calls").read_text() == "requeue 77\n"
    process("queued", "--ckpt_path", "auto")
    assert not list((process.runs / "queued").glob("hpc_ckpt_*"))
    check_the_same(process.runs / "whole", process.runs / "queued")


@pytest.mark.ddp
def test_a_signal_to_one_rank_stops_both(process):
    two = ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--model.dropout", 0.1]
    process("whole", *two)
    # The rank that the launcher started.
    stopped = process("stopped", *two, *signal_at(3, signal.SIGTERM, rank=1), status=128 + signal.SIGTERM)
    assert "Stopped by SIGTERM after step 4" in stopped.stderr
    streams = torch.load(process.runs / "stopped" / "last.ckpt", weights_only=True)["random_streams"]
    assert len(streams) == 2
    assert not torch.equal(streams[0]["torch"], streams[1]["torch"])
    process("stopped", *two, "--ckpt_path", "last")
    check_the_same(process.runs / "whole", process.runs / "stopped")


# Choosing a run to go on with


def test_last_and_auto(run, tiny_config, in_folder):
    runs = in_folder / "checkpoints" / "translation"
    missing = run("fit", "-c", tiny_config, "--ckpt_path", "last", status=2)
    assert "there is none" in missing
    assert "'auto' starts a new run" in missing
    assert not runs.exists() or not list(runs.iterdir())
    run("fit", "-c", tiny_config, "--ckpt_path", "auto", "--trainer.max_steps", 2)
    printed = run("fit", "-c", tiny_config, "--ckpt_path", "auto", "--model.optimizer.learning_rate", 0.002)
    assert "model.optimizer.learning_rate: 0.01 in the checkpoint, 0.002 now" in printed
    assert "trainer.max_steps: 2 in the checkpoint, 4 now" in printed
    assert [path.name for path in runs.iterdir()] == ["tiny"]
    rates = [row["lr-Adam"] for row in lines(runs / "tiny") if "lr-Adam" in row]
    assert rates == ["0.01", "0.01", "0.002", "0.002"]
    assert sorted(path.name for path in (runs / "tiny").glob("config_*")) == ["config_fit-2.yaml", "config_fit.yaml"]
    run("test", "-c", tiny_config, "--ckpt_path", "best")
    assert (runs / "tiny" / "test_metrics.json").is_file()


@pytest.mark.parametrize(("before", "after", "accumulated"), [(2, 100, 1), (100, 2, 1), (3, 1, 1), (2, 3, 2)])
def test_steps_go_on_with_another_interval_of_validations(run, tiny_config, in_folder, before, after, accumulated):
    options = ["--trainer.accumulate_grad_batches", accumulated, "--trainer.max_epochs", 100]
    for steps, interval in ((4, before), (8, after)):
        every = ["--trainer.val_check_interval", interval * accumulated, "--trainer.max_steps", steps]
        run("fit", "-c", tiny_config, *options, *every, "--ckpt_path", "auto")
    logged = lines(in_folder / "checkpoints" / "translation" / "tiny")
    by_batch = [step for step in range(8) for _ in range(accumulated)]  # the monitor of learning rates logs for each
    assert [int(row["step"]) for row in logged if "train/loss" in row] == list(range(8))
    assert [int(row["step"]) for row in logged if "lr-Adam" in row] == by_batch
    due = [step - 1 for step in range(1, 9) if step % (before if step <= 4 else after) == 0]
    assert [int(row["step"]) for row in logged if "val/loss" in row] == due


def test_another_process_in_the_run_is_noticed(run, run_process, tiny_config, in_folder):
    run("fit", "-c", tiny_config)  # this process keeps the lock
    refused = run_process("fit", "-c", tiny_config, "--ckpt_path", "last", status=2)
    assert "Another process is training in" in refused.stderr


def test_a_run_goes_on_under_another_name_on_request(run, tiny_config, in_folder):
    runs = in_folder / "checkpoints" / "translation"
    run("fit", "-c", tiny_config, "--trainer.max_steps", 2)
    before = (runs / "tiny" / "last.ckpt").read_bytes()
    run("fit", "-c", tiny_config, "--run.name", "fork", "--ckpt_path", runs / "tiny" / "last.ckpt")
    assert (runs / "tiny" / "last.ckpt").read_bytes() == before
    assert torch.load(runs / "fork" / "last.ckpt", weights_only=True)["global_step"] == 4


# metrics.csv


def test_lines_of_a_broken_run_are_dropped(tmp_path):
    logger = MetricsLogger(tmp_path)
    logger.log_metrics({"a": 1.5}, 0)
    logger.log_metrics({"b": 2.5}, 0)
    logger.save()
    logger.log_metrics({"a": 3.5, "c": 1.0}, 1)
    logger.log_metrics({"a": 4.5}, 2)
    logger.save()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("5.5,")  # killed within a line
    again = MetricsLogger(tmp_path, first_step=2, lines=3)
    assert again.lines == 3
    again.log_metrics({"a": 4.25}, 2)
    again.save()
    expected = [{"a": "1.5", "step": "0"}, {"b": "2.5", "step": "0"}, {"a": "3.5", "c": "1.0", "step": "1"}]
    assert lines(tmp_path) == [*expected, {"a": "4.25", "step": "2"}]
    anew = MetricsLogger(tmp_path)
    anew.log_metrics({"z": 1.0}, 0)
    anew.save()
    assert lines(tmp_path) == [{"z": "1.0", "step": "0"}]


def test_a_file_that_cannot_grow_loses_nothing(tmp_path):
    """The operating system refuses in the middle of the file, as when a disk is full."""
    path = tmp_path / "last.ckpt"
    checkpoints = AtomicCheckpointIO()
    checkpoints.save_checkpoint({"state_dict": {"w": torch.ones(3)}}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*last\.ckpt"):
            checkpoints.save_checkpoint({"state_dict": {"w": torch.zeros(1_000_000)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(checkpoints.load_checkpoint(path)["state_dict"]["w"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_breaks_off_the_writing_is_what_is_raised(tmp_path, monkeypatch):
    """As when a worker's death is noticed in between: not the archive that is cut short by it."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(3)}}, path)
    written = []

    class Breaking:
        def __init__(self, file):
            self.file, self.flush = file, file.flush

        def write(self, data):
            written.append(len(data))
            if len(written) > 3:
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
            return self.file.write(data)

    original = torch.save
    monkeypatch.setattr(torch, "save", lambda checkpoint, file: original(checkpoint, Breaking(file)))
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.zeros(10_000)}}, path)
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["w"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]

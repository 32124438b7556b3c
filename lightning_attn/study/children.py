"""The processes that a study starts: their shares of the machine, and the signals that ask all of them to stop."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import IO, Any

from lightning_attn.datamodules.machine import available_cores
from lightning_attn.processes import stop_signals

__all__ = ["StopRequests", "kill_child", "start_child", "visible_gpus"]


class StopRequests:
    """Counts the signals that ask to stop (Ctrl-C, SIGTERM, SIGHUP), instead of ending by them.

    Attributes:
        first: The number of the first one; None before.
        count: How many came.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self.count = 0

    @contextlib.contextmanager
    def received(self) -> Iterator[None]:
        """Counts them inside; in the main thread only."""

        def receive(number: int, frame: FrameType | None) -> None:
            self.first = self.first or number
            self.count += 1

        earlier = {number: signal.signal(number, receive) for number in stop_signals()}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)


def start_child(
    words: Sequence[str], log: IO[bytes], lock: int, *, slot: int, jobs: int, gpus: Sequence[str]
) -> subprocess.Popen[bytes]:
    """Starts a process beside others, which writes what it prints to a log.

    Args:
        words: The command.
        log: The file, open to be written.
        lock: Descriptor of a lock that it holds until it ends.
        slot: Its place among the processes, from 0.
        jobs: How many there may be.
        gpus: Those to be shared, as `visible_gpus` names them.
    """
    # Ctrl-C comes through this process, once.
    apart: dict[str, Any]
    if sys.platform == "win32":  # which passes no lock on: the lock of the run directory alone outlives the runner
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    else:
        apart = {"start_new_session": True, "pass_fds": (lock,)}
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=_environment_of(slot, jobs, gpus),
        **apart,
    )


def kill_child(process: subprocess.Popen[bytes]) -> None:
    """Kills a process that `start_child` returned, and, where the system has groups of processes, what it started."""
    with contextlib.suppress(ProcessLookupError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)


def _environment_of(slot: int, jobs: int, gpus: Sequence[str]) -> dict[str, str]:
    """Variables of a process that runs beside others: its share of the processors and GPUs."""
    variables = dict(os.environ)
    if "OMP_NUM_THREADS" not in variables:
        variables["OMP_NUM_THREADS"] = str(max(1, available_cores() // jobs))
    if gpus and jobs > 1:
        share = gpus[slot::jobs] or [gpus[slot % len(gpus)]]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(share)
    return variables


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that a process of this environment may use, as CUDA_VISIBLE_DEVICES names them."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [one.strip() for one in given.split(",") if one.strip() not in ("", "-1")]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([program, "--list-gpus"], capture_output=True, text=True, timeout=30, check=True)
        return [str(number) for number, line in enumerate(done.stdout.splitlines()) if line.startswith("GPU ")]
    return []

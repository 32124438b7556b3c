"""Processes of one training: they end with their launcher, and it reports which of them died, and how.

Torch is not imported here: that takes seconds, and a process must be bound to its launcher before.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from lightning_attn.processes import STOP_SIGNALS, is_running

__all__ = [
    "bind_to_launcher",
    "dead_rank",
    "observe_ranks",
    "open_standard_streams",
    "settle_collectives",
    "watch_rendezvous",
]

_LAUNCHER = "LIGHTNING_ATTN_LAUNCHER"  # process that started the ranks of a training
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_GRACE = 10.0  # seconds in which the others may end on their own
_OWN_ENDS = (2, *(128 + number for number in STOP_SIGNALS))  # with a message, or because asked to
RENDEZVOUS_SECONDS = 600.0

_observed: list["_Observer"] = []


def open_standard_streams() -> None:
    """Opens standard streams that are closed, or a file of the run would get their number and their lines."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - until this process ends


def bind_to_launcher() -> None:
    """Ends this process when the one that started it as a rank of its training ends, however that ends.

    torchrun and SLURM end their processes themselves.
    """
    launcher = os.environ.get(_LAUNCHER, "")
    if os.environ.get("LOCAL_RANK", "0") in ("", "0") or "TORCHELASTIC_RUN_ID" in os.environ or not launcher:
        os.environ[_LAUNCHER] = str(os.getpid())
        return
    if launcher == str(os.getppid()) and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if launcher.isdecimal() and not is_running(int(launcher)):  # it died before that
        os._exit(1)


def watch_rendezvous(rank: int, ranks: int, seconds: float = RENDEZVOUS_SECONDS) -> None:
    """Ends this process with a message if the ranks have not found one another by then.

    torch waits for half an hour, as it does for a collective that takes long.
    """

    def end_if_alone() -> None:
        import torch.distributed as dist

        if not dist.is_initialized():
            address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
            print(
                f"error: rank {rank} of {ranks} has waited {seconds:.0f} s for the others at {address}. See what they "
                "say, whether that address can be reached from every host, and whether as many processes were started "
                "as trainer.devices and trainer.num_nodes ask for.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(2)

    timer = threading.Timer(seconds, end_if_alone)
    timer.daemon = True
    timer.start()


def settle_collectives() -> None:
    """Waits, before this process exits, until gloo's threads have dropped the tensors of the last collective.

    They need the interpreter's lock for that; if the interpreter ends meanwhile, std::terminate aborts the process
    (status 134, "terminate called without an active exception"), about one exit in ten if it follows at once.
    """
    time.sleep(0.2)


def observe_ranks(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Watches the ranks that this process has started; replaces Lightning's observer, which kills at once."""
    observer = _Observer(processes)
    _observed[:] = [observer]
    observer.start()


def dead_rank(wait: float = 3.0) -> str:
    """Which rank has died and how, if that is found within some seconds; else nothing."""
    until = time.monotonic() + wait
    while _observed:
        found = _observed[0].described()
        if found or time.monotonic() > until:
            return found
        time.sleep(0.1)
    return ""


class _Observer(threading.Thread):
    def __init__(self, processes: Sequence["subprocess.Popen[bytes]"]) -> None:
        super().__init__(daemon=True, name="rank-observer")
        self.processes = processes

    def described(self) -> str:
        """The first rank that has failed, in words."""
        for rank, process in enumerate(self.processes, start=1):
            code = process.poll()
            if code is None or code == 0:
                continue
            if code < 0:
                name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
                why = ", often for lack of memory: see the system's log" if code == -9 else ""
                return f"rank {rank} (process {process.pid}) was ended by {name}{why}"
            return f"rank {rank} (process {process.pid}) ended with exit code {code}; its own message is above"
        return ""

    def run(self) -> None:
        """Waits for a rank to fail; says so, and ends the others unless they do on their own."""
        while not (failed := self.described()):
            if all(process.poll() == 0 for process in self.processes):
                return
            time.sleep(0.5)
        codes = [code for process in self.processes if (code := process.poll())]
        quiet = all(code in _OWN_ENDS for code in codes)  # this process probably ends the same way, and prints why
        if not quiet:
            print(f"error: {failed}.", file=sys.stderr, flush=True)
        time.sleep(_GRACE)
        if quiet:
            print(f"error: {failed}.", file=sys.stderr, flush=True)
        print(
            "error: the other ranks wait for it and are ended. What was saved is complete: resume with --ckpt_path "
            "auto.",
            file=sys.stderr,
            flush=True,
        )
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.kill()
        os._exit(2)

"""Callbacks that break a training off, for tests of what is left of it."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import ClassVar

import pytorch_lightning as pl


class Crash(BaseException):
    """Nothing catches it, as nothing catches a power cut."""


class CrashAt(pl.Callback):
    """Counts the calls of its hooks, and raises `Crash` at a chosen one.

    Attributes:
        calls: The names of the hooks called so far, in order.
        at: Which call, from 1, raises.
    """

    calls: ClassVar[list[str]] = []
    at: ClassVar[int | None] = None

    def on_exception(self, trainer: pl.Trainer, *arguments: object) -> None:
        """Ends the workers: in a validation, Lightning ends its own only, and others wait for the garbage collector."""
        trainer.fit_loop.teardown()


class SignalAt(pl.Callback):
    """Sends its own process a signal in the middle of a step.

    Args:
        step: The optimizer step, from 0.
        number: The signal.
        rank: The rank that gets it.
    """

    def __init__(self, step: int, number: int, rank: int = 0) -> None:
        self.step, self.number, self.rank = step, number, rank

    def on_before_backward(self, trainer: pl.Trainer, *arguments: object) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            self.step = -1
            os.kill(os.getpid(), signal.Signals(self.number))


class LeaveAt(pl.Callback):
    """Ends its process at once in the middle of a step, without a word.

    Args:
        step: The optimizer step, from 0.
        code: The exit code.
        rank: The rank that leaves.
    """

    def __init__(self, step: int, code: int, rank: int) -> None:
        self.step, self.code, self.rank = step, code, rank

    def on_before_backward(self, trainer: pl.Trainer, *arguments: object) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os._exit(self.code)


class NoteProcess(pl.Callback):
    """Writes the number of each rank's process into the current folder."""

    def on_train_start(self, trainer: pl.Trainer, *arguments: object) -> None:
        Path(f"rank{trainer.global_rank}.pid").write_text(str(os.getpid()))


class KillWorker(pl.Callback):
    """Kills one of the processes that make batches in the middle of the second step."""

    def on_before_backward(self, trainer: pl.Trainer, *arguments: object) -> None:
        if trainer.global_step == 1:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


class RemoveFile(pl.Callback):
    """Removes a file in the middle of the second step.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_before_backward(self, trainer: pl.Trainer, *arguments: object) -> None:
        if trainer.global_step == 1:
            self.path.unlink(missing_ok=True)


class RemoveDirectory(pl.Callback):
    """Removes the run directory in the middle of a training, a test or a prediction."""

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: object) -> None:
        shutil.rmtree(trainer.default_root_dir, ignore_errors=True)

    on_test_batch_end = on_predict_batch_end = on_train_batch_end


def _hook(name):
    def call(self, trainer, *arguments, **options):
        if trainer.sanity_checking:
            return
        CrashAt.calls.append(name)
        if len(CrashAt.calls) == CrashAt.at:
            raise Crash(f"{name} at step {trainer.global_step}")

    return call


for _name in (
    *("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_backward"),
    *("on_before_optimizer_step", "on_before_zero_grad", "on_train_batch_end", "on_train_epoch_end"),
    *("on_validation_start", "on_validation_epoch_start", "on_validation_batch_end", "on_validation_epoch_end"),
    *("on_validation_end", "on_save_checkpoint"),
):
    setattr(CrashAt, _name, _hook(_name))

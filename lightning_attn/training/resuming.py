"""Stopping and resuming a training, with bitwise identical results: `last.ckpt`, random streams, signals."""

import contextlib
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from lightning_attn.processes import STOP_SIGNALS, stop_signals
from lightning_attn.training.callback_states import require_callback_states
from lightning_attn.training.checkpoint_keys import (
    CALLBACKS_KEY,
    LINES_KEY,
    LOOPS_KEY,
    OPTIMIZERS_KEY,
    RANDOM_STREAMS_KEY,
    SCHEDULES_KEY,
    STEP_KEY,
)
from lightning_attn.training.checkpoints import CheckpointError
from lightning_attn.training.contents import ContentsError, require_optimizer_state, require_same_structure
from lightning_attn.training.loggers import MetricsLogger
from lightning_attn.training.optimization import complete_momentum

_FIT_LOOP = "fit_loop"  # of LOOPS_KEY: that of the training

Change = Callable[[dict[str, Any], pl.Trainer], None]
Handler = Callable[[int, FrameType | None], Any] | int | None


class TrainingStopped(Exception):  # noqa: N818 - no error: it was asked for
    """A training was asked to stop by a signal, and has saved its state.

    Attributes:
        signal_number: Which signal.
        checkpoint: Where the state is.
        step: Optimizer steps done.
    """

    def __init__(self, signal_number: int, checkpoint: Path, step: int) -> None:
        self.signal_number, self.checkpoint, self.step = signal_number, checkpoint, step
        name = "Ctrl-C" if signal_number == signal.SIGINT else signal.Signals(signal_number).name
        super().__init__(
            f"Stopped by {name} after step {step}; its state is in {checkpoint}. To resume, give the same command "
            "with --ckpt_path last."
        )


class StopRequests:
    """Signals that ask a training to stop, remembered until it can: SIGTERM, SIGHUP, Ctrl-C, and SLURM's to requeue.

    A second Ctrl-C stops at once. Lightning's own handlers are set aside meanwhile: they save or raise wherever the
    program happens to be, in the middle of a step too. Under SLURM, its handler that requeues the job runs as soon as
    the step is over.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._earlier: dict[int, Handler] = {}
        self._group: Any = None

    def watch(self, trainer: pl.Trainer) -> None:
        """Begins to watch; in the main thread only, elsewhere Python has no signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        numbers: list[int] = stop_signals()
        environment = trainer._accelerator_connector.cluster_environment
        if sys.platform != "win32" and isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            numbers.append(environment.requeue_signal or signal.SIGUSR1)
        self._earlier = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            signal.signal(number, self._receive)
        if trainer.world_size > 1:
            # On GPUs, the training's own group would make every step wait for the device.
            self._group = dist.new_group(backend="gloo")

    def forget(self) -> None:
        """Ends watching."""
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._earlier, self.received = {}, None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = number
            # Not print: the signal may have come in the middle of another one.
            with contextlib.suppress(OSError):
                os.write(2, b"\nStopping after this step; the state will be saved. Ctrl-C stops at once.\n")

    def agreed(self) -> int | None:
        """The signal that any rank received; a collective operation."""
        if self._group is not None:
            number = torch.tensor(self.received or 0)
            dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
            self.received = int(number) or None
        return self.received

    def requeue(self) -> None:
        """Runs SLURM's handler, if its signal was received."""
        handler = self._earlier.get(self.received or 0)
        if self.received is not None and self.received not in STOP_SIGNALS and callable(handler):
            handler(self.received, None)


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`, the newest state: around validations, at ends of epochs, every n steps, when asked to stop.

    A run resumed from it is bitwise identical to one without interruption, with every value logged once. That decides
    the moments: a step's values are logged after the hooks at its end, so it is saved before the next step begins; the
    gradients of half a step are in no checkpoint, so a validation between accumulated batches is no moment; and an
    epoch that `max_steps` cuts short is not marked as done. What Lightning notes about its loops is set to what it
    would note after the previous step.

    Args:
        directory: The run directory.
        every_n_steps: Also save at every so many optimizer steps; 0 for not.

    Raises:
        TrainingStopped: Once a request to stop has been followed.
    """

    def __init__(self, directory: Path, every_n_steps: int = 0) -> None:
        self.path = directory / "last.ckpt"
        self.every_n_steps = every_n_steps
        self.requests = StopRequests()
        self._due = False
        self._postponed = False  # from within a step to its end
        self._saved_step = -1
        self._change: Change | None = None

    # Moments

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._due, self._postponed, self._saved_step = False, False, trainer.global_step
        self.requests.watch(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.requests.forget()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes whether this step is to be saved; accumulated batches before it are no step."""
        if _within_step(trainer):
            return
        periodic = bool(self.every_n_steps) and trainer.global_step % self.every_n_steps == 0
        asked = self.requests.agreed() is not None
        # A run that has done its last step is not resumed, so what could fail in its last validation is saved before.
        before_last = trainer.global_step == trainer.max_steps - 1
        self._due, self._postponed = periodic or asked or before_last or self._postponed, False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves the previous step, if that is due."""
        if self._due:
            self._save(trainer, _before_batch)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves before a validation, which may fail or take too long; when resumed, it is run."""
        if not _is_training(trainer) or _within_step(trainer):
            return
        # A validation that was started, saved and repeated counts once.
        trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()
        # Lightning ends at once when a run that has reached its last step is resumed.
        if trainer.global_step != trainer.max_steps:
            self._save(trainer, _before_validation)

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stops within a validation, if no other rank waits for its end."""
        saved = self._saved_step == trainer.global_step and trainer.global_step != trainer.max_steps
        if _is_training(trainer) and trainer.world_size == 1 and self.requests.received and saved:
            self._stop(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _is_training(trainer):
            return
        if _within_step(trainer):
            self._postponed = True
        else:
            self._save(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        whole = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self._save(trainer, _between_epochs if whole else _cut_short)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adapts what is noted about the loops to the moment, and notes how many lines `metrics.csv` has."""
        if self._change is not None:
            self._change(checkpoint[LOOPS_KEY][_FIT_LOOP], trainer)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsLogger):
                checkpoint[LINES_KEY] = logger.lines

    def _save(self, trainer: pl.Trainer, change: Change | None = None) -> None:
        self._due, self._change = False, change
        try:
            for logger in trainer.loggers:
                logger.save()  # or what was logged before the checkpoint could be lost and would not come again
            trainer.save_checkpoint(self.path, weights_only=False)
            self._saved_step = trainer.global_step
            if self.requests.agreed() is not None:
                self.requests.requeue()  # which saves once more
                self._stop(trainer)
        finally:
            self._change = None
        if trainer.is_global_zero:
            for older in self.path.parent.glob("hpc_ckpt_*.ckpt"):  # SLURM's handler wrote it
                older.unlink(missing_ok=True)

    def _stop(self, trainer: pl.Trainer) -> None:
        assert self.requests.received is not None
        raise TrainingStopped(self.requests.received, self.path, trainer.global_step)


def _is_training(trainer: pl.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def _within_step(trainer: pl.Trainer) -> bool:
    """Whether the gradients of an optimizer step are still being accumulated."""
    accumulates: bool = trainer.fit_loop._should_accumulate()
    return accumulates


# What is noted about Lightning's loops, and how it has to differ for the moment at which it is saved.


def _before_batch(loops: dict[str, Any], trainer: pl.Trainer) -> None:
    """The next batch has been fetched, and is noted as started."""
    progress = loops["epoch_loop.batch_progress"]
    for count in (progress["current"], progress["total"]):
        count["ready"] -= 1
    progress["is_last_batch"] = False


def _before_validation(loops: dict[str, Any], trainer: pl.Trainer) -> None:
    """Lightning repeats a validation, from its start, of which a batch was started and not finished."""
    total = loops["epoch_loop.val_loop.batch_progress"]["total"]
    total["ready"] += 1
    total["started"] += 1


def _between_epochs(loops: dict[str, Any], trainer: pl.Trainer) -> None:
    """The next epoch has started: Lightning continues in one that is over if no validation was due at its end."""
    for count in (loops["epoch_progress"]["current"], loops["epoch_progress"]["total"]):
        count["completed"] = count["processed"]
        count["ready"] += 1
        count["started"] += 1
    loops["epoch_loop.batch_progress"]["is_last_batch"] = False
    of_epoch = [loops["epoch_loop.batch_progress"]["current"], loops["epoch_loop.scheduler_progress"]["current"]]
    optimization = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    of_epoch += [progress["current"] for progress in optimization.values()]
    of_epoch.append(loops["epoch_loop.val_loop.batch_progress"]["total"])
    for count in of_epoch:
        count.update(dict.fromkeys(count, 0))


def _cut_short(loops: dict[str, Any], trainer: pl.Trainer) -> None:
    """The epoch is noted as done."""
    for count in (loops["epoch_progress"]["current"], loops["epoch_progress"]["total"]):
        count["processed"] -= 1


class _StepNumber(Callback):
    """Numbers what is logged from the first batch of a resumed training on by its optimizer steps.

    Lightning's own count is one too high or too low if a validation is due at one of the two moments, of saving and of
    resuming, and not at the other, or if the checkpoint was written between a step's end and its being counted.
    """

    def __init__(self) -> None:
        self._done = False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._done:
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self._done = True


class ExactResume(Callback):
    """Restores what Lightning does not: random streams of all ranks, and options of the optimizer that were changed.

    It also refuses states of optimizer, schedule, loops and callbacks that do not fit, before Lightning restores them.
    Every task brings it. Random streams are those of Python, NumPy and torch on the CPU and on the rank's GPU; they are
    restored right before training continues. With another number of ranks they are not, and a message says so.
    """

    def __init__(self) -> None:
        self._streams: list[dict[str, Any]] | None = None
        self._resumed = False
        self._reported = False
        self._states: dict[str, Any] = {}

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        streams: list[Any] = [random_streams(pl_module.device)]
        if trainer.world_size > 1:
            streams *= trainer.world_size
            dist.all_gather_object(streams, streams[0])
        checkpoint[RANDOM_STREAMS_KEY] = streams

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the random streams until training continues, and refuses states of callbacks that do not fit.

        Raises:
            CheckpointError: If one does not.
        """
        with _fitting(trainer.ckpt_path):
            require_callback_states(checkpoint.get(CALLBACKS_KEY, {}), trainer.callbacks)  # type: ignore[attr-defined]
        self._streams, self._resumed, self._states = checkpoint.get(RANDOM_STREAMS_KEY), True, checkpoint

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses states that do not fit; Lightning restores them next.

        Raises:
            CheckpointError: If one does not.
        """
        states, self._states = self._states, {}
        if not states:
            return
        with _fitting(trainer.ckpt_path):
            _require_list(OPTIMIZERS_KEY, states, len(trainer.optimizers))
            for number, optimizer in enumerate(trainer.optimizers):
                key = f"{OPTIMIZERS_KEY}[{number}]"
                missing = require_optimizer_state(key, states[OPTIMIZERS_KEY][number], optimizer)
                if missing:
                    rank_zero_info(f"The checkpoint's {key} has none for {missing} parameters: theirs starts anew.")
            _require_list(SCHEDULES_KEY, states, len(trainer.lr_scheduler_configs))
            for number, config in enumerate(trainer.lr_scheduler_configs):
                current = config.scheduler.state_dict()
                stored = states[SCHEDULES_KEY][number]
                require_same_structure(f"{SCHEDULES_KEY}[{number}]", stored, current, counts=False)
                _require_schedule_step(f"{SCHEDULES_KEY}[{number}]", stored, config, states[STEP_KEY])
            plugin = trainer.precision_plugin
            scaler, current = states.get(type(plugin).__qualname__), plugin.state_dict()
            if scaler and current:
                require_same_structure(type(plugin).__qualname__, scaler, current)
            _require_loops(states.get(LOOPS_KEY, {}).get(_FIT_LOOP), trainer.fit_loop.state_dict())

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives the optimizer the current options, and its state the memory format of the weights, if others were."""
        if self._resumed:
            for optimizer in trainer.optimizers:
                _match_memory_format(optimizer)
            if pl_module.automatic_optimization:  # its steps are those that Lightning counts
                # Before the others: the monitor of learning rates logs at the start of a batch.
                trainer.callbacks = [_StepNumber(), *trainer.callbacks]  # type: ignore[attr-defined]
        fresh = getattr(pl_module, "fresh_optimizer_groups", None)
        if not self._resumed or not fresh:
            return
        for group, options in zip(trainer.optimizers[0].param_groups, fresh, strict=True):
            group.update(options)
        if _has_momentum(trainer.optimizers[0]):
            complete_momentum(trainer.optimizers[0])
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(scheduler, LambdaLR), "what the base class of tasks makes"
        scheduler.base_lrs = [options["initial_lr"] for options in fresh]
        rates = [
            base * factor(scheduler.last_epoch)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(trainer.optimizers[0].param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._restore(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _is_training(trainer):
            self._restore(trainer, pl_module)

    def _restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        streams, self._streams = self._streams, None
        if streams is None:
            if self._resumed and not self._reported:
                rank_zero_info("The checkpoint holds no states of random generators: new ones are used.")
            self._reported = self._resumed
            return
        self._reported = True
        if len(streams) != trainer.world_size:
            rank_zero_info(
                f"The checkpoint holds the random streams of {len(streams)} ranks, and there are {trainer.world_size}: "
                "new ones are used."
            )
            return
        set_random_streams(streams[trainer.global_rank], pl_module.device)


def _match_memory_format(optimizer: Optimizer) -> None:
    """Lays the optimizer's state out as its parameters: fused kernels read both in the order of memory."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _has_momentum(optimizer: Optimizer) -> bool:
    return any(state.get("momentum_buffer") is not None for state in optimizer.state.values())


@contextlib.contextmanager
def _fitting(path: object) -> Iterator[None]:
    """Makes one kind of error, which names the checkpoint, of what does not fit."""
    try:
        yield
    except ContentsError as error:
        raise CheckpointError(f"{path or 'The checkpoint'} {error}. Use another checkpoint of the same run.") from error


def _require_schedule_step(key: str, stored: dict[str, Any], config: LRSchedulerConfig, steps: int) -> None:
    """Refuses a schedule that is at another step than the training: its rates would be other ones, or negative."""
    step = stored.get("last_epoch", 0)
    by_step = config.interval == "step" and config.frequency == 1 and isinstance(config.scheduler, LambdaLR)
    if not 0 <= step <= steps or (by_step and step != steps):
        raise ContentsError(f"is damaged: {key}.last_epoch is {str(step)[:40]}, and the training is at step {steps}")


def _require_list(key: str, states: dict[str, Any], number: int) -> None:
    if len(states.get(key, ())) != number:
        raise ContentsError(f"is damaged: {key} has {len(states.get(key, ()))} entries, and not {number}")


def _require_loops(stored: Any, current: dict[str, Any]) -> None:
    """Compares the counts of Lightning's loops; the place in the data is checked by the data's loader."""
    if not isinstance(stored, dict) or stored.keys() != current.keys():
        raise ContentsError(f"is damaged: {LOOPS_KEY}.{_FIT_LOOP} is not that of a training")
    place = stored.get("state_dict")
    if not isinstance(place, dict) or not isinstance(place.get("combined_loader", []), list):
        raise ContentsError(f"is damaged: {LOOPS_KEY}.{_FIT_LOOP}.state_dict holds no places in the data")
    for name, value in current.items():
        if name == "state_dict":
            continue
        if name == "epoch_loop.state_dict":  # empty before the first step
            value = {"_batches_that_stepped": 0} if stored[name] else value
        require_same_structure(f"{LOOPS_KEY}.{_FIT_LOOP}.{name}", stored[name], value)


def random_streams(device: torch.device) -> dict[str, Any]:
    """The random streams of this process, as tensors and plain values.

    Args:
        device: The GPU whose stream is one of them, or the CPU.
    """
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    streams: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        streams["cuda"] = torch.cuda.get_rng_state(device)
    return streams


def set_random_streams(streams: dict[str, Any], device: torch.device) -> None:
    """Sets the random streams of this process to what `random_streams` returned."""
    version, words, gauss = streams["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = streams["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(streams["torch"])
    if device.type == "cuda" and "cuda" in streams:
        torch.cuda.set_rng_state(streams["cuda"], device)

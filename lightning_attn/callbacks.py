"""Callbacks of the command: progress, averaged weights, and the resolved configuration."""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar, Timer, WeightAveraging
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from lightning_attn import __version__, run_directory
from lightning_attn.files import write_text
from lightning_attn.loggers import logger_ids
from lightning_attn.tasks.base import BaseTask
from lightning_attn.training.checkpoints import CHECKPOINT_KEY, load_initial_weights, read_checkpoint

RUN_KEY = "run"


class BestCheckpoint(ModelCheckpoint):
    """`best.ckpt` by a monitored score; the latest network, with a word about it, as long as the score is not a number.

    A score is NaN where there is nothing to score, such as validation images without any object.
    """

    _told = False
    best_step = 0

    def state_dict(self) -> dict[str, Any]:
        """Also the step of the best score."""
        return super().state_dict() | {"best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also takes the score of the last time, which Lightning leaves out."""
        super().load_state_dict(state_dict)
        if self.dirpath == state_dict.get("dirpath", self.dirpath):
            self.current_score = state_dict.get("current_score")
            self.best_step = state_dict.get("best_step", 0)

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Whether the network is to be saved."""
        if current is None or not torch.isnan(current):
            better = super().check_monitor_top_k(trainer, current)
            self.best_step = trainer.global_step if better else self.best_step
            return better
        if not self._told:
            rank_zero_info(
                f"{self.monitor} is not a number: the validation data has nothing to score, such as images without any "
                "object. best.ckpt is the latest network until there is a score."
            )
        self._told = True
        return self.best_model_score is None or not bool(torch.isfinite(self.best_model_score))


class TopCheckpoints(ModelCheckpoint):
    """The best few networks beside `best.ckpt`, as `top-<step>.ckpt`."""

    @property
    def state_key(self) -> str:
        """Its own, so that others may watch the same score."""
        return type(self).__name__


class TrainingSummary(Callback):
    """Says at the end of a training why it ended, what the best score is, and what to do next.

    Args:
        directory: The run directory.
        command: How the command is called, such as "python train.py".
        trust: Packages of the user's own that the checkpoints name.
    """

    def __init__(self, directory: Path, command: str, trust: Sequence[str] = ()) -> None:
        self.directory, self.command, self.trust = directory, command, trust

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says it."""
        lines = [f"Training ended at step {trainer.global_step}: {_why_it_ended(trainer)}."]
        best = next((one for one in trainer.checkpoint_callbacks if isinstance(one, BestCheckpoint)), None)
        file = "last.ckpt"
        if best is not None and best.best_model_score is not None and (self.directory / "best.ckpt").is_file():
            file = "best.ckpt"
            at = f" at step {best.best_step}" if best.best_step else ""
            lines.append(f"Best {best.monitor} {float(best.best_model_score):.5g}{at}: {self.directory / file}")
        else:
            lines.append(f"There is no best.ckpt: {_why_no_best(trainer)}. The last network: {self.directory / file}")
        trusted = "".join(f" --trust {package}" for package in self.trust)
        names = [stage for stage in ("test", "predict") if _defines(pl_module, f"{stage}_step")]
        lines += [
            f"Next: {self.command} {stage} --ckpt_path {shlex.quote(str(self.directory / file))}{trusted}"
            for stage in names
        ]
        rank_zero_info("\n".join(lines))


def _defines(module: pl.LightningModule, name: str) -> bool:
    return getattr(type(module), name) is not getattr(pl.LightningModule, name)


def _why_it_ended(trainer: pl.Trainer) -> str:
    for callback in trainer.early_stopping_callbacks:
        if callback.stopped_epoch or (trainer.should_stop and callback.wait_count >= callback.patience):
            return f"{callback.monitor} was not better in {callback.patience} validations (EarlyStopping)"
    if 0 <= trainer.max_steps <= trainer.global_step:
        return f"max_steps {trainer.max_steps} is reached"
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch:
        return f"max_epochs {trainer.max_epochs} is reached"
    if any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return "max_time is over"
    return "a callback stopped it" if trainer.should_stop else "there was nothing left to do"


def _why_no_best(trainer: pl.Trainer) -> str:
    if not sum(trainer.num_val_batches):
        return "there is no validation (data without a validation split, or limit_val_batches 0)"
    if not any(name.startswith("val/") for name in trainer.callback_metrics):
        every = trainer.val_check_interval
        return f"no validation took place in {trainer.global_step} steps (val_check_interval {every})"
    return "no score was a number"


class _Clock:
    """How long the rest of a training will take."""

    def start(self, trainer: pl.Trainer) -> None:
        self._since = time.perf_counter()
        self._first_step = trainer.global_step

    def left(self, trainer: pl.Trainer) -> str:
        """The time to the last step at the mean speed so far, validations included."""
        done = trainer.global_step - self._first_step
        total = trainer.estimated_stepping_batches - self._first_step
        if not done or total == float("inf"):
            return "unknown"
        return f"{(time.perf_counter() - self._since) * (total - done) / done / 60:.1f} min"


class TrainingBar(RichProgressBar):
    """Lightning's progress bar with the time that is left of the whole training, not of the epoch alone."""

    def __init__(self) -> None:
        super().__init__()
        self._clock = _Clock()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._clock.start(trainer)
        super().on_train_start(trainer, pl_module)

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The logged values, the step and the time left."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        if trainer.training:
            items["step"] = f"{trainer.global_step}/{trainer.estimated_stepping_batches}"
            items["ETA"] = self._clock.left(trainer)
        return items

    def _get_train_description(self, current_epoch: int) -> str:
        # Lightning writes "Epoch 0/-2" where the number of epochs follows from the number of steps.
        return f"Epoch {current_epoch}"


class ProgressLines(Callback):
    """Prints a line now and then, where the output is a file or a pipe and a progress bar would be noise.

    Args:
        every_seconds: Least time between two lines.
    """

    def __init__(self, every_seconds: float = 30.0) -> None:
        self.every_seconds = every_seconds
        self._clock = _Clock()
        self._printed = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._clock.start(trainer)
        self._printed = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prints step, metrics of the progress bar, and the time that is left."""
        now = time.perf_counter()
        if now - self._printed < self.every_seconds:
            return
        self._printed = now
        step = f"{trainer.global_step}/{trainer.estimated_stepping_batches}"
        self._print(f"epoch {trainer.current_epoch} step {step} ETA {self._clock.left(trainer)} {_metrics(trainer)}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the metrics of a validation."""
        if not trainer.sanity_checking:
            # An evaluation of its own does not count steps.
            step = f" at step {trainer.global_step}" if trainer.state.fn == TrainerFn.FITTING else ""
            self._print(f"validated{step} {_metrics(trainer)}")

    @staticmethod
    @rank_zero_only
    def _print(line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _metrics(trainer: pl.Trainer) -> str:
    values = trainer.progress_bar_metrics
    return " ".join(f"{name} {value:.5g}" for name, value in values.items() if isinstance(value, float | int))


class _Averaging(WeightAveraging):
    """Lightning's averaging of weights and buffers, in a second copy of the module, with three things mended.

    Lightning swaps the average in for validation, saves it as a checkpoint's `state_dict` (and what training goes on
    with as `current_model_state`), and leaves it in the module after training. But until the first step that counts its
    copy has the weights from before the training; here it follows the current ones. It makes the copy before the module
    is moved to its device, and then fetches all weights to the CPU at every step; here the copy moves too. And it
    averages integers and, with rounding errors, what is frozen.
    """

    def __init__(self) -> None:
        super().__init__(multi_avg_fn=self._move)

    def share(self, number: int) -> float:
        """Share of the current weights in the new average, when `number` (at least 1) were averaged before."""
        raise NotImplementedError

    @torch.no_grad()
    def _move(self, averages: list[Tensor], currents: list[Tensor], number: Tensor | int) -> None:
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, currents, self.share(int(number)))  # exact where both are equal
        else:
            torch._foreach_copy_(averages, currents)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Moves the average to where the module is by now."""
        self._average.to(pl_module.device)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swaps the average in."""
        if self._average_model is not None:
            self._follow(pl_module)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Makes the average the checkpoint's `state_dict`."""
        if self._average_model is not None:
            self._follow(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the average in the module."""
        self._follow(pl_module)
        super().on_train_end(trainer, pl_module)

    @property
    def _average(self) -> AveragedModel:
        assert self._average_model is not None, "made by `setup` when training begins"
        return self._average_model

    def _follow(self, pl_module: pl.LightningModule) -> None:
        if self._average.n_averaged == 0:
            self._average.update_parameters(pl_module)  # the first time, a plain copy
            self._average.n_averaged.zero_()


class ExponentialAveraging(_Averaging):
    """The exponential moving average of the weights, which forgets its beginning: EMA.

    After each optimizer step, average = d * average + (1 - d) * weights. The decay d of update n is
    min(decay, (1 + n) / (10 + n)), so that in a short training too the average is one of recent weights: 0.999 is
    reached at step 9,000, and after 100 steps half of the average comes from the last 8. Lightning's own
    `EMAWeightAveraging` has d = `decay` from the second step on.

    Statistics of BatchNorm are averaged like weights; integers, such as the number of batches they are from, are the
    current ones. What is frozen stays as it is, to the last bit. Validation, tests and checkpoints use the average;
    training goes on with its own weights.

    Args:
        decay: Largest decay; 0.999 averages over about the last 1,000 steps.
        warmup: Whether the decay grows as above; else it is `decay` throughout.

    Raises:
        ValueError: If the decay is not between 0 and 1.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}; usual are 0.99 to 0.9999.")
        super().__init__()
        self.decay, self.warmup = decay, warmup

    def share(self, number: int) -> float:
        """1 - d for the update that follows `number` others."""
        return 1 - (min(self.decay, (1 + number) / (10 + number)) if self.warmup else self.decay)


class CheckpointAveraging(_Averaging):
    """The equal mean of the weights at some steps, as "averaging the last checkpoints" without keeping them.

    Validation, tests and checkpoints use the mean from the first of these steps on, and the current weights before;
    training goes on with its own weights. Vaswani et al. 2017 average the last five checkpoints.

    Args:
        start_step: The first optimizer step whose weights count.
        every_n_steps: Steps from one that counts to the next.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(self, start_step: int, every_n_steps: int = 1000) -> None:
        if start_step < 1 or every_n_steps < 1:
            raise ValueError(f"start_step and every_n_steps must be at least 1, got {start_step} and {every_n_steps}.")
        super().__init__()
        self.start_step, self.every_n_steps = start_step, every_n_steps

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether the weights after the optimizer step `step_idx` (from 0) count."""
        since = -1 if step_idx is None else step_idx + 1 - self.start_step
        return since >= 0 and since % self.every_n_steps == 0

    def share(self, number: int) -> float:
        """The same for all."""
        return 1 / (number + 1)


class InterruptionNote(Callback):
    """Says what a prediction or test has left when it is broken off by Ctrl-C or a signal."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Says it."""
        assert isinstance(pl_module, BaseTask)
        if isinstance(exception, KeyboardInterrupt | SystemExit):
            note = pl_module.interrupted_note()
            if note and trainer.is_global_zero:
                print(f"\n{note}", file=sys.stderr, flush=True)


class InitialWeights(Callback):
    """Begins a training with the weights of a checkpoint; see `load_initial_weights`.

    Args:
        path: The checkpoint, or what the task's `foreign_weights` knows.
        strict: Whether all of it must fit.
    """

    def __init__(self, path: str, strict: bool) -> None:
        self.path, self.strict = path, strict

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copies the weights."""
        assert isinstance(pl_module, BaseTask)
        foreign = pl_module.foreign_weights(self.path)
        stored = None
        if foreign is None:
            checkpoint = read_checkpoint(self.path)
            if checkpoint.get(CHECKPOINT_KEY, {}).get("name") == pl_module.task_name:
                stored = pl_module.matched_weights(checkpoint, self.path, strict=self.strict)
        load_initial_weights(pl_module, self.path, strict=self.strict, foreign=foreign, stored=stored)


class SaveConfiguration(Callback):
    """Keeps the resolved configuration of a run: as `config_<stage>.yaml`, never over another one, and in checkpoints.

    Args:
        directory: The run directory.
        subcommand: fit, validate, test or predict.
        configuration: Every option, as plain values.
    """

    def __init__(self, directory: Path, subcommand: str, configuration: dict[str, Any]) -> None:
        self.directory, self.subcommand, self.configuration = directory, subcommand, configuration
        self._written = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Now that the checkpoint fits, writes the file once, on rank 0, unless it is there already."""
        if not trainer.is_global_zero or self._written:
            return
        self._written = True
        header = f"# lightning_attn {__version__}: train.py {self.subcommand}\n"
        text = header + yaml.safe_dump(self.configuration, sort_keys=False, allow_unicode=True)
        name = f"config_{self.subcommand}"
        if all(path.read_bytes() != text.encode() for path in self.directory.glob(f"{name}*.yaml")):
            write_text(self.directory / f"{name}.yaml", text)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stores the configuration, and what it ran with."""
        checkpoint[RUN_KEY] = {
            "name": self.directory.name,
            "configuration": self.configuration,
            "origin": run_directory.origin(),
            "logger_ids": logger_ids(trainer.loggers),
        }

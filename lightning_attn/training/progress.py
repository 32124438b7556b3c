"""Progress of a training: a bar or lines with the time left, and a summary at its end."""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelSummary, RichProgressBar, Timer
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from lightning_attn.training.callbacks import BestCheckpoint


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
    """Lightning's progress bar with the time left for the training, not only for the epoch.

    In training, what is logged is read twice a second: reading it at every step would make the host wait for a GPU.
    """

    _EVERY_SECONDS = 0.5

    def __init__(self) -> None:
        super().__init__()
        self._clock = _Clock()
        self._items: dict[str, int | str | float | dict[str, float]] = {}
        self._read_at = 0.0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock.start(trainer)
        self._read_at = 0.0
        super().on_train_start(trainer, pl_module)

    @override
    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        now = time.perf_counter()
        if trainer.training and now - self._read_at < self._EVERY_SECONDS:
            return self._items
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        if trainer.training:
            items["step"] = f"{trainer.global_step}/{trainer.estimated_stepping_batches}"
            items["ETA"] = self._clock.left(trainer)
            self._items, self._read_at = items, now
        return items

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read_at = 0.0
        super().on_train_epoch_end(trainer, pl_module)

    @override
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

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock.start(trainer)
        self._printed = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if now - self._printed < self.every_seconds:
            return
        self._printed = now
        step = f"{trainer.global_step}/{trainer.estimated_stepping_batches}"
        self._print(f"epoch {trainer.current_epoch} step {step} ETA {self._clock.left(trainer)} {_metrics(trainer)}")

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:  # the command validate prints all
            self._print(f"validated at step {trainer.global_step} {_metrics(trainer)}")

    @staticmethod
    @rank_zero_only
    def _print(line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _metrics(trainer: pl.Trainer) -> str:
    values = trainer.progress_bar_metrics
    return " ".join(f"{name} {value:.5g}" for name, value in values.items() if isinstance(value, float | int))


class NetworkSummary(ModelSummary):
    """Prints the parts of the network and their parameters before a training.

    Lightning's own also says "Total FLOPs: 0", since it counts none without an example of the input; `profile` counts.
    """

    @staticmethod
    @override
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        columns = [(name, values) for name, values in summary_data if total_flops or name != "FLOPs"]
        table = Table()
        for name, _ in columns:
            table.add_column(name, justify="right" if name.startswith(("Params", "FLOPs")) else "left")
        for row in zip(*(values for _, values in columns), strict=True):
            table.add_row(*row)
        console = Console()
        console.print(table)
        frozen = total_parameters - trainable_parameters
        of_these = f", {frozen:,} of them frozen" if frozen else ", all trained"
        console.print(f"{total_parameters:,} parameters{of_these} ({model_size:.1f} MB)", highlight=False)


class TrainingSummary(Callback):
    """Reports at the end of a training why it ended, the best score, and the next commands; before it, what will lack.

    Args:
        directory: The run directory.
        command: How the command is called, such as "python train.py".
        trust: Packages of the user's own that the checkpoints name.
    """

    def __init__(self, directory: Path, command: str, trust: Sequence[str] = ()) -> None:
        self.directory, self.command, self.trust = directory, command, trust
        self._started = False

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = True
        if not sum(trainer.num_val_batches):
            rank_zero_info(f"No best.ckpt will be written, as {_NO_VALIDATION}: last.ckpt is the result.")

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        lines = [f"Training ended at step {trainer.global_step}: {_why_it_ended(trainer)}."]
        if not self._started:  # the checkpoint is that of a finished training
            lines = [
                f"Nothing was trained: at step {trainer.global_step}, {_why_it_ended(trainer)}. "
                "Raise --trainer.max_steps or --trainer.max_epochs to go on."
            ]
        file = "last.ckpt"
        for best in (one for one in trainer.checkpoint_callbacks if isinstance(one, BestCheckpoint)):
            name = f"{best.filename}.ckpt"
            if best.best_model_score is not None and (self.directory / name).is_file():
                file = name if name == "best.ckpt" else file
                at = f" at step {best.best_step}" if best.best_step else ""
                lines.append(f"Best {best.monitor} {float(best.best_model_score):.5g}{at}: {self.directory / name}")
        if file == "last.ckpt":
            lines.append(f"There is no best.ckpt: {_why_no_best(trainer)}. The last network: {self.directory / file}")
        trusted = "".join(f" --trust {package}" for package in self.trust)
        names = [stage for stage in ("test", "predict") if _defines(pl_module, f"{stage}_step")]
        lines += [
            f"Next: {self.command} {stage} --ckpt_path {shlex.quote(str(self.directory / file))}{trusted}"
            for stage in names
        ]
        rank_zero_info("\n".join(lines))


def print_gradients(means: Mapping[str, Mapping[str, float | None]], steps: int) -> None:
    """Prints how the gradients of several losses compare.

    Args:
        means: From `GradientSummary`.
        steps: How many steps they are of.
    """
    table = Table(title=f"Gradients in the backbone, mean of {steps} logged steps", title_justify="left")
    table.add_column("task")
    for column in ("share of the norm", "weight", "cosine", "cosines below 0"):
        table.add_column(column, justify="right")
    for name, one in means.items():
        share, weight, cosine, negative = (
            one[key] for key in ("gradient_share", "weight", "cosine", "negative_cosines")
        )
        table.add_row(
            name,
            "-" if share is None else f"{share:.0%}",
            f"{weight:.3g}",
            "-" if cosine is None else f"{cosine:.2f}",
            "-" if negative is None else f"{negative:.0%}",
        )
    Console().print(table)


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


_NO_VALIDATION = "there is no validation (data without a validation split, or limit_val_batches 0)"


def _why_no_best(trainer: pl.Trainer) -> str:
    if not sum(trainer.num_val_batches):
        return _NO_VALIDATION
    if not any(name.startswith("val/") for name in trainer.callback_metrics):
        every = trainer.val_check_interval
        return f"no validation took place in {trainer.global_step} steps (val_check_interval {every})"
    return "no score was a number"

"""Callbacks of every run: which checkpoints are kept, initial weights, and the resolved configuration."""

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_attn import __version__
from lightning_attn.archives import forget_readings
from lightning_attn.io import write_text
from lightning_attn.training import run_directory
from lightning_attn.training.checkpoint_keys import RUN_KEY, StoredRun
from lightning_attn.training.loggers import logger_ids
from lightning_attn.training.task_protocol import TrainableTask


class BestCheckpoint(ModelCheckpoint):
    """`best.ckpt` by a monitored score; the latest network, with a message, as long as the score is not a number.

    A score is NaN where there is nothing to score, such as validation images without any object.
    """

    _reported = False
    best_step = 0

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"best_step": self.best_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also restores the last score, which Lightning leaves out."""
        super().load_state_dict(state_dict)
        if self.dirpath == state_dict.get("dirpath", self.dirpath):
            self.current_score = state_dict.get("current_score")
            self.best_step = state_dict.get("best_step", 0)

    @override
    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        if current is None or not torch.isnan(current):
            better = super().check_monitor_top_k(trainer, current)
            self.best_step = trainer.global_step if better else self.best_step
            return better
        if not self._reported:
            rank_zero_info(
                f"{self.monitor} is not a number: the validation data has nothing to score, such as images without any "
                "object. best.ckpt is the latest network until there is a score."
            )
        self._reported = True
        return self.best_model_score is None or not bool(torch.isfinite(self.best_model_score))


class MemberCheckpoint(BestCheckpoint):
    """The best network for one task of a joint training; none where the task has no validation data."""

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor in trainer.callback_metrics:
            super().on_validation_end(trainer, pl_module)


class TopCheckpoints(ModelCheckpoint):
    """The best few networks beside `best.ckpt`, as `top-<step>.ckpt`."""

    @override
    @property
    def state_key(self) -> str:
        """Its own, so that others may watch the same score."""
        return type(self).__name__


class InterruptionNote(Callback):
    """Reports what a prediction or test has written when Ctrl-C or a signal interrupts it."""

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, TrainableTask)
        if isinstance(exception, KeyboardInterrupt | SystemExit):
            note = pl_module.interrupted_note()
            if note and trainer.is_global_zero:
                print(f"\n{note}", file=sys.stderr, flush=True)


class InitialWeights(Callback):
    """Starts a training with the weights of a checkpoint; see `load_initial_weights`.

    Args:
        path: The checkpoint, or what the task knows of other libraries.
        strict: Whether all of it must fit.
    """

    def __init__(self, path: str, strict: bool) -> None:
        self.path, self.strict = path, strict

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainableTask)
        pl_module.take_initial_weights(self.path, strict=self.strict)
        forget_readings()


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

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the file once, on rank 0, unless it exists; not before, as the checkpoint may not fit."""
        if not trainer.is_global_zero or self._written:
            return
        self._written = True
        header = f"# lightning_attn {__version__}: train.py {self.subcommand}\n"
        text = header + yaml.safe_dump(self.configuration, sort_keys=False, allow_unicode=True)
        name = f"config_{self.subcommand}"
        if all(path.read_bytes() != text.encode() for path in self.directory.glob(f"{name}*.yaml")):
            write_text(self.directory / f"{name}.yaml", text)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[RUN_KEY] = StoredRun(
            name=self.directory.name,
            configuration=self.configuration,
            origin=run_directory.origin(),
            logger_ids=logger_ids(trainer.loggers),
        )

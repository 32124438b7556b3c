"""Means over the samples of a split that do not depend on batches and ranks, for tasks with nothing more special."""

from typing import TYPE_CHECKING

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning import Callback
from pytorch_lightning.utilities import rank_zero_info

from lightning_attn.io import write_json
from lightning_attn.metrics import WeightedMean

if TYPE_CHECKING:
    from lightning_attn.tasks.base import BaseTask


class SampleMeans(Callback):
    """Logs what a task gave to `log_samples`, as `val/<name>` and `test/<name>`; every task brings it.

    A test also writes the means into `test_metrics.json`.
    """

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets an earlier pass."""
        _task(pl_module).sample_means.clear()

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets an earlier pass."""
        _task(pl_module).sample_means.clear()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the means."""
        self._log(trainer, _task(pl_module), "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the means, and writes them."""
        task = _task(pl_module)
        means = self._log(trainer, task, "test")
        if means and trainer.is_global_zero:
            path = write_json(task.output_directory / "test_metrics.json", means)
            rank_zero_info(f"Scores written to {path}")

    @staticmethod
    def _log(trainer: pl.Trainer, task: "BaseTask", stage: str) -> dict[str, float]:
        names = set(task.sample_means)
        if trainer.world_size > 1:  # a rank without samples has named nothing
            of_ranks: list[set[str]] = [set()] * trainer.world_size
            dist.all_gather_object(of_ranks, names)
            names = set().union(*of_ranks)
        means = {
            f"{stage}/{name}": task.sample_means.setdefault(name, WeightedMean(stage)).compute().item()
            for name in sorted(names)
        }
        if means:
            task.log_dict({name: torch.tensor(value) for name, value in means.items()}, prog_bar=True, batch_size=1)
        return means


def _task(module: pl.LightningModule) -> "BaseTask":
    from lightning_attn.tasks.base import BaseTask

    assert isinstance(module, BaseTask), "a task brings this callback"
    return module

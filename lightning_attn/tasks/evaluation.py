"""Evaluators, which score tasks, and the callback that runs them in validation and test."""

import abc
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning import Callback
from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from lightning_attn.errors import InputError
from lightning_attn.io import write_json
from lightning_attn.metrics import WeightedMean
from lightning_attn.training.stop_on_non_finite import batch_field

if TYPE_CHECKING:
    from lightning_attn.tasks.base import BaseTask

__all__ = ["Evaluation", "Evaluator", "SampleMeans"]


class Evaluator(abc.ABC):
    """Scores a pass over the validation or test data, with the same results on any number of ranks.

    Attributes:
        shown: Names of the logged scores in the progress bar; None for all.
        split: Of the current pass, "val" or "test".
    """

    shown: ClassVar[tuple[str, ...] | None] = None
    split: str = "val"

    def reset(self, split: str) -> None:
        """Starts a pass.

        Args:
            split: "val" or "test".
        """
        self.split = split

    @abc.abstractmethod
    def update(self, batch: Any, outputs: Mapping[str, Any]) -> None:
        """Adds a batch.

        Args:
            batch: From the DataModule.
            outputs: The return value of `validation_step` or `test_step`.
        """

    def compute(self) -> dict[str, Any]:
        """The scores of the pass by name, as plain values; after a test they are written to `test_metrics.json`.

        A collective: it is called on every rank, and returns the same scores on each.
        """
        return {}

    def logged(self, scores: dict[str, Any]) -> dict[str, float]:
        """The scores to log, by name; by default those of `compute` that are floats."""
        return {name: value for name, value in scores.items() if isinstance(value, float)}

    def write(self, scores: dict[str, Any]) -> None:  # noqa: B027 - optional: most write nothing
        """Writes or draws further results after a pass, on rank 0 only.

        Args:
            scores: The result of `compute`.
        """


class SampleMeans(Evaluator):
    """Means over samples of every value `[B]` in the dictionary that a step returns; batches must have `ids`."""

    def __init__(self) -> None:
        self._means: dict[str, WeightedMean] = {}

    @override
    def reset(self, split: str) -> None:
        super().reset(split)
        self._means = {}

    @override
    def update(self, batch: Any, outputs: Mapping[str, Any] | None) -> None:
        if outputs is None:
            return
        ids = batch_field(batch, "ids")
        if not isinstance(outputs, Mapping) or ids is None:
            raise InputError(
                f"{self.split}: a step must return a dictionary of values [B], one for each sample, such as "
                "{'accuracy': found == batch['label']}, and the batch must have ids, integers that are unique in the "
                f"split; got {type(outputs).__name__} and ids {ids!r}. Alternatively return custom evaluators in "
                "configure_evaluators."
            )
        for name, values in outputs.items():
            mean = self._means.setdefault(name, WeightedMean(self.split))
            mean.update(ids, values.detach().double(), torch.ones(len(ids), dtype=torch.long))

    @override
    def compute(self) -> dict[str, Any]:
        names = set(self._means)
        if dist.is_available() and dist.is_initialized():  # a rank without samples has no names
            of_ranks: list[set[str]] = [set()] * dist.get_world_size()
            dist.all_gather_object(of_ranks, names)
            names = set().union(*of_ranks)
        return {name: self._means.setdefault(name, WeightedMean(self.split)).compute().item() for name in sorted(names)}


class Evaluation(Callback):
    """Runs a task's evaluators over each pass: reset, update with every batch, compute, log, write.

    Scores are logged as `val/<name>` and `test/<name>`. A test also writes them to `test_metrics.json`. Every task has
    this callback.
    """

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reset(pl_module, "val")

    @override
    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reset(pl_module, "test")

    @staticmethod
    def _reset(pl_module: pl.LightningModule, split: str) -> None:
        for evaluator in _task(pl_module).evaluators:
            evaluator.reset(split)

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
        for evaluator in _task(pl_module).evaluators:
            evaluator.update(batch, outputs)

    on_test_batch_end = on_validation_batch_end

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer, _task(pl_module), "val")

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer, _task(pl_module), "test")

    @staticmethod
    def _finish(trainer: pl.Trainer, task: "BaseTask", split: str) -> None:
        found = []
        for evaluator in task.evaluators:
            scores = evaluator.compute()
            found.append(scores)
            logged = {name: torch.tensor(value) for name, value in evaluator.logged(scores).items()}
            for shown in (True, False):
                chosen = {
                    f"{split}/{name}": value
                    for name, value in logged.items()
                    if (evaluator.shown is None or name in evaluator.shown) is shown
                }
                if chosen:
                    task.log_dict(chosen, prog_bar=shown, batch_size=1)
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        results = {f"{split}/{name}": value for scores in found for name, value in scores.items()}
        if split == "test" and results:
            path = write_json(task.output_directory / "test_metrics.json", without_nan(results))
            rank_zero_info(f"Scores written to {path}")
        for evaluator, scores in zip(task.evaluators, found, strict=True):
            evaluator.write(scores)


def without_nan(value: Any) -> Any:
    """Plain values for JSON, which has no NaN: undefined scores become None (null)."""
    if isinstance(value, dict):
        return {name: without_nan(one) for name, one in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _task(module: pl.LightningModule) -> "BaseTask":
    assert hasattr(module, "evaluators"), "only a task has this callback"
    return cast("BaseTask", module)

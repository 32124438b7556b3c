"""Evaluators, which score tasks, and the callback that runs them in validation and test."""

import abc
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_attn.errors import InputError
from lightning_attn.io import write_json
from lightning_attn.metrics import WeightedMean, gather_by_id
from lightning_attn.metrics.bootstrap import SEED, ResampledScores
from lightning_attn.training.stop_on_non_finite import batch_field

if TYPE_CHECKING:
    from lightning_attn.tasks.base import BaseTask

__all__ = ["Evaluation", "Evaluator", "SampleMeans", "write_resampled"]


class Evaluator(abc.ABC):
    """Scores a pass over the validation or test data, with the same results on any number of ranks.

    Attributes:
        shown: Names of the logged scores in the progress bar; None for all.
        prints_scores: Whether `write` prints the scores of a test; the others are printed behind it.
        split: Of the current pass, "val" or "test".
        dataloader_idx: Of the batch that `update` gets, if there are several loaders; else None.
    """

    shown: ClassVar[tuple[str, ...] | None] = None
    prints_scores: ClassVar[bool] = False
    split: str = "val"
    dataloader_idx: int | None = None

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

    def resampled_scores(self) -> ResampledScores | None:
        """Scores of resampled test sets, for the uncertainty that the choice of the test set causes.

        Called after `compute` of a test, on rank 0 only; written to `predictions/test_bootstrap.json`.
        """
        return None

    def write(self, scores: dict[str, Any]) -> None:  # noqa: B027 - optional: most write nothing
        """Writes or draws further results after a pass, on rank 0 only.

        Args:
            scores: The result of `compute`.
        """

    def clear(self) -> None:  # noqa: B027 - optional
        """Forgets the samples of the pass, after `write` and on every rank: training needs the memory."""


class SampleMeans(Evaluator):
    """Means over samples of every value `[B]` in the dictionary that a step returns; batches must have `ids`.

    A loss that a step returns as Lightning's own do, a number for the whole batch, is not averaged; a warning says so.
    With several loaders names end in `/loader_<n>`.
    """

    def __init__(self) -> None:
        self._means: dict[str, WeightedMean] = {}
        self._warned = False

    @override
    def reset(self, split: str) -> None:
        super().reset(split)
        self.clear()

    @override
    def update(self, batch: Any, outputs: Mapping[str, Any] | None) -> None:
        if outputs is None:
            return
        values = outputs if isinstance(outputs, Mapping) else {"the returned value": outputs}
        scored = {name: value for name, value in values.items() if not _is_scalar(value)}
        if len(scored) < len(values) and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{self.split}: {', '.join(values.keys() - scored.keys())} is one number for the whole batch, and not "
                "averaged over the split: return a value [B] for each sample to score it, or log it yourself."
            )
        ids: Any = batch_field(batch, "ids") if scored else None
        has_ids = _has_ids(ids)
        for name, value in scored.items():
            if not has_ids or not isinstance(value, Tensor) or value.shape != (len(ids),):
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise InputError(
                    f"{self.split}: {name} must be a tensor [B], a value for each sample, such as "
                    "{'accuracy': found == batch['label']}, and the batch must have ids, B integers that are unique in "
                    f"the split; got {got} and ids {ids!r:.80}. Return nothing to score nothing, or list evaluators of "
                    "your own in configure_evaluators."
                )
            name = name if self.dataloader_idx is None else f"{name}/loader_{self.dataloader_idx}"
            mean = self._means.setdefault(name, WeightedMean(self.split))
            mean.update(ids, value.detach().double(), torch.ones(len(ids), dtype=torch.long))

    @override
    def compute(self) -> dict[str, Any]:
        names = gather_by_id(dict.fromkeys(self._means))  # a rank without samples has none of its own
        return {name: self._means.setdefault(name, WeightedMean(self.split)).compute().item() for name in names}

    @override
    def resampled_scores(self) -> ResampledScores | None:
        found = {name: mean.resampled_scores() for name, mean in self._means.items()}
        for first in found.values():  # those of the same samples as the first
            scores = {name: one.scores["mean"] for name, one in found.items() if one.samples == first.samples}
            return ResampledScores(first.samples, first.num_samples, scores)
        return None

    @override
    def clear(self) -> None:
        self._means = {}


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
        loaders = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        for evaluator in _task(pl_module).evaluators:
            evaluator.dataloader_idx = dataloader_idx if len(loaders) > 1 else None
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
        unprinted: dict[str, float] = {}
        validates = trainer.state.fn == TrainerFn.VALIDATING  # of a validation evaluators print nothing
        for evaluator in task.evaluators:
            scores = evaluator.compute()
            found.append(scores)
            values = evaluator.logged(scores)
            if validates or not evaluator.prints_scores:
                unprinted |= values
            logged = {name: torch.tensor(value) for name, value in values.items()}
            for shown in (True, False):
                chosen = {
                    f"{split}/{name}": value
                    for name, value in logged.items()
                    if (evaluator.shown is None or name in evaluator.shown) is shown
                }
                if chosen:
                    task.log_dict(chosen, prog_bar=shown, batch_size=1)
        if trainer.is_global_zero and not trainer.sanity_checking:
            Evaluation._write(task, split, found)
            if (split == "test" or validates) and unprinted and task.prints_scores:
                separator = "\n" if validates else ", "
                rank_zero_info(separator.join(f"{split}/{name} {value:.5g}" for name, value in unprinted.items()))
        for evaluator in task.evaluators:
            evaluator.clear()

    @staticmethod
    def _write(task: "BaseTask", split: str, found: list[dict[str, Any]]) -> None:
        results = {f"{split}/{name}": value for scores in found for name, value in scores.items()}
        if split == "test" and results:
            path = write_json(task.output_directory / "test_metrics.json", without_nan(results))
            rank_zero_info(f"Scores written to {path}")
            write_resampled(task.evaluators, task.output_directory)
        for evaluator, scores in zip(task.evaluators, found, strict=True):
            evaluator.write(scores)


def write_resampled(evaluators: Sequence[Evaluator], directory: Path) -> None:
    """Writes the resampled scores of those evaluators that have some, a file for each, below a run directory."""
    for evaluator in evaluators:
        resampled = evaluator.resampled_scores()
        if resampled is not None and resampled.scores:
            scores = {f"test/{name}": without_nan(values.tolist()) for name, values in resampled.scores.items()}
            content = {"seed": SEED, "num_samples": resampled.num_samples, "samples": resampled.samples}
            write_json(directory / "predictions" / "test_bootstrap.json", content | {"scores": scores})


def without_nan(value: Any) -> Any:
    """Plain values for JSON, which has no NaN: undefined scores become None (null)."""
    if isinstance(value, dict):
        return {name: without_nan(one) for name, one in value.items()}
    if isinstance(value, list):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)


def _has_ids(ids: Any) -> bool:
    """Whether these are integers, one for each sample."""
    if isinstance(ids, Tensor):
        return ids.dim() == 1 and not ids.is_floating_point()
    return isinstance(ids, Sequence) and all(isinstance(one, int) for one in ids)


def _task(module: pl.LightningModule) -> "BaseTask":
    assert hasattr(module, "evaluators"), "only a task has this callback"
    return cast("BaseTask", module)

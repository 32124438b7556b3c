"""An end to a training whose numbers are not finite, before its weights are lost."""

from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning import Callback
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_attn.errors import UserError
from lightning_attn.training.checkpoint_keys import WEIGHTS_KEY
from lightning_attn.training.checkpoints import read_checkpoint
from lightning_attn.training.optimization import gradient_scaler, gradients_of

_Batch = tuple[str, Any, list[str], Tensor]
"""Which batch, its sample ids, names of the samples where they have some, and its loss."""


class NonFiniteError(UserError, FloatingPointError):
    """A training whose loss or gradient is NaN or infinite."""


class StopOnNonFinite(Callback):
    """Ends a training whose gradient is NaN or infinite before that gets into the weights; every task brings it.

    The gradients are looked at, once an optimizer step, and not the loss: they are the same on all ranks, so that all
    of them end together. With the gradient scaler of fp16, which skips such steps, only the losses are.

    Raises:
        NonFiniteError: Out of the training, with the step, the samples, and the last checkpoint that is sound.
    """

    def __init__(self) -> None:
        self._place = ""
        self._samples: tuple[Any, list[str]] = None, []
        self._batches: list[_Batch] = []  # of this step

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batches = []

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._place = f"batch {batch_idx + 1} of epoch {trainer.current_epoch}"
        self._samples = batch_field(batch, "ids"), batch_field(batch, "names", [])

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._batches.append((self._place, *self._samples, loss.detach()))

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        batches, self._batches = self._batches, []
        if gradient_scaler(trainer) is not None:
            if all(bool(loss.isfinite()) for *_, loss in batches):
                return
        else:
            gradients = gradients_of(optimizer)
            if not gradients or bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all()):
                return
        self._end(trainer, pl_module, batches)

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batches: list[_Batch]) -> NoReturn:
        found = [
            f"the loss of {place} is {float(loss)}{_described(ids, names)}"
            for place, ids, names, loss in batches
            if not bool(loss.isfinite())
        ]
        if trainer.world_size > 1 and gradient_scaler(trainer) is None:
            of_ranks: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(of_ranks, found)
            found = [f"on rank {rank}, {line}" for rank, lines in enumerate(of_ranks) for line in lines]
        if not found:
            broken = [
                name
                for name, parameter in pl_module.named_parameters()
                if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
            ]
            places = ", ".join(f"{place}{_described(ids, names)}" for place, ids, names, _ in batches)
            found = [f"the loss is finite, but the gradient of {', '.join(broken[:3])} is not, after {places}"]
        raise NonFiniteError(
            f"Stopped at step {trainer.global_step + 1}: {'; '.join(found)}. The weights are as they were before this "
            f"step. {_sound_checkpoint(trainer)} A lower learning rate (--model.optimizer.learning_rate), a longer "
            "warm-up, clipping (--trainer.gradient_clip_val 1) or full precision (--trainer.precision 32-true) may "
            "help, and a look at these samples."
        )


def batch_field(batch: Any, name: str, default: Any = None) -> Any:
    """What a batch has under a name: an entry of a dictionary, or an attribute."""
    return batch.get(name, default) if isinstance(batch, dict) else getattr(batch, name, default)


def _described(ids: Any, names: list[str]) -> str:
    if ids is None:
        return ""
    shown = [str(number) for number in (ids.tolist() if isinstance(ids, Tensor) else list(ids))]
    if len(names) == len(shown):
        shown = [f"{number} ({name})" for number, name in zip(shown, names, strict=True)]
    return f" (sample ids {', '.join(shown)})"


def _sound_checkpoint(trainer: pl.Trainer) -> str:
    """The newest checkpoint of the run whose weights are all finite."""
    for name in ("last.ckpt", "best.ckpt"):
        path = Path(trainer.default_root_dir) / name
        if path.is_file() and all(
            bool(value.isfinite().all()) for value in read_checkpoint(path)[WEIGHTS_KEY].values()
        ):
            return f"The last good checkpoint is {path}."
    return "No good checkpoint has been written yet."

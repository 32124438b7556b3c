"""An end to a training whose numbers are not finite, before its weights are lost."""

import dataclasses
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
from lightning_attn.training.optimization import gradient_scaler

_Batch = tuple[str, Any, list[str], Tensor]
"""Which batch, its sample ids, names of the samples where they have some, and its loss."""


class NonFiniteError(UserError, FloatingPointError):
    """A training whose loss or gradient is NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class _Step:
    """An optimizer step that was not looked at yet.

    Attributes:
        number: Which step, from 1.
        batches: Those whose gradients were accumulated.
        parameters: Those that have a gradient.
        norms: Of their gradients, on the device, `[parameters]`.
    """

    number: int
    batches: list[_Batch]
    parameters: list[Tensor]
    norms: Tensor


class StopOnNonFinite(Callback):
    """Ends a training whose gradient is NaN or infinite before that gets into the weights; every task brings it.

    The gradients are looked at, once an optimizer step, and not the loss: they are the same on all ranks, so that all
    of them end together. With the gradient scaler of fp16, which skips such steps, only the losses are.

    On a GPU, looking would make the host wait for the device. There a fused optimizer skips the first step with such a
    gradient, and all later ones, by itself; the training ends when the host looks the next time: every few steps, and
    before each validation and each checkpoint. The weights and the message are the same as if it had looked at once.

    Args:
        every_n_steps: Optimizer steps between two looks, with a fused optimizer (others are looked at in each step);
            None for 1 on the CPU, and elsewhere `trainer.log_every_n_steps`, at which the logger waits for the device.

    Raises:
        NonFiniteError: Out of the training, with the step, the samples, and the last checkpoint that is sound.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        self.every_n_steps = every_n_steps
        self._place = ""
        self._samples: tuple[Any, list[str]] = None, []
        self._batches: list[_Batch] = []  # of this step
        self._steps: list[_Step] = []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batches, self._steps = [], []
        for optimizer in trainer.optimizers:
            vars(optimizer).pop("found_inf", None)  # of a training that ended here before

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
        number = trainer.global_step + 1
        if gradient_scaler(trainer) is not None:
            if not all(bool(loss.isfinite()) for *_, loss in batches):
                self._end(trainer, pl_module, _Step(number, batches, [], torch.empty(0)))
            return
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.grad is not None
        ]
        if not parameters:
            return
        norms = torch.stack(torch._foreach_norm([parameter.grad for parameter in parameters]))
        self._steps.append(_Step(number, batches, parameters, norms))
        every = self.every_n_steps or _default_interval(trainer, norms.device)
        if every > 1 and _can_skip(optimizer):
            _skip_from_here_if(norms.isfinite().all().logical_not(), optimizer)
            if number % every:
                return
        self._look(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer, pl_module)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Looks before every checkpoint, which would otherwise count steps that were skipped."""
        self._look(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Waits for the device, and ends the training at the first step that was not finite."""
        steps, self._steps = self._steps, []
        if not steps:
            return
        finite = torch.stack([step.norms.isfinite().all() for step in steps]).tolist()
        for step, is_finite in zip(steps, finite, strict=True):
            if not is_finite:
                self._end(trainer, pl_module, step)

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: _Step) -> NoReturn:
        found = [
            f"the loss of {place} is {float(loss)}{_described(ids, names)}"
            for place, ids, names, loss in step.batches
            if not bool(loss.isfinite())
        ]
        if trainer.world_size > 1 and gradient_scaler(trainer) is None:
            of_ranks: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(of_ranks, found)
            found = [f"on rank {rank}, {line}" for rank, lines in enumerate(of_ranks) for line in lines]
        if not found:
            finite = step.norms.isfinite().tolist()
            broken = {id(parameter) for parameter, one in zip(step.parameters, finite, strict=True) if not one}
            names_of_broken = [name for name, parameter in pl_module.named_parameters() if id(parameter) in broken]
            places = ", ".join(f"{place}{_described(ids, names)}" for place, ids, names, _ in step.batches)
            found = [f"the loss is finite, but the gradient of {', '.join(names_of_broken[:3])} is not, after {places}"]
        raise NonFiniteError(
            f"Stopped at step {step.number}: {'; '.join(found)}. The weights are as they were before this "
            f"step. {_sound_checkpoint(trainer)} A lower learning rate (--model.optimizer.learning_rate), a longer "
            "warm-up, clipping (--trainer.gradient_clip_val 1) or full precision (--trainer.precision 32-true) may "
            "help, and a look at these samples."
        )


def _default_interval(trainer: pl.Trainer, device: torch.device) -> int:
    """Optimizer steps between two looks."""
    return 1 if device.type == "cpu" else max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]


def _can_skip(optimizer: Optimizer) -> bool:
    """Whether `step` reads the attribute `found_inf`, by which the gradient scaler makes fused optimizers skip it."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _skip_from_here_if(broken: Tensor, optimizer: Any) -> None:
    """Makes this step of an optimizer, and all later ones, change nothing, if a flag on the device is true."""
    earlier: Tensor | None = getattr(optimizer, "found_inf", None)
    flag = broken.float()
    optimizer.found_inf = flag if earlier is None else torch.maximum(earlier, flag)


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

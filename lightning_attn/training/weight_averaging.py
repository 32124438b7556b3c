"""Averages of the weights during a training: exponential, or the equal mean of some steps."""

import itertools
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from lightning_attn.errors import InputError


class _Averaging(WeightAveraging):
    """Lightning's averaging of weights and buffers, in a second copy of the module, with four things changed.

    Lightning swaps the average in for validation, saves it as a checkpoint's `state_dict` (and the weights that are
    trained as `current_model_state`), and leaves it in the module after training. But until the first step that counts
    its copy has the weights from before the training; here it follows the current ones. It makes the copy before the
    module is moved to its device, and then fetches all weights to the CPU at every step; here the copy moves too. It
    keeps the number of averages on that device, which the host would wait for at every step; here it is on the CPU.
    And it averages integers and, with rounding errors, what is frozen.
    """

    def share(self, number: int) -> float:
        """Share of the current weights in the new average, when `number` (at least 1) were averaged before."""
        raise NotImplementedError

    @torch.no_grad()
    def _update(self, pl_module: pl.LightningModule) -> None:
        """Adds the current weights and buffers to the average."""
        average = self._average
        number = int(average.n_averaged)
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        averages = itertools.chain(average.module.parameters(), average.module.buffers())
        currents = itertools.chain(pl_module.parameters(), pl_module.buffers())
        for one, current in zip(averages, currents, strict=True):
            group = groups.setdefault((one.device, one.dtype), ([], []))
            group[0].append(one.detach())
            group[1].append(current.detach())
        for (_, dtype), (old, new) in groups.items():
            if number and dtype.is_floating_point:
                torch._foreach_lerp_(old, new, self.share(number))  # exact where both are equal
            else:
                torch._foreach_copy_(old, new)
        average.n_averaged += 1

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._average.module.to(pl_module.device)
        self._average.n_averaged = self._average.n_averaged.cpu()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step > self._latest_update_step and self.should_update(step_idx=step - 1):
            self._update(pl_module)
            self._latest_update_step = step

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._average_model is not None:
            self._follow(pl_module)
        super().on_validation_epoch_start(trainer, pl_module)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average_model is not None:
            self._follow(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._follow(pl_module)
        super().on_train_end(trainer, pl_module)

    @property
    def _average(self) -> AveragedModel:
        assert self._average_model is not None, "made by `setup` when training begins"
        return self._average_model

    def _follow(self, pl_module: pl.LightningModule) -> None:
        if self._average.n_averaged == 0:
            self._update(pl_module)  # the first time, a plain copy
            self._average.n_averaged.zero_()


class ExponentialAveraging(_Averaging):
    """The exponential moving average of the weights, which forgets its beginning: EMA.

    After each optimizer step, average = d * average + (1 - d) * weights. The decay d of update n is
    min(decay, (1 + n) / (10 + n)), so that in a short training too the average is one of recent weights: 0.999 is
    reached at step 9,000, and after 100 steps half of the average comes from the last 8. Lightning's own
    `EMAWeightAveraging` has d = `decay` from the second step on.

    Statistics of BatchNorm are averaged like weights; integers, such as the number of batches they are from, are the
    current ones. What is frozen stays bitwise identical. Validation, tests and checkpoints use the average;
    training continues with the current weights.

    Args:
        decay: Largest decay; 0.999 averages over about the last 1,000 steps.
        warmup: Whether the decay grows as above; else it is `decay` throughout.

    Raises:
        ValueError: If the decay is not between 0 and 1.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"decay must be at least 0 and below 1, got {decay}; usual are 0.99 to 0.9999.")
        super().__init__()
        self.decay, self.warmup = decay, warmup

    @override
    def share(self, number: int) -> float:
        return 1 - (min(self.decay, (1 + number) / (10 + number)) if self.warmup else self.decay)


class UniformWeightAveraging(_Averaging):
    """The equal mean of the weights at some steps, as "averaging the last checkpoints" without keeping them.

    Validation, tests and checkpoints use the mean from the first of these steps on, and the current weights before;
    training continues with the current weights. Vaswani et al. 2017 average the last five checkpoints.

    Args:
        start_step: The first optimizer step whose weights count.
        every_n_steps: Steps from one that counts to the next.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(self, start_step: int, every_n_steps: int = 1000) -> None:
        if start_step < 1 or every_n_steps < 1:
            raise InputError(f"start_step and every_n_steps must be at least 1, got {start_step} and {every_n_steps}.")
        super().__init__()
        self.start_step, self.every_n_steps = start_step, every_n_steps

    @override
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether the weights after the optimizer step `step_idx` (from 0) count."""
        since = -1 if step_idx is None else step_idx + 1 - self.start_step
        return since >= 0 and since % self.every_n_steps == 0

    @override
    def share(self, number: int) -> float:
        return 1 / (number + 1)

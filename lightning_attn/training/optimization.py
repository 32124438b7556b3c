"""Optimizers and per-step learning-rate schedules, described by plain values."""

import dataclasses
import itertools
import math
from typing import Any, Literal, Self, get_args

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import ParamsT

from lightning_attn.attention import offset_parameters
from lightning_attn.errors import InputError
from lightning_attn.validation import refuse_unused

OptimizerName = Literal["adam", "adamw", "sgd"]
ScheduleName = Literal["constant", "inverse_sqrt", "cosine", "multistep", "poly"]


_ADAM = ("betas", "eps")


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """Which optimizer moves the parameters.

    Attributes:
        name: `"adam"`, `"adamw"` (weight decay decoupled from the gradient) or `"sgd"`.
        learning_rate: Peak learning rate; the schedule gives the factor on it.
        betas: Decay of the two moments of Adam.
        eps: Added to Adam's denominator.
        momentum: Of SGD.
        weight_decay: Applied to all parameters.
        offset_lr_factor: Factor on the learning rate of what moves the taps of deformable convolutions (w_m of Eq. 4,
            and the modulation), all along the schedule. 0.1 is the paper's, after the inventors of the convolution;
            1.0 trains them like all others.
        base_batch_size: The global batch, in images, that `learning_rate` is meant for; `scaled` turns it into the rate
            for another one in proportion (Goyal et al. 2017). 0 takes `learning_rate` as it is.

    Raises:
        ValueError: If a value is out of range.
    """

    name: OptimizerName = "adam"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-9
    momentum: float = 0.9
    weight_decay: float = 0.0
    offset_lr_factor: float = 0.1
    base_batch_size: int = 0

    def __post_init__(self) -> None:
        if self.name not in get_args(OptimizerName):
            raise InputError(f"optimizer name must be one of {list(get_args(OptimizerName))}, got {self.name!r}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"learning_rate must be a positive finite number, got {self.learning_rate!r}.")
        if not (math.isfinite(self.offset_lr_factor) and self.offset_lr_factor > 0):
            raise InputError(
                f"offset_lr_factor must be a positive finite number, got {self.offset_lr_factor!r}; "
                "the paper's value is 0.1, and 1.0 trains offsets like all other parameters."
            )
        refuse_unused(self, "name", {"adam": _ADAM, "adamw": _ADAM, "sgd": ("momentum",)})
        if self.base_batch_size < 0:
            raise InputError(
                f"base_batch_size must be at least 0, got {self.base_batch_size}: the global batch that learning_rate "
                "is meant for, or 0 for no scaling."
            )

    def scaled(self, global_batch_size: int) -> Self:
        """The optimizer for a global batch: `learning_rate * global_batch_size / base_batch_size`.

        The result's `base_batch_size` is this batch, so that scaling it for the same batch again changes nothing.

        Args:
            global_batch_size: Images of one optimizer step: batch of a rank x ranks x accumulated batches.

        Raises:
            ValueError: If it is below 1.
        """
        if global_batch_size < 1:
            raise InputError(f"global_batch_size must be at least 1, got {global_batch_size}.")
        if not self.base_batch_size:
            return self
        rate = self.learning_rate * global_batch_size / self.base_batch_size
        return dataclasses.replace(self, learning_rate=rate, base_batch_size=global_batch_size)

    def scaling_note(self, global_batch_size: int) -> str:
        """A sentence for the log with the global batch and the learning rate that `scaled` gives for it."""
        rate = self.scaled(global_batch_size).learning_rate
        if not self.base_batch_size:
            return (
                f"Learning rate {rate:g} as configured, for a global batch of {global_batch_size} "
                "(optimizer.base_batch_size is 0: no scaling)."
            )
        return (
            f"Learning rate {rate:g} for a global batch of {global_batch_size}: {self.learning_rate:g} for "
            f"{self.base_batch_size}, scaled in proportion."
        )

    def parameter_groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """The parameters of `module` that are trained, with a group of their own for offsets if there are any.

        The groups' names, `"network"` and `"offsets"`, are those under which learning rates are logged; a group that
        is alone has none.
        """
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # Once each: networks of a joint training share them.
        offsets = list(dict.fromkeys(one for one in offset_parameters(module) if one.requires_grad))
        if not offsets:
            return [{"params": trained}]
        apart = set(offsets)
        return [
            {"params": [parameter for parameter in trained if parameter not in apart], "name": "network"},
            {"params": offsets, "name": "offsets", "lr": self.offset_lr_factor * self.learning_rate},
        ]

    def build(self, parameters: ParamsT, fused: bool = False) -> Optimizer:
        """The optimizer over `parameters`, or groups of them from `parameter_groups`.

        `fused` asks for the kernels that CPU and CUDA have for all parameters at once.
        """
        if self.name == "sgd":
            return torch.optim.SGD(
                parameters,
                lr=self.learning_rate,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                fused=fused,
            )
        kind = torch.optim.AdamW if self.name == "adamw" else torch.optim.Adam
        return kind(
            parameters,
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=fused,
        )


@dataclasses.dataclass(frozen=True)
class ScheduleSpec:
    """How the learning rate of every group moves, as a factor on its peak, one value per optimizer step.

    Attributes:
        name: After the warm-up, `"constant"` stays at 1, `"inverse_sqrt"` falls as (step / warmup_steps) ** -0.5 (the
            paper's translation schedule, section 3), `"cosine"` falls to zero at the last step of the run,
            `"multistep"` is multiplied by `gamma` at each of the `milestones` (the paper's detection schedule), and
            `"poly"` falls as (1 - share of the run after the warm-up) ** power, to zero at the last step (the paper's
            segmentation schedule, which has no warm-up).
        warmup_steps: Steps of the linear warm-up.
        warmup_start: Factor at step 0; the paper's 1e-7 -> 1e-3 is 1e-4.
        milestones: Where `"multistep"` falls, as shares of the run's optimizer steps, warm-up included: neither steps
            nor epochs, so that they hold for every batch size, number of ranks and length of the run. The paper's
            epochs 8 and 11 of 12 are 8 / 12 and 11 / 12, the default; in YAML, 0.6667 and 0.9167.
        gamma: Of `"multistep"`.
        power: Of `"poly"`.

    Raises:
        ValueError: If a value is out of range.
    """

    name: ScheduleName = "inverse_sqrt"
    warmup_steps: int = 4000
    warmup_start: float = 1e-4
    milestones: tuple[float, ...] = (8 / 12, 11 / 12)
    gamma: float = 0.1
    power: float = 0.9

    def __post_init__(self) -> None:
        if self.name not in get_args(ScheduleName):
            raise InputError(f"schedule name must be one of {list(get_args(ScheduleName))}, got {self.name!r}.")
        if self.warmup_steps < 0 or (self.name == "inverse_sqrt" and self.warmup_steps == 0):
            raise InputError(
                f"warmup_steps must be at least 0, and at least 1 for inverse_sqrt, got {self.warmup_steps}."
            )
        if not 0 <= self.warmup_start <= 1:
            raise InputError(f"warmup_start must be a factor between 0 and 1, got {self.warmup_start!r}.")
        bounds = (0.0, *self.milestones, 1.0)
        if not all(before < after for before, after in itertools.pairwise(bounds)):
            raise InputError(
                f"milestones must rise and lie between 0 and 1, got {list(self.milestones)!r}: they are shares of the "
                "run, not steps or epochs; epoch 8 of 12 is 0.6667."
            )
        if not 0 < self.gamma <= 1:
            raise InputError(f"gamma must be a factor above 0 and at most 1, got {self.gamma!r}.")
        if not (math.isfinite(self.power) and self.power > 0):
            raise InputError(f"power must be a positive finite number, got {self.power!r}.")
        refuse_unused(self, "name", {"multistep": ("milestones", "gamma"), "poly": ("power",)})

    def factor(self, step: int, total_steps: float) -> float:
        """Factor on the peak learning rate for the optimizer step `step` (from 0) of `total_steps` (may be inf)."""
        if step < self.warmup_steps:
            return self.warmup_start + (1 - self.warmup_start) * step / self.warmup_steps
        if self.name == "inverse_sqrt":
            return math.sqrt(self.warmup_steps / step)
        if self.name == "multistep":
            return math.pow(self.gamma, sum(step >= round(share * total_steps) for share in self.milestones))
        progress = min(1.0, (step - self.warmup_steps) / max(1.0, total_steps - self.warmup_steps))
        if self.name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        if self.name == "poly":
            return math.pow(1 - progress, self.power)
        return 1.0

    def build(self, optimizer: Optimizer, total_steps: float) -> LambdaLR:
        """The scheduler, to be stepped after every optimizer step.

        Raises:
            ValueError: For a course that depends on the number of steps of the run, if that is not known.
        """
        if self.name in ("cosine", "multistep", "poly") and not math.isfinite(total_steps):
            raise InputError(
                f"schedule {self.name!r} needs the number of steps of the run: set trainer.max_steps or "
                "trainer.max_epochs."
            )
        return LambdaLR(optimizer, lambda step: self.factor(step, total_steps))


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """The gradients of an optimizer's parameters, of those that have one."""
    return [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]


def complete_momentum(optimizer: Optimizer) -> None:
    """Gives every parameter of an SGD its momentum: a fused one takes all or none, and zeros are like none."""
    groups = optimizer.param_groups if isinstance(optimizer, SGD) else []
    for one in (parameter for group in groups if group["momentum"] for parameter in group["params"]):
        if optimizer.state[one].get("momentum_buffer") is None:
            optimizer.state[one]["momentum_buffer"] = torch.zeros_like(one)


def gradient_scaler(trainer: pl.Trainer) -> Any:
    """What scales losses in fp16; None in other precisions."""
    return getattr(trainer.precision_plugin, "scaler", None)

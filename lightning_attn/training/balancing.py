"""Weights of the losses of several tasks in one training: fixed, learnt, or from how fast the losses fall or agree."""

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_attn.errors import InputError
from lightning_attn.validation import refuse_unused

__all__ = [
    "Balancing",
    "BalancingName",
    "BalancingSpec",
    "DynamicAverage",
    "Fixed",
    "GradientSummary",
    "JacobianDescent",
    "Uncertainty",
    "build_balancing",
    "gradient_statistics",
    "gradients_of",
]

BalancingName = Literal["fixed", "uncertainty", "dynamic_average", "torchjd"]
Aggregator = Literal["upgrad", "mgda", "dualproj", "aligned_mtl", "imtl_g"]

_WEIGHTINGS: Mapping[Aggregator, str] = {
    "upgrad": "UPGradWeighting",
    "mgda": "MGDAWeighting",
    "dualproj": "DualProjWeighting",
    "aligned_mtl": "AlignedMTLWeighting",
    "imtl_g": "IMTLGWeighting",
}
"""Names in `torchjd.aggregation`."""

Reduce = Callable[[Tensor], Tensor]
"""Returns the mean of a tensor over all ranks."""


@dataclasses.dataclass(frozen=True)
class BalancingSpec:
    """How the losses of several tasks are weighted, on top of the weights that are given.

    Attributes:
        name: `"fixed"` for the given weights; `"uncertainty"` for weights that are learnt (Kendall et al. 2018);
            `"dynamic_average"` for weights by how slowly each loss fell in the last two epochs (Liu et al. 2019);
            `"torchjd"` for weights that settle conflicts between the losses' gradients in each step.
        temperature: Of `"dynamic_average"`: the larger, the more equal are the weights.
        aggregator: Of `"torchjd"`: how its weights are found, by TorchJD's name.

    Raises:
        ValueError: If a value is out of range.
    """

    name: BalancingName = "fixed"
    temperature: float = 2.0
    aggregator: Aggregator = "upgrad"

    def __post_init__(self) -> None:
        if self.name not in get_args(BalancingName):
            raise InputError(f"balancing.name must be one of {list(get_args(BalancingName))}, got {self.name!r}.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"balancing.temperature must be a positive finite number, got {self.temperature!r}.")
        if self.aggregator not in get_args(Aggregator):
            raise InputError(
                f"balancing.aggregator must be one of {list(get_args(Aggregator))}, got {self.aggregator!r}."
            )
        refuse_unused(self, "name", {"dynamic_average": ("temperature",), "torchjd": ("aggregator",)})


class Balancing(nn.Module, abc.ABC):
    """Weights losses.

    Args:
        weights: The given weight of each task that is trained.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.given = dict(weights)

    needs_gradients: bool = False
    """Whether `total` needs the gradients of each loss."""

    @abc.abstractmethod
    def current(self) -> dict[str, Tensor | float]:
        """The weight of each task now, without a gradient."""

    def total(self, losses: Mapping[str, Tensor], reduce: Reduce, gradients: Tensor | None = None) -> Tensor:
        """The weighted sum of the losses of the tasks that have one in this step.

        Args:
            losses: Of this rank, each normalised by its own count.
            reduce: Gives means over ranks; a collective, which each rank calls for the same tasks.
            gradients: Of each loss, in this order, if they are known; see `gradients_of`.
        """
        weights = self.current()
        return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()

    def end_epoch(self) -> None:
        """Called at the end of each epoch of training."""


class Fixed(Balancing):
    """The given weights."""

    @override
    def current(self) -> dict[str, Tensor | float]:
        return dict(self.given)


class Uncertainty(Balancing):
    """Learnt weights: w exp(-s) L + s / 2 for a given weight w and a learnt s = log sigma^2 of each task, at first 0.

    That is the form of Kendall et al. 2018 for classification, used for all losses.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__(weights)
        # One parameter for each, so that a task without a loss in a step has no gradient.
        self.log_variances = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in weights})

    @override
    def current(self) -> dict[str, Tensor | float]:
        return {name: self.given[name] * torch.exp(-one.detach()) for name, one in self.log_variances.items()}

    @override
    def total(self, losses: Mapping[str, Tensor], reduce: Reduce, gradients: Tensor | None = None) -> Tensor:
        terms = []
        for name, loss in losses.items():
            log_variance = self.log_variances[name]
            terms += [self.given[name] * torch.exp(-log_variance) * loss, log_variance / 2]
        return torch.stack(terms).sum()


class DynamicAverage(Balancing):
    """Weights w K softmax(r / T), where r is a task's mean loss in the last epoch over that in the epoch before.

    Dynamic weight average (Liu et al. 2019) of K tasks. In the first two epochs, and for a task without a loss in one
    of them, r is 1. The means are over all ranks.
    """

    sums: Tensor
    counts: Tensor
    means: Tensor
    factors: Tensor

    def __init__(self, weights: Mapping[str, float], temperature: float) -> None:
        super().__init__(weights)
        self.temperature = temperature
        number = len(weights)
        self.register_buffer("sums", torch.zeros(number, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(number, dtype=torch.float64))
        self.register_buffer("means", torch.zeros(2, number, dtype=torch.float64))  # of the last two epochs; 0 for none
        self.register_buffer("factors", torch.ones(number, dtype=torch.float64))

    @override
    def current(self) -> dict[str, Tensor | float]:
        return {name: weight * self.factors[place].float() for place, (name, weight) in enumerate(self.given.items())}

    @override
    def total(self, losses: Mapping[str, Tensor], reduce: Reduce, gradients: Tensor | None = None) -> Tensor:
        places = [list(self.given).index(name) for name in losses]
        means = reduce(torch.stack([loss.detach().double() for loss in losses.values()]))
        for place, mean in zip(places, means, strict=True):
            self.sums[place] += mean
            self.counts[place] += 1
        return super().total(losses, reduce)

    @override
    def end_epoch(self) -> None:
        """Sets the weights for the next epoch."""
        self.means = torch.stack((self.means[1], self.sums / self.counts.clamp_min(1)))
        self.sums.zero_()
        self.counts.zero_()
        before, last = self.means
        ratios = torch.where((before > 0) & (last > 0), last / before, 1.0)
        self.factors = len(self.given) * torch.softmax(ratios / self.temperature, dim=0)


class JacobianDescent(Balancing):
    """Weights by TorchJD (Quinton and Rey 2024), from the inner products of the losses' gradients in each step.

    The gradients are those of the weighted losses in the shared parameters, of all ranks. The weights that an
    aggregator gives are multiplied by the number of losses, so that those of a mean are 1. They count for the heads as
    for the backbone.
    """

    needs_gradients = True
    factors: Tensor

    def __init__(self, weights: Mapping[str, float], aggregator: Aggregator) -> None:
        super().__init__(weights)
        try:
            from torchjd import aggregation
        except ModuleNotFoundError as error:
            raise InputError(
                "balancing.name: torchjd needs the package torchjd, which is not installed. Install it with "
                "pip install 'torchjd[quadprog-projector]', or choose another balancing."
            ) from error
        self.weighting: nn.Module = getattr(aggregation, _WEIGHTINGS[aggregator])()
        self.register_buffer("factors", torch.ones(len(weights)))

    @override
    def current(self) -> dict[str, Tensor | float]:
        return {name: weight * self.factors[place] for place, (name, weight) in enumerate(self.given.items())}

    @override
    def total(self, losses: Mapping[str, Tensor], reduce: Reduce, gradients: Tensor | None = None) -> Tensor:
        if gradients is None or list(losses) != list(self.given):
            raise InputError("balancing.name: torchjd needs a loss of every task in each step: set order: together.")
        scale = torch.tensor(list(self.given.values()), device=gradients.device)
        # In float64 on the CPU, where its solvers run: the same weights on every kind of device.
        scaled = gradients * scale[:, None]
        gramian = (scaled @ scaled.T).double().cpu()
        largest = gramian.diagonal().max()
        if bool(largest > 0) and bool(gramian.isfinite().all()):
            self.factors.copy_(len(losses) * self.weighting(gramian / largest))
        return super().total(losses, reduce)


def build_balancing(spec: BalancingSpec, weights: Mapping[str, float]) -> Balancing:
    """The module that a spec describes, for the given weights of the tasks that are trained."""
    if spec.name == "uncertainty":
        return Uncertainty(weights)
    if spec.name == "dynamic_average":
        return DynamicAverage(weights, spec.temperature)
    if spec.name == "torchjd":
        return JacobianDescent(weights, spec.aggregator)
    return Fixed(weights)


def gradients_of(losses: Mapping[str, Tensor], parameters: Sequence[Tensor], reduce: Reduce) -> Tensor:
    """The gradient of each loss in some shared parameters, `[losses, numbers]`, of all ranks.

    Args:
        losses: The losses, whose graphs are kept.
        parameters: The shared parameters.
        reduce: Gives means over ranks; a collective.
    """
    rows = []
    for loss in losses.values():
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        own = [
            torch.zeros_like(parameter) if one is None else one
            for one, parameter in zip(found, parameters, strict=True)
        ]
        rows.append(reduce(torch.cat([one.flatten() for one in own])))
    return torch.stack(rows)


def gradient_statistics(names: Sequence[str], gradients: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """How much each loss moves the shared parameters, and whether two of them agree.

    Args:
        names: Of the losses.
        gradients: See `gradients_of`.

    Returns:
        The norm of each loss's gradient, by its name, and the cosine between each two, by both names.
    """
    norms = dict(zip(names, gradients.norm(dim=1), strict=True))
    cosines = {}
    for (first, one), (second, other) in itertools.combinations(zip(names, gradients, strict=True), 2):
        scale = norms[first] * norms[second]
        cosines[f"{first}_{second}"] = torch.where(scale > 0, torch.dot(one, other) / scale, 0.0)
    return norms, cosines


class GradientSummary:
    """What the losses' gradients in the shared parameters were like, over some steps of a training.

    Sums stay on the gradients' device, so that a step does not wait for it.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._sums: dict[str, Tensor] = {}  # by loss: steps, weights, weighted norms, cosines, how many, negative ones

    def add(
        self,
        weights: Mapping[str, Tensor | float],
        norms: Mapping[str, Tensor],
        cosines: Mapping[str, Tensor],
    ) -> None:
        """Adds a step.

        Args:
            weights: Of the losses.
            norms: Of their gradients before weighting; see `gradient_statistics`.
            cosines: Between each two of these, in the order of `itertools.combinations`.
        """
        self.steps += 1
        for name, norm in norms.items():
            weight = torch.as_tensor(weights[name], dtype=torch.float64, device=norm.device)
            one = torch.ones_like(weight)
            self._add(name, (one, weight, weight * norm.double(), 0 * one, 0 * one, 0 * one))
        for pair, cosine in zip(itertools.combinations(norms, 2), cosines.values(), strict=True):
            value = cosine.double()
            for name in pair:
                self._add(name, (0 * value, 0 * value, 0 * value, value, torch.ones_like(value), (value < 0).double()))

    def _add(self, name: str, values: Sequence[Tensor]) -> None:
        added = torch.stack(tuple(values)).detach()
        self._sums[name] = added if name not in self._sums else self._sums[name] + added

    def means(self) -> dict[str, dict[str, float | None]]:
        """By loss: its share of the means of the weighted norms, its mean weight, the mean of its cosines with others.

        With the share of these cosines that are negative. None where there was no other loss in the same step, and
        where all gradients are 0.
        """
        sums = {name: value.tolist() for name, value in self._sums.items()}
        norms = {name: one[2] / one[0] for name, one in sums.items()}
        total = sum(norms.values())
        return {
            name: {
                "gradient_share": norms[name] / total if total else None,
                "weight": weights / steps,
                "cosine": cosines / pairs if pairs else None,
                "negative_cosines": negative / pairs if pairs else None,
            }
            for name, (steps, weights, _, cosines, pairs, negative) in sums.items()
        }

"""Values and gradients on the device beside float64 on the CPU: attention, deformable and dynamic convolution.

The definition of an attention is `algorithm="dense"` in float64 on the CPU, which the tests hold to the equations of
`lightning_attn/attention/reference.py`. That of a deformable convolution on maps is torchvision's operator in float64.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from benchmarks.case import Case, Run, Table
from benchmarks.checks import Check, run_checks
from benchmarks.device import PRECISIONS, autocast, deterministic, device, on_gpu, without_tf32
from benchmarks.fresh_process import describe
from benchmarks.results import Comparison, Result
from lightning_attn.attention import DeformableConv, DynamicConv, TransformerAttention, algorithms, deformable, dynamic
from lightning_attn.attention.spec import TERM_SETS
from lightning_attn.errors import InputError

TOLERANCE: Mapping[str, float] = {"float32": 5e-5, "fp16": 2e-2, "bf16": 8e-2}
"""Of the largest value: some times what the rounding of inputs and sums, with 23, 10 and 7 bits, was seen to give."""

SEEDS = 48
"""Outputs whose mean is compared; enough to find that the rest was not scaled by 1 / (1 - p)."""

_NEGLIGIBLE = 1e-9  # gradients that are zero but for rounding


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes at which values are compared.

    Attributes:
        map: Of the maps, `[B, C, H, W]`; sides that nothing divides.
        sentence: Of the sentences, `[B, L, C]`.
        heads: Attention heads.
        sets: Term sets.
        precisions: Names in `device.PRECISIONS`.
    """

    map: tuple[int, int, int, int] = (2, 64, 13, 20)
    sentence: tuple[int, int, int] = (3, 70, 64)
    heads: int = 4
    sets: tuple[str, ...] = TERM_SETS
    precisions: tuple[str, ...] = tuple(PRECISIONS)

    def __str__(self) -> str:
        sizes = ("x".join(map(str, size)) for size in (self.map, self.sentence))
        return f"maps {', sentences '.join(sizes)}; {', '.join(self.precisions)}"

    def size(self, ndim: int) -> tuple[int, ...]:
        """Of the input."""
        return self.map if ndim == 2 else self.sentence


@dataclasses.dataclass(frozen=True)
class Situation:
    """What an attention is given beside its input.

    Attributes:
        ndim: 1 for sentences, 2 for maps.
        settings: Arguments of `TransformerAttention`.
        padded: Whether keys are padding: some of one sample, all but a few of another.
        keys: Length of other keys, for encoder-decoder attention.
    """

    ndim: Literal[1, 2]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    padded: bool = False
    keys: int | None = None


SITUATIONS: Mapping[str, Situation] = {
    "map": Situation(2),
    "map, padded": Situation(2, padded=True),
    "map, stride 2": Situation(2, {"kv_stride": 2}),
    "map, window 5": Situation(2, {"window": 5}),
    "sentence": Situation(1),
    "sentence, padded": Situation(1, padded=True),
    "sentence, causal": Situation(1, {"causal": True}),
    "sentence, causal, padded": Situation(1, {"causal": True}, padded=True),
    "sentence, stride 2": Situation(1, {"kv_stride": 2}),
    "sentence, window 5": Situation(1, {"window": 5}),
    "sentence, cross, padded": Situation(1, padded=True, keys=53),
}


def padding_of(size: Sequence[int], ndim: int) -> Tensor:
    """True at the padding of keys `[B, ...]`: none, a third, and in the last sample all but five positions."""
    sizes = size[2:] if ndim == 2 else size[1:2]
    positions = math.prod(sizes)
    real = torch.tensor([positions, *[positions - positions // 3] * (size[0] - 2), min(5, positions)])
    return (torch.arange(positions) >= real[:, None]).view(size[0], *sizes)


def build_attention(problem: Problem, situation: Situation, terms: str, **settings: Any) -> TransformerAttention:
    """A float32 attention on the CPU whose energies are neither even nor a single peak."""
    torch.manual_seed(0)
    channels = problem.map[1] if situation.ndim == 2 else problem.sentence[2]
    attention = TransformerAttention(
        channels, problem.heads, terms, ndim=situation.ndim, **{**situation.settings, **settings}
    )
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=1.2 * channels**-0.5)
    return attention


class Compared:
    """A module on its inputs in float64 on the CPU, and how far the same on the device lies from it.

    Args:
        module: In float32 on the CPU.
        reference: Computes the same in float64 on the CPU.
        tensors: Inputs that have gradients.
        constants: Further keyword arguments, such as masks.
    """

    def __init__(
        self, module: nn.Module, reference: nn.Module, tensors: Sequence[Tensor], constants: Mapping[str, Tensor]
    ) -> None:
        self.module, self.tensors, self.constants = module, tensors, constants
        self.names = [f"input {number}" for number in range(len(tensors))]
        self.names += [name for name, _ in module.named_parameters()]
        reference = copy.deepcopy(reference).double()
        leaves = [tensor.double().requires_grad_() for tensor in tensors]
        output = reference(*leaves, **constants)
        self.gradient = torch.randn(output.shape)
        inputs = [*leaves, *reference.parameters()]
        found = torch.autograd.grad(output, inputs, self.gradient.double(), materialize_grads=True)
        self.expected = dict(zip(("value", *self.names), (output.detach(), *found), strict=True))

    def on_device(self, precision: str, **attributes: Any) -> dict[str, Tensor]:
        """The value and all gradients on the device, by name.

        Args:
            precision: Of `device.PRECISIONS`.
            **attributes: Set on the module before.
        """
        module = copy.deepcopy(self.module).to(device())
        for name, value in attributes.items():
            setattr(module, name, value)
        leaves = [tensor.to(device()).requires_grad_() for tensor in self.tensors]
        constants = {name: tensor.to(device()) for name, tensor in self.constants.items()}
        with without_tf32():
            with autocast(precision):
                output = module(*leaves, **constants)
            gradient = self.gradient.to(device(), output.dtype)
            inputs = [*leaves, *module.parameters()]
            found = torch.autograd.grad(output, inputs, gradient, materialize_grads=True)
        return dict(zip(("value", *self.names), (output.detach(), *found), strict=True))

    @torch.no_grad()
    def mean_value(self, precision: str, seeds: int) -> Tensor:
        """The mean of the outputs on the device under so many seeds, on the CPU."""
        module = copy.deepcopy(self.module).to(device())
        inputs = [tensor.to(device()) for tensor in self.tensors]
        constants = {name: tensor.to(device()) for name, tensor in self.constants.items()}
        total = torch.zeros(self.gradient.shape, dtype=torch.float64, device=device())
        for seed in range(seeds):
            torch.manual_seed(seed)
            with autocast(precision):
                total += module(*inputs, **constants)
        return (total / seeds).cpu()

    def errors(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """How far each lies from float64, relative to the largest value there; infinite for what is not finite."""
        errors = {}
        for name, expected in self.expected.items():
            largest = float(expected.abs().max())
            if largest > _NEGLIGIBLE:
                difference = (found[name].detach().cpu().double() - expected).abs().max()
                errors[name] = float(difference) / largest if math.isfinite(float(difference)) else math.inf
        return errors


def judge_values(found: Comparison, compared: Compared, label: str, precision: str, **attributes: Any) -> None:
    """Adds the errors of value and gradients to a comparison, and marks it if one is too large.

    Raises:
        InputError: If the module does not support what its attributes ask for.
    """
    try:
        errors = compared.errors(compared.on_device(precision, **attributes))
    except InputError:
        raise
    except Exception as error:  # of one algorithm in one precision; the others are compared all the same
        found.figures[f"{label} {precision}"] = {"failed": describe(error)[:200]}
        if found.outcome == "measured":
            found.outcome, found.reason = "failed", f"{label} {precision}: {describe(error)[:200]}"
        return
    value = errors.pop("value", 0.0)
    worst = max(errors, key=errors.__getitem__, default="")
    gradient = errors.get(worst, 0.0)
    # JSON has no infinity.
    shown = {"value": min(value, 1e9), "gradient": min(gradient, 1e9), "of": worst}
    found.figures[f"{label} {precision}"] = shown
    if not max(value, gradient) <= TOLERANCE[precision]:
        found.add_wrong(f"{label} {precision}: value {value:.1e}, gradient of {worst} {gradient:.1e}")


def attention_checks(problem: Problem, situation: str) -> Iterator[Check]:
    """For every term set: each algorithm in each precision."""
    for terms in problem.sets:
        yield Check(f"{situation} {terms}", partial(_check_attention, problem, SITUATIONS[situation], terms))


def compared_attention(problem: Problem, situation: Situation, terms: str, **settings: Any) -> Compared:
    """An attention beside its definition."""
    attention = build_attention(problem, situation, terms, **settings)
    definition = copy.deepcopy(attention).eval()
    definition.algorithm = "dense"
    size = problem.size(situation.ndim)
    tensors, constants = [torch.randn(size)], {}
    if situation.keys is not None:
        size = (size[0], situation.keys, size[2])
        tensors.append(torch.randn(size))
    if situation.padded:
        constants["key_padding_mask"] = padding_of(size, situation.ndim)
    return Compared(attention, definition, tensors, constants)


def _check_attention(problem: Problem, situation: Situation, terms: str, found: Comparison) -> None:
    compared = compared_attention(problem, situation, terms)
    # In the order of worth: what users get, then every algorithm by its name. The loops of "reference" are too slow.
    names = ["auto", *(one.name for one in algorithms.ORDER if one.name != "reference")]
    for name in names:
        for precision in problem.precisions:
            try:
                judge_values(found, compared, name, precision, algorithm=name)
            except InputError:
                if name == "auto":
                    raise
                break  # it does not support this attention


def dropout_checks(problem: Problem) -> Iterator[Check]:
    """The same seed drops the same weights, another seed drops others, and the mean over seeds is that without."""
    for situation in ("map", "map, window 5", "sentence, padded", "sentence, causal"):
        for terms in problem.sets:
            yield Check(f"{situation} {terms}", partial(_check_dropout, problem, SITUATIONS[situation], terms))


def _check_dropout(problem: Problem, situation: Situation, terms: str, found: Comparison) -> None:
    compared = compared_attention(problem, situation, terms, dropout=0.25)
    precision = "bf16" if on_gpu() else "float32"

    def draw(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return compared.on_device(precision)

    with deterministic():
        first, second, other = draw(1), draw(1), draw(2)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    if different:
        found.add_wrong(f"the same seed gives another {', '.join(different)}")
    if torch.equal(first["value"], other["value"]):
        found.add_wrong("another seed drops the same weights")
    expected = compared.expected["value"]
    noise = (first["value"].double().cpu() - expected).norm() / SEEDS**0.5
    mean = compared.mean_value(precision, SEEDS)
    found.figures["distance of the mean over seeds, in deviations"] = ratio = float((mean - expected).norm() / noise)
    if not ratio < 2.5:
        found.add_wrong(f"the mean over {SEEDS} seeds is {ratio:.1f} deviations away from the output without dropout")


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A deformable or dynamic convolution.

    Attributes:
        ndim: 1 for sentences, 2 for maps.
        settings: Arguments of its class.
        padded: Whether positions are padding.
    """

    ndim: Literal[1, 2]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    padded: bool = False


DEFORMABLE: Mapping[str, Convolution] = {
    "map": Convolution(2),
    "map, modulated": Convolution(2, {"modulated": True}),
    "map, stride 2": Convolution(2, {"stride": 2}),
    "map, dilation 2": Convolution(2, {"dilation": 2}),
    "map, groups": Convolution(2, {"groups": 2, "offset_groups": 4}),
    "map, padded": Convolution(2, padded=True),
    "sentence": Convolution(1),
    "sentence, modulated, padded": Convolution(1, {"modulated": True}, padded=True),
    "sentence, causal": Convolution(1, {"causal": True}),
}
DYNAMIC: Mapping[str, Convolution] = {
    "map, kernel 3": Convolution(2, {"kernel_size": 3}),
    "map, kernel 13": Convolution(2, {"kernel_size": 13}),
    "map, kernel 31": Convolution(2, {"kernel_size": 31}),
    "map, renormalised, padded": Convolution(2, {"kernel_size": 5, "renorm_padding": True}, padded=True),
    "sentence, kernel 3": Convolution(1, {"kernel_size": 3}),
    "sentence, kernel 31, padded": Convolution(1, {"kernel_size": 31}, padded=True),
    "sentence, causal": Convolution(1, {"kernel_size": 7, "causal": True}),
}


def deformable_checks(problem: Problem) -> Iterator[Check]:
    """Each algorithm of `DeformableConv`."""
    for name, convolution in DEFORMABLE.items():
        yield Check(name, partial(_check_convolution, problem, convolution, build_deformable))


def dynamic_checks(problem: Problem) -> Iterator[Check]:
    """Each algorithm of `DynamicConv`."""
    for name, convolution in DYNAMIC.items():
        yield Check(name, partial(_check_convolution, problem, convolution, build_dynamic))


def build_deformable(channels: int, convolution: Convolution) -> tuple[nn.Module, nn.Module, tuple[str, ...]]:
    """A deformable convolution, its definition, and the names of its algorithms.

    Offsets are of about a pixel, and none is near a whole number of pixels, where the gradient has a step.
    """
    settings = dict(convolution.settings)
    module = DeformableConv(channels, channels, ndim=convolution.ndim, **settings)
    scale = (channels * 3**convolution.ndim) ** -0.5
    nn.init.normal_(module.offset.get_parameter("weight"), std=1e-3 * scale)
    bias = module.offset.get_parameter("bias")
    with torch.no_grad():
        bias.copy_(torch.randint(-2, 2, bias.shape) + 0.25 + 0.5 * torch.rand(bias.shape))
    nn.init.normal_(module.weight, std=scale)
    definition = copy.deepcopy(module)
    definition.algorithm = "torchvision" if convolution.ndim == 2 else "gather"
    return module, definition, get_args(deformable.Algorithm)


def build_dynamic(channels: int, convolution: Convolution) -> tuple[nn.Module, nn.Module, tuple[str, ...]]:
    """A dynamic convolution, its definition, and the names of its algorithms."""
    module = DynamicConv(channels, groups=8, ndim=convolution.ndim, **convolution.settings)
    nn.init.normal_(module.kernel_proj.weight, std=1.5 * channels**-0.5)
    return module, module, get_args(dynamic.DynamicAlgorithm)


def _check_convolution(
    problem: Problem,
    convolution: Convolution,
    build: Callable[[int, Convolution], tuple[nn.Module, nn.Module, tuple[str, ...]]],
    found: Comparison,
) -> None:
    torch.manual_seed(0)
    size = problem.size(convolution.ndim)
    module, definition, names = build(size[1 if convolution.ndim == 2 else 2], convolution)
    constants = {"key_padding_mask": padding_of(size, convolution.ndim)} if convolution.padded else {}
    compared = Compared(module, definition, [torch.randn(size)], constants)
    for name in (name for name in names if name != "reference"):
        for precision in problem.precisions:
            if name != "auto" and not supports(module, name):
                break
            judge_values(found, compared, name, precision, algorithm=name)


def supports(module: nn.Module, algorithm: str) -> bool:
    """Whether a convolution has an algorithm for its number of dimensions and its settings on the device."""
    settings: dict[str, Any] = {"ndim": module.ndim, "algorithm": algorithm, "device": device()}
    try:
        if isinstance(module, DeformableConv):
            small: nn.Module = DeformableConv(8, 8, 3, **settings)
        else:
            small = DynamicConv(8, 3, 8, renorm_padding=module.renorm_padding, **settings)  # type: ignore[arg-type]
        with torch.no_grad():
            small(torch.zeros((1, 8, 3, 3) if module.ndim == 2 else (1, 3, 8), device=device()))
    except InputError:
        return False
    return True


def measure_attention(case: Case, run: Run) -> Iterator[Comparison]:
    """All situations of a case, whose sides they are."""
    for situation in case.sides:
        yield from run_checks(attention_checks(case.problem, situation), run)


def measure_with(checks: Callable[[Problem], Iterator[Check]]) -> Callable[[Case, Run], Iterator[Comparison]]:
    """The function of a case that makes these checks."""
    return lambda case, run: run_checks(checks(case.problem), run)


def table(result: Result) -> Table:
    """The largest errors by algorithm and precision, then what is not as it should be."""
    worst: dict[str, dict[str, float]] = {}
    for comparison in result.comparisons:
        for name, figures in comparison.figures.items():
            if isinstance(figures, dict) and "value" in figures:
                row = worst.setdefault(name, {"cases": 0, "value": 0.0, "gradient": 0.0})
                row["cases"] += 1
                for kind in ("value", "gradient"):
                    row[kind] = max(row[kind], figures[kind])
    cells = [
        [
            name,
            f"{row['cases']:.0f}",
            f"{row['value']:.1e}",
            f"{row['gradient']:.1e}",
            f"{TOLERANCE[_precision(name)]:g}",
        ]
        for name, row in worst.items()
    ]
    return Table(["algorithm, precision", "cases", "value", "gradient", "tolerance"], cells, outcome_notes(result))


def _precision(name: str) -> str:
    return name.rpartition(" ")[2]


def outcome_notes(result: Result) -> list[str]:
    """How many checks ended how, and each that was not measured, those of one reason together."""
    counts: dict[str, int] = {}
    reasons: dict[tuple[str, str], list[str]] = {}
    for comparison in result.comparisons:
        counts[comparison.outcome] = counts.get(comparison.outcome, 0) + 1
        if comparison.outcome != "measured":
            reasons.setdefault((comparison.outcome, comparison.reason), []).append(comparison.name)
    notes = [", ".join(f"{count} {outcome}" for outcome, count in counts.items())] if counts else []
    for (outcome, reason), names in reasons.items():
        listed = f"{'; '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        notes.append(f"{outcome}: {listed}: {reason}")
    return notes


_MAPS = tuple(name for name in SITUATIONS if SITUATIONS[name].ndim == 2)
_SENTENCES = tuple(name for name in SITUATIONS if SITUATIONS[name].ndim == 1)
SMALL = Problem(map=(2, 16, 5, 6), sentence=(3, 9, 16), heads=2, sets=("1111", "0110", "0011", "0010"))
_QUICK = {"problem": dataclasses.replace(SMALL, precisions=("float32", "bf16"))}

CASES = (
    Case(
        "device_check.correctness.maps",
        "values and gradients of attention on maps beside float64",
        measure_attention,
        Problem(),
        sides=_MAPS,
        table=table,
        quick=_QUICK,
    ),
    Case(
        "device_check.correctness.sentences",
        "values and gradients of attention on sentences beside float64",
        measure_attention,
        Problem(),
        sides=_SENTENCES,
        table=table,
        quick=_QUICK,
    ),
    Case(
        "device_check.correctness.deformable",
        "values and gradients of deformable convolution beside float64",
        measure_with(deformable_checks),
        Problem(),
        table=table,
        quick=_QUICK,
    ),
    Case(
        "device_check.correctness.dynamic",
        "values and gradients of dynamic convolution beside float64",
        measure_with(dynamic_checks),
        Problem(),
        table=table,
        quick=_QUICK,
    ),
    Case(
        "device_check.correctness.dropout",
        "dropout: the same seed, another seed, the mean over seeds",
        measure_with(dropout_checks),
        Problem(),
        table=table,
        quick=_QUICK,
    ),
)

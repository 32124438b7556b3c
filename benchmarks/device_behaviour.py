"""What values do not show: operators that are well formed, runs that repeat bit by bit, steps that never wait."""

import dataclasses
import importlib
import pkgutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd  # noqa: PLC2701 - torch has no public name
from torch._subclasses.fake_tensor import (  # noqa: PLC2701 - torch has no public name
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.library import CustomOpDef  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 - the same
from torch.utils._pytree import tree_map_only  # noqa: PLC2701 - the same

import lightning_attn.attention
from benchmarks.case import Case, Table
from benchmarks.checks import Check
from benchmarks.device import autocast, deterministic, device, no_synchronisation, on_gpu, synchronize
from benchmarks.device_correctness import (
    DEFORMABLE,
    DYNAMIC,
    SITUATIONS,
    SMALL,
    Problem,
    build_attention,
    build_deformable,
    build_dynamic,
    measure_with,
    outcome_notes,
    padding_of,
    supports,
)
from benchmarks.results import Comparison, Result, Target
from lightning_attn.attention import AttentionSpec, algorithms
from lightning_attn.attention.algorithms import AttentionProblem
from lightning_attn.attention.layout import Layout

NAMESPACE = "lightning_attn"
_CALLS = 3  # of an operator that are checked: with other options, and in the backward pass


@dataclasses.dataclass
class Step:
    """A module on inputs.

    Attributes:
        module: On the device.
        inputs: Those with gradients.
        constants: Further keyword arguments.
    """

    module: nn.Module
    inputs: Sequence[Tensor]
    constants: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def run(self, precision: str = "float32") -> list[Tensor]:
        """The output, and the gradients of its sum of squares."""
        with autocast(precision):
            output = self.module(*self.inputs, **self.constants)
        leaves = [*self.inputs, *self.module.parameters()]
        total = output.float().square().sum()
        return [output.detach(), *torch.autograd.grad(total, leaves, materialize_grads=True)]


def attention_step(problem: Problem, situation: str, terms: str, **settings: Any) -> Step:
    """An attention of `device_correctness`."""
    where = SITUATIONS[situation]
    attention = build_attention(problem, where, terms, **settings).to(device())
    size = problem.size(where.ndim)
    inputs, constants = [torch.randn(size)], {}
    if where.keys is not None:
        size = (size[0], where.keys, size[2])
        inputs.append(torch.randn(size))
    if where.padded:
        constants["key_padding_mask"] = padding_of(size, where.ndim).to(device())
    return Step(attention, [tensor.to(device()).requires_grad_() for tensor in inputs], constants)


def convolution_step(problem: Problem, kind: str, name: str, algorithm: str = "auto") -> Step:
    """A deformable or dynamic convolution of `device_correctness`."""
    torch.manual_seed(0)
    convolution = (DEFORMABLE if kind == "deformable" else DYNAMIC)[name]
    size = problem.size(convolution.ndim)
    build = build_deformable if kind == "deformable" else build_dynamic
    module: Any = build(size[1 if convolution.ndim == 2 else 2], convolution)[0]
    module.algorithm = algorithm
    constants = {"key_padding_mask": padding_of(size, convolution.ndim).to(device())} if convolution.padded else {}
    return Step(module.to(device()), [torch.randn(size, device=device()).requires_grad_()], constants)


def convolution_algorithms(kind: str, ndim: int) -> list[str]:
    """The algorithms of a convolution for this number of dimensions, but not the loops of the definition."""
    problem, build = SMALL, build_deformable if kind == "deformable" else build_dynamic
    convolutions = (DEFORMABLE if kind == "deformable" else DYNAMIC).values()
    module, _, names = build(problem.map[1], next(one for one in convolutions if one.ndim == ndim))
    return [name for name in names if name not in ("auto", "reference") and supports(module, name)]


# --- Operators -------------------------------------------------------------------------------------------------------


class RecordedCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the arguments of this project's operators.

    Attributes:
        calls: The first few calls of each, by name.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation as it is."""
        if func.namespace == NAMESPACE:
            known = self.calls.setdefault(func.name(), [])
            if len(known) < _CALLS:
                with_gradients = "backward" not in func.name()  # an operator of a backward pass has no derivative
                known.append((func, _copied(args, with_gradients), _copied(kwargs or {}, with_gradients)))
        return func(*args, **(kwargs or {}))


def _copied(value: Any, with_gradients: bool) -> Any:
    """Copies of all tensors, with their strides."""

    def copied(tensor: Tensor) -> Tensor:
        same = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        return same.copy_(tensor.detach()).requires_grad_(tensor.requires_grad and with_gradients)

    return tree_map_only(Tensor, copied, value)


def recorded_calls(steps: Sequence[Step]) -> RecordedCalls:
    """The calls of operators in steps: run as they are, compiled before autograd, and compiled after it."""
    recorded = RecordedCalls()

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with recorded:
                return graph(*arguments)

        return run

    with_backward = aot_autograd(fw_compiler=backend, bw_compiler=backend)
    for step in steps:
        with recorded:
            step.run()
        for compiler in (backend, with_backward):
            torch.compiler.reset()
            compiled = torch.compile(step.module, backend=compiler)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dataclasses.replace(step, module=compiled).run()  # type: ignore[arg-type]
    torch.compiler.reset()
    return recorded


def known_operators() -> set[str]:
    """The names of all operators that the attention package registers on this machine, such as `a_namespace::name`."""
    names = set()
    for module in pkgutil.walk_packages(lightning_attn.attention.__path__, f"{lightning_attn.attention.__name__}."):
        try:
            found = vars(importlib.import_module(module.name)).values()
        except ImportError:  # kernels of a compiler that is not installed
            continue
        operators = (one for one in found if isinstance(one, CustomOpDef))
        names |= {repr(one).removeprefix("<CustomOpDef(").removesuffix(")>") for one in operators}
    return {name for name in names if name.startswith(f"{NAMESPACE}::")}


def operator_checks(problem: Problem) -> Iterator[Check]:
    """`torch.library.opcheck` of every operator on the arguments of real calls."""
    steps: dict[str, Callable[[], Step]] = {}
    for situation in ("map", "sentence, causal"):
        where = SITUATIONS[situation]
        sizes = (1, 9) if where.ndim == 1 else (5, 6)
        layout = Layout(sizes, sizes, causal=where.ndim == 1)
        facts = AttentionProblem("1111", where.ndim, layout, device=device().type, dropout=0.1)
        for algorithm in algorithms.ORDER:
            if algorithm.unsupported_reason(facts) is None and algorithm.name != "reference":
                name = algorithm.name
                make = partial(attention_step, problem, situation, "1111", dropout=0.1, algorithm=name)
                steps[f"attention {name}, {situation}"] = make
    for kind, convolutions in (("deformable", DEFORMABLE), ("dynamic", DYNAMIC)):
        for ndim in (2, 1):
            first = next(name for name, one in convolutions.items() if one.ndim == ndim)
            for name in convolution_algorithms(kind, ndim):
                steps[f"{kind} {name}, {first}"] = partial(convolution_step, problem, kind, first, name)
    for name, build in steps.items():
        yield Check(name, partial(_check_operators, build), seconds=5.0)


def _check_operators(make: Callable[[], Step], found: Comparison) -> None:
    for name, calls in recorded_calls([make()]).calls.items():
        for operator, arguments, keywords in calls:
            torch.library.opcheck(operator, arguments, keywords)
        found.figures[name] = len(calls)


def operator_table(result: Result) -> Table:
    """A line for each operator: how many of its calls were checked."""
    counts = dict.fromkeys(sorted(known_operators()), 0)
    for comparison in result.comparisons:
        for name, count in comparison.figures.items():
            counts[name] = counts.get(name, 0) + count
    return Table(["operator", "calls"], [[name, str(count)] for name, count in counts.items()], outcome_notes(result))


# --- Determinism -----------------------------------------------------------------------------------------------------


def determinism_checks(problem: Problem) -> Iterator[Check]:
    """Two runs under deterministic algorithms, bit by bit."""
    precision = "bf16" if on_gpu() else "float32"
    for situation in ("map", "map, window 5", "sentence, causal", "sentence, cross, padded"):
        for terms in problem.sets:
            make = partial(attention_step, problem, situation, terms, dropout=0.1 if "sentence" in situation else 0.0)
            yield Check(f"{situation} {terms}", partial(_check_repeats, make, precision))
    for kind, convolutions in (("deformable", DEFORMABLE), ("dynamic", DYNAMIC)):
        for name in convolutions:
            yield Check(
                f"{kind} {name}", partial(_check_repeats, partial(convolution_step, problem, kind, name), precision)
            )


def _check_repeats(make: Callable[[], Step], precision: str, found: Comparison) -> None:
    step = make()
    names = ["value", *(f"input {number}" for number in range(len(step.inputs)))]
    names += [name for name, _ in step.module.named_parameters()]

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        return step.run(precision)

    with deterministic():
        first, second = run(), run()
    different = [name for name, one, two in zip(names, first, second, strict=True) if not torch.equal(one, two)]
    if different:
        found.add_wrong(f"another {', '.join(different)} in a second run under deterministic algorithms")


# --- Host synchronisations -------------------------------------------------------------------------------------------


def synchronisation_checks(problem: Problem) -> Iterator[Check]:
    """A training step of each module, which must not wait for the GPU.

    Without a GPU the forward pass runs on fake CUDA tensors, which have no values to ask for.
    """
    for situation in SITUATIONS:
        for terms in problem.sets:
            dropout = 0.1 if "sentence" in situation else 0.0
            make = partial(attention_step, problem, situation, terms, dropout=dropout)
            yield Check(f"{situation} {terms}", partial(check_waits, make))
    for kind, convolutions in (("deformable", DEFORMABLE), ("dynamic", DYNAMIC)):
        for name in convolutions:
            yield Check(f"{kind} {name}", partial(check_waits, partial(convolution_step, problem, kind, name)))
    for name, spec in (
        ("backbone 1111", AttentionSpec(terms="1111", num_heads=problem.heads)),
        ("backbone 0010 deformable", AttentionSpec(terms="0010", convolution="deformable", num_heads=problem.heads)),
    ):
        yield Check(name, partial(check_waits, partial(_backbone_step, spec)), seconds=5.0)
    for terms in ("1111", "0110", "0011"):
        make = partial(_transformer_step, problem, terms)
        yield Check(f"Transformer {terms}", partial(check_waits, make), seconds=5.0)


class _Levels(nn.Module):
    """A backbone whose output is one tensor."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """The mean squares of all maps, `[levels]`."""
        return torch.stack([level.square().mean() for level in self.backbone(images).values()])


def _backbone_step(spec: AttentionSpec) -> Step:
    from lightning_attn.networks.images.backbone import ResNetSpec, build_resnet

    torch.manual_seed(0)
    network = _Levels(build_resnet(ResNetSpec("bottleneck14", width=16), spec)).to(device())
    return Step(network, [torch.randn(2, 3, 64, 96, device=device()).requires_grad_()])


class _TransformerLoss(nn.Module):
    """The mean loss of a Transformer on a batch."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, *, source: Tensor, target: Tensor) -> Tensor:
        """Divided by the number of target tokens, which stays on the device."""
        loss, _, number = self.network.loss(source, target, label_smoothing=0.1)
        mean: Tensor = loss / number
        return mean


def _transformer_step(problem: Problem, terms: str) -> Step:
    from lightning_attn.networks.translation.transformer import Transformer

    torch.manual_seed(0)
    dim = problem.sentence[2]
    spec = AttentionSpec(terms=terms, num_heads=problem.heads, dropout=0.1)
    network = Transformer(97, 0, spec, spec, dim=dim, hidden_dim=2 * dim, encoder_layers=1, decoder_layers=1)
    source, target = torch.randint(1, 97, (4, 12)), torch.randint(1, 97, (4, 9))
    source[1, 7:], target[2, 5:] = 0, 0
    batch = {"source": source.to(device()), "target": target.to(device())}
    return Step(_TransformerLoss(network).to(device()), [], batch)


def check_waits(make: Callable[[], Step], found: Comparison) -> None:
    """Counts how often a training step waits for the GPU, and where."""
    step = make()
    if not on_gpu():
        _check_waits_of_fake_tensors(step, found)
        return
    parameters = [parameter for parameter in step.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def train() -> None:
        with autocast("bf16"):
            output = step.module(*step.inputs, **step.constants)
        output.float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):  # caches are filled, and the optimizer has its state
        train()
    try:
        with no_synchronisation():
            train()
        places: list[str] = []
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        places = _places_of_waits(train)
    _set_waits(found, max(len(places), int(bool(places))), places)


def _places_of_waits(train: Callable[[], None]) -> list[str]:
    """The lines that wait, once for each time that they do."""
    synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in caught if "synchroniz" in str(one.message)]
    return [f"{'/'.join(one.filename.split('/')[-2:])}:{one.lineno}" for one in waits] or ["unknown"]


def _check_waits_of_fake_tensors(step: Step, found: Comparison) -> None:
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        warnings.simplefilter("ignore")

        def fake(tensor: Tensor) -> Tensor:
            return mode.from_tensor(tensor.detach()).to("cuda")

        state = {name: fake(tensor) for name, tensor in step.module.state_dict().items()}
        constants = {name: fake(tensor) for name, tensor in step.constants.items()}
        found.figures["how"] = "forward pass on fake tensors"
        try:
            torch.func.functional_call(step.module, state, tuple(map(fake, step.inputs)), constants)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            _set_waits(found, 1, [str(error)])
        else:
            _set_waits(found, 0, [])


def _set_waits(found: Comparison, count: int, places: Sequence[str]) -> None:
    found.figures["host synchronisations"] = count
    if places:
        found.figures["places"] = sorted(set(places))


def judge_synchronisations(result: Result) -> None:
    """There are none: one target for all of them."""
    counts = [comparison.figures.get("host synchronisations") for comparison in result.comparisons]
    known = [count for count in counts if count is not None]
    for comparison in result.comparisons:
        comparison.targets = []
    name = f"host synchronisations in {len(known)} training steps"
    result.comparisons[0].targets = [Target(name, sum(known) if known else None, 0)]


def table(result: Result) -> Table:
    """Those that found something."""
    cells = [
        [comparison.name, str(comparison.figures["host synchronisations"]), ", ".join(comparison.figures["places"])]
        for comparison in result.comparisons
        if comparison.figures.get("host synchronisations")
    ]
    targets = [target for comparison in result.comparisons for target in comparison.targets]
    return Table(["check", "host synchronisations", "where"], cells, [*targets, *outcome_notes(result)])


_QUICK = {"problem": dataclasses.replace(SMALL, sets=("1111",))}
CASES = (
    Case(
        "device_check.correctness.synchronisations",
        "training steps that do not wait for the GPU",
        measure_with(synchronisation_checks),
        Problem(),
        judge=judge_synchronisations,
        table=table,
        quick=_QUICK,
    ),
    Case(
        "device_check.correctness.determinism",
        "two runs under deterministic algorithms, bit by bit",
        measure_with(determinism_checks),
        Problem(),
        table=table,
        quick=_QUICK,
    ),
    Case(
        "device_check.correctness.operators",
        "torch.library.opcheck of this project's operators",
        measure_with(operator_checks),
        SMALL,
        table=operator_table,
    ),
)

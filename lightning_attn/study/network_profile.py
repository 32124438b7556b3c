"""What a network costs: parameters, multiply-adds, time and memory, of the whole and of its parts."""

import contextlib
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_attn.attention import AttentionSpec, DeformableConv, DynamicConv, TransformerAttention
from lightning_attn.attention.flops import paper_count
from lightning_attn.study.memory import growth_of_memory
from lightning_attn.study.profile import OwnCounts, count_own_multiply_adds, innermost_module
from lightning_attn.tasks.workload import Workload

__all__ = ["Latency", "NetworkProfile", "Part", "Pass", "profile_network"]

_ATTENTION = (TransformerAttention, DynamicConv, DeformableConv)
# Which the paper counts as free: gates, normalisation, sampling.
_FREE = ("aten.mul", "aten.mul_", "aten.addcmul", "aten.addcmul_", "torchvision.roi_align")
_UNMEASURED = 2  # runs before the measured ones
_LEAST, _BUDGET = 3, 60.0  # runs in any case, and seconds after which no other is started


@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds of one run: median and quartiles of several.

    Attributes:
        median: The median.
        lower_quartile: A quarter of the runs took no longer.
        upper_quartile: A quarter of the runs took as long or longer.
        runs: Number of measured runs.
    """

    median: float
    lower_quartile: float
    upper_quartile: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Latency":
        """Of measured runs, at least one."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, lower, upper, len(seconds))


@dataclasses.dataclass(frozen=True)
class Pass:
    """The cost of one batch in one kind of pass.

    Attributes:
        multiply_adds: Those that were really done.
        paper_multiply_adds: By the paper's rules, which are about the forward pass alone.
        paper_attention: The part of them that attention adds to the network without it ("w/o").
        attention: The part of `multiply_adds` that attention adds to the network without it; of the forward pass.
        latency: None on the meta device.
        per_second: Images or tokens a second, at the median; None on the meta device.
        peak_memory: Bytes at the peak; None where they cannot be measured.
        uncounted: Elements written by operators whose multiplications, if any, are not counted, by operator.
    """

    multiply_adds: int
    paper_multiply_adds: int | None
    paper_attention: int | None
    attention: int | None
    latency: Latency | None
    per_second: float | None
    peak_memory: int | None
    uncounted: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Part:
    """A module, with everything in it.

    Attributes:
        name: Its path in the network; `""` is the whole.
        kind: Its class.
        depth: Number of modules around it.
        parameters: Number of parameters; of one that several modules share, at the first of them.
        multiply_adds: Done in the forward pass of a batch.
        paper_multiply_adds: By the paper's rules.
        seconds: Of the forward pass, measured apart from the totals; None on the meta device.
        own_parameters: Those outside its children.
        own_multiply_adds: Those outside its children.
        own_paper_multiply_adds: Those outside its children.
        own_seconds: Those outside its children.
    """

    name: str
    kind: str
    depth: int
    parameters: int
    multiply_adds: int
    paper_multiply_adds: int
    seconds: float | None
    own_parameters: int
    own_multiply_adds: int
    own_paper_multiply_adds: int
    own_seconds: float | None


@dataclasses.dataclass(frozen=True)
class NetworkProfile:
    """The result of `profile_network`.

    Attributes:
        parameters: Number of parameters.
        trained_parameters: Number of those that are trained.
        forward: Inference of a batch, without gradients.
        training_step: Forward and backward pass and optimizer step; its multiply-adds are those of both passes.
        parts: The network and its modules that have parameters, each before those in it.
    """

    parameters: int
    trained_parameters: int
    forward: Pass
    training_step: Pass
    parts: tuple[Part, ...]


def profile_network(
    workload: Workload,
    build_optimizer: Callable[[nn.Module], Optimizer],
    *,
    repetitions: int = 10,
    autocast: torch.dtype | None = None,
    progress: Callable[[str], object] = lambda what: None,
) -> NetworkProfile:
    """Measures a network: totals without any hook, then the shares of its parts in passes of their own.

    On the meta device multiply-adds and parameters alone are known. Attention has its plain form there, since what a
    device would choose is not known.

    Args:
        workload: The network and a batch.
        build_optimizer: Makes the optimizer. Its learning rates are set to zero, so that the weights stay.
        repetitions: Measured runs of each pass; fewer, but not below 3, once they have taken a minute.
        autocast: Dtype of automatic mixed precision; None for none.
        progress: Called with what is measured next.
    """
    network = workload.network
    device = next(network.parameters()).device
    real = device.type != "meta"
    names = _named_parts(network)

    def cast() -> contextlib.AbstractContextManager[object]:
        return torch.autocast(device.type, autocast) if real and autocast else contextlib.nullcontext()

    def forward() -> None:
        with torch.no_grad(), cast():
            workload.forward()

    def passes() -> None:
        with cast():
            loss = workload.loss()
        loss.backward()  # type: ignore[no-untyped-call]

    progress("multiply-adds of the forward pass")
    network.eval()
    paper = _PaperCounts(names)
    with paper.observing():
        counts = count_own_multiply_adds(forward, names)
    measured = _measured(forward, device, repetitions, workload, progress, "forward pass") if real else _NOTHING
    seconds = _seconds_of_parts(forward, names, device) if real else {}
    progress("multiply-adds of the training step")
    network.train()
    training_counts = count_own_multiply_adds(passes, names)
    network.zero_grad()
    trained: _Measured = _NOTHING
    if real:
        optimizer = build_optimizer(network)
        for group in optimizer.param_groups:
            group["lr"] = 0.0

        def step() -> None:
            optimizer.zero_grad()
            passes()
            optimizer.step()

        trained = _measured(step, device, repetitions, workload, progress, "training step", optimizer)
    parts = _parts(names, counts, paper, seconds, workload.paper_omits_own)
    parameters = list(network.parameters())
    return NetworkProfile(
        parameters=sum(one.numel() for one in parameters),
        trained_parameters=sum(one.numel() for one in parameters if one.requires_grad),
        forward=Pass(
            _total(counts),
            parts[0].paper_multiply_adds,
            paper.attention,
            sum(sum(counts.by_module.get(name, {}).values()) for name in paper.added),
            measured.latency,
            measured.rate,
            measured.peak,
            counts.uncounted,
        ),
        training_step=Pass(
            *(_total(training_counts), None, None, None),
            *(trained.latency, trained.rate, trained.peak, training_counts.uncounted),
        ),
        parts=parts,
    )


@dataclasses.dataclass(frozen=True)
class _Measured:
    latency: Latency | None = None
    rate: float | None = None
    peak: int | None = None


_NOTHING = _Measured()


def _measured(
    run: Callable[[], object],
    device: torch.device,
    repetitions: int,
    workload: Workload,
    progress: Callable[[str], object],
    what: str,
    optimizer: Optimizer | None = None,
) -> _Measured:
    progress(f"memory and time of the {what}")
    for _ in range(_UNMEASURED):
        run()
    # Gradients and the optimizer's state exist before a step as they do after it.
    tensors = [*workload.network.parameters(), *workload.network.buffers()]
    tensors += [one.grad for one in workload.network.parameters() if one.grad is not None]
    if optimizer is not None:
        tensors += [one for state in optimizer.state.values() for one in state.values() if isinstance(one, Tensor)]
    held = sum(one.numel() * one.element_size() for one in tensors)
    growth = growth_of_memory(run, device)
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < repetitions and (len(seconds) < _LEAST or time.perf_counter() - begin < _BUDGET):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    latency = Latency.of(seconds)
    return _Measured(latency, workload.units / latency.median, None if growth is None else held + growth)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _named_parts(network: nn.Module) -> dict[nn.Module, str]:
    """The modules that have parameters or buffers, by path; those inside an attention are parts of it."""
    names: dict[nn.Module, str] = {}
    inside: tuple[str, ...] = ()
    for name, module in network.named_modules():
        if name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, _ATTENTION):
            inside += (f"{name}.",)
        has_tensors = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
        if has_tensors or not name:
            names[module] = name
    return names


class _PaperCounts:
    """Collects the paper's count of attentions and deformable convolutions while they run."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        self.names: dict[nn.Module, str] = {
            module: name for module, name in names.items() if isinstance(module, _ATTENTION)
        }
        self.counts = dict.fromkeys(self.names.values(), 0)
        # A deformable convolution of a map replaces a plain one, which the network without attention has.
        self.added = {
            name for module, name in self.names.items() if not (isinstance(module, DeformableConv) and module.ndim == 2)
        }

    @property
    def attention(self) -> int:
        """What attention adds to the network without it."""
        return sum(self.counts[name] for name in self.added)

    @contextlib.contextmanager
    def observing(self) -> Iterator[None]:
        handles = [module.register_forward_hook(self._add, with_kwargs=True) for module in self.names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        key = args[1] if len(args) > 1 else kwargs.get("key")
        count = _paper_count(module, args[0], key, output)
        self.counts[self.names[module]] += count


def _paper_count(module: nn.Module, query: Tensor, key: Tensor | None, output: Tensor) -> int:
    if isinstance(module, DeformableConv):  # as the convolution that it replaces, without the branch of the offsets
        positions = output.shape[1:2] if module.ndim == 1 else output.shape[2:]
        return output.shape[0] * math.prod(positions) * module.weight.numel()
    assert isinstance(module, TransformerAttention | DynamicConv)
    if isinstance(module, DynamicConv):
        spec = AttentionSpec(mechanism="dynamic", kernel_size=module.kernel_size, groups=module.groups)
    else:
        spec = AttentionSpec(
            terms=module.terms, num_heads=module.num_heads, window=module.window, kv_stride=module.kv_stride
        )

    def size(x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape[1:2] if module.ndim == 1 else x.shape[2:])

    return query.shape[0] * paper_count(spec, module.dim, size(query), None if key is None else size(key)).total


def _seconds_of_parts(
    run: Callable[[], object], names: Mapping[nn.Module, str], device: torch.device
) -> dict[str, float]:
    """Seconds that each module itself takes in one run, the median of three."""
    runs: list[dict[str, float]] = []
    for _ in range(_LEAST):
        events: list[tuple[str, Any]] = []

        def mark(name: str, events: list[tuple[str, Any]] = events) -> None:
            if device.type == "cuda":
                event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                event.record()
                events.append((name, event))
            else:
                events.append((name, time.perf_counter()))

        mark("")
        with innermost_module(names, mark):
            run()
        mark("")
        _synchronize(device)
        seconds = dict.fromkeys(names.values(), 0.0)
        for (name, start), (_, stop) in itertools.pairwise(events):
            seconds[name] += start.elapsed_time(stop) / 1e3 if device.type == "cuda" else stop - start
        runs.append(seconds)
    return {name: statistics.median(one[name] for one in runs) for name in runs[0]}


def _total(counts: OwnCounts) -> int:
    return sum(sum(operators.values()) for operators in counts.by_module.values())


def _parts(
    names: Mapping[nn.Module, str], counts: OwnCounts, paper: _PaperCounts, seconds: Mapping[str, float], omits: bool
) -> tuple[Part, ...]:
    own: dict[str, dict[str, float]] = {}
    seen: set[nn.Parameter] = set()
    leaves = set(paper.names.values())
    for module, name in names.items():
        done = counts.by_module.get(name, {})
        products = sum(number for operator, number in done.items() if operator not in _FREE)
        inner = module.parameters(recurse=name in leaves)
        new = [one for one in inner if one not in seen]
        seen.update(new)
        own[name] = {
            "parameters": sum(one.numel() for one in new),
            "multiply_adds": sum(done.values()),
            "paper": paper.counts.get(name, 0 if omits and not name else products),
            "seconds": seconds.get(name, 0.0),
        }
    kinds = {name: type(module).__name__ for module, name in names.items()}
    found = []
    for name in own:
        inside = [
            values for other, values in own.items() if other == name or other.startswith(f"{name}." if name else "")
        ]
        total = {key: sum(values[key] for values in inside) for key in own[name]}
        found.append(
            Part(
                name,
                kinds[name],
                0 if not name else name.count(".") + 1,
                int(total["parameters"]),
                int(total["multiply_adds"]),
                int(total["paper"]),
                total["seconds"] if seconds else None,
                int(own[name]["parameters"]),
                int(own[name]["multiply_adds"]),
                int(own[name]["paper"]),
                own[name]["seconds"] if seconds else None,
            )
        )
    return tuple(found)

"""Counts the multiply-adds of a module while it runs, for comparison with the paper's count."""

import contextlib
import dataclasses
import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torchvision.ops  # noqa: F401 - registers torchvision::deform_conv2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 - torch has no public name
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: PLC2701 - torch has no public name
from torch.utils.flop_counter import FlopCounterMode

from lightning_attn.attention.factory import build_attention
from lightning_attn.attention.flops import paper_count
from lightning_attn.attention.kernels import HAS_TRITON
from lightning_attn.attention.spec import AttentionSpec
from lightning_attn.errors import InputError

_aten, _torchvision = torch.ops.aten, torch.ops.torchvision

# Products of one bilinear sample: four for its value, and in the backward pass four for the gradient of the map and
# four for that of each coordinate.
_BILINEAR_PRODUCTS = 4


@dataclasses.dataclass(frozen=True)
class MeasuredCount:
    """Multiply-adds of one run; half of the FLOPs of torch's counter.

    Attributes:
        total: All multiply-adds.
        by_operator: The part of each operator, such as `"aten.bmm"`.
        uncounted: Elements written by operators without a formula (additions, exponentials, softmax, copies, ...), by
            operator, so that missing formulas are visible.
    """

    total: int
    by_operator: dict[str, int]
    uncounted: dict[str, int]


def count_multiply_adds(module: Callable[..., Any], *args: Any, backward: bool = False, **kwargs: Any) -> MeasuredCount:
    """Runs a module once and counts the multiply-adds of the operators that it calls.

    It counts matrix products, convolutions, fused attention, bilinear sampling, deformable convolution and element-wise
    products, also inside custom operators written in Python. Padding and masks save nothing in a fused operator.
    Exponentials, normalisation, sums and data movement (indexing, copies) are not multiply-adds. No hooks are set: an
    attention with hooks calls its projections as modules, which can be more work.

    The module runs in its current mode: in training mode it applies dropout and updates batch statistics. Existing
    gradients of its parameters do not change.

    Args:
        module: A module or a function. Not compiled, since a compiled graph hides its operators, and without
            FlexAttention, which torch's counter cannot run (it raises a TypeError).
        *args: Positional arguments of the call.
        backward: Also count the backward pass, to the parameters and the arguments that require a gradient. Without it
            the forward pass runs under `torch.no_grad()`.
        **kwargs: Keyword arguments of the call.

    Raises:
        ValueError: With `backward`, if no output requires a gradient.
    """
    on_cuda = any(isinstance(x, Tensor) and x.is_cuda for x in tree_leaves((args, kwargs)))
    if backward:  # detached from the graph of the arguments
        args, kwargs = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), (args, kwargs))
    with _counting(on_cuda, _InnermostTracker({})) as (counter, uncounted), torch.set_grad_enabled(backward):
        output = module(*args, **kwargs)
        if backward:
            _run_backward(module, output)
    counts = counter.get_flop_counts()
    by_operator = {str(operator): flops // 2 for operator, flops in counts.get("Global", {}).items() if flops}
    return MeasuredCount(sum(by_operator.values()), by_operator, dict(uncounted.elements))


@dataclasses.dataclass(frozen=True)
class OwnCounts:
    """Multiply-adds of one run by the module that does them itself, outside its named submodules.

    Attributes:
        by_module: For each name the multiply-adds of each operator, such as `"aten.mm"`.
        uncounted: As in `MeasuredCount`.
    """

    by_module: dict[str, dict[str, int]]
    uncounted: dict[str, int]


def count_own_multiply_adds(run: Callable[[], object], names: Mapping[nn.Module, str]) -> OwnCounts:
    """Runs a function once, in the current gradient mode, and attributes multiply-adds to the innermost named module.

    Counts the same operators as `count_multiply_adds`. The backward pass, if `run` has one, is attributed to `""`.

    Args:
        run: Calls the modules.
        names: The modules that are counted separately; `""` is what is outside all of them.
    """
    on_cuda = any(parameter.is_cuda for module in names for parameter in module.parameters())
    with _counting(on_cuda, _InnermostTracker(names)) as (counter, uncounted):
        run()
    counts = {
        name: {str(operator): flops // 2 for operator, flops in operators.items() if flops}
        for name, operators in counter.flop_counts.items()
        if name != "Global"
    }
    return OwnCounts(counts, dict(uncounted.elements))


class _InnermostTracker:
    """Has the interface of torch's ModuleTracker, but names the innermost module alone."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        self.parents = {"Global", ""}
        self._innermost = innermost_module(names, self._changed)

    def _changed(self, name: str) -> None:
        self.parents = {"Global", name}

    def __enter__(self) -> None:
        self._innermost.__enter__()

    def __exit__(self, *_: object) -> None:
        self._innermost.__exit__(None, None, None)


@contextlib.contextmanager
def innermost_module(names: Mapping[nn.Module, str], changed: Callable[[str], object]) -> Iterator[None]:
    """Calls `changed` with the name of the innermost running module whenever that changes; `""` outside all of them."""
    running = [""]

    def enter(module: nn.Module, _: Any) -> None:
        running.append(names[module])
        changed(running[-1])

    def leave(*_: Any) -> None:
        running.pop()
        changed(running[-1])

    handles = []
    for module in names:
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _counting(on_cuda: bool, tracker: _InnermostTracker) -> Iterator[tuple[FlopCounterMode, "_UncountedMode"]]:
    if HAS_TRITON and on_cuda:
        for name in ("deformable", "dynamic"):
            importlib.import_module(f"lightning_attn.attention.kernels.{name}")  # registers formulas of its operators
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    counter.mod_tracker = tracker  # type: ignore[assignment]  # which the counter enters and leaves
    uncounted = _UncountedMode(counter.flop_registry)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # dispatch modes see the operators of their own thread only
    try:
        # The mode that is entered last sees an operator first.
        with uncounted, counter, _CustomOperatorMode(counter.flop_registry):
            yield counter, uncounted
    finally:
        torch.set_num_threads(threads)


def _run_backward(module: Callable[..., Any], output: Any) -> None:
    # A view, since torch's module hooks miss a backward pass that starts at the module's output itself.
    outputs = [x.view_as(x) for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
    if not outputs:
        raise InputError(
            "backward=True, but no output requires a gradient: "
            "set requires_grad=True for the parameters or an argument, or leave backward out."
        )
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        torch.autograd.backward(outputs, [torch.ones(x.shape, dtype=x.dtype, device=x.device) for x in outputs])
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


@dataclasses.dataclass(frozen=True)
class AttentionCost:
    """One row of `attention_costs`.

    Attributes:
        spec: The attention.
        parameters: Number of parameters of its module.
        multiply_adds: Measured in a forward pass.
        paper_multiply_adds: By the paper's counting rules.
    """

    spec: AttentionSpec
    parameters: int
    multiply_adds: int
    paper_multiply_adds: int


def attention_costs(
    specs: Sequence[AttentionSpec], dim: int, size: Sequence[int], role: Literal["self", "causal"] = "self"
) -> list[AttentionCost]:
    """Parameters and multiply-adds, measured and by the paper's rules, of attentions of width `dim`.

    Args:
        specs: The attentions to compare.
        dim: Width C.
        size: `(L,)` for a sequence, `(H, W)` for a map; one input is run on the CPU.
        role: Whether a sequence's attention is causal.

    Raises:
        ValueError: If a spec does not fit `dim` and `role`.
    """
    rows = []
    for spec in specs:
        paper = paper_count(spec, dim, size).total
        # For maps the attention alone: the 3x3 convolution before it is part of the block, with or without attention.
        module = build_attention(spec, dim, 1, role) if len(size) == 1 else build_attention(spec, dim, 2, "head")
        if module is None:
            rows.append(AttentionCost(spec, 0, 0, paper))
            continue
        x = torch.zeros(1, *size, dim) if len(size) == 1 else torch.zeros(1, dim, *size)
        parameters = sum(parameter.numel() for parameter in module.parameters())
        rows.append(AttentionCost(spec, parameters, count_multiply_adds(module.eval(), x).total, paper))
    return rows


class _CustomOperatorMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the kernels of custom operators (`torch.library.custom_op`) with modes on, which torch disables in them."""

    def __init__(self, formulas: Mapping[Any, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.formulas = formulas

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        devices = {x.device.type.upper() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if (
            not isinstance(func, torch._ops.OpOverload)
            or func.namespace in ("aten", "prim", "prims", "torchvision")  # torchvision's are not written in Python
            or func.overloadpacket in self.formulas
            or devices not in ({"CPU"}, {"CUDA"})
        ):
            return func(*args, **kwargs)
        # Its kernel for this device, called without the dispatcher: the counter sees the operators that it calls.
        key = torch._C.DispatchKey.__members__[devices.pop()]
        kernel = torch.library.get_kernel(func, key)
        with self:
            return kernel.call_boxed(torch._C.DispatchKeySet(key), *args, **kwargs)


class _UncountedMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the elements that operators without a formula write."""

    def __init__(self, formulas: Mapping[Any, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.formulas = formulas
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        creates = not any(isinstance(x, Tensor) for x in tree_leaves((args, kwargs)))
        if isinstance(func, torch._ops.OpOverload) and not (
            creates or func.is_view or func.overloadpacket in self.formulas
        ):
            written = [x.numel() for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
            if sum(written):
                self.elements[str(func.overloadpacket)] += sum(written)
        return output


Shape = Sequence[int]


def _matrix_product(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    """The product of `[..., m, k]` and `[..., k, n]`, or of two vectors."""
    return 2 * math.prod(a) * (b[-1] if len(b) > 1 else 1)


def _added_matrix_product(_: Shape, a: Shape, b: Shape, *__: Any, **___: Any) -> int:
    return _matrix_product(a, b)


def _convolution_backward(
    grad: Shape,
    x: Shape,
    weight: Shape,
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    output_mask: Sequence[bool],
    *_: Any,
    **__: Any,
) -> int:
    """As many as the forward pass for each of the two gradients. Torch's formula is wrong with groups."""
    forward = 2 * x[0] * math.prod(weight) * math.prod((x if transposed else grad)[2:])
    return forward * sum(output_mask[:2])


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Two products: energies, and weighted sums of values."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(_: Shape, query: Shape, key: Shape, value: Shape, *__: Any, **___: Any) -> int:
    """Five products: the energies again, and the gradients of weights, values, queries and keys."""
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _grid_sampler(_: Shape, __: Shape, interpolation: int = 0, *___: Any, out_shape: Shape, **____: Any) -> int:
    return 2 * _BILINEAR_PRODUCTS * math.prod(out_shape) if interpolation == 0 else 0


def _grid_sampler_backward(
    grad: Shape,
    _x: Shape,
    _grid: Shape,
    interpolation: int,
    _padding: int,
    _align: bool,
    mask: Sequence[bool],
    **_: Any,
) -> int:
    gradients = mask[0] + 2 * mask[1]
    return 2 * _BILINEAR_PRODUCTS * gradients * math.prod(grad) if interpolation == 0 else 0


def _deform_conv2d(x: Shape, weight: Shape, offset: Shape, _mask: Shape, *rest: Any, out_shape: Shape, **_: Any) -> int:
    """Bilinear samples of all channels at all taps, times the modulation if any, and one convolution of the samples."""
    samples = x[0] * x[1] * math.prod(weight[2:]) * math.prod(offset[2:])
    return 2 * (samples * (_BILINEAR_PRODUCTS + bool(rest[-1])) + math.prod(out_shape) * math.prod(weight[1:]))


def _deform_conv2d_backward(
    grad: Shape, x: Shape, weight: Shape, offset: Shape, _mask: Shape, *rest: Any, **_: Any
) -> int:
    """The samples again, the gradients of samples and weight, and those of map, coordinates and modulation."""
    samples = x[0] * x[1] * math.prod(weight[2:]) * math.prod(offset[2:])
    modulated = bool(rest[-1])
    sampling = _BILINEAR_PRODUCTS * (4 + modulated) + 3 * modulated
    return 2 * (samples * sampling + 2 * math.prod(grad) * math.prod(weight[1:]))


def _roi_align(_: Shape, __: Shape, _scale: float, _h: int, _w: int, samples: int, *___: Any, out_shape: Shape) -> int:
    """Bilinear samples; how many an adaptive number (0) makes depends on the boxes, and is not counted."""
    return 2 * _BILINEAR_PRODUCTS * max(0, samples) ** 2 * math.prod(out_shape)


def _roi_align_backward(grad: Shape, *rest: Any, **_: Any) -> int:
    samples: int = rest[8]
    return 2 * _BILINEAR_PRODUCTS * max(0, samples) ** 2 * math.prod(grad)


def _embedding_bag(
    weight: Shape,
    indices: Shape,
    _offsets: Shape,
    _scale: bool = False,
    _mode: int = 0,
    _sparse: bool = False,
    sample_weights: Shape | None = None,
    *_: Any,
    **__: Any,
) -> int:
    """Weighted sums of rows; without weights nothing is multiplied."""
    return 0 if sample_weights is None else 2 * math.prod(indices) * weight[-1]


def _embedding_bag_backward(grad: Shape, indices: Shape, *rest: Any, **_: Any) -> int:
    """The gradient of the rows; the eleventh argument is the weights of the samples."""
    sample_weights = rest[8]
    return 0 if sample_weights is None else 2 * math.prod(indices) * grad[-1]


def _embedding_bag_weights_backward(grad: Shape, _weight: Shape, indices: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(indices) * grad[-1]


def _dynamic_taps(kernel: Shape, value: Shape, first: int, **_: Any) -> int:
    """A product for every tap, query and channel, where the tap is inside the map along y."""
    taps, queries = kernel[2], kernel[4]
    rows = sum(
        max(0, min(queries, value[3] - shift) - max(0, -shift)) for shift in (tap + first for tap in range(taps))
    )
    return 2 * math.prod(value[:3]) * rows * kernel[3] * kernel[5]


def _dynamic_taps_backward(_: Shape, kernel: Shape, value: Shape, first: int, **__: Any) -> int:
    """The gradients of kernel and values."""
    return 2 * _dynamic_taps(kernel, value, first)


def _product(*_: Any, out_val: Tensor, **__: Any) -> int:
    return 2 * out_val.numel() if out_val.is_floating_point() else 0


_product._get_raw = True  # type: ignore[attr-defined]  # FlopCounterMode then passes tensors: indices are not counted

# Operators that FlopCounterMode omits, or counts wrongly. A formula returns FLOPs from shapes.
_FORMULAS: dict[Any, Callable[..., int]] = {
    **dict.fromkeys((_aten.mv, _aten.dot, _aten.vdot), _matrix_product),
    **dict.fromkeys((_aten.addmm_, _aten.baddbmm_, _aten.addbmm, _aten.addbmm_, _aten.addmv), _added_matrix_product),
    _aten.convolution_backward: _convolution_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    **dict.fromkeys((_aten.grid_sampler_2d, _aten.cudnn_grid_sampler), _grid_sampler),
    _aten.grid_sampler_2d_backward: _grid_sampler_backward,
    _torchvision.deform_conv2d: _deform_conv2d,
    _torchvision._deform_conv2d_backward: _deform_conv2d_backward,
    _torchvision.roi_align: _roi_align,
    _torchvision._roi_align_backward: _roi_align_backward,
    **dict.fromkeys((_aten._embedding_bag, _aten._embedding_bag_forward_only), _embedding_bag),
    _aten._embedding_bag_backward: _embedding_bag_backward,
    _aten._embedding_bag_per_sample_weights_backward: _embedding_bag_weights_backward,
    # Tap by tap as their kernels count, but at once: there are up to 31 x 31 taps.
    torch.ops.lightning_attn.dynamic_taps: _dynamic_taps,
    torch.ops.lightning_attn.dynamic_taps_backward: _dynamic_taps_backward,
    **dict.fromkeys((_aten.mul, _aten.mul_, _aten.addcmul, _aten.addcmul_), _product),
}

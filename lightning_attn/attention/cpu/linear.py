"""Linear layers by oneDNN where torch would use a slower library: float32 on a CPU.

Results equal those of `F.linear` up to the order of summation. Measured figures are in docs/performance.md.

oneDNN compiles code for every pair of a number of rows and a weight shape, and caches the last 1,024 pairs at about
half a megabyte each. Sentences of all lengths would add hundreds of megabytes to a training process; so it is called
with few distinct numbers of rows, at most eight from one power of two to the next. The remaining rows are multiplied by
`F.linear`, or padded with rows of zeros where the weight is in oneDNN's layout.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from lightning_attn.attention.transforms import is_transformed

# The operator that torch.compile uses for a linear layer on a CPU, and the one that lays out a weight for it. Both are
# private to torch: without either, everything here is `F.linear`.
HAS_ONEDNN: bool = (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
)


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32, according to oneDNN; False without oneDNN."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None) if HAS_ONEDNN else None
    return supported is not None and bool(supported())


class Linear(nn.Linear):
    """`nn.Linear`, on a CPU in float32 by oneDNN: forward and backward pass take about a sixth less time."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps `[..., in]` to `[..., out]`."""
        return linear(input, self.weight, self.bias)


class PackedLinear:
    """A linear layer with a fixed weight, laid out once for many products with few rows.

    On a CPU in float32 a product with the 160 rows of a beam search takes 0.55 to 0.7 times as long as with
    `F.linear`, and with 5 rows 0.2 to 0.5 times. Elsewhere it is `F.linear`.

    Args:
        weight: `[out, in]`, used without gradients.
        bias: `[out]`.
    """

    @torch.no_grad()
    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        device = weight.device.type
        # Autocast caches its casts of parameters only: it would cast this copy again in every call.
        autocast = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        self.weight = weight.detach().to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self.packed = HAS_ONEDNN and device == "cpu" and self.dtype == torch.float32
        if self.packed:
            rows = 128  # of the inputs that the layout is optimised for; any number works
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Maps `[..., in]` to `[..., out]`, in the dtype of the weight (made under autocast: that of autocast)."""
        x = x.to(self.dtype)
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        rows = x.shape[:-1].numel()
        padding = -rows % _step(rows, least=4)  # one row takes as long as four: reading the weight dominates
        if padding == 0:
            return _product(x, self.weight, self.bias)
        y = _product(F.pad(x.flatten(0, -2), (0, 0, 0, padding)), self.weight, self.bias)
        return y[:rows].view(*x.shape[:-1], y.shape[-1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, on a CPU in float32 by oneDNN; supports gradients of any order.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]`.

    Returns:
        `[..., out]`.
    """
    use_onednn = (
        HAS_ONEDNN
        and torch.backends.mkldnn.enabled
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() >= 2
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # the compiler chooses for itself
        and not torch._C._is_tracing()
        and not is_transformed()
    )
    if not use_onednn:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        # The output of a Function may be modified in place, a view created inside it may not.
        y: Tensor = _Linear.apply(x.flatten(0, -2), weight, bias)
        return y.view(*x.shape[:-1], weight.shape[0])
    return _split_product(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _split_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            linear(gradient, weight.t()) if needs_x else None,
            rows.t() @ x.flatten(0, -2) if needs_weight else None,  # here torch's default library is as fast
            rows.sum(dim=0) if needs_bias else None,
        )


def _split_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.shape[:-1].numel()
    remaining = rows % _step(rows, least=64)  # oneDNN saves little on small products
    if remaining == 0:
        return _product(x, weight, bias)
    if remaining == rows:
        return F.linear(x, weight, bias)
    first, rest = x.flatten(0, -2).tensor_split([rows - remaining])
    parts = [_product(first, weight, bias), F.linear(rest, weight, bias)]
    joined = torch.cat(parts)
    return joined if x.dim() == 2 else joined.view(*x.shape[:-1], weight.shape[0])


def _step(rows: int, least: int) -> int:
    """The number that the row counts passed to oneDNN must be a multiple of."""
    return max(least, 1 << rows.bit_length() >> 4)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


if HAS_ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
        """FLOPs as torch counts them for `addmm`, so that FlopCounterMode includes this operator."""
        return 2 * x_shape.numel() * weight_shape[0]

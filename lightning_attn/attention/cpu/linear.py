"""Linear layers by oneDNN where torch would take a slower library: float32 on a CPU.

The numbers are those of `F.linear` up to the order of summation. Measured figures are in docs/performance.md.

oneDNN compiles code for every pair of a number of rows and a shape of a weight, and remembers the last 1,024 pairs at
about half a megabyte each. Sentences of all lengths would make a training grow by hundreds of megabytes; therefore it
is given few numbers of rows only, at most eight from one power of two to the next. The rows that are left over are
multiplied as torch does it, or, where the weight's layout is oneDNN's, joined by rows of zeros.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from lightning_attn.attention.transforms import is_transformed

# The operator that torch.compile puts in the place of a linear layer on a CPU, and the one that lays out a weight for
# it. Both are private to torch: without either, everything here is `F.linear`.
HAS_ONEDNN: bool = (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
)


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32, as oneDNN says; without oneDNN, no."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None) if HAS_ONEDNN else None
    return supported is not None and bool(supported())


class Linear(nn.Linear):
    """`nn.Linear`, on a CPU in float32 by oneDNN: forward and backward pass take about a sixth less time."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps `[..., in]` to `[..., out]`."""
        return linear(input, self.weight, self.bias)


class PackedLinear:
    """A linear layer whose weight does not change any more, laid out once for many products with few rows.

    On a CPU in float32 a product with the 160 rows of a beam search takes 0.55 to 0.7 times as long as with
    `F.linear`, and with 5 rows 0.2 to 0.5 times. Elsewhere it is `F.linear`.

    Args:
        weight: `[out, in]`, used without gradients.
        bias: `[out]`.
    """

    @torch.no_grad()
    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        device = weight.device.type
        # Autocast remembers what it casts for parameters only: it would cast this copy again in every call.
        autocast = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        self.weight = weight.detach().to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self.packed = HAS_ONEDNN and device == "cpu" and self.dtype == torch.float32
        if self.packed:
            rows = 128  # of the inputs: what the layout is best for, any number works
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Maps `[..., in]` to `[..., out]`, in the dtype of the weight (made under autocast: that of autocast)."""
        x = x.to(self.dtype)
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        rows = x.shape[:-1].numel()
        added = -rows % _step(rows, least=4)  # one row takes as long as four: reading the weight
        if added == 0:
            return _product(x, self.weight, self.bias)
        y = _product(F.pad(x.flatten(0, -2), (0, 0, 0, added)), self.weight, self.bias)
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
    suits = (
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
    if not suits:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        # A function's own output may be changed in place, a view that it made may not.
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
            rows.t() @ x.flatten(0, -2) if needs_weight else None,  # here the other library is as fast
            rows.sum(dim=0) if needs_bias else None,
        )


def _split_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.shape[:-1].numel()
    left = rows % _step(rows, least=64)  # of small products oneDNN saves little
    if left == 0:
        return _product(x, weight, bias)
    if left == rows:
        return F.linear(x, weight, bias)
    first, rest = x.flatten(0, -2).tensor_split([rows - left])
    parts = [_product(first, weight, bias), F.linear(rest, weight, bias)]
    joined = torch.cat(parts)
    return joined if x.dim() == 2 else joined.view(*x.shape[:-1], weight.shape[0])


def _step(rows: int, least: int) -> int:
    """What the number of rows that oneDNN is given has to be a multiple of."""
    return max(least, 1 << rows.bit_length() >> 4)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


if HAS_ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
        """FLOPs as torch counts those of `addmm`, so that FlopCounterMode sees this operator too."""
        return 2 * x_shape.numel() * weight_shape[0]

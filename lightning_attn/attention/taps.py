"""Sums over the windows of a map with a kernel for each query (Eq. 5), tap by tap in torch's operations."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attn.attention.transforms import is_transformed


@torch.library.custom_op("lightning_attn::dynamic_taps", mutates_args=())
def aggregate_by_taps(kernel: Tensor, value: Tensor, first: int) -> Tensor:
    """Sums over the window of a map tap by tap, in memory of the order of the input (Eq. 5).

    Tap (i, j) of the query in row y and column x reads row y + i + first and column x + j - n_x // 2.

    A custom operator, so that `torch.compile` does not unroll up to 31 x 31 taps.

    Args:
        kernel: `[B, G, n_y, n_x, H, W]`.
        value: `[B, G, d, H', W]`, zero outside.
        first: Row that the first tap of the first query reads.

    Returns:
        `[B, G, d, H, W]`.
    """
    out = value.new_zeros(*value.shape[:3], *kernel.shape[-2:])
    windows = _tap_windows(_padded(value, kernel.shape[3]), kernel.shape[3])
    for i in range(kernel.shape[2]):
        rows, read_rows = _overlap(kernel.shape[4], value.shape[3], i + first)
        target = out[:, :, :, rows]
        for weight, shifted in zip(
            kernel[:, :, None, i, :, rows].unbind(3), windows[:, :, :, :, read_rows].unbind(3), strict=True
        ):
            target.addcmul_(weight, shifted)
    return out


def aggregate_in_plain_operations(kernel: Tensor, value: Tensor, first: int) -> Tensor:
    """`aggregate_by_taps` for exported programs, which run without this package: one addition for each tap."""
    rows, columns = kernel.shape[-2:]
    padded = F.pad(_padded(value, kernel.shape[3]), (0, 0, -first, kernel.shape[2] + rows + first - 1 - value.shape[3]))
    out = value.new_zeros(*value.shape[:3], rows, columns)
    for i in range(kernel.shape[2]):
        for j in range(kernel.shape[3]):
            out = out + kernel[:, :, None, i, j] * padded[:, :, :, i : i + rows, j : j + columns]
    return out


@torch.library.custom_op("lightning_attn::dynamic_taps_backward", mutates_args=())
def _taps_backward(grad: Tensor, kernel: Tensor, value: Tensor, first: int) -> tuple[Tensor, Tensor]:
    taps = kernel.shape[3]
    padded = _padded(value, taps)
    grad_kernel, padded_grad = kernel.new_zeros(kernel.shape), torch.zeros_like(padded)
    windows, grad_windows = _tap_windows(padded, taps), _tap_windows(padded_grad, taps)
    for i in range(kernel.shape[2]):
        rows, read_rows = _overlap(kernel.shape[4], value.shape[3], i + first)
        for weight, target in zip(
            kernel[:, :, None, i, :, rows].unbind(3), grad_windows[:, :, :, :, read_rows].unbind(3), strict=True
        ):
            target.addcmul_(weight, grad[:, :, :, rows])
        target = grad_kernel[:, :, i, :, rows]
        for channel, shifted in zip(
            grad[:, :, :, None, rows].unbind(2), windows[:, :, :, :, read_rows].unbind(2), strict=True
        ):
            target.addcmul_(channel, shifted)
    return grad_kernel, padded_grad[..., taps // 2 : taps // 2 + value.shape[4]].contiguous()


def _padded(value: Tensor, taps: int) -> Tensor:
    return F.pad(value, (taps // 2, taps // 2))


def _tap_windows(padded: Tensor, taps: int) -> Tensor:
    """The inputs of each tap of a row of the kernel, `[B, G, d, n_x, H', W]`, as a view of the padded map."""
    return padded.unfold(4, padded.shape[4] - taps + 1, 1).transpose(3, 4)


def _overlap(queries: int, values: int, shift: int) -> tuple[slice, slice]:
    """The range of queries q for which q + shift is a value, and the range of those values."""
    start, stop = max(0, -shift), max(0, min(queries, values - shift))
    return slice(start, max(start, stop)), slice(start + shift, max(start, stop) + shift)


@aggregate_by_taps.register_fake
def _(kernel: Tensor, value: Tensor, first: int) -> Tensor:
    return value.new_empty(*value.shape[:3], *kernel.shape[-2:])


@_taps_backward.register_fake
def _(grad: Tensor, kernel: Tensor, value: Tensor, first: int) -> tuple[Tensor, Tensor]:
    return kernel.new_empty(kernel.shape), value.new_empty(value.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    kernel, value, ctx.first = inputs
    ctx.save_for_backward(kernel, value)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    kernel, value = ctx.saved_tensors
    if torch.is_grad_enabled() or is_transformed(grad):
        with torch.enable_grad():
            leaves = kernel.view_as(kernel).requires_grad_(), value.view_as(value).requires_grad_()
            out = aggregate_in_plain_operations(*leaves, ctx.first)
            grad_kernel, grad_value = torch.autograd.grad(out, leaves, grad, create_graph=True)
    else:
        grad_kernel, grad_value = _taps_backward(grad, kernel, value, ctx.first)
    return grad_kernel, grad_value, None


aggregate_by_taps.register_autograd(_backward, setup_context=_save_for_backward)

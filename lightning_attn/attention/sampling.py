"""Convolution with taps between the grid points, by one weighted gather of plain operations.

It runs on every device, in one and two dimensions, and can be differentiated and transformed without limits.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_attn.attention.positions import computation_dtype
from lightning_attn.attention.transforms import is_exporting, is_transformed
from lightning_attn.errors import InputError

BLOCK_ELEMENTS = 4_000_000
"""Sampled values in memory at once, 16 MB: larger blocks cost new memory pages, smaller ones more calls."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The positions of the taps before offsets are added; one number for each axis, y before x."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    causal: bool

    @property
    def taps(self) -> int:
        """Number of taps K."""
        return math.prod(self.kernel_size)

    def reach(self, axis: int) -> int:
        """Distance from the first to the last tap."""
        return self.dilation[axis] * (self.kernel_size[axis] - 1)

    def output_sizes(self, x: Tensor) -> list[int]:
        """The grid of queries for `[B, L, C]` or `[B, C, H, W]`.

        Raises:
            ValueError: If `x` is too small for any query.
        """
        sizes = list(x.shape[1:2] if x.dim() == 3 else x.shape[2:])
        reaches = [self.reach(axis) for axis in range(len(sizes))]
        if self.causal:
            least = [1]
            outputs = sizes
        else:
            least = [max(1, reach - 2 * pad + 1) for reach, pad in zip(reaches, self.padding, strict=True)]
            outputs = [
                (size + 2 * pad - reach - 1) // stride + 1
                for size, pad, reach, stride in zip(sizes, self.padding, reaches, self.stride, strict=True)
            ]
        if any(size < needed for size, needed in zip(sizes, least, strict=True)):
            raise InputError(
                f"x must have at least {_format_sizes(least)} positions along each axis for "
                f"kernel_size={_format_sizes(self.kernel_size)}, dilation={_format_sizes(self.dilation)} and "
                f"padding={_format_sizes(self.padding)}, got shape {tuple(x.shape)}."
            )
        return outputs


def convolve_by_gather(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    geometry: Geometry,
    offset_groups: int,
) -> Tensor:
    """`deformable_conv` for arguments whose shapes fit.

    It needs, besides its inputs and output, a copy of `x` with one more position and, for the backward pass, an index
    and a weight per tap and corner: with K taps and N queries 48 K N bytes in two dimensions, 1.8 MB for 3 x 3 at
    50 x 84. The sampled values (C K N values, 39 MB there with 256 channels) exist in blocks of about 16 MB only, and
    are sampled again in the backward pass.

    Args:
        x: `[B, L, C]` or `[B, C, H, W]`.
        offset: `[B, L', G k]`, or `[B, G 2 k_y k_x, H', W']`, as in `deformable_conv`.
        weight: `[out, C / groups, k(_y, k_x)]`.
        bias: `[out]`.
        mask: `[B, L', G k]` or `[B, G k_y k_x, H', W']`.
        geometry: Where the taps are.
        offset_groups: G.

    Returns:
        `[B, L', out]` or `[B, out, H', W']`, in the memory format of `x`.
    """
    ndim = x.dim() - 2
    kernel, outputs = geometry.kernel_size, list(offset.shape[1:2] if ndim == 1 else offset.shape[2:])
    rows = x if ndim == 1 else x.flatten(2).transpose(1, 2)
    # Axes of moves, mask and positions: sample, query (two axes in a map), tap (two axes in a map), group of offsets.
    if ndim == 1:
        moves = [by_tap(offset, offset_groups)]
        mask = None if mask is None else by_tap(mask, offset_groups)
    else:
        moves = list(torch.unflatten(offset, 1, (offset_groups, *kernel, 2)).permute(4, 0, 5, 6, 2, 3, 1))
        mask = None if mask is None else torch.unflatten(mask, 1, (offset_groups, *kernel)).permute(0, 4, 5, 2, 3, 1)
    positions = []
    for axis, (move, count) in enumerate(zip(moves, outputs, strict=True)):
        left = geometry.reach(axis) if geometry.causal else geometry.padding[axis]
        start = axis_taps(count, kernel[axis], geometry.stride[axis], geometry.dilation[axis], left, move)
        shape = [1] * (2 * ndim + 1)
        shape[axis], shape[ndim + axis] = count, kernel[axis]
        positions.append(move + start.view(shape))
    sizes = list(x.shape[1:2] if ndim == 1 else x.shape[2:])
    last = torch.arange(sizes[0], device=x.device)[:, None, None, None] if geometry.causal else None
    index, weights = find_corners(positions, sizes, last, mask)
    dtype = computation_dtype(x)
    flat = (x.shape[0], math.prod(outputs), geometry.taps, offset_groups, 2**ndim)
    product = _convolve(
        F.pad(rows, (0, 0, 1, 0)).to(dtype), index.reshape(flat), weights.to(dtype).reshape(flat), weight, bias
    )
    if ndim == 1:
        return product
    result = torch.unflatten(product.transpose(1, 2), 2, outputs)
    # In the memory format of x: later layers are slow if formats alternate.
    if is_transformed():  # the memory format is unknown there
        return result
    return result if x.is_contiguous(memory_format=torch.channels_last) else result.contiguous()


def _format_sizes(values: Sequence[int]) -> str:
    """One number if all are equal, else all of them."""
    return str(values[0]) if len(set(values)) == 1 else str(tuple(values))


def by_tap(channels: Tensor, groups: int) -> Tensor:
    """Offsets or modulation of sequences by tap and group, `[B, L', k, groups]`, of `[B, L', groups k]`."""
    return torch.unflatten(channels, 2, (groups, -1)).transpose(2, 3)


def axis_taps(count: int, kernel_size: int, stride: int, dilation: int, left: int, like: Tensor) -> Tensor:
    """Positions of the taps of each query along one axis before offsets, `[count, k]`, in float32 or better."""
    queries = torch.arange(count, device=like.device) * stride - left
    taps = torch.arange(kernel_size, device=like.device) * dilation
    return (queries[:, None] + taps).to(computation_dtype(like))


def find_corners(
    positions: list[Tensor], sizes: list[int], last: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The grid points around each sampling position and their bilinear weights G(k, position), times `mask`.

    Args:
        positions: One tensor per axis, y before x, all of one shape.
        sizes: Number of grid points along each axis.
        last: The last grid point that may be read, to broadcast against `[positions, corner]`; None for all.
        mask: Factor on the weights, in the shape of a position.

    Returns:
        Indices, 1 + the number of the grid point in raster order, or 0 outside; and weights. Each has the shape of a
        position with one more axis for the 2 or 4 corners.
    """
    index = torch.zeros((), dtype=torch.long, device=positions[0].device)
    inside = torch.ones((), dtype=torch.bool, device=positions[0].device)
    weights = positions[0].new_ones(()) if mask is None else mask[..., None]
    for position, size in zip(positions, sizes, strict=True):
        # Any position further outside gives the same and must not overflow the integer. At -1 itself the slope is that
        # of position 0.
        position = position.clamp(-2, size)
        lower = position.detach().floor()
        fraction = position - lower
        corner = torch.stack((lower, lower + 1), dim=-1)
        within = (corner >= 0) & (corner <= (size - 1 if last is None else last))
        inside = (inside[..., None] & within[..., None, :]).flatten(-2)
        index = (index[..., None] * size + corner.long()[..., None, :]).flatten(-2)
        bilinear = torch.stack((1 - fraction, fraction), dim=-1)
        weights = (weights[..., None] * bilinear[..., None, :]).flatten(-2)
    # NaN positions are never inside; their weights stay NaN.
    return torch.where(inside, index + 1, 0), weights


def _convolve(rows: Tensor, index: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`sampled_product` in blocks, whose samples are not saved for the backward pass but recomputed.

    Small blocks are faster as well: sampled values stay in the caches. Exported programs, whose lengths may be
    symbolic, and transforms, which support no recomputation, use one block.
    """
    batch, queries, taps = index.shape[:3]
    if is_exporting() or is_transformed() or 0 in index.shape:
        return sampled_product(rows, index, weights, weight, bias)
    block_queries = max(1, BLOCK_ELEMENTS // (taps * rows.shape[2]))
    block_samples = max(1, block_queries // queries)
    parts = math.ceil(queries / block_queries)
    outputs = []
    for samples in zip(*(torch.split(t, block_samples) for t in (rows, index, weights)), strict=True):
        for part in zip(samples[1].chunk(parts, dim=1), samples[2].chunk(parts, dim=1), strict=True):
            arguments = (samples[0], *part, weight, bias)
            if torch.is_grad_enabled():
                block = checkpoint(sampled_product, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                block = sampled_product(*arguments)
            outputs.append(block.flatten(0, 1))
    return torch.unflatten(torch.cat(outputs), 0, (batch, queries))


def sampled_product(rows: Tensor, index: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Samples the taps of each query and multiplies them with the weights of the convolution.

    Args:
        rows: The contents to sample from, `[B, R, C]`; row 0 of each sample is zero.
        index: Rows to read, of the same sample, `[B, N, K, groups of offsets, corners]`.
        weights: Their bilinear weights, in the dtype of `rows`.
        weight: `[out, C / groups, k(_y, k_x)]`, K in all.
        bias: `[out]`.

    Returns:
        `[B, N, out]`.
    """
    batch, queries, taps, offset_groups, corners = index.shape
    channels = rows.shape[2]
    # One row for each group of channels, one after the other.
    table = rows.reshape(-1, channels // offset_groups)
    first = torch.arange(batch, device=index.device)[:, None, None, None, None] * rows.shape[1]
    bags = (index + first) * offset_groups
    if offset_groups > 1:
        bags = bags + torch.arange(offset_groups, device=index.device)[:, None]
    sampled = _weighted_rows(table, bags.view(-1, corners), weights.reshape(-1, corners))
    sampled = sampled.view(batch * queries, taps, channels).to(weight.dtype)
    groups = channels // weight.shape[1]
    matrix = weight.flatten(2).transpose(1, 2)  # [out, K, C / groups]: channels of a tap are contiguous, as sampled
    if groups > 1:
        by_group = torch.unflatten(sampled, 2, (groups, -1))
        product = torch.einsum("nkgc,gokc->ngo", by_group, torch.unflatten(matrix, 0, (groups, -1))).flatten(1)
        product = product if bias is None else product + bias.to(product.dtype)
    elif sampled.is_cpu and sampled.shape[0] and not (torch.compiler.is_compiling() or is_transformed()):
        # The same product as a 1x1 convolution, which is faster on the CPU (26 against 44 ms for a map of 50 x 84 with
        # 256 channels).
        image = sampled.flatten(1)[None, :, None].permute(0, 3, 1, 2)
        product = F.conv2d(image, matrix.flatten(1)[:, :, None, None], bias)[0, :, :, 0].T
    else:
        product = F.linear(sampled.flatten(1), matrix.flatten(1), bias)
    return torch.unflatten(product, 0, (batch, queries))


def _weighted_rows(table: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows of a table `[R, C]`, with row indices and weights `[n, corners]`: `[n, C]`."""
    if is_transformed() or 0 in bags.shape:
        return torch.einsum("nkc,nk->nc", table[bags], weights)
    if torch.compiler.is_compiling():
        return F.embedding_bag(bags, table, mode="sum", per_sample_weights=weights)
    rows: Tensor = _WeightedRows.apply(table, bags, weights)
    return rows


class _WeightedRows(torch.autograd.Function):
    """`F.embedding_bag` with a backward pass that can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
        numbers = bags.flatten()
        starts = torch.arange(0, bags.numel(), bags.shape[1], device=bags.device)
        out, *places = torch.ops.aten._embedding_bag(table, numbers, starts, False, 0, False, weights.flatten())
        ctx.save_for_backward(table, bags, weights, starts, *places)
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        table, bags, weights, starts, *places = ctx.saved_tensors
        needs_table, _, needs_weights = ctx.needs_input_grad
        if torch.is_grad_enabled() or is_transformed():
            by_bag = grad.unsqueeze(1) * weights.unsqueeze(2)
            grad_table = torch.zeros_like(table).index_add(0, bags.flatten(), by_bag.flatten(0, 1))
            grad_weights = torch.einsum("nkc,nc->nk", table[bags], grad)
        else:
            numbers, factors, place = bags.flatten(), weights.flatten(), places[0]
            if needs_table:
                grad_table = torch.ops.aten._embedding_bag_backward(
                    grad, numbers, starts, *places, table.shape[0], False, 0, False, factors
                )
            if needs_weights:
                grad_weights = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                    grad, table, numbers, starts, place, 0
                ).view_as(weights)
        return grad_table if needs_table else None, None, grad_weights if needs_weights else None

"""Deformable convolution of maps (Eq. 4) in Triton, in the dtype of autocast and without atomic additions.

Forward: one kernel writes what the taps read as the rows of a matrix ("columns", as in im2col), which cuBLAS multiplies
with the weight; whether float32 products use TF32 is therefore torch's setting. Positions and interpolation are
computed in float32, or float64 for float64. Columns are not kept for the backward pass.

Backward: the gradient of the columns is one product. From it

- a kernel computes the gradients of offsets and mask, each a sum over channels inside one program. It reads the map
  again for that, and replaces the gradient of the columns by the columns, for the product that is the gradient of the
  weight;
- the gradient of the map is gathered: taps are sorted by the cell of the grid that they read in, and each grid point
  sums over the taps in the four cells around it, in the order of a stable sort. All gradients are therefore
  deterministic, also without `torch.use_deterministic_algorithms`. Adding 4 K N C values atomically in float32
  instead, as torchvision does, writes twice the bytes that this reads in bfloat16.

The map lies with contiguous channels; other maps are copied.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightning_attn.attention.positions import computation_dtype
from lightning_attn.attention.sampling import Geometry, convolve_by_gather
from lightning_attn.attention.transforms import has_dispatch_mode, is_transformed

COLUMN_BYTES = 128 * 2**20
"""Of columns in memory at once: larger batches are convolved in parts. Large enough to fill a GPU."""

_TILE_BYTES = 8192  # of queries and channels
_ROW_BYTES = 512  # of the channels in a tile: what a warp reads at once
_SIZES = [
    "height", "width", "out_width", "queries", "stride_y", "stride_x", "dilation_y", "dilation_x", "padding_y",
    "padding_x", "offset_sample", "offset_channel", "offset_query", "mask_sample", "mask_channel", "mask_query",
]  # fmt: skip
"""Arguments whose values compile no further variant of a kernel: maps of all sizes run the same code."""
_UNALIGNED = ["offset", "mask", "grad_offset", "grad_mask"]  # read value by value, so that alignment does not matter


# ---- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def _split(position: tl.tensor, size: tl.tensor) -> tuple[tl.tensor, ...]:
    """The grid point below a position along one axis, the fraction past it, and whether it and the next are inside."""
    # As in `sampling.find_corners`: further outside gives the same, and NaN stays NaN and is never inside.
    position = tl.where(position < -2.0, -2.0, position)
    position = tl.where(position > size, size, position)
    lower = tl.floor(position)
    has_lower = (lower >= 0) & (lower < size)
    has_upper = (lower >= -1) & (lower < size - 1)
    index = tl.where(has_lower | has_upper, lower, 0.0).to(tl.int32)
    return index, position - lower, has_lower, has_upper


@triton.jit
def _locate(
    offset: tl.tensor,
    mask: tl.tensor,
    sample: tl.tensor,
    group: tl.tensor,
    tap: tl.tensor,
    query: tl.tensor,
    live: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    out_width: tl.tensor,
    stride_y: tl.tensor,
    stride_x: tl.tensor,
    dilation_y: tl.tensor,
    dilation_x: tl.tensor,
    padding_y: tl.tensor,
    padding_x: tl.tensor,
    offset_sample: tl.tensor,
    offset_channel: tl.tensor,
    offset_query: tl.tensor,
    mask_sample: tl.tensor,
    mask_channel: tl.tensor,
    mask_query: tl.tensor,
    taps: tl.constexpr,
    taps_x: tl.constexpr,
    dtype: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """`_split` of the position of a tap along y and along x, and the mask."""
    place = offset + sample * offset_sample + (group * taps + tap) * 2 * offset_channel + query * offset_query
    move_y = tl.load(place, mask=live, other=0.0).to(dtype)
    move_x = tl.load(place + offset_channel, mask=live, other=0.0).to(dtype)
    start_y = query // out_width * stride_y - padding_y + tap // taps_x * dilation_y
    start_x = query % out_width * stride_x - padding_x + tap % taps_x * dilation_x
    y, fraction_y, has_top, has_bottom = _split(start_y.to(dtype) + move_y, height)
    x, fraction_x, has_left, has_right = _split(start_x.to(dtype) + move_x, width)
    factor = live.to(dtype)
    if mask is not None:
        place = mask + sample * mask_sample + (group * taps + tap) * mask_channel + query * mask_query
        factor = tl.load(place, mask=live, other=0.0).to(dtype)
    return y, x, fraction_y, fraction_x, has_top & live, has_bottom & live, has_left, has_right, factor


@triton.jit
def _column(
    number: tl.tensor, channel: tl.tensor, count: tl.tensor, channels: tl.constexpr, groups: tl.constexpr
) -> tl.tensor:
    """Place of a channel of the tap of this number, of `count`, in `[groups, count, channels / groups]`."""
    width: tl.constexpr = channels // groups
    if groups > 1:
        number += channel // width * count
        channel = channel % width
    return number * width + channel


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def _read_kernel(
    rows: tl.tensor,
    offset: tl.tensor,
    mask: tl.tensor,
    columns: tl.tensor,
    height: int,
    width: int,
    out_width: int,
    queries: int,
    stride_y: int,
    stride_x: int,
    dilation_y: int,
    dilation_x: int,
    padding_y: int,
    padding_x: int,
    offset_sample: int,
    offset_channel: int,
    offset_query: int,
    mask_sample: int,
    mask_channel: int,
    mask_query: int,
    taps: tl.constexpr,
    taps_x: tl.constexpr,
    channels: tl.constexpr,
    groups: tl.constexpr,
    offset_groups: tl.constexpr,
    dtype: tl.constexpr,
    block_q: tl.constexpr,
    block_c: tl.constexpr,
) -> None:
    """Columns of one tap of some queries in some channels of one group of offsets.

    Grid: blocks of queries x taps, groups x blocks of channels, samples.
    """
    width_c: tl.constexpr = channels // offset_groups
    blocks: tl.constexpr = (width_c + block_c - 1) // block_c
    tap = tl.program_id(0) % taps
    group = tl.program_id(1) // blocks
    sample = tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) // taps * block_q + tl.arange(0, block_q)
    live = query < queries
    y, x, fy, fx, has_top, has_bottom, has_left, has_right, factor = _locate(
        offset, mask, sample, group, tap, query, live, height, width, out_width, stride_y, stride_x, dilation_y,
        dilation_x, padding_y, padding_x, offset_sample, offset_channel, offset_query, mask_sample, mask_channel,
        mask_query, taps, taps_x, dtype,
    )  # fmt: skip
    upper, lower = factor * (1 - fy), factor * fy
    in_group = tl.program_id(1) % blocks * block_c + tl.arange(0, block_c)
    inside = (in_group < width_c)[None, :]
    channel = (group * width_c + in_group)[None, :]
    corner = rows + ((sample * height + y) * width + x)[:, None] * channels + channel
    down = width * channels
    top_left = tl.load(corner, mask=(has_top & has_left)[:, None] & inside, other=0.0).to(dtype)
    top_right = tl.load(corner + channels, mask=(has_top & has_right)[:, None] & inside, other=0.0).to(dtype)
    bottom_left = tl.load(corner + down, mask=(has_bottom & has_left)[:, None] & inside, other=0.0).to(dtype)
    bottom_right = tl.load(corner + (down + channels), mask=(has_bottom & has_right)[:, None] & inside, other=0.0)
    value = (upper * (1 - fx))[:, None] * top_left + (upper * fx)[:, None] * top_right
    value += (lower * (1 - fx))[:, None] * bottom_left + (lower * fx)[:, None] * bottom_right.to(dtype)
    number = ((sample * queries + query) * taps + tap)[:, None]
    count = tl.num_programs(2).to(tl.int64) * queries * taps
    place = columns + _column(number, channel, count, channels, groups)
    tl.store(place, value.to(columns.dtype.element_ty), mask=live[:, None] & inside)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def _differentiate_kernel(
    rows: tl.tensor,
    offset: tl.tensor,
    mask: tl.tensor,
    columns: tl.tensor,
    grad_offset: tl.tensor,
    grad_mask: tl.tensor,
    height: int,
    width: int,
    out_width: int,
    queries: int,
    stride_y: int,
    stride_x: int,
    dilation_y: int,
    dilation_x: int,
    padding_y: int,
    padding_x: int,
    offset_sample: int,
    offset_channel: int,
    offset_query: int,
    mask_sample: int,
    mask_channel: int,
    mask_query: int,
    taps: tl.constexpr,
    taps_x: tl.constexpr,
    channels: tl.constexpr,
    groups: tl.constexpr,
    offset_groups: tl.constexpr,
    dtype: tl.constexpr,
    block_q: tl.constexpr,
    block_c: tl.constexpr,
) -> None:
    """Gradients of offsets and mask of one tap of some queries; their columns replace those columns' gradients.

    Grid: blocks of queries x taps, groups of offsets, samples.
    """
    width_c: tl.constexpr = channels // offset_groups
    tap = tl.program_id(0) % taps
    group = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) // taps * block_q + tl.arange(0, block_q)
    live = query < queries
    y, x, fy, fx, has_top, has_bottom, has_left, has_right, factor = _locate(
        offset, mask, sample, group, tap, query, live, height, width, out_width, stride_y, stride_x, dilation_y,
        dilation_x, padding_y, padding_x, offset_sample, offset_channel, offset_query, mask_sample, mask_channel,
        mask_query, taps, taps_x, dtype,
    )  # fmt: skip
    upper, lower = factor * (1 - fy), factor * fy
    number = ((sample * queries + query) * taps + tap)[:, None]
    count = tl.num_programs(2).to(tl.int64) * queries * taps
    corners = rows + ((sample * height + y) * width + x)[:, None] * channels
    down = width * channels
    # Sums over channels of the gradient times the value at each corner.
    sum_top_left = tl.zeros([block_q], dtype)
    sum_top_right = tl.zeros([block_q], dtype)
    sum_bottom_left = tl.zeros([block_q], dtype)
    sum_bottom_right = tl.zeros([block_q], dtype)
    for start in range(0, width_c, block_c):
        in_group = start + tl.arange(0, block_c)
        inside = (in_group < width_c)[None, :]
        channel = (group * width_c + in_group)[None, :]
        place = columns + _column(number, channel, count, channels, groups)
        gradient = tl.load(place, mask=live[:, None] & inside, other=0.0).to(dtype)
        corner = corners + channel
        read = tl.load(corner, mask=(has_top & has_left)[:, None] & inside, other=0.0).to(dtype)
        value = (upper * (1 - fx))[:, None] * read
        sum_top_left += tl.sum(gradient * read, axis=1)
        read = tl.load(corner + channels, mask=(has_top & has_right)[:, None] & inside, other=0.0).to(dtype)
        value += (upper * fx)[:, None] * read
        sum_top_right += tl.sum(gradient * read, axis=1)
        read = tl.load(corner + down, mask=(has_bottom & has_left)[:, None] & inside, other=0.0).to(dtype)
        value += (lower * (1 - fx))[:, None] * read
        sum_bottom_left += tl.sum(gradient * read, axis=1)
        read = tl.load(corner + down + channels, mask=(has_bottom & has_right)[:, None] & inside, other=0.0).to(dtype)
        value += (lower * fx)[:, None] * read
        sum_bottom_right += tl.sum(gradient * read, axis=1)
        tl.store(place, value.to(columns.dtype.element_ty), mask=live[:, None] & inside)
    # The gradients are contiguous, `[samples, 2 offset_groups taps, queries]`, and half as many channels for the mask.
    first = (sample * offset_groups + group) * taps + tap
    along_y = (sum_bottom_left - sum_top_left) * (1 - fx) + (sum_bottom_right - sum_top_right) * fx
    along_x = (sum_top_right - sum_top_left) * (1 - fy) + (sum_bottom_right - sum_bottom_left) * fy
    place = grad_offset + first * 2 * queries + query
    tl.store(place, (factor * along_y).to(grad_offset.dtype.element_ty), mask=live)
    tl.store(place + queries, (factor * along_x).to(grad_offset.dtype.element_ty), mask=live)
    if grad_mask is not None:
        top = sum_top_left * (1 - fx) + sum_top_right * fx
        bottom = sum_bottom_left * (1 - fx) + sum_bottom_right * fx
        value = top * (1 - fy) + bottom * fy
        tl.store(grad_mask + first * queries + query, value.to(grad_mask.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=[*_SIZES, "count", "cells"], do_not_specialize_on_alignment=_UNALIGNED)
def _cells_kernel(
    offset: tl.tensor,
    mask: tl.tensor,
    cell: tl.tensor,
    weights: tl.tensor,
    count: int,
    cells: int,
    height: int,
    width: int,
    out_width: int,
    queries: int,
    stride_y: int,
    stride_x: int,
    dilation_y: int,
    dilation_x: int,
    padding_y: int,
    padding_x: int,
    offset_sample: int,
    offset_channel: int,
    offset_query: int,
    mask_sample: int,
    mask_channel: int,
    mask_query: int,
    taps: tl.constexpr,
    taps_x: tl.constexpr,
    offset_groups: tl.constexpr,
    dtype: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """The cell between grid points that each tap reads in, and the weights of its corners, times the mask.

    Those are numbered `[samples, queries, taps, offset_groups]`; there are `height + 1` x `width + 1` cells for each
    sample and group, and the last number, `cells`, is that of all taps that read nothing.
    """
    number = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    live = number < count
    group = (number % offset_groups).to(tl.int32)
    tap = (number // offset_groups % taps).to(tl.int32)
    row = number // (offset_groups * taps)
    sample = row // queries
    query = (row % queries).to(tl.int32)
    y, x, fy, fx, has_top, has_bottom, has_left, has_right, factor = _locate(
        offset, mask, sample, group, tap, query, live, height, width, out_width, stride_y, stride_x, dilation_y,
        dilation_x, padding_y, padding_x, offset_sample, offset_channel, offset_query, mask_sample, mask_channel,
        mask_query, taps, taps_x, dtype,
    )  # fmt: skip
    place = ((sample * offset_groups + group) * (height + 1) + y + 1) * (width + 1) + x + 1
    reads = (has_top | has_bottom) & (has_left | has_right)
    tl.store(cell + number, tl.where(reads, place, cells).to(tl.int32), mask=live)
    upper, lower = factor * (1 - fy), factor * fy
    tl.store(weights + number * 4, upper * (1 - fx), mask=live)
    tl.store(weights + number * 4 + 1, upper * fx, mask=live)
    tl.store(weights + number * 4 + 2, lower * (1 - fx), mask=live)
    tl.store(weights + number * 4 + 3, lower * fx, mask=live)


@triton.jit(do_not_specialize=["height", "width", "queries"])
def _gather_kernel(
    grad_columns: tl.tensor,
    order: tl.tensor,
    starts: tl.tensor,
    weights: tl.tensor,
    grad_rows: tl.tensor,
    height: int,
    width: int,
    queries: int,
    taps: tl.constexpr,
    channels: tl.constexpr,
    groups: tl.constexpr,
    offset_groups: tl.constexpr,
    dtype: tl.constexpr,
    block_t: tl.constexpr,
    block_c: tl.constexpr,
) -> None:
    """The gradient at one grid point in some channels of one group of offsets.

    Grid: samples x grid points, groups x blocks of channels. `order` has the taps by cell, `starts` the first of each.
    """
    width_c: tl.constexpr = channels // offset_groups
    blocks: tl.constexpr = (width_c + block_c - 1) // block_c
    point = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) // blocks
    x = point % width
    y = point // width % height
    sample = point // width // height
    in_group = tl.program_id(1) % blocks * block_c + tl.arange(0, block_c)
    inside = (in_group < width_c)[None, :]
    channel = (group * width_c + in_group)[None, :]
    count = tl.num_programs(0).to(tl.int64) // width // height * queries * taps
    total = tl.zeros([block_t, block_c], dtype)
    for above in tl.static_range(2):
        # Of the taps in the cells above (below) this point it is a lower (upper) corner. The cells to its left and
        # right follow each other, and so do their taps.
        cell = ((sample * offset_groups + group) * (height + 1) + y + 1 - above) * (width + 1) + x
        first = tl.load(starts + cell)
        middle = tl.load(starts + cell + 1)
        end = tl.load(starts + cell + 2)
        while first < end:
            at = first + tl.arange(0, block_t)
            live = at < end
            number = tl.load(order + at, mask=live, other=0)
            corner = 2 * above + (at < middle).to(tl.int32)
            factor = tl.load(weights + number * 4 + corner, mask=live, other=0.0)
            place = grad_columns + _column((number // offset_groups)[:, None], channel, count, channels, groups)
            total += factor[:, None] * tl.load(place, mask=live[:, None] & inside, other=0.0).to(dtype)
            first += block_t
    place = grad_rows + point * channels + channel
    tl.store(place, tl.sum(total, axis=0)[None, :].to(grad_rows.dtype.element_ty), mask=inside)


_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

RUNS_ANYWHERE = not isinstance(_read_kernel, triton.runtime.JITFunction)
"""Whether Triton interprets kernels, as it does with TRITON_INTERPRET=1 in the environment, on any device."""


# ---- launches ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Taps:
    """The taps of some samples of a batch.

    Attributes:
        rows: The map, `[B, H, W, C]`, contiguous.
        offset: `[B, 2 G K, N]`.
        mask: `[B, G K, N]`, or None.
        out_width: Of the grid of queries.
        geometry: Where the taps are before offsets are added.
        groups: Of channels.
        dtype: Of positions, weights and sums.
    """

    rows: Tensor
    offset: Tensor
    mask: Tensor | None
    out_width: int
    geometry: Geometry
    groups: int
    dtype: torch.dtype

    def samples(self, start: int, stop: int) -> "_Taps":
        """Those of some samples."""
        if stop - start == self.rows.shape[0]:
            return self
        mask = None if self.mask is None else self.mask[start:stop]
        return dataclasses.replace(self, rows=self.rows[start:stop], offset=self.offset[start:stop], mask=mask)

    @functools.cached_property
    def taps(self) -> int:
        """Number of taps K of a query and group."""
        return self.geometry.taps

    @functools.cached_property
    def queries(self) -> int:
        """Number of queries N of a sample."""
        return self.offset.shape[2]

    @functools.cached_property
    def channels(self) -> int:
        """Number of channels C."""
        return self.rows.shape[3]

    @functools.cached_property
    def offset_groups(self) -> int:
        """Number of groups of offsets G."""
        return self.offset.shape[1] // (2 * self.taps)

    def read(self) -> Tensor:
        """The columns, `[groups, B N, K C / groups]`."""
        shape = (self.groups, self.rows.shape[0] * self.queries, self.taps * self.channels // self.groups)
        columns = self.rows.new_empty(shape)
        constants, block_q, block_c = self._constants(_TILE_BYTES)
        blocks = self.offset_groups * _ceil(self.channels // self.offset_groups, block_c)
        grid = (_ceil(self.queries, block_q) * self.taps, blocks, self.rows.shape[0])
        _read_kernel[grid](
            self.rows, self.offset, self.mask, columns, *self._sizes(), **constants, block_q=block_q, block_c=block_c
        )
        return columns

    def differentiate(self, columns: Tensor, grad_offset: Tensor, grad_mask: Tensor | None) -> None:
        """Writes the gradients of offsets and mask, and in place of the gradient of the columns the columns.

        Args:
            columns: As from `read`: their gradient.
            grad_offset: Like `offset`, contiguous.
            grad_mask: Like `mask`, contiguous.
        """
        constants, block_q, block_c = self._constants(_TILE_BYTES // 2)
        grid = (_ceil(self.queries, block_q) * self.taps, self.offset_groups, self.rows.shape[0])
        _differentiate_kernel[grid](
            self.rows, self.offset, self.mask, columns, grad_offset, grad_mask,
            *self._sizes(), **constants, block_q=block_q, block_c=block_c,
        )  # fmt: skip

    def gather(self, grad_columns: Tensor, grad_rows: Tensor) -> None:
        """Writes the gradient of the map.

        Args:
            grad_columns: The gradient of the columns, as from `read`.
            grad_rows: Like `rows`.
        """
        batch, height, width, channels = self.rows.shape
        taps, groups = self.taps, self.offset_groups
        count, cells = batch * self.queries * taps * groups, batch * groups * (height + 1) * (width + 1)
        cell = self.offset.new_empty(count, dtype=torch.int32)
        weights = self.offset.new_empty((count, 4), dtype=self.dtype)
        block = 256
        _cells_kernel[(_ceil(count, block),)](
            self.offset, self.mask, cell, weights, count, cells, *self._sizes(), block=block,
            taps=taps, taps_x=self.geometry.kernel_size[1], offset_groups=groups, dtype=_DTYPES[self.dtype],
        )  # fmt: skip
        cell, order = torch.sort(cell, stable=True)  # a query's taps stay in order, so that sums are deterministic
        starts = torch.searchsorted(cell, torch.arange(cells + 1, dtype=torch.int32, device=cell.device))
        block_c = self._block_c
        blocks = groups * _ceil(channels // groups, block_c)
        _gather_kernel[(batch * height * width, blocks)](
            grad_columns, order, starts, weights, grad_rows, height, width, self.queries,
            taps=taps, channels=channels, groups=self.groups, offset_groups=groups, dtype=_DTYPES[self.dtype],
            block_t=8, block_c=block_c, num_warps=2,
        )  # fmt: skip

    def _sizes(self) -> tuple[int, ...]:
        """The arguments `_SIZES`."""
        geometry = self.geometry
        strides = (*self.offset.stride(), *((0, 0, 0) if self.mask is None else self.mask.stride()))
        axes = (*geometry.stride, *geometry.dilation, *geometry.padding)
        return (*self.rows.shape[1:3], self.out_width, self.queries, *axes, *strides)

    @functools.cached_property
    def _block_c(self) -> int:
        """Number of channels in a tile."""
        power_of_two = 1 << (self.channels // self.offset_groups - 1).bit_length()
        return min(_ROW_BYTES // self.rows.itemsize, power_of_two)

    def _constants(self, tile_bytes: int) -> tuple[dict[str, Any], int, int]:
        """Constants of a kernel, and the number of queries and of channels in one of its tiles."""
        block_c = self._block_c
        constants = {
            "taps": self.taps,
            "taps_x": self.geometry.kernel_size[1],
            "channels": self.channels,
            "groups": self.groups,
            "offset_groups": self.offset_groups,
            "dtype": _DTYPES[self.dtype],
        }
        return constants, min(64, tile_bytes // (block_c * self.rows.itemsize)), block_c


def _ceil(number: int, divisor: int) -> int:
    """The quotient, rounded up. Triton's own costs a microsecond."""
    return -(-number // divisor)


def _taps(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
) -> _Taps:
    geometry = Geometry(tuple(weight.shape[2:]), tuple(stride), tuple(dilation), tuple(padding), causal=False)
    return _Taps(
        rows=_channels_last(x, dtype),
        offset=offset.flatten(2),
        mask=None if mask is None else mask.flatten(2),
        out_width=offset.shape[3],
        geometry=geometry,
        groups=x.shape[1] // weight.shape[1],
        dtype=torch.promote_types(computation_dtype(dtype), computation_dtype(offset)),
    )


def _parts(batch: int, bytes_per_sample: int) -> Iterator[tuple[int, int]]:
    """Ranges of samples whose columns fit into `COLUMN_BYTES`; one empty range for no samples."""
    size = max(1, COLUMN_BYTES // max(1, bytes_per_sample))
    for start in range(0, max(1, batch), size):
        yield start, min(batch, start + size)


def _channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, H, W, C]`, contiguous, of `[B, C, H, W]`."""
    return x.to(dtype=dtype, memory_format=torch.channels_last).permute(0, 2, 3, 1).contiguous()


def _map(rows: Tensor, like: Tensor) -> Tensor:
    """`[B, C, H, W]` in the memory format of `like`, of `[B, H, W, C]`."""
    result = rows.permute(0, 3, 1, 2)
    return result if like.is_contiguous(memory_format=torch.channels_last) else result.contiguous()


def _matrices(weight: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """The weight as it is multiplied with columns, `[groups, out / groups, K C / groups]`."""
    rows = weight.to(dtype=dtype, memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return rows.reshape(groups, weight.shape[0] // groups, -1)


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """`[groups, n, out / groups]` of `[n, out]`."""
    return rows.view(rows.shape[0], groups, rows.shape[1] // groups).transpose(0, 1)


# ---- operators -----------------------------------------------------------------------------------------------------


def deformable_conv(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """`lightning_attn.attention.deformable.deformable_conv` of maps, for arguments that were checked.

    Args:
        x: `[B, C, H, W]`.
        offset: `[B, 2 G K, H', W']`.
        weight: `[out, C / groups, k_y, k_x]`.
        bias: `[out]`.
        mask: `[B, G K, H', W']`.
        stride: (y, x).
        dilation: (y, x).
        padding: (y, x).
        dtype: Of columns, product and output: float32, bfloat16, float16 or float64. Offsets and mask keep theirs.

    Returns:
        `[B, out, H', W']` in the memory format of `x`.
    """
    convolve = _DeformableConv.apply if _runs_eagerly(x) else _operator
    result: Tensor = convolve(x, offset, weight, bias, mask, stride, dilation, padding, dtype)
    return result


def _forward(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        taps = _taps(x, offset, weight, mask, stride, dilation, padding, dtype)
        matrices = _matrices(weight, taps.groups, dtype)
        vector = None if bias is None else bias.to(dtype)
        products = []
        for part in _parts(x.shape[0], taps.queries * matrices.shape[2] * taps.groups * dtype.itemsize):
            columns = taps.samples(*part).read()
            if taps.groups == 1:
                products.append(F.linear(columns[0], matrices[0], vector))
            else:
                product = torch.bmm(columns, matrices.transpose(1, 2)).transpose(0, 1).flatten(1)
                products.append(product if vector is None else product.add_(vector))
        product = products[0] if len(products) == 1 else torch.cat(products)
        return _map(product.view(x.shape[0], *offset.shape[2:], weight.shape[0]), x)


def _gradients(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of `x`, `offset`, `weight` and `mask`, without those that `needs` excludes."""
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        taps = _taps(x, offset, weight, mask, stride, dilation, padding, dtype)
        matrices = _matrices(weight, taps.groups, dtype)
        grad_rows = _channels_last(grad, dtype)
        grad_x, grad_offset, grad_weight, grad_mask = _empty_gradients(x, offset, weight, mask)
        products = []
        for start, stop in _parts(x.shape[0], taps.queries * matrices.shape[2] * taps.groups * dtype.itemsize):
            part = taps.samples(start, stop)
            grad_part = _by_group(grad_rows[start:stop].flatten(0, 2), taps.groups)
            columns = torch.bmm(grad_part, matrices) if needs[0] or needs[1] or needs[3] else part.read()
            if needs[0]:
                part.gather(columns, grad_x[start:stop])
            if needs[1] or needs[3]:
                part.differentiate(
                    columns, grad_offset[start:stop], None if grad_mask is None else grad_mask[start:stop]
                )
            elif needs[0] and needs[2]:
                columns = part.read()
            if needs[2]:
                products.append(torch.bmm(grad_part.transpose(1, 2), columns))
        if needs[2]:
            product = products[0]
            if len(products) > 1:
                product = torch.stack(products).sum(0, dtype=computation_dtype(dtype))
            grad_weight.copy_(product.view(weight.shape[0], *weight.shape[2:], -1).permute(0, 3, 1, 2))
        gradients = (_map(grad_x, x), grad_offset, grad_weight, grad_mask)
        return [g for g, needed in zip(gradients, needs, strict=True) if needed and g is not None]


def _empty_gradients(
    x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """That of `x` is `[B, H, W, C]`."""
    rows = x.new_empty((x.shape[0], *x.shape[2:], x.shape[1]))
    return (
        rows,
        offset.new_empty(offset.shape),
        torch.empty_like(weight),
        None if mask is None else mask.new_empty(mask.shape),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, offset, weight, bias, mask = ctx.saved_tensors
    stride, dilation, padding, dtype = ctx.settings
    needs = ctx.needs_input_grad
    if torch.is_grad_enabled() or is_transformed(grad):
        gradients = _gradients_in_plain_operations(grad, ctx.saved_tensors, needs[:5], ctx.settings)
        return (*gradients, None, None, None, None)
    needed = [needs[0], needs[1], needs[2], needs[4]]
    function = _gradients if _runs_eagerly(grad) else _gradients_operator
    computed = iter(function(grad, x, offset, weight, mask, stride, dilation, padding, dtype, needed))
    grad_x, grad_offset, grad_weight, grad_mask = (next(computed) if need else None for need in needed)
    grad_bias = grad.sum((0, 2, 3), dtype=bias.dtype) if needs[3] else None
    return grad_x, grad_offset, grad_weight, grad_bias, grad_mask, None, None, None, None


def _gradients_in_plain_operations(
    grad: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool], settings: tuple[Any, ...]
) -> list[Tensor | None]:
    """The gradients by the gather, which can be differentiated again and takes batches of gradients."""
    stride, dilation, padding, dtype = settings
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [
            tensor.view_as(tensor).requires_grad_() if tensor is not None and need else tensor
            for tensor, need in zip(inputs, needs, strict=True)
        ]
        x, offset, weight, bias, mask = leaves
        assert x is not None, "only bias and mask are optional"
        assert offset is not None, "only bias and mask are optional"
        assert weight is not None, "only bias and mask are optional"
        geometry = Geometry(tuple(weight.shape[2:]), tuple(stride), tuple(dilation), tuple(padding), causal=False)
        out = convolve_by_gather(
            x.to(dtype),
            offset,
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            mask,
            geometry,
            offset.shape[1] // (2 * geometry.taps),
        )
        wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if leaf is not None and need]
        computed = iter(torch.autograd.grad(out, wanted, grad, create_graph=create_graph))
    return [next(computed) if need else None for need in needs]


class _DeformableConv(torch.autograd.Function):
    """The operator in eager mode, without the time that torch's operator registry takes on the host."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad)


def _runs_eagerly(tensor: Tensor) -> bool:
    """Whether nothing traces or counts the operators that run on a tensor."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and not torch.compiler.is_compiling() and not has_dispatch_mode()


# The same as registered operators: for torch.compile, fake tensors and FlopCounterMode.
_operator = torch.library.custom_op("lightning_attn::deformable_conv", _forward, mutates_args=())
_gradients_operator = torch.library.custom_op("lightning_attn::deformable_conv_backward", _gradients, mutates_args=())


@_operator.register_fake
def _(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return _map(x.new_empty((x.shape[0], *offset.shape[2:], weight.shape[0]), dtype=dtype), x)


@_gradients_operator.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
    needs: Sequence[bool],
) -> list[Tensor]:
    grad_x, grad_offset, grad_weight, grad_mask = _empty_gradients(x, offset, weight, mask)
    gradients = (_map(grad_x, x), grad_offset, grad_weight, grad_mask)
    return [g for g, needed in zip(gradients, needs, strict=True) if needed and g is not None]


_operator.register_autograd(_backward, setup_context=_save_for_backward)


# ---- multiply-adds -------------------------------------------------------------------------------------------------


@register_flop_formula(torch.ops.lightning_attn.deformable_conv)
def _flops(x: torch.Size, offset: torch.Size, weight: torch.Size, bias: Any, mask: Any, *_: Any, **__: Any) -> int:
    """Bilinear samples of all channels at all taps, times the mask if any, and their product with the weight."""
    samples = x[0] * x[1] * math.prod(weight[2:]) * math.prod(offset[2:])
    outputs = x[0] * weight[0] * math.prod(offset[2:])
    return 2 * (samples * (4 + (mask is not None)) + outputs * math.prod(weight[1:]))


@register_flop_formula(torch.ops.lightning_attn.deformable_conv_backward)
def _backward_flops(
    grad: torch.Size, x: torch.Size, offset: torch.Size, weight: torch.Size, mask: Any, *rest: Any, **_: Any
) -> int:
    """Two products, and for each sample four corners of the map, of its gradient, and of the sums over channels."""
    needs = rest[-1]
    samples = x[0] * x[1] * math.prod(weight[2:]) * math.prod(offset[2:])
    product = math.prod(grad) * math.prod(weight[1:])
    per_sample = 4 * needs[0] + 4 * (needs[1] or needs[3]) + 4 * (needs[1] or needs[2] or needs[3])
    products = (needs[0] or needs[1] or needs[3]) + needs[2]
    return int(2 * (samples * per_sample + product * products))

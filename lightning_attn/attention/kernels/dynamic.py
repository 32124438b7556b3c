"""Dynamic convolution of maps (Eq. 5 to 7) in Triton: softmax over the taps and sum over the window in one kernel.

With N_k taps and G groups the logits are by far the largest tensor: N N_k G numbers, 129 MB an image for 31 x 31 taps
on 50 x 84 positions in half precision, where the values are 2 MB. So they are read as the predictor wrote them, and
normalised weights never exist in memory. The forward pass goes through the window row by row, with the maximum and the
sum of what it has seen (online softmax), and saves the log-sum-exp L of each query. The backward pass computes the
weights again, w_k = exp(logit_k - L). With s_k = <grad, v_k> over the channels of a group the gradient of a logit is
w_k (s_k - sum_j w_j s_j), in which the sum is <grad, out>. The gradient of a value is gathered from the queries that
read it. No addition is atomic, so that results are deterministic.

A thread has one position and up to 32 channels of a group: it computes a weight once for all of them, all its sums
stay in registers, and it exchanges nothing with other threads. Neighbouring threads have neighbouring positions, so
that a tap is one contiguous load of logits. Values and gradients are first copied, 4 MB, into vectors of 16 bytes of
one position's channels, with zeros around the map: 16 channels in half precision are two loads without a comparison. A
program has a block of positions in reading order, whose rows of values stay in L1 while it goes along a row of taps.
There is no matrix product: for tensor cores the logits would have to be band matrices, whose elements lie in N_k
places.

For 16 channels in bfloat16 a tap takes a warp 50 to 62 instructions, 16 of which are the additions, and about 11
accesses to L1, which an H100 does in about the same time: 31 x 31 taps at 2 x 256 x 50 x 84 are 4 million warp-taps in
each of three kernels. Reading their logits, 258 MB, takes a third of that. The kernels then need at most 64 registers
a thread, so that 8 programs of 128 positions fit on a multiprocessor; the 1,056 programs of that map are 8 for each of
132. Smaller maps have smaller blocks until there are about as many. Nothing is tuned at run time, and the size of a
map compiles nothing new.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightning_attn.attention.taps import aggregate_in_plain_operations
from lightning_attn.attention.transforms import is_transformed

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e38)  # below every logit but minus infinity, whose difference from itself is NaN

WARP = 32  # threads
VECTOR_BYTES = 16  # of a load
MAX_CHANNELS = 32  # of a thread
MAX_BLOCK = 128
MIN_PROGRAMS = 1024

_SIZES = [
    "sample_stride", "group_stride", "tap_stride", "grad_sample_stride", "grad_group_stride", "grad_tap_stride",
    "groups", "channels", "queries", "positions", "width", "first", "value_spots", "value_columns", "value_row",
    "grad_spots", "grad_columns", "grad_row",
]  # fmt: skip
"""Arguments whose values compile no further variant of a kernel: maps of all sizes run the same code."""
_UNALIGNED = ["logits", "out", "normaliser", "grad_logits", "grad_value"]  # read and written number by number


@triton.jit
def _place(positions: tl.tensor, chunks: tl.constexpr, block: tl.constexpr) -> tl.tensor:
    """The first position, the chunk of channels, and the sample and group of this program."""
    program = tl.program_id(0)
    blocks = tl.cdiv(positions, block)
    return program % blocks * block, program // blocks % chunks, (program // blocks // chunks).to(tl.int64)


@triton.jit
def _repeat(x: tl.tensor, packs: tl.constexpr) -> tl.tensor:
    """Repeats `[block]` for each vector of a position, `[packs * block]`."""
    return tl.reshape(tl.broadcast_to(x[None, :], [packs, x.shape[0]]), [packs * x.shape[0]])


@triton.jit
def _sum(x: tl.tensor, packs: tl.constexpr) -> tl.tensor:
    """Sums `[packs * block, lanes]` over the channels, `[block]`."""
    return tl.sum(tl.reshape(tl.sum(x, axis=1), [packs, x.shape[0] // packs]), axis=0)


@triton.jit
def _load(pointer: tl.tensor, spot: tl.tensor, spots: tl.tensor, packs: tl.constexpr, lanes: tl.constexpr) -> tl.tensor:
    """The vectors of padded positions `[block]` in float32, `[packs * block, lanes]`.

    Not as three dimensions: Triton's versions differ in which of the first two they give to neighbouring threads.
    """
    rows: tl.constexpr = packs * spot.shape[0]
    row = tl.arange(0, rows) // spot.shape[0] * spots + _repeat(spot, packs)
    if pointer.dtype.element_ty == tl.bfloat16 and lanes > 1:
        # Two numbers are one shift and one mask. Converted one by one they take twice as many instructions.
        pairs = row[:, None] * (lanes // 2) + tl.arange(0, lanes // 2)[None, :]
        pair = tl.load(pointer.to(tl.pointer_type(tl.int32), bitcast=True) + pairs)
        first = (pair << 16).to(tl.float32, bitcast=True)
        second = (pair & -65536).to(tl.float32, bitcast=True)
        vectors = tl.reshape(tl.join(first, second), [rows, lanes])
    else:
        vectors = tl.load(pointer + row[:, None] * lanes + tl.arange(0, lanes)[None, :]).to(tl.float32)
    return vectors


@triton.jit
def _channels(chunk: tl.tensor, packs: tl.constexpr, block: tl.constexpr, lanes: tl.constexpr) -> tl.tensor:
    """The channels of a chunk's vectors, `[packs * block, lanes]`."""
    return (chunk * packs + tl.arange(0, packs * block)[:, None] // block) * lanes + tl.arange(0, lanes)[None, :]


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def forward_kernel(
    logits: tl.tensor,
    value: tl.tensor,
    out: tl.tensor,
    normaliser: tl.tensor,
    sample_stride: tl.tensor,
    group_stride: tl.tensor,
    tap_stride: tl.tensor,
    groups: tl.tensor,
    channels: tl.tensor,
    queries: tl.tensor,
    width: tl.tensor,
    value_spots: tl.tensor,
    value_columns: tl.tensor,
    value_row: tl.tensor,
    taps_y: tl.constexpr,
    taps_x: tl.constexpr,
    chunks: tl.constexpr,
    packs: tl.constexpr,
    lanes: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """The sums over the windows of a block of queries, and the log-sum-exps of their logits."""
    start, chunk, sample = _place(queries, chunks, block)
    query = start + tl.arange(0, block)
    inside = query < queries
    query = tl.minimum(query, queries - 1)
    spot = (query // width + value_row) * value_columns + query % width
    logits += sample // groups * sample_stride + sample % groups * group_stride
    value += (sample * chunks + chunk) * packs * value_spots * lanes

    highest = tl.full([block], LOWEST, tl.float32)
    total = tl.zeros([block], tl.float32)
    result = tl.zeros([packs * block, lanes], tl.float32)
    for _ in range(taps_y):
        # The search for the maximum brings a row of logits into L1, by loads that need not wait for each other.
        before = highest
        row = logits
        for _ in range(taps_x):
            highest = tl.maximum(highest, tl.load(row + query).to(tl.float32))
            row += tap_stride
        factor = tl.exp2((before - highest) * LOG2_E)
        total *= factor
        result *= _repeat(factor, packs)[:, None]
        for tap in range(taps_x):
            weight = tl.exp2((tl.load(logits + query).to(tl.float32) - highest) * LOG2_E)
            total += weight
            result += _repeat(weight, packs)[:, None] * _load(value + tap * lanes, spot, value_spots, packs, lanes)
            logits += tap_stride
        value += value_columns * lanes

    result /= _repeat(total, packs)[:, None]
    channel = _channels(chunk, packs, block, lanes)
    offsets = (sample * channels + channel) * queries + _repeat(query, packs)[:, None]
    tl.store(out + offsets, result, mask=_repeat(inside, packs)[:, None] & (channel < channels))
    if chunk == 0:
        tl.store(normaliser + sample * queries + query, highest + tl.log(total), mask=inside)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def grad_logits_kernel(
    grad: tl.tensor,
    logits: tl.tensor,
    value: tl.tensor,
    out: tl.tensor,
    normaliser: tl.tensor,
    grad_logits: tl.tensor,
    grad_sample_stride: tl.tensor,
    grad_group_stride: tl.tensor,
    grad_tap_stride: tl.tensor,
    sample_stride: tl.tensor,
    group_stride: tl.tensor,
    tap_stride: tl.tensor,
    groups: tl.tensor,
    channels: tl.tensor,
    queries: tl.tensor,
    width: tl.tensor,
    value_spots: tl.tensor,
    value_columns: tl.tensor,
    value_row: tl.tensor,
    grad_spots: tl.tensor,
    grad_columns: tl.tensor,
    grad_row: tl.tensor,
    taps_y: tl.constexpr,
    taps_x: tl.constexpr,
    chunks: tl.constexpr,
    packs: tl.constexpr,
    lanes: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """The gradients of the logits of a block of queries."""
    unroll: tl.constexpr = 4 if packs * lanes <= 16 else 2  # more would need too many registers
    start, _, sample = _place(queries, 1, block)
    query = start + tl.arange(0, block)
    inside = query < queries
    query = tl.minimum(query, queries - 1)
    y, x = query // width, query % width
    spot = (y + value_row) * value_columns + x
    grad_spot = (y + grad_row) * grad_columns + x + taps_x // 2
    logits += sample // groups * sample_stride + sample % groups * group_stride
    grad_logits += sample // groups * grad_sample_stride + sample % groups * grad_group_stride
    value += sample * (chunks * packs) * value_spots * lanes
    grad += sample * (chunks * packs) * grad_spots * lanes
    value_chunk = tl.cast(value_spots, tl.int64) * packs * lanes
    grad_chunk = tl.cast(grad_spots, tl.int64) * packs * lanes
    log_sum = tl.load(normaliser + sample * queries + query)

    mean = tl.zeros([block], tl.float32)
    for chunk in range(chunks):
        channel = _channels(chunk, packs, block, lanes)
        offsets = (sample * channels + channel) * queries + _repeat(query, packs)[:, None]
        result = tl.load(out + offsets, mask=channel < channels, other=0.0)
        product = result * _load(grad + chunk * grad_chunk, grad_spot, grad_spots, packs, lanes)
        mean += _sum(product, packs)
    own = _load(grad, grad_spot, grad_spots, packs, lanes)

    # Two taps ahead, since no load can be moved in front of a store that might overwrite what it reads.
    count: tl.constexpr = taps_y * taps_x
    logit = tl.load(logits + query).to(tl.float32)
    following = tl.load(logits + tap_stride + query, mask=count > 1, other=0.0).to(tl.float32)
    logits += 2 * tap_stride
    ahead = 2
    for _ in range(taps_y):
        for tap in tl.range(0, taps_x, loop_unroll_factor=unroll):
            after = tl.load(logits + query, mask=ahead < count, other=0.0).to(tl.float32)
            product = own * _load(value + tap * lanes, spot, value_spots, packs, lanes)
            along = _sum(product, packs)
            for chunk in range(1, chunks):
                product = _load(grad + chunk * grad_chunk, grad_spot, grad_spots, packs, lanes)
                product *= _load(value + chunk * value_chunk + tap * lanes, spot, value_spots, packs, lanes)
                along += _sum(product, packs)
            weight = tl.exp2((logit - log_sum) * LOG2_E)
            tl.store(grad_logits + query, weight * (along - mean), mask=inside)
            logit = following
            following = after
            logits += tap_stride
            grad_logits += grad_tap_stride
            ahead += 1
        value += value_columns * lanes


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_UNALIGNED)
def grad_value_kernel(
    grad: tl.tensor,
    logits: tl.tensor,
    normaliser: tl.tensor,
    grad_value: tl.tensor,
    sample_stride: tl.tensor,
    group_stride: tl.tensor,
    tap_stride: tl.tensor,
    groups: tl.tensor,
    channels: tl.tensor,
    queries: tl.tensor,
    positions: tl.tensor,
    width: tl.tensor,
    first: tl.tensor,
    grad_spots: tl.tensor,
    grad_columns: tl.tensor,
    grad_row: tl.tensor,
    taps_y: tl.constexpr,
    taps_x: tl.constexpr,
    chunks: tl.constexpr,
    packs: tl.constexpr,
    lanes: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """The gradients of a block of values: those of the queries that read them, with their weights."""
    unroll: tl.constexpr = 4 if packs * lanes <= 16 else 2
    start, chunk, sample = _place(positions, chunks, block)
    position = start + tl.arange(0, block)
    inside = position < positions
    position = tl.minimum(position, positions - 1)
    y, x = position // width, position % width
    rows = queries // width
    # Rows of taps by which some query reads some position of the block.
    low = tl.maximum(start // width - first - rows + 1, 0)
    high = tl.minimum(tl.minimum(start + block - 1, positions - 1) // width - first + 1, taps_y)
    logits += sample // groups * sample_stride + sample % groups * group_stride
    logits += low.to(tl.int64) * taps_x * tap_stride
    normaliser += sample * queries
    grad += (sample * chunks + chunk) * packs * grad_spots * lanes

    result = tl.zeros([packs * block, lanes], tl.float32)
    i = low
    while i < high:
        query_y = y - first - i
        shift = taps_x // 2 - (first + i) * width
        row_inside = (query_y >= 0) & (query_y < rows)
        spot = (query_y + grad_row) * grad_columns + x + (taps_x - 1)
        for tap in tl.range(0, taps_x, loop_unroll_factor=unroll):
            query_x = x + taps_x // 2 - tap
            query = position + (shift - tap)
            read = row_inside & (query_x >= 0) & (query_x < width)
            logit = tl.load(logits + tap * tap_stride + query, mask=read, other=float("-inf")).to(tl.float32)
            weight = tl.exp2((logit - tl.load(normaliser + query, mask=read, other=0.0)) * LOG2_E)
            result += _repeat(weight, packs)[:, None] * _load(grad - tap * lanes, spot, grad_spots, packs, lanes)
        logits += taps_x * tap_stride
        i += 1
    channel = _channels(chunk, packs, block, lanes)
    offsets = (sample * channels + channel) * positions + _repeat(position, packs)[:, None]
    tl.store(grad_value + offsets, result, mask=_repeat(inside, packs)[:, None] & (channel < channels))


RUNS_ANYWHERE: bool = not isinstance(forward_kernel, triton.runtime.JITFunction)
"""Whether Triton interprets kernels, as it does with TRITON_INTERPRET=1 in the environment, on any device."""


def vector_shape(channels: int, bytes_each: int) -> dict[str, int]:
    """How the channels of a group are divided: `chunks` of `packs` vectors of `lanes` channels, the last one padded.

    A thread has one chunk.
    """
    lanes = min(VECTOR_BYTES // bytes_each, triton.next_power_of_2(channels))
    packs = min(triton.next_power_of_2(triton.cdiv(channels, lanes)), MAX_CHANNELS // lanes)
    return {"chunks": triton.cdiv(channels, packs * lanes), "packs": packs, "lanes": lanes}


def block_size(positions: int, maps: int) -> int:
    """The number of positions of a program, one for each thread, so that there are enough programs for `maps` maps."""
    block = MAX_BLOCK
    while block > WARP and triton.cdiv(positions, block) * maps < MIN_PROGRAMS:
        block //= 2
    return block


def softmax_and_aggregate(logits: Tensor, value: Tensor, taps_x: int, first: int) -> Tensor:
    """Normalises kernels over their taps and sums over the window of a map (Eq. 5 and 7).

    Tap (i, j) of the query in row y and column x reads row y + i + first and column x + j - n_x // 2. Half-precision
    logits and values are read as they are, sums are in float32. Results are deterministic.

    Args:
        logits: `[B, G, n_y * n_x, H, W]` on a CUDA device, float32, float16 or bfloat16. Copied if the positions of a
            tap are not contiguous.
        value: `[B, G, d, H', W]`, zero outside, of any of these types.
        taps_x: n_x, odd.
        first: Row that the first tap of the first query reads.

    Returns:
        `[B, G, d, H, W]` in float32.
    """
    out: Tensor = _forward(logits, value, taps_x, first)[0]
    return out


@torch.library.custom_op("lightning_attn::dynamic_kernel", mutates_args=())
def _forward(logits: Tensor, value: Tensor, taps_x: int, first: int) -> tuple[Tensor, Tensor]:
    batch, groups, taps, rows, columns = logits.shape
    channels, taps_y, queries, maps = value.shape[2], taps // taps_x, rows * columns, batch * groups
    out = value.new_empty(batch, groups, channels, rows, columns, dtype=torch.float32)
    normaliser = value.new_empty(batch, groups, rows, columns, dtype=torch.float32)
    vectors = vector_shape(channels, value.element_size())
    packed, spots, width, above = _packed(value, first, first + rows + taps_y - 2, taps_x // 2, vectors)
    logits = logits if _has_contiguous_rows(logits) else logits.contiguous()
    arguments = (logits, packed, out, normaliser, *logits.stride()[:3], groups, channels, queries, columns)
    arguments += (spots, width, first + above, taps_y, taps_x)
    _launch(forward_kernel, arguments, queries, maps * vectors["chunks"], vectors)
    return out, normaliser


@torch.library.custom_op("lightning_attn::dynamic_kernel_backward", mutates_args=())
def _gradients(
    grad: Tensor, logits: Tensor, value: Tensor, out: Tensor, normaliser: Tensor, taps_x: int, first: int
) -> tuple[Tensor, Tensor]:
    batch, groups, taps, rows, columns = logits.shape
    channels, taps_y, queries, maps = value.shape[2], taps // taps_x, rows * columns, batch * groups
    grad_logits, grad_value = _empty_gradients(logits, value)
    vectors = vector_shape(channels, value.element_size())
    packed, spots, width, above = _packed(value, first, first + rows + taps_y - 2, taps_x // 2, vectors)
    frame = (spots, width, first + above)
    last = value.shape[3] - 1 - first
    # The gradient of a result in the type of the values, to which the module rounds it, has no more digits.
    packed_grad, *grad_frame = _packed(grad.to(value.dtype), 1 - taps_y - first, last, taps_x // 2, vectors)
    logits = logits if _has_contiguous_rows(logits) else logits.contiguous()
    out, normaliser = out.contiguous(), normaliser.contiguous()
    shape = (*logits.stride()[:3], groups, channels, queries)
    arguments: tuple[Any, ...] = (packed_grad, logits, packed, out, normaliser, grad_logits)
    arguments += (*grad_logits.stride()[:3], *shape, columns, *frame, *grad_frame, taps_y, taps_x)
    _launch(grad_logits_kernel, arguments, queries, maps, vectors)
    positions = value.shape[3] * columns
    arguments = (packed_grad, logits, normaliser, grad_value, *shape, positions, columns, first, *grad_frame)
    _launch(grad_value_kernel, (*arguments, taps_y, taps_x), positions, maps * vectors["chunks"], vectors)
    return grad_logits, grad_value


def _empty_gradients(logits: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised gradients. Those of logits have the strides of these, which saves a copy in the backward pass."""
    grad_logits = torch.empty_like(logits) if _has_contiguous_rows(logits) else logits.new_empty(logits.shape)
    return grad_logits, value.new_empty(value.shape)


def _packed(
    x: Tensor, first_row: int, last_row: int, border: int, vectors: dict[str, int]
) -> tuple[Tensor, int, int, int]:
    """Copies `[B, G, d, H, W]` into vectors of channels, with zeros around the map where it will be read.

    Args:
        x: Values or gradients.
        first_row: The first row that will be read, below zero if it is above the map.
        last_row: The last one.
        border: Columns of zeros on each side.
        vectors: Of `vector_shape`.

    Returns:
        `[B, G, vectors, rows, columns, lanes]`, its rows times columns, its columns, and its rows above the map.
    """
    above, below = max(0, -first_row), max(0, last_row + 1 - x.shape[3])
    missing = math.prod(vectors.values()) - x.shape[2]
    padded = F.pad(x, (border, border, above, below, 0, missing))
    packed = torch.unflatten(padded, 2, (-1, vectors["lanes"])).movedim(3, 5).contiguous()
    return packed, packed.shape[3] * packed.shape[4], packed.shape[4], above


def _has_contiguous_rows(logits: Tensor) -> bool:
    """Whether the positions of each tap are contiguous, as the kernels need them."""
    return logits.stride()[3:] == (logits.shape[4], 1)


def _launch(kernel: Any, arguments: tuple[Any, ...], positions: int, maps: int, vectors: dict[str, int]) -> None:
    block = block_size(positions, maps)
    programs = triton.cdiv(positions, block) * maps
    if programs:
        with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
            kernel[(programs,)](*arguments, **vectors, block=block, num_warps=block // WARP)


@_forward.register_fake
def _(logits: Tensor, value: Tensor, taps_x: int, first: int) -> tuple[Tensor, Tensor]:
    shape = logits.shape[3:]
    out = value.new_empty(*value.shape[:3], *shape, dtype=torch.float32)
    return out, value.new_empty(*value.shape[:2], *shape, dtype=torch.float32)


@_gradients.register_fake
def _(
    grad: Tensor, logits: Tensor, value: Tensor, out: Tensor, normaliser: Tensor, taps_x: int, first: int
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(logits, value)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: tuple[Tensor, Tensor]) -> None:
    logits, value, ctx.taps_x, ctx.first = inputs
    ctx.save_for_backward(logits, value, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, None, None]:
    logits, value, out, normaliser = ctx.saved_tensors
    if torch.is_grad_enabled() or is_transformed(grad):
        with torch.enable_grad():
            leaves = logits.view_as(logits).requires_grad_(), value.view_as(value).requires_grad_()
            kernel = torch.unflatten(torch.softmax(leaves[0].float(), dim=2), 2, (-1, ctx.taps_x))
            result = aggregate_in_plain_operations(kernel, leaves[1].float(), ctx.first)
            grad_logits, grad_value = torch.autograd.grad(result, leaves, grad, create_graph=True)
    else:
        grad_logits, grad_value = _gradients(grad, logits, value, out, normaliser, ctx.taps_x, ctx.first)
    return grad_logits, grad_value, None, None


_forward.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.lightning_attn.dynamic_kernel)
def _flops(logits: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """A product for each channel and tap, of those too that are outside the map."""
    return 2 * math.prod(value[:3]) * math.prod(logits[2:])


@register_flop_formula(torch.ops.lightning_attn.dynamic_kernel_backward)
def _backward_flops(grad: torch.Size, logits: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """One for the gradient of the tap's weight, one for that of the value."""
    return 2 * _flops(logits, value)

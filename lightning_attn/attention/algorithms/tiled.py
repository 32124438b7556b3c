"""Softmax attention tile by tile: exact, with memory that grows with the number of queries, not with its square.

A tile is a rectangle of queries together with the rectangle of keys that they can see, for some pairs of a sample and a
head. Its weights are in two buffers that fit the CPU caches; the backward pass recomputes them. All cores work on one
tile at a time. For compilation and tracing there are operators registered with `torch.library`, one graph node each;
second derivatives go through the plain operations of `dense_attention`.

Shapes: B samples, M heads, P = B M pairs; N_q queries and N_k keys on grids; d features of a head.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_attn.attention.algorithms.augmented_sdpa import augmented
from lightning_attn.attention.algorithms.base import Algorithm, AttentionInputs, AttentionProblem
from lightning_attn.attention.dropout import dropout_factors, new_seed
from lightning_attn.attention.energies import multiplies_fast_in_half
from lightning_attn.attention.layout import Layout, Spans, masked_softmax, size_of
from lightning_attn.attention.positions import computation_dtype
from lightning_attn.attention.projections import without_autocast
from lightning_attn.attention.transforms import constant_when_compiled, is_exporting, is_transformed

TILE_WEIGHTS = 640 * 1024
"""Weights of a tile for each thread: two buffers of them fit a core's caches, and each operation takes long enough to
amortise the synchronisation of the threads. Measured flat between 512 and 1024 thousand, on one thread and on two."""
MAX_TILE_WEIGHTS = 8 * TILE_WEIGHTS
"""For any number of threads: 42 MB in the two buffers."""
MAX_SAVED_WEIGHTS = 4 * 1000 * 1000
"""Up to this number all weights are saved for the backward pass (16 MB in float32), which saves two of its 7 steps."""
MIN_TILE_QUERIES = 64
"""Fewer rows make the matrix products slow; a map of very many keys gets a larger tile instead."""
MIN_WINDOW_TILE = 8
"""Minimum edge of a tile of queries with a window: large enough for products, and the keys of a tile, (edge + n_k -
1)^2, stay within a small multiple of n_k^2."""
MAX_SENTENCE_KEYS = 256
"""Longer sentences get their position energies as extra features of queries and keys; see `augmented_sdpa`. For shorter
ones they are held in memory, which is faster."""


class Tiled(Algorithm):
    """Any terms, masks and windows."""

    name = "tiled"

    @override
    def unsupported_reason(self, problem: AttentionProblem) -> str | None:
        return None

    @override
    def is_suitable(self, problem: AttentionProblem) -> bool:
        """Everywhere except for transforms and export, which need plain operations."""
        return not (problem.transformed or problem.exported)

    @override
    def compute(self, inputs: AttentionInputs) -> Tensor:
        energies, value, layout = inputs.energies(), inputs.projected_value(), inputs.layout
        batch, heads = value.shape[:2]
        query, key, key_energy = energies.content_query, energies.key, energies.key_energy
        features_last = value.stride(-1) == 1
        if features_last:  # one copy for both passes: samples and heads of a linear layer's output cannot be joined
            value = value.contiguous()
            query, key = (tensor if tensor is None else tensor.contiguous() for tensor in (query, key))
        along_y: Tensor | None = None
        along_x: Tensor | None = None
        is_sentence = inputs.attention.ndim == 1
        is_long = is_sentence and not torch.compiler.is_compiling() and layout.num_keys > MAX_SENTENCE_KEYS
        if energies.position_query is not None and is_long:
            query, key = augmented(dataclasses.replace(energies, key_energy=None), value)
        elif energies.position_query is not None:
            sizes = (batch, heads, *layout.query_sizes, -1)
            along_y, along_x = (None if along is None else along.expand(sizes) for along in energies.along_axes())
        seed = new_seed() if inputs.dropout > 0 else None
        tensors = (query, key, key_energy, along_y, along_x, value, inputs.padding(), inputs.hidden_pairs())
        grids = (layout.query_sizes, layout.key_sizes, layout.stride, layout.causal, layout.window)
        arguments = (*tensors, *grids, inputs.dropout, seed, features_last)
        with without_autocast(value.device):
            if is_transformed() or is_exporting():
                return dense_attention(*arguments)
            save_weights = batch * heads * layout.num_queries * layout.num_keys <= MAX_SAVED_WEIGHTS
            apply = _TiledAttention.apply if _is_plain_tensor(value) else tiled_attention
            result: Tensor
            result, _ = apply(*arguments, _threads(value), torch.is_grad_enabled() and save_weights)
            return result


@dataclasses.dataclass(frozen=True)
class Tile:
    """Some pairs of a sample and a head, a rectangle of queries, and the rectangle of keys that they see."""

    pairs: slice
    queries: Spans
    keys: Spans

    @property
    def shape(self) -> tuple[int, int, int]:
        """Pairs, queries and keys."""
        return self.pairs.stop - self.pairs.start, size_of(self.queries), size_of(self.keys)


def cut(layout: Layout, pairs: int, threads: int) -> list[Tile]:
    """Tiles that cover every query of every pair once, for this number of threads."""
    rows, columns = layout.query_sizes
    wanted = min(TILE_WEIGHTS * threads, MAX_TILE_WEIGHTS)
    window = layout.window
    if window is not None and any(n < size * layout.stride for n, size in zip(window, layout.key_sizes, strict=True)):
        height, width = (max(MIN_WINDOW_TILE, n // 2) for n in window)
        if rows == 1:
            width *= 4
    else:
        # One pair for each thread, or all of its queries if these are few.
        queries = max(MIN_TILE_QUERIES, wanted // max(1, min(threads, pairs) * layout.num_keys))
        height, width = max(1, queries // max(1, columns)), queries
    parts = []
    height, width = _even(rows, height), _even(columns, width)
    for y in range(0, rows, height):
        for x in range(0, columns, width):
            queries_of_tile = (slice(y, min(y + height, rows)), slice(x, min(x + width, columns)))
            parts.append((queries_of_tile, layout.visible_keys(queries_of_tile)))
    largest = max((size_of(queries_of_tile) * size_of(keys) for queries_of_tile, keys in parts), default=0)
    tile_pairs = _even(pairs, max(min(threads, pairs), wanted // max(1, largest)))
    return [
        Tile(slice(pair, min(pair + tile_pairs, pairs)), *part)
        for pair in range(0, pairs, tile_pairs)
        for part in parts
    ]


def _even(total: int, part: int) -> int:
    """The part size that splits `total` into as many parts as `part` does, but of nearly equal size."""
    return max(1, -(-total // max(1, -(-total // max(1, part)))))


class _Grid:
    """A tensor `[B, M, N, d]` as matrices of tiles: `[pairs, n, d]`, views where the strides allow it.

    To be written to, its first two dimensions must be joinable without a copy, as in tensors of `_empty`.
    """

    def __init__(self, tensor: Tensor, sizes: Sequence[int]) -> None:
        self.tensor = tensor
        self.pairs = tensor.flatten(0, 1)
        self.sizes = tuple(sizes)

    def read(self, pairs: slice, spans: Spans) -> Tensor:
        """The matrices of a rectangle."""
        rows = self._rows(pairs, spans)
        return self._rectangle(pairs, spans).flatten(1, 2) if rows is None else rows

    def write(self, pairs: slice, spans: Spans, values: Tensor) -> None:
        """Sets the matrices of a rectangle."""
        rows = self._rows(pairs, spans)
        if rows is not None:
            rows.copy_(values)
        else:
            part = self._rectangle(pairs, spans)
            part.copy_(values.view(part.shape))

    def write_product(self, pairs: slice, spans: Spans, left: Tensor, right: Tensor) -> None:
        """Sets the matrices of a rectangle to products."""
        rows = self._rows(pairs, spans)
        if rows is not None and rows.dtype == left.dtype and rows.is_contiguous():
            torch.bmm(left, right, out=rows)
        else:
            self.write(pairs, spans, torch.bmm(left, right))

    def add_product(self, pairs: slice, spans: Spans, left: Tensor, right: Tensor, first: bool) -> None:
        """Adds products to the matrices of a rectangle; with `first` sets them instead."""
        rows = self._rows(pairs, spans)
        if rows is not None and rows.dtype == left.dtype:
            rows.baddbmm_(left, right, beta=0 if first else 1)
        elif first:
            self.write(pairs, spans, torch.bmm(left, right))
        elif rows is not None:
            rows += torch.bmm(left, right)
        else:
            part = self._rectangle(pairs, spans)
            part += torch.bmm(left, right).view(part.shape)

    def _rows(self, pairs: slice, spans: Spans) -> Tensor | None:
        """A rectangle that is contiguous: whole rows of the grid, or a part of its only row; else None."""
        (rows, columns), width = spans, self.sizes[1]
        if columns.stop - columns.start == width:
            return self.pairs[pairs, rows.start * width : rows.stop * width]
        return self.pairs[pairs, columns] if self.sizes[0] == 1 else None

    def _rectangle(self, pairs: slice, spans: Spans) -> Tensor:
        return torch.unflatten(self.pairs, 1, self.sizes)[pairs, spans[0], spans[1]]


class _Work:
    """The inputs in the dtype of the computation, split into tiles, with the buffers for a tile's weights."""

    def __init__(
        self,
        query: Tensor | None,
        key: Tensor | None,
        key_energy: Tensor | None,
        along_y: Tensor | None,
        along_x: Tensor | None,
        value: Tensor,
        padding: Tensor | None,
        attention_mask: Tensor | None,
        layout: Layout,
        dropout: float,
        seed: Tensor | None,
        threads: int,
    ) -> None:
        self.layout, self.dropout, self.seed = layout, dropout, seed
        self.dtype, self.device = computation_dtype(value), value.device
        # For products of weights, values and gradients; energies and softmax are float32 or better in any case.
        self.product_dtype = value.dtype if multiplies_fast_in_half(value) else self.dtype
        self.batch, self.heads = value.shape[:2]
        pairs = self.batch * self.heads
        self._given = query, key
        self.query = None if query is None else _Grid(query.to(self.product_dtype), layout.query_sizes)
        self.key = None if key is None else _Grid(key.to(self.product_dtype), layout.key_sizes)
        self.key_energy = None if key_energy is None else self._by_key(key_energy.to(self.dtype).flatten(0, 1))
        self.along = [
            None if along is None else along.to(self.dtype).flatten(0, 1) for along in (along_y, along_x)
        ]  # [P, rows, columns, keys along the axis]
        self.value = _Grid(value.to(self.product_dtype), layout.key_sizes)
        self.padding = None
        if padding is not None:
            self.padding = self._by_key(padding.unsqueeze(1).expand(-1, self.heads, -1).flatten(0, 1))
        self.attention_mask = None
        if attention_mask is not None:
            sizes = (*layout.query_sizes, *layout.key_sizes)
            mask = attention_mask.expand(self.batch, self.heads, -1, -1)
            self.attention_mask = torch.unflatten(torch.unflatten(mask, 3, sizes[2:]), 2, sizes[:2])
        self.tiles = cut(layout, pairs, threads)
        self._buffers: dict[int, Tensor] = {}

    def _by_key(self, tensor: Tensor) -> Tensor:
        """`[P, key rows, key columns]`."""
        return torch.unflatten(tensor, 1, self.layout.key_sizes)

    def buffer(self, number: int, tile: Tile, dtype: torch.dtype) -> Tensor:
        """Memory for the weights of a tile, `[pairs, queries, keys]`; all tiles share the buffer of a number."""
        if number not in self._buffers:
            largest = max(math.prod(other.shape) for other in self.tiles)
            self._buffers[number] = torch.empty(largest, dtype=dtype, device=self.device)
        return self._buffers[number][: math.prod(tile.shape)].view(tile.shape)

    def saved_slices(self) -> list[slice]:
        """The slice of each tile in the saved weights, where tiles follow each other."""
        ends = list(itertools.accumulate(math.prod(tile.shape) for tile in self.tiles))
        return [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]

    def empty_weights(self) -> Tensor:
        """Memory for the weights of all tiles."""
        count = sum(math.prod(tile.shape) for tile in self.tiles)
        return torch.empty(count, dtype=self.product_dtype, device=self.device)

    def by_axis(self, tensor: Tensor, tile: Tile) -> Tensor:
        """The weights of a tile as `[pairs, queries, key rows, key columns]`."""
        return torch.unflatten(tensor, 2, [span.stop - span.start for span in tile.keys])

    def along_axis(self, axis: int, tile: Tile) -> Tensor | None:
        """The position energies of a tile along one axis, `[pairs, queries, keys along the axis]`."""
        along = self.along[axis]
        if along is None:
            return None
        return along[tile.pairs, tile.queries[0], tile.queries[1], tile.keys[axis]].flatten(1, 2)

    @functools.cached_property
    def factors(self) -> tuple[_Grid, _Grid] | None:
        """Query and key in the dtype of the energies; in half precision not needed where weights are saved."""
        query, key = self._given
        if query is None or key is None:
            return None
        return _Grid(query.to(self.dtype), self.layout.query_sizes), _Grid(key.to(self.dtype), self.layout.key_sizes)

    def weights(self, tile: Tile) -> Tensor:
        """The weights of a tile before dropout, `[pairs, queries, keys]`, in buffer 0."""
        energy = self.buffer(0, tile, self.dtype)
        parts = []
        for axis in (0, 1):
            along = self.along_axis(axis, tile)
            if along is not None:
                parts.append(along.unsqueeze(3 - axis))
        if self.key_energy is not None:
            parts.append(self.key_energy[tile.pairs, tile.keys[0], tile.keys[1]].unsqueeze(1))
        grid = self.by_axis(energy, tile)
        if len(parts) > 1:
            torch.add(parts[0], parts[1], out=grid)
        elif parts:
            grid.copy_(parts[0])
        if len(parts) > 2:
            grid.add_(parts[2])
        if self.factors is not None:
            query, key = self.factors
            matrices = (query.read(tile.pairs, tile.queries), key.read(tile.pairs, tile.keys).transpose(1, 2))
            if parts:
                energy.baddbmm_(*matrices)
            else:
                torch.bmm(*matrices, out=energy)
        hidden = self.hidden(tile)
        if hidden is not None:
            # The most negative finite number: -inf would make a fully masked row NaN.
            energy.masked_fill_(hidden, torch.finfo(self.dtype).min)
        weights = torch.softmax(energy, dim=-1, out=energy)  # safe in place: each row is read before it is written
        if hidden is not None:
            fully_masked = hidden.all(dim=-1, keepdim=True)
            if self.device.type != "cpu" or bool(fully_masked.any()):
                weights.masked_fill_(fully_masked, 0.0)
        return weights

    def hidden(self, tile: Tile) -> Tensor | None:
        """True where a key is hidden from a query, `[pairs or 1, queries or 1, keys]`; None if none is."""
        hidden = self.layout.hidden(tile.queries, tile.keys, self.device)
        if hidden is not None:
            hidden = hidden.flatten(2).flatten(0, 1)[None]
        if self.padding is not None:
            padding = self.padding[tile.pairs, tile.keys[0], tile.keys[1]].flatten(1).unsqueeze(1)
            hidden = padding if hidden is None else hidden | padding
        if self.attention_mask is not None:
            pairs = torch.arange(tile.pairs.start, tile.pairs.stop, device=self.device)
            part = self.attention_mask[:, :, *tile.queries, *tile.keys][pairs // self.heads, pairs % self.heads]
            mask = part.flatten(3).flatten(1, 2)
            hidden = mask if hidden is None else hidden | mask
        return hidden

    def dropout_factors(self, tile: Tile) -> Tensor | None:
        """The dropout factors of a tile's weights, the same in both passes; None without dropout."""
        if self.seed is None or self.dropout == 0.0:
            return None
        (rows, columns), device = tile.queries, self.device
        numbers = torch.arange(rows.start, rows.stop, device=device)[:, None] * self.layout.query_sizes[1]
        numbers = (numbers + torch.arange(columns.start, columns.stop, device=device)).flatten()
        pairs = torch.arange(tile.pairs.start, tile.pairs.stop, device=device)[:, None]
        row_ids = pairs * self.layout.num_queries + numbers
        key_rows, key_columns = tile.keys
        num_rows, num_columns = self.layout.key_sizes
        if key_columns == slice(0, num_columns) or num_rows == 1:
            first = key_rows.start * num_columns + key_columns.start
            if first == 0:
                return dropout_factors(self.seed, self.dropout, self.product_dtype, row_ids, tile.shape[2])
        keys = torch.arange(key_rows.start, key_rows.stop, device=device)[:, None] * num_columns
        keys = (keys + torch.arange(key_columns.start, key_columns.stop, device=device)).flatten()
        return dropout_factors(self.seed, self.dropout, self.product_dtype, row_ids, tile.shape[2], keys)


def _forward(
    query: Tensor | None,
    key: Tensor | None,
    key_energy: Tensor | None,
    along_y: Tensor | None,
    along_x: Tensor | None,
    value: Tensor,
    padding: Tensor | None,
    attention_mask: Tensor | None,
    query_sizes: Sequence[int],
    key_sizes: Sequence[int],
    stride: int,
    causal: bool,
    window: Sequence[int] | None,
    dropout: float,
    seed: Tensor | None,
    features_last: bool,
    threads: int,
    save_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Weighted sums of values, with the softmax of summed energies as weights.

    Energies and sums are computed in float32, or float64 for float64 values. At least one energy must be given.

    Args:
        query: `[B, M, N_q, width]`, whose products with `key` are one energy; or None.
        key: `[B, M, N_k, width]`.
        key_energy: An energy that depends on the key alone, `[B, M, N_k]`; or None.
        along_y: An energy of the query and the key's row, `[B, M, rows, columns, key rows]`; or None.
        along_x: An energy of the query and the key's column, `[B, M, rows, columns, key columns]`; or None.
        value: `[B, M, N_k, d]`.
        padding: True where a key is padding, `[B, N_k]`.
        attention_mask: True where a key is hidden from a query, `[B or 1, M or 1, N_q, N_k]`.
        query_sizes: Rows and columns, see `Layout`; so are the next four.
        key_sizes: See `Layout`.
        stride: See `Layout`.
        causal: See `Layout`.
        window: See `Layout`.
        dropout: Probability of dropping a weight.
        seed: With dropout, the seed of its mask, an integer tensor without dimensions.
        features_last: Whether the features of a position are contiguous in the results; else the positions of a
            feature are.
        threads: Number of threads that the tiles are sized for; the same in both passes, whatever torch's setting.
        save_weights: Save all weights for the backward pass, which otherwise recomputes them.

    Returns:
        `[B, M, N_q, d]` in the dtype of `value`, zeros for a query that sees no key; and the saved weights, tile by
        tile (empty without `save_weights`).
    """
    layout = _layout(query_sizes, key_sizes, stride, causal, window)
    work = _Work(
        query, key, key_energy, along_y, along_x, value, padding, attention_mask, layout, dropout, seed, threads
    )
    output = _Grid(_empty_output(value, query_sizes, features_last), layout.query_sizes)
    saved_weights = work.empty_weights() if save_weights else value.new_empty(0)
    for tile, saved in zip(work.tiles, work.saved_slices(), strict=True):
        if 0 in tile.shape:
            output.write(tile.pairs, tile.queries, value.new_zeros(*tile.shape[:2], value.shape[-1]))
            continue
        weights = work.weights(tile)
        if save_weights:
            weights = saved_weights[saved].view(tile.shape).copy_(weights)
        else:
            weights = weights.to(work.product_dtype)
        factors = work.dropout_factors(tile)
        if factors is not None:
            weights = factors.mul_(weights)
        output.write_product(tile.pairs, tile.queries, weights, work.value.read(tile.pairs, tile.keys))
    return output.tensor, saved_weights


def _gradients(
    grad: Tensor,
    saved_weights: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    key_energy: Tensor | None,
    along_y: Tensor | None,
    along_x: Tensor | None,
    value: Tensor,
    padding: Tensor | None,
    attention_mask: Tensor | None,
    query_sizes: Sequence[int],
    key_sizes: Sequence[int],
    stride: int,
    causal: bool,
    window: Sequence[int] | None,
    dropout: float,
    seed: Tensor | None,
    features_last: bool,
    threads: int,
) -> list[Tensor]:
    """Gradients of the tensors among query ... value, in that order; `saved_weights` is from `_forward`."""
    layout = _layout(query_sizes, key_sizes, stride, causal, window)
    work = _Work(
        query, key, key_energy, along_y, along_x, value, padding, attention_mask, layout, dropout, seed, threads
    )
    dtype = work.dtype
    product_dtype = work.product_dtype
    grad_output = _Grid(grad.to(product_dtype), layout.query_sizes)
    # Sums over tiles have contiguous features: the fastest layout to add products to.
    sum_dtype = product_dtype if all(tile.shape[1] == layout.num_queries for tile in work.tiles) else dtype
    grad_value = _Grid(value.new_empty(value.shape, dtype=sum_dtype), layout.key_sizes)
    grad_key = None if key is None else _Grid(key.new_empty(key.shape, dtype=sum_dtype), layout.key_sizes)
    grad_query = None if query is None else _Grid(_empty(query, features_last, value.dtype), layout.query_sizes)
    # If every tile has all keys, the first tile of some pairs sets the sums and no zeros are needed.
    sets_all = not any(0 in tile.shape for tile in work.tiles) and layout.window is None and not layout.causal
    if not sets_all:
        for grid in (grad_value, grad_key, grad_query):
            if grid is not None:
                grid.tensor.zero_()
    grad_key_energy = None if work.key_energy is None else torch.zeros_like(work.key_energy)
    grad_along = [None if a is None else torch.zeros(a.shape, dtype=dtype, device=a.device) for a in work.along]
    for tile, saved in zip(work.tiles, work.saved_slices(), strict=True):
        if 0 in tile.shape:
            continue
        pairs, queries, keys = tile.pairs, tile.queries, tile.keys
        first = sets_all and queries[0].start == queries[1].start == 0
        if saved_weights.numel():
            weights = saved_weights[saved].view(tile.shape)
        else:
            weights = work.weights(tile).to(product_dtype)
        factors = work.dropout_factors(tile)
        grad_rows = grad_output.read(pairs, queries)
        dropped = weights if factors is None else weights * factors
        grad_value.add_product(pairs, keys, dropped.transpose(1, 2), grad_rows, first)
        grad_energy = work.buffer(1, tile, product_dtype)
        torch.bmm(grad_rows, work.value.read(pairs, keys).transpose(1, 2), out=grad_energy)
        if factors is not None:
            grad_energy.mul_(factors)
        # weights * (grad - the mean of grad under the weights), safe in place: rows are read before they are written
        torch.ops.aten._softmax_backward_data.out(grad_energy, weights, -1, product_dtype, grad_input=grad_energy)
        if work.query is not None and work.key is not None and grad_query is not None and grad_key is not None:
            grad_query.write_product(pairs, queries, grad_energy, work.key.read(pairs, keys))
            query_rows = work.query.read(pairs, queries)
            grad_key.add_product(pairs, keys, grad_energy.transpose(1, 2), query_rows, first)
        if product_dtype != dtype and (grad_key_energy is not None or any(g is not None for g in grad_along)):
            grad_energy = work.buffer(0, tile, dtype).copy_(grad_energy)  # converted once, not in each of the sums
        by_axis = work.by_axis(grad_energy, tile)
        for axis, grad_of_axis in enumerate(grad_along):
            if grad_of_axis is not None:
                part = grad_of_axis[pairs, queries[0], queries[1], keys[axis]]
                part.copy_(by_axis.sum(dim=3 - axis, dtype=dtype).view(part.shape))
        if grad_key_energy is not None:
            grad_key_energy[pairs, keys[0], keys[1]] += by_axis.sum(dim=1, dtype=dtype)
    by_feature = [
        None if g is None else g.tensor.to(value.dtype) if features_last else _features_first(g.tensor, value.dtype)
        for g in (grad_query, grad_key, grad_value)
    ]
    others = [None if grad_key_energy is None else grad_key_energy.flatten(1), *grad_along]
    gradients = (*by_feature[:2], *others, by_feature[2])
    inputs = (query, key, key_energy, along_y, along_x, value)
    return [g.view(i.shape).to(i.dtype) for g, i in zip(gradients, inputs, strict=True) if g is not None is not i]


# The same as registered operators, for tracing: torch.compile, and fake tensors.
tiled_attention = torch.library.custom_op("lightning_attn::tiled_attention", _forward, mutates_args=())
_tiled_attention_backward = torch.library.custom_op(
    "lightning_attn::tiled_attention_backward", _gradients, mutates_args=()
)


@tiled_attention.register_fake
def _(
    query: Tensor | None,
    key: Tensor | None,
    key_energy: Tensor | None,
    along_y: Tensor | None,
    along_x: Tensor | None,
    value: Tensor,
    padding: Tensor | None,
    attention_mask: Tensor | None,
    query_sizes: Sequence[int],
    key_sizes: Sequence[int],
    stride: int,
    causal: bool,
    window: Sequence[int] | None,
    dropout: float,
    seed: Tensor | None,
    features_last: bool,
    threads: int,
    save_weights: bool,
) -> tuple[Tensor, Tensor]:
    count = 0
    if save_weights:
        layout = _layout(query_sizes, key_sizes, stride, causal, window)
        count = sum(math.prod(tile.shape) for tile in cut(layout, value.shape[0] * value.shape[1], threads))
    dtype = value.dtype if multiplies_fast_in_half(value) or count == 0 else computation_dtype(value)
    return _empty_output(value, query_sizes, features_last), value.new_empty(count, dtype=dtype)


@_tiled_attention_backward.register_fake
def _(grad: Tensor, saved_weights: Tensor, *inputs: Any) -> list[Tensor]:
    query, key, key_energy, along_y, along_x, value = inputs[:6]
    by_feature = [None if t is None else _empty(t, inputs[-2], t.dtype) for t in (query, key, value)]
    others = [
        None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t in (key_energy, along_y, along_x)
    ]
    return [t for t in (*by_feature[:2], *others, by_feature[2]) if t is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    inputs = inputs[:-1]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *(i for i in inputs if isinstance(i, Tensor)))
    ctx.inputs = [None if isinstance(i, Tensor) else i for i in inputs]
    ctx.is_tensor = [isinstance(i, Tensor) for i in inputs]


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * (len(ctx.inputs) + 1)
    saved_weights, *saved = ctx.saved_tensors
    tensors = iter(saved)
    inputs = [next(tensors) if is_tensor else i for is_tensor, i in zip(ctx.is_tensor, ctx.inputs, strict=True)]
    if torch.is_grad_enabled() or is_transformed(grad):
        gradients = iter(_differentiable_gradients(grad, inputs))
    else:
        compute = _gradients if _is_plain_tensor(grad) else _tiled_attention_backward
        gradients = iter(compute(grad, saved_weights, *inputs))
    return (*[next(gradients) if is_tensor else None for is_tensor in ctx.is_tensor[:6]], *[None] * (len(inputs) - 5))


tiled_attention.register_autograd(_backward, setup_context=_save)


class _TiledAttention(torch.autograd.Function):
    """The operator in eager mode, without the overhead of torch's operator registry, which small inputs would feel."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        return _backward(ctx, grad, _)


def _is_plain_tensor(tensor: Tensor) -> bool:
    """Whether operations on a tensor run eagerly and are not traced."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _differentiable_gradients(grad: Tensor, inputs: list[Any]) -> list[Tensor]:
    """The gradients of `_tiled_attention_backward`, computed so that they can be differentiated again."""
    with torch.enable_grad():
        # Views, so that autograd.grad stops here, while second derivatives flow through them to the inputs.
        tensors: list[Any] = [t.view_as(t) if isinstance(t, Tensor) and t.requires_grad else t for t in inputs[:6]]
        output = dense_attention(*tensors, *inputs[6:-1])
        needed = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
        found = iter(torch.autograd.grad(output, needed, grad, create_graph=True, allow_unused=True))
        return [next(found) if t.requires_grad else torch.zeros_like(t) for t in tensors if isinstance(t, Tensor)]


def dense_attention(
    query: Tensor | None,
    key: Tensor | None,
    key_energy: Tensor | None,
    along_y: Tensor | None,
    along_x: Tensor | None,
    value: Tensor,
    padding: Tensor | None,
    attention_mask: Tensor | None,
    query_sizes: Sequence[int],
    key_sizes: Sequence[int],
    stride: int,
    causal: bool,
    window: Sequence[int] | None,
    dropout: float,
    seed: Tensor | None,
    features_last: bool,
) -> Tensor:
    """`tiled_attention` with all weights in memory at once, in plain torch operations."""
    layout, dtype = _layout(query_sizes, key_sizes, stride, causal, window), computation_dtype(value)
    batch, heads = value.shape[:2]
    energy: Tensor | None = None
    if query is not None and key is not None:
        energy = query.to(dtype) @ key.to(dtype).transpose(2, 3)
    parts = [None if key_energy is None else key_energy.to(dtype).unsqueeze(2)]
    grids = [
        None if along is None else along.to(dtype).flatten(2, 3).unsqueeze(4 - axis)
        for axis, along in enumerate((along_y, along_x))
    ]
    both = [grid.expand(-1, -1, -1, *layout.key_sizes).flatten(3) for grid in grids if grid is not None]
    for part in (*parts, *both):
        if part is not None:
            energy = part if energy is None else energy + part
    assert energy is not None, "at least one energy is given"
    energy = energy.expand(-1, -1, layout.num_queries, -1)
    hidden = None
    if layout.masked:
        hidden = layout.hidden_from(torch.arange(layout.num_queries, device=value.device))
    for mask in (None if padding is None else padding[:, None, None], attention_mask):
        if mask is not None:
            hidden = mask if hidden is None else hidden | mask
    weights = masked_softmax(energy, hidden)
    if seed is not None and dropout > 0:
        rows = torch.arange(batch * heads * layout.num_queries, device=value.device)
        weights = weights * dropout_factors(
            seed, dropout, dtype, rows.view(batch, heads, layout.num_queries), layout.num_keys
        )
    return torch.matmul(weights, value.to(dtype)).to(value.dtype)


def _threads(value: Tensor) -> int:
    return _torch_threads() if value.device.type == "cpu" else 1


@constant_when_compiled
def _torch_threads() -> int:
    return torch.get_num_threads()


def _layout(
    query_sizes: Sequence[int], key_sizes: Sequence[int], stride: int, causal: bool, window: Sequence[int] | None
) -> Layout:
    (rows, columns), (key_rows, key_columns) = query_sizes, key_sizes
    return Layout(
        (rows, columns), (key_rows, key_columns), stride, causal, None if window is None else (window[0], window[1])
    )


def _empty_output(value: Tensor, query_sizes: Sequence[int], features_last: bool) -> Tensor:
    """`[B, M, N_q, d]`, uninitialised."""
    batch, heads, _, width = value.shape
    return _empty(value, features_last, value.dtype, (batch, heads, query_sizes[0] * query_sizes[1], width))


def _features_first(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in which the positions of a feature are contiguous."""
    return _empty(tensor, False, dtype).copy_(tensor)


def _empty(like: Tensor, features_last: bool, dtype: torch.dtype, shape: Sequence[int] | None = None) -> Tensor:
    """Uninitialised memory of this shape, `[B, M, N, d]`; its last two dimensions are transposed without the flag."""
    batch, heads, positions, width = like.shape if shape is None else shape
    if features_last:
        return like.new_empty(batch, heads, positions, width, dtype=dtype)
    return like.new_empty(batch, heads, width, positions, dtype=dtype).transpose(2, 3)

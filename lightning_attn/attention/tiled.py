"""Softmax attention tile by tile: exact, with memory that grows with the number of queries, not with its square.

A tile is a rectangle of queries together with the rectangle of keys that they can see. The weights of a tile live in
two buffers that stay in cache; the backward pass makes them again. Layouts: M heads, B samples, N_q queries, N_k keys,
d features of a head. Queries and keys lie on grids `(rows, columns)`, flattened row by row; a sentence is a grid of one
row. Whatever memory layout the inputs have is kept: maps come with their features outermost, sentences innermost.

The two operators are registered with `torch.library`, so that `torch.compile` takes each as one node.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_attn.attention.positions import computation_dtype
from lightning_attn.attention.threads import run_pieces

# Weights of a tile of one head. Smaller tiles would stay in a core's second-level cache, but between short operations
# threads wait for the interpreter; measured best between 512 and 1024 thousand.
TILE_ELEMENTS = 768 * 1024
# Weights of a tile of several heads or samples, which all cores work on together.
SHARED_TILE_ELEMENTS = 1024 * 1024
# Fewer query rows than this make the matrix products slow, so that a map of very many keys gets a larger tile.
MIN_TILE_QUERIES = 64
# Edge of a square tile of queries in a window of n_k keys: large enough for matrix products, and the keys of a tile,
# (edge + n_k - 1)^2, stay within a small multiple of n_k^2.
MIN_WINDOW_TILE = 8


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where queries and keys lie, and which keys a query may see.

    Attributes:
        query_sizes: Rows and columns of the grid of queries.
        key_sizes: Rows and columns of the grid of keys.
        stride: Distance between neighbouring keys, in queries.
        causal: Hide the keys that come after the query in reading order.
        window: Odd n_k; hide the keys farther than n_k // 2 along any axis.
    """

    query_sizes: tuple[int, int]
    key_sizes: tuple[int, int]
    stride: int
    causal: bool = False
    window: int | None = None

    @property
    def num_queries(self) -> int:
        """N_q."""
        return self.query_sizes[0] * self.query_sizes[1]

    @property
    def num_keys(self) -> int:
        """N_k."""
        return self.key_sizes[0] * self.key_sizes[1]

    @property
    def masked(self) -> bool:
        """Whether a key may be hidden from one query and seen by another."""
        return self.causal or self.window is not None

    def hidden(self, tile: "Tile", device: torch.device) -> Tensor | None:
        """True where a key of the tile is hidden from a query of it, `[t_y, t_x, k_y, k_x]`; None if all are seen."""
        if not self.masked:
            return None
        query_y, query_x, key_y, key_x = (
            torch.arange(span.start, span.stop, device=device) for span in (*tile.queries, *tile.keys)
        )
        return self._hidden(query_y[:, None, None, None], query_x[None, :, None, None], key_y[:, None], key_x)

    def hidden_from(self, queries: Tensor) -> Tensor:
        """True where a key is hidden from a query, `[queries, N_k]`, for queries by number."""
        keys = torch.arange(self.num_keys, device=queries.device)
        query_y, query_x = (part.unsqueeze(1) for part in divided(queries, self.query_sizes[1]))
        hidden = self._hidden(query_y, query_x, *divided(keys, max(1, self.key_sizes[1])))
        return hidden.expand(queries.shape[0], self.num_keys)

    def _hidden(self, query_y: Tensor, query_x: Tensor, key_y: Tensor, key_x: Tensor) -> Tensor:
        key_y, key_x = key_y * self.stride, key_x * self.stride
        hidden = torch.zeros((), dtype=torch.bool, device=query_y.device)
        if self.causal:
            hidden = hidden | (key_y > query_y) | ((key_y == query_y) & (key_x > query_x))
        if self.window is not None:
            reach = self.window // 2
            hidden = hidden | ((key_y - query_y).abs() > reach) | ((key_x - query_x).abs() > reach)
        return hidden

    def tiles(self, num_heads: int, batch_size: int) -> "list[list[Tile]]":
        """Tiles that cover all queries, each with the keys it can see: one list for each group of heads."""
        rows, columns = self.query_sizes
        if self.window is not None and self.window < max(self.key_sizes) * self.stride:
            edge = max(MIN_WINDOW_TILE, self.window // 2)
            height = min(rows, edge)
            width = min(columns, edge if rows > 1 else 4 * edge)
        else:
            queries = max(MIN_TILE_QUERIES, TILE_ELEMENTS // max(1, self.num_keys))
            height, width = min(rows, max(1, queries // max(1, columns))), min(columns, queries)
        height, width = _even(rows, height), _even(columns, width)
        parts = []
        for y in range(0, rows, height):
            for x in range(0, columns, width):
                queries_seen = (slice(y, min(y + height, rows)), slice(x, min(x + width, columns)))
                parts.append((queries_seen, self._seen(queries_seen)))
        largest = max((_count(queries) * _count(keys) for queries, keys in parts), default=0)
        heads = num_heads if 2 * largest * num_heads <= SHARED_TILE_ELEMENTS else 1
        samples = max(1, (TILE_ELEMENTS if heads == 1 else SHARED_TILE_ELEMENTS) // max(1, heads * largest))
        tiles: list[list[Tile]] = []
        for head in range(0, num_heads, heads):
            tiles.append([])
            for b in range(0, batch_size, samples):
                for queries_seen, keys in parts:
                    number = (head * batch_size + b) * len(parts) + len(tiles[-1])
                    span = slice(b, min(b + samples, batch_size))
                    tiles[-1].append(Tile(number, slice(head, head + heads), span, queries_seen, keys))
        return tiles

    def _seen(self, queries: tuple[slice, slice]) -> tuple[slice, slice]:
        """The smallest rectangle that holds every key seen by a query of these rows and columns."""
        seen = []
        for axis, (span, size) in enumerate(zip(queries, self.key_sizes, strict=True)):
            lowest, highest = 0, (size - 1) * self.stride
            if self.window is not None:
                lowest = max(lowest, span.start - self.window // 2)
                highest = min(highest, span.stop - 1 + self.window // 2)
            if self.causal and (axis == 0 or self.query_sizes[0] == self.key_sizes[0] == 1):
                highest = min(highest, span.stop - 1)
            start = -(-lowest // self.stride)
            seen.append(slice(start, max(start, highest // self.stride + 1)))
        return seen[0], seen[1]


def divided(numbers: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Row and column of places by number, in rows of `width`; no `%`, which ONNX lacks for a width not known yet."""
    rows = numbers // width
    return rows, numbers - rows * width


def _count(spans: tuple[slice, slice]) -> int:
    """Number of elements of a rectangle."""
    rows, columns = (len(range(span.start, span.stop)) for span in spans)
    return rows * columns


def _even(total: int, part: int) -> int:
    """The size that splits `total` into as many parts as `part` does, but of nearly the same size."""
    return max(1, -(-total // max(1, -(-total // max(1, part)))))


@dataclasses.dataclass(frozen=True)
class Tile:
    """A rectangle of queries and the rectangle of keys they see, for some heads and samples.

    Attributes:
        number: Different for every tile.
        heads: Which heads.
        samples: Which samples.
        queries: Which rows and columns of the grid of queries.
        keys: Which rows and columns of the grid of keys.
    """

    number: int
    heads: slice
    samples: slice
    queries: tuple[slice, slice]
    keys: tuple[slice, slice]

    @functools.cached_property
    def single(self) -> bool:
        """Whether it belongs to one head and one sample; its matrices then have two dimensions."""
        return self.shape[:2] == (1, 1)

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """Heads, samples, rows and columns of the queries, rows and columns of the keys."""
        spans = (self.heads, self.samples, *self.queries, *self.keys)
        heads, samples, height, width, key_height, key_width = (span.stop - span.start for span in spans)
        return heads, samples, height, width, key_height, key_width


def _matmul(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Product of two matrices, or of two batches of matrices."""
    return torch.mm(left, right, out=out) if left.dim() == 2 else torch.bmm(left, right, out=out)


def is_shared(position_query: Tensor) -> bool:
    """Whether a position query `[M, 1, 1, d]` stands for all queries, as v of E4 alone does."""
    return tuple(position_query.shape[1:3]) == (1, 1)


class _Grid:
    """A tensor `[M, B, N, d]` cut into tiles, in whatever memory layout it has.

    Tiles are cut with as few operations as possible: between two threads that each run many short operations, every
    call into torch is a chance to wait for the interpreter.
    """

    def __init__(self, tensor: Tensor, sizes: tuple[int, int]) -> None:
        self.flat = tensor
        self.grid = torch.unflatten(tensor, 2, sizes)
        self.sizes = sizes

    @functools.cached_property
    def matrices(self) -> list[tuple[Tensor, ...]]:
        """`[N, d]` by head and sample, for single tiles."""
        return [head.unbind() for head in self.flat.unbind()]

    def _view(self, tile: Tile, spans: tuple[slice, slice]) -> Tensor | None:
        """`[n, d]` of a single tile whose rows lie together in memory, which can be written to; None of others."""
        if not tile.single:
            return None
        rows, columns = spans
        width = self.sizes[1]
        if columns.stop - columns.start == width:
            first, last = rows.start * width, rows.stop * width
        elif self.sizes[0] == 1:
            first, last = columns.start, columns.stop
        else:
            return None
        matrix: Tensor = self.matrices[tile.heads.start][tile.samples.start]
        return matrix[first:last]

    def _part(self, tile: Tile, spans: tuple[slice, slice]) -> Tensor:
        """`[m, b, rows, columns, d]`, a view."""
        return self.grid[tile.heads, tile.samples, spans[0], spans[1]]

    def _read(self, tile: Tile, spans: tuple[slice, slice]) -> Tensor:
        """`[n, d]` of a single tile, else `[m * b, n, d]`."""
        matrix = self._view(tile, spans)
        if matrix is None:
            part = self._part(tile, spans)
            matrix = part[0, 0].flatten(0, 1) if tile.single else part.flatten(2, 3).flatten(0, 1)
        return matrix

    def queries(self, tile: Tile) -> Tensor:
        """Matrices of the queries of a tile, to read."""
        return self._read(tile, tile.queries)

    def queries_by_head(self, tile: Tile) -> Tensor:
        """The same with the queries of all samples in one matrix for each head, `[m, b * n, d]`."""
        return self._read(tile, tile.queries) if tile.single else self._part(tile, tile.queries).flatten(1, 3)

    def keys(self, tile: Tile) -> Tensor:
        """Matrices of the keys of a tile, to read."""
        return self._read(tile, tile.keys)

    def set_queries(self, tile: Tile, left: Tensor, right: Tensor) -> None:
        """Writes a product to the queries of a tile."""
        view = self._view(tile, tile.queries)
        if view is not None:
            torch.mm(left, right, out=view)
        else:
            part = self._part(tile, tile.queries)
            part.copy_(torch.matmul(left, right).view(part.shape))

    def add_to_queries(self, tile: Tile, left: Tensor, right: Tensor) -> None:
        """Adds a product, by sample or by head, to the queries of a tile."""
        self._add(tile, tile.queries, left, right)

    def add_to_keys(self, tile: Tile, left: Tensor, right: Tensor) -> None:
        """Adds a product to the keys of a tile."""
        self._add(tile, tile.keys, left, right)

    def _add(self, tile: Tile, spans: tuple[slice, slice], left: Tensor, right: Tensor) -> None:
        view = self._view(tile, spans)
        if view is not None:
            view.addmm_(left, right)
        else:
            part = self._part(tile, spans)
            part += torch.matmul(left, right).view(part.shape)


class _Buffers:
    """Scratch memory of one thread that is used again by every tile."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.memory: dict[int, Tensor] = {}
        self.views: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def take(self, number: int, shape: tuple[int, ...]) -> Tensor:
        """Memory of this shape, uninitialised when the tile begins; all shapes of a number share their memory."""
        view = self.views.get((number, shape))
        if view is None:
            size = math.prod(shape)
            if number not in self.memory or self.memory[number].numel() < size:
                self.memory[number] = self.like.new_empty(size)
                self.views = {key: old for key, old in self.views.items() if key[0] != number}
            view = self.views[number, shape] = self.memory[number][:size].view(shape)
        return view


class _Axis:
    """The energies of E2 + E4 along one axis: position queries against the projected encodings of all offsets.

    Column c of the table belongs to the offset `c - (queries along the axis - 1)`, counted from the first query.

    Args:
        query: `[M, B, N_q, d]`, or `[M, 1, 1, d]` where the position energy is the same for every query (E4 alone).
        table: `[M, d, offsets]`.
        axis: 0 for rows (y), 1 for columns (x).
        layout: The grids.
    """

    def __init__(self, query: Tensor, table: Tensor, axis: int, layout: Layout) -> None:
        self.shared = is_shared(query)
        self.query, self.table, self.axis, self.layout = query, table, axis, layout
        self.grid = None if self.shared else _Grid(query, layout.query_sizes)
        self._tables: dict[tuple[int, int, int], Tensor] = {}

    def _columns(self, tile: Tile) -> tuple[int, int]:
        """The columns of the table that the tile needs."""
        queries, keys = tile.queries[self.axis], tile.keys[self.axis]
        stride, last = self.layout.stride, self.layout.query_sizes[self.axis] - 1
        return keys.start * stride - (queries.stop - 1) + last, (keys.stop - 1) * stride - queries.start + last + 1

    def _operands(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Queries and encodings of their offsets: `[rows, d]` and `[d, columns]` of a single tile, else by head."""
        start, stop = self._columns(tile)
        if tile.single:
            head = tile.heads.start
            table = self._tables.get((head, start, stop))
            if table is None:
                table = self._tables[head, start, stop] = self.table[head, :, start:stop]
        else:
            table = self.table[tile.heads, :, start:stop]
        if self.grid is not None:
            return self.grid.queries_by_head(tile), table
        rows = tile.shape[2 + self.axis]
        query = self.query[tile.heads, 0]
        return (query[0].expand(rows, -1) if tile.single else query.expand(-1, rows, -1)), table

    def _skewed(self, by_offset: Tensor, tile: Tile) -> Tensor:
        """Energies by offset seen by key, `[m, b, t_y, t_x, k_y, k_x]`, repeated where they do not differ: a view."""
        samples, height, width = tile.shape[1:4]
        columns = by_offset.shape[-1]
        if self.shared:
            strides = [tile.shape[2 + self.axis] * columns, 0, 0, 0, 0, 0]
            strides[2 + self.axis] = columns
        else:
            strides = [samples * height * width * columns, height * width * columns, width * columns, columns, 0, 0]
        strides[2 + self.axis] -= 1  # the next query finds the same key one column earlier
        strides[4 + self.axis] = self.layout.stride
        return by_offset.as_strided(tile.shape, strides, by_offset.storage_offset() + tile.shape[2 + self.axis] - 1)

    def energy(self, tile: Tile, buffers: _Buffers) -> Tensor:
        """`[m, b, t_y, t_x, k_y, k_x]`, the same for all keys that differ along the other axis only."""
        query, table = self._operands(tile)
        by_offset = buffers.take(2 + self.axis, (*query.shape[:-1], table.shape[-1]))
        return self._skewed(_matmul(query, table, out=by_offset), tile)

    def backward(
        self, tile: Tile, grad: Tensor, grad_query: Tensor | _Grid, grad_table: Tensor, buffers: _Buffers
    ) -> None:
        """Adds the gradients of queries and table; `grad` is that of `energy`, summed over the other axis of keys."""
        query, table = self._operands(tile)
        if self.shared:
            grad = grad.sum(dim=(1, 3 - self.axis), keepdim=True)
        by_offset = buffers.take(2 + self.axis, (*query.shape[:-1], table.shape[-1])).zero_()
        skewed = self._skewed(by_offset, tile).select(5 - self.axis, 0)
        if self.shared:
            skewed = skewed.narrow(1, 0, 1).narrow(3 - self.axis, 0, 1)
        skewed.copy_(grad)
        start, stop = self._columns(tile)
        if tile.single:
            grad_table[tile.heads.start, :, start:stop].addmm_(query.transpose(0, 1), by_offset)
        else:
            grad_table[tile.heads, :, start:stop] += torch.bmm(query.transpose(1, 2), by_offset)
        if isinstance(grad_query, _Grid):
            grad_query.add_to_queries(tile, by_offset, table.transpose(-1, -2))
        else:
            by_row = torch.matmul(by_offset, table.transpose(-1, -2))
            grad_query[tile.heads] += by_row.sum(dim=-2).view(-1, 1, 1, table.shape[-2])


class _Position:
    """E2 + E4 as a sum over axes: none without these terms, one axis in a sentence, two in a map."""

    def __init__(self, query: Tensor | None, table_y: Tensor | None, table_x: Tensor | None, layout: Layout) -> None:
        self.query, self.layout = query, layout
        tables = enumerate((table_y, table_x))
        self.axes = [_Axis(query, t, axis, layout) for axis, t in tables if query is not None and t is not None]
        self.grad_query: Tensor | None = None
        self.grad_parts: Tensor | _Grid | None = None  # the same memory, as the axes write to it
        self.grad_tables: list[Tensor] = []

    def energies(self, tile: Tile, buffers: _Buffers) -> list[Tensor]:
        """For each axis, rows first, `[m, b, t_y, t_x, k_y, k_x]`, in buffers 2 and 3."""
        return [axis.energy(tile, buffers) for axis in self.axes]

    def start_backward(self) -> None:
        """Makes the gradients that `backward` adds to."""
        if self.query is not None:
            self.grad_query = torch.zeros_like(self.query)
            shared = is_shared(self.query)
            self.grad_parts = self.grad_query if shared else _Grid(self.grad_query, self.layout.query_sizes)
        self.grad_tables = [torch.zeros_like(axis.table, memory_format=torch.contiguous_format) for axis in self.axes]

    def backward(self, tile: Tile, grads: list[Tensor], buffers: _Buffers) -> None:
        """Adds what one tile gives: for each axis the gradient of its energy, `[m, b, t_y, t_x, keys along it]`."""
        if self.grad_parts is None:
            return
        for axis, grad_table, grad in zip(self.axes, self.grad_tables, grads, strict=True):
            axis.backward(tile, grad, self.grad_parts, grad_table, buffers)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of `(position_query, table_y, table_x)`."""
        by_axis = {axis.axis: grad for axis, grad in zip(self.axes, self.grad_tables, strict=True)}
        return self.grad_query, by_axis.get(0), by_axis.get(1)


@dataclasses.dataclass(frozen=True)
class _Softmax:
    """The weights of Eq. 8, a tile at a time. Fields as in `tiled_attention`, in the dtype of the computation."""

    content_query: _Grid | None
    key: _Grid | None
    key_energy: _Grid | None
    position: _Position
    padding: Tensor | None
    layout: Layout
    dropout: float
    seed: int

    def weights(self, tile: Tile, buffers: _Buffers) -> Tensor:
        """`[m * b, t, k]`, or `[t, k]` of a single tile, in buffer 1; buffer 0 is free afterwards."""
        shape = _matrix_shape(tile)
        energy, grid = buffers.take(0, shape), buffers.take(0, tile.shape)
        parts = self.position.energies(tile, buffers)
        if self.key_energy is not None:
            key_energy = self.key_energy.keys(tile)
            parts.append(key_energy.view(*tile.shape[:2], 1, 1, *tile.shape[4:]))
        if len(parts) > 1:
            torch.add(parts[0], parts[1], out=grid)
        elif parts:
            grid.copy_(parts[0])
        for part in parts[2:]:
            grid.add_(part)
        if self.content_query is not None and self.key is not None:
            query, key = self.content_query.queries(tile), self.key.keys(tile).transpose(-1, -2)
            if not parts:
                _matmul(query, key, out=energy)
            elif tile.single:
                energy.addmm_(query, key)
            else:
                energy.baddbmm_(query, key)
        hidden = self.layout.hidden(tile, energy.device)
        if self.padding is not None:
            padding = self.padding[tile.samples, None, None, tile.keys[0], tile.keys[1]]
            hidden = padding if hidden is None else hidden | padding
        if hidden is not None:
            # The most negative finite number: -inf would make a row that is hidden whole NaN.
            grid.masked_fill_(hidden, torch.finfo(energy.dtype).min)
        weights = torch.softmax(energy, dim=-1, out=buffers.take(1, shape))
        if hidden is not None:
            blind = hidden.flatten(-2).all(dim=-1)
            if bool(blind.any()):
                buffers.take(1, tile.shape).masked_fill_(blind[..., None, None], 0.0)
        return weights

    def kept(self, tile: Tile, like: Tensor) -> Tensor | None:
        """Factors of dropout for the weights of a tile, the same in both passes; None without dropout."""
        if self.dropout == 0.0:
            return None
        generator = torch.Generator(like.device).manual_seed(self.seed + tile.number)
        kept = torch.rand(like.shape, generator=generator, device=like.device) >= self.dropout
        return kept.to(like.dtype).div_(1 - self.dropout)


def _matrix_shape(tile: Tile) -> tuple[int, ...]:
    heads, samples, height, width, key_height, key_width = tile.shape
    shape = (height * width, key_height * key_width)
    return shape if tile.single else (heads * samples, *shape)


def _prepare(
    content_query: Tensor | None,
    key: Tensor | None,
    key_energy: Tensor | None,
    position_query: Tensor | None,
    table_y: Tensor | None,
    table_x: Tensor | None,
    value: Tensor,
    padding: Tensor | None,
    layout: Layout,
    dropout: float,
    seed: Tensor | None,
) -> tuple[_Softmax, Tensor]:
    """Everything in the dtype of the computation, and nothing but numbers in the padding."""
    dtype = computation_dtype(value)
    hidden = None if padding is None else padding[None, :, :, None]

    def cast(tensor: Tensor, hide: bool = False) -> Tensor:
        tensor = tensor.to(dtype)
        return tensor.masked_fill(hidden, 0.0) if hide and hidden is not None else tensor

    position = _Position(
        None if position_query is None else cast(position_query),
        None if table_y is None else cast(table_y),
        None if table_x is None else cast(table_x),
        layout,
    )
    value = cast(value, hide=True)
    softmax = _Softmax(
        content_query=None if content_query is None else _Grid(cast(content_query), layout.query_sizes),
        key=None if key is None else _Grid(cast(key, hide=True), layout.key_sizes),
        key_energy=None if key_energy is None else _Grid(cast(key_energy).unsqueeze(-1), layout.key_sizes),
        position=position,
        padding=None if padding is None else torch.unflatten(padding, 1, layout.key_sizes),
        layout=layout,
        dropout=dropout,
        seed=0 if seed is None else int(seed),
    )
    return softmax, value


@torch.library.custom_op("lightning_attn::tiled_attention", mutates_args=())
def tiled_attention(
    content_query: Tensor | None,
    key: Tensor | None,
    key_energy: Tensor | None,
    position_query: Tensor | None,
    table_y: Tensor | None,
    table_x: Tensor | None,
    value: Tensor,
    padding: Tensor | None,
    query_sizes: Sequence[int],
    key_sizes: Sequence[int],
    stride: int,
    causal: bool,
    window: int | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """Weighted sums of values with the weights of Eq. 8, for any of the energies.

    Energies and sums are computed in float32, or float64 for float64 values.

    Args:
        content_query: U z_q (+ u) for E1 (+ E3), `[M, B, N_q, d]`.
        key: V^C x_k, `[M, B, N_k, d]`, with `content_query`.
        key_energy: E3 without E1, `[M, B, N_k]`.
        position_query: U z_q (+ v) for E2 (+ E4), `[M, B, N_q, d]`; `[M, 1, 1, d]` for E4 alone.
        table_y: V^R R for the offsets along y, `[M, d, rows + (key rows - 1) * stride]`, from 1 - rows upwards.
        table_x: The same along x, or along a sentence.
        value: W' x_k, `[M, B, N_k, d]`.
        padding: True where a key is padding, `[B, N_k]`.
        query_sizes: Rows and columns, see `Layout`; so are the next four.
        key_sizes: See `Layout`.
        stride: See `Layout`.
        causal: See `Layout`.
        window: See `Layout`.
        dropout: Probability of dropping a weight.
        seed: With dropout, a number that decides which are dropped, an integer tensor without dimensions.

    Returns:
        `[M, B, N_q, d]` in the dtype of `value`; zeros for a query that sees no key.
    """
    layout = _layout(query_sizes, key_sizes, stride, causal, window)
    softmax, values = _prepare(
        content_query, key, key_energy, position_query, table_y, table_x, value, padding, layout, dropout, seed
    )
    grid = _Grid(values, layout.key_sizes)
    output = _empty_output(values, content_query, layout.query_sizes)
    output_grid = _Grid(output, layout.query_sizes)

    def work(tiles: list[Tile], buffers: _Buffers) -> None:
        for tile in tiles:
            if 0 in tile.shape:
                output_grid.grid[tile.heads, tile.samples, tile.queries[0], tile.queries[1]] = 0.0
                continue
            weights = softmax.weights(tile, buffers)
            kept = softmax.kept(tile, weights)
            if kept is not None:
                weights.mul_(kept)
            output_grid.set_queries(tile, weights, grid.keys(tile))

    run_pieces(work, layout.tiles(*value.shape[:2]), lambda: _Buffers(values), value.device)
    return output.to(value.dtype)


@torch.library.custom_op("lightning_attn::tiled_attention_backward", mutates_args=())
def _tiled_attention_backward(
    grad: Tensor,
    content_query: Tensor | None,
    key: Tensor | None,
    key_energy: Tensor | None,
    position_query: Tensor | None,
    table_y: Tensor | None,
    table_x: Tensor | None,
    value: Tensor,
    padding: Tensor | None,
    query_sizes: Sequence[int],
    key_sizes: Sequence[int],
    stride: int,
    causal: bool,
    window: int | None,
    dropout: float,
    seed: Tensor | None,
) -> list[Tensor]:
    """Gradients of those that are tensors among content_query ... value, in that order."""
    layout = _layout(query_sizes, key_sizes, stride, causal, window)
    softmax, values = _prepare(
        content_query, key, key_energy, position_query, table_y, table_x, value, padding, layout, dropout, seed
    )
    position = softmax.position
    position.start_backward()
    value_grid = _Grid(values, layout.key_sizes)
    grad_grid = _Grid(grad.to(values.dtype), layout.query_sizes)
    grad_value = _Grid(torch.zeros_like(values), layout.key_sizes)
    query, keys = softmax.content_query, softmax.key
    grad_query = None if query is None else _Grid(torch.zeros_like(query.flat), layout.query_sizes)
    grad_key = None if keys is None else _Grid(torch.zeros_like(keys.flat), layout.key_sizes)
    grad_key_energy = None if key_energy is None else values.new_zeros(*key_energy.shape[:2], *layout.key_sizes)

    def work(tiles: list[Tile], buffers: _Buffers) -> None:
        for tile in tiles:
            if 0 in tile.shape:
                continue
            weights = softmax.weights(tile, buffers)
            kept = softmax.kept(tile, weights)
            grad_rows = grad_grid.queries(tile)
            dropped = weights if kept is None else weights * kept
            grad_value.add_to_keys(tile, dropped.transpose(-1, -2), grad_rows)
            grad_energy = buffers.take(0, _matrix_shape(tile))
            _matmul(grad_rows, value_grid.keys(tile).transpose(-1, -2), out=grad_energy)
            if kept is not None:
                grad_energy.mul_(kept)
            # weights * (grad - the mean of grad under the weights), in place: rows are read before they are written
            torch.ops.aten._softmax_backward_data.out(
                grad_energy, weights, -1, grad_energy.dtype, grad_input=grad_energy
            )
            if query is not None and keys is not None and grad_query is not None and grad_key is not None:
                grad_query.set_queries(tile, grad_energy, keys.keys(tile))
                grad_key.add_to_keys(tile, grad_energy.transpose(-1, -2), query.queries(tile))
            grad_grid_energy = buffers.take(0, tile.shape)
            position.backward(tile, [grad_grid_energy.sum(dim=5 - axis.axis) for axis in position.axes], buffers)
            if grad_key_energy is not None:
                part = grad_key_energy[tile.heads, tile.samples, tile.keys[0], tile.keys[1]]
                part += grad_grid_energy.sum(dim=(2, 3))

    run_pieces(work, layout.tiles(*value.shape[:2]), lambda: _Buffers(values), value.device)
    gradients = [
        None if grad_query is None else grad_query.flat,
        None if grad_key is None else grad_key.flat,
        None if grad_key_energy is None else grad_key_energy.flatten(2),
        *position.gradients(),
        grad_value.flat,
    ]
    inputs = (content_query, key, key_energy, position_query, table_y, table_x, value)
    return [g.to(i.dtype) for g, i in zip(gradients, inputs, strict=True) if g is not None and i is not None]


@tiled_attention.register_fake
def _(
    content_query: Tensor | None,
    key: Tensor | None,
    key_energy: Tensor | None,
    position_query: Tensor | None,
    table_y: Tensor | None,
    table_x: Tensor | None,
    value: Tensor,
    padding: Tensor | None,
    query_sizes: Sequence[int],
    *_: Any,
) -> Tensor:
    return _empty_output(value, content_query, query_sizes)


@_tiled_attention_backward.register_fake
def _(grad: Tensor, *inputs: Any) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in inputs[:7] if tensor is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(i for i in inputs if isinstance(i, Tensor)))
    ctx.inputs = [None if isinstance(i, Tensor) else i for i in inputs]
    ctx.is_tensor = [isinstance(i, Tensor) for i in inputs]


def _saved(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if t else i for t, i in zip(ctx.is_tensor, ctx.inputs, strict=True)]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    inputs = _saved(ctx)
    gradients = iter(_tiled_attention_backward(grad, *inputs))
    differentiable = [next(gradients) if is_tensor else None for is_tensor in ctx.is_tensor[:7]]
    return (*differentiable, *[None] * (len(inputs) - 7))


tiled_attention.register_autograd(_backward, setup_context=_save)


@dataclasses.dataclass(frozen=True)
class _Factors:
    """Weights that are a product of one softmax along each axis: E2 (+ E4) of a map, without content of the keys."""

    position: _Position
    layout: Layout

    def along(self, tile: Tile, buffers: _Buffers) -> list[Tensor]:
        """The softmax along y, `[m, b, t_y, t_x, k_y, 1]`, and along x, `[m, b, t_y, t_x, 1, k_x]`."""
        y, x = self.position.energies(tile, buffers)
        return [torch.softmax(y.narrow(5, 0, 1), dim=4), torch.softmax(x.narrow(4, 0, 1), dim=5)]

    def product(self, tile: Tile, factors: list[Tensor], buffers: _Buffers) -> Tensor:
        """The weights `[m * b, t, k]`, or `[t, k]` of a single tile, in buffer 0."""
        torch.mul(factors[0], factors[1], out=buffers.take(0, tile.shape))
        return buffers.take(0, _matrix_shape(tile))


@torch.library.custom_op("lightning_attn::factored_sums", mutates_args=())
def factored_sums(
    position_query: Tensor,
    table_y: Tensor,
    table_x: Tensor,
    value: Tensor,
    query_sizes: Sequence[int],
    key_sizes: Sequence[int],
    stride: int,
) -> Tensor:
    """Weighted sums of values in a map, with the product of a softmax along y and one along x as weights.

    That is the softmax of E2 + E4, whose energy is a sum of one part along each axis: N_q (rows + columns) exponentials
    instead of N_q N_k. The values may have any width and weights of their own.

    Args:
        position_query: U z_q (+ v), `[M, B, N_q, d]`.
        table_y: As in `tiled_attention`, like the following.
        table_x: V^R R along x.
        value: `[M, B, N_k, w]`.
        query_sizes: See `Layout`.
        key_sizes: See `Layout`.
        stride: See `Layout`.

    Returns:
        `[M, B, N_q, w]`, float32, or float64 for float64 values.
    """
    factors, values = _prepare_factors(position_query, table_y, table_x, value, query_sizes, key_sizes, stride)
    layout = factors.layout
    grid = _Grid(values, layout.key_sizes)
    output = _empty_output(values, position_query, layout.query_sizes)
    output_grid = _Grid(output, layout.query_sizes)

    def work(tiles: list[Tile], buffers: _Buffers) -> None:
        for tile in tiles:
            weights = factors.product(tile, factors.along(tile, buffers), buffers)
            output_grid.set_queries(tile, weights, grid.keys(tile))

    run_pieces(work, layout.tiles(*value.shape[:2]), lambda: _Buffers(values), value.device)
    return output


@torch.library.custom_op("lightning_attn::factored_sums_backward", mutates_args=())
def _factored_sums_backward(
    grad: Tensor,
    position_query: Tensor,
    table_y: Tensor,
    table_x: Tensor,
    value: Tensor,
    query_sizes: Sequence[int],
    key_sizes: Sequence[int],
    stride: int,
) -> list[Tensor]:
    """Gradients of position_query, table_y, table_x and value."""
    factors, values = _prepare_factors(position_query, table_y, table_x, value, query_sizes, key_sizes, stride)
    layout, position = factors.layout, factors.position
    position.start_backward()
    value_grid, grad_grid = _Grid(values, layout.key_sizes), _Grid(grad.to(values.dtype), layout.query_sizes)
    grad_value = _Grid(torch.zeros_like(values), layout.key_sizes)

    def work(tiles: list[Tile], buffers: _Buffers) -> None:
        for tile in tiles:
            along = factors.along(tile, buffers)
            weights = factors.product(tile, along, buffers)
            grad_rows = grad_grid.queries(tile)
            grad_value.add_to_keys(tile, weights.transpose(-1, -2), grad_rows)
            grad_weights, scratch = buffers.take(1, tile.shape), buffers.take(0, tile.shape)
            _matmul(grad_rows, value_grid.keys(tile).transpose(-1, -2), out=buffers.take(1, _matrix_shape(tile)))
            grads = []
            for axis in (0, 1):
                factor = along[axis].squeeze(5 - axis)
                grad_factor = torch.mul(grad_weights, along[1 - axis], out=scratch).sum(dim=5 - axis)
                mean = (grad_factor * factor).sum(dim=-1, keepdim=True)
                grads.append(grad_factor.sub_(mean).mul_(factor))
            position.backward(tile, grads, buffers)

    run_pieces(work, layout.tiles(*value.shape[:2]), lambda: _Buffers(values), value.device)
    gradients = (*position.gradients(), grad_value.flat)
    inputs = (position_query, table_y, table_x, value)
    return [g.to(i.dtype) for g, i in zip(gradients, inputs, strict=True) if g is not None]


@factored_sums.register_fake
def _(
    position_query: Tensor, table_y: Tensor, table_x: Tensor, value: Tensor, query_sizes: Sequence[int], *_: Any
) -> Tensor:
    return _empty_output(value.to(computation_dtype(value)), position_query, query_sizes)


@_factored_sums_backward.register_fake
def _(grad: Tensor, *inputs: Any) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in inputs[:4]]


def _factored_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    inputs = _saved(ctx)
    return (*_factored_sums_backward(grad, *inputs), *[None] * (len(inputs) - 4))


factored_sums.register_autograd(_factored_backward, setup_context=_save)


def _prepare_factors(
    position_query: Tensor,
    table_y: Tensor,
    table_x: Tensor,
    value: Tensor,
    query_sizes: Sequence[int],
    key_sizes: Sequence[int],
    stride: int,
) -> tuple[_Factors, Tensor]:
    layout = _layout(query_sizes, key_sizes, stride)
    value = value.to(computation_dtype(value))
    query, table_y, table_x = (tensor.to(value.dtype) for tensor in (position_query, table_y, table_x))
    return _Factors(_Position(query, table_y, table_x, layout), layout), value


def _layout(
    query_sizes: Sequence[int],
    key_sizes: Sequence[int],
    stride: int,
    causal: bool = False,
    window: int | None = None,
) -> Layout:
    (rows, columns), (key_rows, key_columns) = query_sizes, key_sizes
    return Layout((rows, columns), (key_rows, key_columns), stride, causal, window)


def _empty_output(value: Tensor, query: Tensor | None, query_sizes: Sequence[int]) -> Tensor:
    """`[M, B, N_q, d]` in the memory layout of the queries, or of the values where there are none."""
    model = value if query is None else query
    features_inside = model.stride(-1) == 1
    heads, batch, width = value.shape[0], value.shape[1], value.shape[3]
    num_queries = query_sizes[0] * query_sizes[1]
    if features_inside:  # [B, N, M, d] in memory, as a linear layer wants a sentence
        return value.new_empty(batch, num_queries, heads, width).permute(2, 0, 1, 3)
    return value.new_empty(batch, heads, width, num_queries).permute(1, 0, 3, 2)

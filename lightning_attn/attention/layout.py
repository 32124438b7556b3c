"""Positions of queries and keys on their grids, and the masks that follow from positions alone."""

import dataclasses
import math

import torch
from torch import Tensor

Spans = tuple[slice, slice]
"""A rectangle of a grid: its rows and its columns."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The grids of queries and keys, flattened row by row, and the masks that depend on positions alone.

    A sentence is a grid of one row.

    Attributes:
        query_sizes: Rows and columns of the grid of queries.
        key_sizes: Rows and columns of the grid of keys.
        stride: Distance between neighbouring keys, in queries.
        causal: Hide the keys that come after the query in reading order.
        window: Odd `(n_y, n_x)`; hide the keys farther than n // 2 along the axis. None for all keys.
    """

    query_sizes: tuple[int, int]
    key_sizes: tuple[int, int]
    stride: int = 1
    causal: bool = False
    window: tuple[int, int] | None = None

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
        """Whether a key may be hidden from one query and visible to another."""
        return self.causal or self.window is not None

    @property
    def aligned(self) -> bool:
        """Whether key i has the position of query i, so that later keys have larger indices."""
        return self.query_sizes == self.key_sizes and self.stride == 1

    def axis(self, axis: int) -> "Layout":
        """The layout of one axis (0 for y, 1 for x), as a sentence."""
        window = None if self.window is None else (self.window[axis],) * 2
        return Layout((1, self.query_sizes[axis]), (1, self.key_sizes[axis]), self.stride, self.causal, window)

    def offsets(self, axis: int, device: torch.device) -> Tensor:
        """Key position minus query position along one axis, `[queries along it, keys along it]`."""
        queries = torch.arange(self.query_sizes[axis], device=device)
        keys = torch.arange(self.key_sizes[axis], device=device) * self.stride
        return keys - queries.unsqueeze(1)

    def offset_range(self, axis: int) -> tuple[int, int]:
        """The lowest offset along one axis, and the number of integers up to the highest."""
        queries, keys = self.query_sizes[axis], self.key_sizes[axis]
        return 1 - queries, max(0, queries + (keys - 1) * self.stride)

    def hidden(self, queries: Spans, keys: Spans, device: torch.device) -> Tensor | None:
        """True where a key is hidden from a query, `[rows, columns, key rows, key columns]`; None if all are visible.

        Args:
            queries: A rectangle of the queries.
            keys: A rectangle of the keys.
            device: Of the mask.
        """
        if not self.masked:
            return None
        query_y, query_x, key_y, key_x = (
            torch.arange(span.start, span.stop, device=device) for span in (*queries, *keys)
        )
        return self._hidden(query_y[:, None, None, None], query_x[None, :, None, None], key_y[:, None], key_x)

    def hidden_from(self, queries: Tensor) -> Tensor:
        """True where a key is hidden from a query, `[queries, N_k]`, for the indices of queries."""
        keys = torch.arange(self.num_keys, device=queries.device)
        query_y, query_x = (part.unsqueeze(1) for part in row_and_column(queries, self.query_sizes[1]))
        hidden = self._hidden(query_y, query_x, *row_and_column(keys, max(1, self.key_sizes[1])))
        return hidden.expand(queries.shape[0], self.num_keys)

    def _hidden(self, query_y: Tensor, query_x: Tensor, key_y: Tensor, key_x: Tensor) -> Tensor:
        key_y, key_x = key_y * self.stride, key_x * self.stride
        hidden = torch.zeros((), dtype=torch.bool, device=query_y.device)
        if self.causal:
            hidden = hidden | (key_y > query_y) | ((key_y == query_y) & (key_x > query_x))
        if self.window is not None:
            reach_y, reach_x = (size // 2 for size in self.window)
            hidden = hidden | ((key_y - query_y).abs() > reach_y) | ((key_x - query_x).abs() > reach_x)
        return hidden

    def visible_keys(self, queries: Spans) -> Spans:
        """The bounding rectangle of all keys that any query of a rectangle can see."""
        visible = []
        for axis, (span, size) in enumerate(zip(queries, self.key_sizes, strict=True)):
            lowest, highest = 0, (size - 1) * self.stride
            if self.window is not None:
                reach = self.window[axis] // 2
                lowest = max(lowest, span.start - reach)
                highest = min(highest, span.stop - 1 + reach)
            if self.causal and (axis == 0 or self.query_sizes[0] == self.key_sizes[0] == 1):
                highest = min(highest, span.stop - 1)
            start = -(-lowest // self.stride)
            visible.append(slice(start, max(start, highest // self.stride + 1)))
        return visible[0], visible[1]


def row_and_column(numbers: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of flattened indices; without `%`, which ONNX lacks for a symbolic width."""
    rows = numbers // width
    return rows, numbers - rows * width


def masked_softmax(energy: Tensor, hidden: Tensor | None) -> Tensor:
    """Softmax over the visible keys of the last axis; zeros, not NaN, where all are hidden.

    Args:
        energy: `[..., keys]`, finite or NaN.
        hidden: True where hidden, broadcastable to the shape of `energy`; None if all are visible.
    """
    if hidden is None:
        return torch.softmax(energy, dim=-1)
    # The most negative finite number: -inf would make a fully masked row NaN.
    weights = torch.softmax(energy.masked_fill(hidden, torch.finfo(energy.dtype).min), dim=-1)
    return weights.masked_fill(hidden, 0.0)


def size_of(spans: Spans) -> int:
    """Number of elements of a rectangle."""
    return math.prod(span.stop - span.start for span in spans)

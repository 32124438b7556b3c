"""Exact ways to compute Transformer attention (Eq. 2) from projected queries, keys, values and positions.

Shapes: B batch, M heads, N_q queries, N_k keys, d head width. Queries and keys of a map are flattened row by row.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# A block of query rows times all keys, per head and sample. Blocks of this size stay in cache, and sentences and small
# maps are one block.
BLOCK_ELEMENTS = 256 * 256


def skew(energy: Tensor, num_keys: int, stride: int = 1) -> Tensor:
    """Turns energies by relative offset into energies by key, as a view.

    Args:
        energy: `[..., N_q, N_q + (N_k - 1) * stride]`; column c belongs to the offset c - (N_q - 1) from row 0, so
            that row q finds key k in column k * stride - q + N_q - 1.
        num_keys: N_k.
        stride: Distance between neighbouring keys, in tokens.

    Returns:
        `[..., N_q, N_k]`.
    """
    rows, columns = energy.shape[-2:]
    if rows == 1:
        return energy[..., ::stride]
    # In the flattened matrix (q, k) stands at q * (columns - 1) + k * stride + (rows - 1): rows of one element less.
    flat = energy.flatten(-2)[..., rows - 1 : rows - 1 + rows * (columns - 1)]
    return torch.unflatten(flat, -1, (rows, columns - 1))[..., : (num_keys - 1) * stride + 1 : stride]


@dataclasses.dataclass(frozen=True)
class SequencePosition:
    """E2 + E4 of a sentence: query vectors against the projected encodings of all offsets.

    Attributes:
        query: `[B or 1, M, N_q or 1, d]`: U z_q, v, or their sum; one row where it is the same for every query.
        table: V^R R for the offsets from -(N_q - 1) - first query position upwards, `[M, d, N_q + (N_k - 1) * stride]`.
        num_queries: N_q.
        num_keys: N_k.
        stride: Distance between neighbouring keys, in tokens.
    """

    query: Tensor
    table: Tensor
    num_queries: int
    num_keys: int
    stride: int

    def rows(self, start: int, stop: int) -> Tensor:
        """Energies of the queries `start:stop`, `[B or 1, M, stop - start, N_k]`."""
        count = stop - start
        first = self.num_queries - stop  # the offset of the last of these queries to key 0
        table = self.table[..., first : first + count + (self.num_keys - 1) * self.stride]
        query = self.query if self.query.shape[-2] == 1 else self.query[..., start:stop, :]
        energy = torch.matmul(query, table)
        return skew(energy.expand(*energy.shape[:-2], count, -1), self.num_keys, self.stride)


@dataclasses.dataclass(frozen=True)
class MapPosition:
    """E2 + E4 of a map, which is the sum of one part along x and one along y (design: no N x N tensor holds it).

    Attributes:
        along_x: `[B or 1, M, N_q, W_k]`, energies of every query by the key's column.
        along_y: `[B or 1, M, N_q, H_k]`, by the key's row.
    """

    along_x: Tensor
    along_y: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """Energies of the queries `start:stop`, `[B or 1, M, stop - start, N_k]`."""
        x = self.along_x[..., start:stop, :].unsqueeze(-2)
        y = self.along_y[..., start:stop, :].unsqueeze(-1)
        return (y + x).flatten(-2)


@dataclasses.dataclass(frozen=True)
class Energies:
    """The sum of the energies that are switched on, made for any range of queries.

    Attributes:
        content_query: U z_q (+ u), `[B, M, N_q, d]`, for E1 (+ E3).
        key: V^C x_k, `[B, M, N_k, d]`, with `content_query`.
        key_energy: E3 without E1, `[B, M, 1, N_k]`.
        position: E2 and E4.
        num_queries: N_q.
    """

    content_query: Tensor | None
    key: Tensor | None
    key_energy: Tensor | None
    position: SequencePosition | MapPosition | None
    num_queries: int

    @property
    def depend_on_query(self) -> bool:
        """False for E3 alone, whose map is the same for every query."""
        return self.content_query is not None or self.position is not None

    def rows(self, start: int, stop: int) -> Tensor:
        """The summed energies of the queries `start:stop`, `[B or 1, M, stop - start, N_k]` (one row for E3 alone)."""
        energy: Tensor | None = None
        if self.content_query is not None and self.key is not None:
            energy = torch.matmul(self.content_query[..., start:stop, :], self.key.transpose(-1, -2))
        if self.position is not None:
            position = self.position.rows(start, stop)
            energy = position if energy is None else energy.add_(position)
        if self.key_energy is not None:
            energy = self.key_energy if energy is None else energy + self.key_energy
        assert energy is not None, "a term string switches at least one energy on"
        return energy


@dataclasses.dataclass(frozen=True)
class KeyMask:
    """Which keys a query must not see: padding, later keys, keys outside the window.

    Attributes:
        padding: `[B, N_k]`, True where padded.
        query_positions: One index per axis, each `[N_q]`.
        key_positions: One index per axis, each `[N_k]`, in the units of the queries.
        causal: Hide the keys that come after the query; in a map, in reading order.
        window: Odd n_k; hide the keys farther than n_k // 2 along any axis.
    """

    padding: Tensor | None
    query_positions: tuple[Tensor, ...]
    key_positions: tuple[Tensor, ...]
    causal: bool
    window: int | None

    @property
    def depends_on_query(self) -> bool:
        """Whether different queries see different keys."""
        return self.causal or self.window is not None

    def rows(self, start: int, stop: int) -> Tensor | None:
        """True where hidden from the queries `start:stop`, `[B or 1, 1, stop - start or 1, N_k]`; None if all seen."""
        hidden: Tensor | None = None
        queries = [axis[start:stop, None] for axis in self.query_positions]
        if self.causal:
            later = self.key_positions[-1] > queries[-1]
            for key, query in zip(reversed(self.key_positions[:-1]), reversed(queries[:-1]), strict=True):
                later = (key > query) | ((key == query) & later)
            hidden = later
        if self.window is not None:
            for key, query in zip(self.key_positions, queries, strict=True):
                far = (key - query).abs() > self.window // 2
                hidden = far if hidden is None else hidden | far
        if hidden is not None:
            hidden = hidden[None, None]
        if self.padding is not None:
            padding = self.padding[:, None, None, :]
            hidden = padding if hidden is None else hidden | padding
        return hidden


def normalise(energy: Tensor, hidden: Tensor | None) -> Tensor:
    """Softmax over the keys that are not hidden; a query that sees none gets zeros (Eq. 2 and 8)."""
    weights = _softmax(energy, hidden)
    return weights if hidden is None else weights.masked_fill(hidden.all(dim=-1, keepdim=True), 0.0)


def _softmax(energy: Tensor, hidden: Tensor | None) -> Tensor:
    if hidden is not None:
        # The most negative finite number: -inf would make a row that is hidden whole NaN, also in the backward pass.
        energy = energy.masked_fill(hidden, torch.finfo(energy.dtype).min)
    # Half precision holds the energies, but not sums of many exponentials.
    dtype = torch.float64 if energy.dtype == torch.float64 else torch.float32
    return torch.softmax(energy, dim=-1, dtype=dtype)


def attend(energies: Energies, mask: KeyMask, value: Tensor, dropout: float = 0.0) -> Tensor:
    """The weighted sums of values of Eq. 2, in blocks of query rows that are recomputed in the backward pass.

    Args:
        energies: The energies that are switched on.
        mask: The keys that are hidden.
        value: W' x_k, `[B, M, N_k, d]`.
        dropout: Probability of dropping a weight; 0.0 outside training.

    Returns:
        `[B, M, N_q, d]`, in the dtype of `value`; zeros for a query that sees no key.
    """
    num_queries, num_keys = energies.num_queries, value.shape[-2]
    if num_queries == 0 or num_keys == 0:
        return value.new_zeros(*value.shape[:2], num_queries, value.shape[-1])
    # Dropped weights are drawn for each query alone, so then nothing can be shared.
    shared = not energies.depend_on_query and not mask.depends_on_query and dropout == 0.0
    num_rows = 1 if shared else num_queries

    def block(start: int, stop: int) -> Tensor:
        hidden = mask.rows(start, stop)
        weights = _softmax(energies.rows(start, stop), hidden).to(value.dtype)
        if dropout > 0.0:
            weights = F.dropout(weights.expand(value.shape[0], -1, stop - start, -1), dropout)
        out = torch.matmul(weights, value)
        return out if hidden is None else out.masked_fill(hidden.all(dim=-1).unsqueeze(-1), 0.0)

    block_rows = max(1, BLOCK_ELEMENTS // max(1, num_keys))
    if num_rows <= block_rows:
        out = block(0, num_rows)
    else:
        run = _recomputed(block, dropout > 0.0) if torch.is_grad_enabled() else block
        out = torch.cat([run(i, min(i + block_rows, num_rows)) for i in range(0, num_rows, block_rows)], dim=-2)
    return out.expand(-1, -1, num_queries, -1) if shared else out


def _recomputed(block: Callable[[int, int], Tensor], random: bool) -> Callable[[int, int], Tensor]:
    def run(start: int, stop: int) -> Tensor:
        result = checkpoint(block, start, stop, use_reentrant=False, preserve_rng_state=random)
        assert isinstance(result, Tensor)
        return result

    return run

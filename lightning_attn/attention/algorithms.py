"""Exact ways to compute Transformer attention (Eq. 2), each for the terms it is cheap for.

All give the numbers of Eq. 2 and 8. Cost with N_q queries, N_k keys on a grid of `rows x columns`, and C features:

    pooled       E3                   N_k C: one pooled vector for all queries
    separable    E4, E3 + E4          N_q (rows + columns) C: one softmax along each axis
    factored     E2 (+ E4) (+ E3)     N_q N_k C, but only N_q (rows + columns) exponentials; maps
    fused        E1 (+ E3)            N_q N_k C in PyTorch's fused kernel
    flex         E1 with E2 or E4     N_q N_k C in a compiled FlexAttention kernel; CUDA
    tiled        any                  N_q N_k C tile by tile; N_q n_k^2 C in a window of n_k

Shapes: M heads, B samples, d features of a head, queries and keys flattened row by row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from lightning_attn.attention.positions import computation_dtype
from lightning_attn.attention.tiled import TILE_ELEMENTS, Layout, divided, factored_sums, is_shared, tiled_attention

Algorithm = Literal["auto", "pooled", "separable", "factored", "fused", "flex", "tiled", "definition"]


@dataclasses.dataclass(frozen=True)
class Projected:
    """What the energies that are switched on are made of.

    Attributes:
        content_query: U z_q (+ u), `[M, B, N_q, d]`, for E1 (+ E3).
        key: V^C x_k, `[M, B, N_k, d]`, with `content_query`.
        key_energy: E3 without E1, `[M, B, N_k]`.
        position_query: U z_q (+ v) for E2 (+ E4), `[M, B, N_q, d]`; v for E4 alone, `[M, 1, 1, d]`.
        table_y: V^R R for the offsets along y, `[M, d, offsets]`, from `1 - rows` upwards; maps only.
        table_x: The same along x, or along a sentence.
        value: W' x_k, `[M, B, N_k, d]`.
        padding: True where a key is padding, `[B, N_k]`.
        layout: The grids and which keys a query may see.
    """

    content_query: Tensor | None
    key: Tensor | None
    key_energy: Tensor | None
    position_query: Tensor | None
    table_y: Tensor | None
    table_x: Tensor | None
    value: Tensor
    padding: Tensor | None
    layout: Layout

    @property
    def position_is_shared(self) -> bool:
        """Whether the position energy is the same for every query: E4 without E2."""
        return self.position_query is None or is_shared(self.position_query)


def unfit(algorithm: Algorithm, terms: str, ndim: int, layout: Layout, padded: bool, dropout: float) -> str | None:
    """Why an algorithm cannot compute this attention; None if it can.

    Args:
        algorithm: One of `Algorithm`.
        terms: The terms that are on, such as `"0110"`.
        ndim: 1 for sentences, 2 for maps.
        layout: The grids and which keys a query may see.
        padded: Whether keys are hidden by a mask.
        dropout: Probability of dropping a weight in this pass.
    """
    e1, e2 = terms[0] == "1", terms[1] == "1"
    if dropout > 0 and algorithm not in ("auto", "tiled"):
        return "it does not drop weights"
    if algorithm == "pooled":
        if terms != "0010":
            return "it needs terms '0010', whose weights are the same for every query"
        if layout.masked:
            return "it needs every query to see the same keys: no causal mask and no window"
    elif algorithm == "separable":
        if terms not in ("0001", "0011"):
            return "it needs terms '0001' or '0011', whose weights depend on the offset and the key alone"
        if ndim == 2 and layout.causal:
            return "reading order does not separate into rows and columns"
    elif algorithm == "factored":
        if e1 or not e2:
            return "it needs E2 without E1"
        if ndim != 2:
            return "it needs maps (ndim=2): a sentence has one axis only"
        if layout.masked:
            return "it needs every query to see the same keys: no causal mask and no window"
    elif algorithm == "fused":
        if not e1 or e2 or terms[3] == "1":
            return "it needs E1 without E2 and E4: the fused kernel takes no position energy with a gradient"
        if layout.window is not None:
            return "it has no window"
    elif algorithm == "flex":
        if not e1:
            return "it needs E1"
        if layout.masked or padded:
            return "it has no causal mask, no window and no key padding"
    return None


def choose(terms: str, ndim: int, layout: Layout, padded: bool, dropout: float, device: torch.device) -> Algorithm:
    """The algorithm that is fastest for this attention, by measurement (docs/performance.md)."""
    candidates: tuple[Algorithm, ...] = ("pooled", "separable", "factored", "fused")
    if torch.compiler.is_exporting():
        # Of plain operations. "separable" otherwise looks at numbers, or at the length of a sentence, which a program
        # does not know.
        candidates = ("separable",) if terms == "0001" and ndim == 2 and not padded else ("pooled", "fused")
    if device.type == "cuda" and ("1" in (terms[1], terms[3])):
        candidates = (*candidates, "flex")
    for algorithm in candidates:
        if unfit(algorithm, terms, ndim, layout, padded, dropout) is None and _is_worth_it(algorithm, layout, padded):
            return algorithm
    return "tiled"


def _is_worth_it(algorithm: Algorithm, layout: Layout, padded: bool) -> bool:
    """Whether an algorithm that can compute an attention keeps its promise of little memory there."""
    if algorithm == "separable":
        # Along one axis alone, a weight is held for every pair of positions.
        return layout.query_sizes[0] > 1 or layout.num_queries * layout.num_keys <= TILE_ELEMENTS
    # Otherwise a mask of N_q x N_k would be needed.
    return algorithm != "fused" or not layout.causal or _kernel_hides_later_keys(layout, padded)


def _kernel_hides_later_keys(layout: Layout, padded: bool) -> bool:
    """Whether the causal flag of the fused kernel, which takes no other mask then, hides what is to be hidden."""
    return not padded and layout.query_sizes == layout.key_sizes and layout.stride == 1


def attend(projected: Projected, algorithm: Algorithm, dropout: float) -> Tensor:
    """The weighted sums of values of Eq. 2, `[M, B, N_q, d]`; zeros for a query that sees no key."""
    if 0 in (projected.layout.num_queries, projected.layout.num_keys, projected.value.shape[1]):
        heads, batch, _, width = projected.value.shape
        return projected.value.new_zeros(heads, batch, projected.layout.num_queries, width)
    if algorithm == "separable":
        return separable(projected)
    if algorithm == "factored":
        return factored(projected)
    if algorithm == "fused":
        return fused(projected)
    if algorithm == "flex":
        return flex(projected)
    return tiled(projected, dropout)


def tiled(p: Projected, dropout: float = 0.0) -> Tensor:
    """Any terms, masks and windows, tile by tile; see `tiled_attention`."""
    layout = p.layout
    if torch.compiler.is_exporting() and dropout == 0:
        return _in_plain_operations(p)
    # Drawn from torch's own generator, so that seeds and restored generator states decide what is dropped.
    seed = torch.randint(2**62, (), device="cpu") if dropout > 0 else None
    inputs = (p.content_query, p.key, p.key_energy, p.position_query, p.table_y, p.table_x, p.value, p.padding)
    result: Tensor = tiled_attention(
        *inputs,
        layout.query_sizes,
        layout.key_sizes,
        layout.stride,
        layout.causal,
        layout.window,
        dropout,
        seed,
    )
    return result


def _in_plain_operations(p: Projected) -> Tensor:
    """The same without an operator of our own, for programs that run where this package is not installed."""
    heads, batch, num_keys, _ = p.value.shape
    at_once, starts = p.layout.num_queries, range(1)  # all, if the number is not known yet: then these are sentences
    if isinstance(num_keys, int):
        at_once = max(1, _PLAIN_ELEMENTS // (heads * batch * num_keys))
        starts = range(0, p.layout.num_queries, at_once)
    blocks = []
    for start in starts:
        weights = weight_rows(p, start, min(start + at_once, p.layout.num_queries))
        blocks.append(torch.matmul(weights.transpose(0, 1).to(p.value.dtype), p.value))
    return torch.cat(blocks, dim=2)


# Weights held at once in a program (64 MiB in float32).
_PLAIN_ELEMENTS = 1 << 24


def masked_softmax(energy: Tensor, hidden: Tensor | None) -> Tensor:
    """Softmax over the last axis of what is not hidden; zeros, not NaN, where all is.

    Args:
        energy: `[..., keys]`.
        hidden: True where hidden, of a shape that broadcasts to that of `energy`; None for nothing.
    """
    if hidden is None:
        return torch.softmax(energy, dim=-1)
    weights = torch.softmax(energy.masked_fill(hidden, torch.finfo(energy.dtype).min), dim=-1)
    return weights.masked_fill(hidden, 0.0)


def pooled(key_energy: Tensor, padding: Tensor | None, content: Tensor) -> Tensor:
    """E3 alone: the same weighted mean of the keys for every query.

    Args:
        key_energy: E3, `[M, B, N_k]`.
        padding: `[B, N_k]`, True where padded.
        content: The keys before any projection, `[B, N_k, C]`: pooling first leaves one vector to project.

    Returns:
        `[B, M, C]`; zeros where all keys are padding.
    """
    if padding is not None:
        content = content.masked_fill(padding.unsqueeze(-1), 0.0)
    weights = masked_softmax(key_energy, padding)
    return torch.bmm(weights.transpose(0, 1).to(content.dtype), content)


def separable(p: Projected) -> Tensor:
    """E4, alone or with E3: the exponential of a sum over axes is a product, so each axis is summed on its own."""
    assert p.position_query is not None, "E4 is on"
    assert p.table_x is not None, "E4 is on"
    along = [
        None if table is None else _axis_weights(p.position_query, table, axis, p.layout)
        for axis, table in enumerate((p.table_y, p.table_x))
    ]

    def sums(value: Tensor) -> Tensor:
        heads, batch, width, _ = value.shape
        along_y, along_x = along
        assert along_x is not None
        grid = value.view(heads, batch * width * p.layout.key_sizes[0], p.layout.key_sizes[1])
        grid = torch.bmm(grid, along_x.transpose(1, 2))
        if along_y is not None:
            grid = grid.view(heads, batch * width, p.layout.key_sizes[0], p.layout.query_sizes[1])
            grid = torch.matmul(along_y.unsqueeze(1), grid)
        return grid.reshape(heads, batch, width, p.layout.num_queries).transpose(2, 3)

    return _weighted(p, lambda value: sums(value.transpose(2, 3).contiguous()))


def _axis_weights(query: Tensor, table: Tensor, axis: int, layout: Layout) -> Tensor:
    """Softmax of the position energy along one axis, `[M, queries along it, keys along it]`; `query` `[M, 1, 1, d]`."""
    num_queries, num_keys = layout.query_sizes[axis], layout.key_sizes[axis]
    device = table.device
    queries = torch.arange(num_queries, device=device)
    keys = torch.arange(num_keys, device=device) * layout.stride
    # The axis alone is a sentence of its own.
    line = dataclasses.replace(layout, query_sizes=(1, num_queries), key_sizes=(1, num_keys))
    hidden = line.hidden_from(queries) if layout.masked else None
    with torch.autocast(device.type, enabled=False):
        by_offset = torch.bmm(query[:, 0].to(table.dtype), table).squeeze(1)  # [M, offsets]
        columns = keys - queries.unsqueeze(1) + num_queries - 1
        energy = torch.unflatten(by_offset.index_select(1, columns.flatten()), 1, columns.shape)
        return masked_softmax(energy, hidden)


def factored(p: Projected) -> Tensor:
    """E2 without E1 in a map: weights are a product of one softmax along each axis and a weight of the key."""
    assert p.position_query is not None, "E2 is on"
    assert p.table_y is not None, "maps have two tables"
    assert p.table_x is not None, "maps have two tables"
    position = (p.position_query, p.table_y, p.table_x)
    grids = (p.layout.query_sizes, p.layout.key_sizes, p.layout.stride)
    return _weighted(p, lambda value: factored_sums(*position, value, *grids))


def _weighted(p: Projected, sums: Callable[[Tensor], Tensor]) -> Tensor:
    """Position-weighted sums whose keys have the additional weight exp(E3), or none if they are padding.

    The values, multiplied by these weights, and the weights themselves go through `sums` together: the second are the
    normaliser. Where no key is near the largest of all factors at once it vanishes in rounding; then, which is rare,
    everything is computed from sums of energies instead.
    """
    value = p.value.to(computation_dtype(p.value))
    if p.key_energy is None and p.padding is None:
        return sums(value).to(p.value.dtype)
    with torch.autocast(value.device.type, enabled=False):
        if p.key_energy is None:
            weight = value.new_ones(*value.shape[:3])
        else:
            energy = p.key_energy.to(value.dtype)
            if p.padding is not None:
                energy = energy.masked_fill(p.padding, torch.finfo(energy.dtype).min)
            weight = torch.exp(energy - energy.amax(dim=-1, keepdim=True).detach())
        if p.padding is not None:
            weight = weight.masked_fill(p.padding, 0.0)
            value = value.masked_fill(p.padding.unsqueeze(-1), 0.0)
        weight = weight.unsqueeze(-1)
        both = sums(torch.cat((value * weight, weight), dim=-1))
        numerator, normaliser = both[..., :-1], both[..., -1:]
        if bool((normaliser < _SMALLEST_NORMALISER[value.dtype]).any()):
            return tiled(p)
        return (numerator / normaliser).to(p.value.dtype)


# What rounding to zero has taken from a normaliser above these is less than its last bit.
_SMALLEST_NORMALISER = {torch.float32: 1e-25, torch.float64: 1e-250}


def fused(p: Projected) -> Tensor:
    """E1 (+ E3) by PyTorch's fused kernel."""
    assert p.content_query is not None, "E1 is on"
    assert p.key is not None, "E1 is on"
    key, value, mask = p.key, p.value, None
    layout = p.layout
    if p.padding is not None:
        key, value = (tensor.masked_fill(p.padding.unsqueeze(-1), 0.0) for tensor in (key, value))
        mask = ~p.padding[:, None, None, :]
    causal = layout.causal
    if causal and not _kernel_hides_later_keys(layout, p.padding is not None):
        seen = ~layout.hidden_from(torch.arange(layout.num_queries, device=value.device))
        mask, causal = seen if mask is None else mask & seen, False
    # [B, M, N, d] with the features of a token side by side, or the kernel is several times slower.
    query, key, value = (t.transpose(0, 1).contiguous() for t in (p.content_query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=1.0)
    # The kernel takes a row of NaN energies for one that sees no key and hides them; here they are to be seen.
    with torch.no_grad():
        unsound = (query.sum(dim=-1, keepdim=True) + key.sum(dim=(-2, -1), keepdim=True)) * 0.0
    out = out + unsound
    if mask is not None:
        out = out.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    return out.transpose(0, 1)


def flex(p: Projected) -> Tensor:
    """E1 with position energies by FlexAttention, which adds them inside the kernel; compiled on CUDA."""
    assert p.content_query is not None, "E1 is on"
    assert p.key is not None, "E1 is on"
    heads, batch = p.value.shape[:2]
    columns = p.layout.key_sizes[1]
    queries = torch.arange(p.layout.num_queries, device=p.value.device)
    along_y, along_x = (
        None if axis is None else axis.expand(heads, batch, p.layout.num_queries, -1).contiguous()
        for axis in _position_by_axis(p, queries)
    )

    def add_position(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if along_x is not None:
            score = score + along_x[head, b, query, key % columns]
        if along_y is not None:
            score = score + along_y[head, b, query, key // columns]
        return score

    query, key, value = (t.transpose(0, 1).contiguous() for t in (p.content_query, p.key, p.value))
    kernel = _compiled_flex_attention() if value.is_cuda else _flex_attention
    return kernel(query, key, value, score_mod=add_position, scale=1.0).transpose(0, 1)


_flex_attention: Callable[..., Tensor] = flex_attention  # its own type also allows for further results


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(_flex_attention, dynamic=False)


def _position_by_axis(p: Projected, queries: Tensor) -> list[Tensor | None]:
    """E2 + E4 along y and along x, `[M, B or 1, queries, keys along the axis]`, for some queries by number."""
    if p.position_query is None:
        return [None, None]
    rows, columns = divided(queries, p.layout.query_sizes[1])
    query = p.position_query
    query = query.expand(-1, -1, queries.shape[0], -1) if p.position_is_shared else query.index_select(2, queries)
    energies: list[Tensor | None] = []
    for axis, (table, index) in enumerate(((p.table_y, rows), (p.table_x, columns))):
        if table is None:
            energies.append(None)
            continue
        keys = torch.arange(p.layout.key_sizes[axis], device=queries.device) * p.layout.stride
        encodings = table[:, :, keys - index.unsqueeze(1) + p.layout.query_sizes[axis] - 1]  # [M, d, queries, keys]
        energies.append(torch.einsum("mbqd,mdqk->mbqk", query.to(table.dtype), encodings))
    return energies


def energy_rows(p: Projected, start: int, stop: int) -> Tensor:
    """The summed energies of the queries `start:stop`, `[B, M, stop - start, N_k]`: for pictures, not for speed."""
    queries = torch.arange(start, stop, device=p.value.device)
    heads, batch, num_keys, _ = p.value.shape
    dtype = computation_dtype(p.value)
    energy = p.value.new_zeros(heads, batch, queries.shape[0], num_keys, dtype=dtype)
    if p.content_query is not None and p.key is not None:
        energy = energy + p.content_query[:, :, start:stop].to(dtype) @ p.key.to(dtype).transpose(2, 3)
    if p.key_energy is not None:
        energy = energy + p.key_energy.unsqueeze(2)
    along_y, along_x = _position_by_axis(p, queries)
    if along_x is not None:
        position = along_x if along_y is None else (along_y.unsqueeze(-1) + along_x.unsqueeze(-2)).flatten(-2)
        energy = energy + position
    return energy.transpose(0, 1)


def weight_rows(p: Projected, start: int, stop: int) -> Tensor:
    """The weights of the queries `start:stop`, `[B, M, stop - start, N_k]`; zeros for a query that sees no key."""
    energy = energy_rows(p, start, stop)
    hidden = p.layout.hidden_from(torch.arange(start, stop, device=energy.device))
    if p.padding is not None:
        hidden = hidden | p.padding[:, None, None, :]
    return masked_softmax(energy, hidden)

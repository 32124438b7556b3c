"""Any sum of energies as the inner product of augmented queries and keys, for torch's fused kernels.

The encodings of K equidistant positions are sinusoids: for every query, the energies E2 + E4 of the K keys along an
axis lie in one space of dimension r, far below K, that does not depend on the weights. With an orthonormal basis Psi
`[K, r]` of it the energies are c Psi^T, where c `[N_q, r]` is one small product. So with

    q' = [U z_q + u, c_y, c_x, 1]    k' = [V^C x_k, Psi_y[k_y], Psi_x[k_x], E3 and padding]

q' . k' is the sum of all energies, up to the rounding of the dtype. After FlashBias (arXiv 2505.12044), which
approximates general biases; this is exact. Masks that depend on the query are given to the kernel, with a window block
by block.
"""

import functools
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_attn.attention.algorithms.base import Algorithm, AttentionInputs, AttentionProblem
from lightning_attn.attention.algorithms.sdpa import fused_attention
from lightning_attn.attention.energies import Energies
from lightning_attn.attention.layout import Layout
from lightning_attn.attention.projections import without_autocast
from lightning_attn.attention.transforms import not_compiled

_HIDDEN, _HIDDEN_FLOAT16 = -1e30, -30000.0
"""Energy of a padding key: far below any other; in float16 as low as a sum of energies still allows."""

_MIN_WINDOW_BLOCK = (8, 256)
"""Rows of a map, or positions of a sentence, that one call of the kernel computes with a window."""

_BLOCK_QUERIES = 64
"""Queries of a sentence whose position energies are in memory at once while c is computed."""


class AugmentedSDPA(Algorithm):
    """`scaled_dot_product_attention` of queries and keys with extra features."""

    name = "augmented_sdpa"

    @override
    def unsupported_reason(self, problem: AttentionProblem) -> str | None:
        return None

    @override
    def is_suitable(self, problem: AttentionProblem) -> bool:
        """On devices other than CPUs; CPU kernels lose more by the longer features than tiling costs."""
        return problem.device not in ("cpu", "meta") and not (problem.transformed or problem.exported)

    @override
    @not_compiled  # the number of features depends on the sizes of a map, of which each would be compiled anew
    def compute(self, inputs: AttentionInputs) -> Tensor:
        value, padding, layout = inputs.projected_value(), inputs.padding(), inputs.layout
        width = value.shape[-1]
        if layout.window is None and inputs.attention_mask is None and (layout.aligned or not layout.causal):
            query, key = augmented(inputs.energies(), value, padding)
            fully_masked = None
            if padding is not None and layout.causal:
                fully_masked = ((~padding).cumsum(dim=-1) == 0)[:, None, :, None]
            elif padding is not None:
                fully_masked = padding.all(dim=-1)[:, None, None, None]
            out = fused_attention(
                query,
                key,
                _padded(value, query.shape[-1]),
                inputs.dropout,
                is_causal=layout.causal,
                fully_masked=fully_masked,
            )
            return out[..., :width]
        query, key = augmented(inputs.energies(), value)
        value = _padded(value, query.shape[-1])
        blocks = []
        for queries, keys in _blocks(layout):
            hidden = inputs.hidden(queries.start, queries.stop)
            assert hidden is not None, "a window, a causal mask or an attention_mask hides keys"
            block = (query[:, :, queries], key[:, :, keys], value[:, :, keys], inputs.dropout)
            blocks.append(fused_attention(*block, hidden=hidden[..., keys]))
        return torch.cat(blocks, dim=2)[..., :width]


def _padded(value: Tensor, width: int) -> Tensor:
    """Values with zeros up to a width.

    The kernels of a CPU, and the fastest ones of CUDA, need one width for query, key and value.
    """
    return F.pad(value, (0, width - value.shape[-1])) if width > value.shape[-1] else value


def _blocks(layout: Layout) -> Iterator[tuple[slice, slice]]:
    """Queries, and the keys that a window lets them see, as ranges of flattened positions; all without a window.

    Whole rows of a map: with `n_y` rows of queries the kernel sees `2 n_y - 1` rows of keys instead of all.
    """
    rows, columns = layout.query_sizes
    if layout.window is None:
        yield slice(0, layout.num_queries), slice(0, layout.num_keys)
        return
    axis = 0 if rows > 1 else 1
    length = max(layout.window[axis], _MIN_WINDOW_BLOCK[axis])
    for start in range(0, layout.query_sizes[axis], length):
        span = slice(start, min(start + length, layout.query_sizes[axis]))
        if axis == 0:
            keys = layout.visible_keys((span, slice(0, columns)))[0]
            key_columns = layout.key_sizes[1]
            queries = slice(span.start * columns, span.stop * columns)
            yield queries, slice(keys.start * key_columns, keys.stop * key_columns)
        else:
            # A map of one row may have several rows of keys; its window is small.
            keys = layout.visible_keys((slice(0, 1), span))[1]
            yield span, keys if layout.key_sizes[0] == 1 else slice(0, layout.num_keys)


def augmented(energies: Energies, value: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Queries `[B, M, N_q, width]` and keys `[B, M, N_k, width]` whose inner products are the summed energies.

    Args:
        energies: The parts of the energies.
        value: The projected values `[B, M, N_k, d]`, for their dtype and device.
        padding: True where a key is padding, `[B, N_k]`; these get an energy so low that their weight is zero.
    """
    layout, (batch, heads, num_keys, _), dtype = energies.layout, value.shape, value.dtype
    queries, keys = [], []
    with without_autocast(value.device):
        if energies.content_query is not None and energies.key is not None:
            queries.append(energies.content_query.to(dtype).expand(batch, -1, -1, -1))
            keys.append(energies.key.to(dtype))
        for axis in (0, 1):
            coefficients = _coefficients(energies, axis, dtype)
            if coefficients is not None:
                c, basis = coefficients
                queries.append(c.expand(batch, heads, *layout.query_sizes, -1).flatten(2, 3))
                column = basis[:, None] if axis == 0 else basis[None]
                keys.append(column.expand(batch, heads, *layout.key_sizes, -1).flatten(2, 3))
        if energies.key_energy is not None or padding is not None:
            energy = value.new_zeros(batch, heads, num_keys)
            energy = energy if energies.key_energy is None else energies.key_energy.to(dtype)
            energy = (
                energy
                if padding is None
                else energy.masked_fill(padding[:, None], _HIDDEN_FLOAT16 if dtype == torch.float16 else _HIDDEN)
            )
            queries.append(value.new_ones(batch, heads, layout.num_queries, 1))
            keys.append(energy.unsqueeze(-1))
        alignment = -sum(part.shape[-1] for part in queries) % 8  # CUDA kernels need widths that are multiples of 8
        if alignment:
            queries.append(value.new_zeros(batch, heads, layout.num_queries, alignment))
            keys.append(value.new_zeros(batch, heads, num_keys, alignment))
        return torch.cat(queries, dim=-1), torch.cat(keys, dim=-1)


def _coefficients(energies: Energies, axis: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Coefficients c `[B or 1, M, rows or 1, columns or 1, r]` and basis Psi `[K, r]`; None without an axis energy."""
    if energies.position_query is None or energies.relative_keys is None or energies.relative_keys[axis] is None:
        return None
    layout, relative_keys = energies.layout, energies.relative_keys[axis]
    assert relative_keys is not None, "checked above"
    features = relative_keys.shape[1] * relative_keys.shape[2] // (1 if energies.relative_keys[0] is None else 2)
    if energies.is_linear_in_encoding:
        basis = position_basis(layout.key_sizes[axis], layout.stride, features, dtype, relative_keys.device)
    else:  # any energies: a column for each key
        basis = torch.eye(layout.key_sizes[axis], dtype=relative_keys.dtype, device=relative_keys.device)
    if energies.position_is_shared:
        along = energies.along(axis)
        assert along is not None, "there is an energy along it"
        return (along @ basis).to(dtype), basis.to(dtype)
    if energies.relative_keys[0] is None:

        def block(start: int) -> Tensor:
            energy = energies.rows_of_position(start, min(start + _BLOCK_QUERIES, layout.num_queries))
            assert energy is not None, "there is an energy along it"
            return energy @ basis

        c = torch.cat([block(start) for start in range(0, layout.num_queries, _BLOCK_QUERIES)], dim=2)
        return c.unsqueeze(2).to(dtype), basis.to(dtype)
    keys = torch.einsum("nkmd,kr->nrmd", energies.relative_keys_of_queries(axis), basis).to(dtype)
    grid = torch.unflatten(energies.position_query.to(dtype), 2, layout.query_sizes)
    equation = "bmhwd,hrmd->bmhwr" if axis == 0 else "bmhwd,wrmd->bmhwr"
    return torch.einsum(equation, grid, keys), basis.to(dtype)


def position_basis(num_keys: int, stride: int, features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Psi `[num_keys, r]` with orthonormal columns, in float32 or better; cached for each set of arguments.

    Args:
        num_keys: Keys along the axis.
        stride: Their distance.
        features: Width of the encoding of the axis.
        dtype: Of the computation: singular vectors below its rounding error are left out.
        device: Of the result.
    """
    precision = torch.promote_types(dtype, torch.float32)
    tolerance = {torch.float64: 1e-16, torch.float32: 1e-8}.get(dtype, 1e-6)
    arguments = (num_keys, stride, features, tolerance)
    cache_key = (*arguments, precision, device)
    basis = _basis_cache.get(cache_key)
    if basis is None:
        with torch.inference_mode(False):  # the cached tensor may be used in training later
            basis = torch.from_numpy(_basis(*arguments)).to(device, precision)
        if type(basis) is Tensor:  # not a fake tensor of a trace
            if len(_basis_cache) >= 1024:
                _basis_cache.clear()
            _basis_cache[cache_key] = basis
    return basis


_basis_cache: dict[tuple[object, ...], Tensor] = {}


@functools.lru_cache(maxsize=1024)
def _basis(num_keys: int, stride: int, features: int, tolerance: float) -> np.ndarray:
    """`position_basis` in float64 on the host, by numpy, so that tracing does not record it."""
    exponents = np.arange(features // 2) * (2.0 / features)
    angles = np.arange(0, num_keys * stride, stride)[:, None] * 1000.0**-exponents
    left, singular, _ = np.linalg.svd(np.concatenate((np.sin(angles), np.cos(angles)), axis=1), full_matrices=False)
    return np.ascontiguousarray(left[:, singular > tolerance * singular[0]])

"""The attentions of the paper as written, Eq. 1 to 8: Transformer attention and the convolutions as attention.

Plain loops over heads, queries and keys; only the batch and the features are tensor dimensions. Every faster algorithm
of this package is tested against it, in any floating dtype, so it follows the notation of the paper and shares no code
with the others. It is far too slow for anything but tests.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Position = tuple[int, ...]
"""A position on the grid of queries or keys: `(i,)` in a sentence, `(x, y)` on a map, in tokens or pixels."""


@dataclass(frozen=True)
class AttentionParameters:
    """The learnable matrices and vectors of Eq. 1 and 2, for all heads at once.

    Matrices have the layout of `torch.nn.Linear`, `[out, in]`. With `dim` features, `M` heads and `d = dim // M`, head
    `m` has the rows `m * d .. (m + 1) * d` of every matrix but W, of which it has these columns. Parameters that only
    terms that are off need may be None.

    Attributes:
        value_weight: W', `[dim, dim]`.
        out_weight: W, `[dim, dim]`.
        out_bias: Added to every output, `[dim]`. The paper has none; the released code does.
        query_weight: U, `[dim, dim]`; needed by E1 and E2.
        key_weight: V^C, `[dim, dim]`; needed by E1 and E3.
        position_weight: V^R, `[dim, dim]`; needed by E2 and E4.
        key_bias: u, `[M, d]`; needed by E3.
        position_bias: v, `[M, d]`; needed by E4.
    """

    value_weight: Tensor
    out_weight: Tensor
    out_bias: Tensor
    query_weight: Tensor | None = None
    key_weight: Tensor | None = None
    position_weight: Tensor | None = None
    key_bias: Tensor | None = None
    position_bias: Tensor | None = None

    def head_rows(self, name: str, head: int, num_heads: int) -> Tensor:
        """The `[d, dim]` block of the matrix `name` that belongs to one head."""
        return _needed(self, name).chunk(num_heads, dim=0)[head]

    def head_vector(self, name: str, head: int) -> Tensor:
        """The `[d]` vector of one head of `key_bias` or `position_bias`."""
        return _needed(self, name)[head]


def parameters_of(attention: Any) -> AttentionParameters:
    """The parameters of a `TransformerAttention`, or of a module with the same parameter names.

    These are linear layers `value_proj`, `out_proj` (with a bias), `query_proj`, `key_proj` and `position_proj`, and
    the vectors `key_bias` and `position_bias`; all but the first two are optional. Nothing is copied.

    Raises:
        AttributeError: If it has no `value_proj` or `out_proj`.
    """
    weights = {
        name: getattr(attention, f"{name}_proj").weight if hasattr(attention, f"{name}_proj") else None
        for name in ("query", "key", "position")
    }
    return AttentionParameters(
        value_weight=attention.value_proj.weight,
        out_weight=attention.out_proj.weight,
        out_bias=attention.out_proj.bias,
        query_weight=weights["query"],
        key_weight=weights["key"],
        position_weight=weights["position"],
        key_bias=getattr(attention, "key_bias", None),
        position_bias=getattr(attention, "position_bias", None),
    )


def _needed(parameters: AttentionParameters, name: str) -> Tensor:
    value = getattr(parameters, name)
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {value!r}, but a term that is on needs it: pass a tensor.")
    return value


def relative_encoding(offset: Sequence[float], dim: int) -> Tensor:
    """R_{k-q}: the sinusoidal encoding of a key's position relative to a query.

    With D features for an axis, the offset `o` along it becomes `[sin(o / 1000^(2i/D)) ..., cos(o / 1000^(2i/D)) ...]`,
    `i = 0 .. D/2 - 1`. In two dimensions each axis has half of `dim`, x before y (footnote to Eq. 2).

    Args:
        offset: Key position minus query position, `(o,)` or `(o_x, o_y)`, in tokens or pixels.
        dim: Features of the encoding; twice the number of axes must divide it.

    Returns:
        `[dim]`, in float64.

    Raises:
        ValueError: If `dim` does not divide into sine and cosine halves for each axis.
    """
    if dim < 1 or dim % (2 * len(offset)):
        raise ValueError(f"dim is {dim}, but {len(offset)} axes need a positive multiple of {2 * len(offset)}.")
    axis_dim = dim // len(offset)
    features: list[float] = []
    for o in offset:
        angles = [o / 1000 ** (2 * i / axis_dim) for i in range(axis_dim // 2)]
        features += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return torch.tensor(features, dtype=torch.float64)


def _elements(x: Tensor) -> tuple[list[Tensor], list[Position]]:
    """The content `[B, dim]` and the position of each element of a sentence `[B, L, dim]` or a map `[B, dim, H, W]`."""
    if x.dim() == 3:
        return list(x.unbind(1)), [(i,) for i in range(x.shape[1])]
    if x.dim() == 4:
        height, width = x.shape[2:]
        positions = [(col, row) for row in range(height) for col in range(width)]
        return [x[:, :, row, col] for col, row in positions], [(col, row) for col, row in positions]
    raise ValueError(f"expected [B, L, dim] or [B, dim, H, W], got a tensor of shape {tuple(x.shape)}.")


def _subsampled(positions: Sequence[Position], kv_stride: int) -> list[int]:
    """Indices of the subsampled keys: those at multiples of the stride along each axis."""
    return [k for k, position in enumerate(positions) if all(p % kv_stride == 0 for p in position)]


def term_energies(
    query: Tensor,
    key: Tensor,
    parameters: AttentionParameters,
    *,
    num_heads: int,
    terms: str,
    scale: float = 1.0,
    kv_stride: int = 1,
) -> dict[str, Tensor]:
    """The energies E1 to E4 of Eq. 2 that `terms` switches on (the betas of Eq. 8).

    Args:
        query: z, `[B, Lq, dim]` or `[B, dim, Hq, Wq]`.
        key: x, `[B, Lk, dim]` or `[B, dim, Hk, Wk]`. The offset k - q is the key's position minus the query's, also
            where the two sets differ (encoder-decoder attention).
        parameters: The learnable matrices and vectors.
        num_heads: M.
        terms: Four switches in the order E1 E2 E3 E4, such as `"0110"`.
        scale: Factor on every energy. The paper has none.
        kv_stride: Only keys at multiples of it along each axis are used; their positions are those of the full grid.

    Returns:
        `{"E1": [B, M, Nq, Nk], ...}` of the terms that are on, elements in raster order, Nk counting the subsampled
        keys. In two dimensions E2 and E4 are divided by sqrt(2), as in the released code.
    """
    z, query_positions = _elements(query)
    x, key_positions = _elements(key)
    keys = _subsampled(key_positions, kv_stride)
    names = [name for name, switch in zip(("E1", "E2", "E3", "E4"), terms, strict=True) if switch == "1"]
    position_factor = scale / math.sqrt(2) if query.dim() == 4 else scale

    offsets: dict[tuple[int, int], Position] = {}
    encodings: dict[Position, Tensor] = {}
    if "E2" in names or "E4" in names:
        for q, k in itertools.product(range(len(z)), keys):
            offset = tuple(kp - qp for kp, qp in zip(key_positions[k], query_positions[q], strict=True))
            offsets[q, k] = offset
            if offset not in encodings:
                encodings[offset] = relative_encoding(offset, z[q].shape[-1]).to(query)

    energies: dict[str, Tensor] = {}
    if 0 in (query.shape[0], len(z), len(keys)):
        return {name: query.new_zeros(query.shape[0], num_heads, len(z), len(keys)) for name in names}
    for name in names:
        heads = []
        for m in range(num_heads):
            # The left side of each inner product: U_m z_q, u_m or v_m ...
            if name in ("E1", "E2"):
                left = [z_q @ parameters.head_rows("query_weight", m, num_heads).T for z_q in z]
            else:
                vector = parameters.head_vector("key_bias" if name == "E3" else "position_bias", m)
                left = [vector.expand(query.shape[0], -1)] * len(z)
            # ... and its right side: V_m^C x_k or V_m^R R_{k-q}.
            rows = []
            if name in ("E1", "E3"):
                content = {k: x[k] @ parameters.head_rows("key_weight", m, num_heads).T for k in keys}
                for q in range(len(z)):
                    rows.append([scale * torch.linalg.vecdot(left[q], content[k]) for k in keys])
            else:
                matrix = parameters.head_rows("position_weight", m, num_heads)
                position = {offset: matrix @ encoding for offset, encoding in encodings.items()}
                for q in range(len(z)):
                    rows.append([position_factor * (left[q] @ position[offsets[q, k]]) for k in keys])
            heads.append(torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1))
        energies[name] = torch.stack(heads, dim=1)
    return energies


def supporting_keys(
    query: Tensor,
    key: Tensor,
    *,
    window: int | tuple[int, int] | None = None,
    kv_stride: int = 1,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
) -> list[list[list[int]]]:
    """Omega_q of Eq. 1: the keys that each query of each sample may look at.

    Args:
        query: As in `term_energies`.
        key: As in `term_energies`.
        window: Odd n_k: only keys within `n_k // 2` of the query along each axis; of a map also `(n_y, n_x)`. None: no
            limit.
        kv_stride: As in `term_energies`.
        causal: No keys that come after the query in reading order (row by row, in a map).
        key_padding_mask: True where a key is padding, `[B, Lk]` or `[B, Hk, Wk]`, over all keys before the stride.

    Returns:
        `[b][q]` is the list of allowed keys, as indices among the subsampled keys.
    """
    _, query_positions = _elements(query)
    _, key_positions = _elements(key)
    padded = torch.zeros(key.shape[0], len(key_positions), dtype=torch.bool)
    if key_padding_mask is not None:
        padded = key_padding_mask.reshape(key.shape[0], len(key_positions)).cpu()
    reaches = [window // 2] * 2 if isinstance(window, int) else [] if window is None else [n // 2 for n in window[::-1]]
    samples = []
    for b in range(query.shape[0]):
        regions = []
        for query_position in query_positions:
            region = []
            for number, k in enumerate(_subsampled(key_positions, kv_stride)):
                distances = [abs(kp - qp) for kp, qp in zip(key_positions[k], query_position, strict=True)]
                outside = any(distance > reach for distance, reach in zip(distances, reaches, strict=False))
                later = key_positions[k][::-1] > query_position[::-1]  # (y, x) against (y, x)
                if not (outside or (causal and later) or bool(padded[b, k])):
                    region.append(number)
            regions.append(region)
        samples.append(regions)
    return samples


def normalised_weights(
    energies: dict[str, Tensor], regions: list[list[list[int]]], attention_mask: Tensor | None = None
) -> Tensor:
    """A_m(q, k) of Eq. 8: exp of the summed energies, divided by its sum over the supporting keys.

    Args:
        energies: From `term_energies`.
        regions: From `supporting_keys`.
        attention_mask: True at excluded pairs, `[B, M, Nq, Nk]`.

    Returns:
        `[B, M, Nq, Nk]`. Zero at keys outside the region; a query whose region is empty has only zeros.
    """
    total = torch.stack(list(energies.values())).sum(0)
    if total.numel() == 0:
        return torch.zeros_like(total)
    samples = []
    for b in range(total.shape[0]):
        heads = []
        for m in range(total.shape[1]):
            rows = []
            for q in range(total.shape[2]):
                row = total.new_zeros(total.shape[3])
                region = regions[b][q]
                if attention_mask is not None:
                    region = [k for k in region if not bool(attention_mask[b, m, q, k])]
                if region:
                    energy = total[b, m, q, region]
                    # The largest energy cancels in the fraction; without it exp overflows.
                    exponential = torch.exp(energy - energy.max().detach())
                    row = row.index_put((torch.tensor(region, device=row.device),), exponential / exponential.sum())
                rows.append(row)
            heads.append(torch.stack(rows))
        samples.append(torch.stack(heads))
    return torch.stack(samples)


def weighted_values(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parameters: AttentionParameters,
    *,
    num_heads: int,
    terms: str,
    scale: float = 1.0,
    window: int | tuple[int, int] | None = None,
    kv_stride: int = 1,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The inner sum of Eq. 1 with the weights of Eq. 8: sum over k of A_m(q, k) W'_m x_k.

    Args:
        query: As in `term_energies`.
        key: As in `term_energies`.
        value: The input of W'; in the paper the key.
        parameters: The learnable matrices and vectors.
        num_heads: As in `term_energies`; so are the next two.
        terms: See there.
        scale: See there.
        window: As in `supporting_keys`; so are the next three.
        kv_stride: See there.
        causal: See there.
        key_padding_mask: See there.
        attention_mask: True at excluded pairs of a query and a key, `[B, M, Nq, keys before the stride]`.

    Returns:
        `[B, M, Nq, d]`.
    """
    energies = term_energies(query, key, parameters, num_heads=num_heads, terms=terms, scale=scale, kv_stride=kv_stride)
    regions = supporting_keys(
        query, key, window=window, kv_stride=kv_stride, causal=causal, key_padding_mask=key_padding_mask
    )
    x, positions = _elements(value)
    keys = _subsampled(positions, kv_stride)
    weights = normalised_weights(energies, regions, None if attention_mask is None else attention_mask[..., keys])
    heads = []
    for m in range(num_heads):
        pooled = weights.new_zeros(
            *weights.shape[:1], *weights.shape[2:3], parameters.value_weight.shape[0] // num_heads
        )
        for number, k in enumerate(keys):
            projected = x[k] @ parameters.head_rows("value_weight", m, num_heads).T
            pooled = pooled + weights[:, m, :, number, None] * projected[:, None]
        heads.append(pooled)
    return torch.stack(heads, dim=1)


def transformer_attention(
    query: Tensor, key: Tensor, parameters: AttentionParameters, *, value: Tensor | None = None, **settings: Any
) -> Tensor:
    """y_q of Eq. 1 with the weights of Eq. 8: sum over m of W_m [ sum over k of A_m(q, k) W'_m x_k ], plus the bias.

    Args:
        query: As in `term_energies`.
        key: As in `term_energies`.
        parameters: The learnable matrices and vectors.
        value: The input of W'; None for the keys.
        **settings: Those of `weighted_values`.

    Returns:
        y in the shape of `query`. A query without any allowed key gets `out_bias`.
    """
    pooled = weighted_values(query, key, key if value is None else value, parameters, **settings)
    y = parameters.out_bias.expand(query.shape[0], pooled.shape[2], -1)
    for m, matrix in enumerate(parameters.out_weight.chunk(pooled.shape[1], dim=1)):
        y = y + pooled[:, m] @ matrix.T
    return y.transpose(1, 2).reshape(query.shape) if query.dim() == 4 else y


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    attention: Callable[[int, int, Position, Position], Tensor],
    *,
    stride: int,
    dilation: int,
    padding: int,
    causal: bool,
) -> Tensor:
    """Eq. 1 with a head per tap, W' the identity and W_m the matrix of tap m in `weight`.

    `attention(q, m, q + p_m, k)` is A_m(q, k), `[B]`, of the indices of query and tap and two positions on the grid.
    """
    contents, positions = _elements(x)
    sizes = x.shape[1:2] if x.dim() == 3 else x.shape[2:]  # y before x, for raster order
    reach = dilation * (weight.shape[-1] - 1)
    left, right = (reach, 0) if causal else (padding, padding)
    first_taps = [range(-left, size + right - reach, stride) for size in sizes]
    taps = list(itertools.product(range(0, reach + 1, dilation), repeat=len(sizes)))
    matrices = weight.flatten(2).unbind(2)
    outputs = []
    for q, first in enumerate(itertools.product(*first_taps)):
        y = x.new_zeros(x.shape[0], weight.shape[0]) if bias is None else bias.expand(x.shape[0], -1)
        for m, tap in enumerate(taps):
            start = tuple(f + t for f, t in zip(first, tap, strict=True))[::-1]
            pooled = torch.zeros_like(contents[0])
            for x_k, k in zip(contents, positions, strict=True):
                pooled = pooled + attention(q, m, start, k)[:, None] * x_k
            y = y + pooled @ matrices[m].T
        outputs.append(y)
    result = torch.stack(outputs, dim=-1)
    return result.transpose(1, 2) if x.dim() == 3 else torch.unflatten(result, -1, [len(axis) for axis in first_taps])


def regular_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: int = 0,
    causal: bool = False,
) -> Tensor:
    """Regular convolution as attention, Eq. 3: A_m(q, k) is 1 where k = q + p_m, else 0.

    Args:
        x: `[B, L, C]` or `[B, C, H, W]`.
        weight: `[out, C, n]` or `[out, C, n, n]`; each of its taps is a head, and W_m its `[out, C]` matrix.
        bias: Added to every output, `[out]`.
        stride: Distance of neighbouring queries.
        dilation: Distance of neighbouring taps.
        padding: Zeros around the input.
        causal: The last tap is at the query, the others before it; replaces `padding`.

    Returns:
        `[B, L', out]` or `[B, out, H', W']`.
    """

    def attention(_q: int, _m: int, start: Position, k: Position) -> Tensor:
        return x.new_full((x.shape[0],), float(k == start))

    return _convolution(x, weight, bias, attention, stride=stride, dilation=dilation, padding=padding, causal=causal)


def deformable_convolution(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    stride: int = 1,
    dilation: int = 1,
    padding: int = 0,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution as attention, Eq. 4: A_m(q, k) = G(k, q + p_m + offset_m(q)).

    G is the bilinear kernel, the product over the axes of max(0, 1 - |a - b|). The offset, w_m^T x_q in the paper, is
    an argument; another convolution predicts it.

    Args:
        x: As in `regular_convolution`.
        offset: `[B, L', n]`, or `[B, 2 n n, H', W']`; channels `2 m` and `2 m + 1` are those of tap m in y and in x.
        weight: As in `regular_convolution`.
        bias: As in `regular_convolution`.
        mask: The modulated form: factor on A_m, `[B, L', n]` or `[B, n n, H', W']`.
        stride: As in `regular_convolution`.
        dilation: As in `regular_convolution`.
        padding: As in `regular_convolution`.
        causal: As in `regular_convolution`; Omega_q then has no key after the query.
        key_padding_mask: True where a key is padding and so not in Omega_q, `[B, L]` or `[B, H, W]`.

    Returns:
        `[B, L', out]` or `[B, out, H', W']`.
    """
    batch, taps = x.shape[0], weight[0, 0].numel()
    if x.dim() == 3:
        moves = offset[..., None]  # [B, q, m, axis]
    else:
        moves = (
            torch.unflatten(offset, 1, (taps, 2)).flatten(3).permute(0, 3, 1, 2).flip(-1)
        )  # x before y, as in Position
        mask = None if mask is None else mask.flatten(2).transpose(1, 2)
    padded = None
    if key_padding_mask is not None:
        padded = dict(zip(_elements(x)[1], key_padding_mask.flatten(1).unbind(1), strict=True))

    def attention(q: int, m: int, start: Position, k: Position) -> Tensor:
        if causal and k > (q,):
            return x.new_zeros(batch)
        weights = x.new_ones(batch) if mask is None else mask[:, q, m]
        for axis, (a, b) in enumerate(zip(k, start, strict=True)):
            weights = weights * (1 - (a - (b + moves[:, q, m, axis])).abs()).clamp(min=0)
        return weights if padded is None else weights.masked_fill(padded[k], 0)

    return _convolution(x, weight, bias, attention, stride=stride, dilation=dilation, padding=padding, causal=causal)


@dataclass(frozen=True)
class DynamicParameters:
    """The learnable matrices and vectors of Eq. 5 to 7 and of the gated linear unit before them.

    Matrices have the layout of `torch.nn.Linear`, `[out, in]`.

    Attributes:
        input_weight: To value and gate of the gated linear unit, in this order, `[2 dim, dim]`.
        input_bias: Of these, `[2 dim]`.
        kernel_weight: d_{j,g}, `[groups * N_k, dim]`: the taps j of the first group, then those of the next. Taps of a
            map go row by row.
        out_weight: W, whose columns are the W_c of Eq. 5, `[dim, dim]`.
        out_bias: Added to every output, `[dim]`. The paper has none; Wu et al. (2019) do.
        conv_bias: Added before W, `[dim]`; None, as in the paper, for none.
    """

    input_weight: Tensor
    input_bias: Tensor
    kernel_weight: Tensor
    out_weight: Tensor
    out_bias: Tensor
    conv_bias: Tensor | None = None


def dynamic_convolution(
    x: Tensor,
    parameters: DynamicParameters,
    *,
    groups: int,
    kernel_size: int,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    weight_softmax: bool = True,
    renorm_padding: bool = False,
) -> Tensor:
    """Dynamic convolution as attention, Eq. 5 to 7: every channel a head, A_c(q, k) the weight of the tap at k - q.

    The x of these equations is the output of the gated linear unit, for the keys and for the query that predicts the
    kernel. Taps without a key still count in the normalisation, unless `renorm_padding` is set.

    Args:
        x: Input of the gated linear unit, `[B, L, dim]` or `[B, dim, H, W]`.
        parameters: The learnable matrices and vectors.
        groups: N_g, the number of groups of channels that share a kernel.
        kernel_size: n_k; there are n_k taps in a sentence, n_k^2 in a map.
        causal: The last tap is at the query, the others before it; else the middle one is.
        key_padding_mask: True where a key is padding and so not in Omega_q, `[B, L]` or `[B, H, W]`.
        weight_softmax: Normalise the kernels by a softmax (Eq. 7); else they are d^T x.
        renorm_padding: Normalise over the taps with a key only.

    Returns:
        y in the shape of `x`.
    """
    inputs, positions = _elements(x)
    if x.numel() == 0:
        return x.clone()
    dim = inputs[0].shape[-1]
    contents = []
    for x_q in inputs:
        value, gate = (x_q @ parameters.input_weight.T + parameters.input_bias).chunk(2, dim=-1)
        contents.append(value * torch.sigmoid(gate))
    keys = dict(zip(positions, contents, strict=True))
    present = {k: x.new_ones(x.shape[0]) for k in positions}
    if key_padding_mask is not None:
        for k, padded in zip(positions, key_padding_mask.flatten(1).unbind(1), strict=True):
            keys[k] = keys[k].masked_fill(padded[:, None], 0)
            present[k] = present[k].masked_fill(padded, 0)

    first = 1 - kernel_size if causal else -(kernel_size // 2)
    taps = [p[::-1] for p in itertools.product(range(first, first + kernel_size), repeat=len(x.shape) - 2)]
    outputs = []
    for q, x_q in zip(positions, contents, strict=True):
        # Eq. 6 and 7: one kernel for each group.
        kernels = []
        for d_g in parameters.kernel_weight.chunk(groups):
            logits = [x_q @ d_jg for d_jg in d_g]
            if not weight_softmax:
                kernels.append(logits)
                continue
            exponentials = [torch.exp(logit) for logit in logits]
            if renorm_padding:
                tap_positions = [tuple(a + b for a, b in zip(q, p_j, strict=True)) for p_j in taps]
                absent = x.new_zeros(x.shape[0])
                exponentials = [e * present.get(k, absent) for e, k in zip(exponentials, tap_positions, strict=True)]
            total = torch.stack(exponentials).sum(0)
            total = total + (total == 0)  # avoids 0 / 0 without any key
            kernels.append([exponential / total for exponential in exponentials])
        y = parameters.out_bias.expand(x.shape[0], -1)
        for c in range(1, dim + 1):
            g = math.ceil(c / (dim / groups))
            pooled = x.new_zeros(x.shape[0])
            for p_j, weight in zip(taps, kernels[g - 1], strict=True):
                k = tuple(a + b for a, b in zip(q, p_j, strict=True))
                if k in keys:
                    pooled = pooled + weight * keys[k][:, c - 1]
            if parameters.conv_bias is not None:
                pooled = pooled + parameters.conv_bias[c - 1]
            y = y + pooled[:, None] * parameters.out_weight[:, c - 1]
        outputs.append(y)
    result = torch.stack(outputs, dim=-1)
    return result.reshape(x.shape) if x.dim() == 4 else result.transpose(1, 2)

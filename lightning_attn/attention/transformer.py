"""Transformer attention of Eq. 2 with the four switchable terms of Eq. 8."""

import math
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_attn.attention.algorithms import AttentionInputs, AttentionProblem, select_algorithm
from lightning_attn.attention.cpu.linear import linear
from lightning_attn.attention.decoding import AttentionCache
from lightning_attn.attention.energies import Energies
from lightning_attn.attention.layout import Layout, masked_softmax
from lightning_attn.attention.positions import computation_dtype, relative_encoding
from lightning_attn.attention.projections import (
    has_autocast,
    has_only_weight,
    is_plain,
    project,
    project_map,
    without_autocast,
)
from lightning_attn.attention.spec import TERM_NAMES, AlgorithmName, AttentionSpec, parse_terms
from lightning_attn.attention.transforms import is_exporting, is_transformed
from lightning_attn.errors import InputError
from lightning_attn.validation import (
    check_input,
    check_mask,
    divisors,
    require_bool,
    require_int,
    require_mask,
    require_ndim,
)


class TransformerAttention(nn.Module):
    """Multi-head attention whose weights are a softmax over any of the energies E1 to E4 (Eq. 2 and 8).

    Parameters exist only if a term that is on needs them, so that every parameter gets a gradient: `query_proj` (U;
    E1, E2), `key_proj` (V^C; E1, E3), `position_proj` (V^R; E2, E4), `key_bias` (u `[M, d]`; E3), `position_bias`
    (v `[M, d]`; E4), and always `value_proj` (W') and `out_proj` (W).

    In two dimensions R is the encoding of x followed by that of y, each of width `dim / 2`, and E2 and E4 are divided
    by sqrt(2), as in the authors' released code.

    Projections may be replaced, wrapped, parametrised or hooked (adapters, quantisation, pruning, spectral norm): such
    a layer is called, once in each pass. `position_proj` must be affine in a map, where it is applied by axis.

    Dtypes: projections have the dtype of autocast if that is on, else that of the module. Energies, softmax and sums
    are float32 (float64 for float64), except in torch's fused kernels, which multiply in the dtype of the projections
    and accumulate in float32. Encodings of positions are float32. The output has the dtype of `out_proj`'s output.

    Args:
        dim: Width C of queries, keys and output.
        num_heads: Number of heads M; divides `dim`.
        terms: Which of E1, E2, E3, E4 are on, such as `"0110"`.
        ndim: 1 for sequences `[B, L, C]`, 2 for maps `[B, C, H, W]`.
        window: Odd n_k: keys come from the n_k (x n_k) positions around the query only; of a map also `(n_y, n_x)`.
            None for all keys.
        kv_stride: Keys are taken at every `kv_stride`-th position along each axis.
        scale: Factor on all energies; the paper has none.
        dropout: Probability of dropping an attention weight in training.
        causal: Hide the keys that come after the query; in a map, in reading order.
        algorithm: The algorithm, which does not change the results. `"auto"` selects the fastest for the terms, the
            masks and the device; `lightning_attn.attention.algorithms` describes the others, and `"reference"` is the
            slow, literal form of the equations.
        device: Of the parameters, as in torch's modules.
        dtype: Of the parameters, as in torch's modules.

    Raises:
        ValueError: If an argument is out of range, or `dim` cannot be divided as the heads and the encoding need.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        terms: str = "1111",
        ndim: Literal[1, 2] = 1,
        window: int | tuple[int, int] | None = None,
        kv_stride: int = 1,
        scale: float = 1.0,
        dropout: float = 0.0,
        causal: bool = False,
        algorithm: AlgorithmName = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # The spec validates these values.
        spec = AttentionSpec(
            terms=terms,
            num_heads=num_heads,
            window=window,
            kv_stride=kv_stride,
            scale=scale,
            dropout=dropout,
            algorithm=algorithm,
        )
        self._build(spec, dim, ndim, causal, device, dtype)

    @classmethod
    def from_spec(cls, spec: AttentionSpec, dim: int, ndim: Literal[1, 2] = 1, causal: bool = False) -> Self:
        """The attention that a spec of `mechanism: transformer` describes; other arguments as in the constructor."""
        attention = cls.__new__(cls)
        attention._build(spec, dim, ndim, causal, None, None)
        return attention

    def _build(
        self,
        spec: AttentionSpec,
        dim: int,
        ndim: Literal[1, 2],
        causal: bool,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        num_heads = spec.num_heads
        require_int("dim", dim)
        require_ndim(ndim)
        require_bool("causal", causal)
        if isinstance(spec.window, tuple) and ndim == 1:
            raise InputError(f"window={spec.window!r} is for maps; for sentences (ndim=1) give one odd number.")
        if dim % num_heads:
            raise InputError(
                f"dim={dim} cannot be divided among num_heads={num_heads}: use a number of heads in {divisors(dim)}, "
                f"or a width that is a multiple of {num_heads}."
            )
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.terms, self.ndim, self.window, self.kv_stride = spec.terms, ndim, spec.window, spec.kv_stride
        self.scale, self.dropout, self.causal, self.algorithm = spec.scale, spec.dropout, causal, spec.algorithm

        e1, e2, e3, e4 = parse_terms(spec.terms)
        if (e2 or e4) and dim % (2 * ndim):
            raise InputError(
                f"dim={dim} cannot hold sine and cosine of {ndim} axis/axes: E2 and E4 need a multiple of {2 * ndim}."
            )

        def projection(bias: bool = False) -> nn.Linear:
            return nn.Linear(dim, dim, bias=bias, device=device, dtype=dtype)

        if e1 or e2:
            self.query_proj = projection()
        if e1 or e3:
            self.key_proj = projection()
        if e2 or e4:
            self.position_proj = projection()
        self.value_proj = projection()
        self.out_proj = projection(bias=True)
        for name, on in (("key_bias", e3), ("position_bias", e4)):
            if on:
                vectors = torch.empty(num_heads, self.head_dim, device=device, dtype=dtype)
                self.register_parameter(name, nn.Parameter(vectors))
        self.reset_parameters()

    key_bias: nn.Parameter
    position_bias: nn.Parameter

    def reset_parameters(self) -> None:
        """Xavier uniform projections; u and v uniform in +-1 / sqrt(2 d), as in the authors' released code."""
        for child in self.children():
            if isinstance(child, nn.Linear):
                nn.init.xavier_uniform_(child.weight)
        nn.init.zeros_(self.out_proj.bias)
        bound = 1 / math.sqrt(2 * self.head_dim)
        for name in ("key_bias", "position_bias"):
            if hasattr(self, name):
                nn.init.uniform_(getattr(self, name), -bound, bound)

    @override
    def extra_repr(self) -> str:
        return (
            f"terms={self.terms!r}, num_heads={self.num_heads}, ndim={self.ndim}, window={self.window}, "
            f"kv_stride={self.kv_stride}, scale={self.scale:g}, dropout={self.dropout:g}, causal={self.causal}, "
            f"algorithm={self.algorithm!r}"
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        causal: bool | None = None,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """Attends from every query to the keys.

        Args:
            query: `[B, L, C]` or `[B, C, H, W]`.
            key: Another set of the same rank, for encoder-decoder attention; None for self-attention.
            value: Input of the value projection, in the shape of the keys; None for the keys.
            key_padding_mask: Bool, `[B, L_k]` or `[B, H_k, W_k]`, True where a key is padding. The content of padding,
                even NaN, is never read: neither as key nor, in self-attention, as query, where it counts as zero.
            attention_mask: Bool, `[N_q, N_k]`, `[B, N_q, N_k]` or `[B, M or 1, N_q, N_k]`, True where a key is hidden
                from a query; combined with the other masks. Queries and keys of maps are numbered row by row, keys
                before `kv_stride`. It excludes the fastest algorithms, which need no mask of pairs.
            causal: Overrides the constructor's value.
            cache: From `new_cache`; the queries are then the next ones of a sequence that is decoded step by step,
                without gradients and without dropout.

        Returns:
            Same shape as `query`. A query that sees no key gets the bias of `out_proj`.

        Raises:
            ValueError: If a shape or dtype does not fit; the message names the argument.
        """
        if causal is not None:
            require_bool("causal", causal)
        causal = self.causal if causal is None else causal
        if cache is not None:
            if key is not None or value is not None or key_padding_mask is not None or attention_mask is not None:
                raise ValueError(
                    "cache: its keys and mask are fixed by new_cache(); pass no key or key_padding_mask, no value "
                    "and no attention_mask."
                )
            check_input("query", query, self.ndim, self.dim)
            if not isinstance(cache, AttentionCache):
                raise TypeError(f"cache: it must come from new_cache() of this module, got a {type(cache).__name__}.")
            return cache.decode_step(query, causal, owner=self)
        dropout = self.dropout if self.training else 0.0
        inputs = self._inputs(query, key, value, key_padding_mask, attention_mask, causal, dropout)
        layout, batch = inputs.layout, query.shape[0]
        if 0 in (batch, layout.num_queries, layout.num_keys):
            value = inputs.projected_value()
            attended = value.new_zeros(batch, self.num_heads, layout.num_queries, self.head_dim)
            # Zero gradients instead of none: DistributedDataParallel waits for every parameter.
            attended = attended + 0.0 * torch.stack([parameter.sum() for parameter in self.parameters()]).sum()
        else:
            attended = select_algorithm(self.algorithm, self._problem(inputs)).compute(inputs)
        return self._output(attended, query)

    def energies(
        self, query: Tensor, key: Tensor | None = None, *, rows: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Each term's energy by name, `[B, M, N_q, N_k]`, for the terms that are on, in the order E1 to E4.

        N_k counts the keys after subsampling by `kv_stride`. `weights` is the softmax of their sum after masking.

        Args:
            query: As in `forward`.
            key: As in `forward`.
            rows: `(start, stop)`: only these queries, numbered row by row in a map; None for all.
        """
        inputs = self._inputs(query, key)
        span = _row_range(rows, inputs.layout.num_queries)
        result = {}
        for index, (name, on) in enumerate(zip(TERM_NAMES, parse_terms(self.terms), strict=True)):
            if on:
                only = "".join("1" if i == index else "0" for i in range(len(TERM_NAMES)))
                result[name] = inputs.energies(only).rows(*span).expand(len(query), -1, -1, -1)
        return result

    def weights(
        self,
        query: Tensor,
        key: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        causal: bool | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        """The attention weights, `[B, M, N_q, N_k]`, without dropout; arguments as in `forward` and `energies`."""
        causal = self.causal if causal is None else causal
        inputs = self._inputs(query, key, None, key_padding_mask, attention_mask, causal)
        span = _row_range(rows, inputs.layout.num_queries)
        weights = masked_softmax(inputs.energies().rows(*span), inputs.hidden(*span))
        return weights.expand(len(query), -1, -1, -1)

    def new_cache(self, memory: Tensor | None = None, key_padding_mask: Tensor | None = None) -> AttentionCache:
        """Creates a cache for decoding step by step, with the same results as the full pass.

        It holds the parameters, which must not change while it is in use.

        Args:
            memory: `[B, L_k, C]`, the fixed keys of encoder-decoder attention; None for causal self-attention, whose
                keys are the queries seen so far.
            key_padding_mask: `[B, L_k]`, True where `memory` is padding.

        Raises:
            ValueError: For two-dimensional attention, which is not decoded step by step, and for self-attention that is
                not causal, whose outputs depend on later tokens.
        """
        if self.ndim != 1:
            raise ValueError("new_cache: only sequences (ndim=1) are decoded step by step.")
        if memory is None and key_padding_mask is not None:
            raise ValueError("new_cache: key_padding_mask is for memory; pass both, or neither.")
        if memory is None and not self.causal:
            raise ValueError(
                "new_cache: only causal self-attention can be decoded step by step: build the attention with "
                "causal=True, or pass the memory that it attends to."
            )
        if memory is not None:
            check_input("memory", memory, self.ndim, self.dim)
            check_mask(key_padding_mask, memory, "the keys")
        return AttentionCache(self, memory, key_padding_mask)

    # --- For the algorithms ------------------------------------------------------------------------------------------

    def project_energies(self, query: Tensor, key: Tensor, layout: Layout, terms: str) -> Energies:
        """The parts of the energies of `terms`, a subset of the terms that are on.

        Args:
            query: Contents, `[B, N_q, C]` of sentences, `[B, C, N_q]` of maps.
            key: Contents of the subsampled keys, in the same layout.
            layout: The grids.
            terms: Four bits.
        """
        e1, e2, e3, e4 = parse_terms(terms)
        key_energy = projected_key = content_query = position_query = relative_keys = None
        if e1:
            projected_key = self.project_heads(self.key_proj, key)
        elif e3:
            key_energy = self.key_energy(key)
        projected = self.project_heads(self.query_proj, query) if e1 or e2 else None
        if projected is not None and self.scale != 1.0:
            projected = projected * self.scale
        if e1 and projected is not None:
            content_query = projected + self._by_head(self.key_bias, projected) if e3 else projected
        if e2 and projected is not None:
            position_query = projected + self._by_head(self.position_bias, projected) if e4 else projected
        elif e4:
            position_query = self._by_head(self.position_bias, self.position_bias)
        if e2 or e4:
            relative_keys = self._relative_keys(layout, query.device)
        is_linear = not (e2 or e4) or has_only_weight(self.position_proj)
        return Energies(content_query, projected_key, key_energy, position_query, relative_keys, layout, is_linear)

    def project_heads(self, projection: nn.Module, x: Tensor) -> Tensor:
        """Projects `[B, N, C]` of a sentence or `[B, C, N]` of a map to `[B, M, N, d]`, in the memory layout of `x`."""
        axis = 2 if self.ndim == 1 else 1
        projected = project(projection, x) if self.ndim == 1 else project_map(projection, x)
        if projected.shape[axis] != self.dim:
            name = next((name for name, child in self.named_children() if child is projection), "a projection")
            raise ValueError(
                f"{name} returns {projected.shape[axis]} features, but dim={self.dim}: a layer that replaces it must "
                "return dim features."
            )
        heads = torch.unflatten(projected, axis, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2) if self.ndim == 1 else heads.transpose(2, 3)

    def key_energy(self, key: Tensor) -> Tensor:
        """E3 of every key, `[B, M, N_k]`, float32 or better."""
        if not has_only_weight(self.key_proj):
            projected = self.project_heads(self.key_proj, key)
            with without_autocast(key.device):
                bias = self._by_head(self.key_bias, projected)
                return (projected * bias).to(computation_dtype(projected)).sum(dim=-1)
        with without_autocast(key.device):
            saliency = self.saliency()  # instead of projecting the keys
            key = key.to(saliency.dtype)
            if self.ndim == 1:
                return torch.matmul(key, saliency.T).transpose(1, 2)
            return torch.matmul(saliency, key)

    def saliency(self) -> Tensor:
        """u^T V^C of a plain `key_proj`, whose product with a key is E3, `[M, C]`, float32 or better."""
        dtype = computation_dtype(self.key_bias)
        weight = torch.unflatten(self.key_proj.weight.to(dtype), 0, (self.num_heads, self.head_dim))
        bias = self.key_bias if self.scale == 1.0 else self.key_bias * self.scale
        return torch.einsum("md,mdc->mc", bias.to(dtype), weight)

    def project_value(self, content: Tensor) -> Tensor:
        """W' x_k of contents `[B, N_k, C]` or `[B, C, N_k]`, `[B, M, N_k, d]`."""
        return self.project_heads(self.value_proj, content)

    def pool_value(self, content: Tensor, weights: Tensor) -> Tensor:
        """The sums of W' x_k over the keys with weights `[B, M, N_k]`, `[B, M, 1, d]`; pooled first if possible."""
        if not has_only_weight(self.value_proj):
            return weights.unsqueeze(2).to(content.dtype) @ self.project_value(content)
        content = content if self.ndim == 1 else content.transpose(1, 2)
        means = torch.bmm(weights.to(content.dtype), content)  # [B, M, C]
        weight = torch.unflatten(self.value_proj.weight, 0, (self.num_heads, self.head_dim))
        return torch.bmm(means.transpose(0, 1), weight.transpose(1, 2).to(means.dtype)).transpose(0, 1).unsqueeze(2)

    def relative_keys_of(self, lowest: int, count: int, device: torch.device) -> Tensor:
        """V^R R for `count` offsets from `lowest` upwards in a sentence, `[count, M, d]`, float32 or better."""
        return self._project_positions(self._encoding(lowest, count, self.dim, device))

    # --- Parts of the forward pass -----------------------------------------------------------------------------------

    def _inputs(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> AttentionInputs:
        """The checked arguments of a pass, with padding set to zero."""
        keys = query if key is None else key
        check_input("query", query, self.ndim, self.dim)
        check_input("key", keys, self.ndim, self.dim)
        if keys.shape[0] != query.shape[0]:
            raise ValueError(f"key has batch size {keys.shape[0]}, query has {query.shape[0]}: they must be equal.")
        check_mask(key_padding_mask, keys, "the keys")
        if value is not None:
            check_input("value", value, self.ndim, self.dim)
            if value.shape != keys.shape:
                raise ValueError(
                    f"value must have the shape {tuple(keys.shape)} of the keys, got {tuple(value.shape)}."
                )
        self._check_dtypes(query=query, key=keys, value=value)
        if key_padding_mask is not None:
            padding = key_padding_mask.unsqueeze(2 if self.ndim == 1 else 1)
            keys = keys.masked_fill(padding, 0.0)
            value = None if value is None else value.masked_fill(padding, 0.0)
            query = keys if key is None else query
        if attention_mask is not None:
            attention_mask = self._checked_attention_mask(attention_mask, query, keys)
        layout = self._layout(query, keys, causal)
        values = keys if value is None else value
        return AttentionInputs(self, query, keys, values, layout, key_padding_mask, attention_mask, dropout)

    def _check_dtypes(self, **inputs: Tensor | None) -> None:
        """Raises an error that names the argument if plain projections cannot multiply its dtype."""
        weight_dtype = self.value_proj.weight.dtype if is_plain(self.value_proj) else None
        for name, x in inputs.items():
            if x is None or weight_dtype is None or x.dtype == weight_dtype:
                continue
            if _is_autocast(x.device.type) and torch.float64 not in (x.dtype, weight_dtype):  # not cast by autocast
                continue
            raise ValueError(
                f"{name} is {x.dtype}, but the module's parameters are {weight_dtype}: convert one of them, or compute "
                "under torch.autocast."
            )

    def _checked_attention_mask(self, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The mask as `[B or 1, M or 1, N_q, N_k]`."""
        require_mask("attention_mask", mask, "hidden")
        pairs = tuple(math.prod(self._sizes(x)) for x in (query, key))
        shapes = [pairs, (len(query), *pairs), *((len(query), heads, *pairs) for heads in (1, self.num_heads))]
        if tuple(mask.shape) not in shapes:
            raise ValueError(
                f"attention_mask must have one of the shapes {', '.join(map(str, shapes))} "
                f"([N_q, N_k], [B, N_q, N_k], [B, 1 or M, N_q, N_k]), got {tuple(mask.shape)}."
            )
        return mask if mask.dim() == 4 else mask.view(len(mask) if mask.dim() == 3 else 1, 1, *pairs)

    def _sizes(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns; a sentence is one row."""
        return (1, x.shape[1]) if self.ndim == 1 else (x.shape[2], x.shape[3])

    def _layout(self, query: Tensor, key: Tensor, causal: bool) -> Layout:
        stride = self.kv_stride
        rows, columns = self._sizes(key)
        key_sizes = (-(-rows // stride) if self.ndim == 2 else 1, -(-columns // stride))
        window = (self.window, self.window) if isinstance(self.window, int) else self.window
        return Layout(self._sizes(query), key_sizes, stride, causal, window)

    def _problem(self, inputs: AttentionInputs) -> AttentionProblem:
        return AttentionProblem(
            terms=self.terms,
            ndim=self.ndim,
            layout=inputs.layout,
            pairs=inputs.query.shape[0] * self.num_heads,
            device=inputs.query.device.type,
            dtype=_projected_dtype(inputs.query),
            padded=inputs.key_padding_mask is not None,
            masked=inputs.attention_mask is not None,
            dropout=inputs.dropout,
            transformed=is_transformed(),
            exported=is_exporting(),
            plain_projections=all(is_plain(child) for child in self.children()),
        )

    def _by_head(self, bias: Tensor, like: Tensor) -> Tensor:
        """The bias u or v of every head times `scale`, `[1, M, 1, d]`, in the dtype of `like`."""
        scaled = bias if self.scale == 1.0 else bias * self.scale
        return scaled[None, :, None].to(like.dtype)

    def _relative_keys(self, layout: Layout, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """V^R R by axis for the offsets of `layout.offset_range` and one more, `[offsets, M, d]`, float32 or better."""
        (lowest_y, count_y), (lowest_x, count_x) = (layout.offset_range(axis) for axis in (0, 1))
        if self.ndim == 1:
            return None, self.relative_keys_of(lowest_x, count_x + 1, device)
        # x is the first half of the encoding. The energy of both axes is the sum of those of each axis alone, minus
        # that of a zero encoding, which is zero unless the layer has a bias.
        half = self.dim // 2
        along_x = F.pad(self._encoding(lowest_x, count_x + 1, half, device), (0, half))
        along_y = F.pad(self._encoding(lowest_y, count_y + 1, half, device), (half, 0))
        zero = along_x.new_zeros(1, self.dim)
        # The factor is that of the released code.
        projected = self._project_positions(torch.cat((along_x, along_y, zero))) / math.sqrt(2)
        keys_x, keys_y, bias = torch.split(projected, [count_x + 1, count_y + 1, 1])
        has_no_bias = is_plain(self.position_proj) and self.position_proj.bias is None
        return keys_y if has_no_bias else keys_y - bias, keys_x

    def _encoding(self, lowest: int, count: int, features: int, device: torch.device) -> Tensor:
        """R for `count` offsets from `lowest` upwards along one axis, `[count, features]`, float32 or better."""
        dtype = computation_dtype(_dtype_of(self.position_proj))
        return relative_encoding(torch.arange(lowest, lowest + count, device=device, dtype=dtype), features)

    def _project_positions(self, encoding: Tensor) -> Tensor:
        """V^R R of `[offsets, C]`, `[offsets, M, d]`."""
        layer = self.position_proj
        with without_autocast(encoding.device):
            if is_plain(layer):  # in float32 or better even if the weights are not
                bias = None if layer.bias is None else layer.bias.to(encoding.dtype)
                projected = linear(encoding, layer.weight.to(encoding.dtype), bias)
            else:
                projected = layer(encoding.to(_dtype_of(layer))).to(encoding.dtype)
        return torch.unflatten(projected, 1, (self.num_heads, self.head_dim))

    def _output(self, attended: Tensor, query: Tensor) -> Tensor:
        """Concatenates the heads `[B, M, N_q or 1, d]` and applies W."""
        if self.ndim == 1:
            out = project(self.out_proj, attended.transpose(1, 2).flatten(2))
            return out if out.shape[1] == query.shape[1] else out.expand(-1, query.shape[1], -1).contiguous()
        if attended.stride(-1) == 1:  # contiguous features, or contiguous positions
            joined = attended.transpose(1, 2).flatten(2).transpose(1, 2)
        else:
            joined = attended.transpose(2, 3).flatten(1, 2)
        out = project_map(self.out_proj, joined).contiguous()
        if out.shape[2] != query.shape[2] * query.shape[3]:
            return out.unsqueeze(-1).expand(-1, -1, *query.shape[2:]).contiguous()
        return torch.unflatten(out, 2, query.shape[2:])


def _projected_dtype(x: Tensor) -> torch.dtype:
    """The output dtype of linear layers: autocast's, or that of their input."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if _is_autocast(device) else x.dtype


def _is_autocast(device: str) -> bool:
    return has_autocast(device) and torch.is_autocast_enabled(device)


def _dtype_of(layer: nn.Module) -> torch.dtype:
    """The dtype that a layer computes in: that of its first floating-point parameter."""
    found = (parameter.dtype for parameter in layer.parameters() if parameter.is_floating_point())
    return next(found, torch.get_default_dtype())


def _row_range(rows: tuple[int, int] | None, num_queries: int) -> tuple[int, int]:
    start, stop = (0, num_queries) if rows is None else rows
    if not 0 <= start <= stop <= num_queries:
        raise ValueError(f"rows={rows} must be (start, stop) with 0 <= start <= stop <= {num_queries}, the queries.")
    return start, stop

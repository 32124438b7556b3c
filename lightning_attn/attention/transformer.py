"""Transformer attention of Eq. 2 with the four switchable terms of Eq. 8."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_attn.attention import definition
from lightning_attn.attention.algorithms import (
    Algorithm,
    Projected,
    attend,
    choose,
    energy_rows,
    pooled,
    unfit,
    weight_rows,
)
from lightning_attn.attention.cache import AttentionCache
from lightning_attn.attention.checks import check_input, check_mask, divisors, require_ndim
from lightning_attn.attention.linear import Linear
from lightning_attn.attention.positions import computation_dtype, relative_encoding
from lightning_attn.attention.spec import TERM_NAMES, AttentionSpec, parse_terms
from lightning_attn.attention.tiled import Layout


class TransformerAttention(nn.Module):
    """Multi-head attention whose weights are a softmax over any of the energies E1 to E4 (Eq. 2 and 8).

    Parameters exist only if a term that is on needs them, so that every parameter gets a gradient: `query_proj` (U;
    E1, E2), `key_proj` (V^C; E1, E3), `position_proj` (V^R; E2, E4), `key_bias` (u `[M, d]`; E3), `position_bias`
    (v `[M, d]`; E4), and always `value_proj` (W') and `out_proj` (W).

    In two dimensions R is the encoding of x followed by that of y, each of width `dim / 2`, and E2 and E4 are divided
    by sqrt(2), as in the authors' released code.

    Args:
        dim: Width C of queries, keys and output.
        num_heads: Number of heads M; divides `dim`.
        terms: Which of E1, E2, E3, E4 are on, such as `"0110"`.
        ndim: 1 for sequences `[B, L, C]`, 2 for maps `[B, C, H, W]`.
        window: Odd n_k: keys come from the n_k (x n_k) positions around the query only; None for all.
        kv_stride: Keys are taken at every `kv_stride`-th position along each axis.
        scale: Factor on all energies; the paper has none.
        dropout: Probability of dropping an attention weight in training.
        causal: Hide the keys that come after the query; in a map, in reading order.
        algorithm: How it is computed; all ways give the same numbers. `"auto"` takes what is fastest for the terms, the
            masks and the device; `lightning_attn.attention.algorithms` describes the others, and `"definition"` is
            the slow text of the equations.

    Raises:
        ValueError: If an argument is out of range, or `dim` cannot be divided as the heads and the encoding need.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        terms: str = "1111",
        ndim: Literal[1, 2] = 1,
        window: int | None = None,
        kv_stride: int = 1,
        scale: float = 1.0,
        dropout: float = 0.0,
        causal: bool = False,
        algorithm: Algorithm = "auto",
    ) -> None:
        super().__init__()
        # The spec holds the rules for these values; one place says what is allowed.
        AttentionSpec(
            terms=terms,
            num_heads=num_heads,
            window=window,
            kv_stride=kv_stride,
            scale=scale,
            dropout=dropout,
            algorithm=algorithm,
        )
        require_ndim(ndim)
        if dim < 1 or dim % num_heads:
            raise ValueError(
                f"dim={dim} cannot be divided among num_heads={num_heads}: use a number of heads in {divisors(dim)}, "
                f"or a width that is a multiple of {num_heads}."
            )
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.terms, self.ndim, self.window, self.kv_stride = terms, ndim, window, kv_stride
        self.scale, self.dropout, self.causal, self.algorithm = scale, dropout, causal, algorithm

        e1, e2, e3, e4 = parse_terms(terms)
        if (e2 or e4) and dim % (2 * ndim):
            raise ValueError(
                f"dim={dim} cannot hold sine and cosine of {ndim} axis/axes: E2 and E4 need a multiple of {2 * ndim}."
            )
        if e1 or e2:
            self.query_proj = Linear(dim, dim, bias=False)
        if e1 or e3:
            self.key_proj = Linear(dim, dim, bias=False)
        if e2 or e4:
            self.position_proj = Linear(dim, dim, bias=False)
        self.value_proj = Linear(dim, dim, bias=False)
        self.out_proj = Linear(dim, dim)
        if e3:
            self.key_bias = nn.Parameter(torch.empty(num_heads, self.head_dim))
        if e4:
            self.position_bias = nn.Parameter(torch.empty(num_heads, self.head_dim))
        self.reset_parameters()

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

    def extra_repr(self) -> str:
        """The settings that the parameters do not show."""
        return (
            f"terms={self.terms!r}, num_heads={self.num_heads}, ndim={self.ndim}, window={self.window}, "
            f"kv_stride={self.kv_stride}, scale={self.scale:g}, dropout={self.dropout:g}, causal={self.causal}, "
            f"algorithm={self.algorithm!r}"
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        causal: bool | None = None,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """Attends from every query to the keys.

        Args:
            query: `[B, L, C]` or `[B, C, H, W]`.
            key: Another set of the same rank, for encoder-decoder attention; None for self-attention.
            key_padding_mask: Bool, `[B, L_k]` or `[B, H_k, W_k]`, True where a key is padding.
            causal: Overrides the constructor's value.
            cache: From `new_cache`; the queries are then the next ones of a sequence that is decoded step by step,
                without gradients and without dropout.

        Returns:
            Same shape as `query`. A query that sees no key gets the bias of `out_proj`.

        Raises:
            ValueError: If a shape or dtype does not fit; the message names the argument.
        """
        causal = self.causal if causal is None else causal
        if cache is not None:
            if key is not None or key_padding_mask is not None:
                raise ValueError(
                    "cache: its keys and mask are those it was made with; pass no key or key_padding_mask."
                )
            check_input("query", query, self.ndim, self.dim)
            return cache.attend(query, causal)
        dropout = self.dropout if self.training else 0.0
        keys = query if key is None else key
        self._check(query, keys, key_padding_mask)
        layout = self._layout(query, keys, causal)
        algorithm = self._choose(layout, key_padding_mask is not None, dropout, query.device)
        if algorithm == "definition":
            return self._define(query, keys, key_padding_mask, causal)
        if algorithm == "pooled":
            return self._pool(query, keys, key_padding_mask)
        projected = self._project(query, keys, key_padding_mask, layout, self.terms)
        return self._output(attend(projected, algorithm, dropout), query)

    def energies(
        self, query: Tensor, key: Tensor | None = None, *, rows: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Each term's energy by name, `[B, M, N_q, N_k]`, for the terms that are on, in the order E1 to E4.

        N_k counts the keys that `kv_stride` leaves. Their sum, after masking and softmax, is `weights`.

        Args:
            query: As in `forward`.
            key: As in `forward`.
            rows: `(start, stop)`: only these queries, numbered row by row in a map; None for all.
        """
        result = {}
        keys = query if key is None else key
        self._check(query, keys, None)
        layout = self._layout(query, keys, False)
        for index, (name, on) in enumerate(zip(TERM_NAMES, parse_terms(self.terms), strict=True)):
            if not on:
                continue
            only = "".join("1" if i == index else "0" for i in range(len(TERM_NAMES)))
            projected = self._project(query, keys, None, layout, only)
            result[name] = energy_rows(projected, *_row_range(rows, layout.num_queries))
        return result

    def weights(
        self,
        query: Tensor,
        key: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        causal: bool | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        """The normalised map, `[B, M, N_q, N_k]`, without dropout; arguments as in `forward` and `energies`."""
        keys = query if key is None else key
        self._check(query, keys, key_padding_mask)
        layout = self._layout(query, keys, self.causal if causal is None else causal)
        projected = self._project(query, keys, key_padding_mask, layout, self.terms)
        return weight_rows(projected, *_row_range(rows, layout.num_queries))

    def new_cache(self, memory: Tensor | None = None, key_padding_mask: Tensor | None = None) -> AttentionCache:
        """A cache for decoding step by step, which gives the numbers of the full pass. It holds the parameters too.

        Args:
            memory: `[B, L_k, C]`, the fixed keys of encoder-decoder attention; None for causal self-attention, whose
                keys are the queries seen so far.
            key_padding_mask: `[B, L_k]`, True where `memory` is padding.

        Raises:
            ValueError: For two-dimensional attention, which is not decoded step by step.
        """
        if self.ndim != 1:
            raise ValueError("new_cache: only sequences (ndim=1) are decoded step by step.")
        if memory is None and key_padding_mask is not None:
            raise ValueError("new_cache: key_padding_mask is for memory; pass both, or neither.")
        if memory is not None:
            check_input("memory", memory, self.ndim, self.dim)
            check_mask(key_padding_mask, memory, "the keys")
        return AttentionCache(self, memory, key_padding_mask)

    def _check(self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None) -> None:
        check_input("query", query, self.ndim, self.dim)
        check_input("key", key, self.ndim, self.dim)
        if key.shape[0] != query.shape[0]:
            raise ValueError(f"key has batch size {key.shape[0]}, query has {query.shape[0]}: they must be equal.")
        check_mask(key_padding_mask, key, "the keys")

    def _sizes(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns; a sentence is one row."""
        return (1, x.shape[1]) if self.ndim == 1 else (x.shape[2], x.shape[3])

    def _layout(self, query: Tensor, key: Tensor, causal: bool) -> Layout:
        stride = self.kv_stride
        rows, columns = self._sizes(key)
        key_sizes = (-(-rows // stride) if self.ndim == 2 else 1, -(-columns // stride))
        return Layout(self._sizes(query), key_sizes, stride, causal, self.window)

    def _choose(self, layout: Layout, padded: bool, dropout: float, device: torch.device) -> Algorithm:
        if self.algorithm == "auto":
            return choose(self.terms, self.ndim, layout, padded, dropout, device)
        reason = unfit(self.algorithm, self.terms, self.ndim, layout, padded, dropout)
        if reason is not None:
            raise ValueError(
                f"algorithm={self.algorithm!r} cannot compute this attention: {reason}. "
                'Use "auto", which takes the fastest that can.'
            )
        return self.algorithm

    def _define(self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None, causal: bool) -> Tensor:
        """By the equations as written."""
        return definition.transformer_attention(
            query,
            key,
            definition.parameters_of(self),
            num_heads=self.num_heads,
            terms=self.terms,
            scale=self.scale,
            window=self.window,
            kv_stride=self.kv_stride,
            causal=causal,
            key_padding_mask=key_padding_mask,
        )

    def _pool(self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """E3 alone: one output vector for all queries, projected after the keys are pooled."""
        content, padding = self._keys(key, key_padding_mask)
        key_energy = self._key_energy(content)
        if self.ndim == 2:
            content = content.transpose(1, 2)
        if content.shape[1] == 0:
            means = content.new_zeros(content.shape[0], self.num_heads, self.dim)
        else:
            means = pooled(key_energy, padding, content)  # [B, M, C]
        value = torch.unflatten(self.value_proj.weight, 0, (self.num_heads, self.head_dim))
        heads = torch.bmm(means.transpose(0, 1), value.transpose(1, 2).to(means.dtype))  # [M, B, d]
        out: Tensor = self.out_proj(heads.transpose(0, 1).flatten(1))
        return (
            out.unsqueeze(1).expand(-1, query.shape[1], -1)
            if self.ndim == 1
            else out[..., None, None].expand(-1, -1, *query.shape[2:])
        )

    def _keys(self, key: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The keys that `kv_stride` leaves, `[B, N_k, C]` of a sentence, `[B, C, N_k]` of a map, and their padding."""
        stride = self.kv_stride
        if self.ndim == 1:
            return key[:, ::stride], None if key_padding_mask is None else key_padding_mask[:, ::stride]
        padding = None if key_padding_mask is None else key_padding_mask[:, ::stride, ::stride].flatten(1)
        return key[..., ::stride, ::stride].flatten(2), padding

    def _project(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        layout: Layout,
        terms: str,
    ) -> Projected:
        """Everything that the energies of `terms` (a part of the terms that are on) and the sums of values need."""
        e1, e2, e3, e4 = parse_terms(terms)
        key_energy = projected_key = None
        content, padding = self._keys(key, key_padding_mask)
        value = self._heads(self.value_proj, content)
        if e1:
            projected_key = self._heads(self.key_proj, content)
        elif e3:
            key_energy = self._key_energy(content)
        queries = query if self.ndim == 1 else query.flatten(2)
        projected_query = self._heads(self.query_proj, queries) if e1 or e2 else None
        if projected_query is not None and self.scale != 1.0:
            projected_query = projected_query * self.scale
        content_query = None
        if e1 and projected_query is not None:
            content_query = projected_query + self._scaled(self.key_bias)[:, None, None] if e3 else projected_query
        position_query = table_y = table_x = None
        if e2 or e4:
            if e4:
                position_query = self._scaled(self.position_bias)[:, None, None]
            if e2 and projected_query is not None:
                position_query = projected_query if position_query is None else projected_query + position_query
            table_y, table_x = self._tables(layout, query.device)
        return Projected(
            content_query=content_query,
            key=projected_key if e1 else None,
            key_energy=key_energy,
            position_query=position_query,
            table_y=table_y,
            table_x=table_x,
            value=value,
            padding=padding,
            layout=layout,
        )

    def _scaled(self, bias: Tensor) -> Tensor:
        """The bias u or v of every head, `[M, d]`, with the factor on all energies."""
        return bias if self.scale == 1.0 else bias * self.scale

    def _heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        """Projects `[B, N, C]` of a sentence or `[B, C, N]` of a map to `[M, B, N, d]`, in the memory layout of `x`."""
        if self.ndim == 1:
            return torch.unflatten(projection(x), -1, (self.num_heads, self.head_dim)).permute(2, 0, 1, 3)
        return torch.unflatten(_project_map(projection, x), 1, (self.num_heads, self.head_dim)).permute(1, 0, 3, 2)

    def _output(self, attended: Tensor, query: Tensor) -> Tensor:
        """Joins the heads `[M, B, N_q, d]` and applies W."""
        if self.ndim == 1:
            out: Tensor = self.out_proj(attended.permute(1, 2, 0, 3).flatten(2))
            return out
        joined = attended.permute(1, 0, 3, 2).flatten(1, 2)
        return torch.unflatten(_project_map(self.out_proj, joined), 2, query.shape[2:])

    def _key_energy(self, content: Tensor) -> Tensor:
        """E3 of every key, `[M, B, N_k]`: u^T V^C first, so that the keys are not projected; float32 or better."""
        dtype = computation_dtype(self.key_bias)
        with torch.autocast(content.device.type, enabled=False):
            weight = torch.unflatten(self.key_proj.weight.to(dtype), 0, (self.num_heads, self.head_dim))
            saliency = torch.einsum("md,mdc->mc", self._scaled(self.key_bias).to(dtype), weight)
            content = content.to(dtype)
            if self.ndim == 1:
                return torch.matmul(content, saliency.T).permute(2, 0, 1)
            return torch.bmm(saliency.expand(content.shape[0], -1, -1), content).transpose(0, 1)

    def _tables(self, layout: Layout, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """V^R R for every offset along y (maps only) and along x, each `[M, d, offsets]`, in float32 or better."""
        counts = [
            max(0, queries + (keys - 1) * layout.stride)
            for queries, keys in zip(layout.query_sizes, layout.key_sizes, strict=True)
        ]
        lowest = [1 - size for size in layout.query_sizes]
        weight = self.position_proj.weight
        if self.ndim == 1:
            return None, self._table(weight, lowest[1], counts[1], device)
        # x takes the first half of the encoding; the factor is that of the released code.
        weight_x, weight_y = (weight / math.sqrt(2)).chunk(2, dim=1)
        return (
            self._table(weight_y, lowest[0], counts[0], device),
            self._table(weight_x, lowest[1], counts[1], device),
        )

    def _table(self, weight: Tensor, lowest: int, count: int, device: torch.device) -> Tensor:
        """V^R R for `count` offsets from `lowest` upwards, `[M, d, count]`."""
        dtype = computation_dtype(weight)
        with torch.autocast(device.type, enabled=False):
            encoding = relative_encoding(
                torch.arange(lowest, lowest + count, device=device, dtype=dtype), weight.shape[1]
            )
            projected = torch.matmul(weight.to(dtype), encoding.T)
        return torch.unflatten(projected, 0, (self.num_heads, self.head_dim))


def _project_map(projection: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer over the features of a map, `[B, in, N]` to `[B, out, N]`, without moving them innermost."""
    # Of many features at few places a 1x1 convolution is up to a third faster than a product; of others it is slower.
    if x.numel() > 0 and x.shape[2] < 4 * x.shape[1]:
        return nn.functional.conv1d(x, projection.weight.unsqueeze(-1), projection.bias)
    out = torch.bmm(projection.weight.expand(x.shape[0], -1, -1), x)
    return out if projection.bias is None else out + projection.bias[:, None]


def _row_range(rows: tuple[int, int] | None, num_queries: int) -> tuple[int, int]:
    start, stop = (0, num_queries) if rows is None else rows
    if not 0 <= start <= stop <= num_queries:
        raise ValueError(f"rows={rows} must be (start, stop) with 0 <= start <= stop <= {num_queries}, the queries.")
    return start, stop

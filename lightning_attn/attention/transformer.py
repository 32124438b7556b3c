"""Transformer attention of Eq. 2 with the four switchable terms of Eq. 8."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_attn.attention.algorithms import (
    Energies,
    KeyMask,
    MapPosition,
    SequencePosition,
    attend,
    normalise,
)
from lightning_attn.attention.cache import AttentionCache
from lightning_attn.attention.positions import relative_encoding
from lightning_attn.attention.spec import TERM_NAMES, AttentionSpec, parse_terms


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
    ) -> None:
        super().__init__()
        # The spec holds the rules for these values; one place says what is allowed.
        AttentionSpec(
            terms=terms, num_heads=num_heads, window=window, kv_stride=kv_stride, scale=scale, dropout=dropout
        )
        if ndim not in (1, 2):
            raise ValueError(f"ndim must be 1 (sequences) or 2 (maps), got {ndim!r}.")
        if dim < 1 or dim % num_heads:
            divisors = [n for n in range(1, dim + 1) if dim % n == 0]
            raise ValueError(
                f"dim={dim} cannot be divided among num_heads={num_heads}: use a number of heads in {divisors}, "
                f"or a width that is a multiple of {num_heads}."
            )
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.terms, self.ndim, self.window, self.kv_stride = terms, ndim, window, kv_stride
        self.scale, self.dropout, self.causal = scale, dropout, causal

        e1, e2, e3, e4 = parse_terms(terms)
        if (e2 or e4) and dim % (2 * ndim):
            raise ValueError(
                f"dim={dim} cannot hold sine and cosine of {ndim} axis/axes: E2 and E4 need a multiple of {2 * ndim}."
            )
        if e1 or e2:
            self.query_proj = nn.Linear(dim, dim, bias=False)
        if e1 or e3:
            self.key_proj = nn.Linear(dim, dim, bias=False)
        if e2 or e4:
            self.position_proj = nn.Linear(dim, dim, bias=False)
        self.value_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim)
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
            f"kv_stride={self.kv_stride}, scale={self.scale:g}, dropout={self.dropout:g}, causal={self.causal}"
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
            cache: From `new_cache`; the queries are then the next ones of a sequence that is decoded step by step.

        Returns:
            Same shape as `query`. A query that sees no key gets the bias of `out_proj`.

        Raises:
            ValueError: If a shape or dtype does not fit; the message names the argument.
        """
        energies, mask, value = self._project(query, key, key_padding_mask, causal, cache, self.terms)
        attended = attend(energies, mask, value, self.dropout if self.training else 0.0)
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out if self.ndim == 1 else torch.unflatten(out.transpose(1, 2), 2, query.shape[2:])

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
        for index, (name, on) in enumerate(zip(TERM_NAMES, parse_terms(self.terms), strict=True)):
            if not on:
                continue
            only = "".join("1" if i == index else "0" for i in range(len(TERM_NAMES)))
            energies, _, value = self._project(query, key, None, False, None, only)
            start, stop = _row_range(rows, energies.num_queries)
            result[name] = energies.rows(start, stop).expand(*value.shape[:2], stop - start, value.shape[2])
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
        energies, mask, value = self._project(query, key, key_padding_mask, causal, None, self.terms)
        start, stop = _row_range(rows, energies.num_queries)
        weights = normalise(energies.rows(start, stop), mask.rows(start, stop))
        return weights.expand(*value.shape[:2], stop - start, value.shape[2])

    def new_cache(self, memory: Tensor | None = None, key_padding_mask: Tensor | None = None) -> AttentionCache:
        """A cache for decoding step by step, which gives the numbers of the full pass.

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
        cache = AttentionCache(is_memory=memory is not None)
        if memory is not None:
            self._check_input("memory", memory)
            self._check_mask(key_padding_mask, memory)
            cache.padding = None if key_padding_mask is None else key_padding_mask[:, :: self.kv_stride]
            cache.append(*self._project_keys(memory[:, :: self.kv_stride]))
        return cache

    def _project(
        self,
        query: Tensor,
        key: Tensor | None,
        key_padding_mask: Tensor | None,
        causal: bool | None,
        cache: AttentionCache | None,
        terms: str,
    ) -> tuple[Energies, KeyMask, Tensor]:
        """Energies of `terms` (a part of the terms that are on), mask and projected values."""
        self._check_input("query", query)
        first = 0  # position of the first query
        causal = self.causal if causal is None else causal
        if cache is not None:
            if key is not None or key_padding_mask is not None:
                raise ValueError(
                    "cache: its keys and mask are those it was made with; pass no key or key_padding_mask."
                )
            first = cache.length
            if cache.value is not None and cache.value.shape[0] != query.shape[0]:
                raise ValueError(
                    f"query has batch size {query.shape[0]}, the cache has {cache.value.shape[0]}: they must be equal."
                )
            projected_key, value, padding = self._extend_cache(cache, query)
            causal = causal or not cache.is_memory
            key_sizes: tuple[int, ...] = (value.shape[2],)
        else:
            key = query if key is None else key
            self._check_input("key", key)
            if key.shape[0] != query.shape[0]:
                raise ValueError(f"key has batch size {key.shape[0]}, query has {query.shape[0]}: they must be equal.")
            self._check_mask(key_padding_mask, key)
            stride = self.kv_stride
            if self.ndim == 1:
                key = key[:, ::stride]
                padding = None if key_padding_mask is None else key_padding_mask[:, ::stride]
                key_sizes = (key.shape[1],)
            else:
                key = key[..., ::stride, ::stride]
                padding = None if key_padding_mask is None else key_padding_mask[:, ::stride, ::stride].flatten(1)
                key_sizes = tuple(key.shape[2:])
                key = key.flatten(2).transpose(1, 2)
            projected_key, value = self._project_keys(key)

        query_sizes: tuple[int, ...]
        if self.ndim == 1:
            query_sizes = (query.shape[1],)
        else:
            query_sizes = tuple(query.shape[2:])
            query = query.flatten(2).transpose(1, 2)

        e1, e2, e3, e4 = parse_terms(terms)
        projected_query = self._split_heads(self.query_proj(query)) * self.scale if e1 or e2 else None
        content_query = key_energy = None
        if e1 and projected_query is not None:
            content_query = projected_query
            if e3:
                content_query = content_query + self._bias(self.key_bias)
        elif e3 and projected_key is not None:
            bias = self._bias(self.key_bias).to(projected_key.dtype)
            key_energy = torch.matmul(bias, projected_key.transpose(-1, -2))
        position: SequencePosition | MapPosition | None = None
        if e2 or e4:
            position_query = self._bias(self.position_bias)[None] if e4 else None
            if e2 and projected_query is not None:
                position_query = projected_query if position_query is None else projected_query + position_query
            assert position_query is not None, "E2 or E4 is on"
            if self.ndim == 1:
                position = self._sequence_position(position_query, first, query_sizes[0], key_sizes[0], cache)
            else:
                position = self._map_position(position_query, query_sizes, key_sizes)
        energies = Energies(
            content_query=content_query,
            key=projected_key if content_query is not None else None,
            key_energy=key_energy,
            position=position,
            num_queries=math.prod(query_sizes),
        )
        mask = KeyMask(
            padding=padding,
            query_positions=_grid(query_sizes, 1, first, query.device),
            key_positions=_grid(key_sizes, self.kv_stride, 0, query.device),
            causal=causal,
            window=self.window,
        )
        return energies, mask, value

    def _bias(self, bias: Tensor) -> Tensor:
        """The bias u or v as one scaled query row per head, `[M, 1, d]`."""
        return bias.unsqueeze(1) * self.scale

    def _split_heads(self, x: Tensor) -> Tensor:
        """`[B, N, C]` to `[B, M, N, d]`."""
        return torch.unflatten(x, -1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _project_keys(self, key: Tensor) -> tuple[Tensor | None, Tensor]:
        """V^C x_k where a term needs it, and W' x_k, each `[B, M, N_k, d]`, from `[B, N_k, C]`."""
        projected = self._split_heads(self.key_proj(key)) if hasattr(self, "key_proj") else None
        return projected, self._split_heads(self.value_proj(key))

    def _extend_cache(self, cache: "AttentionCache", query: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        if not cache.is_memory:
            skipped = -cache.length % self.kv_stride  # tokens until the next position that is a key
            cache.append(*self._project_keys(query[:, skipped :: self.kv_stride]))
        cache.length += query.shape[1]
        assert cache.value is not None, "a cache has keys from the first step on"
        return cache.key, cache.value, cache.padding

    def _encode(self, offsets: Tensor, dim: int) -> Tensor:
        """R in float32 or better, handed to `position_proj` in the dtype of its weight."""
        dtype = self.position_proj.weight.dtype
        return relative_encoding(offsets.double() if dtype == torch.float64 else offsets, dim).to(dtype)

    def _sequence_position(
        self, query: Tensor, first: int, num_queries: int, num_keys: int, cache: AttentionCache | None
    ) -> SequencePosition:
        lowest = -(first + num_queries - 1)
        count = max(0, num_queries + (num_keys - 1) * self.kv_stride)
        if cache is None:
            table = self._position_table(lowest, count, query.device)
        else:
            if (
                cache.table is None
                or lowest < cache.table_lowest
                or lowest + count > cache.table_lowest + cache.table.shape[-1]
            ):
                # Twice the range that is needed now, so that decoding n tokens projects O(n) positions in all.
                cache.table_lowest = min(cache.table_lowest, 2 * lowest - 15)
                highest = max(0, lowest + count - 1) if not cache.is_memory else (num_keys - 1) * self.kv_stride
                cache.table = self._position_table(cache.table_lowest, highest - cache.table_lowest + 1, query.device)
            start = lowest - cache.table_lowest
            table = cache.table[..., start : start + count]
        return SequencePosition(query.to(table.dtype), table, num_queries, num_keys, self.kv_stride)

    def _position_table(self, lowest: int, count: int, device: torch.device) -> Tensor:
        """V^R R for `count` offsets from `lowest` upwards, `[M, d, count]`."""
        offsets = torch.arange(lowest, lowest + count, device=device)
        projected: Tensor = self.position_proj(self._encode(offsets, self.dim))
        return torch.unflatten(projected, -1, (self.num_heads, self.head_dim)).permute(1, 2, 0)

    def _map_position(self, query: Tensor, query_sizes: tuple[int, ...], key_sizes: tuple[int, ...]) -> MapPosition:
        """Energies along x and y; each axis costs N_q (W_k or H_k) C."""
        half = self.dim // 2
        weight_x, weight_y = self.position_proj.weight[:, :half], self.position_proj.weight[:, half:]
        # [B or 1, M, H, W, d]; a single row of E4 alone serves the whole map.
        grid = (
            torch.unflatten(query, 2, query_sizes)
            if query.shape[2] != 1 or math.prod(query_sizes) == 1
            else query[:, :, None]
        )
        axes = []
        for weight, axis, num_queries, num_keys in (
            (weight_x, 3, query_sizes[1], key_sizes[1]),
            (weight_y, 2, query_sizes[0], key_sizes[0]),
        ):
            lowest = -(num_queries - 1)
            count = max(0, num_queries + (num_keys - 1) * self.kv_stride)
            offsets = torch.arange(lowest, lowest + count, device=query.device)
            projected = nn.functional.linear(self._encode(offsets, half), weight / math.sqrt(2))
            table = torch.unflatten(projected, -1, (self.num_heads, self.head_dim)).permute(1, 2, 0)  # [M, d, offsets]
            index = torch.arange(num_keys, device=query.device) * self.kv_stride
            index = index - torch.arange(num_queries, device=query.device).unsqueeze(1) + num_queries - 1
            by_query = table[:, :, index].permute(0, 2, 1, 3)  # [M, queries along the axis, d, keys along the axis]
            lines = grid.movedim(axis, 2)  # [B or 1, M, along the axis, other axis, d]
            energy = torch.matmul(lines.to(by_query.dtype), by_query)
            axes.append(energy.movedim(2, axis))
        along_x, along_y = (energy.expand(-1, -1, *query_sizes, -1).flatten(2, 3) for energy in axes)
        return MapPosition(along_x, along_y)

    def _check_input(self, name: str, x: Tensor) -> None:
        layout = "[B, L, C]" if self.ndim == 1 else "[B, C, H, W]"
        if not x.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point type, got {x.dtype}.")
        if x.dim() != self.ndim + 2:
            raise ValueError(
                f"{name} must be {layout} for ndim={self.ndim}, got {x.dim()} dimensions, shape {tuple(x.shape)}."
            )
        channels = x.shape[-1] if self.ndim == 1 else x.shape[1]
        if channels != self.dim:
            raise ValueError(f"{name} must be {layout} with C = dim = {self.dim}, got shape {tuple(x.shape)}.")

    def _check_mask(self, mask: Tensor | None, key: Tensor) -> None:
        if mask is None:
            return
        expected = (key.shape[0], *(key.shape[1:2] if self.ndim == 1 else key.shape[2:]))
        if mask.dtype != torch.bool:
            raise ValueError(f"key_padding_mask must be bool, True where padded, got {mask.dtype}.")
        if tuple(mask.shape) != expected:
            raise ValueError(f"key_padding_mask must have the shape {expected} of the keys, got {tuple(mask.shape)}.")


def _grid(sizes: tuple[int, ...], stride: int, first: int, device: torch.device) -> tuple[Tensor, ...]:
    """Position of every element of a grid along each axis, flattened row by row."""
    axes = [torch.arange(size, device=device) * stride + first for size in sizes]
    return tuple(axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))


def _row_range(rows: tuple[int, int] | None, num_queries: int) -> tuple[int, int]:
    start, stop = (0, num_queries) if rows is None else rows
    if not 0 <= start <= stop <= num_queries:
        raise ValueError(f"rows={rows} must be (start, stop) with 0 <= start <= stop <= {num_queries}, the queries.")
    return start, stop

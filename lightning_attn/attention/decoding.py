"""Caches of the attention mechanisms for decoding a sequence token by token."""

import math
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attn.attention.cpu.linear import PackedLinear
from lightning_attn.attention.positions import computation_dtype
from lightning_attn.attention.projections import has_only_weight, is_plain, without_autocast
from lightning_attn.attention.spec import parse_terms
from lightning_attn.attention.transforms import not_compiled

if TYPE_CHECKING:
    from lightning_attn.attention.transformer import TransformerAttention

INITIAL_CAPACITY = 32
"""Positions that a new cache has memory for: most sentences of a translation never exceed it."""


class DecodingCache(Protocol):
    """The state of a module that decodes R rows (prefixes) token by token."""

    def reorder(self, index: Tensor, beams: int = 1) -> None:
        """Makes row r the former row `index[r]`, for every r of `index`, `[R']`.

        Args:
            index: Rows may be left out or repeated.
            beams: Number of neighbouring rows that belong to one sentence from now on. More than one only if the rows
                of a sentence all come from rows of one sentence, and if the order of sentences stays as long as
                neither `beams` nor the number of rows changes. A cache may ignore it.
        """
        ...


class PrefixCache:
    """The inputs of a module so far, for a module that recomputes the whole prefix at each step.

    Attributes:
        prefix: `[R, n, C]`; None before the first step.
    """

    def __init__(self) -> None:
        self.prefix: Tensor | None = None

    def append(self, x: Tensor) -> Tensor:
        """Adds the tokens of a step, `[R, L, C]`; returns all, `[R, n + L, C]`."""
        self.prefix = x if self.prefix is None else torch.cat((self.prefix, x), dim=1)
        return self.prefix

    def reorder(self, index: Tensor, beams: int = 1) -> None:
        """See `DecodingCache.reorder`."""
        if self.prefix is not None:
            self.prefix = self.prefix[index]


class AttentionCache:
    """Projected keys and values of sentences that are decoded token by token; created by `new_cache`.

    The keys and values of a sentence are stored once for all rows (beams) of it and never move within the sentence. A
    mask says which of them belong to a row's prefix. A step attends from the W rows of a sentence to all its keys in
    one matrix product. That is W times the multiplications of keys stored per row, but those would be copied at every
    step to reorder them, which takes longer. For E3 without E1 only the energies are stored.

    It has neither gradients nor dropout. The parameters must not change while a cache is in use. Non-finite values in
    a row affect the other rows of its sentence, but no other sentence.

    Shapes: B sentences; W neighbouring rows (beams) of each; R = B W; M heads; d head width; n positions of keys;
    S keys of a position ("slots"): one for each row so far, or 1 for a memory, which all rows share.

    Args:
        attention: The module that decodes.
        memory: `[B, L_k, C]`, the fixed keys of encoder-decoder attention; None for causal self-attention.
        key_padding_mask: `[B, L_k]`, True where `memory` is padding.
    """

    @torch.no_grad()
    def __init__(
        self, attention: "TransformerAttention", memory: Tensor | None = None, key_padding_mask: Tensor | None = None
    ) -> None:
        self.attention = attention
        self.is_memory = memory is not None
        self.beams = 1
        self.length = 0  # tokens seen, of each row
        self.num_keys = 0  # n
        self.stored: list[Tensor] = []  # values and, with E1 or E3, keys: [B, M, capacity for n, S, d or 1]
        self._hidden: Tensor | None = None  # added to energies, 0 or -inf: [B, W or 1, capacity for n, S]
        self._new_slots: Tensor | None = None  # the same for the slots of a new position, [W, S]
        # V^R R for relative positions from _lowest upwards; without E2 its energies
        self._relative_keys: Tensor | None = None
        self._lowest = 0

        e1, e2, e3, e4 = parse_terms(attention.terms)
        self._content, self._query_position, self._position = e1, e2, e2 or e4
        self._energy_only = e3 and not e1  # of the keys only E3 is stored
        scale = attention.scale
        query_bias = attention.key_bias * scale if e1 and e3 else None  # u, added to the projected query
        self._position_bias: Tensor | None = attention.position_bias * scale if e4 else None  # v, or v - u then
        if e2 and query_bias is not None:
            self._position_bias = -query_bias if self._position_bias is None else self._position_bias - query_bias
        self._query_bias = None if query_bias is None else query_bias.flatten()
        if memory is not None:
            if key_padding_mask is not None:
                memory = memory.masked_fill(key_padding_mask.unsqueeze(-1), 0.0)
            keys = memory[:, :: attention.kv_stride]
            self.num_keys = keys.shape[1]
            self.stored = [x.unsqueeze(3).contiguous() for x in self._project_keys(keys)]
            if key_padding_mask is not None:
                padding = key_padding_mask[:, None, :: attention.kv_stride, None]
                zeros = torch.zeros_like(padding, dtype=self.stored[0].dtype)
                self._hidden = zeros.masked_fill_(padding, -math.inf)
        inner = (layer for name, layer in attention.named_children() if name != "out_proj")
        plain = is_plain(attention.out_proj) and all(has_only_weight(layer) for layer in inner)
        self._packed = self._pack() if plain else None

    @property
    def rows(self) -> int | None:
        """R; None before the first token of a self-attention."""
        return self.stored[0].shape[0] * self.beams if self.stored else None

    def _pack(self) -> "tuple[PackedLinear | None, PackedLinear, list[int]]":
        """Plain projections packed for many small products: all projections of a token in one, W, and their widths."""
        attention, scale = self.attention, self.attention.scale
        weights: list[Tensor] = []
        if not self.is_memory:
            weights.append(attention.value_proj.weight)
            if self._content:
                weights.append(attention.key_proj.weight)
            elif self._energy_only:
                weights.append(attention.saliency())
        if self._content or self._query_position:
            weights.append(attention.query_proj.weight * scale)
        widths = [weight.shape[0] for weight in weights]
        bias = None if self._query_bias is None else F.pad(self._query_bias, (sum(widths[:-1]), 0))
        dtype = attention.value_proj.weight.dtype
        token = PackedLinear(torch.cat([weight.to(dtype) for weight in weights]), bias) if weights else None
        return token, PackedLinear(attention.out_proj.weight, attention.out_proj.bias), widths

    def _project_token(self, token: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """The tensors to store for the next token of every row, `[R, C or M]` each, and U z_q (+ u), `[R, C]`."""
        needs_query = self._content or self._query_position
        if self._packed is not None:
            linear, _, widths = self._packed
            projected = [] if linear is None else list(linear(token).split_with_sizes(widths, 1))
            query = projected.pop() if needs_query else None
            return projected, query
        attention = self.attention
        query = attention.query_proj(token) * attention.scale if needs_query else None
        if query is not None and self._query_bias is not None:
            query = query + self._query_bias.to(query.dtype)
        keys = [] if self.is_memory else [x.flatten(1) for x in self._project_keys(token.unsqueeze(1))]
        return keys, query

    def _project_keys(self, keys: Tensor) -> list[Tensor]:
        """Values and, with E1 or E3, keys or their energies, `[B, M, n, d or 1]`, of contents `[B, n, C]`."""
        attention = self.attention
        projected = [attention.project_value(keys)]
        if self._content:
            projected.append(attention.project_heads(attention.key_proj, keys))
        elif self._energy_only:
            projected.append(attention.key_energy(keys).unsqueeze(-1))
        return projected

    def _project_output(self, attended: Tensor) -> Tensor:
        """W applied to the concatenated heads, `[R, C]`."""
        if self._packed is not None:
            return self._packed[1](attended)
        out: Tensor = self.attention.out_proj(attended)
        return out

    @torch.no_grad()
    @not_compiled  # it has state, and packs weights
    def decode_step(
        self, query: Tensor, causal: bool | None = None, owner: "TransformerAttention | None" = None
    ) -> Tensor:
        """Attends from the next tokens of every row, one after the other.

        Args:
            query: `[R, T, C]`.
            causal: Hide the keys of a memory that come after a token; None for the module's setting. Self-attention is
                always causal.
            owner: The module that is called with the cache; must be the one that created it.

        Returns:
            `[R, T, C]`.

        Raises:
            ValueError: If the number of rows is not that of the cache, another module created the cache, or `causal` is
                False for self-attention.
        """
        if owner not in (None, self.attention):
            raise ValueError(
                "cache: another module created it, whose weights it holds; use new_cache() of this module."
            )
        causal = self.attention.causal if causal is None else causal
        if not causal and not self.is_memory:
            raise ValueError("causal=False: with a cache self-attention is always causal, since later tokens follow.")
        if self.rows not in (None, query.shape[0]):
            raise ValueError(f"query has batch size {query.shape[0]}, the cache has {self.rows}: they must be equal.")
        if query.shape[1] == 1:
            return self._step(query.squeeze(1), causal).unsqueeze(1)
        steps = [self._step(token, causal) for token in query.unbind(dim=1)]
        return torch.stack(steps, dim=1) if steps else torch.zeros_like(query)

    def reorder(self, index: Tensor, beams: int = 1) -> None:
        """See `DecodingCache.reorder`."""
        rows, before = self.rows, self.beams
        self.beams = beams
        if rows is None:
            return
        capacity, slots = self.stored[0].shape[2:4]
        regrouped = beams == 1 or beams != before or len(index) != rows
        if self.is_memory:
            if regrouped:
                sentences = index[::beams] // before
                self._resize(capacity, slots, sentences)
                self._hidden = None if self._hidden is None else self._hidden.index_select(0, sentences)
            return
        if regrouped:
            self._resize(capacity, max(beams, slots), index[::beams] // before)
        if max(beams, slots) == 1:
            return  # one row of each sentence, which all keys belong to
        if self._hidden is None:
            hidden = self.stored[0].new_zeros(len(index), capacity, slots)
        else:
            hidden = self._hidden.flatten(0, 1).index_select(0, index)
        hidden = F.pad(hidden, (0, max(beams - slots, 0)), value=-math.inf)
        self._hidden = torch.unflatten(hidden, 0, (-1, beams))

    def _step(self, token: Tensor, causal: bool) -> Tensor:
        """Attends from the next token of every row, `[R, C]`."""
        attention, position, stride = self.attention, self.length, self.attention.kv_stride
        projected, query = self._project_token(token)
        if not self.is_memory and position % stride == 0:
            self._append(projected)
        self.length += 1

        first, stop = 0, self.num_keys
        if causal and self.is_memory:
            stop = min(stop, position // stride + 1)
        if isinstance(attention.window, int):
            reach = attention.window // 2
            first = max(first, -((reach - position) // stride))
            stop = min(stop, (position + reach) // stride + 1)
        if first >= stop:
            return self._project_output(torch.zeros_like(token))

        energy = self._energy(query, position, first, stop)
        weights = torch.softmax(energy, dim=-1, dtype=torch.promote_types(energy.dtype, torch.float32))
        value = self.stored[0][:, :, first:stop]
        attended = torch.bmm(weights.to(value.dtype), value.view(len(weights), -1, attention.head_dim))
        attended = attended.view(*value.shape[:2], -1, attention.head_dim)  # [B, M, W or 1, d]
        if self.is_memory and self._hidden is not None:
            fully_masked = (self._hidden[:, :, first:stop] == -math.inf).all(dim=2, keepdim=True)
            attended = attended.masked_fill(fully_masked, 0.0)
        out = self._project_output(attended.transpose(1, 2).reshape(-1, attention.dim))
        # Where no energy depends on the row, all rows of a sentence get the same output.
        return out if len(out) == len(token) else out.repeat_interleave(self.beams, dim=0)

    def _energy(self, query: Tensor | None, position: int, first: int, stop: int) -> Tensor:
        """The sum of the energies for the keys `first:stop`, `[B * M, W or 1, n * S]`."""
        batch, heads, _, slots, _ = self.stored[0].shape
        key = self.stored[1][:, :, first:stop] if len(self.stored) == 2 else None
        parts = []  # added to E1, each broadcast to [B, M, W, n, S]
        if self._position:
            parts.append(self._position_energy(query, position, first, stop).unsqueeze(-1))
        if self._hidden is not None:
            parts.append(self._hidden[:, None, :, first:stop])
        if key is not None and not self._content:
            parts.append(key.squeeze(-1).unsqueeze(2))
        energy: Tensor | None = None
        if parts:
            energy = sum(parts[1:], start=parts[0])
            count = self.beams if self._content else energy.shape[2]
            energy = energy.expand(batch, heads, count, stop - first, slots).reshape(batch * heads, count, -1)
        if self._content and query is not None and key is not None:
            width = key.shape[4]
            query = query.view(batch, self.beams, heads, width).transpose(1, 2).reshape(batch * heads, -1, width)
            key = key.view(batch * heads, -1, width).transpose(1, 2)
            energy = torch.bmm(query, key) if energy is None else torch.baddbmm(energy.to(query.dtype), query, key)
        assert energy is not None, "at least one term is on"
        return energy

    def _position_energy(self, query: Tensor | None, position: int, first: int, stop: int) -> Tensor:
        """E2 + E4 of the token at `position` for the keys `first:stop`, `[B or 1, M, W or 1, n]`."""
        stride = self.attention.kv_stride
        lowest = first * stride - position
        if self._relative_keys is None or lowest < self._lowest:
            # Twice the range that is needed, so that n tokens project O(n) positions in total.
            self._lowest = min(2 * lowest, 1 - INITIAL_CAPACITY)
            highest = (self.num_keys - 1) * stride if self.is_memory else 0
            self._relative_keys = self._project_positions(self._lowest, highest + 1)
        start = lowest - self._lowest
        keys = self._relative_keys[..., start : start + (stop - first - 1) * stride + 1 : stride]
        if query is None or not self._query_position:
            return keys
        by_head = query.view(len(query), *self._relative_keys.shape[:2])
        if self._position_bias is not None:
            by_head = by_head + self._position_bias
        energy = torch.bmm(by_head.transpose(0, 1).to(keys.dtype), keys)
        return energy.view(len(energy), -1, self.beams, stop - first).transpose(0, 1)

    def _project_positions(self, lowest: int, stop: int) -> Tensor:
        """V^R R for the relative positions `lowest:stop`, `[M, d, P]`; without E2 their energies, `[1, M, 1, P]`."""
        keys = self.attention.relative_keys_of(lowest, stop - lowest, self.stored[0].device)
        if self._query_position or self._position_bias is None:
            return keys.permute(1, 2, 0).contiguous()
        with without_autocast(keys.device):
            return torch.einsum("md,omd->mo", self._position_bias.to(keys.dtype), keys)[None, :, None]

    def _append(self, projected: list[Tensor]) -> None:
        """Stores values and keys `[R, C or M]` of the last token of every row in the row's slot."""
        heads = self.attention.num_heads  # new: [B, M, W, d or 1]
        new = [x.view(-1, self.beams, heads, x.shape[1] // heads).transpose(1, 2) for x in projected]
        if not self.stored:
            self.stored = [x.new_empty(*x.shape[:2], INITIAL_CAPACITY, *x.shape[2:]) for x in new]
            if self.beams > 1:
                self._hidden = new[0].new_empty(len(new[0]), self.beams, INITIAL_CAPACITY, self.beams)
        capacity, slots = self.stored[0].shape[2:4]
        if self.num_keys == capacity:
            self._resize(2 * capacity, slots)
            self._hidden = None if self._hidden is None else F.pad(self._hidden, (0, 0, 0, capacity))
        for stored, x in zip(self.stored, new, strict=True):
            stored[:, :, self.num_keys, : self.beams] = x
            if self.beams < slots:
                stored[:, :, self.num_keys, self.beams :] = 0.0  # hidden from every row, but must not be NaN
        if self._hidden is not None:
            if self._new_slots is None or self._new_slots.shape != self._hidden.shape[1::2]:
                self._new_slots = torch.full_like(self._hidden[0, :, 0], -math.inf).fill_diagonal_(0.0)
            self._hidden[:, :, self.num_keys] = self._new_slots
        self.num_keys += 1

    def _resize(self, capacity: int, slots: int, sentences: Tensor | None = None) -> None:
        """Copies the keys and values of `sentences` (all if None) to memory of this capacity and number of slots."""
        for i, old in enumerate(self.stored):
            used = old[:, :, : self.num_keys]
            if sentences is not None:
                used = used.index_select(0, sentences)
            new = used.new_empty(*used.shape[:2], capacity, slots, used.shape[4])
            new[:, :, : self.num_keys, : used.shape[3]] = used
            new[:, :, : self.num_keys, used.shape[3] :] = 0.0  # hidden from every row, but must not be NaN
            self.stored[i] = new


class DynamicConvCache:
    """The last gated inputs of a sentence that is decoded step by step; created by `DynamicConv.new_cache`.

    Attributes:
        value: GLU outputs of the last kernel_size - 1 tokens, `[B, kernel_size - 1, C]`, zeros before the first
            token; None before the first step.
        length: Number of tokens seen so far.
        owner: The module that created it.
    """

    def __init__(self, owner: object = None) -> None:
        self.owner = owner
        self.value: Tensor | None = None
        self.length = 0

    def reorder(self, index: Tensor, beams: int = 1) -> None:
        """See `DecodingCache.reorder`."""
        if self.value is not None:
            self.value = self.value.index_select(0, index)


class DeformableConvCache:
    """The inputs of sequences that are decoded step by step; created by `DeformableConv.new_cache`.

    Offsets may reach back to the first token, so all inputs are stored once, in order of arrival, with a table of the
    rows of each sequence. Reordering for beam search copies the table only. For inference: no gradient flows into
    earlier steps.

    Attributes:
        length: Number of tokens seen so far.
        storage: Row 0 is zero, for positions outside the sequence; then the inputs, then free memory. `[rows, C]`.
    """

    def __init__(self) -> None:
        self.length = 0
        self.storage = torch.empty(0, 0)
        self._used = 0
        self._table = torch.empty(0, 0, dtype=torch.long)

    def append(self, x: Tensor) -> None:
        """Adds the next tokens `[B, n, C]`.

        Raises:
            ValueError: If B is not the number of sequences in the cache.
        """
        batch, tokens, channels = x.shape
        if self._used == 0:
            self.storage = x.new_zeros(1, channels, dtype=computation_dtype(x))
            self._used = 1
            self._table = torch.empty(batch, 0, dtype=torch.long, device=x.device)
        if batch != len(self._table):
            raise ValueError(f"x has batch size {batch}, the cache has {len(self._table)}: they must be equal.")
        end = self._used + batch * tokens
        if end > len(self.storage):
            grown = self.storage.new_empty(2 * end, channels)
            grown[: self._used] = self.storage[: self._used]
            self.storage = grown
        self.storage[self._used : end] = x.detach().flatten(0, 1)
        new = torch.arange(self._used, end, device=x.device).view(batch, tokens)
        self._table = torch.cat((self._table, new), dim=1)
        self._used = end
        self.length += tokens

    def read(self, start: int) -> Tensor:
        """The inputs from position `start` on, `[B, length - start, C]`; zeros at negative positions."""
        return self.storage[F.pad(self._table[:, max(0, start) :], (max(0, -start), 0))]

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the storage for positions `[B, ...]` counted from 1; 0 is outside."""
        return F.pad(self._table, (1, 0)).gather(1, index.flatten(1)).view_as(index)

    def reorder(self, index: Tensor, beams: int = 1) -> None:
        """See `DecodingCache.reorder`."""
        self._table = self._table.index_select(0, index)

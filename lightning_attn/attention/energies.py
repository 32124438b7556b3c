"""The energies E1 to E4 of Eq. 2, computed in this file only, for training, decoding and visualization.

Shapes: B samples, M heads, d features of a head; N_q queries and N_k keys on grids, flattened row by row.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from lightning_attn.attention.cpu.linear import has_fast_bfloat16
from lightning_attn.attention.layout import Layout, row_and_column
from lightning_attn.attention.positions import computation_dtype
from lightning_attn.attention.projections import without_autocast
from lightning_attn.attention.transforms import is_transformed


@dataclasses.dataclass(frozen=True)
class Energies:
    """The parts of the energies of the terms that are on; parts that only other terms need are None.

    E1 + E3 = (U z_q + u) . (V^C x_k) and E2 + E4 = (U z_q + v) . (V^R R): one query projection serves both.

    Attributes:
        content_query: U z_q (+ u) for E1 (+ E3), `[B, M, N_q, d]`.
        key: V^C x_k, `[B, M, N_k, d]`, with `content_query` and of its dtype.
        key_energy: E3 without E1, `[B, M, N_k]`, float32 or better.
        position_query: U z_q (+ v) for E2 (+ E4), `[B, M, N_q, d]`; v for E4 alone, `[1, M, 1, d]`.
        relative_keys: V^R R by axis (y, then x; None for the y of a sentence), `[offsets, M, d]` for the offsets of
            `layout.offset_range` and one more, float32 or better.
        layout: The grids.
        is_linear_in_encoding: Whether V^R is a matrix, so that the energies along an axis lie in the space of the
            encodings R. A layer that replaces it may add a bias or do anything else.
    """

    content_query: Tensor | None
    key: Tensor | None
    key_energy: Tensor | None
    position_query: Tensor | None
    relative_keys: tuple[Tensor | None, Tensor] | None
    layout: Layout
    is_linear_in_encoding: bool = True

    @property
    def position_is_shared(self) -> bool:
        """Whether the position energy depends on the offset alone, not on the query: E4 without E2."""
        return self.position_query is not None and tuple(self.position_query.shape[::2]) == (1, 1)

    def along_axes(self) -> list[Tensor | None]:
        """E2 + E4 as a sum over axes: the part along rows, and the part along columns.

        Returns:
            `[B, M, rows, columns, key rows]` (None for sentences and without these terms) and
            `[B, M, rows, columns, key columns]`, float32 or better. For E4 alone, dimensions that the energy does not
            depend on have size 1.
        """
        return [self.along(axis) for axis in (0, 1)]

    def along(self, axis: int) -> Tensor | None:
        """E2 + E4 along one axis, 0 for rows and 1 for columns; see `along_axes`."""
        if self.position_query is None or self.relative_keys is None or self.relative_keys[axis] is None:
            return None
        relative_keys = self.relative_keys[axis]
        assert relative_keys is not None, "checked above"
        with without_autocast(relative_keys.device):
            query = self.position_query.to(relative_keys.dtype)
            if self.position_is_shared:
                energy = shared_position_energy(query[0, :, 0], relative_keys, self.layout, axis)
                return energy[None, :, :, None] if axis == 0 else energy[None, :, None]
            if self.relative_keys[0] is None:
                return sentence_position_energy(query, relative_keys, self.layout).unsqueeze(2)
            grid = torch.unflatten(query, 2, self.layout.query_sizes)
            keys = self.relative_keys_of_queries(axis)
            return torch.einsum("bmhwd,hkmd->bmhwk" if axis == 0 else "bmhwd,wkmd->bmhwk", grid, keys)

    def relative_keys_of_queries(self, axis: int) -> Tensor:
        """V^R R of every pair along one axis of a map, `[queries along it, keys along it, M, d]`."""
        assert self.relative_keys is not None, "E2 or E4 is on"
        relative_keys = self.relative_keys[axis]
        assert relative_keys is not None, "maps have both axes"
        column = self.layout.offsets(axis, relative_keys.device) - self.layout.offset_range(axis)[0]
        return torch.unflatten(relative_keys.index_select(0, column.flatten()), 0, column.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """The summed energies of the queries `start:stop`, `[B or 1, M, stop - start, N_k]`, without masks."""
        total: Tensor | None = None
        if start == stop or self.layout.num_keys == 0:
            some = next(t for t in (self.key, self.key_energy, self.position_query) if t is not None)
            return some.new_zeros(1, some.shape[1], stop - start, self.layout.num_keys)
        if self.content_query is not None and self.key is not None:
            with without_autocast(self.key.device):
                total = content_energy(self.content_query[:, :, start:stop], self.key)
        if self.key_energy is not None:
            total = self.key_energy.unsqueeze(2) if total is None else total + self.key_energy.unsqueeze(2)
        position = self.rows_of_position(start, stop)
        if position is not None:
            total = position if total is None else total + position
        assert total is not None, "at least one term is on"
        return total.expand(-1, -1, stop - start, -1)

    def rows_of_position(self, start: int, stop: int) -> Tensor | None:
        """E2 + E4 of the queries `start:stop`, `[B or 1, M, stop - start, N_k]`; None without E2 and E4."""
        if self.position_query is None or self.relative_keys is None:
            return None
        layout, (keys_y, keys_x) = self.layout, self.relative_keys
        if keys_y is None and not self.position_is_shared:
            with without_autocast(keys_x.device):
                query = self.position_query[:, :, start:stop].to(keys_x.dtype)
                first = layout.query_sizes[1] - stop  # index of the offset from the last of these queries to key 0
                count = stop - start + (layout.key_sizes[1] - 1) * layout.stride + 1
                return sentence_position_energy(query, keys_x[first : first + count], layout)
        if (start, stop) == (0, layout.num_queries):
            along_y, along_x = self.along_axes()
        else:
            along_y, along_x = self._along_axes_of_queries(start, stop)
        assert along_x is not None, "E2 or E4 is on"
        both = along_x.unsqueeze(-2) if along_y is None else along_y.unsqueeze(-1) + along_x.unsqueeze(-2)
        return both.flatten(-2).flatten(2, 3)

    def _along_axes_of_queries(self, start: int, stop: int) -> list[Tensor | None]:
        """`along_axes` of the queries `start:stop`, arranged as one row."""
        assert self.position_query is not None, "E2 or E4 is on"
        assert self.relative_keys is not None, "E2 or E4 is on"
        query = self.position_query if self.position_is_shared else self.position_query[:, :, start:stop]
        positions = row_and_column(torch.arange(start, stop, device=query.device), self.layout.query_sizes[1])
        along: list[Tensor | None] = []
        with without_autocast(query.device):
            for axis, (relative_keys, position) in enumerate(zip(self.relative_keys, positions, strict=True)):
                if relative_keys is None:
                    along.append(None)
                    continue
                column = self.layout.offsets(axis, query.device)[position] - self.layout.offset_range(axis)[0]
                keys = torch.unflatten(relative_keys.index_select(0, column.flatten()), 0, column.shape)
                by_query = query.to(keys.dtype).expand(-1, -1, stop - start, -1)
                along.append(torch.einsum("bmqd,qkmd->bmqk", by_query, keys).unsqueeze(2))
        return along


def content_energy(query: Tensor, key: Tensor) -> Tensor:
    """E1 (+ E3) of queries `[B, M, N_q, d]` and keys `[B, M, N_k, d]`: their products, in float32 or better."""
    if multiplies_fast_in_half(key) and not is_transformed():
        energy: Tensor = _ContentEnergy.apply(query, key)
        return energy
    dtype = computation_dtype(key)
    return query.to(dtype) @ key.to(dtype).transpose(2, 3)


class _ContentEnergy(torch.autograd.Function):
    """Products of half precision tensors in float32, with gradients in half precision."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor) -> Tensor:
        ctx.save_for_backward(query, key)
        return query.float() @ key.float().transpose(2, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        query, key = ctx.saved_tensors
        grad = grad.to(key.dtype)
        return grad @ key, grad.transpose(2, 3) @ query


def multiplies_fast_in_half(tensor: Tensor) -> bool:
    """Whether a tensor has a half precision dtype whose products are faster than in float32 on its device."""
    if tensor.device.type == "cpu":
        return tensor.dtype == torch.bfloat16 and has_fast_bfloat16()
    return tensor.dtype in (torch.bfloat16, torch.float16)


def shared_position_energy(query: Tensor, relative_keys: Tensor, layout: Layout, axis: int) -> Tensor:
    """E4 along one axis, `[M, queries along it, keys along it]`, of v `[M, d]` and V^R R `[offsets, M, d]`."""
    by_offset = torch.einsum("md,omd->mo", query.to(relative_keys.dtype), relative_keys)
    column = layout.offsets(axis, query.device) - layout.offset_range(axis)[0]
    return torch.unflatten(by_offset.index_select(1, column.flatten()), 1, column.shape)


def sentence_position_energy(query: Tensor, relative_keys: Tensor, layout: Layout) -> Tensor:
    """E2 (+ E4) in a sentence, `[B, M, L_q, L_k]`, of queries `[B, M, L_q, d]` and V^R R `[offsets + 1, M, d]`.

    The first offset is that from the last of these queries to the first key.

    One product gives the energies of all offsets; each query needs a range that starts one element before that of the
    previous query. Viewed with rows that are one element shorter, the same memory has one key per column (the "relative
    shift" of Transformer-XL).
    """
    length, num_keys, stride = query.shape[2], layout.key_sizes[1], layout.stride
    by_offset = torch.einsum("bmqd,omd->bmqo", query, relative_keys)
    width = relative_keys.shape[0] - 1
    shifted = torch.unflatten(by_offset.flatten(2)[..., length - 1 : length - 1 + length * width], 2, (length, width))
    return shifted[..., : (num_keys - 1) * stride + 1 : stride]

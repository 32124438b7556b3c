"""What `benchmarks.attention` compares with: a plain way, torch's fused attention, mmcv's and torchvision's modules."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.attention_shape import HEADS, Shape
from lightning_attn.attention import DeformableConv, GatedResidual, TransformerAttention
from lightning_attn.attention.positions import relative_encoding
from lightning_attn.attention.spec import parse_terms
from lightning_attn.networks.weights.mmcv import to_mmcv


class FloorAttention(nn.Module):
    """E1 alone by torch's fused attention, with the same four projections and stride as the modules compared.

    With a window, on maps of stride 1, the fused attention gets the keys outside as a mask of all pairs.
    """

    def __init__(self, dim: int, ndim: int, kv_stride: int, causal: bool = False, window: int | None = None) -> None:
        super().__init__()
        self.ndim, self.kv_stride, self.causal, self.window = ndim, kv_stride, causal, window
        self.query, self.key, self.value = (self._projection(dim, bias=False) for _ in range(3))
        self.out = self._projection(dim, bias=True)

    def _projection(self, dim: int, bias: bool) -> nn.Module:
        return nn.Conv2d(dim, dim, 1, bias=bias) if self.ndim == 2 else nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` or `[B, L, C]` to the same."""
        step = slice(None, None, self.kv_stride)
        keys = x[:, :, step, step] if self.ndim == 2 else x[:, step]
        query, key, value = self._heads(self.query(x)), self._heads(self.key(keys)), self._heads(self.value(keys))
        mask = None if self.window is None else _inside_window(self.window, (x.shape[2], x.shape[3]), x.device)
        attended = F.scaled_dot_product_attention(query, key, value, mask, is_causal=self.causal, scale=1.0)
        if self.ndim == 1:
            out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        else:
            out = self.out(attended.transpose(2, 3).reshape(x.shape))
        return out

    def _heads(self, projected: Tensor) -> Tensor:
        if self.ndim == 1:
            return torch.unflatten(projected, 2, (HEADS, -1)).transpose(1, 2)
        return torch.unflatten(projected.flatten(2), 1, (HEADS, -1)).transpose(2, 3).contiguous()


class NaiveAttention(nn.Module):
    """The attention as one writes it first: the energies of all pairs, added term by term, one softmax, one product.

    It has the parameters of a `TransformerAttention`, and gives the same.
    """

    def __init__(self, attention: TransformerAttention) -> None:
        super().__init__()
        self.e1, self.e2, self.e3, self.e4 = parse_terms(attention.terms)
        self.ndim, self.kv_stride = attention.ndim, attention.kv_stride
        self.parts = attention

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` or `[B, L, C]` to the same."""
        step = slice(None, None, self.kv_stride)
        if self.ndim == 2:
            z, keys = x.flatten(2).transpose(1, 2), x[:, :, step, step].flatten(2).transpose(1, 2)
        else:
            z, keys = x, x[:, step]
        query = self._heads(self.parts.query_proj(z)) if self.e1 or self.e2 else None
        parts = []
        if self.e1 or self.e3:
            parts.append(self._content(query, self._heads(self.parts.key_proj(keys))))
        if self.e2 or self.e4:
            parts.append(self._positions(query, x.shape[2:] if self.ndim == 2 else x.shape[1:2]))
        energies = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        weights = energies.softmax(-1)
        attended = weights @ self._heads(self.parts.value_proj(keys))
        attended = attended.expand(len(x), -1, z.shape[1], -1).transpose(1, 2).flatten(2)
        out: Tensor = self.parts.out_proj(attended)
        return out if self.ndim == 1 else out.transpose(1, 2).reshape(x.shape)

    def _content(self, query: Tensor | None, key: Tensor) -> Tensor:
        """E1 and E3, `[B, M, N_q or 1, N_k]`."""
        if not self.e1:
            return (self.parts.key_bias[:, None] * key).sum(-1).unsqueeze(2)
        assert query is not None
        return (query + self.parts.key_bias[:, None] if self.e3 else query) @ key.mT

    def _positions(self, query: Tensor | None, size: tuple[int, ...]) -> Tensor:
        """E2 and E4, `[B or 1, M, N_q, N_k]`."""
        content = query if self.e2 else None
        if self.e4:
            content = (
                self.parts.position_bias[:, None] if content is None else content + self.parts.position_bias[:, None]
            )
        assert content is not None
        if len(size) == 1:
            return self._along_sentence(content, size[0])
        offsets = [torch.arange(0, n, self.kv_stride) - torch.arange(n)[:, None] for n in size]
        by_column, by_row = (self.parts.position_proj.weight / math.sqrt(2)).chunk(2, 1)  # x comes first
        rows, columns = self._relative(offsets[0], by_row), self._relative(offsets[1], by_column)
        if self.e2:
            grid = torch.unflatten(content, 2, size)
            along_y = torch.einsum("bmhwd,hkmd->bmhwk", grid, rows)
            along_x = torch.einsum("bmhwd,wkmd->bmhwk", grid, columns)
        else:
            along_y = torch.einsum("md,hkmd->mhk", content[:, 0], rows)[None, :, :, None]
            along_x = torch.einsum("md,wkmd->mwk", content[:, 0], columns)[None, :, None]
        return (along_y.unsqueeze(-1) + along_x.unsqueeze(-2)).flatten(-2).flatten(2, 3)

    def _along_sentence(self, content: Tensor, length: int) -> Tensor:
        """The same of a sentence: by offset, then one for each pair."""
        relative = self._relative(torch.arange(1 - length, length), self.parts.position_proj.weight)
        by_offset = torch.einsum("bmqd,omd->bmqo", content if self.e2 else content.unsqueeze(0), relative)
        offsets = torch.arange(0, length, self.kv_stride) - torch.arange(length)[:, None] + length - 1
        return by_offset.expand(-1, -1, length, -1).gather(-1, offsets.expand(*by_offset.shape[:2], -1, -1))

    def _relative(self, offset: Tensor, weight: Tensor) -> Tensor:
        """V^R R by offset, or by pair of places along an axis, `[..., M, d]`."""
        return torch.unflatten(F.linear(relative_encoding(offset, weight.shape[1]), weight), -1, (HEADS, -1))

    @staticmethod
    def _heads(projected: Tensor) -> Tensor:
        return torch.unflatten(projected, 2, (HEADS, -1)).transpose(1, 2)


class UnfoldedAttention(nn.Module):
    """Attention in a window of a map as one writes it first: the keys of every window side by side, by `unfold`.

    It has the parameters of a `TransformerAttention`, and gives the same.
    """

    def __init__(self, attention: TransformerAttention) -> None:
        super().__init__()
        self.e1, self.e2, self.e3, self.e4 = parse_terms(attention.terms)
        assert isinstance(attention.window, int)
        self.window = attention.window
        self.parts = attention

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same."""
        parts, (batch, _, height, width) = self.parts, x.shape
        z = x.flatten(2).transpose(1, 2)
        energies = x.new_zeros(())
        query = None
        if self.e1 or self.e2:
            query = torch.unflatten(parts.query_proj(z), 2, (parts.num_heads, -1))  # [B, N, M, d]
        if self.e1 or self.e3:
            keys = self._windows(parts.key_proj, z, height)
            if query is None or not self.e1:
                energies = energies + torch.einsum("md,bmdkn->bmkn", parts.key_bias, keys)
            else:
                content = query + parts.key_bias if self.e3 else query
                energies = energies + torch.einsum("bnmd,bmdkn->bmkn", content, keys)
        if self.e2 or self.e4:
            relative = self._relative(x.device)
            if query is None or not self.e2:
                energies = energies + torch.einsum("md,kmd->mk", parts.position_bias, relative)[None, :, :, None]
            else:
                content = query + parts.position_bias if self.e4 else query
                energies = energies + torch.einsum("bnmd,kmd->bmkn", content, relative)
        outside = F.unfold(x.new_ones(1, 1, height, width), self.window, padding=self.window // 2) == 0
        weights = energies.expand(batch, -1, -1, height * width).masked_fill(outside, -math.inf).softmax(2)
        attended = torch.einsum("bmkn,bmdkn->bnmd", weights, self._windows(parts.value_proj, z, height)).flatten(2)
        out: Tensor = parts.out_proj(attended)
        return out.transpose(1, 2).reshape(x.shape)

    def _windows(self, projection: nn.Module, z: Tensor, height: int) -> Tensor:
        """The projected contents of every window, `[B, M, d, taps, N]`."""
        grid = torch.unflatten(projection(z).transpose(1, 2), 2, (height, -1))
        windows = F.unfold(grid, self.window, padding=self.window // 2)
        return windows.view(len(z), self.parts.num_heads, self.parts.head_dim, self.window**2, z.shape[1])

    def _relative(self, device: torch.device) -> Tensor:
        """V^R R of every tap, `[taps, M, d]`."""
        offsets = torch.arange(self.window, device=device) - self.window // 2
        along = relative_encoding(offsets, self.parts.dim // 2)
        x_first = torch.cat([along.repeat(self.window, 1), along.repeat_interleave(self.window, 0)], dim=1)
        projected = F.linear(x_first, self.parts.position_proj.weight) / math.sqrt(2)
        return torch.unflatten(projected, 1, (self.parts.num_heads, -1))


@functools.lru_cache(maxsize=2)
def _inside_window(window: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """True where a key of a map is in the window around a query, `[N, N]`."""
    rows, columns = (torch.arange(n, device=device) for n in size)
    near_y, near_x = ((n[:, None] - n).abs() <= window // 2 for n in (rows, columns))
    return (near_y[:, None, :, None] & near_x[None, :, None, :]).flatten(2).flatten(0, 1)


class TorchvisionDeformable(nn.Module):
    """torchvision's operator with a convolution that makes its offsets."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(channels, 18, 3, padding=1)
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same."""
        from torchvision.ops import deform_conv2d

        out: Tensor = deform_conv2d(x, self.offset(x), self.weight, self.bias, padding=1)
        return out


def build_module(side: str, shape: Shape, kind: str, *, causal: bool = False, window: int | None = None) -> nn.Module:
    """The module of a side; the same seed gives all sides of a kind, save the floor, the same weights.

    A map's attention is in a gated residual, as mmcv's is.

    Args:
        side: `"ours"`, `"naive"`, `"unfold"`, `"mmcv"`, `"torchvision"` or `"floor"`.
        shape: Size of the problem.
        kind: Term set, or `"deformable"`.
        causal: Hide later keys; of ours and the floor.
        window: Width of the window that keys come from; of ours, `unfold` and the floor.
    """
    torch.manual_seed(0)
    if kind == "deformable":
        return _build_deformable(side, shape.channels)
    if side == "floor":
        return _gated(FloorAttention(shape.channels, shape.ndim, shape.kv_stride, causal, window), shape)
    attention = TransformerAttention(
        shape.channels, HEADS, kind, ndim=shape.ndim, kv_stride=shape.kv_stride, causal=causal, window=window
    )
    if side == "naive":
        return _gated(NaiveAttention(attention), shape)
    if side == "unfold":
        return _gated(UnfoldedAttention(attention), shape)
    if side == "ours":
        return _gated(attention, shape)
    from mmcv.cnn.bricks import GeneralizedAttention

    theirs: nn.Module = GeneralizedAttention(
        shape.channels, num_heads=HEADS, kv_stride=shape.kv_stride, attention_type=kind
    )
    theirs.load_state_dict(to_mmcv(_with_gate(GatedResidual(attention))))
    return theirs


class Gated(nn.Module):
    """The residual form of a side that is not ours, x + gamma f(x)."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.gamma = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same."""
        out: Tensor = x + self.gamma * self.attention(x)
        return out


def _gated(attention: nn.Module, shape: Shape) -> nn.Module:
    if shape.ndim == 1:
        return attention
    return _with_gate(GatedResidual(attention)) if isinstance(attention, TransformerAttention) else Gated(attention)


def _with_gate(gated: GatedResidual) -> GatedResidual:
    gated.gamma.data.fill_(0.5)  # at its start value, 0, the attention would have no gradient
    return gated


def _build_deformable(side: str, channels: int) -> nn.Module:
    if side == "floor":
        return nn.Conv2d(channels, channels, 3, padding=1)
    ours = DeformableConv(channels, channels, 3, ndim=2)
    nn.init.normal_(ours.offset.get_parameter("weight"), std=2 / (9 * channels) ** 0.5)  # offsets of about two pixels
    if side == "ours":
        return ours
    theirs = TorchvisionDeformable(channels)
    theirs.load_state_dict(ours.state_dict())
    return theirs

"""Example of a custom mechanism: every query gets the mean of all values, as in Eq. 2 without any energy."""

from typing import Any

from torch import Tensor, nn

from lightning_attn.attention import PrefixCache


class MeanAttention(nn.Module):
    def __init__(self, dim: int, ndim: int, num_heads: int, causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.ndim, self.causal = ndim, causal
        self.value_proj, self.out_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.new_cache = PrefixCache  # for decoders, which decode one token at a time

    def forward(self, x: Tensor, *, key_padding_mask: Tensor | None = None, cache: Any = None) -> Tensor:
        if self.ndim == 2:  # [B, C, H, W]
            mask = None if key_padding_mask is None else key_padding_mask.flatten(1)
            return self._compute_attention(x.flatten(2).transpose(1, 2), mask).transpose(1, 2).reshape(x.shape)
        if cache is not None:
            return self._compute_attention(cache.append(x), None)[:, -x.shape[1] :]
        return self._compute_attention(x, key_padding_mask)

    def _compute_attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Maps sequences `[B, L, C]` to the same shape; the mask `[B, L]` is True where padded."""
        valid = x.new_ones(x.shape[:2]) if mask is None else (~mask).to(x.dtype)
        values, valid = self.value_proj(x) * valid[..., None], valid[..., None]
        if self.causal:
            mean = values.cumsum(1) / valid.cumsum(1).clamp(min=1)
        else:
            mean = values.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
        return self.out_proj(self.dropout(mean.expand_as(values)))

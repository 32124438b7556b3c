"""A mechanism of its own: every query gets the mean of all values, which is what Eq. 2 leaves without any energy."""

from typing import Any

from torch import Tensor, nn

from lightning_attn.attention import PrefixCache


class MeanAttention(nn.Module):
    def __init__(self, dim: int, ndim: int, num_heads: int, causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.ndim, self.causal = ndim, causal
        self.value_proj, self.out_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.new_cache = PrefixCache  # a decoder asks for one token at a time

    def forward(self, x: Tensor, *, key_padding_mask: Tensor | None = None, cache: Any = None) -> Tensor:
        if self.ndim == 2:  # [B, C, H, W]
            mask = None if key_padding_mask is None else key_padding_mask.flatten(1)
            return self._attend(x.flatten(2).transpose(1, 2), mask).transpose(1, 2).reshape(x.shape)
        if cache is not None:
            return self._attend(cache.append(x), None)[:, -x.shape[1] :]
        return self._attend(x, key_padding_mask)

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Sequences `[B, L, C]`; True in the mask `[B, L]` is what is not to be seen."""
        seen = x.new_ones(x.shape[:2]) if mask is None else (~mask).to(x.dtype)
        values, seen = self.value_proj(x) * seen[..., None], seen[..., None]
        if self.causal:
            mean = values.cumsum(1) / seen.cumsum(1).clamp(min=1)
        else:
            mean = values.sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)
        return self.out_proj(self.dropout(mean.expand_as(values)))

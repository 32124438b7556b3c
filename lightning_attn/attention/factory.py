"""From a spec to a module: the one place that knows which mechanism is which class."""

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_attn.attention.spec import AttentionSpec
from lightning_attn.attention.transformer import TransformerAttention

Role = Literal["self", "causal", "cross"]


class GatedResidual(nn.Module):
    """x + gamma * attention(x), gamma a learnable scalar that starts at zero (paper, section 3 and Fig. 2a).

    At the start of training the network is thus the network without attention.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
        """Adds the gated attention to the map `[B, C, H, W]`."""
        attended: Tensor = self.attention(x, key_padding_mask=key_padding_mask)
        return x + self.gamma * attended


def build_attention(
    spec: AttentionSpec, dim: int, ndim: Literal[1, 2] = 1, role: Role = "self"
) -> TransformerAttention | GatedResidual | None:
    """Builds what stands in an attention slot of width `dim`.

    Args:
        spec: Description of the attention.
        dim: Width C of the slot.
        ndim: 1 for sequences `[B, L, C]`, 2 for maps `[B, C, H, W]`, which get the gated residual form.
        role: `"self"`, `"causal"` (a decoder's self-attention) or `"cross"` (encoder-decoder attention).

    Returns:
        The module, or None for `mechanism: none`: the network then leaves the slot out.

    Raises:
        ValueError: If the spec does not fit the slot.
    """
    if role not in ("self", "causal", "cross"):
        raise ValueError(f"role must be 'self', 'causal' or 'cross', got {role!r}.")
    if spec.mechanism == "none":
        if role == "cross":
            raise ValueError(
                "mechanism 'none' in encoder-decoder attention would cut the decoder off from its source; "
                "the paper has no such setting. Use mechanism: transformer."
            )
        return None
    attention = TransformerAttention(
        dim,
        num_heads=spec.num_heads,
        terms=spec.terms,
        ndim=ndim,
        window=spec.window,
        kv_stride=spec.kv_stride,
        scale=spec.scale,
        dropout=spec.dropout,
        causal=role == "causal",
    )
    return attention if ndim == 1 else GatedResidual(attention)

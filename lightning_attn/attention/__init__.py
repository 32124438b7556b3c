"""The generalized attention of Zhu et al. (ICCV 2019): pure PyTorch, usable alone."""

from lightning_attn.attention.cache import AttentionCache
from lightning_attn.attention.factory import GatedResidual, build_attention
from lightning_attn.attention.spec import AttentionSpec
from lightning_attn.attention.transformer import TransformerAttention

__all__ = ["AttentionCache", "AttentionSpec", "GatedResidual", "TransformerAttention", "build_attention"]

"""The generalized attention of Zhu et al. (ICCV 2019): pure PyTorch, usable alone."""

from lightning_attn.attention.decoding import AttentionCache, DecodingCache, PrefixCache
from lightning_attn.attention.deformable import DeformableConv, offset_parameters
from lightning_attn.attention.dynamic import DynamicConv
from lightning_attn.attention.factory import (
    AttendedConvolution,
    DeformableAttention,
    GatedResidual,
    SelfAttention,
    build_attention,
)
from lightning_attn.attention.spec import AttentionSpec
from lightning_attn.attention.transformer import TransformerAttention

__all__ = [
    "AttendedConvolution",
    "AttentionCache",
    "AttentionSpec",
    "DecodingCache",
    "DeformableAttention",
    "DeformableConv",
    "DynamicConv",
    "GatedResidual",
    "PrefixCache",
    "SelfAttention",
    "TransformerAttention",
    "build_attention",
    "offset_parameters",
]

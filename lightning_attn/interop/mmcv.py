"""`GeneralizedAttention` of mmcv, converted."""

from lightning_attn.networks.weights.mmcv import from_mmcv

__all__ = ["from_mmcv"]

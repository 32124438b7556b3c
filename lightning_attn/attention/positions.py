"""Sinusoidal encoding of relative positions (R in Eq. 2), one and two-dimensional."""

import torch
from torch import Tensor

WAVELENGTH_BASE = 1000.0  # as in the authors' released code; the paper only says "different wavelengths"


def computation_dtype(given: Tensor | torch.dtype) -> torch.dtype:
    """The dtype that energies, encodings and sums are computed in: float32, or float64 for float64."""
    return torch.promote_types(given.dtype if isinstance(given, Tensor) else given, torch.float32)


def relative_encoding(offsets: Tensor, dim: int) -> Tensor:
    """Encodes relative positions along one axis.

    Column i of the first half is sin(o / 1000^(2i/dim)) and of the second half the cosine, i = 0..dim/2-1.
    Always computed in float32 or better: in bfloat16 an offset of a few hundred already loses its phase.

    Args:
        offsets: Relative positions k - q, any shape `[...]`, in pixels or tokens.
        dim: Even width D of the encoding of this axis.

    Returns:
        Encoding of shape `[..., dim]`, float64 if `offsets` is float64, else float32.
    """
    if dim % 2:
        raise ValueError(f"dim of a relative encoding must be even, for sine and cosine, got {dim}.")
    dtype = computation_dtype(offsets)
    exponents = torch.arange(dim // 2, device=offsets.device, dtype=dtype) * (2.0 / dim)
    angles = offsets.to(dtype).unsqueeze(-1) * torch.pow(WAVELENGTH_BASE, -exponents)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)

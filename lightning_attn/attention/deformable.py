"""Deformable convolution of Eq. 4: each tap of the kernel reads at an offset predicted from the query's content.

Tap m of query q reads at q + p_m + offset_m(q), between the grid points by linear interpolation in each axis, and zero
outside the input. That is A_m(q, k) = G(k, q + p_m + offset_m(q)) with the bilinear kernel
G(a, b) = prod over axes of max(0, 1 - |a - b|). Offsets come from a convolution of the same kernel.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d
from typing_extensions import override

from lightning_attn.attention import reference
from lightning_attn.attention.decoding import DeformableConvCache
from lightning_attn.attention.kernels import HAS_TRITON
from lightning_attn.attention.positions import computation_dtype
from lightning_attn.attention.projections import without_autocast
from lightning_attn.attention.sampling import (
    Geometry,
    axis_taps,
    by_tap,
    convolve_by_gather,
    find_corners,
    sampled_product,
)
from lightning_attn.attention.transforms import is_exporting, is_transformed
from lightning_attn.errors import InputError
from lightning_attn.validation import (
    check_input,
    check_mask,
    divisors,
    require_bool,
    require_int,
    require_ndim,
)

Algorithm = Literal["auto", "gather", "triton", "torchvision", "reference"]

Sizes = int | Sequence[int]
"""One number for every axis, or one for each: (y, x) in maps."""

_MAX_OFFSET = 1e7
"""Larger than any map, and exact in float32."""

_MMCV_NAMES = {"conv_offset.": "offset.", "conv_offset_mask.": "offset."}
"""mmcv's names of the offset convolution: the current one, and that of early releases of the modulated module."""


class DeformableConv(nn.Module):
    """Convolution whose taps are moved by learned offsets (Eq. 4), plain or modulated (Zhu et al., CVPR 2019).

    The offsets of a query come from `offset`, a convolution of the same kernel, stride, dilation and padding. It starts
    at zero, so that the plain form starts as the regular convolution of the same `weight`. The modulated form has one
    more output per tap, whose sigmoid scales the sampled value; as in the published models it starts at zero too, so
    that every tap has the factor one half at the start.

    Weights are exchangeable with the published modules. `load_state_dict` reads those of mmcv's `DeformConv2dPack` and
    `ModulatedDeformConv2dPack`, whose `conv_offset` is our `offset`; those of `torchvision.ops.DeformConv2d`, which
    takes its offsets as an input, with `strict=False`. Channels of `offset`, for each group of offsets: `2 m` and
    `2 m + 1` move tap m in y and in x (in one dimension, channel m moves tap m); the modulation's channels come last.

    The causal form, for a decoder, is our choice since the paper defines none: the taps of query q start at
    `q - (kernel_size - 1) * dilation, ..., q - dilation, q`, and Omega_q holds the positions up to q only. Later
    positions have no weight in the interpolation, whatever the offset; the offsets are computed causally as well.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Number of taps along each axis; of maps also `(k_y, k_x)`, like the next three.
        ndim: 1 for sequences `[B, L, C]`, 2 for maps `[B, C, H, W]`.
        stride: Distance of neighbouring queries, in input positions.
        dilation: Distance of neighbouring taps before they move, in input positions.
        padding: Zeros around the input on each side; None for `dilation * (kernel_size - 1) // 2`, which with stride 1
            and an odd kernel keeps the size.
        modulated: Scale each tap by a learned sigmoid.
        causal: See above; needs `ndim=1` and `stride=1`.
        bias: Add a learned vector to every output.
        algorithm: `"gather"` samples all taps with one weighted gather and multiplies them with `weight` in blocks;
            `"triton"` is our kernels for maps on CUDA, which follow autocast and whose gradients are deterministic;
            `"torchvision"` is torchvision's operator, for maps, in float32 or better; `"reference"` is the equation in
            plain loops, for tests. `"auto"` is torchvision's operator for maps on CUDA, the kernels under
            `torch.use_deterministic_algorithms`, and the gather elsewhere. All give the same numbers.
        groups: Groups of channels that are convolved separately, as in torch's convolutions.
        offset_groups: Groups of input channels with separate offsets (and modulation).
        device: Of the parameters, as in torch's modules.
        dtype: Of the parameters, as in torch's modules.

    Attributes:
        weight: `[out_channels, in_channels / groups, k(_y, k_x)]`.
        bias: `[out_channels]`, or None.
        offset: The convolution that predicts offsets and modulation. See `offset_parameters`.

    Raises:
        ValueError: If an argument is out of range or does not fit the others; the message names it and the fix.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes = 3,
        ndim: Literal[1, 2] = 2,
        stride: Sizes = 1,
        dilation: Sizes = 1,
        padding: Sizes | None = None,
        modulated: bool = False,
        causal: bool = False,
        bias: bool = True,
        algorithm: Algorithm = "auto",
        groups: int = 1,
        offset_groups: int = 1,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_ndim(ndim)
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            require_int(name, value)
        for name, flag in (("modulated", modulated), ("causal", causal), ("bias", bias)):
            require_bool(name, flag)
        _check_groups(in_channels, out_channels, groups, offset_groups)
        geometry = _geometry(ndim, kernel_size, stride, dilation, padding, causal)
        _check_algorithm(algorithm, ndim)
        if algorithm == "reference" and (groups, offset_groups) != (1, 1):
            raise InputError(
                f"algorithm='reference' supports one group only; use 'auto' with groups={groups}, "
                f"offset_groups={offset_groups}."
            )
        self.in_channels, self.out_channels, self.ndim = in_channels, out_channels, ndim
        self.kernel_size, self.stride = geometry.kernel_size, geometry.stride
        self.dilation, self.padding = geometry.dilation, geometry.padding
        self.modulated, self.causal, self.groups, self.offset_groups = modulated, causal, groups, offset_groups
        self.algorithm: Algorithm = algorithm

        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size, device=device, dtype=dtype)
        )
        vector = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", vector)
        conv: Any = nn.Conv1d if ndim == 1 else nn.Conv2d
        self.offset: nn.Module = conv(
            in_channels,
            offset_groups * geometry.taps * (ndim + modulated),
            self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            padding=0 if causal else self.padding,
            device=device,
            dtype=dtype,
        )
        self.register_load_state_dict_pre_hook(_rename_from_mmcv)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises weight and bias as torch's convolutions do, offsets and modulation with zeros."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    @override
    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, ndim={self.ndim}, "
            f"stride={self.stride}, dilation={self.dilation}, padding={self.padding}, modulated={self.modulated}, "
            f"causal={self.causal}, bias={self.bias is not None}, groups={self.groups}, "
            f"offset_groups={self.offset_groups}, algorithm={self.algorithm!r}"
        )

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        cache: DeformableConvCache | None = None,
    ) -> Tensor:
        """Convolves a batch of sequences or maps.

        Args:
            x: `[B, L, C]` or `[B, C, H, W]`.
            key_padding_mask: Bool, `[B, L]` or `[B, H, W]`, True where `x` is padding. Padding counts as zero, so that
                the valid positions of a padded sentence get the same outputs as without padding.
            cache: From `new_cache`; `x` then holds the next tokens of sequences that are decoded step by step. Always
                computed by the gather.

        Returns:
            `[B, L', out_channels]` or `[B, out_channels, H', W']`, with the sizes of a regular convolution.

        Raises:
            ValueError: If a shape or dtype does not fit; the message names the argument.
        """
        check_input("x", x, self.ndim, self.in_channels, "in_channels")
        check_mask(key_padding_mask, x, "x's positions")
        if cache is not None:
            return self._decode(x, key_padding_mask, cache)
        self._geometry().output_sizes(x)
        if key_padding_mask is not None:
            x = x.masked_fill(key_padding_mask.unsqueeze(2 if self.ndim == 1 else 1), 0)
        past = self._past() if self.causal else 0
        offset, mask = self._offsets(F.pad(x, (0, 0, past, 0)) if past else x)
        return deformable_conv(
            x,
            offset,
            self.weight,
            self.bias,
            mask=mask,
            stride=self.stride,
            dilation=self.dilation,
            padding=None if self.causal else self.padding,
            causal=self.causal,
            algorithm=self.algorithm,
        )

    def new_cache(self) -> DeformableConvCache:
        """Creates a cache for decoding step by step, with the same results as the full pass.

        Raises:
            ValueError: If the convolution is not causal, so that a step would change earlier outputs.
        """
        if not self.causal:
            raise ValueError("new_cache: only a causal convolution is decoded step by step; build it with causal=True.")
        return DeformableConvCache()

    def _geometry(self) -> Geometry:
        return Geometry(self.kernel_size, self.stride, self.dilation, self.padding, self.causal)

    def _past(self) -> int:
        """How far the first tap of a causal convolution lies before its query."""
        return (self.kernel_size[0] - 1) * self.dilation[0]

    def _offsets(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Offsets and modulation, in the layout of `deformable_conv`.

        In the dtype of `offset`, float32 as a rule, also under autocast. A convolution in bfloat16 would round its
        result to eight bits: offsets between 8 and 16 to multiples of 1/16, so that bilinear weights are off by up to
        1/32, and steps of training smaller than that would not move a tap. Positions, offset plus place on the map,
        are never in bfloat16, where those from 64 on are multiples of one half. TF32, torch's default for convolutions
        on CUDA, rounds the factors to eleven bits and sums in float32, and is precise enough.
        """
        with without_autocast(x.device):
            dtype = next((p.dtype for p in self.offset.parameters() if p.is_floating_point()), x.dtype)
            x = x.to(dtype)
            moved: Tensor = self.offset(x.transpose(1, 2)).transpose(1, 2) if self.ndim == 1 else self.offset(x)
            if not self.modulated:
                return moved, None
            taps = self.offset_groups * math.prod(self.kernel_size)
            channel = 2 if self.ndim == 1 else 1
            offset, mask = torch.split(moved, [taps * self.ndim, taps], dim=channel)
            return offset, mask.sigmoid()

    def _decode(self, x: Tensor, key_padding_mask: Tensor | None, cache: DeformableConvCache) -> Tensor:
        if not self.causal:
            raise ValueError("cache: only a causal convolution is decoded step by step; build it with causal=True.")
        if key_padding_mask is not None:
            raise ValueError("cache: decoding step by step supports no key_padding_mask; pass None.")
        if not isinstance(cache, DeformableConvCache):
            raise ValueError(f"cache: it must come from new_cache() of this module, got a {type(cache).__name__}.")
        first, past = cache.length, self._past()
        cache.append(x)
        offset, mask = self._offsets(cache.read(first - past))
        move = by_tap(offset, self.offset_groups)
        mask = None if mask is None else by_tap(mask, self.offset_groups)
        start = axis_taps(x.shape[1], self.kernel_size[0], 1, self.dilation[0], past - first, offset)
        last = torch.arange(first, cache.length, device=x.device)[:, None, None, None]
        index, weights = find_corners([move + start.unsqueeze(-1)], [cache.length], last, mask)
        product = sampled_product(
            cache.storage[None],
            cache.rows(index).flatten(0, 1)[None],
            weights.to(cache.storage.dtype).flatten(0, 1)[None],
            self.weight,
            self.bias,
        )
        return product.view(*x.shape[:2], self.out_channels)


def offset_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of the offset (and modulation) convolutions of every `DeformableConv` in `module`.

    The paper trains them at 0.1 times the learning rate: put them into a parameter group with that rate.
    """
    convolutions = (child for child in module.modules() if isinstance(child, DeformableConv))
    return [parameter for convolution in convolutions for parameter in convolution.offset.parameters()]


def deformable_conv(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    padding: Sizes | None = None,
    causal: bool = False,
    algorithm: Algorithm = "auto",
) -> Tensor:
    """Deformable convolution with given offsets (Eq. 4), in one or two dimensions by the rank of `x`.

    What the taps read, C K N values for K taps and N queries, is not kept for the backward pass but read again.

    Args:
        x: `[B, L, C]` or `[B, C, H, W]`.
        offset: `[B, L', G k]`, or `[B, G 2 k_y k_x, H', W']`, for G groups of offsets: in each, channels `2 m` and
            `2 m + 1` move tap m in y and x. NaN gives NaN; an infinite offset is outside and reads zero.
        weight: `[out, C / groups, k]` or `[out, C / groups, k_y, k_x]`; determines the number of groups.
        bias: `[out]`.
        mask: Factor on the sampled values, `[B, L', G k]` or `[B, G k_y k_x, H', W']`; None for one.
        stride: See `DeformableConv`.
        dilation: See `DeformableConv`.
        padding: See `DeformableConv`.
        causal: See `DeformableConv`; for sequences with stride 1.
        algorithm: See `DeformableConv`.

    Returns:
        `[B, L', out]` or `[B, out, H', W']`, in the memory format of `x`.

    Raises:
        ValueError: If a shape or the algorithm does not fit.
    """
    ndim = x.dim() - 2
    channels = x.shape[2 if ndim == 1 else 1] if ndim in (1, 2) else 0
    if ndim not in (1, 2) or weight.dim() != x.dim() or weight.shape[1] == 0 or channels % weight.shape[1]:
        raise ValueError(
            f"x and weight must be [B, L, C] and [out, C / groups, k], or [B, C, H, W] and [out, C / groups, k_y, k_x],"
            f" got shapes {tuple(x.shape)} and {tuple(weight.shape)}."
        )
    _check_algorithm(algorithm, ndim)
    kernel = tuple(weight.shape[2:])
    geometry = _geometry(ndim, kernel, stride, dilation, padding, causal)
    outputs = geometry.output_sizes(x)
    groups = max(1, offset.shape[2 if ndim == 1 else 1] // (geometry.taps * ndim)) if offset.dim() == x.dim() else 1
    for name, tensor, per_group in (("offset", offset, geometry.taps * ndim), ("mask", mask, geometry.taps)):
        width = groups * per_group
        expected = (x.shape[0], *outputs, width) if ndim == 1 else (x.shape[0], width, *outputs)
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name} must have the shape {expected}, got {tuple(tensor.shape)}.")
    _check_groups(channels, weight.shape[0], channels // weight.shape[1], groups)

    if algorithm == "reference":
        return _by_reference(x, offset, weight, bias, mask, geometry, groups)
    if algorithm == "auto":
        algorithm = _fastest(x)
    if algorithm == "torchvision":
        return _torchvision(x, offset, weight, bias, mask, geometry)
    if algorithm == "triton" and not is_transformed():
        return _triton(x, offset, weight, bias, mask, geometry)
    return convolve_by_gather(x, offset, weight, bias, mask, geometry, groups)


def _geometry(
    ndim: int, kernel_size: Sizes, stride: Sizes, dilation: Sizes, padding: Sizes | None, causal: bool
) -> Geometry:
    """Checked sizes for every axis."""
    kernel, strides, dilations = (
        _sizes(name, value, ndim, 1)
        for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
    )
    reaches = tuple(d * (k - 1) for d, k in zip(dilations, kernel, strict=True))
    if causal:
        if ndim != 1:
            raise InputError("causal=True needs ndim=1: the positions of a map have no order; set causal=False.")
        if strides != (1,):
            raise InputError(f"causal=True needs stride=1, got {strides[0]}: a larger stride skips tokens.")
        if padding is not None:
            raise InputError(
                f"causal=True pads {reaches[0]} zeros on the left only; leave padding=None, got {padding}."
            )
    pads = tuple(reach // 2 for reach in reaches) if padding is None else _sizes("padding", padding, ndim, 0)
    return Geometry(kernel, strides, dilations, pads, causal)


def _sizes(name: str, value: Sizes, ndim: int, least: int) -> tuple[int, ...]:
    """One number for each axis."""
    if not isinstance(value, tuple | list):
        require_int(name, value, least)
        assert isinstance(value, int), "checked above"
        return (value,) * ndim
    if len(value) != ndim:
        raise InputError(f"{name} must be one number or {ndim} for ndim={ndim}, got {tuple(value)}.")
    for number in value:
        require_int(name, number, least)
    return tuple(value)


def _check_groups(in_channels: int, out_channels: int, groups: int, offset_groups: int) -> None:
    for name, number, channels in (
        ("groups", groups, in_channels),
        ("groups", groups, out_channels),
        ("offset_groups", offset_groups, in_channels),
    ):
        require_int(name, number)
        if channels % number:
            raise InputError(f"{name}={number} must divide the {channels} channels: use one of {divisors(channels)}.")


def _check_algorithm(algorithm: str, ndim: int) -> None:
    if algorithm not in get_args(Algorithm):
        raise InputError(f"algorithm must be one of {list(get_args(Algorithm))}, got {algorithm!r}.")
    if algorithm in ("triton", "torchvision") and ndim == 1:
        raise InputError(f"algorithm={algorithm!r} supports maps only; for sequences (ndim=1) use 'auto' or 'gather'.")
    if algorithm == "triton" and not HAS_TRITON:
        raise InputError(
            "algorithm='triton' needs the package triton, which is not installed: install it, or use 'auto'."
        )


def _rename_from_mmcv(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before `load_state_dict` that renames the entries of mmcv's modules in place."""
    for theirs, ours in _MMCV_NAMES.items():
        for name in [name for name in state if name.startswith(prefix + theirs)]:
            state[prefix + ours + name.removeprefix(prefix + theirs)] = state.pop(name)


def _by_reference(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    geometry: Geometry,
    offset_groups: int,
) -> Tensor:
    """The equation in loops, for one group and the same sizes along both axes.

    Raises:
        ValueError: For anything else.
    """
    uneven = [
        n for n in (geometry.kernel_size, geometry.stride, geometry.dilation, geometry.padding) if len(set(n)) > 1
    ]
    if offset_groups > 1 or weight.shape[1] != x.shape[2 if x.dim() == 3 else 1] or uneven:
        raise ValueError("algorithm='reference' supports one group and equal sizes along both axes; use 'gather'.")
    return reference.deformable_convolution(
        x,
        offset,
        weight,
        bias,
        mask=mask,
        stride=geometry.stride[0],
        dilation=geometry.dilation[0],
        padding=geometry.padding[0],
        causal=geometry.causal,
    )


def _fastest(x: Tensor) -> Algorithm:
    """What `"auto"` takes: exported programs and transforms need plain operations."""
    if x.dim() == 3 or not x.is_cuda or is_exporting() or is_transformed():
        return "gather"
    # The kernels are compiled and interpreted in tests but have never run on a device. Torchvision's operator has; it
    # adds gradients in any order.
    return "triton" if HAS_TRITON and torch.are_deterministic_algorithms_enabled() else "torchvision"


def _triton(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, geometry: Geometry
) -> Tensor:
    """Our kernels, in the dtype of autocast, or else that of the weight."""
    from lightning_attn.attention.kernels import deformable as kernels  # imports Triton, which takes a while

    if not (x.is_cuda or kernels.RUNS_ANYWHERE):
        raise InputError(
            f"algorithm='triton' needs a CUDA device, got x on {x.device.type!r}: move it there, or use 'auto', which "
            "takes the fastest algorithm of every device. (TRITON_INTERPRET=1 in the environment interprets the "
            "kernels, slowly.)"
        )
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    result: Tensor = kernels.deformable_conv(
        x, offset, weight, bias, mask, geometry.stride, geometry.dilation, geometry.padding, dtype
    )
    return result


def _torchvision(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, geometry: Geometry
) -> Tensor:
    """The operator of torchvision in float32 or better, without NaN offsets, for which it reads out of bounds."""
    dtype = computation_dtype(x)
    nan_offsets = offset.detach().isnan()
    clamped = offset.nan_to_num(0.0, _MAX_OFFSET, -_MAX_OFFSET).clamp(-_MAX_OFFSET, _MAX_OFFSET)
    tensors = [t if t is None else t.to(dtype) for t in (x, clamped, weight, bias, mask)]
    result: Tensor = deform_conv2d(
        *tensors[:4],
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        mask=tensors[4],
    )
    return result.masked_fill(nan_offsets.any(1, keepdim=True), math.nan).to(x.dtype)

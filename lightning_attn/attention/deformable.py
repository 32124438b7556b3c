"""Deformable convolution of Eq. 4: each tap of the kernel reads at an offset predicted from the query's content.

Tap m of query q reads at q + p_m + offset_m(q), between the grid points by linear interpolation in each axis, and zero
outside the input. That is A_m(q, k) = G(k, q + p_m + offset_m(q)) with the bilinear kernel
G(a, b) = prod over axes of max(0, 1 - |a - b|). Offsets come from a convolution of the same kernel.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import deform_conv2d
from typing_extensions import override

from lightning_attn.attention import reference
from lightning_attn.attention.decoding import DeformableConvCache
from lightning_attn.attention.positions import computation_dtype
from lightning_attn.attention.projections import without_autocast
from lightning_attn.attention.transforms import is_transformed
from lightning_attn.errors import InputError
from lightning_attn.validation import (
    check_input,
    check_mask,
    divisors,
    require_bool,
    require_int,
    require_ndim,
)

Algorithm = Literal["auto", "gather", "torchvision", "reference"]

Sizes = int | Sequence[int]
"""One number for every axis, or one for each: (y, x) in maps."""

BLOCK_ELEMENTS = 4_000_000
"""Sampled values in memory at once, 16 MB: larger blocks cost new memory pages, smaller ones more calls."""

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
            `"torchvision"` is torchvision's operator, for maps; `"reference"` is the equation in plain loops, for
            tests; `"auto"` is torchvision's operator for maps on CUDA and the gather elsewhere. All give the same
            numbers.
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

    def _geometry(self) -> "_Geometry":
        return _Geometry(self.kernel_size, self.stride, self.dilation, self.padding, self.causal)

    def _past(self) -> int:
        """How far the first tap of a causal convolution lies before its query."""
        return (self.kernel_size[0] - 1) * self.dilation[0]

    def _offsets(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Offsets and modulation, in the layout of `deformable_conv`.

        In the dtype of `offset` also under autocast: in bfloat16 an offset of 5 has a resolution of 1/32.
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
        move = _by_tap(offset, self.offset_groups)
        mask = None if mask is None else _by_tap(mask, self.offset_groups)
        start = _axis_taps(x.shape[1], self.kernel_size[0], 1, self.dilation[0], past - first, offset)
        last = torch.arange(first, cache.length, device=x.device)[:, None, None, None]
        index, weights = _corners([move + start.unsqueeze(-1)], [cache.length], last, mask)
        product = _sampled_product(
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

    The gather needs, besides its inputs and output, a copy of `x` with one more position and, for the backward pass,
    an index and a weight per tap and corner: with K taps and N queries 48 K N bytes in two dimensions, 1.8 MB for 3 x 3
    at 50 x 84. The sampled values (C K N values, 39 MB there with 256 channels) exist in blocks of about 16 MB only,
    and are sampled again in the backward pass.

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
    on_map = ndim == 2 and not causal
    if algorithm == "torchvision" or (algorithm == "auto" and on_map and x.is_cuda and not is_transformed()):
        return _torchvision(x, offset, weight, bias, mask, geometry)

    rows = x if ndim == 1 else x.flatten(2).transpose(1, 2)
    # Axes of moves, mask and positions: sample, query (two axes in a map), tap (two axes in a map), group of offsets.
    if ndim == 1:
        moves = [_by_tap(offset, groups)]
        mask = None if mask is None else _by_tap(mask, groups)
    else:
        moves = list(torch.unflatten(offset, 1, (groups, *kernel, 2)).permute(4, 0, 5, 6, 2, 3, 1))
        mask = None if mask is None else torch.unflatten(mask, 1, (groups, *kernel)).permute(0, 4, 5, 2, 3, 1)
    positions = []
    for axis, (move, count) in enumerate(zip(moves, outputs, strict=True)):
        left = geometry.reach(axis) if causal else geometry.padding[axis]
        start = _axis_taps(count, kernel[axis], geometry.stride[axis], geometry.dilation[axis], left, move)
        shape = [1] * (2 * ndim + 1)
        shape[axis], shape[ndim + axis] = count, kernel[axis]
        positions.append(move + start.view(shape))
    sizes = list(x.shape[1:2] if ndim == 1 else x.shape[2:])
    last = torch.arange(sizes[0], device=x.device)[:, None, None, None] if causal else None
    index, weights = _corners(positions, sizes, last, mask)
    dtype = computation_dtype(x)
    flat = (x.shape[0], math.prod(outputs), geometry.taps, groups, 2**ndim)
    product = _convolve(
        F.pad(rows, (0, 0, 1, 0)).to(dtype), index.reshape(flat), weights.to(dtype).reshape(flat), weight, bias
    )
    if ndim == 1:
        return product
    result = torch.unflatten(product.transpose(1, 2), 2, outputs)
    # In the memory format of x: later layers are slow if formats alternate.
    if is_transformed():  # the memory format is unknown there
        return result
    return result if x.is_contiguous(memory_format=torch.channels_last) else result.contiguous()


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """The positions of the taps before offsets are added; one number for each axis, y before x."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    causal: bool

    @property
    def taps(self) -> int:
        """Number of taps K."""
        return math.prod(self.kernel_size)

    def reach(self, axis: int) -> int:
        """Distance from the first to the last tap."""
        return self.dilation[axis] * (self.kernel_size[axis] - 1)

    def output_sizes(self, x: Tensor) -> list[int]:
        """The grid of queries for `[B, L, C]` or `[B, C, H, W]`.

        Raises:
            ValueError: If `x` is too small for any query.
        """
        sizes = list(x.shape[1:2] if x.dim() == 3 else x.shape[2:])
        reaches = [self.reach(axis) for axis in range(len(sizes))]
        if self.causal:
            least = [1]
            outputs = sizes
        else:
            least = [max(1, reach - 2 * pad + 1) for reach, pad in zip(reaches, self.padding, strict=True)]
            outputs = [
                (size + 2 * pad - reach - 1) // stride + 1
                for size, pad, reach, stride in zip(sizes, self.padding, reaches, self.stride, strict=True)
            ]
        if any(size < needed for size, needed in zip(sizes, least, strict=True)):
            raise InputError(
                f"x must have at least {_format_sizes(least)} positions along each axis for "
                f"kernel_size={_format_sizes(self.kernel_size)}, dilation={_format_sizes(self.dilation)} and "
                f"padding={_format_sizes(self.padding)}, got shape {tuple(x.shape)}."
            )
        return outputs


def _geometry(
    ndim: int, kernel_size: Sizes, stride: Sizes, dilation: Sizes, padding: Sizes | None, causal: bool
) -> _Geometry:
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
    return _Geometry(kernel, strides, dilations, pads, causal)


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


def _format_sizes(values: Sequence[int]) -> str:
    """One number if all are equal, else all of them."""
    return str(values[0]) if len(set(values)) == 1 else str(tuple(values))


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
    if algorithm == "torchvision" and ndim == 1:
        raise InputError("algorithm='torchvision' supports maps only; for sequences (ndim=1) use 'auto' or 'gather'.")


def _rename_from_mmcv(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before `load_state_dict` that renames the entries of mmcv's modules in place."""
    for theirs, ours in _MMCV_NAMES.items():
        for name in [name for name in state if name.startswith(prefix + theirs)]:
            state[prefix + ours + name.removeprefix(prefix + theirs)] = state.pop(name)


def _by_tap(channels: Tensor, groups: int) -> Tensor:
    """Offsets or modulation of sequences by tap and group, `[B, L', k, groups]`, of `[B, L', groups k]`."""
    return torch.unflatten(channels, 2, (groups, -1)).transpose(2, 3)


def _axis_taps(count: int, kernel_size: int, stride: int, dilation: int, left: int, like: Tensor) -> Tensor:
    """Positions of the taps of each query along one axis before offsets, `[count, k]`, in float32 or better."""
    queries = torch.arange(count, device=like.device) * stride - left
    taps = torch.arange(kernel_size, device=like.device) * dilation
    return (queries[:, None] + taps).to(computation_dtype(like))


def _corners(
    positions: list[Tensor], sizes: list[int], last: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The grid points around each sampling position and their bilinear weights G(k, position), times `mask`.

    Args:
        positions: One tensor per axis, y before x, all of one shape.
        sizes: Number of grid points along each axis.
        last: The last grid point that may be read, to broadcast against `[positions, corner]`; None for all.
        mask: Factor on the weights, in the shape of a position.

    Returns:
        Indices, 1 + the number of the grid point in raster order, or 0 outside; and weights. Each has the shape of a
        position with one more axis for the 2 or 4 corners.
    """
    index = torch.zeros((), dtype=torch.long, device=positions[0].device)
    inside = torch.ones((), dtype=torch.bool, device=positions[0].device)
    weights = positions[0].new_ones(()) if mask is None else mask[..., None]
    for position, size in zip(positions, sizes, strict=True):
        # Any position further outside gives the same and must not overflow the integer. At -1 itself the slope is that
        # of position 0.
        position = position.clamp(-2, size)
        lower = position.detach().floor()
        fraction = position - lower
        corner = torch.stack((lower, lower + 1), dim=-1)
        within = (corner >= 0) & (corner <= (size - 1 if last is None else last))
        inside = (inside[..., None] & within[..., None, :]).flatten(-2)
        index = (index[..., None] * size + corner.long()[..., None, :]).flatten(-2)
        bilinear = torch.stack((1 - fraction, fraction), dim=-1)
        weights = (weights[..., None] * bilinear[..., None, :]).flatten(-2)
    # NaN positions are never inside; their weights stay NaN.
    return torch.where(inside, index + 1, 0), weights


def _convolve(rows: Tensor, index: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`_sampled_product` in blocks, whose samples are not saved for the backward pass but recomputed.

    Small blocks are faster as well: sampled values stay in the caches. Exported programs, whose lengths may be
    symbolic, and transforms, which support no recomputation, use one block.
    """
    batch, queries, taps = index.shape[:3]
    if torch.compiler.is_exporting() or is_transformed() or 0 in index.shape:
        return _sampled_product(rows, index, weights, weight, bias)
    block_queries = max(1, BLOCK_ELEMENTS // (taps * rows.shape[2]))
    block_samples = max(1, block_queries // queries)
    parts = math.ceil(queries / block_queries)
    outputs = []
    for samples in zip(*(torch.split(t, block_samples) for t in (rows, index, weights)), strict=True):
        for part in zip(samples[1].chunk(parts, dim=1), samples[2].chunk(parts, dim=1), strict=True):
            arguments = (samples[0], *part, weight, bias)
            if torch.is_grad_enabled():
                block = checkpoint(_sampled_product, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                block = _sampled_product(*arguments)
            outputs.append(block.flatten(0, 1))
    return torch.unflatten(torch.cat(outputs), 0, (batch, queries))


def _sampled_product(rows: Tensor, index: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Samples the taps of each query and multiplies them with the weights of the convolution.

    Args:
        rows: The contents to sample from, `[B, R, C]`; row 0 of each sample is zero.
        index: Rows to read, of the same sample, `[B, N, K, groups of offsets, corners]`.
        weights: Their bilinear weights, in the dtype of `rows`.
        weight: `[out, C / groups, k(_y, k_x)]`, K in all.
        bias: `[out]`.

    Returns:
        `[B, N, out]`.
    """
    batch, queries, taps, offset_groups, corners = index.shape
    channels = rows.shape[2]
    # One row for each group of channels, one after the other.
    table = rows.reshape(-1, channels // offset_groups)
    first = torch.arange(batch, device=index.device)[:, None, None, None, None] * rows.shape[1]
    bags = (index + first) * offset_groups
    if offset_groups > 1:
        bags = bags + torch.arange(offset_groups, device=index.device)[:, None]
    sampled = _weighted_rows(table, bags.view(-1, corners), weights.reshape(-1, corners))
    sampled = sampled.view(batch * queries, taps, channels).to(weight.dtype)
    groups = channels // weight.shape[1]
    matrix = weight.flatten(2).transpose(1, 2)  # [out, K, C / groups]: channels of a tap are contiguous, as sampled
    if groups > 1:
        by_group = torch.unflatten(sampled, 2, (groups, -1))
        product = torch.einsum("nkgc,gokc->ngo", by_group, torch.unflatten(matrix, 0, (groups, -1))).flatten(1)
        product = product if bias is None else product + bias.to(product.dtype)
    elif sampled.is_cpu and sampled.shape[0] and not (torch.compiler.is_compiling() or is_transformed()):
        # The same product as a 1x1 convolution, which is faster on the CPU (26 against 44 ms for a map of 50 x 84 with
        # 256 channels).
        image = sampled.flatten(1)[None, :, None].permute(0, 3, 1, 2)
        product = F.conv2d(image, matrix.flatten(1)[:, :, None, None], bias)[0, :, :, 0].T
    else:
        product = F.linear(sampled.flatten(1), matrix.flatten(1), bias)
    return torch.unflatten(product, 0, (batch, queries))


def _weighted_rows(table: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows of a table `[R, C]`, with row indices and weights `[n, corners]`: `[n, C]`."""
    if is_transformed() or 0 in bags.shape:
        return torch.einsum("nkc,nk->nc", table[bags], weights)
    if torch.compiler.is_compiling():
        return F.embedding_bag(bags, table, mode="sum", per_sample_weights=weights)
    rows: Tensor = _WeightedRows.apply(table, bags, weights)
    return rows


class _WeightedRows(torch.autograd.Function):
    """`F.embedding_bag` with a backward pass that can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
        numbers = bags.flatten()
        starts = torch.arange(0, bags.numel(), bags.shape[1], device=bags.device)
        out, *places = torch.ops.aten._embedding_bag(table, numbers, starts, False, 0, False, weights.flatten())
        ctx.save_for_backward(table, bags, weights, starts, *places)
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        table, bags, weights, starts, *places = ctx.saved_tensors
        needs_table, _, needs_weights = ctx.needs_input_grad
        if torch.is_grad_enabled() or is_transformed():
            by_bag = grad.unsqueeze(1) * weights.unsqueeze(2)
            grad_table = torch.zeros_like(table).index_add(0, bags.flatten(), by_bag.flatten(0, 1))
            grad_weights = torch.einsum("nkc,nc->nk", table[bags], grad)
        else:
            numbers, factors, place = bags.flatten(), weights.flatten(), places[0]
            if needs_table:
                grad_table = torch.ops.aten._embedding_bag_backward(
                    grad, numbers, starts, *places, table.shape[0], False, 0, False, factors
                )
            if needs_weights:
                grad_weights = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                    grad, table, numbers, starts, place, 0
                ).view_as(weights)
        return grad_table if needs_table else None, None, grad_weights if needs_weights else None


def _by_reference(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    geometry: _Geometry,
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


def _torchvision(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, geometry: _Geometry
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

"""Deformable convolution of Eq. 4: each tap of the kernel reads where the query's content tells it to.

Exactly: tap m of query q reads at q + p_m + offset_m(q), between the grid points by linear interpolation in each axis,
and zero outside the input. That is A_m(q, k) = G(k, q + p_m + offset_m(q)) with the bilinear kernel
G(a, b) = prod over axes of max(0, 1 - |a - b|). Offsets come from a convolution of the same kernel.
"""

import contextlib
import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import deform_conv2d

from lightning_attn.attention import definition
from lightning_attn.attention.checks import check_input, check_mask, require_int, require_ndim, require_odd

Algorithm = Literal["auto", "gather", "torchvision", "definition"]

_BLOCK_ELEMENTS = 4_000_000
"""Sampled values that are held at once, 16 MB: larger blocks cost fresh memory pages, smaller ones more calls."""

_FAR = 1e7
"""Further outside than any map is wide, and exact in float32."""


class DeformableConv(nn.Module):
    """Convolution whose taps are moved by learned offsets (Eq. 4), plain or modulated (Zhu et al., CVPR 2019).

    The offsets of a query come from `offset`, a convolution of the same kernel, stride, dilation and padding. It starts
    at zero, so that the plain form starts as the regular convolution of the same `weight`. The modulated form has one
    more output per tap, whose sigmoid scales what the tap reads; as in the published models it starts at zero too, so
    that every tap counts half at the start. Weights are exchangeable with those models: channels `2 m` and `2 m + 1`
    of `offset` move tap m in y and in x (in one dimension, channel m moves tap m); the modulation's channels come last.

    The causal form, for a decoder, is a choice of ours since the paper names none: the taps of query q start at
    `q - (kernel_size - 1) * dilation, ..., q - dilation, q`, and Omega_q holds the positions up to q only. The share of
    a later position in the interpolation is dropped, whatever the offset; the offsets are computed causally as well.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd number of taps along each axis.
        ndim: 1 for sequences `[B, L, C]`, 2 for maps `[B, C, H, W]`.
        stride: Distance of neighbouring queries, in input positions.
        dilation: Distance of neighbouring taps before they move, in input positions.
        padding: Zeros around the input on each side; None for `dilation * (kernel_size - 1) // 2`, which with stride 1
            keeps the size.
        modulated: Scale each tap by a learned sigmoid.
        causal: See above; needs `ndim=1` and `stride=1`.
        bias: Add a learned vector to every output.
        algorithm: `"gather"` samples all taps with one weighted gather and multiplies them with `weight` in blocks;
            `"torchvision"` is torchvision's operator, for maps; `"definition"` is the equation in plain loops, for
            tests; `"auto"` is torchvision's operator for maps on CUDA and the gather elsewhere. All give the same
            numbers.

    Attributes:
        weight: `[out_channels, in_channels, kernel_size(, kernel_size)]`.
        bias: `[out_channels]`, or None.
        offset: The convolution that gives offsets and modulation. See `offset_parameters`.

    Raises:
        ValueError: If an argument is out of range or does not fit the others; the message names it and the way out.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        ndim: Literal[1, 2] = 2,
        stride: int = 1,
        dilation: int = 1,
        padding: int | None = None,
        modulated: bool = False,
        causal: bool = False,
        bias: bool = True,
        algorithm: Algorithm = "auto",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("out_channels", out_channels, 1),
            ("stride", stride, 1),
            ("dilation", dilation, 1),
            ("padding", 0 if padding is None else padding, 0),
        ):
            require_int(name, value, least)
        require_odd("kernel_size", kernel_size)
        require_ndim(ndim)
        if causal:
            if ndim != 1:
                raise ValueError("causal=True needs ndim=1: a map has no order in which its positions become known.")
            if stride != 1:
                raise ValueError(
                    f"causal=True needs stride=1, got {stride}: with a stride there is no output for every token."
                )
            if padding is not None:
                raise ValueError(
                    f"causal=True pads {(kernel_size - 1) * dilation} zeros on the left only; "
                    f"leave padding=None, got {padding}."
                )
        _check_algorithm(algorithm, ndim)
        self.in_channels, self.out_channels, self.kernel_size, self.ndim = in_channels, out_channels, kernel_size, ndim
        self.stride, self.dilation, self.modulated, self.causal = stride, dilation, modulated, causal
        self.padding = dilation * (kernel_size - 1) // 2 if padding is None else padding
        self.algorithm: Algorithm = algorithm

        taps = kernel_size**ndim
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *[kernel_size] * ndim))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        conv = nn.Conv1d if ndim == 1 else nn.Conv2d
        self.offset = conv(
            in_channels,
            taps * (ndim + modulated),
            kernel_size,
            stride=stride,
            dilation=dilation,
            padding=0 if causal else self.padding,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight and bias as torch's convolutions start; offsets and modulation at zero."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)
        nn.init.zeros_(self.offset.weight)
        assert self.offset.bias is not None, "made with a bias"
        nn.init.zeros_(self.offset.bias)

    def extra_repr(self) -> str:
        """The settings that the parameters do not show."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, ndim={self.ndim}, "
            f"stride={self.stride}, dilation={self.dilation}, padding={self.padding}, modulated={self.modulated}, "
            f"causal={self.causal}, bias={self.bias is not None}, algorithm={self.algorithm!r}"
        )

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        cache: "DeformableConvCache | None" = None,
    ) -> Tensor:
        """Convolves a batch of sequences or maps.

        Args:
            x: `[B, L, C]` or `[B, C, H, W]`.
            key_padding_mask: Bool, `[B, L]` or `[B, H, W]`, True where `x` is padding. Padding reads as zero, so that a
                padded sentence gives, at its valid positions, what it gives alone.
            cache: From `new_cache`; `x` then holds the next tokens of sequences that are decoded step by step. Always
                computed by the gather.

        Returns:
            `[B, L', out_channels]` or `[B, out_channels, H', W']`, with the sizes of a regular convolution.

        Raises:
            ValueError: If a shape or dtype does not fit; the message names the argument.
        """
        self._check_input(x, key_padding_mask)
        if cache is not None:
            return self._decode(x, key_padding_mask, cache)
        if key_padding_mask is not None:
            x = x.masked_fill(key_padding_mask.unsqueeze(2 if self.ndim == 1 else 1), 0)
        past = (self.kernel_size - 1) * self.dilation if self.causal else 0
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

    def new_cache(self) -> "DeformableConvCache":
        """A cache for decoding step by step, which gives the numbers of the full pass.

        Raises:
            ValueError: If the convolution is not causal, so that a step would change what earlier ones gave.
        """
        if not self.causal:
            raise ValueError("new_cache: only a causal convolution is decoded step by step; build it with causal=True.")
        return DeformableConvCache()

    def _offsets(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Offsets and modulation, in the layout of `deformable_conv`.

        In float32 also under autocast: an offset of 5 has steps of 1/32 in bfloat16.
        """
        device = x.device.type
        exact = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if exact else contextlib.nullcontext():
            x = x.to(self.offset.weight.dtype)
            moved: Tensor = self.offset(x.transpose(1, 2)).transpose(1, 2) if self.ndim == 1 else self.offset(x)
            if not self.modulated:
                return moved, None
            taps = self.kernel_size**self.ndim
            channel = 2 if self.ndim == 1 else 1
            offset, mask = torch.split(moved, [taps * self.ndim, taps], dim=channel)
            return offset, mask.sigmoid()

    def _decode(self, x: Tensor, key_padding_mask: Tensor | None, cache: "DeformableConvCache") -> Tensor:
        if not self.causal:
            raise ValueError("cache: only a causal convolution is decoded step by step; build it with causal=True.")
        if key_padding_mask is not None:
            raise ValueError("cache: key_padding_mask is not for decoding step by step; pass None.")
        first = cache.length
        cache.append(x)
        past = (self.kernel_size - 1) * self.dilation
        offset, mask = self._offsets(cache.read(first - past))
        position = offset + _axis_taps(x.shape[1], self.kernel_size, 1, self.dilation, past - first, offset)
        last = torch.arange(first, cache.length, device=x.device)[:, None, None]
        index, share = _corners([position], [cache.length], last, mask)
        product = _sampled_product(
            cache.storage[None],
            cache.rows(index).flatten(0, 1)[None],
            share.to(cache.storage.dtype).flatten(0, 1)[None],
            _as_matrix(self.weight),
            self.bias,
        )
        return product.view(*x.shape[:2], self.out_channels)

    def _check_input(self, x: Tensor, key_padding_mask: Tensor | None) -> None:
        check_input("x", x, self.ndim, self.in_channels, "in_channels")
        sizes = x.shape[1:2] if self.ndim == 1 else x.shape[2:]
        reach = 0 if self.causal else self.dilation * (self.kernel_size - 1) - 2 * self.padding
        if min(sizes) <= max(0, reach):
            raise ValueError(
                f"x must have at least {max(0, reach) + 1} positions along each axis for "
                f"kernel_size={self.kernel_size}, dilation={self.dilation} and padding={self.padding}, "
                f"got shape {tuple(x.shape)}."
            )
        check_mask(key_padding_mask, x, "x's positions")


class DeformableConvCache:
    """The inputs of sequences that are decoded step by step; made by `DeformableConv.new_cache`.

    Offsets may reach back to the first token, so all inputs are kept: once each, in the order in which they came, with
    a table that says which belong to which sequence. Reordering for beam search copies the table only. For inference:
    no gradient flows into earlier steps.

    Attributes:
        length: Number of tokens seen so far.
        storage: Row 0 is zero, for what lies outside the sequence; then the inputs, then room for more. `[rows, C]`.
    """

    def __init__(self) -> None:
        self.length = 0
        self.storage = torch.empty(0, 0)
        self._used = 0
        self._table = torch.empty(0, 0, dtype=torch.long)

    def append(self, x: Tensor) -> None:
        """Adds the next tokens `[B, n, C]`.

        Raises:
            ValueError: If B is not the number of sequences in the cache.
        """
        batch, tokens, channels = x.shape
        if self._used == 0:
            self.storage = x.new_zeros(1, channels, dtype=_sampling_dtype(x))
            self._used = 1
            self._table = torch.empty(batch, 0, dtype=torch.long, device=x.device)
        if batch != len(self._table):
            raise ValueError(f"x has batch size {batch}, the cache has {len(self._table)}: they must be equal.")
        end = self._used + batch * tokens
        if end > len(self.storage):
            grown = self.storage.new_empty(2 * end, channels)
            grown[: self._used] = self.storage[: self._used]
            self.storage = grown
        self.storage[self._used : end] = x.detach().flatten(0, 1)
        new = torch.arange(self._used, end, device=x.device).view(batch, tokens)
        self._table = torch.cat((self._table, new), dim=1)
        self._used = end
        self.length += tokens

    def read(self, start: int) -> Tensor:
        """The inputs from position `start` on, `[B, length - start, C]`; zeros at negative positions."""
        return self.storage[F.pad(self._table[:, max(0, start) :], (max(0, -start), 0))]

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the storage for positions `[B, ...]` counted from 1; 0 stands for outside."""
        return F.pad(self._table, (1, 0)).gather(1, index.flatten(1)).view_as(index)

    def reorder(self, index: Tensor, beams: int = 1) -> None:
        """See `DecodingCache.reorder`."""
        self._table = self._table.index_select(0, index)


def offset_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of the offset (and modulation) convolutions of every `DeformableConv` in `module`.

    The paper trains them at 0.1 times the learning rate; here is what to put into that parameter group.
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
    stride: int = 1,
    dilation: int = 1,
    padding: int | None = None,
    causal: bool = False,
    algorithm: Algorithm = "auto",
) -> Tensor:
    """Deformable convolution with given offsets (Eq. 4), in one or two dimensions by the rank of `x`.

    The gather holds, besides its inputs and output, a copy of `x` with one more position and, for the backward pass,
    an index and a share per tap and corner: with K taps and N queries 48 K N bytes in two dimensions, 1.8 MB for 3 x 3
    at 50 x 84. What the taps read (C K N values, 39 MB there with 256 channels) exists in blocks of about 16 MB only,
    and is read again in the backward pass.

    Args:
        x: `[B, L, C]` or `[B, C, H, W]`.
        offset: `[B, L', k]`, or `[B, 2 k k, H', W']` with channels `2 m` and `2 m + 1` the move of tap m in y and x.
            NaN gives NaN; an infinite offset lies outside and reads zero.
        weight: `[out, C, k(, k)]`.
        bias: `[out]`.
        mask: Factor on what a tap reads, `[B, L', k]` or `[B, k k, H', W']`; None for one.
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
    ndim, kernel_size = x.dim() - 2, weight.shape[-1]
    if ndim not in (1, 2) or weight.dim() != x.dim() or weight.shape[1] != x.shape[2 if ndim == 1 else 1]:
        raise ValueError(
            f"x and weight must be [B, L, C] and [out, C, k], or [B, C, H, W] and [out, C, k, k], "
            f"got shapes {tuple(x.shape)} and {tuple(weight.shape)}."
        )
    _check_algorithm(algorithm, ndim)
    reach = dilation * (kernel_size - 1)
    padding = reach // 2 if padding is None else padding
    sizes = list(x.shape[1:2] if ndim == 1 else x.shape[2:])
    outputs = sizes if causal else [(size + 2 * padding - reach - 1) // stride + 1 for size in sizes]
    taps = kernel_size**ndim
    for name, tensor, channels in (("offset", offset, taps * ndim), ("mask", mask, taps)):
        expected = (x.shape[0], *outputs, channels) if ndim == 1 else (x.shape[0], channels, *outputs)
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name} must have the shape {expected}, got {tuple(tensor.shape)}.")

    if algorithm == "definition":
        return definition.deformable_convolution(
            x, offset, weight, bias, mask=mask, stride=stride, dilation=dilation, padding=padding, causal=causal
        )
    if algorithm == "torchvision" or (algorithm == "auto" and ndim == 2 and x.is_cuda):
        return _torchvision(x, offset, weight, bias, mask, stride, dilation, padding)

    dtype = _sampling_dtype(x)
    # Axes of offsets, mask and positions: sample, query (two axes in a map), tap (two axes in a map).
    if ndim == 1:
        moves, rows = [offset], x
    else:
        kernel = (kernel_size, kernel_size)
        moves = list(torch.unflatten(offset, 1, (*kernel, 2)).permute(3, 0, 4, 5, 1, 2))
        mask = None if mask is None else torch.unflatten(mask, 1, kernel).permute(0, 3, 4, 1, 2)
        rows = x.flatten(2).transpose(1, 2)
    positions = []
    for axis, (move, count) in enumerate(zip(moves, outputs, strict=True)):
        start = _axis_taps(count, kernel_size, stride, dilation, reach if causal else padding, move)
        shape = [count, kernel_size] if ndim == 1 else [1, 1, 1, 1]
        if ndim == 2:
            shape[axis], shape[2 + axis] = count, kernel_size
        positions.append(move + start.view(shape))
    last = torch.arange(sizes[0], device=x.device)[:, None, None] if causal else None
    index, share = _corners(positions, sizes, last, mask)
    flat = (x.shape[0], math.prod(outputs), taps, 2**ndim)
    product = _convolve(
        F.pad(rows, (0, 0, 1, 0)).to(dtype),
        index.reshape(flat),
        share.to(dtype).reshape(flat),
        _as_matrix(weight),
        bias,
    )
    if ndim == 1:
        return product
    result = torch.unflatten(product.transpose(1, 2), 2, outputs)
    # In the memory format of x: what follows is slow on formats that alternate.
    return result if x.is_contiguous(memory_format=torch.channels_last) else result.contiguous()


def _check_algorithm(algorithm: str, ndim: int) -> None:
    if algorithm not in get_args(Algorithm):
        raise ValueError(f"algorithm must be one of {list(get_args(Algorithm))}, got {algorithm!r}.")
    if algorithm == "torchvision" and ndim == 1:
        raise ValueError("algorithm='torchvision' knows maps only; for sequences (ndim=1) use 'auto' or 'gather'.")


def _sampling_dtype(x: Tensor) -> torch.dtype:
    """Half precision is sampled in float32, so that interpolation adds no rounding of its own."""
    return torch.promote_types(x.dtype, torch.float32)


def _as_matrix(weight: Tensor) -> Tensor:
    """`[out, C, k(, k)]` to `[out, K C]`: the channels of one tap lie together, as they are sampled."""
    return weight.flatten(2).transpose(1, 2).flatten(1)


def _axis_taps(count: int, kernel_size: int, stride: int, dilation: int, left: int, like: Tensor) -> Tensor:
    """Where the taps of each query start along one axis, `[count, k]`, in float32 or better."""
    queries = torch.arange(count, device=like.device) * stride - left
    taps = torch.arange(kernel_size, device=like.device) * dilation
    return (queries[:, None] + taps).to(torch.promote_types(like.dtype, torch.float32))


def _corners(
    positions: list[Tensor], sizes: list[int], last: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The grid points around each sampling position and their shares G(k, position), times `mask`.

    Args:
        positions: One tensor per axis, y before x, all of one shape.
        sizes: Number of grid points along each axis.
        last: The last grid point that may be read, to broadcast against `[positions, corner]`; None for all.
        mask: Factor on the shares, in the shape of a position.

    Returns:
        Indices, 1 + the number of the grid point in raster order, or 0 outside; and shares. Each has the shape of a
        position with one more axis for the 2 or 4 corners.
    """
    index = torch.zeros((), dtype=torch.long, device=positions[0].device)
    inside = torch.ones((), dtype=torch.bool, device=positions[0].device)
    share = positions[0].new_ones(()) if mask is None else mask[..., None]
    for position, size in zip(positions, sizes, strict=True):
        # Further outside is no different, and must not overflow the integer. At -1 itself the slope is still that of 0.
        position = position.clamp(-2, size)
        lower = position.detach().floor()
        fraction = position - lower
        corner = torch.stack((lower, lower + 1), dim=-1)
        within = (corner >= 0) & (corner <= (size - 1 if last is None else last))
        inside = (inside[..., None] & within[..., None, :]).flatten(-2)
        index = (index[..., None] * size + corner.long()[..., None, :]).flatten(-2)
        share = (share[..., None] * torch.stack((1 - fraction, fraction), dim=-1)[..., None, :]).flatten(-2)
    # NaN is never inside; its share stays NaN.
    return torch.where(inside, index + 1, 0), share


def _convolve(rows: Tensor, index: Tensor, share: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """`_sampled_product` in blocks, whose samples are not kept for the backward pass but read again.

    Small blocks are faster as well: sampled values do not go through main memory. A program has one, since it may not
    know the lengths yet.
    """
    if torch.compiler.is_exporting():
        return _sampled_product(rows, index, share, matrix, bias)
    queries = index.shape[1]
    queries_at_once = max(1, _BLOCK_ELEMENTS // matrix.shape[1])
    samples_at_once = max(1, queries_at_once // queries)
    parts = math.ceil(queries / queries_at_once)
    outputs = []
    for samples in zip(*(torch.split(t, samples_at_once) for t in (rows, index, share)), strict=True):
        for part in zip(samples[1].chunk(parts, dim=1), samples[2].chunk(parts, dim=1), strict=True):
            arguments = (samples[0], *part, matrix, bias)
            if torch.is_grad_enabled():
                block = checkpoint(_sampled_product, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                block = _sampled_product(*arguments)
            outputs.append(block.flatten(0, 1))
    return torch.unflatten(torch.cat(outputs), 0, (rows.shape[0], queries))


def _sampled_product(rows: Tensor, index: Tensor, share: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Reads the taps of each query and multiplies them with the weights.

    Args:
        rows: What can be read, `[B, R, C]`; row 0 of each sample is zero.
        index: Rows to read, of the same sample, `[B, N, K, corners]`.
        share: Their shares, in the dtype of `rows`.
        matrix: `[out, K C]`.
        bias: `[out]`.

    Returns:
        `[B, N, out]`.
    """
    batch, queries, _, corners = index.shape
    first = torch.arange(batch, device=index.device) * rows.shape[1]
    bags = (index + first[:, None, None, None]).view(-1, corners)
    sampled = F.embedding_bag(bags, rows.flatten(0, 1), mode="sum", per_sample_weights=share.reshape(-1, corners))
    columns = sampled.view(batch * queries, matrix.shape[1]).to(matrix.dtype)
    if columns.is_cpu and columns.shape[0] and not torch.compiler.is_compiling():
        # The same product as a 1x1 convolution, whose library is the faster one on the CPU (26 against 44 ms for a map
        # of 50 x 84 with 256 channels).
        image = columns[None, :, None].permute(0, 3, 1, 2)
        product = F.conv2d(image, matrix[:, :, None, None], bias)[0, :, :, 0].T
    else:
        product = F.linear(columns, matrix, bias)
    return torch.unflatten(product, 0, (batch, queries))


def _torchvision(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: int,
    dilation: int,
    padding: int,
) -> Tensor:
    """The operator of torchvision in float32 or better, guarded: with a NaN offset it reads outside the memory of x."""
    dtype = _sampling_dtype(x)
    broken = offset.detach().isnan()
    tame = offset.nan_to_num(0.0, _FAR, -_FAR).clamp(-_FAR, _FAR)
    tensors = [t if t is None else t.to(dtype) for t in (x, tame, weight, bias, mask)]
    result: Tensor = deform_conv2d(*tensors[:4], stride=stride, padding=padding, dilation=dilation, mask=tensors[4])
    return result.masked_fill(broken.any(1, keepdim=True), math.nan).to(x.dtype)

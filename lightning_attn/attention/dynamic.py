"""Dynamic convolution of Eq. 5 to 7, one and two-dimensional, with the gated linear unit in front of it."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_attn.attention import reference
from lightning_attn.attention.decoding import DynamicConvCache
from lightning_attn.attention.kernels import HAS_TRITON
from lightning_attn.attention.positions import computation_dtype
from lightning_attn.attention.projections import has_only_weight, is_plain, project, project_map
from lightning_attn.attention.taps import aggregate_by_taps, aggregate_in_plain_operations
from lightning_attn.attention.transforms import is_exporting, is_transformed
from lightning_attn.errors import InputError
from lightning_attn.validation import (
    check_input,
    check_mask,
    divisors,
    require_bool,
    require_dropout,
    require_int,
    require_ndim,
    require_odd,
)

DynamicAlgorithm = Literal["auto", "band", "triton", "taps", "reference"]

_ALGORITHMS = {1: ("auto", "band", "reference"), 2: ("auto", "triton", "taps", "reference")}

# Maximum elements of the predicted kernels, N x G x N_k, that are saved for the backward pass (64 MiB in float32).
# Larger kernels are computed block by block and recomputed in the backward pass.
KERNEL_ELEMENTS = 1 << 24
# Elements of such a block: few enough to stay in cache, enough rows for matrix products at full speed.
BLOCK_ELEMENTS = 1 << 23
# The same for the Triton kernel, which saves the logits, in the dtype of the projections: again 64 MiB, in half
# precision. Its blocks need not fit in a cache, but must have enough rows to fill a GPU.
TRITON_KERNEL_ELEMENTS = 1 << 25
TRITON_BLOCK_ELEMENTS = 1 << 26
# Minimum queries of one band matrix, if the kernel has fewer taps. Longer sentences are split: a long band is mostly
# zeros.
BAND_QUERIES = 64


class DynamicConv(nn.Module):
    """Depth-wise convolution whose kernel each position predicts from its own content (Eq. 5 to 7 of the paper).

    A linear layer C -> 2C and a gated linear unit (GLU) give x. From x_q a linear layer C -> G * N_k predicts a kernel
    for each of the G channel groups, which a softmax over its N_k positions normalises. At q, channel c of x in the
    window is weighted with the kernel of group ceil(c / (C / G)) and summed. A linear layer C -> C follows.

    Where the paper is silent, this follows the design that it builds on (Wu et al. 2019): the linear layers before and
    after have biases, the predictor has none; kernel positions outside the input or on padding read zero, and the
    kernel is not renormalised without them.

    Parameters: `input_proj` (C -> 2C, value before gate), `kernel_proj` (C -> G * N_k, all taps of one group before the
    next group, taps of a map row by row), `out_proj` (W), and with `conv_bias=True` a vector `conv_bias`. Projections
    may be replaced, wrapped, parametrised or hooked; such a layer is called, once in each pass.

    The unfolded input N x C x N_k never exists. Sentences are multiplied with band matrices. Maps are summed over
    shifted copies tap by tap, or on a GPU in one kernel that also normalises the weights. Weights of more than
    `KERNEL_ELEMENTS` elements (`TRITON_KERNEL_ELEMENTS` in that kernel) are computed in blocks and recomputed in the
    backward pass.

    Args:
        dim: Width C of input and output.
        kernel_size: Odd n_k: N_k is n_k in a sentence and n_k^2 in a map.
        groups: Number of channel groups N_g that share a kernel; divides `dim`.
        ndim: 1 for sequences `[B, L, C]`, 2 for maps `[B, C, H, W]`.
        causal: The kernel covers the positions q - n_k + 1 to q instead of those around q. Sequences only.
        dropout: Probability of dropping an element of the normalised kernel in training.
        algorithm: `"band"` for sequences; `"triton"` or `"taps"` for maps; `"auto"` takes `"triton"` where that can
            compute the input: on a CUDA device with Triton, float32 or half precision, normalised kernels without
            `renorm_padding` and without dropout in this pass, neither exported nor transformed by `torch.func`.
            `"reference"` runs the literal loops of `reference.py`, without dropout.
        weight_softmax: Normalise the kernel by a softmax (Eq. 7). This and the next two are named as in fairseq.
        conv_bias: Add a learned vector to the convolution's output, before `out_proj`.
        renorm_padding: Normalise over the kernel positions only that lie inside the input and not on padding.
        device: Of the parameters, as in torch's modules.
        dtype: Of the parameters, as in torch's modules.

    Raises:
        ValueError: If an argument is out of range or does not fit the others; the message names the fix.
    """

    conv_bias: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        groups: int = 16,
        ndim: Literal[1, 2] = 1,
        causal: bool = False,
        dropout: float = 0.0,
        algorithm: DynamicAlgorithm = "auto",
        weight_softmax: bool = True,
        conv_bias: bool = False,
        renorm_padding: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(dim, kernel_size, groups, ndim, causal, dropout, algorithm)
        for name, flag in (("conv_bias", conv_bias), ("weight_softmax", weight_softmax)):
            require_bool(name, flag)
        require_bool("renorm_padding", renorm_padding)
        if renorm_padding and not weight_softmax:
            raise InputError("renorm_padding=True needs weight_softmax=True: without it there is no normalisation.")
        self.dim, self.kernel_size, self.groups, self.ndim = dim, kernel_size, groups, ndim
        self.causal, self.dropout, self.algorithm = causal, dropout, algorithm
        self.weight_softmax, self.renorm_padding = weight_softmax, renorm_padding
        if algorithm == "triton" and (reason := self._setting_without_triton()):
            raise InputError(_triton_error(reason))
        self.input_proj = nn.Linear(dim, 2 * dim, device=device, dtype=dtype)
        self.kernel_proj = nn.Linear(dim, groups * kernel_size**ndim, bias=False, device=device, dtype=dtype)
        self.out_proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        vector = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if conv_bias else None
        self.register_parameter("conv_bias", vector)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform projections, biases zero."""
        for projection in (self.input_proj, self.kernel_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
        nn.init.zeros_(self.input_proj.bias)
        nn.init.zeros_(self.out_proj.bias)
        if self.conv_bias is not None:
            nn.init.zeros_(self.conv_bias)

    @override
    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, groups={self.groups}, ndim={self.ndim}, causal={self.causal}, "
            f"dropout={self.dropout:g}, weight_softmax={self.weight_softmax}, "
            f"renorm_padding={self.renorm_padding}, algorithm={self.algorithm!r}"
        )

    def new_cache(self) -> DynamicConvCache:
        """Creates a cache for decoding step by step, with the same results as the full pass.

        Raises:
            ValueError: If the module is not causal, so that its outputs depend on later tokens.
        """
        if not self.causal:
            raise ValueError(
                "new_cache: only a causal sequence can be decoded step by step; build DynamicConv with ndim=1 and "
                f"causal=True (here ndim={self.ndim}, causal={self.causal})."
            )
        return DynamicConvCache(self)

    def forward(
        self, x: Tensor, *, key_padding_mask: Tensor | None = None, cache: DynamicConvCache | None = None
    ) -> Tensor:
        """Convolves every position with the kernel it predicts.

        Args:
            x: `[B, L, C]` or `[B, C, H, W]`.
            key_padding_mask: Bool, `[B, L]` or `[B, H, W]`, True where a position is padding. Its content, even NaN, is
                never read. It counts as zero, before the GLU for itself and after it for others, so that the valid
                positions of a padded sentence get the same outputs as without padding.
            cache: From `new_cache`; `x` then holds the next tokens of a sequence that is decoded step by step.

        Returns:
            Same shape as `x`.

        Raises:
            ValueError: If a shape or dtype does not fit; the message names the argument.
        """
        self._check_input(x, key_padding_mask, cache)
        if 0 in x.shape[1:]:  # no position
            return x.clone()
        channel = -1 if self.ndim == 1 else 1
        padding = None if key_padding_mask is None else key_padding_mask.unsqueeze(channel)
        if padding is not None:
            x = x.masked_fill(padding, 0.0)
        if self.algorithm == "reference":
            return self._by_reference(x, key_padding_mask, cache)
        projected = self._project(self.input_proj, x)
        if is_transformed():  # F.glu has no forward-mode derivative of second order
            linear, gate = projected.chunk(2, dim=channel)
            content = (linear * torch.sigmoid(gate)).contiguous()
        else:
            content = F.glu(projected, dim=channel).contiguous()
        value = content if padding is None else content.masked_fill(padding, 0.0)
        if self.ndim == 1:
            aggregated = self._aggregate_sequence(content, value, key_padding_mask, cache)
        elif self._takes_triton(content):
            aggregated = self._aggregate_map_by_triton(content, value)
        else:
            aggregated = self._aggregate_map(content, value, key_padding_mask)
        if self.conv_bias is not None:
            bias = self.conv_bias.to(aggregated.dtype)
            aggregated = aggregated + (bias if self.ndim == 1 else bias[:, None, None])
        return self._project(self.out_proj, aggregated)

    def _project(self, projection: nn.Module, x: Tensor) -> Tensor:
        """Applies a linear layer to the channels, which are last in a sequence and second in a map."""
        if self.ndim == 1:
            return project(projection, x)
        if is_plain(projection):
            return F.conv2d(x, projection.weight[:, :, None, None], projection.bias)
        return torch.unflatten(project_map(projection, x.flatten(2)), 2, x.shape[2:]).contiguous()

    def _logits(self, content: Tensor) -> Callable[[int, int], Tensor]:
        """A function that gives the logits of the kernels of rows `start:stop`.

        They are `[B, L, G, N_k]` or `[B, G, N_k, H, W]`.
        """
        axis, rows = (-1, 1) if self.ndim == 1 else (1, 2)

        def predict(part: Tensor) -> Tensor:
            return torch.unflatten(self._project(self.kernel_proj, part), axis, (self.groups, -1))

        if is_plain(self.kernel_proj):
            return lambda start, stop: predict(content.narrow(rows, start, stop - start))
        logits = predict(content)  # a modified layer is called once
        return lambda start, stop: logits.narrow(1 if self.ndim == 1 else 3, start, stop - start)

    def _kernel(self, logits: Tensor, outside: Tensor | None) -> Tensor:
        """The kernels of Eq. 6 and 7 from logits, in float32 or better; `outside` is True where there is no key."""
        axis = -1 if self.ndim == 1 else 2
        # Half precision is enough for the logits, but not for the sum of hundreds of exponentials.
        logits = logits.to(computation_dtype(logits))
        if not self.weight_softmax:
            kernel = logits
        elif outside is None:
            kernel = torch.softmax(logits, dim=axis)
        else:
            kernel = torch.softmax(logits.masked_fill(outside, torch.finfo(logits.dtype).min), dim=axis)
            kernel = kernel.masked_fill(outside, 0.0)
        return F.dropout(kernel, self.dropout, self.training)

    def _aggregate_sequence(
        self, content: Tensor, value: Tensor, padding: Tensor | None, cache: DynamicConvCache | None
    ) -> Tensor:
        first = -(self.kernel_size - 1 if self.causal else self.kernel_size // 2)  # where tap 0 of query 0 reads
        seen = 0 if cache is None else cache.length
        if cache is not None:
            value = _extend(cache, value, self.kernel_size - 1)
            first = 0
        value = torch.unflatten(value, -1, (self.groups, -1))
        logits = self._logits(content)

        def block(start: int, stop: int) -> Tensor:
            low, high = max(0, start + first), min(value.shape[1], stop - 1 + first + self.kernel_size)
            outside = self._outside_of_sequence(start, stop, first, value, padding, seen)
            kernel = self._kernel(logits(start, stop), outside).to(value.dtype)
            if torch.compiler.is_compiling():
                # Band sizes are quotients of symbolic lengths, which the compiler needs minutes for.
                return _aggregate_by_shifts(kernel, value, start + first)
            return aggregate_with_bands(kernel, value[:, low:high], start + first - low)

        return self._in_blocks(block, content.shape[1], content.shape[0], dim=1).flatten(2)

    def _outside_of_sequence(
        self, start: int, stop: int, first: int, value: Tensor, padding: Tensor | None, seen: int
    ) -> Tensor | None:
        """True at kernel positions without a key, `[B or 1, stop - start, 1, N_k]`; None without `renorm_padding`."""
        if not self.renorm_padding:
            return None
        length, device = value.shape[1], value.device
        positions = torch.arange(start, stop, device=device)[:, None] + first
        positions = positions + torch.arange(self.kernel_size, device=device)
        if self.causal and first == 0:  # the values begin with zeros, then those of earlier steps
            return (positions < self.kernel_size - 1 - seen)[None, :, None]
        outside = ((positions < 0) | (positions >= length))[None]
        if padding is not None:
            outside = outside | padding[:, positions.clamp(0, length - 1)]
        return outside.unsqueeze(2)

    def _aggregate_map(self, content: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        radius = self.kernel_size // 2
        # The sum has up to N_k terms, so it is computed in the precision of the kernels.
        value = torch.unflatten(value.to(computation_dtype(value)), 1, (self.groups, -1))
        logits = self._logits(content)

        def block(start: int, stop: int) -> Tensor:
            low, high = max(0, start - radius), min(value.shape[3], stop + radius)
            outside = self._outside_of_map(start, stop, content, padding)
            kernel = torch.unflatten(self._kernel(logits(start, stop), outside), 2, (self.kernel_size, -1))
            plain = is_exporting() or is_transformed()
            aggregate = aggregate_in_plain_operations if plain else aggregate_by_taps
            aggregated: Tensor = aggregate(kernel, value[:, :, :, low:high], start - radius - low)
            return aggregated

        aggregated = self._in_blocks(block, content.shape[2], content.shape[0] * content.shape[3], dim=3)
        return aggregated.flatten(1, 2).to(content.dtype)

    def _takes_triton(self, content: Tensor) -> bool:
        """Whether the Triton kernel computes this map; an error if it was asked for and cannot."""
        if self.algorithm not in ("auto", "triton"):
            return False
        reason = self._triton_refusal(content)
        if reason is not None and self.algorithm == "triton":
            raise InputError(_triton_error(reason))
        return reason is None

    def _setting_without_triton(self) -> str | None:
        """Why no map can be computed by the Triton kernel; None if there is no reason."""
        if not HAS_TRITON:
            return "the package triton is not installed"
        if not self.weight_softmax:
            return "it supports no weight_softmax=False"
        if self.renorm_padding:
            return "it supports no renorm_padding=True"
        return None

    def _triton_refusal(self, content: Tensor) -> str | None:
        """Why the Triton kernel cannot compute this map; None if it can."""
        if not (content.is_cuda or (self.algorithm == "triton" and _interprets_triton())):
            return f"x is on {content.device.type!r}, not on a CUDA device"
        if content.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"it supports float32, float16 and bfloat16, and the convolution is in {content.dtype}"
        if self.training and self.dropout > 0.0:
            return f"it supports no dropout, got dropout={self.dropout:g} in training mode"
        if is_transformed() or is_exporting():
            return "it supports no transforms of torch.func, forward-mode derivatives and torch.export"
        return self._setting_without_triton()

    def _aggregate_map_by_triton(self, content: Tensor, value: Tensor) -> Tensor:
        from lightning_attn.attention.kernels.dynamic import softmax_and_aggregate  # imports Triton

        radius = self.kernel_size // 2
        value = torch.unflatten(value, 1, (self.groups, -1))
        logits = self._logits_by_one_product(content) if has_only_weight(self.kernel_proj) else self._logits(content)

        def block(start: int, stop: int) -> Tensor:
            low, high = max(0, start - radius), min(value.shape[3], stop + radius)
            part = value[:, :, :, low:high]
            return softmax_and_aggregate(logits(start, stop), part, self.kernel_size, start - radius - low)

        aggregated = self._in_blocks(block, content.shape[2], content.shape[0] * content.shape[3], dim=3, triton=True)
        return aggregated.flatten(1, 2).to(content.dtype)

    def _logits_by_one_product(self, content: Tensor) -> Callable[[int, int], Tensor]:
        """`_logits` of a map by a single matrix product for all samples, G and N_k before B in memory."""

        def predict(start: int, stop: int) -> Tensor:
            part = content[:, :, start:stop].transpose(0, 1)
            logits = torch.mm(self.kernel_proj.weight, part.flatten(1))
            return logits.view(self.groups, self.kernel_size**2, *part.shape[1:]).movedim(2, 0)

        return predict

    def _outside_of_map(self, start: int, stop: int, content: Tensor, padding: Tensor | None) -> Tensor | None:
        """True at kernel positions without a key, `[B or 1, 1, N_k, rows, W]`; None without `renorm_padding`."""
        if not self.renorm_padding:
            return None
        height, width = content.shape[2:]
        inside = content.new_ones(1, height, width, dtype=torch.bool) if padding is None else ~padding
        radius = self.kernel_size // 2
        padded = F.pad(inside, (radius, radius, radius, radius))[:, start : stop + 2 * radius]
        taps = padded.unfold(1, stop - start, 1).unfold(2, width, 1)  # [B or 1, n, n, rows, W]
        return ~taps.flatten(1, 2).unsqueeze(1)

    def _in_blocks(
        self, block: Callable[[int, int], Tensor], rows: int, positions: int, dim: int, triton: bool = False
    ) -> Tensor:
        """`block(start, stop)` for `rows` rows of `positions` each, joined along `dim`; in pieces for large kernels."""
        row_elements = max(1, positions * self.groups * self.kernel_size**self.ndim)
        saved = TRITON_KERNEL_ELEMENTS if triton else KERNEL_ELEMENTS
        if rows * row_elements <= saved or is_transformed():  # transforms support no recomputation
            return block(0, rows)
        run = _checkpointed(block, self.training and self.dropout > 0.0) if torch.is_grad_enabled() else block
        step = max(1, (TRITON_BLOCK_ELEMENTS if triton else BLOCK_ELEMENTS) // row_elements)
        return torch.cat([run(start, min(start + step, rows)) for start in range(0, rows, step)], dim=dim)

    def _by_reference(self, x: Tensor, padding: Tensor | None, cache: DynamicConvCache | None) -> Tensor:
        if cache is not None:
            raise ValueError("cache: algorithm='reference' supports no cache; use algorithm='auto'.")
        if self.training and self.dropout > 0:
            raise ValueError(
                f"algorithm='reference' has no dropout, got dropout={self.dropout}: use eval(), dropout=0.0 or 'auto'."
            )
        return reference.dynamic_convolution(
            x,
            reference.DynamicParameters(
                input_weight=self.input_proj.weight,
                input_bias=self.input_proj.bias,
                kernel_weight=self.kernel_proj.weight,
                out_weight=self.out_proj.weight,
                out_bias=self.out_proj.bias,
                conv_bias=self.conv_bias,
            ),
            groups=self.groups,
            kernel_size=self.kernel_size,
            causal=self.causal,
            key_padding_mask=padding,
            weight_softmax=self.weight_softmax,
            renorm_padding=self.renorm_padding,
        )

    def _check_input(self, x: Tensor, mask: Tensor | None, cache: DynamicConvCache | None) -> None:
        check_input("x", x, self.ndim, self.dim)
        if cache is not None:
            if not self.causal:
                self.new_cache()  # raises the error
            if mask is not None:
                raise ValueError("key_padding_mask: a sequence that is decoded step by step has no padding; pass None.")
            if not isinstance(cache, DynamicConvCache) or cache.owner is not self:
                raise ValueError("cache: another module created it; use new_cache() of this module.")
            if cache.value is not None and cache.value.shape[0] != x.shape[0]:
                raise ValueError(
                    f"x has batch size {x.shape[0]}, the cache has {cache.value.shape[0]}: they must be equal."
                )
        check_mask(mask, x, "x")


def aggregate_with_bands(kernel: Tensor, value: Tensor, first: int) -> Tensor:
    """Sums over the window of a sequence by products of band matrices with the values (Eq. 5).

    Tap j of query q reads position q + j + first. With n taps, the kernels of T queries, each shifted by one against
    the last, are the T x (T + n - 1) matrix of a piece of the sentence, mostly without zeros if T is not above n.

    Args:
        kernel: `[B, L, G, n]`.
        value: `[B, K, G, d]`, K at most L + n - 1 + first, zero outside.
        first: Position that tap 0 of query 0 reads; not above zero.

    Returns:
        `[B, L, G, d]`.
    """
    batch, length, groups, _ = kernel.shape
    # Without the taps that are outside the sequence for every query.
    low, high = max(0, -first - (length - 1)), min(kernel.shape[3], value.shape[1] - first)
    kernel, first, taps = kernel[..., low:high], first + low, high - low

    pieces = math.ceil(length / max(BAND_QUERIES, taps))
    queries = math.ceil(length / pieces)
    keys = queries + taps - 1
    # Rows of keys + 1 numbers, kernel first, viewed as rows of keys numbers: each is shifted right by one.
    rows = F.pad(kernel, (0, queries, 0, 0, 0, pieces * queries - length))
    rows = rows.view(batch, pieces, queries, groups, keys + 1).transpose(2, 3)
    band = torch.unflatten(rows.flatten(3)[..., : queries * keys], 3, (queries, keys))
    if pieces == 1:  # without padding of the keys
        band = band[..., -first : value.shape[1] - first]
        windows = value.transpose(1, 2).unsqueeze(1)
    else:
        padded = F.pad(value, (0, 0, 0, 0, -first, pieces * queries + taps - 1 + first - value.shape[1]))
        windows = padded.unfold(1, keys, queries).transpose(-1, -2)
    out = torch.matmul(band, windows)  # [B, pieces, G, queries, d]
    return out.transpose(2, 3).flatten(1, 2)[:, :length]


def _aggregate_by_shifts(kernel: Tensor, value: Tensor, first: int) -> Tensor:
    """`aggregate_with_bands` as a sum over taps of shifted values."""
    rows, taps = kernel.shape[1], kernel.shape[3]
    after = rows - 1 + first + taps - value.shape[1]
    padded = F.pad(value, (0, 0, 0, 0, -first, after))  # a negative number crops
    total = kernel[..., 0, None] * padded[:, :rows]
    for tap in range(1, taps):
        total = total + kernel[..., tap, None] * padded[:, tap : tap + rows]
    return total


def _triton_error(reason: str) -> str:
    return (
        f"algorithm='triton' cannot compute this convolution: {reason}. "
        "Use 'auto', which takes the fastest algorithm that can."
    )


def _interprets_triton() -> bool:
    """Whether Triton interprets kernels, which it does on any device."""
    if not HAS_TRITON:
        return False
    from lightning_attn.attention.kernels.dynamic import RUNS_ANYWHERE

    return RUNS_ANYWHERE


def _checkpointed(block: Callable[[int, int], Tensor], random: bool) -> Callable[[int, int], Tensor]:
    """The block with activation checkpointing; with `random` the recomputation drops the same elements."""

    def run(start: int, stop: int) -> Tensor:
        result = checkpoint(block, start, stop, use_reentrant=False, preserve_rng_state=random)
        assert isinstance(result, Tensor)
        return result

    return run


def _extend(cache: DynamicConvCache, value: Tensor, memory: int) -> Tensor:
    """The cached `memory` values and the new ones, `[B, memory + L, C]`; the last `memory` of these are cached."""
    before = value.new_zeros(value.shape[0], memory, value.shape[2]) if cache.value is None else cache.value
    values = torch.cat((before, value), dim=1)
    cache.value = values[:, values.shape[1] - memory :]
    cache.length += value.shape[1]
    return values


def _check_arguments(
    dim: int, kernel_size: int, groups: int, ndim: int, causal: bool, dropout: float, algorithm: str
) -> None:
    require_int("dim", dim)
    require_odd("kernel_size", kernel_size)
    require_int("groups", groups)
    if dim % groups:
        raise InputError(
            f"groups={groups} does not divide dim={dim}: use a number of groups in {divisors(dim)}, "
            f"or a width that is a multiple of {groups}."
        )
    require_ndim(ndim)
    require_bool("causal", causal)
    if causal and ndim == 2:
        raise InputError("causal=True is for sequences (ndim=1): a map has no order; set causal=False.")
    require_dropout(dropout)
    if algorithm not in _ALGORITHMS[ndim]:
        raise InputError(
            f"algorithm must be one of {list(_ALGORITHMS[ndim])} for ndim={ndim}, got {algorithm!r}; "
            "'auto' selects the fastest."
        )

"""From a spec to a module: the one place that knows which mechanism is which class, and where it stands (Fig. 2)."""

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attn.attention.decoding import AttentionCache, DecodingCache, DeformableConvCache, DynamicConvCache
from lightning_attn.attention.deformable import DeformableConv
from lightning_attn.attention.dynamic import DynamicConv
from lightning_attn.attention.spec import AttentionSpec
from lightning_attn.attention.transformer import TransformerAttention
from lightning_attn.errors import InputError
from lightning_attn.validation import require_ndim

Role = Literal["self", "causal", "cross", "head"]

CONVOLUTION_SIZE = 3
"""Kernel of the convolution before the attention: 3 x 3 in a residual block, 3 in translation (Fig. 2)."""


class SelfAttention(Protocol):
    """What stands in a self-attention slot of a network for sequences, whatever its mechanism."""

    def __call__(self, x: Tensor, /, *, key_padding_mask: Tensor | None = None, cache: Any = None) -> Tensor:
        """Maps `[B, L, C]` to the same shape; the mask `[B, L]` is True where padded, `cache` is from `new_cache`."""

    def new_cache(self) -> DecodingCache:
        """A cache for decoding step by step, which gives the numbers of the full causal pass."""


class DeformableAttention(nn.Module):
    """A deformable unit in front of the attention of a sequence (paper, section 3 and Fig. 2c).

    With u = deformable(x) the output is u + attention(u), or u alone without attention ("w/o + deformable" in Table 2).
    The attention keeps a residual connection of its own; that of the network spans both.

    Args:
        convolution: The unit, width C in and out.
        attention: What stands behind it; None for nothing.
    """

    def __init__(self, convolution: DeformableConv, attention: TransformerAttention | DynamicConv | None) -> None:
        super().__init__()
        self.convolution = convolution
        self.attention = attention

    def forward(
        self, x: Tensor, *, key_padding_mask: Tensor | None = None, cache: "DeformableAttentionCache | None" = None
    ) -> Tensor:
        """Maps `[B, L, C]` to the same shape.

        Args:
            x: The sequences.
            key_padding_mask: Bool, `[B, L]`, True where padded; neither part lets padding into other positions.
            cache: From `new_cache`; `x` then holds the next tokens of sequences that are decoded step by step.
        """
        convolution_cache, attention_cache = (None, None) if cache is None else (cache.convolution, cache.attention)
        unit: Tensor = self.convolution(x, key_padding_mask=key_padding_mask, cache=convolution_cache)
        if self.attention is None:
            return unit
        attended: Tensor = self.attention(unit, key_padding_mask=key_padding_mask, cache=attention_cache)
        return unit + attended

    def new_cache(self) -> "DeformableAttentionCache":
        """A cache for decoding step by step, which gives the numbers of the full causal pass.

        Raises:
            ValueError: If the unit is not causal.
        """
        convolution = self.convolution.new_cache()
        return DeformableAttentionCache(convolution, None if self.attention is None else self.attention.new_cache())


class DeformableAttentionCache:
    """The caches of the two parts of a `DeformableAttention`."""

    def __init__(self, convolution: DeformableConvCache, attention: AttentionCache | DynamicConvCache | None) -> None:
        self.convolution = convolution
        self.attention = attention

    def reorder(self, index: Tensor, beams: int = 1) -> None:
        """See `DecodingCache.reorder`."""
        self.convolution.reorder(index, beams)
        if self.attention is not None:
            self.attention.reorder(index, beams)


class GatedResidual(nn.Module):
    """x + gamma * attention(x), gamma a learnable scalar that starts at zero (paper, section 3 and Fig. 2a).

    At the start of training the network is thus the network without attention.

    Args:
        attention: A `TransformerAttention` or `DynamicConv` with `ndim=2`.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
        """Adds the gated attention to the map `[B, C, H, W]`."""
        attended: Tensor = self.attention(x, key_padding_mask=key_padding_mask)
        return x + self.gamma * attended


class AttendedConvolution(nn.Module):
    """The 3 x 3 convolution of an attended residual block and the attention on its output (Fig. 2a).

    A network that names its own parts, such as a ResNet's `conv2` and `bn2`, takes `convolution` and `attention` from
    here and runs them itself.

    Args:
        convolution: Regular or deformable.
        attention: On its output; None for none.
        norm: Normalisation after the convolution, whose output goes through a ReLU; None for neither.
    """

    def __init__(
        self, convolution: nn.Conv2d | DeformableConv, attention: GatedResidual | None, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.convolution = convolution
        self.norm = norm
        self.attention = attention

    def forward(self, x: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
        """Maps `[B, C_in, H, W]` to `[B, C, H', W']`.

        Args:
            x: The maps.
            key_padding_mask: Bool, `[B, H', W']`, True where the attention may not look. The convolution reads there
                all the same, as convolutions of padded images do.
        """
        x = self.convolution(x)
        if self.norm is not None:
            x = F.relu(self.norm(x))
        if self.attention is not None:
            x = self.attention(x, key_padding_mask=key_padding_mask)
        return x


@overload
def build_attention(
    spec: AttentionSpec, dim: int, ndim: Literal[1] = 1, role: Literal["self", "causal"] = "self"
) -> TransformerAttention | DynamicConv | DeformableAttention | None: ...


@overload
def build_attention(
    spec: AttentionSpec, dim: int, ndim: Literal[1], role: Literal["cross"]
) -> TransformerAttention: ...


@overload
def build_attention(
    spec: AttentionSpec,
    dim: int,
    ndim: Literal[2],
    role: Literal["self"] = "self",
    *,
    in_channels: int | None = None,
    stride: int = 1,
    dilation: int = 1,
    bias: bool = False,
    norm: Callable[[int], nn.Module] | None = None,
) -> AttendedConvolution: ...


@overload
def build_attention(spec: AttentionSpec, dim: int, ndim: Literal[2], role: Literal["head"]) -> GatedResidual | None: ...


@overload
def build_attention(spec: AttentionSpec, dim: int, ndim: Literal[1, 2], role: Role) -> nn.Module | None: ...


def build_attention(
    spec: AttentionSpec,
    dim: int,
    ndim: Literal[1, 2] = 1,
    role: Role = "self",
    *,
    in_channels: int | None = None,
    stride: int = 1,
    dilation: int = 1,
    bias: bool = False,
    norm: Callable[[int], nn.Module] | None = None,
) -> nn.Module | None:
    """Builds what stands in an attention slot of width `dim`: every combination of Fig. 2.

    Sequences (`ndim=1`), roles `"self"` and `"causal"`: Transformer attention, or a dynamic convolution in its place;
    with `convolution: deformable` (or `modulated_deformable`) a `DeformableAttention`, which puts a unit in front.
    Role `"cross"`: Transformer attention only.

    Maps (`ndim=2`), role `"self"`: the `AttendedConvolution` of a residual block. Role `"head"`: the gated attention
    alone, on a map that something else has convolved, as in the segmentation head; `spec.convolution` says how the
    residual blocks convolve and does not matter here.

    A class of your own, which `spec.mechanism` names by its import path, is an `nn.Module` made by
    `Class(dim, ndim=..., num_heads=..., causal=..., **spec.options)`. Its `forward(x, *, key_padding_mask=None)` maps
    `[B, C, H, W]`, or `[B, L, C]` for `ndim=1`, to the same shape; the mask is True where padded. For decoders it also
    takes `cache`, what its `new_cache()` returned: see `SelfAttention`.

    Args:
        spec: Description of the attention.
        dim: Width C of the slot.
        ndim: 1 for sequences `[B, L, C]`, 2 for maps `[B, C, H, W]`.
        role: `"self"`, `"causal"` (a decoder's self-attention), `"cross"` (encoder-decoder attention) or `"head"`.
        in_channels: Channels that the 3 x 3 convolution reads; None for `dim`. This and what follows is for `ndim=2`,
            role `"self"`.
        stride: Of the 3 x 3 convolution.
        dilation: Of the 3 x 3 convolution, padded so that stride 1 keeps the size.
        bias: Whether the 3 x 3 convolution has a bias.
        norm: Makes the normalisation between convolution and attention from a number of channels, such as
            `nn.BatchNorm2d`; a ReLU follows it. None for neither.

    Returns:
        The module, or None for `mechanism: none` where nothing else is left: the network then leaves the slot out.

    Raises:
        ValueError: If the spec does not fit the slot; the message says why.
    """
    _check_slot(spec, ndim, role)
    if (ndim, role) != (2, "self") and (in_channels, stride, dilation, bias, norm) != (None, 1, 1, False, None):
        raise InputError(
            "in_channels, stride, dilation, bias and norm belong to the 3x3 convolution of ndim=2, role='self'; "
            f"leave them out for ndim={ndim}, role={role!r}."
        )
    attention = _mechanism(spec, dim, ndim, causal=role == "causal")
    is_deformable, modulated = spec.convolution != "regular", spec.convolution == "modulated_deformable"
    if ndim == 1:
        if role == "cross" or not is_deformable:
            return attention
        unit = DeformableConv(dim, dim, CONVOLUTION_SIZE, ndim=1, modulated=modulated, causal=role == "causal")
        return DeformableAttention(unit, attention)
    gated = None if attention is None else GatedResidual(attention)
    if role == "head":
        return gated
    inputs = dim if in_channels is None else in_channels
    convolution: nn.Conv2d | DeformableConv
    if is_deformable:
        convolution = DeformableConv(
            inputs, dim, CONVOLUTION_SIZE, stride=stride, dilation=dilation, modulated=modulated, bias=bias
        )
    else:
        convolution = nn.Conv2d(
            inputs, dim, CONVOLUTION_SIZE, stride=stride, dilation=dilation, padding=dilation, bias=bias
        )
    return AttendedConvolution(convolution, gated, None if norm is None else norm(dim))


def _check_slot(spec: AttentionSpec, ndim: int, role: str) -> None:
    if role not in ("self", "causal", "cross", "head"):
        raise InputError(f"role must be 'self', 'causal', 'cross' or 'head', got {role!r}.")
    require_ndim(ndim)
    if role == "head" and ndim == 1:
        raise InputError("role 'head' is for maps (ndim=2); in a sequence use 'self', 'causal' or 'cross'.")
    if role in ("causal", "cross") and ndim == 2:
        raise InputError(
            f"role {role!r} is for sequences (ndim=1): the paper decodes text, and attends to another set of keys only "
            "there. For maps use role 'self' or 'head', or TransformerAttention itself, which takes causal and key."
        )
    if role != "cross":
        return
    if spec.mechanism == "none":
        raise InputError(
            "mechanism 'none' in encoder-decoder attention would cut the decoder off from its source; "
            "the paper has no such setting. Use mechanism: transformer."
        )
    if spec.is_custom:
        raise InputError(
            f"mechanism {spec.mechanism!r} cannot stand in encoder-decoder attention, whose keys are another "
            "sentence's. Use mechanism: transformer there."
        )
    if spec.mechanism == "dynamic":
        raise InputError(_only_among_neighbours(f"mechanism {spec.mechanism!r}", "mechanism: transformer"))
    if spec.convolution != "regular":
        raise InputError(_only_among_neighbours(f"convolution {spec.convolution!r}", "convolution: regular"))


def _only_among_neighbours(what: str, way_out: str) -> str:
    return (
        f"{what} cannot stand in encoder-decoder attention: it reads the neighbours of a query, but the keys are "
        f"another sentence there, without positions in common. The paper (Fig. 2b) has it in self-attention only. "
        f"Use {way_out}."
    )


def _mechanism(
    spec: AttentionSpec, dim: int, ndim: Literal[1, 2], causal: bool
) -> TransformerAttention | DynamicConv | None:
    if spec.mechanism == "none":
        return None
    if spec.is_custom:
        custom: Any = _custom(spec, dim, ndim, causal)
        return custom  # type: ignore[no-any-return]  # it stands in for one of the paper's
    if spec.mechanism == "dynamic":
        return DynamicConv(dim, spec.kernel_size, spec.groups, ndim, causal=causal, dropout=spec.dropout)
    return TransformerAttention.from_spec(spec, dim, ndim, causal)


def _custom(spec: AttentionSpec, dim: int, ndim: Literal[1, 2], causal: bool) -> nn.Module:
    """A module of a class that the spec names."""
    module, _, name = spec.mechanism.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"mechanism {spec.mechanism!r} cannot be imported ({error}). Give the path of a class in an installed "
            "package, or in a file of the folder that you start from."
        ) from error
    if not (isinstance(made, type) and issubclass(made, nn.Module)):
        raise InputError(f"mechanism {spec.mechanism!r} is no torch.nn.Module class.")
    try:
        attention: nn.Module = made(dim, ndim=ndim, num_heads=spec.num_heads, causal=causal, **spec.options)
    except TypeError as error:
        raise InputError(
            f"mechanism {spec.mechanism!r} cannot be made: {error}. It is called with dim, ndim, num_heads, causal, "
            f"and what options has ({', '.join(spec.options) or 'nothing'})."
        ) from error
    if causal and not hasattr(attention, "new_cache"):
        raise InputError(
            f"mechanism {spec.mechanism!r} must define new_cache() to stand in a decoder, which asks for one token "
            "at a time; lightning_attn.attention.PrefixCache is one that fits any module."
        )
    keywords = dict.fromkeys(["key_padding_mask", *(["cache"] if causal else [])])
    try:
        inspect.signature(attention.forward).bind(None, **keywords)
    except TypeError as error:
        raise InputError(
            f"mechanism {spec.mechanism!r} cannot be called: {error}. Its forward takes x, and the keywords "
            f"{' and '.join(keywords)}."
        ) from error
    attention.register_forward_hook(partial(_check_output, spec.mechanism))
    return attention


def _check_output(mechanism: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """A forward hook that refuses outputs of another shape than the input's."""
    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if inputs and found != tuple(inputs[0].shape):
        raise InputError(f"mechanism {mechanism!r} made {found} of {tuple(inputs[0].shape)}; the shape must be kept.")

"""Builds the attention module of an `AttentionSpec` for a layer of a network (Fig. 2)."""

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
    """The interface of self-attention modules in networks for sequences, whatever their mechanism."""

    def __call__(self, x: Tensor, /, *, key_padding_mask: Tensor | None = None, cache: Any = None) -> Tensor:
        """Maps `[B, L, C]` to the same shape; the mask `[B, L]` is True where padded, `cache` is from `new_cache`."""

    def new_cache(self) -> DecodingCache:
        """Creates a cache for decoding step by step, with the same results as the full causal pass."""


class DeformableAttention(nn.Module):
    """A deformable unit in front of the attention of a sequence (paper, section 3 and Fig. 2c).

    With u = deformable(x) the output is u + attention(u), or u alone without attention ("w/o + deformable" in Table 2).
    The attention has its own residual connection; that of the network spans both.

    Args:
        convolution: The unit, width C in and out.
        attention: The attention after it; None for none.
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
        """Creates a cache for decoding step by step, with the same results as the full causal pass.

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
    """The 3 x 3 convolution of a residual block with attention, and the attention on its output (Fig. 2a).

    A network with fixed parameter names, such as a ResNet's `conv2` and `bn2`, uses `convolution` and `attention` as
    its own submodules instead of calling this module.

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
            key_padding_mask: Bool, `[B, H', W']`, True where the attention must not read. The convolution does read
                there, as convolutions of padded images do.
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
    """Builds an attention module of width `dim`: every combination of Fig. 2.

    Sequences (`ndim=1`), roles `"self"` and `"causal"`: Transformer attention or a dynamic convolution; with
    `convolution: deformable` (or `modulated_deformable`) a `DeformableAttention`, which puts a deformable unit before
    it. Role `"cross"`: Transformer attention only.

    Maps (`ndim=2`), role `"self"`: the `AttendedConvolution` of a residual block. Role `"head"`: the gated attention
    alone, on the output of another convolution, as in the segmentation head; `spec.convolution` is for the residual
    blocks and has no effect here.

    A custom class, which `spec.mechanism` names by its import path, is an `nn.Module` constructed by
    `Class(dim, ndim=..., num_heads=..., causal=..., **spec.options)`. Its `forward(x, *, key_padding_mask=None)` maps
    `[B, C, H, W]`, or `[B, L, C]` for `ndim=1`, to the same shape; the mask is True where padded. For decoders it also
    takes `cache`, an object from its `new_cache()`: see `SelfAttention`.

    Args:
        spec: Description of the attention.
        dim: Number of channels C.
        ndim: 1 for sequences `[B, L, C]`, 2 for maps `[B, C, H, W]`.
        role: `"self"`, `"causal"` (a decoder's self-attention), `"cross"` (encoder-decoder attention) or `"head"`.
        in_channels: Input channels of the 3 x 3 convolution; None for `dim`. This and the following arguments are for
            `ndim=2`, role `"self"`.
        stride: Of the 3 x 3 convolution.
        dilation: Of the 3 x 3 convolution, padded so that stride 1 keeps the size.
        bias: Whether the 3 x 3 convolution has a bias.
        norm: Constructor of the normalisation between convolution and attention from a number of channels, such as
            `nn.BatchNorm2d`; a ReLU follows it. None for neither.

    Returns:
        The module, or None for `mechanism: none` without any other part: the network then omits the layer.

    Raises:
        ValueError: If the spec does not fit the role; the message says why.
    """
    _check_role(spec, ndim, role)
    if (ndim, role) != (2, "self") and (in_channels, stride, dilation, bias, norm) != (None, 1, 1, False, None):
        raise InputError(
            "in_channels, stride, dilation, bias and norm belong to the 3x3 convolution of ndim=2, role='self'; "
            f"leave them out for ndim={ndim}, role={role!r}."
        )
    attention = _build_mechanism(spec, dim, ndim, causal=role == "causal")
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


def _check_role(spec: AttentionSpec, ndim: int, role: str) -> None:
    if role not in ("self", "causal", "cross", "head"):
        raise InputError(f"role must be 'self', 'causal', 'cross' or 'head', got {role!r}.")
    require_ndim(ndim)
    if role == "head" and ndim == 1:
        raise InputError("role 'head' is for maps (ndim=2); in a sequence use 'self', 'causal' or 'cross'.")
    if role in ("causal", "cross") and ndim == 2:
        raise InputError(
            f"role {role!r} is for sequences (ndim=1): the paper has decoders and encoder-decoder attention for text "
            "only. For maps use role 'self' or 'head', or TransformerAttention itself, which takes causal and key."
        )
    if role != "cross":
        return
    if spec.mechanism == "none":
        raise InputError(
            "mechanism 'none' in encoder-decoder attention would disconnect the decoder from its source; "
            "the paper has no such setting. Use mechanism: transformer."
        )
    if spec.is_custom:
        raise InputError(
            f"mechanism {spec.mechanism!r} cannot be used as encoder-decoder attention, whose keys are those of "
            "another sentence. Use mechanism: transformer there."
        )
    if spec.mechanism == "dynamic":
        raise InputError(_self_attention_only(f"mechanism {spec.mechanism!r}", "mechanism: transformer"))
    if spec.convolution != "regular":
        raise InputError(_self_attention_only(f"convolution {spec.convolution!r}", "convolution: regular"))


def _self_attention_only(setting: str, fix: str) -> str:
    return (
        f"{setting} cannot be used in encoder-decoder attention: it reads the neighbours of a query, but there the "
        f"keys are another sentence, without common positions. The paper (Fig. 2b) has it in self-attention only. "
        f"Use {fix}."
    )


def _build_mechanism(
    spec: AttentionSpec, dim: int, ndim: Literal[1, 2], causal: bool
) -> TransformerAttention | DynamicConv | None:
    if spec.mechanism == "none":
        return None
    if spec.is_custom:
        custom: Any = _build_custom(spec, dim, ndim, causal)
        return custom  # type: ignore[no-any-return]  # it has the interface of the paper's mechanisms
    if spec.mechanism == "dynamic":
        return DynamicConv(dim, spec.kernel_size, spec.groups, ndim, causal=causal, dropout=spec.dropout)
    return TransformerAttention.from_spec(spec, dim, ndim, causal)


def _build_custom(spec: AttentionSpec, dim: int, ndim: Literal[1, 2], causal: bool) -> nn.Module:
    """An instance of the custom class that the spec names."""
    module, _, name = spec.mechanism.rpartition(".")
    try:
        custom_class = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"mechanism {spec.mechanism!r} cannot be imported ({error}). Give the path of a class in an installed "
            "package, or in a file of the current working directory."
        ) from error
    if not (isinstance(custom_class, type) and issubclass(custom_class, nn.Module)):
        raise InputError(
            f"mechanism {spec.mechanism!r} is not a subclass of torch.nn.Module. Give the path of such a class."
        )
    try:
        attention: nn.Module = custom_class(dim, ndim=ndim, num_heads=spec.num_heads, causal=causal, **spec.options)
    except TypeError as error:
        raise InputError(
            f"mechanism {spec.mechanism!r} cannot be constructed: {error}. It is called with dim, ndim, num_heads, "
            f"causal, and the entries of options ({', '.join(spec.options) or 'none'})."
        ) from error
    if causal and not hasattr(attention, "new_cache"):
        raise InputError(
            f"mechanism {spec.mechanism!r} must define new_cache() for use in a decoder, which decodes one token "
            "at a time; lightning_attn.attention.PrefixCache is a cache that fits any module."
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
    """A forward hook that refuses outputs whose shape is not the input's."""
    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if inputs and found != tuple(inputs[0].shape):
        raise InputError(
            f"mechanism {mechanism!r} returned {found} for an input of shape {tuple(inputs[0].shape)}; it must return "
            "the same shape."
        )

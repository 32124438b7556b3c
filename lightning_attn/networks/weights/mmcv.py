"""Converts weights of mmcv's `GeneralizedAttention`, the authors' released module, to ours and back.

Both compute Eq. 2 and 8, so the outputs agree for 11 of the 15 term sets. mmcv's outputs are wrong whenever E2 is on
without E4 (`0100`, `0110`, `1100`, `1110`): it swaps the two axes of the query, which gives other results on square
maps and an error on all others. With the weights of such a module, ours computes Eq. 2 as in the paper.

Only tensors and their names are read; mmcv need not be installed. Corresponding names (C channels, M heads):

| mmcv | shape | ours |
| --- | --- | --- |
| `query_conv.weight` | `[C, C, 1, 1]` | `attention.query_proj.weight` |
| `key_conv.weight` | `[C, C, 1, 1]` | `attention.key_proj.weight` |
| `value_conv.weight` | `[C, C, 1, 1]` | `attention.value_proj.weight` |
| `proj_conv.weight`, `.bias` | `[C, C, 1, 1]`, `[C]` | `attention.out_proj.weight`, `.bias` |
| `appr_geom_fc_x.weight`, `appr_geom_fc_y.weight` | `[C, C / 2]` each | `attention.position_proj.weight`, x then y |
| `appr_bias`, `geom_bias` | `[C]` | `attention.key_bias`, `attention.position_bias`, `[M, C / M]` |
| `gamma` | `[1]` | `gamma`, `[]` |

mmcv encodes query minus key and we key minus query, so the columns for sines change their sign.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_attn.attention import GatedResidual, TransformerAttention
from lightning_attn.attention.spec import TERM_SETS, parse_terms
from lightning_attn.errors import InputError
from lightning_attn.validation import divisors

LOCAL_RANGE = "local_constraint_map"

_PROJECTIONS = {"query_conv": "query_proj", "key_conv": "key_proj", "value_conv": "value_proj", "proj_conv": "out_proj"}
_BIASES = {"appr_bias": "key_bias", "geom_bias": "position_bias"}


def attention_prefixes(state: Mapping[str, Any]) -> list[str]:
    """The prefixes of all `GeneralizedAttention` modules in a network's state, in the state's order.

    In mmdetection's ResNet they are `backbone.layer3.0.gen_attention_block.` and so on.
    """
    last = "proj_conv.bias"
    prefixes = [name.removesuffix(last) for name in state if name == last or name.endswith(f".{last}")]
    return [prefix for prefix in prefixes if f"{prefix}value_conv.weight" in state and f"{prefix}gamma" in state]


def convert_state(
    state: Mapping[str, Any], num_heads: int, *, terms: str | None = None, prefix: str = ""
) -> dict[str, Tensor]:
    """Converts mmcv's state to that of `GatedResidual(TransformerAttention(dim, num_heads, terms, ndim=2))`.

    Args:
        state: `GeneralizedAttention(...).state_dict()`, or the state of a network that contains it.
        num_heads: Number of heads M, which the state does not contain.
        terms: Which of E1 to E4 are on, such as `"0110"`. None infers it from the names where they are unambiguous:
            they are the same for 0110 and 1110, for 1001 and 1101, and for 0111, 1011 and 1111.
        prefix: The prefix of the module's names, such as `"backbone.layer3.0.gen_attention_block."`. Other names are
            ignored.

    Returns:
        New tensors of the state's dtype and device.

    Raises:
        ValueError: If names are missing or unexpected, shapes do not fit one another or the number of heads, the term
            set is ambiguous, or the state is that of a module with a local range. The message lists the problems.
    """
    state = _module_state(state, prefix)
    _resolve_terms(state, terms)
    dim = _check_shapes(state, num_heads)
    converted = {"gamma": state["gamma"].detach().clone().reshape(())}
    for theirs, ours in _PROJECTIONS.items():
        if f"{theirs}.weight" in state:
            converted[f"attention.{ours}.weight"] = state[f"{theirs}.weight"].detach().clone().reshape(dim, dim)
    converted["attention.out_proj.bias"] = state["proj_conv.bias"].detach().clone()
    if "appr_geom_fc_x.weight" in state:
        axes = [_flip_sines(state[f"appr_geom_fc_{axis}.weight"].detach()) for axis in "xy"]
        converted["attention.position_proj.weight"] = torch.cat(axes, dim=1)
    for theirs, ours in _BIASES.items():
        if theirs in state:
            converted[f"attention.{ours}"] = state[theirs].detach().clone().reshape(num_heads, -1)
    return converted


def from_mmcv(
    source: Mapping[str, Any] | nn.Module,
    num_heads: int | None = None,
    kv_stride: int | None = None,
    *,
    terms: str | None = None,
    prefix: str = "",
    window: int | None = None,
) -> GatedResidual:
    """Builds our module with the weights of an mmcv `GeneralizedAttention`.

    Their outputs agree (float32: within 1e-5) for every term set but 0100, 0110, 1100 and 1110, for which mmcv's are
    wrong and ours are the paper's.

    Args:
        source: The module itself, which has the settings; or its state; or, with `prefix`, a network that contains it
            or the state of one.
        num_heads: Number of heads M. A state does not contain it: 8 in mmdetection's configurations, 9 by default.
        kv_stride: Stride of keys and values. A state does not contain it: 2 in mmdetection's configurations and by
            default.
        terms: As in `convert_state`.
        prefix: As in `convert_state`.
        window: Odd width n_k of our window. Required for a module with a local range, which in mmcv extends one key too
            far to one side: its weights are then used with this window, and outputs differ.

    Returns:
        The module in the dtype and on the device of the weights, in training mode.

    Raises:
        ValueError: As `convert_state`; or if a setting is missing, contradicts the module's, or is not supported (a
            query stride, a factor on positions).
    """
    if isinstance(source, nn.Module):
        source = _submodule(source, prefix)
        num_heads, kv_stride, terms = _settings(source, num_heads, kv_stride, terms)
        state: Mapping[str, Any] = source.state_dict()
    else:
        missing = [name for name, value in (("num_heads", num_heads), ("kv_stride", kv_stride)) if value is None]
        if num_heads is None or kv_stride is None:
            raise InputError(
                f"{' and '.join(missing)}: not contained in a state; pass it. In mmdetection's configurations of this "
                "attention num_heads is 8 and kv_stride 2; mmcv's defaults are 9 and 2."
            )
        state = _module_state(source, prefix)
    if window is not None:
        state = {name: value for name, value in state.items() if name != LOCAL_RANGE}
    terms = _resolve_terms(state, terms)
    converted = convert_state(state, num_heads, terms=terms)
    weight = converted["attention.value_proj.weight"]
    attention = TransformerAttention(weight.shape[0], num_heads, terms, ndim=2, window=window, kv_stride=kv_stride)
    module = GatedResidual(attention).to(weight)
    module.load_state_dict(converted)
    return module


def to_mmcv(module: GatedResidual) -> dict[str, Tensor]:
    """Converts our weights to the state of mmcv's `GeneralizedAttention`.

    It fits `GeneralizedAttention(dim, num_heads=M, attention_type=terms, kv_stride=...)`. A `scale` other than 1, which
    mmcv does not have, is multiplied into the weights. With the term sets 0100, 0110, 1100 and 1110 mmcv does not
    compute Eq. 2 from them.

    Raises:
        ValueError: If mmcv's module has no counterpart: sequences, a window, or causal attention.
    """
    attention = module.attention
    if not isinstance(attention, TransformerAttention):
        raise InputError(f"module.attention is a {type(attention).__name__}: mmcv's module is a TransformerAttention.")
    for name, value, needed in (
        ("ndim", attention.ndim, 2),
        ("window", attention.window, None),
        ("causal", attention.causal, False),
    ):
        if value != needed:
            raise InputError(f"module.attention has {name}={value}; mmcv's module supports {name}={needed} only.")
    ours = {name: value.detach().clone() for name, value in attention.state_dict().items()}
    for name in ("key_proj.weight", "position_proj.weight"):
        if name in ours:  # each energy has exactly one of the two as a factor
            ours[name] *= attention.scale
    state = {"gamma": module.gamma.detach().clone().reshape(1)}
    for theirs, own in _PROJECTIONS.items():
        if f"{own}.weight" in ours:
            state[f"{theirs}.weight"] = ours[f"{own}.weight"][:, :, None, None]
    state["proj_conv.bias"] = ours["out_proj.bias"]
    if "position_proj.weight" in ours:
        for axis, weight in zip("xy", ours["position_proj.weight"].chunk(2, dim=1), strict=True):
            state[f"appr_geom_fc_{axis}.weight"] = _flip_sines(weight)
    for theirs, own in _BIASES.items():
        if own in ours:
            state[theirs] = ours[own].flatten()
    return state


def _names(terms: str) -> set[str]:
    """The names in the state of an mmcv module with these terms."""
    e1, e2, e3, e4 = parse_terms(terms)
    names = {"value_conv.weight", "proj_conv.weight", "proj_conv.bias", "gamma"}
    if e1 or e2:
        names.add("query_conv.weight")
    if e1 or e3:
        names.add("key_conv.weight")
    if e2 or e4:
        names |= {"appr_geom_fc_x.weight", "appr_geom_fc_y.weight"}
    if e3:
        names.add("appr_bias")
    if e4:
        names.add("geom_bias")
    return names


def _flip_sines(weight: Tensor) -> Tensor:
    """Changes the sign of the first half of the columns of one axis: sin(q - k) = -sin(k - q)."""
    sines, cosines = weight.chunk(2, dim=1)
    return torch.cat((-sines, cosines), dim=1)


def _module_state(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries of the state below the prefix, with the module's names."""
    if isinstance(state.get("state_dict"), Mapping):
        raise InputError('state is a checkpoint, not a state: pass checkpoint["state_dict"].')
    if prefix and not prefix.endswith("."):
        prefix += "."
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    elsewhere = [other for other in attention_prefixes(state) if other != prefix]
    if elsewhere and f"{prefix}value_conv.weight" not in state:
        raise InputError(f"prefix={prefix!r}: no GeneralizedAttention found. Prefixes in this state: {elsewhere}.")
    others = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if others:
        raise InputError(f"state must contain tensors only, but not all of these are: {sorted(others)}.")
    return found


def _resolve_terms(state: Mapping[str, Any], terms: str | None) -> str:
    """The term set that the names belong to."""
    if LOCAL_RANGE in state:
        raise InputError(
            f"state contains {LOCAL_RANGE}: the module had a local range (spatial_range), which in mmcv extends one "
            "key too far to one side and only works for maps up to a fixed size, so no window of ours is equivalent. "
            "from_mmcv(..., window=n_k) with an odd n_k uses the weights with a symmetric window."
        )
    names = set(state)
    fitting = [candidate for candidate in TERM_SETS if _names(candidate) == names]
    if terms is None and len(fitting) == 1:
        return fitting[0]
    if terms is None and fitting:
        raise InputError(f"terms: the names of the state fit each of {fitting}; pass the module's own.")
    expected = terms or min(TERM_SETS, key=lambda candidate: len(_names(candidate) ^ names))
    missing, unexpected = sorted(_names(expected) - names), sorted(names - _names(expected))
    if missing or unexpected:
        requested = f"terms={terms!r}" if terms else f"any terms (nearest: {expected!r})"
        raise InputError(
            f"state does not fit {requested}: missing names {missing}, unexpected names {unexpected}."
            + (f" The names fit {fitting}." if fitting else "")
        )
    return expected


def _check_shapes(state: Mapping[str, Tensor], num_heads: int) -> int:
    """The width C; raises an error unless all shapes agree on it."""
    dim = state["proj_conv.bias"].numel()
    inner = state["value_conv.weight"].shape[0]
    if inner != dim:
        raise InputError(
            f"value_conv.weight has {inner} rows for {dim} channels: mmcv rounds channels / num_heads down and leaves "
            f"channels out, where ours needs num_heads to divide {dim}. Such a module cannot be converted."
        )
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (dim, dim, 1, 1) for name in _PROJECTIONS}
    shapes |= {f"appr_geom_fc_{axis}.weight": (dim, dim // 2) for axis in "xy"}
    shapes |= {"proj_conv.bias": (dim,), "gamma": (1,)} | dict.fromkeys(_BIASES, (dim,))
    wrong = [
        f"{name} {tuple(value.shape)} instead of {shapes[name]}"
        for name, value in state.items()
        if tuple(value.shape) != shapes[name]
    ]
    if wrong:
        raise InputError(
            f"state has shapes that do not fit {dim} channels: {'; '.join(wrong)}. (A position_embedding_dim other "
            "than the channels has other wavelengths and cannot be converted.)"
        )
    if num_heads < 1 or dim % num_heads:
        raise InputError(
            f"num_heads={num_heads} does not divide the {dim} channels of the state: use one of {divisors(dim)}."
        )
    return dim


def _submodule(network: nn.Module, prefix: str) -> nn.Module:
    try:
        module = network.get_submodule(prefix.rstrip("."))
    except AttributeError as error:
        raise InputError(f"prefix={prefix!r}: {error}.") from error
    if not hasattr(module, "attention_type"):
        found = [name for name, child in network.named_modules() if hasattr(child, "attention_type")]
        raise InputError(
            f"source{f' at {prefix!r}' if prefix else ''} is a {type(module).__name__}, not a GeneralizedAttention; "
            f"prefixes of those in it: {found}."
        )
    return module


def _settings(module: Any, num_heads: int | None, kv_stride: int | None, terms: str | None) -> tuple[int, int, str]:
    """Number of heads, stride and terms of mmcv's module; raises an error if arguments contradict them."""
    own_terms = "".join("1" if on else "0" for on in module.attention_type)
    for name, given, own in (
        ("num_heads", num_heads, module.num_heads),
        ("kv_stride", kv_stride, module.kv_stride),
        ("terms", terms, own_terms),
    ):
        if given not in (None, own):
            raise InputError(f"{name}={given!r}, but the module has {own!r}: leave the argument out.")
    for name, needed in (("q_stride", 1), ("position_magnitude", 1)):
        if getattr(module, name) != needed:
            raise InputError(f"the module has {name}={getattr(module, name)}; ours supports {needed} only.")
    return module.num_heads, module.kv_stride, own_terms

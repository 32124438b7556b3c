"""Attention maps of one query as tensors, for each term alone and for all together."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_attn.attention import GatedResidual, TransformerAttention
from lightning_attn.attention.layout import Layout, masked_softmax


@dataclasses.dataclass(frozen=True)
class TermMaps:
    """Energies and weights of each term that is on, and the weights of all terms together, over the keys.

    The shape K of the keys is `[H_k, W_k]` in a map and `[L_k]` in a sentence; with all queries of a sentence it is
    `[L_q, L_k]`. It counts the keys after subsampling by `kv_stride`. M is the number of heads, or 1 after `mean`. All
    tensors are on the CPU, in float32 or better.

    Attributes:
        energies: E1 to E4 by name, `[M, *K]`, also for hidden keys.
        weights: The softmax of each term's energy alone over the visible keys (Eq. 8), `[M, *K]`.
        whole: The module's weights (all terms that are on), `[M, *K]`.
        visible: True where a query sees a key, `[*K]`.
        position: The query, (row, column) in a map or (index,) in a sentence; None for all queries of a sentence.
        key_size: Height and width of the keys' map, or length of the keys' sentence, before `kv_stride`.
        kv_stride: Key (i, j) has the position (i, j) times this.
    """

    energies: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    whole: Tensor
    visible: Tensor
    position: tuple[int, ...] | None
    key_size: tuple[int, ...]
    kv_stride: int

    @property
    def num_heads(self) -> int:
        """M, or 1 after `mean`."""
        return self.whole.shape[0]

    def mean(self) -> "TermMaps":
        """The means of weights and energies over heads; M becomes 1."""
        return self._map(lambda tensor: tensor.mean(0, keepdim=True))

    def head(self, index: int) -> "TermMaps":
        """The maps of one head, counted from 0; M becomes 1."""
        return self._map(lambda tensor: tensor[index : index + 1])

    def _map(self, function: Callable[[Tensor], Tensor]) -> "TermMaps":
        return dataclasses.replace(
            self,
            energies={name: function(energy) for name, energy in self.energies.items()},
            weights={name: function(weights) for name, weights in self.weights.items()},
            whole=function(self.whole),
        )

    def as_lists(self) -> dict[str, list[Any]]:
        """The mean weights over heads of each term alone and of all together ("whole"), as nested lists, for JSON.

        Those of a sentence as they are, those of a query of a map relative to uniform weights (times the number of
        visible keys); rounded to four digits behind the point. None for hidden keys.
        """
        factor = int(self.visible.sum()) if len(self.key_size) == 2 else 1
        hidden = ~self.visible
        return {
            name: _rounded((factor * values.mean(0).double()).masked_fill(hidden, math.nan).tolist())
            for name, values in {**self.weights, "whole": self.whole}.items()
        }

    def selected(self, terms: Sequence[str] | None) -> tuple[str, ...]:
        """The names in `terms`, or those of all terms that are on.

        Raises:
            ValueError: If a term is off or unknown.
        """
        for name in terms or ():
            if name not in self.weights:
                raise ValueError(f"terms: {name!r} is off in this attention; use some of {list(self.weights)}.")
        return tuple(self.weights) if terms is None else tuple(terms)


@torch.no_grad()
def term_maps(
    attention: nn.Module,
    query: Tensor,
    key: Tensor | None = None,
    position: tuple[int, int] | int | None = None,
    *,
    sample: int = 0,
    key_padding_mask: Tensor | None = None,
    causal: bool | None = None,
) -> TermMaps:
    """Computes the attention maps of one query, for each term alone and for all together (Eq. 2 and 8).

    Only the rows of this query are computed, so the cost is that of a projection even on large maps.

    Args:
        attention: A `TransformerAttention`, or a `GatedResidual` around one.
        query: Input of the attention, `[B, C, H, W]` or `[B, L, C]`.
        key: Keys, as in `TransformerAttention.forward`.
        position: The query: (row, column) in a map; an index in a sentence, or in a map row by row. None for all
            queries of a sentence.
        sample: Index in the batch.
        key_padding_mask: As in `TransformerAttention.forward`.
        causal: As in `TransformerAttention.forward`.

    Raises:
        ValueError: If the position or sample does not exist, or `attention` has no terms.
    """
    module = _unwrapped(attention)
    for name, tensor in (("query", query), ("key", key)):
        if tensor is not None and tensor.dim() != module.ndim + 2:
            layout = "[B, L, C]" if module.ndim == 1 else "[B, C, H, W]"
            raise ValueError(f"{name} must be {layout} for this attention, got shape {tuple(tensor.shape)}.")
    if not 0 <= sample < query.shape[0]:
        raise ValueError(f"sample={sample} is not in the batch of {query.shape[0]}.")
    query = query[sample : sample + 1]
    key = query if key is None else key[sample : sample + 1]
    padding = None if key_padding_mask is None else key_padding_mask[sample : sample + 1]
    query_size, key_size = _size(query), _size(key)
    query_position, rows = find_query(position, query_size)
    strided = (slice(None, None, module.kv_stride),) * module.ndim
    whole = module.weights(query, key, key_padding_mask=padding, causal=causal, rows=rows)
    visible = _visible_keys(module, query_size, key_size, rows, module.causal if causal is None else causal)
    if padding is not None:
        visible &= ~padding[0].cpu()[strided]
    if query_position is not None:
        visible = visible[0]

    def shaped(values: Tensor) -> Tensor:
        dtype = torch.promote_types(values.dtype, torch.float32)
        return values[0].to("cpu", dtype).reshape(module.num_heads, *visible.shape)

    energies = {name: shaped(energy) for name, energy in module.energies(query, key, rows=rows).items()}
    return TermMaps(
        energies=energies,
        weights={name: _softmax(energy, visible, module.ndim) for name, energy in energies.items()},
        whole=shaped(whole),
        visible=visible,
        position=query_position,
        key_size=key_size,
        kv_stride=module.kv_stride,
    )


def attentions_of(network: nn.Module) -> list[TransformerAttention]:
    """The attentions with terms in a network, in the order of its modules."""
    return [module for module in network.modules() if isinstance(module, TransformerAttention)]


def layer_names(network: nn.Module) -> dict[str, TransformerAttention]:
    """The attentions with terms in a network by name, without the endings that all of them have."""
    found = {name: module for name, module in network.named_modules() if isinstance(module, TransformerAttention)}
    short = {name.removesuffix(".attention").removesuffix(".attention"): module for name, module in found.items()}
    return short if len(short) == len(found) else found


def recorded_inputs(attention: nn.Module, call: Callable[[], object]) -> dict[str, Any]:
    """Records the inputs of an attention inside a network, for `term_maps(attention, **inputs)`.

    Args:
        attention: As in `term_maps`; a part of the network.
        call: Runs the network, such as `lambda: network(images)`. If the attention runs several times, the last one is
            returned.

    Raises:
        ValueError: If the attention did not run, or ran with a cache.
    """
    module = _unwrapped(attention)
    inputs = recorded_inputs_of([module], call).get(module)
    if inputs is None:
        raise ValueError("call did not run the attention: pass an attention of the network that call runs.")
    return inputs


def recorded_inputs_of(
    attentions: Sequence[TransformerAttention], call: Callable[[], object]
) -> dict[TransformerAttention, dict[str, Any]]:
    """As `recorded_inputs`, of several attentions in one run; without those that did not run."""
    found: dict[TransformerAttention, dict[str, Any]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, TransformerAttention)
        found[module] = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in attentions]
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    if any(inputs.get("cache") is not None for inputs in found.values()):
        raise ValueError("call ran the attention with a cache, step by step: run the network on the whole sentence.")
    names = ("query", "key", "key_padding_mask", "causal")
    return {module: {name: inputs.get(name) for name in names} for module, inputs in found.items()}


def _rounded(values: Any) -> Any:
    if isinstance(values, list):
        return [_rounded(one) for one in values]
    return None if math.isnan(values) else round(values, 4)


def _unwrapped(attention: nn.Module) -> TransformerAttention:
    module = attention.attention if isinstance(attention, GatedResidual) else attention
    if not isinstance(module, TransformerAttention):
        raise ValueError(f"attention is a {type(module).__name__}: only a TransformerAttention has terms.")
    return module


def _size(x: Tensor) -> tuple[int, ...]:
    """Length of a sentence `[B, L, C]`, height and width of a map `[B, C, H, W]`."""
    return tuple(x.shape[1:2] if x.dim() == 3 else x.shape[2:])


def find_query(
    position: tuple[int, int] | int | None, size: tuple[int, ...]
) -> tuple[tuple[int, ...] | None, tuple[int, int]]:
    """The query's position, and its range of rows in the attention's matrix.

    Raises:
        ValueError: If the query does not exist.
    """
    if position is None:
        if len(size) == 1:
            return None, (0, size[0])
        raise ValueError("position is required for a map: pass (row, column) of the query.")
    query: tuple[int, ...] = position if isinstance(position, tuple) else (position,)
    if isinstance(position, int) and len(size) == 2 and 0 <= position < math.prod(size):
        query = divmod(position, size[1])
    if len(query) != len(size) or not all(0 <= index < length for index, length in zip(query, size, strict=True)):
        grid = f"a sentence of {size[0]}" if len(size) == 1 else f"a map of {size[0]} rows and {size[1]} columns"
        raise ValueError(f"position={position} is not a query of {grid}; positions count from 0.")
    row = query[0] if len(query) == 1 else query[0] * size[1] + query[1]
    return query, (row, row + 1)


def _visible_keys(
    module: TransformerAttention,
    query_size: tuple[int, ...],
    key_size: tuple[int, ...],
    rows: tuple[int, int],
    causal: bool,
) -> Tensor:
    """True for keys within the window and, if causal, not later; `[queries, H_k, W_k]` or `[queries, L_k]`."""
    strided = tuple(-(-size // module.kv_stride) for size in key_size)
    (height, width), (key_height, key_width) = ((1, *size)[-2:] for size in (query_size, strided))
    window = (module.window, module.window) if isinstance(module.window, int) else module.window
    layout = Layout((height, width), (key_height, key_width), module.kv_stride, causal, window)
    return ~layout.hidden_from(torch.arange(*rows)).reshape(rows[1] - rows[0], *strided)


def _softmax(energy: Tensor, visible: Tensor, num_axes: int) -> Tensor:
    """Softmax over the visible keys, the last `num_axes` axes; zeros where none is visible."""
    return masked_softmax(energy.flatten(-num_axes), ~visible.flatten(-num_axes)).reshape(energy.shape)

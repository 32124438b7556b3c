"""Attention weights of many queries at 8 bits, for a page where the query follows the mouse."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_attn.visualization.images import RecordedImage
from lightning_attn.visualization.maps import TermMaps
from lightning_attn.visualization.translation import RecordedPair

__all__ = ["LEAST_RATIO", "LayerLevels", "image_levels", "pair_levels"]

Levels = npt.NDArray[np.uint8]

LEAST_RATIO = 0.25  # of a weight to the mean weight; level 1 is that and less
_HIDDEN = 0  # the level of a key that the query does not see
_STEPS = 254


@dataclasses.dataclass(frozen=True)
class LayerLevels:
    """The weights of a layer's attention at 8 bits.

    Attributes:
        name: Of the layer.
        facts: What a page needs to place them, as plain values.
        scale: What levels 1 to 255 mean, linearly: `["log2", low, high]` for weights in units of the mean weight, or
            `["sqrt", 0, 1]` for weights. Level 0 is a hidden key.
        levels: By term ("E1" to "E4", and "whole") and head ("mean", or "1" and so on), for each query a row of keys;
            one row alone where all queries have the same.
        outside: The share of the weight on padding, which has no levels, from 0 to 255; as `levels`, `[queries]`.
    """

    name: str
    facts: Mapping[str, Any]
    scale: tuple[str, float, float]
    levels: Mapping[tuple[str, str], Levels]
    outside: Mapping[tuple[str, str], Levels]

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms, and "whole"."""
        return tuple(dict.fromkeys(term for term, _ in self.levels))

    @property
    def heads(self) -> tuple[str, ...]:
        """The mean, and the heads."""
        return tuple(dict.fromkeys(head for _, head in self.levels))

    @property
    def size(self) -> int:
        """Bytes of all levels."""
        return sum(one.size for one in self.levels.values())

    def with_heads(self, heads: Sequence[str]) -> "LayerLevels":
        """These heads alone."""
        return dataclasses.replace(
            self,
            levels={key: one for key, one in self.levels.items() if key[1] in heads},
            outside={key: one for key, one in self.outside.items() if key[1] in heads},
        )

    def thinned(self) -> "LayerLevels":
        """Every second of the queries of a map along both axes."""
        rows, columns = self.facts["query_size"]
        kept = np.arange(rows * columns).reshape(rows, columns)[::2, ::2]

        def chosen(one: Levels) -> Levels:
            return one if len(one) == 1 else one[kept.reshape(-1)]

        return dataclasses.replace(
            self,
            facts={**self.facts, "query_size": list(kept.shape), "query_step": 2 * self.facts["query_step"]},
            levels={key: chosen(one) for key, one in self.levels.items()},
            outside={key: chosen(one) for key, one in self.outside.items()},
        )


def image_levels(
    recorded: RecordedImage, layer: str, terms: Sequence[str] | None, *, heads: Sequence[str] | None, step: int
) -> LayerLevels:
    """The weights of a layer's queries on the keys that are centred on the image.

    Args:
        recorded: From `record_image`.
        layer: Its name there.
        terms: Which of the terms that are on, beside the whole; None for all.
        heads: "mean" and numbers from 1; None for all.
        step: Every so many queries along both axes are kept, those nearest to the top left among them.

    Raises:
        ValueError: If a term is off.
    """
    grid = recorded.grid(layer)
    rows, columns = grid.inside
    positions = [(row, column) for row in range(0, rows, step) for column in range(0, columns, step)]
    first = recorded.maps(layer, positions[0])
    key_rows, key_columns = grid.keys_inside(first.kv_stride)
    number = math.prod(first.visible.shape)
    scale = ("log2", math.log2(LEAST_RATIO), math.log2(max(2 / LEAST_RATIO, number)))

    def encode(weights: npt.NDArray[np.float64], visible: npt.NDArray[np.bool_]) -> tuple[Levels, Levels]:
        shown, seen = weights[..., :key_rows, :key_columns], visible[:key_rows, :key_columns]
        with np.errstate(divide="ignore"):
            values = np.log2(shown * visible.sum())
        levels = np.where(seen, _coded(values, scale[1], scale[2]), _HIDDEN).astype(np.uint8)
        total = weights.sum((-2, -1))
        outside = np.clip(255 * (1 - shown.sum((-2, -1)) / np.maximum(total, 1e-12)), 0, 255).round().astype(np.uint8)
        return levels.reshape(len(levels), -1), outside

    found, outside = _collect((recorded.maps(layer, one) for one in positions), terms, heads, encode)
    facts = {
        "stride": grid.stride,
        "kv_stride": first.kv_stride,
        "map_size": list(grid.map_size),
        "key_size": [key_rows, key_columns],
        "query_size": [-(-rows // step), -(-columns // step)],
        "query_step": step,
    }
    return LayerLevels(layer, facts, scale, found, outside)


def pair_levels(
    recorded: RecordedPair, layer: str, terms: Sequence[str] | None, *, heads: Sequence[str] | None
) -> LayerLevels:
    """The weights of all of a layer's queries on all keys; arguments as in `image_levels`."""
    maps = recorded.maps(layer)
    scale = ("sqrt", 0.0, 1.0)
    found = {}
    for (term, head), weights in _by_head(maps, terms, heads).items():
        levels = np.where(maps.visible.numpy(), _coded(np.sqrt(weights), 0.0, 1.0), _HIDDEN).astype(np.uint8)
        found[term, head] = _once(levels)
    facts = {"queries": list(recorded.queries(layer)), "keys": list(recorded.keys(layer))[:: maps.kv_stride]}
    return LayerLevels(layer, facts, scale, found, {})


def _coded(values: npt.NDArray[np.float64], low: float, high: float) -> npt.NDArray[np.float64]:
    coded: npt.NDArray[np.float64] = 1 + np.round(_STEPS * np.clip((values - low) / (high - low), 0, 1))
    return coded


def _by_head(
    maps: TermMaps, terms: Sequence[str] | None, heads: Sequence[str] | None
) -> dict[tuple[str, str], npt.NDArray[np.float64]]:
    """Weights by term and head."""
    names = [*maps.selected(terms), "whole"]
    chosen = ["mean", *(str(one + 1) for one in range(maps.num_heads))] if heads is None else list(heads)
    found = {}
    for term in names:
        weights = (maps.whole if term == "whole" else maps.weights[term]).double().numpy()
        for head in chosen:
            found[term, head] = weights.mean(0) if head == "mean" else weights[int(head) - 1]
    return found


def _collect(
    queries: Iterable[TermMaps],
    terms: Sequence[str] | None,
    heads: Sequence[str] | None,
    encode: Callable[[npt.NDArray[np.float64], npt.NDArray[np.bool_]], tuple[Levels, Levels]],
) -> tuple[dict[tuple[str, str], Levels], dict[tuple[str, str], Levels]]:
    """The levels of all queries, one after another, so that the weights of one are in memory at a time."""
    levels: dict[tuple[str, str], list[Levels]] = {}
    outside: dict[tuple[str, str], list[Levels]] = {}
    for maps in queries:
        weights = _by_head(maps, terms, heads)
        coded, beyond = encode(np.stack(list(weights.values())), maps.visible.numpy())
        for key, row, share in zip(weights, coded, beyond, strict=True):
            levels.setdefault(key, []).append(row)
            outside.setdefault(key, []).append(share)
    return (
        {key: _once(np.stack(rows)) for key, rows in levels.items()},
        {key: np.array(rows, np.uint8) for key, rows in outside.items()},
    )


def _once(levels: Levels) -> Levels:
    """One row, if all are the same: those of E3, which does not depend on the query."""
    return levels[:1] if len(levels) > 1 and bool((levels == levels[0]).all()) else levels

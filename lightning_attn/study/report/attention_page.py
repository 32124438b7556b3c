"""The page of attention maps where the query follows the mouse: one file, within a number of bytes."""

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from lightning_attn.study.report.images import MOST_RATIO, colours, embedded, gradient
from lightning_attn.study.report.page import document

if TYPE_CHECKING:
    from lightning_attn.visualization.levels import LayerLevels  # which needs torch; reports do not

__all__ = ["ATTENTION_MARK", "MOST_BYTES", "fitting", "render_attention"]

ATTENTION_MARK = "lightning_attn attention maps"
MOST_BYTES = 3_000_000  # of all levels in the page
_PICTURE_BYTES = 400_000
_LONGEST_SIDE = 1600  # of the picture, in pixels


def fitting(
    layers: Sequence["LayerLevels"], keep: str, most: int = MOST_BYTES
) -> tuple[list["LayerLevels"], list[str]]:
    """What fits into a number of bytes, and what was left out, in words.

    First every second query along both axes is left out while hundreds remain, then heads, then queries while dozens
    remain, then layers.

    Args:
        layers: The first ones are left out before the later ones.
        keep: The head that stays, beside the mean.
        most: How many bytes the levels may take in the page.
    """
    kept, notes = list(layers), list[str]()
    while sum(map(_page_bytes, kept)) > most:
        many, dozens, some = ([one for one in kept if _can_be_thinned(one, least)] for least in (300, 30, 1))
        if many:
            _thin_largest(kept, many)
        elif any(set(one.heads) - {"mean", keep} for one in kept):
            kept = [one.with_heads(("mean", keep)) for one in kept]
        elif dozens:
            _thin_largest(kept, dozens)
        elif len(kept) > 1:
            notes.append(f"Layer {kept[0].name} is left out, to keep the page small: give it alone (--layer).")
            del kept[0]
        elif some:
            _thin_largest(kept, some)
        else:
            break
    return kept, notes


def render_attention(
    layers: Sequence["LayerLevels"],
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str],
    start: Mapping[str, Any],
    image: Image.Image | None = None,
    original_size: tuple[int, int] | None = None,
) -> str:
    """The page as HTML.

    Args:
        layers: At least one.
        title: Of the page.
        facts: Names and values that are shown below it.
        notes: What was left out, and the like.
        start: What is shown first: `layer`, `head`, `term` and `query`, which is a pixel [y, x] of the network's image,
            or an index.
        image: As the network saw it; None for sentences.
        original_size: Height and width of the file.
    """
    kind = "sentence" if image is None else "map"
    data: dict[str, Any] = {
        "kind": kind,
        "start": dict(start),
        "colours": colours(kind),
        "most": MOST_RATIO,
        "layers": [_described(one) for one in layers],
    }
    uri = ""
    if image is not None:
        data["size"] = [image.height, image.width]
        data["original"] = list(original_size or (image.height, image.width))
        shown = image.convert("RGB")
        shown.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        uri = embedded(shown, _PICTURE_BYTES)
    return document(
        "attention.html.j2",
        ("theme.js", "attention.js"),
        ("report.css", "attention.css"),
        mark=ATTENTION_MARK,
        title=title,
        kind=kind,
        facts=facts,
        notes=notes,
        data=data,
        picture=uri,
        aspect="" if image is None else f"{image.width}/{image.height}",
        ramp=gradient(kind),
        most=f"{MOST_RATIO:g}",
    )


def _can_be_thinned(layer: "LayerLevels", least: int) -> bool:
    """Whether fewer queries of a map, but so many, would remain."""
    rows, columns = map(int, layer.facts.get("query_size", (1, 1)))
    return rows * columns > 1 and -(-rows // 2) * -(-columns // 2) >= least


def _thin_largest(kept: list["LayerLevels"], some: Sequence["LayerLevels"]) -> None:
    """Thins the largest of some of the layers, in place."""
    largest = max(some, key=lambda one: one.size)
    place = next(place for place, one in enumerate(kept) if one is largest)
    kept[place] = largest.thinned()


def _described(layer: "LayerLevels") -> dict[str, Any]:
    blocks = {
        term: {head: _block(layer, term, head) for head in layer.heads if (term, head) in layer.levels}
        for term in layer.terms
    }
    return {
        "name": layer.name,
        **layer.facts,
        "scale": list(layer.scale),
        "terms": list(layer.terms),
        "heads": list(layer.heads),
        "blocks": blocks,
    }


def _block(layer: "LayerLevels", term: str, head: str) -> dict[str, Any]:
    levels, outside = layer.levels[term, head], layer.outside.get((term, head))
    block: dict[str, Any] = {"rows": len(levels), "levels": _compressed(levels.tobytes())}
    if outside is not None and outside.any():
        block["outside"] = base64.b64encode(outside.tobytes()).decode()
    return block


def _compressed(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 9)).decode()


def _page_bytes(layer: "LayerLevels") -> int:
    """Bytes of a layer's levels in the page."""
    outside = sum(one.size for one in layer.outside.values())
    return sum(len(_compressed(one.tobytes())) for one in layer.levels.values()) + outside * 4 // 3

"""Overlapping tiles of images that are too large, or whose objects are too small, to be evaluated as a whole."""

import math


def tile_spans(size: int, tile: int, overlap: float) -> list[slice]:
    """Where tiles lie along an axis: a regular step apart, but the last one ends with the axis.

    Args:
        size: Length of the axis in pixels.
        tile: That of a tile. A shorter axis is one tile.
        overlap: Share of a tile that the next one covers again at least.
    """
    count = math.ceil(max(size - tile, 0) / tile_step(tile, overlap)) + 1
    starts = [max(min(index * tile_step(tile, overlap), size - tile), 0) for index in range(count)]
    return [slice(start, min(start + tile, size)) for start in starts]


def tile_step(tile: int, overlap: float) -> int:
    """Pixels from one tile to the next that covers this share of it again."""
    return tile - math.ceil(tile * overlap)

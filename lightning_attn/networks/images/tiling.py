"""Overlapping tiles for inference on large images, or on images with small objects."""

import math


def tile_spans(size: int, tile: int, overlap: float) -> list[slice]:
    """The tiles along an axis: a regular step apart, except the last one, which ends with the axis.

    Args:
        size: Length of the axis in pixels.
        tile: Length of a tile. A shorter axis is one tile.
        overlap: Minimum fraction of a tile that the next one covers again.
    """
    count = math.ceil(max(size - tile, 0) / tile_step(tile, overlap)) + 1
    starts = [max(min(index * tile_step(tile, overlap), size - tile), 0) for index in range(count)]
    return [slice(start, min(start + tile, size)) for start in starts]


def tile_step(tile: int, overlap: float) -> int:
    """Pixels from one tile to the next that overlaps it by this fraction."""
    return tile - math.ceil(tile * overlap)

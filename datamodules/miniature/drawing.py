"""Colours and outlines of the miniature image sets, and the sun and the moon as signs."""

import colorsys
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Colour", "Floats", "Pixels", "Points", "arc", "hsv", "scaled", "sun_or_moon"]

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]


def arc(x: float, y: float, rx: float, ry: float, start: float = 0.0, stop: float = 360.0) -> list[tuple[float, float]]:
    """Points on an ellipse; angles in degrees, clockwise from the right."""
    angles = np.radians(np.linspace(start, stop, max(4, round(abs(stop - start) / 9)) + 1))
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


def scaled(colour: Colour, factor: float) -> Colour:
    """A colour scaled in brightness, up to white."""
    red, green, blue = (min(255, round(value * factor)) for value in colour)
    return red, green, blue


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """RGB of a hue, a saturation and a value in 0..1."""
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def sun_or_moon(moon: bool) -> list[tuple[Points, Colour]]:
    """Polygons of the sun or the moon, from the back to the front: x to the right and y down, within -1..1."""
    if moon:
        return [([*arc(0.05, 0, 0.8, 0.8, 55, 305), *arc(0.38, 0, 0.67, 0.67, 285, 75)], (245, 240, 215))]
    shapes: list[tuple[Points, Colour]] = []
    for ray in range(8):
        angle = math.pi * ray / 4
        ends = [(angle - 0.25, 0.5), (angle, 0.98), (angle + 0.25, 0.5)]
        shapes.append(([(radius * math.cos(a), radius * math.sin(a)) for a, radius in ends], (255, 165, 0)))
    return [*shapes, (arc(0, 0, 0.55, 0.55), (255, 215, 40))]

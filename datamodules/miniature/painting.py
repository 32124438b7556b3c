"""Paints the pictures of the miniature segmentation set in perspective, with the label of every pixel."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from lightning_attn.datamodules.miniature.drawing import Colour, Floats, Pixels, Points

__all__ = ["HEIGHT", "SIGN_SIZE", "SKY", "SMOOTH", "UNLABELLED", "WIDTH", "Camera", "Painting", "Shape", "Shapes"]

HEIGHT, WIDTH = 96, 192
"""Size of the pictures in pixels."""

SIGN_SIZE = 22
"""Side of the square of the sun or moon in pixels."""

UNLABELLED, SKY = 0, 23
"""Ids in label files."""

SMOOTH = 0
"""The surface of a polygon without texture."""

_FINE = 3  # shapes are drawn this much larger and reduced; odd, so that a pixel's centre is a fine pixel


@dataclass(frozen=True)
class Camera:
    """A camera above a level road."""

    focal: float
    height: float
    column: float  # of the vanishing point
    row: float  # of the horizon

    def __call__(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Column and row in pixels of a point, in metres to the right of the camera, above the road and ahead."""
        return self.column + self.focal * x / z, self.row + self.focal * (self.height - y) / z

    def front(self, x0: float, x1: float, y0: float, y1: float, z: float) -> Points:
        """A rectangle that faces the camera."""
        return [self(x0, y0, z), self(x1, y0, z), self(x1, y1, z), self(x0, y1, z)]

    def side(self, x: float, y0: float, y1: float, z0: float, z1: float) -> Points:
        """A rectangle along the road, upright."""
        return [self(x, y0, z0), self(x, y0, z1), self(x, y1, z1), self(x, y1, z0)]

    def flat(self, x0: float, x1: float, z0: float, z1: float, y: float = 0.0) -> Points:
        """A level rectangle."""
        return [self(x0, y, z0), self(x1, y, z0), self(x1, y, z1), self(x0, y, z1)]

    def upright(self, x: float, z: float) -> Callable[[Points], Points]:
        """Projects points (metres to the right, metres up) of an object at `x`, `z` that faces the camera."""
        return lambda points: [self(x + right, up, z) for right, up in points]


@dataclass(frozen=True)
class Shape:
    """A polygon in pixels of the picture."""

    points: Points
    colour: Colour
    surface: int = SMOOTH


Shapes = Sequence[Shape]


class Painting:
    """A picture that is painted from the back to the front: colours, label ids and surfaces.

    Args:
        sky: Colours to begin with, [HEIGHT, WIDTH, 3].
        sign: Top and left of the square of the sign, which nothing may reach into.

    Attributes:
        label_ids: The id of the sky, and of each object in the order in which they were painted.
    """

    def __init__(self, sky: Image.Image, sign: tuple[int, int]) -> None:
        size = (WIDTH * _FINE, HEIGHT * _FINE)
        self._colours = sky.resize(size, Image.Resampling.BILINEAR)
        self._ids, self._surfaces = Image.new("L", size, SKY), Image.new("L", size, SMOOTH)
        self._things = Image.new("I", size, 0)
        self._draw = ImageDraw.Draw(self._colours)
        self._draw_ids, self._draw_surfaces, self._draw_things = (
            ImageDraw.Draw(self._ids),
            ImageDraw.Draw(self._surfaces),
            ImageDraw.Draw(self._things),
        )
        self.label_ids = [SKY]
        self.sign = sign

    def leaves_sign_free(self, shapes: Shapes) -> bool:
        """Whether an object is at least a pixel away from the square of the sign."""
        top, left = self.sign
        columns, rows = zip(*(point for shape in shapes for point in shape.points), strict=True)
        return bool(
            max(columns) < left - 1
            or min(columns) > left + SIGN_SIZE + 1
            or max(rows) < top - 1
            or min(rows) > top + SIGN_SIZE + 1
        )

    def thing(self, label_id: int, shapes: Shapes, *, seam: bool = False) -> bool:
        """Paints an object in front of all others, unless it would reach into the square of the sign.

        Args:
            label_id: Its id in label files.
            shapes: Its polygons, from the back to the front.
            seam: Whether a border of one pixel around it is not labelled.

        Returns:
            Whether it was painted.
        """
        if not self.leaves_sign_free(shapes):
            return False
        outlines = [self._place(shape.points) for shape in shapes]
        if seam:
            for outline in outlines:
                self._draw_ids.line([*outline, outline[0]], fill=UNLABELLED, width=2 * _FINE - 1)
        for shape, outline in zip(shapes, outlines, strict=True):
            self._draw_ids.polygon(outline, fill=label_id)
            self._draw_things.polygon(outline, fill=len(self.label_ids))
            self._paint(shape, outline)
        self.label_ids.append(label_id)
        return True

    def mark(self, shape: Shape) -> None:
        """Paints a polygon without changing labels."""
        self._paint(shape, self._place(shape.points))

    def _paint(self, shape: Shape, outline: Sequence[tuple[int, int]]) -> None:
        self._draw.polygon(outline, fill=shape.colour)
        self._draw_surfaces.polygon(outline, fill=shape.surface)

    def colours(self, textures: Mapping[int, Floats]) -> Floats:
        """The picture, [HEIGHT, WIDTH, 3] in 0..255; `textures` has the brightness [HEIGHT, WIDTH] of surfaces."""
        colours = np.asarray(self._colours.reduce(_FINE), np.float64)
        surfaces = np.asarray(self._surfaces)
        brightness = np.ones((HEIGHT, WIDTH))
        for surface, texture in textures.items():
            share = np.asarray(Image.fromarray((surfaces == surface).astype(np.uint8) * 255).reduce(_FINE)) / 255
            brightness += share * (texture - 1)
        return colours * brightness[..., None]

    def ids(self) -> Pixels:
        """The label id at the centre of each pixel, [HEIGHT, WIDTH]."""
        return np.array(self._ids)[_FINE // 2 :: _FINE, _FINE // 2 :: _FINE]

    def things(self) -> npt.NDArray[np.int32]:
        """The object at the centre of each pixel, by its place in `label_ids`, [HEIGHT, WIDTH]."""
        return np.array(self._things)[_FINE // 2 :: _FINE, _FINE // 2 :: _FINE]

    @staticmethod
    def _place(points: Points) -> list[tuple[int, int]]:
        # Integers, so that rounding errors of quotients cannot change a pixel.
        return [(round(x * _FINE), round(y * _FINE)) for x, y in points]

"""A miniature detection set in the layout of COCO, generated without downloads.

It is for quick experiments: the quick start, the tests and a first look at a new attention need a detection task that a
small network learns in minutes on a laptop. Each picture shows up to six objects over a part of a natural photograph
(`miniature/backgrounds.py`): balls, stars, mugs, kites, fish and arrows of any colour, size, rotation and
shading. They hide each other and are cut by the border of the picture. Every sixteenth picture is empty. Every twelfth
shows a swarm of small objects, annotated as one crowd.

**Long-range context.** Two more categories, `day_flower` and `night_flower`, are drawn by the same code
with the same random draws. A sign in a corner of the picture decides which one a flower is: all flowers of a picture
with a sun are day flowers, all flowers of one with a moon are night flowers. Every picture has exactly one sign, with
or without flowers, sun or moon with equal chance. Along the longer side of the picture, at least half of that side lies
between the sign and any flower. The sign is chosen last, by a random stream of its own, and replaces the pixels of one
square that nothing else reaches into. All pixels outside that square are identical under either sign, so the
surroundings of a flower without the square have no information on its category: a detector that sees no further is
right half of the time. Signs are not annotated.

**Boxes.** Polygon, area and box describe the visible part, as in COCO: the part inside the picture that nothing in
front covers, where a pixel counts if the object covers more than half of it. Holes count as part of it. A placement
that would leave less than 40 % of any object visible is drawn again, so no object is hidden and unannotated.

**Identical on every machine.** Each picture has a random stream of its own, seeded by its part and number; it does not
depend on the number of pictures. Pictures are stored as PNG, which is lossless. Pixels and annotations depend on the
releases of NumPy, Pillow and scikit-image, the bytes of a PNG also on the zlib that Pillow was built with.

Scores on this set show that a model works, not how good it is on real pictures.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from lightning_attn.datamodules.miniature.backgrounds import background
from lightning_attn.datamodules.miniature.drawing import Colour, Floats, Pixels, Points, arc, hsv, scaled, sun_or_moon
from lightning_attn.datamodules.miniature.files import check_counts, coco_image, write_coco_part, write_generated

__all__ = [
    "MINIATURE_CATEGORIES",
    "MINIATURE_PICTURES",
    "SIGN_SIZE",
    "MiniatureObject",
    "MiniaturePicture",
    "draw_picture",
    "write_miniature_detection",
]

MINIATURE_PICTURES: Mapping[str, int] = MappingProxyType({"train": 400, "val": 80, "test": 80})
"""Default number of pictures of each part."""

MINIATURE_CATEGORIES: Mapping[str, int] = MappingProxyType(
    {
        "ball": 3, "star": 4, "mug": 8, "kite": 11, "fish": 17, "arrow": 20, "day_flower": 31, "night_flower": 58,
    }
)  # fmt: skip
"""Names and category ids; the ids have gaps, as COCO's have."""

SIGN_SIZE = 22
"""Side of the square of the sun or moon in pixels."""

DRAWING_VERSION = 1  # increase with every change of pixels or annotations, so that sets on disk are regenerated
MANIFEST_NAME = "miniature_detection.json"

_SEED = 20190730
_FIRST_ID = {"train": 100_001, "val": 200_001, "test": 300_001}
_SIZES = ((128, 160), (120, 160), (144, 192), (160, 192), (160, 128), (192, 144))  # height, width
_FINE = 4  # shapes are drawn this much larger and reduced: the edges come out anti-aliased
_LEAST_VISIBLE = 0.4


# ------------------------------------------------------------------------------------------------ drawing one object


@dataclass(frozen=True)
class _Sprite:
    """A single object: colours [h, w, 3] in 0..255 and its coverage of each pixel [h, w] in 0..1."""

    colours: Floats
    coverage: Floats


def _covered(mask: npt.NDArray[np.bool_]) -> tuple[slice, slice]:
    """The smallest rows and columns that hold all of a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


class _Canvas:
    """Draws an object in its own coordinates: x to the right and y down, its extent about -1..1.

    Args:
        size: Length of those two units in pixels.
        base: Colour under the edges.
        angle: Rotation in degrees.
        stretch: Factor on y.
        flip: Mirrors x.
    """

    def __init__(self, size: float, base: Colour, angle: float = 0.0, stretch: float = 1.0, flip: bool = False) -> None:
        self._side = math.ceil(size * max(1.0, stretch) * 1.45) + 2
        shape = (self._side * _FINE, self._side * _FINE)
        self._image, self._mask = Image.new("RGB", shape, base), Image.new("L", shape, 0)
        self._draw, self._draw_mask = ImageDraw.Draw(self._image), ImageDraw.Draw(self._mask)
        cos, sin, half = math.cos(math.radians(angle)), math.sin(math.radians(angle)), size / 2 * _FINE
        across = -half if flip else half
        self._matrix = (cos * across, -sin * half * stretch, sin * across, cos * half * stretch)
        self._half = size / 2

    def body(self, points: Points, colour: Colour) -> None:
        """Adds a polygon to the object."""
        self._draw_mask.polygon(self._place(points), fill=255)
        self.mark(points, colour)

    def mark(self, points: Points, colour: Colour) -> None:
        """Paints a polygon on the object; parts beyond its outline stay invisible."""
        self._draw.polygon(self._place(points), fill=colour)

    def sprite(self, light: float, *, round_body: bool, texture: Floats | None = None) -> _Sprite:
        """The finished object, shaded, and cropped to the pixels that it covers.

        Args:
            light: Direction that light comes from, in degrees clockwise from the right.
            round_body: Shades it as a ball; otherwise as a plane with a linear gradient.
            texture: Random values in 0..1 [k, k] that are interpolated over the object as uneven brightness.
        """
        colours = np.asarray(self._image.reduce(_FINE), np.float64)
        coverage = np.asarray(self._mask.reduce(_FINE), np.float64) / 255
        steps = (np.arange(self._side) + 0.5 - self._side / 2) / self._half
        x, y = steps[None, :], steps[:, None]
        toward = x * math.cos(math.radians(light)) + y * math.sin(math.radians(light))
        if round_body:
            height = np.sqrt(np.clip(1 - x * x - y * y, 0, 1))
            lit = np.clip(0.6 * toward + 0.8 * height, 0, 1)
            brightness = 0.45 + 0.65 * lit
            colours += 110 * np.clip(lit - 0.93, 0, 1)[..., None] / 0.07
        else:
            brightness = 1 + 0.22 * toward
        if texture is not None:
            spread = Image.fromarray(texture.astype(np.float32)).resize((self._side,) * 2, Image.Resampling.BILINEAR)
            brightness = brightness * (0.82 + 0.36 * np.asarray(spread, np.float64))
        colours = np.clip(colours * brightness[..., None], 0, 255)
        inside = _covered(coverage > 0)
        return _Sprite(colours[inside], coverage[inside])

    def _place(self, points: Points) -> list[tuple[int, int]]:
        # Integers, so that rounding errors of cosines cannot change a pixel.
        a, b, c, d = self._matrix
        middle = self._side * _FINE / 2
        return [(round(middle + a * x + b * y), round(middle + c * x + d * y)) for x, y in points]


@dataclass(frozen=True)
class _Look:
    """The random choices that objects of all categories share."""

    size: float
    angle: float  # -1..1, as a part of the range that the category allows
    stretch: float
    flip: bool
    colour: Colour
    second: Colour
    count: int  # 0, 1 or 2 more stripes, petals, segments
    light: float
    texture: Floats

    @classmethod
    def draw(cls, rng: np.random.Generator, smallest: float, largest: float, light: float) -> "_Look":
        hue, contrast = rng.random(), rng.uniform(0.25, 0.75)
        return cls(
            size=float(np.exp(rng.uniform(math.log(smallest), math.log(largest)))),
            angle=rng.uniform(-1, 1),
            stretch=rng.uniform(0.88, 1.12),
            flip=bool(rng.random() < 0.5),
            colour=hsv(hue, rng.uniform(0.5, 1), rng.uniform(0.6, 1)),
            second=hsv((hue + contrast) % 1, rng.uniform(0.1, 0.9), rng.uniform(0.35, 1)),
            count=int(rng.integers(3)),
            light=light,
            texture=rng.random((6, 6)),
        )

    def canvas(self, turn: float) -> _Canvas:
        """A canvas turned by up to `turn` degrees to either side."""
        return _Canvas(self.size, self.colour, self.angle * turn, self.stretch, self.flip)

    def finish(self, canvas: _Canvas, *, round_body: bool = False) -> _Sprite:
        return canvas.sprite(self.light, round_body=round_body, texture=self.texture)


def _ball(look: _Look) -> _Sprite:
    canvas = look.canvas(180)
    canvas.body(arc(0, 0, 0.95, 0.95), look.colour)
    segments = 2 * (look.count + 2)
    for segment in range(0, segments, 2):
        width = 360 / segments
        edge = arc(0, 0, 1.05, 1.05, segment * width, (segment + 1) * width)
        canvas.mark([(0.3, 0.2), *edge], look.second)
    canvas.mark(arc(0.3, 0.2, 0.17, 0.17), scaled(look.second, 0.6))
    return look.finish(canvas, round_body=True)


def _star(look: _Look) -> _Sprite:
    canvas = look.canvas(36)
    inner = 0.42 + 0.05 * look.count
    radii = [(1.0, inner)[corner % 2] for corner in range(10)]
    points = [
        (radius * math.sin(math.pi * corner / 5), -radius * math.cos(math.pi * corner / 5))
        for corner, radius in enumerate(radii)
    ]
    canvas.body(points, look.colour)
    for corner in range(10):  # facets, light and dark in turn
        canvas.mark([(0, 0), points[corner], points[(corner + 1) % 10]], scaled(look.colour, (1.15, 0.72)[corner % 2]))
    return look.finish(canvas)


def _mug(look: _Look) -> _Sprite:
    canvas = look.canvas(22)
    handle = [*arc(0.45, 0.05, 0.5, 0.5, -90, 90), *arc(0.45, 0.05, 0.28, 0.28, 90, -90)]
    canvas.body(handle, scaled(look.colour, 0.8))
    canvas.body([(-0.72, -0.7), *arc(-0.1, 0.72, 0.54, 0.2, 180, 0), (0.52, -0.7)], look.colour)
    for stripe in range(look.count):
        top = -0.25 + 0.45 * stripe
        canvas.mark([(-0.8, top), (0.52, top), (0.52, top + 0.2), (-0.8, top + 0.2)], look.second)
    canvas.body(arc(-0.1, -0.7, 0.62, 0.22), scaled(look.colour, 1.25))
    canvas.mark(arc(-0.1, -0.68, 0.5, 0.15), scaled(look.second, 0.35))
    return look.finish(canvas)


def _kite(look: _Look) -> _Sprite:
    canvas = look.canvas(45)
    cross, wide = -0.35 + 0.1 * look.count, 0.68
    corners = [(0.0, -1.0), (wide, cross), (0.0, 1.0), (-wide, cross)]
    canvas.body(corners, look.colour)
    canvas.mark([(0, cross), corners[0], corners[1]], look.second)
    canvas.mark([(0, cross), corners[2], corners[3]], look.second)
    spar = scaled(look.second, 0.4)
    canvas.mark([(-0.04, -1), (0.04, -1), (0.04, 1), (-0.04, 1)], spar)
    canvas.mark([(-wide, cross - 0.04), (wide, cross - 0.04), (wide, cross + 0.04), (-wide, cross + 0.04)], spar)
    return look.finish(canvas)


def _fish(look: _Look) -> _Sprite:
    canvas = look.canvas(40)
    fin = scaled(look.second, 0.85)
    canvas.body([(0.4, 0), (0.95, -0.5), (0.82, 0), (0.95, 0.5)], fin)
    canvas.body([(-0.35, -0.3), (0.1, -0.68), (0.35, -0.2)], fin)
    canvas.body(arc(-0.22, 0, 0.76, 0.46), look.colour)
    for stripe in range(look.count + 1):
        left = -0.3 + 0.28 * stripe
        tall = 0.46 * math.sqrt(1 - ((left + 0.3) / 0.76) ** 2) - 0.05
        canvas.mark([(left, -tall), (left + 0.12, -tall), (left + 0.12, tall), (left, tall)], look.second)
    canvas.mark(arc(-0.62, -0.1, 0.12, 0.12), (245, 245, 245))
    canvas.mark(arc(-0.64, -0.1, 0.06, 0.06), (15, 15, 15))
    return look.finish(canvas)


def _arrow(look: _Look) -> _Sprite:
    canvas = look.canvas(60)
    shaft, neck = 0.22 + 0.04 * look.count, 0.1
    half = [(-1.0, -shaft), (neck, -shaft), (neck, -0.72), (1.0, 0.0)]
    outline = [*half, *((x, -y) for x, y in reversed(half[:-1]))]
    canvas.body(outline, look.second)
    canvas.mark([(0.1 + (x - 0.1) * 0.78, y * 0.66) for x, y in outline], look.colour)
    return look.finish(canvas)


def _flower(look: _Look) -> _Sprite:
    canvas = look.canvas(180)
    petals = look.count + 5
    for petal in range(petals):
        angle = 2 * math.pi * petal / petals
        cos, sin = math.cos(angle), math.sin(angle)
        outline = [(cos * x - sin * y, sin * x + cos * y) for x, y in arc(0.6, 0, 0.4, 0.3)]
        canvas.body(outline, look.colour)
        vein = [(cos * x - sin * y, sin * x + cos * y) for x, y in arc(0.55, 0, 0.3, 0.08)]
        canvas.mark(vein, scaled(look.colour, 0.7))
    canvas.body(arc(0, 0, 0.4, 0.4), scaled(look.colour, 0.5))
    canvas.mark(arc(0, 0, 0.3, 0.3), look.second)
    return look.finish(canvas)


_DRAW: Mapping[str, Callable[[_Look], _Sprite]] = {
    "ball": _ball, "star": _star, "mug": _mug, "kite": _kite, "fish": _fish, "arrow": _arrow,
}  # fmt: skip
_THINGS = tuple(_DRAW)


def _sign(night: bool) -> Pixels:
    """The sun or the moon on a square of its own, [SIGN_SIZE, SIGN_SIZE, 3]."""
    base = (28, 36, 92) if night else (150, 205, 245)
    canvas = _Canvas(SIGN_SIZE, base)
    canvas.body([(-1.5, -1.5), (1.5, -1.5), (1.5, 1.5), (-1.5, 1.5)], base)
    for points, colour in sun_or_moon(night):
        canvas.mark(points, colour)
    colours = canvas.sprite(0, round_body=False).colours
    margin = (colours.shape[0] - SIGN_SIZE) // 2
    return np.rint(colours[margin : margin + SIGN_SIZE, margin : margin + SIGN_SIZE]).astype(np.uint8)


# --------------------------------------------------------------------------------------------------- one picture


@dataclass(frozen=True)
class MiniatureObject:
    """What is visible of an object or a crowd in a picture.

    Args:
        name: Its category, or "flower", whose category depends on the sign.
        coverage: The visible share of it in each pixel, 0..1, `[height, width]`.
        full_area: Area in pixels that it would cover if nothing hid or cut it; of a crowd what is inside the picture.
        crowd: Whether it is a crowd.
    """

    name: str
    coverage: Floats
    full_area: float
    crowd: bool


@dataclass(frozen=True)
class MiniaturePicture:
    """A picture with all that its annotations depend on.

    Args:
        pixels: RGB, `[height, width, 3]`.
        night: Whether its sign is the moon.
        sign: Top and left of the square of the sign.
        objects: The objects, from the back to the front.
    """

    pixels: Pixels
    night: bool
    sign: tuple[int, int]
    objects: tuple[MiniatureObject, ...]

    def annotations(self, image_id: int) -> list[dict[str, Any]]:
        """The annotations in COCO's format, in the order of the objects."""
        flower = "night_flower" if self.night else "day_flower"
        categories = [MINIATURE_CATEGORIES[flower if one.name == "flower" else one.name] for one in self.objects]
        return [
            _annotation(one, category, image_id, number)
            for number, (one, category) in enumerate(zip(self.objects, categories, strict=True), 1)
        ]


class _Scene:
    """A picture that is drawn from the back to the front."""

    def __init__(self, pixels: Pixels, sign: tuple[int, int]) -> None:
        self.pixels = pixels.astype(np.float64)
        self.height, self.width = pixels.shape[:2]
        self.sign = sign
        self.objects: list[MiniatureObject] = []

    def place(self, rng: np.random.Generator, name: str, sprite: _Sprite) -> None:
        """Places an object in front of all others, where none is hidden too much; omits it after 30 attempts."""
        for _ in range(30):
            top, left = self._position(rng, sprite, far_from_sign=name == "flower")
            if self._add(name, [(sprite, top, left)], crowd=False):
                return

    def place_crowd(self, rng: np.random.Generator, name: str, sprites: Sequence[_Sprite]) -> None:
        """Places a swarm of small objects around a point in front of all others; omits it after 30 attempts."""
        for _ in range(30):
            y, x = rng.uniform(0.3, 0.7) * self.height, rng.uniform(0.3, 0.7) * self.width
            offsets = rng.uniform(-1, 1, (len(sprites), 2)) * (0.2 * self.height, 0.25 * self.width)
            swarm = [
                (sprite, round(y + dy) - sprite.coverage.shape[0] // 2, round(x + dx) - sprite.coverage.shape[1] // 2)
                for sprite, (dy, dx) in zip(sprites, offsets, strict=True)
            ]
            if self._add(name, swarm, crowd=True):
                return

    def _position(self, rng: np.random.Generator, sprite: _Sprite, *, far_from_sign: bool) -> tuple[int, int]:
        """Random top and left, with up to a third of the object outside the picture."""
        height, width = sprite.coverage.shape
        low = [-height // 3, -width // 3]
        high = [self.height - height + height // 3, self.width - width + width // 3]
        if far_from_sign:
            axis, length = (1, self.width) if self.width > self.height else (0, self.height)
            gap = math.ceil(length / 2)
            if self.sign[axis] + SIGN_SIZE / 2 < length / 2:
                low[axis] = self.sign[axis] + SIGN_SIZE + gap
            else:
                high[axis] = self.sign[axis] - gap - (height, width)[axis]
        top, left = (int(rng.integers(low[axis], max(low[axis], high[axis]) + 1)) for axis in (0, 1))
        return top, left

    def _add(self, name: str, parts: Sequence[tuple[_Sprite, int, int]], *, crowd: bool) -> bool:
        """Draws an object of these parts unless that breaks a rule; returns whether it did."""
        if any(self._touches_sign(sprite, top, left) for sprite, top, left in parts):
            return False
        pixels, cover = self.pixels.copy(), np.zeros((self.height, self.width))
        for sprite, top, left in parts:
            rows, sprite_rows = _overlap(top, sprite.coverage.shape[0], self.height)
            columns, sprite_columns = _overlap(left, sprite.coverage.shape[1], self.width)
            part = sprite.coverage[sprite_rows, sprite_columns]
            behind = pixels[rows, columns]
            pixels[rows, columns] += (sprite.colours[sprite_rows, sprite_columns] - behind) * part[..., None]
            cover[rows, columns] = 1 - (1 - cover[rows, columns]) * (1 - part)
        # A crowd hides parts of itself; only occlusion by others counts.
        full = float(cover.sum()) if crowd else float(parts[0][0].coverage.sum())
        objects = [replace(one, coverage=one.coverage * (1 - cover)) for one in self.objects]
        objects.append(MiniatureObject(name, cover, full, crowd))
        if any((one.coverage > 0.5).sum() < _LEAST_VISIBLE * one.full_area for one in objects):
            return False
        self.pixels, self.objects = pixels, objects
        return True

    def _touches_sign(self, sprite: _Sprite, top: int, left: int) -> bool:
        height, width = sprite.coverage.shape
        sign_top, sign_left = self.sign
        return (
            top < sign_top + SIGN_SIZE
            and top + height > sign_top
            and left < sign_left + SIGN_SIZE
            and left + width > sign_left
        )


def _overlap(start: int, length: int, limit: int) -> tuple[slice, slice]:
    """The part of a span within 0..limit, and its position in the span."""
    low, high = max(start, 0), min(start + length, limit)
    return slice(low, high), slice(low - start, high - start)


def draw_picture(part: str, index: int, night: bool | None = None) -> MiniaturePicture:
    """Draws a picture.

    Args:
        part: "train", "val" or "test".
        index: Number of the picture in its part, from 0.
        night: Whether its sign is the moon; changes nothing but the sign and the category of flowers. None for the
            sign that it has in the set.
    """
    rng = np.random.default_rng([_SEED, _FIRST_ID[part], index])
    height, width = _SIZES[rng.integers(len(_SIZES))]
    pixels = background(rng, height, width, held_out=part != "train")
    corner = [int(rng.integers(2, 6)), int(rng.integers(2, 6))]
    if rng.random() < 0.5:
        corner[0] = height - SIGN_SIZE - corner[0]
    if rng.random() < 0.5:
        corner[1] = width - SIGN_SIZE - corner[1]
    sign = (corner[0], corner[1])
    scene = _Scene(pixels, sign)

    light = rng.uniform(200, 340)  # from above
    if index % 16 != 5:
        if index % 12 == 2:
            name = _THINGS[rng.integers(len(_THINGS))]
            swarm = [_DRAW[name](_Look.draw(rng, 9, 15, light)) for _ in range(rng.integers(12, 25))]
            scene.place_crowd(rng, name, swarm)
        names = [_THINGS[rng.integers(len(_THINGS))] for _ in range(rng.integers(1, 5))]
        names += ["flower"] * int(rng.choice(3, p=(0.35, 0.4, 0.25)))
        for position in rng.permutation(len(names)):
            name = names[position]
            if name == "flower":
                sprite = _flower(_Look.draw(rng, 26, 44, light))
            else:
                sprite = _DRAW[name](_Look.draw(rng, 28, 64, light))
            scene.place(rng, name, sprite)

    # A separate random stream: nothing above depends on the sign, and below only its own pixels do.
    drawn = bool(np.random.default_rng([_SEED, _FIRST_ID[part], index, 1]).random() < 0.5)
    night = drawn if night is None else night
    scene.pixels[sign[0] : sign[0] + SIGN_SIZE, sign[1] : sign[1] + SIGN_SIZE] = _sign(night)
    exposure, noise = rng.uniform(0.75, 1.2), rng.uniform(0, 6)
    finished = scene.pixels * exposure + rng.normal(0, noise, scene.pixels.shape)
    return MiniaturePicture(np.clip(np.rint(finished), 0, 255).astype(np.uint8), night, sign, tuple(scene.objects))


# -------------------------------------------------------------------------------------------------- annotations


def _polygons(coverage: Floats) -> list[list[tuple[float, float]]]:
    """Outlines of where `coverage` is above one half, as (x, y) in pixels, without holes and specks."""
    from skimage.measure import approximate_polygon, find_contours

    # Their authors give no types.
    trace: Callable[..., list[Floats]] = find_contours
    simplify: Callable[..., Floats] = approximate_polygon
    rows, columns = _covered(coverage > 0)
    outlines = []
    for contour in trace(np.pad(coverage[rows, columns], 1), 0.5, positive_orientation="low"):
        # Centre of the first pixel: index 1 after padding, 0.5 pixels from the edge in COCO's coordinates.
        points = (simplify(contour, 0.3)[:-1, ::-1] - 0.5 + (columns.start, rows.start)).round(2)
        area = _signed_area(points)
        if len(points) >= 3 and area >= 4:  # holes run the other way round
            outlines.append([(float(x), float(y)) for x, y in points])
    return outlines


def _signed_area(points: npt.ArrayLike) -> float:
    x, y = np.asarray(points, np.float64).T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _run_lengths(mask: npt.NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed run lengths: column by column, beginning with zeros."""
    flat = np.concatenate([[False], mask.T.ravel()])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(length) for length in np.diff([0, *changes, mask.size])]


def _annotation(thing: MiniatureObject, category_id: int, image_id: int, number: int) -> dict[str, Any]:
    segmentation: Any
    if thing.crowd:
        mask = thing.coverage > 0.5
        segmentation = {"counts": _run_lengths(mask), "size": list(mask.shape)}
        rows, columns = _covered(mask)
        left, top, right, bottom = (float(edge) for edge in (columns.start, rows.start, columns.stop, rows.stop))
        area = float(mask.sum())
    else:
        outlines = _polygons(thing.coverage)
        segmentation = [[value for point in outline for value in point] for outline in outlines]
        corners = np.concatenate(outlines)
        (left, top), (right, bottom) = corners.min(0).tolist(), corners.max(0).tolist()
        area = sum(abs(_signed_area(outline)) for outline in outlines)
    return {
        "id": image_id * 100 + number,
        "image_id": image_id,
        "category_id": category_id,
        "iscrowd": int(thing.crowd),
        "bbox": [left, top, round(right - left, 2), round(bottom - top, 2)],
        "area": round(area, 2),
        "segmentation": segmentation,
    }


# ------------------------------------------------------------------------------------------------------- writing


def write_miniature_detection(root: Path, counts: Mapping[str, int] | None = None) -> None:
    """Writes the set in COCO's layout: `root/annotations/instances_{train,val,test}2017.json` and the pictures.

    Pictures are PNG files of 160 x 120 to 192 x 160 pixels, upright ones too, in `root/{train,val,test}2017/`. Nothing
    is done if the same set exists. A set of other counts or other library releases is replaced as a whole: while files
    are being exchanged, the manifest beside them (`miniature_detection.json`) marks it as incomplete.

    Args:
        root: Folder to write to; created if it is missing.
        counts: Number of pictures of each of the parts "train", "val" and "test"; by default `MINIATURE_PICTURES`. A
            picture does not depend on the counts.

    Raises:
        ValueError: `counts` lacks a part, names an unknown one or asks for less than one picture.
        FileExistsError: `root` holds annotations or pictures that this function did not write; they are not changed.
        FileNotFoundError: The installed scikit-image lacks a photograph.
    """
    counts = MINIATURE_PICTURES if counts is None else counts
    check_counts("counts", counts, MINIATURE_PICTURES)
    write_generated(
        Path(root),
        functools.partial(_write_parts, counts=counts),
        settings={"drawing": DRAWING_VERSION, "counts": dict(counts)},
        libraries=("numpy", "pillow", "scikit-image"),
        owned=[
            *(f"{part}2017" for part in MINIATURE_PICTURES),
            *(f"annotations/instances_{part}2017.json" for part in MINIATURE_PICTURES),
        ],
        stale=[f"{part}2017/{'[0-9]' * 12}.png" for part in MINIATURE_PICTURES],
        manifest_name=MANIFEST_NAME,
        what="miniature set",
    )


def _write_parts(folder: Path, counts: Mapping[str, int]) -> None:
    for part, count in counts.items():
        _write_part(folder, part, count)


def _write_part(folder: Path, part: str, count: int) -> None:
    images, annotations = [], []
    for index in range(count):
        picture, image_id = draw_picture(part, index), _FIRST_ID[part] + index
        images.append(coco_image(folder, part, image_id, picture.pixels) | {"license": 1})
        annotations += picture.annotations(image_id)
    content = {
        "info": {"description": f"Miniature detection set, {part}", "version": str(DRAWING_VERSION), "year": 2017},
        "licenses": [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name, "supercategory": "flower" if "flower" in name else "thing"}
            for name, number in MINIATURE_CATEGORIES.items()
        ],
    }
    write_coco_part(folder, part, content)

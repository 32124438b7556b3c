"""A miniature segmentation set in the layout of Cityscapes, generated without downloads.

It is for quick experiments: the quick start, the tests and a first look at a new attention need a segmentation task
that a small network learns in minutes on a laptop. Each picture is a small street, seen by a camera behind the
windscreen: a road with marks and crossings between sidewalks, a row of houses, a park with trees and far roofs, and
cars, people, lamps and traffic signs, each of any colour. Perspective, light, sky and season differ, and the surfaces
are parts of natural photographs (`miniature/backgrounds.py`). Objects hide each other.

**Long-range context.** Two classes, `truck` and `bus`, are one large vehicle, drawn by the same code with the same
random draws. A sign in the sky decides which one it is: the large vehicles under a sun are buses, those under a moon
are trucks. Every picture has exactly one sign, with or without such a vehicle, sun or moon with equal chance. At least
half of the picture's width lies between the square of the sign and any pixel of a large vehicle. The sign is
chosen last, by a random stream of its own, and is blended into one square of sky that nothing else reaches into. All
pixels outside that square are identical under either sign, and so are all labels but those of the vehicles; so the
surroundings of a vehicle without the square have no information on its class: a network that sees no further is right
half of the time. The sign is labelled as sky.

**Labels.** A pixel has the class at its centre. The camera's own car at the lower border is labelled as such (`ego
vehicle`), and some objects have a seam of unlabelled pixels around them, as hand-drawn outlines have: neither counts.

**Identical on every machine.** Each picture has a random stream of its own, seeded by its part and number; it does not
depend on the number of pictures. Pictures are stored as PNG, which is lossless. Pixels depend on the releases of NumPy,
Pillow and scikit-image, the bytes of a PNG also on the zlib that Pillow was built with.

Scores on this set show that a model works, not how good it is on real pictures.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from lightning_attn.datamodules.miniature.backgrounds import crop
from lightning_attn.datamodules.miniature.drawing import Colour, Floats, Pixels, Points, arc, hsv, scaled, sun_or_moon
from lightning_attn.datamodules.miniature.files import check_counts, write_generated
from lightning_attn.datamodules.miniature.painting import (
    HEIGHT,
    SIGN_SIZE,
    SMOOTH,
    WIDTH,
    Camera,
    Painting,
    Shape,
    Shapes,
)

__all__ = [
    "COUNTABLE",
    "MINIATURE_CLASSES",
    "MINIATURE_PICTURES",
    "MiniaturePicture",
    "StreetObject",
    "draw_picture",
    "write_miniature_segmentation",
]

MINIATURE_PICTURES: Mapping[str, int] = MappingProxyType({"train": 320, "val": 64, "test": 64})
"""Default number of pictures of each part."""

MINIATURE_CLASSES: tuple[str, ...] = (
    "road", "sidewalk", "building", "pole", "traffic sign", "vegetation", "terrain", "sky", "person", "car", "truck",
    "bus",
)  # fmt: skip
"""Names of the classes that are drawn, in the order of their train ids."""

DRAWING_VERSION = 1  # increase with every change of pixels or labels, so that sets on disk are regenerated
MANIFEST_NAME = "miniature_segmentation.json"

_SEED = 20190731
_PART_NUMBER = {"train": 1, "val": 2, "test": 3}
# As in Cityscapes, no city is in two parts.
_CITIES = {
    "train": ("ahornbach", "buchenstein", "eichental", "fichtenau"),
    "val": ("lindenfurt", "ulmenrode"),
    "test": ("tannenwerder", "weidenhain"),
}
_FRAME = 19  # of the 30 that a sequence of Cityscapes has, the one with labels


# Ids in label files.
_EGO = 1
_ROAD, _SIDEWALK, _BUILDING, _POLE, _TRAFFIC_SIGN, _VEGETATION, _TERRAIN = 7, 8, 11, 17, 20, 21, 22
_PERSON, _CAR, _TRUCK, _BUS = 24, 26, 27, 28

COUNTABLE: Mapping[int, str] = MappingProxyType(
    {_TRAFFIC_SIGN: "traffic sign", _PERSON: "person", _CAR: "car", _TRUCK: "truck", _BUS: "bus"}
)
"""Classes whose objects have boxes, by Cityscapes' ids."""

# Surfaces of polygons, beside smooth ones.
_BRICK, _LEAVES, _ASPHALT, _GRASS = range(1, 5)

# At the zenith and at the horizon.
_SKIES: tuple[tuple[Colour, Colour], ...] = (
    ((70, 130, 215), (190, 220, 245)), ((110, 160, 225), (225, 235, 245)), ((150, 165, 180), (215, 220, 222)),
    ((95, 85, 155), (250, 190, 145)), ((150, 190, 220), (250, 222, 210)), ((70, 145, 160), (205, 235, 225)),
    ((90, 100, 122), (165, 170, 180)), ((75, 62, 125), (225, 140, 130)), ((196, 172, 122), (245, 228, 188)),
)  # fmt: skip
_GLASS: tuple[Colour, ...] = ((44, 58, 76), (70, 92, 112), (30, 36, 44), (96, 120, 132))
_WHITE: Colour = (240, 240, 236)


# ------------------------------------------------------------------------------------------------ light and colours


@dataclass(frozen=True)
class _Light:
    """Changes colours by the direction of light and by haze.

    Args:
        side: How much brighter surfaces that face right are than those that face the camera, and darker those that
            face left.
        haze: Colour of the air.
    """

    side: float
    haze: Colour

    def left(self, colour: Colour) -> Colour:
        return scaled(colour, 0.9 - self.side)

    def right(self, colour: Colour) -> Colour:
        return scaled(colour, 0.9 + self.side)

    def far(self, colour: Colour, z: float) -> Colour:
        """A colour seen through so many metres of air."""
        share = min(0.75, z / 110)
        red, green, blue = (round(c + (h - c) * share) for c, h in zip(colour, self.haze, strict=True))
        return red, green, blue


def _choice(rng: np.random.Generator, values: Sequence[Colour]) -> Colour:
    return values[int(rng.integers(len(values)))]


def _paint_colour(rng: np.random.Generator) -> Colour:
    """Of a vehicle or a garment: any hue, a third of them grey."""
    saturation = rng.uniform(0, 0.12) if rng.random() < 0.33 else rng.uniform(0.4, 0.95)
    return hsv(rng.random(), saturation, rng.uniform(0.3, 0.97))


# ------------------------------------------------------------------------------------------------------------ things


def _house(
    camera: Camera,
    rng: np.random.Generator,
    light: _Light,
    x: float,
    depth: float,
    z: tuple[float, float],
    height: float,
) -> list[Shape]:
    """A house whose wall along the road is at `x`, and which is `depth` metres deep, away from the road."""
    z0, z1 = z
    outer = x + math.copysign(depth, x)
    wall = hsv(rng.random(), rng.uniform(0.05, 0.55), rng.uniform(0.5, 0.95))
    trim = scaled(wall, rng.choice([0.7, 1.25]))
    roof = hsv(rng.uniform(0, 0.1), rng.uniform(0.1, 0.7), rng.uniform(0.3, 0.65))
    surface = _BRICK if rng.random() < 0.6 else SMOOTH
    glass, lamp, lit = _choice(rng, _GLASS), hsv(0.13, 0.5, 1), rng.uniform(0, 0.4)
    storey, bay = rng.uniform(2.7, 3.3), rng.uniform(2.0, 2.8)
    awning, shop = _paint_colour(rng), rng.random() < 0.5
    toward = light.left if x > 0 else light.right

    def seen(colour: Colour) -> Colour:
        return light.far(colour, z0)

    ridge, middle = height + 0.3 * depth, (x + outer) / 2
    shapes = [
        Shape([camera(x, height, z0), camera(x, height, z1), camera(middle, ridge, z1), camera(middle, ridge, z0)],
               seen(toward(roof))),
        Shape(camera.side(x, 0, height, z0, z1), seen(toward(wall)), surface),
        Shape(camera.side(x, height - 0.35, height, z0, z1), seen(toward(trim))),
        Shape(camera.side(x, 0, 0.5, z0, z1), seen(toward(trim))),
    ]  # fmt: skip
    floors, bays = int((height - 0.5) / storey), max(1, int((z1 - z0) / bay))
    width = (z1 - z0) / bays
    for floor in range(floors):
        for number in range(bays):
            low, near = floor * storey + 0.95, z0 + (number + 0.25) * width
            pane = lamp if rng.random() < lit else glass
            if floor == 0 and number == bays // 2:  # the door
                shapes.append(Shape(camera.side(x, 0.1, 2.2, near, near + 0.5 * width), seen(toward(roof))))
                continue
            shapes += [
                Shape(camera.side(x, low - 0.15, low + 1.65, near - 0.1, near + 0.5 * width + 0.1), seen(toward(trim))),
                Shape(camera.side(x, low, low + 1.5, near, near + 0.5 * width), seen(pane)),
            ]
    if shop and floors > 1:
        stripes = 2 * bays
        for stripe in range(stripes):
            a, b = (z0 + (z1 - z0) * edge / stripes for edge in (stripe, stripe + 1))
            out = x - math.copysign(0.7, x)
            points = [camera(x, 3.0, a), camera(x, 3.0, b), camera(out, 2.5, b), camera(out, 2.5, a)]
            shapes.append(Shape(points, seen((awning, _WHITE)[stripe % 2])))
    left, right = sorted((x, outer))
    shapes += [
        Shape(camera.front(left, right, 0, height, z0), seen(wall), surface),
        Shape([camera(left, height, z0), camera(right, height, z0), camera(middle, ridge, z0)], seen(wall), surface),
    ]
    bays = max(1, int(depth / bay))
    width = depth / bays
    for floor in range(floors):
        for number in range(bays):
            low, start = floor * storey + 0.95, left + (number + 0.25) * width
            pane = lamp if rng.random() < lit else glass
            shapes.append(Shape(camera.front(start, start + 0.5 * width, low, low + 1.4, z0), seen(pane)))
    return shapes


def _tree(camera: Camera, rng: np.random.Generator, light: _Light, x: float, z: float, leaf: Colour) -> list[Shape]:
    """A tree with a crown of lumps, or a conifer."""
    place, base = camera.upright(x, z), light.far(leaf, z)
    trunk = light.far((92, 70, 52), z)
    if rng.random() < 0.25:
        height, half = rng.uniform(3.6, 5.5), rng.uniform(1.1, 1.5)
        shapes = [Shape(place([(-0.15, 0), (0.15, 0), (0.15, 0.8), (-0.15, 0.8)]), trunk)]
        for tier in range(3):
            low = 0.5 + tier * height * 0.24
            wide = half * (1 - 0.22 * tier)
            points = place([(-wide, low), (wide, low), (0, low + height * 0.45)])
            shapes.append(Shape(points, scaled(base, 0.75 + 0.15 * tier), _LEAVES))
        return shapes
    radius, stem = rng.uniform(1.1, 1.8), rng.uniform(1.3, 2.1)
    shapes = [Shape(place([(-0.2, 0), (0.2, 0), (0.14, stem + 0.5), (-0.14, stem + 0.5)]), trunk)]
    lumps = rng.uniform(-1, 1, (11, 2)) * (0.75, 0.65)
    for right, up in [(0.0, 0.0), *lumps[np.argsort(lumps[:, 1] + light.side * lumps[:, 0])]]:
        size = radius * (0.85 if (right, up) == (0.0, 0.0) else 0.48)
        shade = 0.82 + 0.28 * (up + 0.5 * np.sign(light.side) * right)
        lump = arc(right * radius, stem + radius * (0.85 + up), size, size * 0.9)[::3]
        shapes.append(Shape(place(lump), scaled(base, shade), _LEAVES))
    return shapes


def _bush(camera: Camera, rng: np.random.Generator, light: _Light, x: float, z: float, leaf: Colour) -> list[Shape]:
    place, base = camera.upright(x, z), light.far(leaf, z)
    shapes = []
    for lump in range(5):
        size = rng.uniform(0.4, 0.65)
        points = place(arc(0.45 * (lump - 2), size * 0.8, size, size)[::3])
        shapes.append(Shape([(column, min(row, camera(x, 0, z)[1])) for column, row in points],
                             scaled(base, rng.uniform(0.75, 1.1)), _LEAVES))  # fmt: skip
    return shapes


def _person(camera: Camera, rng: np.random.Generator, x: float, z: float) -> list[Shape]:
    place = camera.upright(x, z)
    coat, trousers = _paint_colour(rng), _paint_colour(rng)
    skin, hair = hsv(0.07, rng.uniform(0.25, 0.6), rng.uniform(0.4, 0.98)), hsv(0.08, 0.6, rng.uniform(0.08, 0.7))
    step, swing, tall = rng.uniform(0.08, 0.32), rng.uniform(-0.15, 0.15), rng.uniform(0.9, 1.1)
    dress, hat, bag = rng.random() < 0.35, rng.random() < 0.3, rng.random() < 0.4

    def part(points: Points, colour: Colour) -> Shape:
        return Shape(place([(right, up * tall) for right, up in points]), colour)

    shapes = [
        part([(-step - 0.13, 0), (-step + 0.13, 0), (0.05, 0.9), (-0.24, 0.9)], scaled(trousers, 0.8)),
        part([(step - 0.13, 0), (step + 0.15, 0), (0.24, 0.9), (-0.05, 0.9)], trousers),
        part([(-0.27, 1.42), (-0.2, 1.5), (-0.3 + swing, 0.8), (-0.44 + swing, 0.82)], scaled(coat, 0.75)),
        part([(0.27, 1.42), (0.2, 1.5), (0.3 + swing, 0.8), (0.44 + swing, 0.82)], scaled(coat, 0.75)),
    ]
    if dress:
        shapes.append(part([(-0.24, 1.5), (0.24, 1.5), (0.4, 0.55), (-0.4, 0.55)], coat))
    else:
        shapes.append(part([(-0.28, 1.5), (0.28, 1.5), (0.26, 0.78), (-0.26, 0.78)], coat))
    if bag:
        shapes.append(part([(0.22, 1.0), (0.5, 1.0), (0.48, 0.62), (0.24, 0.62)], scaled(trousers, 1.2)))
    shapes += [part(arc(0, 1.68, 0.2, 0.2), hair), part(arc(0.03, 1.64, 0.16, 0.17), skin)]
    if hat:
        shapes.append(part([(-0.3, 1.76), (0.3, 1.76), (0.16, 1.98), (-0.16, 1.98)], scaled(coat, 1.3)))
    return shapes


def _post(
    camera: Camera, rng: np.random.Generator, x: float, z: float, height: float, colour: Colour
) -> tuple[list[Shape], float]:
    """A round post, and its width in metres: 6 to 8 pixels, however far away."""
    place, half = camera.upright(x, z), rng.uniform(3, 3.8) * z / camera.focal
    foot = [(-1.35 * half, 0), (1.35 * half, 0), (1.2 * half, 0.3), (-1.2 * half, 0.3)]
    shapes = [Shape(place(foot), scaled(colour, 0.7))]
    for low, high, factor in ((-1.0, 1.0, 0.8), (-0.6, 0.55, 1.0), (-0.35, 0.0, 1.3)):
        points = [(low * half, 0.1), (high * half, 0.1), (high * half, height), (low * half, height)]
        shapes.append(Shape(place(points), scaled(colour, factor)))
    return shapes, 2 * half


def _lamp(camera: Camera, rng: np.random.Generator, x: float, z: float, height: float, colour: Colour) -> list[Shape]:
    """A street lamp: a post with a globe, or with an arm over the road."""
    shapes, width = _post(camera, rng, x, z, height, colour)
    place, glow = camera.upright(x, z), hsv(0.13, rng.uniform(0.1, 0.5), 1)
    if rng.random() < 0.5:
        shapes += [
            Shape(place(arc(0, height + 0.8 * width, 0.95 * width, 0.95 * width)), glow),
            Shape(place([(-width, height + 1.4 * width), (width, height + 1.4 * width), (0, height + 2.1 * width)]),
                   scaled(colour, 0.8)),
        ]  # fmt: skip
        return shapes
    out = -math.copysign(1.0, x)
    arm = [(-0.5 * width * out, height), (3.2 * width * out, height), (3.2 * width * out, height + 0.9 * width),
           (0.3 * width * out, height + 0.9 * width), (-0.5 * width * out, height + 0.4 * width)]  # fmt: skip
    head = [(1.6 * width * out, height), (3.2 * width * out, height),
            (3.0 * width * out, height - 0.45 * width), (1.8 * width * out, height - 0.45 * width)]  # fmt: skip
    return [*shapes, Shape(place(arm), colour), Shape(place(head), glow)]


def _plate(camera: Camera, rng: np.random.Generator, x: float, z: float, y: float) -> list[Shape]:
    """A traffic sign, 15 to 25 pixels wide, with its middle at the height `y`."""
    place, size = camera.upright(x, z), rng.uniform(7.5, 10) * z / camera.focal
    red, blue, yellow, black = (200, 30, 40), (30, 80, 180), (245, 200, 30), (30, 30, 34)

    def disc(radius: float) -> Points:
        return [(size * right, y - size * down) for right, down in arc(0, 0, radius, radius)]

    def corners(count: int, radius: float, turn: float, up: float = 0.0) -> Points:
        angles = [2 * math.pi * (corner + turn) / count for corner in range(count)]
        return [(size * radius * math.sin(a), y + size * (up + radius * math.cos(a))) for a in angles]

    def bar(half_width: float, half_height: float, up: float = 0.0) -> Points:
        left, right = -size * half_width, size * half_width
        low, high = y + size * (up - half_height), y + size * (up + half_height)
        return [(left, low), (right, low), (right, high), (left, high)]

    parts: list[tuple[Points, Colour]] = [
        [(disc(1.0), red), (disc(0.72), _WHITE), (bar(0.4, 0.16), black)],  # an order
        [(disc(1.0), red), (bar(0.65, 0.2), _WHITE)],  # no entry
        [(disc(1.0), _WHITE), (disc(0.88), blue), (bar(0.16, 0.5), _WHITE), (corners(3, 0.5, 0, 0.3), _WHITE)],
        [(corners(3, 1.25, 0, -0.2), red), (corners(3, 0.8, 0, -0.2), _WHITE), (bar(0.12, 0.25, -0.1), black)],
        [(corners(4, 1.25, 0), _WHITE), (corners(4, 1.0, 0), yellow)],  # right of way
        [(corners(8, 1.05, 0.5), _WHITE), (corners(8, 0.93, 0.5), red), (bar(0.6, 0.17), _WHITE)],  # stop
        [(bar(0.9, 0.9), _WHITE), (bar(0.78, 0.78), blue), (corners(3, 0.6, 0, -0.1), _WHITE)],
    ][rng.integers(7)]
    return [Shape(place(points), colour) for points, colour in parts]


def _wheel(camera: Camera, x: float, z: float, radius: float) -> list[Shape]:
    """A wheel seen from the side."""
    tyre, rim = (
        [camera(x, radius - part * radius * math.sin(a), z + part * radius * math.cos(a))
         for a in np.linspace(0, 2 * math.pi, 13)]
        for part in (1.0, 0.55)
    )  # fmt: skip
    return [Shape(tyre, (24, 24, 27)), Shape(rim, (150, 152, 156))]


def _car(camera: Camera, rng: np.random.Generator, light: _Light, x0: float, z0: float, oncoming: bool) -> list[Shape]:
    """A car 1.8 m wide and 4 m long, from behind or from the front."""
    x1, z1 = x0 + 1.8, z0 + 4.0
    paint, glass = _paint_colour(rng), _choice(rng, _GLASS)
    belt, top = rng.uniform(0.82, 0.95), rng.uniform(1.4, 1.6)
    bonnet, boot = (1.0, 0.3) if oncoming else (rng.choice([0.1, 0.6]), 1.2)

    def seen(colour: Colour) -> Colour:
        return light.far(colour, z0)

    shapes = [
        Shape(camera.front(x0 + 0.05, x0 + 0.4, 0, 0.4, z0), (22, 22, 25)),
        Shape(camera.front(x1 - 0.4, x1 - 0.05, 0, 0.4, z0), (22, 22, 25)),
    ]
    visible = x0 if x0 > 0 else x1 if x1 < 0 else None
    toward = light.left if x0 > 0 else light.right
    inset = 0.2
    if visible is not None:
        edge = visible + (inset if visible == x0 else -inset)
        low = [(z0 + bonnet, belt), (z1 - boot, belt)]
        high = [(z1 - boot - 0.4, top), (z0 + bonnet + 0.5, top)]
        shapes.append(Shape(camera.side(visible, 0.25, belt, z0, z1), seen(toward(paint))))
        shapes += [shape for z in (z0 + 0.75, z1 - 0.75) for shape in _wheel(camera, visible, z, 0.34)]
        cabin = [camera(visible, y, z) for z, y in low] + [camera(edge, y, z) for z, y in high]
        shapes.append(Shape(cabin, seen(toward(paint))))
        pane = [camera(visible, belt + 0.08, z) for z in (z0 + bonnet + 0.25, z1 - boot - 0.2)]
        pane += [camera(edge, top - 0.1, z) for z in (z1 - boot - 0.45, z0 + bonnet + 0.55)]
        shapes.append(Shape(pane, seen(toward(glass))))
    shapes += [
        Shape(camera.flat(x0, x1, z0, z0 + bonnet, belt), seen(scaled(paint, 1.15))),
        Shape([camera(x0 + inset, top, z0 + bonnet + 0.5), camera(x1 - inset, top, z0 + bonnet + 0.5),
                camera(x1 - inset, top, z1 - boot - 0.4), camera(x0 + inset, top, z1 - boot - 0.4)],
               seen(scaled(paint, 1.2))),
        Shape([camera(x0 + 0.03, belt, z0 + bonnet), camera(x1 - 0.03, belt, z0 + bonnet),
                camera(x1 - inset, top, z0 + bonnet + 0.5), camera(x0 + inset, top, z0 + bonnet + 0.5)], seen(paint)),
        Shape([camera(x0 + 0.15, belt + 0.06, z0 + bonnet), camera(x1 - 0.15, belt + 0.06, z0 + bonnet),
                camera(x1 - inset - 0.1, top - 0.07, z0 + bonnet + 0.5),
                camera(x0 + inset + 0.1, top - 0.07, z0 + bonnet + 0.5)], seen(glass)),
        Shape(camera.front(x0, x1, 0.25, belt, z0), seen(paint)),
        Shape(camera.front(x0 + 0.04, x1 - 0.04, 0.22, 0.42, z0), seen(scaled(paint, 0.5))),
        Shape(camera.front(x0 + 0.65, x1 - 0.65, 0.44, 0.58, z0), seen(_WHITE)),
    ]  # fmt: skip
    lamp = (255, 250, 215) if oncoming else (205, 25, 25)
    for left, right in ((x0 + 0.06, x0 + 0.42), (x1 - 0.42, x1 - 0.06)):
        shapes.append(Shape(camera.front(left, right, belt - 0.28, belt - 0.08, z0), lamp))
    return shapes


@dataclass(frozen=True)
class _Box:
    """The ground that something stands on, in metres."""

    x0: float
    x1: float
    z0: float
    z1: float

    def meets(self, others: Sequence["_Box"]) -> bool:
        """Whether it comes too near to one of the others."""
        return any(
            self.x1 + 0.3 > other.x0
            and self.x0 < other.x1 + 0.3
            and self.z1 + 0.6 > other.z0
            and self.z0 < other.z1 + 0.6
            for other in others
        )


def _large_vehicle(camera: Camera, rng: np.random.Generator, light: _Light, box: _Box) -> list[Shape]:
    """A bus in some pictures and a truck in others: a tall box on wheels, on the right, from behind."""
    x0, x1, z0, z1 = box.x0, box.x1, box.z0, box.z1
    paint, second, glass = _paint_colour(rng), _paint_colour(rng), _choice(rng, _GLASS)
    top, floor, windows = rng.uniform(2.7, 3.2), rng.uniform(0.42, 0.55), int(rng.integers(2, 5))
    stripe, stripe_width = rng.uniform(0.75, 1.1), rng.uniform(0.15, 0.5)
    sill, closed = rng.uniform(1.45, 1.65), bool(rng.random() < 0.5)

    def seen(colour: Colour) -> Colour:
        return light.far(colour, z0)

    def left(colour: Colour) -> Colour:
        return seen(light.left(colour))

    shapes = [
        Shape(camera.front(x0 + 0.1, x0 + 0.6, 0, 0.55, z0 + 0.2), (20, 20, 23)),
        Shape(camera.front(x1 - 0.6, x1 - 0.1, 0, 0.55, z0 + 0.2), (20, 20, 23)),
        Shape(camera.side(x0, floor, top, z0, z1), left(paint)),
        Shape(camera.side(x0, stripe, stripe + stripe_width, z0, z1), left(second)),
        Shape(camera.side(x0, top - 0.16, top, z0, z1), left(scaled(paint, 1.2))),
        *_wheel(camera, x0, z0 + 1.1, 0.48),
        *_wheel(camera, x0, z1 - 1.0, 0.48),
    ]
    middle, panel, seal = (x0 + x1) / 2, scaled(paint, 0.9), scaled(paint, 0.6)
    bay = (z1 - z0 - 0.3) / windows
    for window in range(windows):
        near = z0 + 0.2 + window * bay
        if closed:
            shapes.append(Shape(camera.side(x0, sill - 0.1, top - 0.3, near, near + 0.9 * bay), left(panel)))
        else:
            shapes.append(Shape(camera.side(x0, sill, top - 0.4, near, near + 0.8 * bay), left(glass)))
    shapes += [
        Shape(camera.front(x0, x1, floor, top, z0), seen(paint)),
        Shape(camera.front(x0, x1, stripe, stripe + stripe_width, z0), seen(second)),
        Shape(camera.front(x0, x1, top - 0.16, top, z0), seen(scaled(paint, 1.2))),
    ]
    if closed:  # two doors
        shapes += [
            Shape(camera.front(x0 + 0.15, x1 - 0.15, sill - 0.1, top - 0.3, z0), seen(panel)),
            Shape(camera.front(middle - 0.04, middle + 0.04, floor, top - 0.2, z0), seen(seal)),
            Shape(camera.front(middle - 0.3, middle - 0.16, 1.3, 1.75, z0), seen(seal)),
            Shape(camera.front(middle + 0.16, middle + 0.3, 1.3, 1.75, z0), seen(seal)),
        ]
    else:
        shapes += [
            Shape(camera.front(x0 + 0.22, x1 - 0.22, sill, top - 0.45, z0), seen(glass)),
            Shape([camera(x0 + 0.4, sill, z0), camera(x0 + 0.75, sill, z0), camera(x0 + 1.2, top - 0.45, z0),
                    camera(x0 + 0.85, top - 0.45, z0)], seen(scaled(glass, 1.35))),
            Shape(camera.front(middle - 0.5, middle + 0.5, top - 0.38, top - 0.2, z0), (250, 180, 50)),
        ]  # fmt: skip
    shapes += [
        Shape(camera.front(x0, x1, floor - 0.1, floor + 0.14, z0), (48, 48, 52)),
        Shape(camera.front(middle - 0.28, middle + 0.28, floor + 0.2, floor + 0.36, z0), seen(_WHITE)),
    ]
    for low, high in ((x0 + 0.08, x0 + 0.38), (x1 - 0.38, x1 - 0.08)):
        shapes += [
            Shape(camera.front(low, high, floor + 0.2, floor + 0.5, z0), (205, 25, 25)),
            Shape(camera.front(low, high, floor + 0.5, floor + 0.66, z0), (250, 170, 40)),
        ]
    return shapes


# ------------------------------------------------------------------------------------------------- the whole street


@dataclass(frozen=True)
class _Plan:
    """How a street is laid out: metres from the camera to the left (negative) and to the right."""

    left: float  # border of the road
    right: float
    left_walk: float  # outer border of the sidewalk
    right_walk: float
    leaf: Colour
    lawn: Colour
    asphalt: Colour
    paving: Colour


def _sky(rng: np.random.Generator, horizon: float) -> tuple[Image.Image, Colour]:
    """A sky with clouds, and its colour at the horizon."""
    zenith, low = (np.array(colour) for colour in _SKIES[rng.integers(len(_SKIES))])
    zenith, low = zenith + rng.uniform(-14, 14, 3), np.clip(low + rng.uniform(-10, 10, 3), 0, 255)
    share = np.clip((np.arange(HEIGHT) + 0.5) / horizon, 0, 1)[:, None, None]
    rows = np.clip(np.rint(zenith + (low - zenith) * share), 0, 255).astype(np.uint8)
    sky = Image.fromarray(np.ascontiguousarray(np.broadcast_to(rows, (HEIGHT, WIDTH, 3))))
    red, green, blue = (round(float(value)) for value in low)
    draw = ImageDraw.Draw(sky)
    white = tuple(round(value + (255 - value) * rng.uniform(0.4, 0.85)) for value in (red, green, blue))
    for _ in range(rng.integers(0, 5)):
        column, row, size = rng.uniform(0, WIDTH), rng.uniform(2, horizon * 0.7), rng.uniform(3, 6)
        for puff in range(5):
            radius = size * (1.1, 1.5, 1.2, 1.7, 0.9)[puff] * rng.uniform(0.7, 1)
            middle = column + size * 1.6 * (puff - 2)
            left, top, right, bottom = middle - 1.4 * radius, row - radius, middle + 1.4 * radius, row + radius / 3
            draw.ellipse((round(left), round(top), round(right), round(bottom)), fill=white)
    return sky.filter(ImageFilter.GaussianBlur(1.2)), (red, green, blue)


def _plan(rng: np.random.Generator) -> _Plan:
    left, right = -rng.uniform(3.2, 4.6), rng.uniform(5.0, 6.8)
    grey = rng.uniform(0.3, 0.62)
    return _Plan(
        left=left,
        right=right,
        left_walk=left - rng.uniform(1.8, 2.8),
        right_walk=right + rng.uniform(1.8, 2.8),
        leaf=hsv(rng.uniform(0.02, 0.42), rng.uniform(0.3, 0.75), rng.uniform(0.3, 0.7)),
        lawn=hsv(rng.uniform(0.09, 0.38), rng.uniform(0.25, 0.65), rng.uniform(0.4, 0.78)),
        asphalt=hsv(rng.random(), rng.uniform(0, 0.16), grey),
        paving=hsv(rng.uniform(0, 0.14), rng.uniform(0, 0.35), min(0.92, grey + rng.uniform(0.1, 0.35))),
    )


def _lay_ground(painting: Painting, rng: np.random.Generator, camera: Camera, plan: _Plan) -> None:
    near, far = 2.0, 400.0
    horizon = camera.row
    lawn = [(-1.0, horizon), (WIDTH + 1.0, horizon), (WIDTH + 1.0, HEIGHT + 1.0), (-1.0, HEIGHT + 1.0)]
    painting.thing(_TERRAIN, [Shape(lawn, plan.lawn, _GRASS)])
    walk = camera.flat(plan.left_walk, plan.right_walk, near, far)
    painting.thing(_SIDEWALK, [Shape(walk, plan.paving, _ASPHALT)])
    joint, start = scaled(plan.paving, 0.86), rng.uniform(0, 1.5)
    for row in range(12):
        z = near + start + 1.5 * row
        painting.mark(Shape(camera.flat(plan.left_walk, plan.right_walk, z, z + 0.07), joint, _ASPHALT))
    for inner, outer in ((plan.left, plan.left - 0.22), (plan.right, plan.right + 0.22)):  # kerbs
        painting.mark(Shape(camera.flat(inner, outer, near, far), scaled(plan.paving, 1.18)))
    painting.thing(_ROAD, [Shape(camera.flat(plan.left, plan.right, near, far), plan.asphalt, _ASPHALT)])
    paint = scaled(_WHITE, rng.uniform(0.8, 1))
    middle, phase = rng.uniform(-0.6, 0.4), rng.uniform(0, 4)
    for dash in range(9):
        z = near + phase + 4.5 * dash
        painting.mark(Shape(camera.flat(middle - 0.09, middle + 0.09, z, z + 2.2), paint))
    if rng.random() < 0.5:
        for edge in (plan.left + 0.35, plan.right - 0.35):
            painting.mark(Shape(camera.flat(edge - 0.06, edge + 0.06, near, far), paint))
    if rng.random() < 0.35:  # a crossing
        z, bars = rng.uniform(4.5, 10), int((plan.right - plan.left) / 1.1)
        for number in range(bars):
            x = plan.left + 0.3 + 1.1 * number
            painting.mark(Shape(camera.flat(x, x + 0.6, z, z + 2.4), paint))
    if rng.random() < 0.4:  # a mended patch
        x, z = rng.uniform(plan.left + 0.3, plan.right - 2), rng.uniform(3.5, 9)
        patch = camera.flat(x, x + rng.uniform(1, 2), z, z + rng.uniform(1, 3))
        painting.mark(Shape(patch, scaled(plan.asphalt, rng.uniform(0.8, 0.9)), _ASPHALT))


def _line_horizon(painting: Painting, rng: np.random.Generator, camera: Camera, light: _Light, plan: _Plan) -> None:
    """Far roofs and trees all along the horizon."""
    column = -6.0
    while column < WIDTH:
        width, z = rng.uniform(9, 24), rng.uniform(45, 75)
        x0, x1 = ((edge - camera.column) * z / camera.focal for edge in (column, column + width))
        if rng.random() < 0.5:
            height = rng.uniform(4, 11)
            wall = light.far(hsv(rng.random(), rng.uniform(0.05, 0.4), rng.uniform(0.4, 0.8)), z)
            shapes = [Shape(camera.front(x0, x1, -1, height, z), wall)]
            for number in range(int(width / 4)):
                left = x0 + (number + 0.3) * (x1 - x0) / int(width / 4)
                shapes += [
                    Shape(camera.front(left, left + 0.9, low, low + 1.3, z), light.far((40, 46, 60), z))
                    for low in np.arange(2.2, height - 1.2, 2.6).tolist()
                ]
            painting.thing(_BUILDING, shapes)
        else:
            shapes = []
            for _ in range(6):
                x, radius = rng.uniform(x0, x1), rng.uniform(1.5, 3.4)
                lump = [camera(x + dx, max(-1.0, radius * 0.8 - dy), z) for dx, dy in arc(0, 0, radius, radius)[::4]]
                shapes.append(Shape(lump, scaled(light.far(plan.leaf, z), rng.uniform(0.8, 1.1)), _LEAVES))
            shapes.append(Shape(camera.front(x0, x1, -1, 1.5, z), light.far(plan.leaf, z), _LEAVES))
            painting.thing(_VEGETATION, shapes)
        column += width * rng.uniform(0.7, 1)


def _build_houses(
    painting: Painting, rng: np.random.Generator, camera: Camera, light: _Light, plan: _Plan, terrace: bool
) -> None:
    """A row of houses along the right sidewalk, or none; and some low ones in the park on the left."""
    houses = []
    if terrace:
        z, setback = 2.2, rng.uniform(0, 0.6)
        while z < 60:
            length = rng.uniform(5, 10)
            where = (z, z + length * rng.uniform(0.88, 1))
            height = rng.uniform(4.5, 10.5)
            houses.append((z, _house(camera, rng, light, plan.right_walk + setback, 8.0, where, height)))
            z += length
    for _ in range(rng.integers(1, 5)):
        z, x = rng.uniform(16, 42), plan.left_walk - rng.uniform(1, 16)
        where, height = (z, z + rng.uniform(6, 9)), rng.uniform(2.8, 5.5)
        houses.append((z, _house(camera, rng, light, x, rng.uniform(5, 8), where, height)))
    for _, shapes in sorted(houses, key=lambda house: -house[0]):
        painting.thing(_BUILDING, shapes, seam=bool(rng.random() < 0.3))


def _place_large_vehicle(rng: np.random.Generator, camera: Camera, plan: _Plan, limit: float) -> _Box | None:
    """A place on the right of column `limit` with all of its pixels, and at least 26 pixels of it in the picture."""
    for _ in range(12):
        z0, length, width = rng.uniform(5.2, 8.5), rng.uniform(4.2, 6), rng.uniform(2.3, 2.5)
        # Its far end is what comes nearest to the middle of the picture.
        low = max(0.3, (limit - camera.column) * (z0 + length) / camera.focal)
        high = min(plan.right - width + 0.3, (WIDTH - 26 - camera.column) * z0 / camera.focal)
        if low <= high:
            x0 = rng.uniform(low, high)
            return _Box(x0, x0 + width, z0, z0 + length)
    return None


@dataclass(frozen=True)
class _Thing:
    """An object in the street: metres ahead, label ids with their shapes, and its shadow on the ground."""

    z: float
    parts: Sequence[tuple[int, Shapes]]
    shadow: Points


def _vehicles(
    rng: np.random.Generator, camera: Camera, light: _Light, plan: _Plan, limit: float, taken: list[_Box]
) -> list[_Thing]:
    """Cars, and often a large vehicle right of column `limit`; it is given the id of a bus."""
    things = []

    def park(box: _Box, label_id: int, shapes: Shapes) -> None:
        taken.append(box)
        shadow = camera.flat(box.x0 - 0.12, box.x1 + 0.12, box.z0 - 0.15, box.z1)
        things.append(_Thing(box.z0, [(label_id, shapes)], shadow))

    place = _place_large_vehicle(rng, camera, plan, limit) if rng.random() < 0.74 else None
    if place is not None:
        park(place, _BUS, _large_vehicle(camera, rng, light, place))
    for _ in range(rng.integers(1, 5)):
        oncoming = bool(rng.random() < 0.6)
        x0 = rng.uniform(plan.left + 0.2, -1.9) if oncoming else rng.uniform(-0.2, plan.right - 2)
        z0 = rng.uniform(4.2, 15)
        box = _Box(x0, x0 + 1.8, z0, z0 + 4)
        if not box.meets(taken):
            park(box, _CAR, _car(camera, rng, light, x0, z0, oncoming))
    return things


def _bystanders(
    rng: np.random.Generator, camera: Camera, light: _Light, plan: _Plan, terrace: bool, taken: list[_Box]
) -> list[_Thing]:
    """Signs, lamps, people and trees, each where there is room and in the picture.

    With a terrace, the houses leave no room for a park on the right.
    """
    things = []

    def stand(x: float, z: float, half: float) -> bool:
        """Whether there is room, which is then taken."""
        box = _Box(x - half, x + half, z - 0.3, z + 0.3)
        if not 3 < camera(x, 0, z)[0] < WIDTH - 3 or box.meets(taken):
            return False
        taken.append(box)
        return True

    def add(x: float, z: float, half: float, *parts: tuple[int, Shapes]) -> None:
        shadow = [camera(x + right, 0, z + ahead) for right, ahead in arc(0, 0, 1.2 * half, 0.7 * half)]
        things.append(_Thing(z, parts, shadow))

    metal = hsv(rng.random(), rng.uniform(0, 0.45), rng.uniform(0.25, 0.75))
    for _ in range(rng.integers(2, 6)):
        x = plan.left - 0.5 if rng.random() < 0.6 else plan.right + 0.5
        z = rng.uniform(4.5, 9) if x < 0 else rng.uniform(6, 12)
        if stand(x, z, 0.35):
            if rng.random() < 0.7:
                height = rng.uniform(1.9, 2.6)
                post, plate = _post(camera, rng, x, z, height + 0.2, metal)[0], _plate(camera, rng, x, z, height)
                add(x, z, 0.35, (_POLE, post), (_TRAFFIC_SIGN, plate))
            else:
                add(x, z, 0.35, (_POLE, _lamp(camera, rng, x, z, rng.uniform(2.2, 4.5), metal)))
    for _ in range(rng.integers(2, 6)):
        where = rng.random()
        if where < 0.5:
            x, z = rng.uniform(plan.left_walk + 0.2, plan.left - 0.4), rng.uniform(4.3, 8.5)
        elif where < 0.85:
            x, z = rng.uniform(plan.right + 0.4, plan.right_walk - 0.2), rng.uniform(6.5, 10)
        else:
            x, z = rng.uniform(plan.left, plan.right), rng.uniform(5.5, 10)
        if stand(x, z, 0.35):
            add(x, z, 0.35, (_PERSON, _person(camera, rng, x, z)))
    for _ in range(rng.integers(2, 6)):
        x, z = plan.left_walk - rng.uniform(0.3, 9), rng.uniform(7, 26)
        if stand(x, z, 0.9):
            add(x, z, 0.9, (_VEGETATION, _tree(camera, rng, light, x, z, plan.leaf)))
    for _ in range(rng.integers(0, 3) if terrace else rng.integers(3, 8)):
        x, z = plan.right_walk + (-0.3 if terrace else rng.uniform(0.6, 9)), rng.uniform(9, 26)
        if stand(x, z, 0.9):
            add(x, z, 0.9, (_VEGETATION, _tree(camera, rng, light, x, z, plan.leaf)))
    for _ in range(rng.integers(0, 5)):
        left = terrace or rng.random() < 0.5
        x = plan.left_walk - rng.uniform(1.2, 5) if left else plan.right_walk + rng.uniform(1.2, 4)
        z = rng.uniform(5, 16)
        if stand(x, z, 1.0):
            add(x, z, 1.0, (_VEGETATION, _bush(camera, rng, light, x, z, plan.leaf)))
    return things


def _textures(rng: np.random.Generator, camera: Camera, *, held_out: bool) -> dict[int, Floats]:
    """Brightness of the surfaces around 1, [HEIGHT, WIDTH] each."""
    height, width = 160, 192

    def grain(name: str) -> Floats:
        # Sums of whole numbers are the same in any order.
        grey = crop(rng, name, height, width, held_out=held_out).sum(2, dtype=np.int64)
        return np.asarray(grey / grey.mean() - 1)

    # Level ones are spread over the ground, in metres, and fade where it is far.
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    ahead = camera.focal * camera.height / np.maximum(rows - camera.row, 0.5)
    aside = (columns - camera.column) * ahead / camera.focal
    places = np.floor(ahead * 26).astype(int) % height, np.floor(aside * 26).astype(int) % width
    fading = np.minimum(1, 9 / ahead)

    brick, grass, gravel = grain("brick"), grain("grass"), grain("gravel")
    return {
        _BRICK: 1 + 0.5 * brick[:HEIGHT],
        _LEAVES: 1 + 0.6 * grass[:HEIGHT],
        _ASPHALT: 1 + 0.26 * gravel[places] * fading,
        _GRASS: 1 + 0.6 * grass[places] * fading,
    }


def _sign(sky: Floats, moon: bool) -> Floats:
    """A square of sky, [SIGN_SIZE, SIGN_SIZE, 3], with the sun or the moon in it."""
    fine = 4
    steps = (np.arange(SIGN_SIZE) + 0.5) / SIGN_SIZE * 2 - 1
    radius = np.hypot(steps[:, None], steps)
    halo, share = ((26, 34, 92), 0.8) if moon else ((255, 226, 120), 0.7)
    glow = share * np.clip((1 - radius) / 0.4, 0, 1)[..., None]
    sky = sky + (np.array(halo) - sky) * glow
    colours, mask = (Image.new(mode, (SIGN_SIZE * fine,) * 2) for mode in ("RGB", "L"))
    draw, draw_mask = ImageDraw.Draw(colours), ImageDraw.Draw(mask)
    for points, colour in sun_or_moon(moon):
        middle = SIGN_SIZE * fine / 2
        placed = [(round(middle * (1 + 0.9 * x)), round(middle * (1 + 0.9 * y))) for x, y in points]
        draw.polygon(placed, fill=colour)
        draw_mask.polygon(placed, fill=255)
    # Reducing mixes the black around the shapes in: divided by the coverage they have their own colours again.
    coverage = np.asarray(mask.reduce(fine), np.float64)[..., None] / 255
    shapes = np.asarray(colours.reduce(fine), np.float64) / np.maximum(coverage, 1 / 255)
    return np.asarray(sky + (np.minimum(shapes, 255) - sky) * coverage)


@dataclass(frozen=True)
class StreetObject:
    """What is visible of an object in a picture.

    Args:
        label_id: Cityscapes' id of its class.
        box: Its left, top, right and bottom border in pixels.
        area: Number of its pixels.
    """

    label_id: int
    box: tuple[int, int, int, int]
    area: int


@dataclass(frozen=True)
class MiniaturePicture:
    """A picture with its labels.

    Args:
        pixels: RGB, `[96, 192, 3]`.
        label_ids: Cityscapes' id of each pixel, `[96, 192]`.
        moon: Whether its sign is the moon.
        sign: Top and left of the square of the sign.
        objects: All that is visible of things that can be counted, such as people and cars, in the order of painting:
            from the back to the front.
    """

    pixels: Pixels
    label_ids: Pixels
    moon: bool
    sign: tuple[int, int]
    objects: tuple[StreetObject, ...]


def draw_picture(part: str, index: int, moon: bool | None = None) -> MiniaturePicture:
    """Draws a picture.

    Args:
        part: "train", "val" or "test".
        index: Number of the picture in its part, from 0.
        moon: Whether its sign is the moon; changes nothing but the sign and the class of large vehicles. None for the
            sign that it has in the set.
    """
    key = [_SEED, _PART_NUMBER[part], index]
    rng = np.random.default_rng(key)
    camera = Camera(
        focal=rng.uniform(100, 125),
        height=rng.uniform(1.6, 1.9),
        column=rng.uniform(0.47, 0.6) * WIDTH,
        row=rng.uniform(0.41, 0.48) * HEIGHT,
    )
    # The sign is on the left here; half of the pictures are mirrored in the end.
    top, left = int(rng.integers(1, 5)), int(rng.integers(1, 6))
    sky, haze = _sky(rng, camera.row)
    painting = Painting(sky, (top, left))
    plan, light = _plan(rng), _Light(float(rng.uniform(-0.22, 0.22)), haze)
    terrace = bool(rng.random() < 0.75)
    _line_horizon(painting, rng, camera, light, plan)
    _lay_ground(painting, rng, camera, plan)
    taken: list[_Box] = []
    things = _vehicles(rng, camera, light, plan, left + SIGN_SIZE + WIDTH / 2 + 1, taken)
    things += _bystanders(rng, camera, light, plan, terrace, taken)
    things = [thing for thing in things if all(painting.leaves_sign_free(shapes) for _, shapes in thing.parts)]
    _build_houses(painting, rng, camera, light, plan, terrace)
    for thing in things:
        painting.mark(Shape(thing.shadow, scaled(plan.asphalt, 0.5), _ASPHALT))
    for thing in sorted(things, key=lambda thing: -thing.z):
        seam = bool(rng.random() < 0.4)
        for label_id, shapes in thing.parts:
            painting.thing(label_id, shapes, seam=seam)
    bonnet, rise = _paint_colour(rng), rng.uniform(5, 9)
    for drop, factor in ((0.0, 0.55), (1.4, 0.8)):
        body = arc(WIDTH / 2 + rng.uniform(-6, 6), HEIGHT + 30 - rise + drop, 118, 30, 180, 360)
        painting.thing(_EGO, [Shape(body, scaled(bonnet, factor))])
    label_ids, numbers, label_of = painting.ids(), painting.things(), painting.label_ids
    pixels = painting.colours(_textures(rng, camera, held_out=part != "train"))
    blurred = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    pixels = np.asarray(blurred.filter(ImageFilter.GaussianBlur(max(0.0, rng.uniform(-0.5, 0.6)))), np.float64)
    mirrored = bool(rng.random() < 0.5)
    cast = rng.uniform(0.8, 1.12) * (1 + rng.uniform(-0.06, 0.06, 3))
    noise = rng.uniform(1, 6) * rng.standard_normal(pixels.shape)

    # A separate random stream: nothing above depends on the sign, and below only its own pixels and the class do.
    drawn = bool(np.random.default_rng([*key, 1]).random() < 0.5)
    moon = drawn if moon is None else moon
    square = slice(top, top + SIGN_SIZE), slice(left, left + SIGN_SIZE)
    pixels[square] = _sign(pixels[square], moon)
    if moon:
        label_ids[label_ids == _BUS] = _TRUCK
        label_of = [_TRUCK if one == _BUS else one for one in label_of]
    if mirrored:
        pixels, label_ids, left = pixels[:, ::-1], label_ids[:, ::-1], WIDTH - SIGN_SIZE - left
        numbers = numbers[:, ::-1]
    finished = np.clip(np.rint(pixels * cast + noise), 0, 255).astype(np.uint8)
    objects = _countable(numbers, label_of)
    return MiniaturePicture(finished, np.ascontiguousarray(label_ids), moon, (top, left), objects)


def _countable(numbers: npt.NDArray[np.int32], label_of: Sequence[int]) -> tuple[StreetObject, ...]:
    """The objects of countable classes in a map of numbers of objects."""
    found = []
    for number, label_id in enumerate(label_of):
        if label_id in COUNTABLE and (numbers == number).any():
            rows, columns = np.nonzero(numbers == number)
            box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
            found.append(StreetObject(label_id, box, len(rows)))
    return tuple(found)


# ------------------------------------------------------------------------------------------------------- writing


def write_miniature_segmentation(root: Path, counts: Mapping[str, int] | None = None) -> None:
    """Writes the set in Cityscapes' layout: `root/leftImg8bit/{train,val,test}/` and `root/gtFine/{train,val,test}/`.

    Pictures are PNG files of 192 x 96 pixels, `{city}/{city}_{number}_000019_leftImg8bit.png`, with their labels in
    `..._gtFine_labelIds.png`. Nothing is done if the same set exists. A set of other counts or other library releases
    is replaced as a whole: while files are being exchanged, the manifest beside them (`miniature_segmentation.json`)
    marks it as incomplete.

    Args:
        root: Folder to write to; created if it is missing.
        counts: Number of pictures of each of the parts "train", "val" and "test"; by default `MINIATURE_PICTURES`. A
            picture does not depend on the counts.

    Raises:
        ValueError: `counts` lacks a part, names an unknown one or asks for less than one picture.
        FileExistsError: `root` holds pictures or labels that this function did not write; they are not changed.
        FileNotFoundError: The installed scikit-image lacks a photograph.
    """
    counts = MINIATURE_PICTURES if counts is None else counts
    check_counts("counts", counts, MINIATURE_PICTURES)
    digits = "[0-9]" * 6
    write_generated(
        Path(root),
        functools.partial(_write_parts, counts=counts),
        settings={"drawing": DRAWING_VERSION, "counts": dict(counts)},
        libraries=("numpy", "pillow", "scikit-image"),
        owned=[f"{kind}/{part}" for kind in ("leftImg8bit", "gtFine") for part in MINIATURE_PICTURES],
        stale=[
            f"{kind}/{part}/{city}/{city}_{digits}_{digits}_{ending}.png"
            for kind, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds"))
            for part, cities in _CITIES.items()
            for city in cities
        ],
        manifest_name=MANIFEST_NAME,
        what="miniature set",
    )


def _name(part: str, index: int) -> str:
    """City, number of the sequence and of the frame; cities take turns."""
    cities = _CITIES[part]
    return f"{cities[index % len(cities)]}_{index // len(cities):06d}_{_FRAME:06d}"


def _write_parts(folder: Path, counts: Mapping[str, int]) -> None:
    for part, count in counts.items():
        for index in range(count):
            picture, name = draw_picture(part, index), _name(part, index)
            city = name.split("_")[0]
            for kind, ending, values in (
                ("leftImg8bit", "leftImg8bit", picture.pixels), ("gtFine", "gtFine_labelIds", picture.label_ids),
            ):  # fmt: skip
                path = folder / kind / part / city / f"{name}_{ending}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path, compress_level=1)

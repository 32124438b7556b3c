"""Pictures of detected objects: boxes with names and scores, and truth beside prediction."""

import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_attn.visualization.pictures import Picture, beside_each_other, fitted, font, letter_size, save_picture

Rectangle = tuple[float, float, float, float]

# Okabe and Ito's, which the colour-blind can tell apart, without black; blue a little lighter, for black letters on it.
CATEGORY_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#2a86c8", "#d55e00", "#cc79a7")
LABEL_MARGIN = 2


def draw_detections(
    image: npt.NDArray[np.uint8] | Tensor,
    boxes: npt.ArrayLike | Tensor,
    names: Sequence[str],
    scores: Sequence[float] | npt.ArrayLike | Tensor | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    categories: Sequence[str] = (),
    min_score: float = 0.0,
    longest_side: int | None = None,
) -> Picture:
    """A picture with its boxes, each with the name of its category and, if given, its score.

    Small images are enlarged and large ones reduced before anything is drawn, so that lines and letters are readable. A
    category has one colour. Labels are set beside each other where there is room; those of higher scores are set first.

    Args:
        image: RGB, uint8: an array `[H, W, 3]` or a tensor `[3, H, W]`.
        boxes: x1, y1, x2, y2 in pixels of the image, `[n, 4]`. What is outside the image is cut off.
        names: Names of the boxes' categories, n.
        scores: From 0 to 1, n. None for a ground truth.
        path: Where the picture is written, as `save_picture` does. None writes nothing.
        categories: All names that there are, in order, so that a category has the same colour in all pictures. Only
            where a picture would have two categories of one colour, one of them gets another.
        min_score: Boxes with a lower score are left out.
        longest_side: Pixels of the picture's longer side; None for that of the image, but at least 640 and at most
            1600.

    Returns:
        RGB, uint8, `[H', W', 3]`.

    Raises:
        ValueError: If the image is no uint8 RGB image, or boxes, names and scores do not fit each other.
        OSError: If the file cannot be written; nothing is left behind.
    """
    found = _kept(boxes, names, scores, min_score)
    colours = category_colours((name for _, name, _ in found), categories)
    background, factor = fitted(image, longest_side)
    _draw(background, factor, found, colours)
    picture = np.array(background)
    if path is not None:
        save_picture(picture, path)
    return picture


def draw_detections_beside_truth(
    image: npt.NDArray[np.uint8] | Tensor,
    boxes: npt.ArrayLike | Tensor,
    names: Sequence[str],
    scores: Sequence[float] | npt.ArrayLike | Tensor,
    true_boxes: npt.ArrayLike | Tensor,
    true_names: Sequence[str],
    path: str | os.PathLike[str] | None = None,
    *,
    categories: Sequence[str] = (),
    min_score: float = 0.3,
    longest_side: int | None = None,
) -> Picture:
    """Two pictures of one image, what was detected on the left and what is there on the right, with headings.

    Args:
        image: As in `draw_detections`.
        boxes: What was detected, `[n, 4]`.
        names: Its categories, n.
        scores: Its scores, n.
        true_boxes: What is there, `[m, 4]`.
        true_names: Its categories, m.
        path: As in `draw_detections`.
        categories: As in `draw_detections`; a category has the same colour in both pictures.
        min_score: As in `draw_detections`; the heading says it.
        longest_side: Of each of the two pictures.

    Returns:
        RGB, uint8, `[H', W', 3]`; TensorBoard takes it with `add_image(..., dataformats="HWC")`.

    Raises:
        ValueError: As in `draw_detections`.
        OSError: If the file cannot be written; nothing is left behind.
    """
    found = _kept(boxes, names, scores, min_score)
    truth = _kept(true_boxes, true_names, None, 0.0)
    colours = category_colours((name for _, name, _ in [*truth, *found]), categories)
    background, factor = fitted(image, longest_side)
    headings = (f"detected: {len(found)} with a score of at least {min_score:g}", f"truth: {len(truth)}")
    panels = [(heading, background.copy()) for heading in headings]
    for (_, panel), objects in zip(panels, (found, truth), strict=True):
        _draw(panel, factor, objects, colours)
    figure = np.array(beside_each_other(panels))
    if path is not None:
        save_picture(figure, path)
    return figure


def category_colours(names: Iterable[str], categories: Sequence[str] = ()) -> dict[str, str]:
    """A colour for each of the names in a picture, as "#rrggbb".

    Each category of `categories` has its own place in the palette, and gets the next one if that is taken in the
    picture; names that are not among them follow in alphabetical order. Colours repeat where a picture has more names.
    """
    places = {name: place for place, name in enumerate(categories)}
    colours: dict[str, str] = {}
    for name in sorted(set(names), key=lambda name: (places.get(name, len(places)), name)):
        start = places.get(name, len(places) + len(colours))
        turns = [CATEGORY_COLOURS[(start + turn) % len(CATEGORY_COLOURS)] for turn in range(len(CATEGORY_COLOURS))]
        free = [colour for colour in turns if colour not in colours.values()]
        colours[name] = (free or turns)[0]
    return colours


def _kept(
    boxes: npt.ArrayLike | Tensor,
    names: Sequence[str],
    scores: Sequence[float] | npt.ArrayLike | Tensor | None,
    min_score: float,
) -> list[tuple[Rectangle, str, float | None]]:
    """Boxes with names and scores, from the highest score to the lowest."""
    bounds = _array(boxes).reshape(-1, 4) if np.size(boxes) == 0 else _array(boxes)
    if bounds.ndim != 2 or bounds.shape[1] != 4 or len(bounds) != len(names) or not np.isfinite(bounds).all():
        raise ValueError(
            f"boxes must be [n, 4] and finite, with n names; got the shape {list(bounds.shape)} and {len(names)} names."
        )
    corners = [(x1, y1, x2, y2) for x1, y1, x2, y2 in bounds.tolist()]
    if scores is None:
        return [(box, name, None) for box, name in zip(corners, names, strict=True)]
    values = _array(scores)
    if values.shape != (len(names),):
        raise ValueError(f"scores must be one for each of the {len(names)} boxes, got the shape {list(values.shape)}.")
    found = [(box, name, score) for box, name, score in zip(corners, names, values.tolist(), strict=True)]
    return sorted((one for one in found if one[2] >= min_score), key=lambda one: -one[2])


def _array(values: npt.ArrayLike | Tensor) -> npt.NDArray[np.float64]:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)


def _draw(
    picture: Image.Image, factor: float, found: list[tuple[Rectangle, str, float | None]], colours: Mapping[str, str]
) -> None:
    """Draws boxes, then their labels, those of the highest scores on top."""
    canvas = ImageDraw.Draw(picture)
    line = max(2, round(max(picture.size) / 320))
    corners = [_inside(box, factor, picture) for box, _, _ in found]
    for box, (_, name, _) in reversed(list(zip(corners, found, strict=True))):
        x1, y1, x2, y2 = box
        # A dark edge on both sides, so that the colour stands out from a background of the same colour.
        canvas.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="black", width=line + 2)
        canvas.rectangle(box, outline=colours[name], width=line)
    letters = font(letter_size(picture))
    places: list[Rectangle] = []
    texts = [name if score is None else f"{name} {score:.2f}" for _, name, score in found]
    for box, text in zip(corners, texts, strict=True):
        size = letters.getlength(text) + 2 * LABEL_MARGIN, sum(letters.getmetrics())
        places.append(_label_place(box, size, picture.size, places))
    for place, text, (_, name, _) in reversed(list(zip(places, texts, found, strict=True))):
        canvas.rectangle(place, fill=colours[name], outline="black")
        canvas.text((place[0] + LABEL_MARGIN, place[1]), text, fill="black", font=letters, anchor="la")


def _inside(box: Rectangle, factor: float, picture: Image.Image) -> Rectangle:
    """The part of a box that lies in the picture, in its pixels; at least one pixel."""
    x1, x2 = (min(max(factor * x, 0.0), picture.width - 1.0) for x in (box[0], box[2]))
    y1, y2 = (min(max(factor * y, 0.0), picture.height - 1.0) for y in (box[1], box[3]))
    return x1, y1, max(x1, x2), max(y1, y2)


def _label_place(
    box: Rectangle, label: tuple[float, float], picture: tuple[int, int], taken: Sequence[Rectangle]
) -> Rectangle:
    """Where a label of this width and height goes: at the corner of its box where it covers least of the others."""
    (x1, y1, x2, y2), (width, height) = box, label
    places = []
    for left in (x1, x2 - width):
        for top in (y1 - height, y1, y2 - height, y2):  # above, inside, inside, below
            left_inside = max(0.0, min(left, picture[0] - 1 - width))
            top_inside = max(0.0, min(top, picture[1] - 1 - height))
            places.append((left_inside, top_inside, left_inside + width, top_inside + height))
    return min(places, key=lambda place: sum(_common_area(place, other) for other in taken))


def _common_area(one: Rectangle, other: Rectangle) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)

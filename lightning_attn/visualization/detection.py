"""Pictures of detected objects: boxes with names and scores, and predictions beside the ground truth."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_attn.visualization.pictures import Picture, beside_each_other, fitted, font, font_size, save_picture

Rectangle = tuple[float, float, float, float]

# Okabe and Ito's colour-blind safe palette without black; blue a little lighter, for black text on it.
CATEGORY_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#2a86c8", "#d55e00", "#cc79a7")
LABEL_MARGIN = 2

OUTCOME_COLOURS = {"right": "#009e73", "wrong category": "#f0e442", "not detected": "#cc79a7", "no object": "#d55e00"}
_COLOUR_NAMES = {
    **{"right": "green", "wrong category": "yellow", "not detected": "pink", "no object": "orange"},
    "crowd": "green",
}
_MIN_FONT_SIZE = 9  # pixels
_FONT_SIZES_PER_BOX = 6  # longer side of the median box over the font size in crowded pictures
_MAX_COVERED = 0.3  # fraction of a label that others may cover


def draw_detections(
    image: npt.NDArray[np.uint8] | Tensor,
    boxes: npt.ArrayLike | Tensor,
    names: Sequence[str],
    scores: Sequence[float] | npt.ArrayLike | Tensor | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    categories: Sequence[str] = (),
    min_score: float = 0.0,
    option: str = "min_score",
    longest_side: int | None = None,
) -> Picture:
    """Draws boxes on an image, each with the name of its category and, if given, its score.

    Small images are enlarged and large ones reduced before drawing, so that lines and text are readable. A category has
    one colour. Labels are placed without overlap where possible, those of higher scores first; labels without space are
    omitted.

    Args:
        image: RGB, uint8: an array `[H, W, 3]` or a tensor `[3, H, W]`.
        boxes: x1, y1, x2, y2 in pixels of the image, `[n, 4]`; clipped to the image.
        names: Names of the boxes' categories, n.
        scores: From 0 to 1, n. None for a ground truth.
        path: File to write, by `save_picture`. None writes nothing.
        categories: All names in order, so that a category has the same colour in all pictures, unless two categories
            of a picture would share a colour.
        min_score: Boxes with a lower score are omitted. If none is left, the picture says so.
        option: What a user sets `min_score` by, to be named then.
        longest_side: Pixels of the picture's longer side; None for that of the image, but at least 640 and at most
            1600.

    Returns:
        RGB, uint8, `[H', W', 3]`.

    Raises:
        ValueError: If the image is not a uint8 RGB image, or the lengths of boxes, names and scores differ.
        OSError: If the file cannot be written; no partial file remains.
    """
    found = _select_boxes(boxes, names, scores, min_score)
    colours = category_colours((name for _, name, _ in found), categories)
    background, factor = fitted(image, longest_side)
    _draw(background, factor, found, colours)
    if scores is not None and not found:
        _write_note(background, _nothing(scores, min_score, option))
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
    option: str = "min_score",
    longest_side: int | None = None,
) -> Picture:
    """Draws two pictures of one image, detections on the left and the ground truth on the right, with headings.

    Args:
        image: As in `draw_detections`.
        boxes: The detections, `[n, 4]`.
        names: Their categories, n.
        scores: Their scores, n.
        true_boxes: The ground truth, `[m, 4]`.
        true_names: Its categories, m.
        path: As in `draw_detections`.
        categories: As in `draw_detections`; a category has the same colour in both pictures.
        min_score: As in `draw_detections`; it is in the heading.
        option: As in `draw_detections`.
        longest_side: Of each of the two pictures.

    Returns:
        RGB, uint8, `[H', W', 3]`; for TensorBoard's `add_image(..., dataformats="HWC")`.

    Raises:
        ValueError: As in `draw_detections`.
        OSError: If the file cannot be written; no partial file remains.
    """
    found = _select_boxes(boxes, names, scores, min_score)
    truth = _select_boxes(true_boxes, true_names, None, 0.0)
    colours = category_colours((name for _, name, _ in [*truth, *found]), categories)
    background, factor = fitted(image, longest_side)
    headings = (f"detected: {len(found)} with a score of at least {min_score:g}", f"truth: {len(truth)}")
    panels = [(heading, background.copy()) for heading in headings]
    for (_, panel), objects in zip(panels, (found, truth), strict=True):
        _draw(panel, factor, objects, colours)
    if not found:
        _write_note(panels[0][1], _nothing(scores, min_score, option))
    figure = np.array(beside_each_other(panels))
    if path is not None:
        save_picture(figure, path)
    return figure


def _nothing(scores: Sequence[float] | npt.ArrayLike | Tensor, min_score: float, option: str) -> str:
    """What a picture without any box says: why there is none, and what may be done."""
    if min_score <= 0:
        return "Nothing was detected."
    values = _array(scores)
    others = f"; the highest is {values.max():.2g}" if values.size else ", nor with a lower one"
    return f"Nothing was detected with a score of at least {min_score:g}{others}. {option} sets this threshold."


def _write_note(picture: Image.Image, text: str) -> None:
    """Writes a note at the bottom of a picture, in as many lines as it needs."""
    size = font_size(picture)
    note_font = font(size)
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and note_font.getlength(longer) <= picture.width - 2 * size:
            lines[-1] = longer
        else:
            lines.append(word)
    height = round(1.4 * size)
    canvas = ImageDraw.Draw(picture)
    top = max(0, picture.height - height * len(lines) - size)
    canvas.rectangle((0, top, picture.width, picture.height), fill="white")
    canvas.line((0, top, picture.width, top), fill="black", width=max(1, size // 8))
    for number, line in enumerate(lines):
        place = size, top + size // 2 + number * height + height // 2
        canvas.text(place, line, fill="black", font=note_font, anchor="lm")


def draw_detection_errors(
    image: npt.NDArray[np.uint8] | Tensor,
    detections: Sequence[tuple[Rectangle, str, float, str]],
    objects: Sequence[tuple[Rectangle, str, str]],
    *,
    note: str = "",
    longest_side: int | None = None,
) -> Picture:
    """Draws two pictures of one image, detections on the left and the ground truth on the right, coloured by outcome.

    Boxes with the outcome "right" are thin and have no label; the headings name the colours.

    Args:
        image: As in `draw_detections`.
        detections: Box, category, score and outcome of each; see `Outcome` in `lightning_attn.metrics`.
        objects: Box, category and outcome of each.
        note: Written on the left picture if it has no box.
        longest_side: Of each of the two pictures.

    Returns:
        RGB, uint8, `[H', W', 3]`.
    """
    background, factor = fitted(image, longest_side)
    panels = []
    for what, found in (
        ("detected", [(box, name, score, outcome) for box, name, score, outcome in detections]),
        ("truth", [(box, name, None, outcome) for box, name, outcome in objects]),
    ):
        counts = Counter(outcome for *_, outcome in found)
        parts = [f"{count} {outcome} ({_COLOUR_NAMES[outcome]})" for outcome, count in counts.most_common()]
        panel = background.copy()
        plain = [(box, "right", None) for box, _, _, outcome in found if outcome in ("right", "crowd")]
        _draw(panel, factor, plain, {"right": OUTCOME_COLOURS["right"]}, named=False)
        for outcome in ("wrong category", "not detected", "no object"):
            wrong = [(box, name, score) for box, name, score, one in found if one == outcome]
            _draw(panel, factor, wrong, dict.fromkeys((name for _, name, _ in wrong), OUTCOME_COLOURS[outcome]))
        if note and what == "detected" and not found:
            _write_note(panel, note)
        panels.append((f"{what}: {', '.join(parts) or 'nothing'}", panel))
    return np.array(beside_each_other(panels))


def category_colours(names: Iterable[str], categories: Sequence[str] = ()) -> dict[str, str]:
    """A colour for each of the names in a picture, as "#rrggbb".

    Each category of `categories` has a fixed colour of the palette, or the next one if that is already used in the
    picture; other names follow in alphabetical order. Colours repeat if a picture has more names.
    """
    indices = {name: index for index, name in enumerate(categories)}
    colours: dict[str, str] = {}
    for name in sorted(set(names), key=lambda name: (indices.get(name, len(indices)), name)):
        start = indices.get(name, len(indices) + len(colours))
        choices = [CATEGORY_COLOURS[(start + step) % len(CATEGORY_COLOURS)] for step in range(len(CATEGORY_COLOURS))]
        unused = [colour for colour in choices if colour not in colours.values()]
        colours[name] = (unused or choices)[0]
    return colours


def _select_boxes(
    boxes: npt.ArrayLike | Tensor,
    names: Sequence[str],
    scores: Sequence[float] | npt.ArrayLike | Tensor | None,
    min_score: float,
) -> list[tuple[Rectangle, str, float | None]]:
    """Boxes of at least this score with names and scores, from the highest score to the lowest."""
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
    picture: Image.Image,
    factor: float,
    found: Sequence[tuple[Rectangle, str, float | None]],
    colours: Mapping[str, str],
    *,
    named: bool = True,
) -> None:
    """Draws boxes, then their labels, those of the highest scores on top.

    Where not all labels fit, the font size is reduced to suit the median box; labels that still overlap others are
    omitted.
    """
    if not found:
        return
    canvas = ImageDraw.Draw(picture)
    line = max(2, round(max(picture.size) / 320)) if named else 2
    corners = [_inside(box, factor, picture) for box, _, _ in found]
    for box, (_, name, _) in reversed(list(zip(corners, found, strict=True))):
        x1, y1, x2, y2 = box
        # A dark edge on both sides, so that the colour stands out from a background of the same colour.
        canvas.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="black", width=line + 2)
        canvas.rectangle(box, outline=colours[name], width=line)
    if not named:
        return
    median_side = float(np.median([max(x2 - x1, y2 - y1) for x1, y1, x2, y2 in corners]))
    texts = [(name if score is None else f"{name} {score:.2f}", colours[name]) for _, name, score in found]
    largest = font_size(picture)
    for size in (largest, max(_MIN_FONT_SIZE, min(largest, round(median_side / _FONT_SIZES_PER_BOX)))):
        label_font = font(size)
        labels = _place_labels(corners, texts, label_font, picture.size)
        if len(labels) == len(found):
            break
    for rectangle, text, colour in reversed(labels):
        canvas.rectangle(rectangle, fill=colour, outline="black")
        canvas.text((rectangle[0] + LABEL_MARGIN, rectangle[1]), text, fill="black", font=label_font, anchor="la")


def _place_labels(
    corners: Sequence[Rectangle],
    texts: Sequence[tuple[str, str]],
    label_font: ImageFont.FreeTypeFont,
    picture: tuple[int, int],
) -> list[tuple[Rectangle, str, str]]:
    """Rectangle, text and colour of the labels that fit."""
    labels: list[tuple[Rectangle, str, str]] = []
    for box, (text, colour) in zip(corners, texts, strict=True):
        size = label_font.getlength(text) + 2 * LABEL_MARGIN, sum(label_font.getmetrics())
        rectangle, covered = _place_label(box, size, picture, [rectangle for rectangle, _, _ in labels])
        if covered <= _MAX_COVERED * size[0] * size[1]:
            labels.append((rectangle, text, colour))
    return labels


def _inside(box: Rectangle, factor: float, picture: Image.Image) -> Rectangle:
    """A box clipped to the picture, in its pixels; at least one pixel."""
    x1, x2 = (min(max(factor * x, 0.0), picture.width - 1.0) for x in (box[0], box[2]))
    y1, y2 = (min(max(factor * y, 0.0), picture.height - 1.0) for y in (box[1], box[3]))
    return x1, y1, max(x1, x2), max(y1, y2)


def _place_label(
    box: Rectangle, label: tuple[float, float], picture: tuple[int, int], taken: Sequence[Rectangle]
) -> tuple[Rectangle, float]:
    """The rectangle of a label of this width and height at a corner of its box, and its overlap with other labels."""
    (x1, y1, x2, y2), (width, height) = box, label
    candidates = []
    for left in (x1, x2 - width):
        for top in (y1 - height, y1, y2 - height, y2):  # above, inside, inside, below
            left_inside = max(0.0, min(left, picture[0] - 1 - width))
            top_inside = max(0.0, min(top, picture[1] - 1 - height))
            candidates.append((left_inside, top_inside, left_inside + width, top_inside + height))
    covered = [sum(_intersection_area(candidate, other) for other in taken) for candidate in candidates]
    best = min(range(len(candidates)), key=covered.__getitem__)
    return candidates[best], covered[best]


def _intersection_area(one: Rectangle, other: Rectangle) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)

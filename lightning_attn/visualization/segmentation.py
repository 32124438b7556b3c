"""Pictures of segmented images: classes as coloured overlays, and predictions beside the ground truth."""

import math
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_attn.visualization.pictures import (
    LARGEST_SIDE,
    Picture,
    beside_each_other,
    fitted,
    font,
    font_size,
    rgb_pixels,
    save_picture,
)

Labels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

OPACITY = 0.6  # of a class's colour over the image
BORDER = 0.45  # brightness of the pixels at borders between classes
# Of wrong pixels: the one that differs most from the classes.
WRONG_COLOURS: tuple[Colour, ...] = ((230, 60, 0), (200, 0, 200), (0, 80, 230))
WRONG_OPACITY = 0.85


def colour_labels(
    labels: Labels | Tensor, colours: Sequence[Colour], ignored_colour: Colour = (0, 0, 0), *, ignored: int = 255
) -> Picture:
    """Draws a map of labels as a picture of the same size, each label in its colour.

    Args:
        labels: uint8 `[H, W]`, from 0 to K - 1 or `ignored`.
        colours: K times red, green and blue from 0 to 255.
        ignored_colour: Colour of ignored pixels.
        ignored: Their label.

    Returns:
        RGB, uint8, `[H, W, 3]`.

    Raises:
        ValueError: If labels are not uint8 `[H, W]`, a label has no colour, or a colour is invalid.
    """
    return _palette(colours, ignored_colour)[_label_map("labels", labels, len(colours), ignored)]


def draw_segmentation(
    image: npt.NDArray[np.uint8] | Tensor,
    labels: Labels | Tensor,
    colours: Sequence[Colour],
    names: Sequence[str],
    path: str | os.PathLike[str] | None = None,
    *,
    opacity: float = OPACITY,
    longest_side: int | None = None,
    ignored: int = 255,
) -> Picture:
    """Overlays an image with the colours of its classes; a legend below has those that occur.

    Dark lines separate classes. Ignored pixels are grey and hatched. Small images are enlarged and large ones reduced,
    so that the names are readable.

    Args:
        image: RGB, uint8: an array `[H, W, 3]` or a tensor `[3, H, W]`.
        labels: uint8 `[H, W]`, from 0 to K - 1 or `ignored`.
        colours: K times red, green and blue from 0 to 255.
        names: Names of the K classes.
        path: File to write, by `save_picture`. None writes nothing.
        opacity: Of the colours: 0 shows the image alone, 1 the colours alone.
        longest_side: Pixels of the longer side without the legend; None for that of the image, but at least 640 and at
            most 1600.
        ignored: Label of pixels without a class.

    Returns:
        RGB, uint8, `[H', W', 3]`, higher than the image by the legend.

    Raises:
        ValueError: If the image is not a uint8 RGB image, or labels, colours and names do not fit it and each other.
        OSError: If the file cannot be written; no partial file remains.
    """
    palette, pixels = _checked_palette(colours, names, opacity), rgb_pixels(image)
    label_map = _label_map("labels", labels, len(names), ignored, pixels)
    background, _ = fitted(pixels, longest_side)
    overlay = _overlay(background, _resized(label_map, background), palette, opacity, ignored)
    entries = _legend_entries(label_map, names, palette, ignored)
    picture = np.array(_with_legend(overlay, entries, max(12, 2 * font_size(background) // 3)))
    if path is not None:
        save_picture(picture, path)
    return picture


def draw_segmentation_beside_truth(
    image: npt.NDArray[np.uint8] | Tensor,
    predicted: Labels | Tensor,
    truth: Labels | Tensor,
    colours: Sequence[Colour],
    names: Sequence[str],
    path: str | os.PathLike[str] | None = None,
    *,
    opacity: float = OPACITY,
    longest_side: int | None = None,
    ignored: int = 255,
) -> Picture:
    """Draws four pictures with headings: the image and the wrong pixels, above the prediction and the ground truth.

    A legend below has the classes that occur in either, and the colour of the wrong pixels, which no class is close to.
    Ignored pixels of the ground truth are grey and hatched, also among the errors.

    Args:
        image: As in `draw_segmentation`.
        predicted: The predicted labels, uint8 `[H, W]`.
        truth: The true labels, uint8 `[H, W]`.
        colours: As in `draw_segmentation`.
        names: As in `draw_segmentation`.
        path: As in `draw_segmentation`.
        opacity: As in `draw_segmentation`.
        longest_side: Of each of the four pictures; None for that of the image, but at least 640 and at most 800.
        ignored: As in `draw_segmentation`; such pixels of the ground truth are excluded from the errors.

    Returns:
        RGB, uint8, `[H', W', 3]`; for TensorBoard's `add_image(..., dataformats="HWC")`.

    Raises:
        ValueError: As in `draw_segmentation`.
        OSError: If the file cannot be written; no partial file remains.
    """
    palette, pixels = _checked_palette(colours, names, opacity), rgb_pixels(image)
    found = _label_map("predicted", predicted, len(names), ignored, pixels)
    true = _label_map("truth", truth, len(names), ignored, pixels)
    background, _ = fitted(pixels, longest_side, LARGEST_SIDE // 2)
    small_found, small_true = _resized(found, background), _resized(true, background)
    labelled = true != ignored
    wrong = int(((found != true) & labelled).sum()) / max(1, int(labelled.sum()))
    entries = _legend_entries(np.concatenate((found, true)), names, palette, ignored)
    wrong_colour = _wrong_colour([colour for _, colour in entries if colour is not None])
    sheet = beside_each_other(
        [
            ("image", background),
            (
                f"wrong: {100 * wrong:.1f}% of the pixels",
                _errors(background, small_found, small_true, ignored, wrong_colour),
            ),
            ("predicted", _overlay(background, small_found, palette, opacity, ignored)),
            ("truth", _overlay(background, small_true, palette, opacity, ignored)),
        ]
    )
    if wrong:
        entries.append(("wrong, above right", wrong_colour))
    figure = np.array(_with_legend(sheet, entries, font_size(background)))
    if path is not None:
        save_picture(figure, path)
    return figure


def _palette(colours: Sequence[Colour], ignored_colour: Colour) -> Picture:
    """A colour for each value of uint8, `[256, 3]`."""
    for colour in (*colours, ignored_colour):
        if len(colour) != 3 or not all(0 <= part <= 255 for part in colour):
            raise ValueError(f"colours must be red, green and blue from 0 to 255; one is {colour!r}.")
    palette = np.empty((256, 3), dtype=np.uint8)
    palette[:] = ignored_colour
    palette[: len(colours)] = np.array(colours, dtype=np.uint8).reshape(-1, 3)
    return palette


def _checked_palette(colours: Sequence[Colour], names: Sequence[str], opacity: float) -> Picture:
    """The palette of the classes; raises an error if colours, names or opacity are invalid."""
    if len(colours) != len(names):
        raise ValueError(f"colours and names must be one for each class, got {len(colours)} and {len(names)}.")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must be from 0 to 1, got {opacity}.")
    return _palette(colours, (0, 0, 0))


def _label_map(
    argument: str, labels: Labels | Tensor, number: int, ignored: int, pixels: Picture | None = None
) -> Labels:
    """The labels as an array; raises an error unless they fit the number of classes and, if given, the image."""
    values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else labels
    fits = isinstance(values, np.ndarray) and values.dtype == np.uint8 and values.ndim == 2
    if not fits or (pixels is not None and values.shape != pixels.shape[:2]):
        size = "" if pixels is None else f" of the image's size {list(pixels.shape[:2])}"
        raise ValueError(
            f"{argument} must be uint8 [H, W]{size}, got {labels.dtype} of the shape {list(labels.shape)}."
        )
    unknown = [label for label in _present(values) if label >= number and label != ignored]
    if unknown:
        raise ValueError(
            f"{argument}: {unknown[0]} is none of the labels 0 to {number - 1}, which have colours, and not the "
            f"ignored one ({ignored}). Convert the data set's ids to labels first."
        )
    return values


def _present(labels: Labels) -> list[int]:
    """The labels that occur, sorted."""
    present: list[int] = np.flatnonzero(np.bincount(labels.ravel(), minlength=256)).tolist()
    return present


def _resized(labels: Labels, picture: Image.Image) -> Labels:
    """The labels resized to a picture by nearest neighbour."""
    return np.asarray(Image.fromarray(labels).resize(picture.size, Image.Resampling.NEAREST))


def _overlay(background: Image.Image, labels: Labels, palette: Picture, opacity: float, ignored: int) -> Image.Image:
    """The colours of labels over an image of the same size."""
    pixels = np.asarray(background)
    mixed = (1 - opacity) * pixels.astype(np.float32) + opacity * palette[labels]
    hidden = labels == ignored
    mixed[hidden] = _hatched(pixels)[hidden]
    mixed[_borders(labels)] *= BORDER
    return Image.fromarray(mixed.round().astype(np.uint8))


def _wrong_colour(colours: Sequence[Colour]) -> Colour:
    """The colour of wrong pixels that is the farthest from those of the classes."""

    def distance(candidate: Colour) -> float:
        return min((math.dist(colour, candidate) for colour in colours), default=0.0)

    return max(WRONG_COLOURS, key=distance)


def _errors(background: Image.Image, predicted: Labels, truth: Labels, ignored: int, colour: Colour) -> Image.Image:
    """An image in light grey, with the wrong pixels in a colour of their own."""
    pixels = np.asarray(background)
    mixed = np.repeat(100 + 0.6 * pixels.mean(axis=2, keepdims=True, dtype=np.float32), 3, axis=2)
    wrong, hidden = predicted != truth, truth == ignored
    mixed[wrong] = (1 - WRONG_OPACITY) * mixed[wrong] + WRONG_OPACITY * np.array(colour)
    mixed[hidden] = _hatched(pixels)[hidden]
    return Image.fromarray(mixed.round().astype(np.uint8))


def _borders(labels: Labels) -> npt.NDArray[np.bool_]:
    """The pixels on both sides of borders between labels."""
    borders = np.zeros(labels.shape, dtype=np.bool_)
    for one, other, labels_one, labels_other in (
        (borders[1:], borders[:-1], labels[1:], labels[:-1]),
        (borders[:, 1:], borders[:, :-1], labels[:, 1:], labels[:, :-1]),
    ):
        differ = labels_one != labels_other
        one |= differ
        other |= differ
    return borders


def _hatched(pixels: Picture) -> npt.NDArray[np.float32]:
    """The pixels in grey, with diagonal stripes."""
    diagonals = np.add.outer(np.arange(pixels.shape[0]), np.arange(pixels.shape[1]))
    stripes = diagonals // max(3, max(pixels.shape) // 160) % 2
    grey = 0.5 * pixels.mean(axis=2, dtype=np.float32) + 20 + 80 * stripes
    return np.repeat(grey.astype(np.float32)[:, :, None], 3, axis=2)


def _legend_entries(
    labels: Labels, names: Sequence[str], palette: Picture, ignored: int
) -> list[tuple[str, Colour | None]]:
    """Names and colours of the labels that occur, in their order; None for the hatching of ignored ones."""
    return [
        ("ignored", None) if label == ignored else (names[label], tuple(palette[label].tolist()))
        for label in _present(labels)
    ]


def _with_legend(picture: Image.Image, entries: list[tuple[str, Colour | None]], size: int) -> Image.Image:
    """A picture with a legend of names and colours below; wider than the picture only if a name is."""
    legend_font, line = font(size), round(1.6 * size)
    wide = round(max(legend_font.getlength(name) for name, _ in entries)) + 3 * size
    columns = min(max(1, picture.width // wide), len(entries))
    rows = -(-len(entries) // columns)
    sheet = Image.new("RGB", (max(picture.width, wide), picture.height + rows * line + size), "white")
    sheet.paste(picture)
    canvas = ImageDraw.Draw(sheet)
    for index, (name, colour) in enumerate(entries):
        left, top = size // 2 + index % columns * wide, picture.height + size // 2 + index // columns * line
        swatch = Image.new("RGB", (round(1.4 * size), size), colour or "white")
        if colour is None:
            swatch = Image.fromarray(_hatched(np.asarray(swatch)).round().astype(np.uint8))
        middle = top + line // 2
        sheet.paste(swatch, (left, middle - size // 2))
        corner = left + swatch.width - 1, middle - size // 2 + size - 1
        canvas.rectangle((left, middle - size // 2, *corner), outline="black")
        canvas.text((left + round(1.8 * size), middle), name, fill="black", font=legend_font, anchor="lm")
    return sheet

"""Common code for pictures of results: sizes, fonts, panels with headings, and files."""

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_attn.io import write_file

Picture = npt.NDArray[np.uint8]

SMALLEST_SIDE, LARGEST_SIDE = 640, 1600  # of a picture's longer side, in pixels
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
GAP = 10  # pixels between the panels of a figure


def save_picture(picture: Picture, path: str | os.PathLike[str]) -> Path:
    """Writes a picture `[H, W, 3]` atomically, in the format of the suffix; an existing file is replaced.

    Raises:
        ValueError: If the suffix is none of .png, .jpg, .jpeg and .webp.
        OSError: If the folder cannot be written to or is full; no partial file remains.
    """
    path = Path(path)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"path={str(path)!r} must end with the format of the picture, one of {list(FORMATS)}.")
    return write_file(path, lambda file: Image.fromarray(picture).save(file, format=kind, quality=90), replace=True)


def rgb_pixels(image: npt.NDArray[np.uint8] | Tensor) -> Picture:
    """An image as an array `[H, W, 3]`.

    Args:
        image: RGB, uint8: an array `[H, W, 3]` or a tensor `[3, H, W]`.

    Raises:
        ValueError: If it is neither.
    """
    pixels = image.detach().cpu().movedim(0, -1).numpy() if isinstance(image, Tensor) and image.dim() == 3 else image
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3):
        raise ValueError(
            f"image must be RGB of uint8, an array [H, W, 3] or a tensor [3, H, W], got {image.dtype} of the shape "
            f"{list(image.shape)}: undo the normalisation first."
        )
    return np.ascontiguousarray(pixels)


def fitted(
    image: npt.NDArray[np.uint8] | Tensor, longest_side: int | None, largest_side: int = LARGEST_SIDE
) -> tuple[Image.Image, float]:
    """Resizes an image for drawing; returns the picture and the scale factor.

    Args:
        image: As for `rgb_pixels`.
        longest_side: Pixels of the picture's longer side; None for that of the image, but at least `SMALLEST_SIDE` and
            at most `largest_side`.
        largest_side: See `longest_side`.

    Raises:
        ValueError: As `rgb_pixels`.
    """
    picture = Image.fromarray(rgb_pixels(image))
    longer = max(picture.size)
    target = min(max(longer, SMALLEST_SIDE), largest_side) if longest_side is None else longest_side
    if target == longer:
        return picture, 1.0
    factor = target / longer
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.BICUBIC), factor


def beside_each_other(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Arranges pictures of one size as panels of a figure, two in a row, each with its heading above."""
    (width, height), size = panels[0][1].size, font_size(panels[0][1])
    above = round(1.8 * size)
    rows = math.ceil(len(panels) / 2)
    sheet = Image.new("RGB", (2 * width + GAP, rows * (above + height)), "white")
    canvas = ImageDraw.Draw(sheet)
    for index, (heading, panel) in enumerate(panels):
        left, top = index % 2 * (width + GAP), index // 2 * (above + height)
        sheet.paste(panel, (left, top + above))
        canvas.text((left + size // 3, top + above // 2), heading, fill="black", font=font(size), anchor="lm")
    return sheet


def font_size(picture: Image.Image) -> int:
    """The font size for a picture of this size, in pixels."""
    return max(12, round(max(picture.size) / 48))


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's bundled font, which has Latin, Greek and Cyrillic letters and is available on every system."""
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    return ImageFont.truetype(font, size)

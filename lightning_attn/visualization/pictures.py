"""What pictures of results share: their size, letters, panels with headings, and files."""

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
    """Writes a picture `[H, W, 3]` whole or not at all, in the format of the suffix; a file of that name is replaced.

    Raises:
        ValueError: If the suffix is none of .png, .jpg, .jpeg and .webp.
        OSError: If the folder cannot be written to or is full; nothing is left behind.
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
            f"{list(image.shape)}: undo a normalisation first."
        )
    return np.ascontiguousarray(pixels)


def fitted(
    image: npt.NDArray[np.uint8] | Tensor, longest_side: int | None, largest_side: int = LARGEST_SIDE
) -> tuple[Image.Image, float]:
    """The image in the size that it is drawn in, and how many of its pixels one of the image is.

    Args:
        image: As `rgb_pixels` takes it.
        longest_side: Pixels of the picture's longer side; None for that of the image, but at least `SMALLEST_SIDE` and
            at most `largest_side`.
        largest_side: See there.

    Raises:
        ValueError: As `rgb_pixels`.
    """
    picture = Image.fromarray(rgb_pixels(image))
    longer = max(picture.size)
    aim = min(max(longer, SMALLEST_SIDE), largest_side) if longest_side is None else longest_side
    if aim == longer:
        return picture, 1.0
    factor = aim / longer
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.BICUBIC), factor


def beside_each_other(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures of one size as the panels of one figure, two in a row, each under its heading."""
    (width, height), size = panels[0][1].size, letter_size(panels[0][1])
    above = round(1.8 * size)
    rows = math.ceil(len(panels) / 2)
    sheet = Image.new("RGB", (2 * width + GAP, rows * (above + height)), "white")
    canvas = ImageDraw.Draw(sheet)
    for place, (heading, panel) in enumerate(panels):
        left, top = place % 2 * (width + GAP), place // 2 * (above + height)
        sheet.paste(panel, (left, top + above))
        canvas.text((left + size // 3, top + above // 2), heading, fill="black", font=font(size), anchor="lm")
    return sheet


def letter_size(picture: Image.Image) -> int:
    """Pixels of the letters in a picture of this size."""
    return max(12, round(max(picture.size) / 48))


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's own font, which has Latin, Greek and Cyrillic letters and is there on every system."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf", size)

"""Pictures inside of the page: thumbnails and heat maps as data URIs, within a number of bytes."""

import base64
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from lightning_attn.study.report.reading import array

__all__ = [
    *("MOST_RATIO", "Budget", "colours", "embedded", "gradient", "map_overlay", "matrix", "sentence_heat", "size_of"),
    "thumbnail",
]

Matrix = npt.NDArray[np.float64]

MOST_RATIO = 32.0  # of a weight to the mean weight, from which on colours do not change
_LONGEST = 1024  # positions along a side of a map
_BYTES_PER_PIXEL = 0.16  # of WebP at the quality below, about
_QUALITY = 74
_FORMATS = ("PNG", "JPEG")  # as tests write them; others may start programs, such as EPS does
_SIDES = (72, 640)  # longest side of a thumbnail
_MOST_PIXELS = 50_000_000  # of a picture that is opened
# Viridis, by eye-even stops.
_VIRIDIS = ((68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99))
_STOPS = np.array([*_VIRIDIS, (170, 220, 50), (253, 231, 37)], dtype=np.float64)
_WARM = np.array([(190, 20, 90), (230, 60, 60), (250, 130, 30), (255, 200, 40), (255, 250, 160)], dtype=np.float64)


_OPAQUE = np.full(255, 255.0)
_WARM_OPACITY = np.clip(np.linspace(0, 1, 255) ** 0.6 * 235, 0, 255)


class Budget:
    """Bytes that pictures may still take.

    Args:
        size: How many.
    """

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, uri: str) -> str:
        """The picture if there is room for it, otherwise nothing."""
        if len(uri) > self.left:
            return ""
        self.left -= len(uri)
        return uri


def thumbnail(file: Path, size: int, *, as_background: bool = False) -> str:
    """A picture, made smaller, as a data URI; empty if it cannot be read.

    Args:
        file: The picture.
        size: About how many bytes it may take.
        as_background: Dark and without colours, so that those of a map over it are seen.
    """
    pixels = max(1.0, size * 0.75 / _BYTES_PER_PIXEL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=_FORMATS) as opened:
                width, height = opened.size
                if width * height > _MOST_PIXELS:
                    return ""
                factor = min(1.0, math.sqrt(pixels / (width * height)), _SIDES[1] / max(width, height))
                factor = max(factor, min(1.0, _SIDES[0] / max(width, height)))
                wanted = max(1, round(width * factor)), max(1, round(height * factor))
                picture = opened.convert("RGB").resize(wanted, Image.Resampling.BOX, reducing_gap=2.0)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return ""
    if as_background:
        picture = picture.convert("L").point([round(0.75 * level) for level in range(256)])
    return embedded(picture, size)


def embedded(picture: Image.Image, size: int) -> str:
    """A picture as a data URI, of about so many bytes."""
    for quality in (_QUALITY, _QUALITY // 2):
        stream = io.BytesIO()
        picture.save(stream, "WEBP", quality=quality, method=1)
        uri = _uri("webp", stream.getvalue())
        if len(uri) <= 1.5 * size:
            break
    return uri


def size_of(file: Path) -> int:
    """Pixels of a picture, by its header; 0 if it cannot be read."""
    try:
        with warnings.catch_warnings(), Image.open(file, formats=_FORMATS) as opened:
            return opened.size[0] * opened.size[1]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 0


def matrix(value: object) -> Matrix | None:
    """Rows of numbers as `[rows, columns]`, NaN where there is none; None if it is not that."""
    if not isinstance(value, list) or not 0 < len(value) <= _LONGEST:
        return None
    found = array(value)
    return found if found is not None and found.ndim == 2 and 0 < found.shape[1] <= _LONGEST else None


def sentence_heat(weights: Matrix) -> str:
    """Weights of queries (rows) on keys as a picture of as many pixels; those that are hidden are transparent.

    Colours follow the square root, from 0 to 1, so that they mean the same in every picture.
    """
    levels = np.sqrt(np.clip(np.nan_to_num(weights), 0.0, 1.0))
    return _palette_png(levels, np.isnan(weights), _ramp(_STOPS), _OPAQUE)


def map_overlay(ratios: Matrix) -> str:
    """Weights in units of the mean weight, to be laid over a picture.

    What has less than the mean is transparent; colours and opacity follow the logarithm up to `MOST_RATIO`.
    """
    levels = np.log(np.clip(np.nan_to_num(ratios), 1.0, MOST_RATIO)) / math.log(MOST_RATIO)
    return _palette_png(levels, np.isnan(ratios), _ramp(_WARM), _WARM_OPACITY)


def gradient(kind: str) -> str:
    """The colours of `sentence_heat` or `map_overlay` from the least to the most, for CSS."""
    ramp = _ramp(_STOPS if kind == "sentence" else _WARM)
    chosen: Sequence[Sequence[int]] = ramp[:: len(ramp) // 8].astype(int).tolist()
    return ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in chosen)


def colours(kind: str) -> list[list[int]]:
    """The 255 colours of `sentence_heat` or `map_overlay` from the least to the most: red, green, blue, opacity."""
    ramp, opacity = (_STOPS, _OPAQUE) if kind == "sentence" else (_WARM, _WARM_OPACITY)
    found: list[list[int]] = np.column_stack([_ramp(ramp), opacity]).astype(np.uint8).tolist()
    return found


def _ramp(stops: Matrix) -> Matrix:
    """Colours between stops, `[255, 3]`."""
    at = np.linspace(0, 1, 255)
    return np.stack([np.interp(at, np.linspace(0, 1, len(stops)), stops[:, channel]) for channel in range(3)], -1)


def _palette_png(levels: Matrix, hidden: npt.NDArray[np.bool_], colours: Matrix, opacity: Matrix) -> str:
    places = np.round(levels * 254).astype(np.uint8) + np.uint8(1)
    places[hidden] = 0
    picture = Image.fromarray(places)
    palette = np.concatenate([np.zeros((1, 3)), colours]).astype(np.uint8)
    picture.putpalette(palette.tobytes())
    stream = io.BytesIO()
    alpha = bytes([0, *opacity.astype(np.uint8).tolist()])
    picture.save(stream, "PNG", transparency=alpha, optimize=True)
    return _uri("png", stream.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

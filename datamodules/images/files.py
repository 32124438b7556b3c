"""Reads image files of any kind as RGB arrays, and label files, or raises an error that names the file."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from lightning_attn.errors import InputError, MissingFileError

__all__ = [
    "IMAGE_SUFFIXES",
    "ExifPolicy",
    "ImageArray",
    "ImageError",
    "ImageHeader",
    "Window",
    "channels_first",
    "decoding",
    "image_header",
    "image_size",
    "label_size",
    "pixels_of",
    "read_image",
    "read_labels",
]

logger = logging.getLogger(__name__)

ImageArray = npt.NDArray[np.uint8]
Window = tuple[int, int, int, int]
"""A part of an image: top, left, height, width."""

ExifPolicy = Literal["apply", "ignore"]
"""How the orientation in the EXIF data of a photo is treated.

`apply` turns it upright, as viewers and most annotation tools do, unless the annotations have the size of the stored
pixels and not that of the upright image. `ignore` always takes the stored pixels.
"""

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF")
"""The formats that Pillow may recognise, whatever the file name: none for which it would start another program."""

IMAGE_SUFFIXES = (".bmp", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Suffixes of the files that count as images in a folder, in lower case."""

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


class ImageError(InputError):
    """An image file cannot be used; the message names it and the fix."""


class ImageHeader(NamedTuple):
    """Size and orientation of what `read_image` would return, from the header of a file.

    Attributes:
        size: Height and width.
        turned: Whether the stored pixels are rotated or mirrored, by the EXIF orientation.
    """

    size: tuple[int, int]
    turned: bool


def read_image(
    path: Path,
    size: tuple[int, int] | None = None,
    window: Window | None = None,
    exif: ExifPolicy = "apply",
) -> ImageArray:
    """Reads an image file.

    Grey, palette and CMYK images become RGB, 16 bits become 8, transparency is dropped.

    Args:
        path: The file.
        size: Height and width of the annotated image; None if they are not known.
        window: The part to return, inside the image; None for all of it. A file is always decoded as a whole, but
            converting all pixels of a large PNG file to an array takes a fifth of the time.
        exif: See `ExifPolicy`; Pillow itself always turns TIFF files.

    Returns:
        RGB, `[H, W, 3]`.

    Raises:
        FileNotFoundError: If there is no such file.
        ImageError: If it is damaged, not an image, too large (more than 178 million pixels), has 32-bit pixels, or does
            not have the given size.
        OSError: If the file cannot be read.
    """
    with decoding(path) as image:
        image.load()
        orientation = _orientation(image)
        converted = _rgb(image, path)
    if _header(path, converted.size, orientation, size, exif).turned:
        converted = converted.transpose(_UPRIGHT[orientation])
    if window is not None:
        top, left, height, width = window
        converted = converted.crop((left, top, left + width, top + height))
    return np.array(converted)


def pixels_of(image: Image.Image | ImageArray | str | Path, exif: ExifPolicy = "apply") -> ImageArray:
    """An image in any of the usual forms, as `read_image` would return it.

    Args:
        image: A Pillow image, RGB pixels as uint8 `[H, W, 3]`, or the path of a file.
        exif: As in `read_image`.

    Returns:
        RGB, `[H, W, 3]`.

    Raises:
        TypeError: If it is something else.
        FileNotFoundError: If there is no such file.
        ImageError: If it cannot be used.
    """
    if isinstance(image, str | Path):
        return read_image(Path(image), exif=exif)
    if isinstance(image, Image.Image):
        name = getattr(image, "filename", "") or "The image"
        with _image_errors(name):
            image.load()
            orientation = _orientation(image)
            converted = _rgb(image, name)
        turned = _header(name, converted.size, orientation, None, exif).turned
        return np.array(converted.transpose(_UPRIGHT[orientation]) if turned else converted)
    if (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.ndim == 3
        and image.shape[2] == 3
        and image.size
    ):
        return image
    found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
    raise TypeError(f"An image must be a Pillow image, a path, or uint8 [H, W, 3] in RGB; got {found}.")


def image_header(path: Path, size: tuple[int, int] | None = None, exif: ExifPolicy = "apply") -> ImageHeader:
    """Size and orientation of what `read_image` would return, from the header of the file.

    Args:
        path: As in `read_image`.
        size: As in `read_image`.
        exif: As in `read_image`.

    Raises:
        FileNotFoundError: If there is no such file.
        ImageError: If it is not an image, too large, or does not have the given size.
        OSError: If the file cannot be read.
    """
    with decoding(path) as image:
        return _header(path, image.size, _orientation(image), size, exif)


def image_size(path: Path, size: tuple[int, int] | None = None, exif: ExifPolicy = "apply") -> tuple[int, int]:
    """Height and width of what `read_image` would return; arguments and errors are those of `image_header`."""
    return image_header(path, size, exif).size


def read_labels(path: Path) -> ImageArray:
    """Reads an image file that holds the label of each pixel.

    Args:
        path: The file.

    Returns:
        The labels, 0 to 255, `[H, W]`.

    Raises:
        FileNotFoundError: If there is no such file.
        ImageError: If it is damaged, not an image, too large, or does not have one channel of 8 bits.
        OSError: If the file cannot be read.
    """
    with decoding(path) as image:
        _check_labels(image, path)
        image.load()
    return np.array(image)


def label_size(path: Path) -> tuple[int, int]:
    """Height and width of what `read_labels` would return, from the header of the file; the errors are the same."""
    with decoding(path) as image:
        _check_labels(image, path)
        return image.height, image.width


def channels_first(image: ImageArray) -> Tensor:
    """`[H, W, 3]` as `[3, H, W]`; OpenCV is eight times as fast at it as NumPy."""
    height, width = image.shape[:2]
    planes = np.empty((3, height, width), dtype=np.uint8)
    cv2.split(image, list(planes))
    return torch.from_numpy(planes)


def _check_labels(image: Image.Image, path: Path) -> None:
    if image.mode != "L":
        found = "a palette" if image.mode == "P" else "16 bits" if image.mode[0] == "I" else f"pixels of {image.mode}"
        raise ImageError(
            f"{path} has {found}, but a label file holds class ids in one channel of 8 bits (grey), not colours and "
            "not ids of single objects. Give such a file."
        )


def _orientation(image: Image.Image) -> int:
    # Pillow turns the pixels of a TIFF file itself, and shows the turned size before it does. Of a PNG file it would
    # decode all pixels to see whether EXIF data come after them, where hardly anyone writes them.
    tagged = image.format != "PNG" or any("exif" in str(key).lower() for key in image.info)
    return int(image.getexif().get(_ORIENTATION, 1)) if tagged and image.format != "TIFF" else 1


def _header(
    path: Path | str,
    width_and_height: tuple[int, int],
    orientation: int,
    size: tuple[int, int] | None,
    exif: ExifPolicy,
) -> ImageHeader:
    """Decides whether an image is turned; the same for files, Pillow images and headers."""
    stored = width_and_height[::-1]
    upright = width_and_height if orientation in _SIDEWAYS else stored
    oriented = orientation in _UPRIGHT
    if exif == "apply" and oriented and size in (None, upright):
        return ImageHeader(upright, turned=True)
    if size in (None, stored):
        return ImageHeader(stored, turned=False)
    found, turned, wanted = (f"{width}x{height}" for height, width in (stored, upright, size))
    fix = "Use the images that the annotations were made for, or correct the annotations."
    if upright != stored:
        found += f" pixels ({turned} upright, by its EXIF orientation)"
        if size == upright:
            fix = "The annotations were made for the upright image: use --data.exif apply."
    else:
        found += " pixels"
    raise ImageError(f"{path} is {found}, but its annotation says {wanted} (width x height). {fix}")


@contextmanager
def decoding(path: Path) -> Iterator[Image.Image]:
    """Opens an image; whatever a decoder raises on a damaged file becomes an `ImageError`."""
    with _image_errors(path), Image.open(path, formats=FORMATS) as image:
        yield image


@contextmanager
def _image_errors(path: Path | str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # Problems are raised as errors; Pillow already warns at half the size that it refuses.
            warnings.simplefilter("ignore")
            yield
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} does not exist.") from error
    except IsADirectoryError as error:
        raise ImageError(f"{path} is a folder, not an image.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} is too large ({error}). Scale it down or cut it into pieces.") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system could not read it
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise ImageError(
            f"{path} is damaged, cut short, or not an image of {kinds} ({error}). Copy or download it again, or take "
            "it out of the data."
        ) from error


def _rgb(image: Image.Image, path: str | Path) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        pixels = np.asarray(image)
        _report_few_bits(int(pixels.max(initial=0)), path)
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(f"{path} has 32-bit pixels, whose range is not known. Convert it to 8 or 16 bits.")
    if image.mode == "P":
        image = image.convert("RGBA")  # a palette may hold transparency
    return image.convert("RGB")


reported_few_bits: list[str | Path] = []


def _report_few_bits(highest: int, path: str | Path) -> None:
    """Warns, once in a process, that a 16-bit image becomes nearly black because its values use fewer bits."""
    if highest < 1 << 14 and not reported_few_bits:
        reported_few_bits.append(path)
        logger.warning(
            f"{path} has 16-bit pixels, of which the largest is {highest:,} of 65,535: it becomes nearly black in 8 "
            "bits. Stretch such images to all 16 bits, or store them with 8."
        )

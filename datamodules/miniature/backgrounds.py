"""Natural photographs as backgrounds of the miniature image sets, without downloads.

They are files of the installed scikit-image, read from its package folder. Only pictures that are in the public domain
or under CC0 and stored losslessly are used, so that the pixels do not depend on a decoder: an astronaut (NASA), a cat
(CC0, Stefan van der Walt), a cup of coffee (CC0, Rachel Michetti), a cameraman (CC0, Lav Varshney), and the surfaces
brick, grass and gravel (CC0, cc0textures.com and linolafett). Grey ones are tinted.

The left two thirds of each photograph serve training, the right third serves evaluation: no pixel serves both.
"""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from lightning_attn.errors import InputError, MissingFileError

__all__ = ["SCENES", "SURFACES", "background", "crop", "photograph"]

Pixels = npt.NDArray[np.uint8]

SCENES = ("astronaut", "camera", "chelsea", "coffee")
"""Photographs of people, animals and objects."""

SURFACES: Mapping[str, tuple[tuple[int, int, int], ...]] = MappingProxyType(
    {
        "brick": ((214, 120, 88), (200, 160, 125), (178, 178, 178)),
        "grass": ((120, 200, 72), (178, 200, 90), (208, 190, 120)),
        "gravel": ((205, 200, 195), (205, 175, 140), (150, 165, 185)),
    }
)
"""Grey photographs of surfaces, and the RGB colours that they are tinted with."""

_CAMERA_TINTS = ((235, 235, 235), (240, 210, 165), (175, 205, 240))


@cache
def photograph(name: str) -> Pixels:
    """A photograph, unchanged.

    Args:
        name: One of `SCENES` or `SURFACES`.

    Returns:
        RGB [height, width, 3], read-only; the three channels of a grey photograph are equal.

    Raises:
        ValueError: `name` is not one of them.
        FileNotFoundError: The installed scikit-image does not hold the file.
    """
    if name not in SCENES and name not in SURFACES:
        raise InputError(f"name={name!r}: the photographs are {', '.join((*SCENES, *SURFACES))}.")
    source = files("skimage.data") / f"{name}.png"
    if not source.is_file():
        raise MissingFileError(
            f"{source}: the installed scikit-image lacks this photograph, which its releases contain. Reinstall it "
            "with `pip install --force-reinstall scikit-image`."
        )
    with source.open("rb") as file, Image.open(file) as image:
        pixels = np.array(image.convert("RGB"))
    pixels.flags.writeable = False
    return pixels


def crop(rng: np.random.Generator, name: str, height: int, width: int, *, held_out: bool) -> Pixels:
    """A random crop of a photograph, scaled to a size, mirrored with probability 1/2 and tinted if it is grey.

    Args:
        rng: The random generator.
        name: One of `SCENES` or `SURFACES`.
        height: Height in pixels, at least 1.
        width: Width in pixels, at least 1.
        held_out: Whether to crop the third of the photograph that is reserved for evaluation.

    Returns:
        RGB [height, width, 3].

    Raises:
        ValueError: `name` is not a photograph, or a size is below 1.
        FileNotFoundError: As `photograph`.
    """
    if min(height, width) < 1:
        raise InputError(f"height={height}, width={width}: give at least one pixel each.")
    pixels = photograph(name)
    border = pixels.shape[1] * 2 // 3
    region = pixels[:, border:] if held_out else pixels[:, :border]
    # Source pixels per target pixel, limited by the region.
    scale = min(rng.uniform(0.6, 1.4), region.shape[0] / height, region.shape[1] / width)
    left = rng.uniform(0, region.shape[1] - scale * width)
    top = rng.uniform(0, region.shape[0] - scale * height)
    box = (left, top, min(left + scale * width, region.shape[1]), min(top + scale * height, region.shape[0]))
    result = np.asarray(Image.fromarray(region).resize((width, height), Image.Resampling.BILINEAR, box))
    if rng.random() < 0.5:
        result = result[:, ::-1]
    tints = _CAMERA_TINTS if name == "camera" else SURFACES.get(name)
    if tints is not None:
        # 16-bit integers: 255 * 255 fits, and every machine rounds alike.
        tint = np.array(tints[rng.integers(len(tints))], np.uint16)
        result = (result * tint // 255).astype(np.uint8)
    return np.ascontiguousarray(result)


def background(rng: np.random.Generator, height: int, width: int, *, held_out: bool) -> Pixels:
    """A random crop of any of the photographs, sometimes blurred.

    Args:
        rng: The random generator.
        height: Height in pixels, at least 1.
        width: Width in pixels, at least 1.
        held_out: Whether to crop the thirds of the photographs that are reserved for evaluation.

    Returns:
        RGB [height, width, 3].

    Raises:
        ValueError: A size is below 1.
        FileNotFoundError: As `photograph`.
    """
    names = (*SCENES, *SURFACES)
    result = crop(rng, names[rng.integers(len(names))], height, width, held_out=held_out)
    blur = rng.uniform(-1.5, 1.5)
    if blur <= 0:
        return result
    return np.array(Image.fromarray(result).filter(ImageFilter.GaussianBlur(blur)))

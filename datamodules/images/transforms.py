"""Transforms of an image between the file and the network, for any task.

An image is resized so that its short side gets a given length unless the long side would become too long, both rounded
to whole pixels. The content of a `W x H` image then covers the new `W' x H'` pixels from edge to edge (pixel centres
are at halves), so x becomes `x * W' / W` with the rounded W', and `x' * W / W'` is its inverse. This is exact whatever
rounding did to the aspect ratio; only the scale before rounding would be inexact, and it is used for nothing else.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from lightning_attn.datamodules.images.files import ImageArray
from lightning_attn.errors import InputError

# The mean of ImageNet, which the network sees as nearly 0.
FILLING = (124, 116, 104)


@dataclass(frozen=True)
class ImageAugmentation:
    """Random changes of training images, for any task.

    Args:
        horizontal_flip: Probability that left and right are exchanged.
        brightness: A factor is drawn between 1 - this and 1 + this.
        contrast: As brightness.
        saturation: As brightness.
        hue: A shift is drawn between -this and +this, in turns of the colour circle.
        colour_probability: Probability that brightness, contrast, saturation and hue are changed at all.

    Raises:
        ValueError: If a value is out of range.
    """

    horizontal_flip: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    colour_probability: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(ImageAugmentation):
            check_range(field.name, getattr(self, field.name), 0.5 if field.name == "hue" else 1.0)

    @property
    def changes_colour(self) -> bool:
        """Whether any colour is ever changed."""
        return bool(self.colour_probability and (self.brightness or self.contrast or self.saturation or self.hue))


def check_range(name: str, value: float, most: float) -> None:
    """Refuses a value of an augmentation that is not between 0 and the most that it may be.

    Raises:
        ValueError: If it is not; the message names it.
    """
    if not 0 <= value <= most:
        raise InputError(f"augmentation.{name}: {value} is not between 0 and {most:g}.")


def albumentations() -> Any:
    """The package; it is imported only when it is used, as that takes a second."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask a server for a newer version
    import albumentations as package  # type: ignore[import-untyped]

    return package


def colour_changes(augmentation: ImageAugmentation) -> Any:
    """The random changes of colours, as an albumentations `Compose`."""
    library = albumentations()
    jitter = library.ColorJitter(
        *(
            (1 - strength, 1 + strength)
            for strength in (augmentation.brightness, augmentation.contrast, augmentation.saturation)
        ),
        hue=(-augmentation.hue, augmentation.hue),
        p=augmentation.colour_probability,
    )
    return library.Compose([jitter] if augmentation.changes_colour else [])


def seed_transforms(seed: Sequence[int], *steps: Any) -> np.random.Generator:
    """Seeds albumentations' transforms, and returns a generator of the same seed.

    Args:
        seed: Numbers such as that of the run, epoch, index of the image.
        steps: Each an albumentations `Compose`.
    """
    generator = np.random.default_rng(seed)
    # One stream for all steps. Compose.set_random_seed would give each step the same one, so that an image would be
    # flipped whenever its colours are changed.
    streams = generator, random.Random(int(generator.integers(1 << 32)))
    for step in steps:
        step.set_random_state(*streams)
    return generator


def resized_sizes(sizes: npt.NDArray[np.int64], min_size: int, max_size: int) -> npt.NDArray[np.int64]:
    """Heights and widths after resizing, `[n, 2]`.

    Args:
        sizes: Heights and widths of images, `[n, 2]`.
        min_size: Length of the short side; 0 resizes only what is longer than `max_size`.
        max_size: Bound of the long side, which takes precedence; 0 for none.
    """
    scales = min_size / sizes.min(axis=1) if min_size else np.ones(len(sizes))
    if max_size:
        scales = np.minimum(scales, max_size / sizes.max(axis=1))
    return np.maximum(1, (sizes * scales[:, None] + 0.5).astype(np.int64))


def resized_size(size: tuple[int, int], min_size: int, max_size: int) -> tuple[int, int]:
    """Height and width of one image after resizing; arguments are those of `resized_sizes`."""
    height, width = resized_sizes(np.array([size], dtype=np.int64), min_size, max_size)[0].tolist()
    return height, width


def resize_image(image: ImageArray, size: tuple[int, int]) -> ImageArray:
    """Resizes `[H, W, 3]` to a height and width: bilinear, or by area averaging if a side shrinks."""
    height, width = image.shape[:2]
    if (height, width) == size:
        return image
    shrinks = size[0] < height or size[1] < width
    resized = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(resized, dtype=np.uint8)

"""What happens to an image and its boxes between the file and the network.

An image is resized so that its short side gets a given length unless the long side would become too long, both rounded
to whole pixels. What a `W x H` image shows then covers the new `W' x H'` pixels from edge to edge (their centres lie at
halves), so x becomes `x * W' / W` with the rounded W', and `x' * W / W'` leads back. This is exact whatever rounding
did to the aspect ratio; only the scale before rounding would be inexact, and it is used for nothing else.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from datamodules.images import ImageArray

Boxes = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

# The mean of ImageNet, which the network sees as nearly 0.
FILLING = (124, 116, 104)

# A box that is smaller than this on either side, after resizing, is no target.
_MIN_BOX_SIDE = 1.0


@dataclass(frozen=True)
class ImageAugmentation:
    """What is changed at random in training images, whatever is to be learnt from them.

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
            _check_range(field.name, getattr(self, field.name), 0.5 if field.name == "hue" else 1.0)

    @property
    def changes_colour(self) -> bool:
        """Whether any colour is ever changed."""
        return bool(self.colour_probability and (self.brightness or self.contrast or self.saturation or self.hue))


@dataclass(frozen=True)
class Augmentation(ImageAugmentation):
    """What is changed at random in training images with boxes; more is in `ImageAugmentation`.

    Args:
        vertical_flip: Probability that top and bottom are exchanged.
        transpose: Probability that rows and columns are exchanged; with both flips, all turns by 90 degrees. Give
            `crop_size` too, or batches hold wide and tall images, and much padding.
        min_sizes: Lengths of the short side, one of which is drawn for each image; empty for the DataModule's
            `min_size` alone.
        crop_size: Side of the square that is cut at a random place out of the resized image, in pixels; a shorter image
            is padded in grey. 0 for none.
        crop_visibility: A box stays a target while this share of its area is inside the crop.

    Raises:
        ValueError: If a value is out of range.
    """

    vertical_flip: float = 0.0
    transpose: float = 0.0
    min_sizes: tuple[int, ...] = ()
    crop_size: int = 0
    crop_visibility: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vertical_flip", "transpose", "crop_visibility"):
            _check_range(name, getattr(self, name), 1.0)
        if self.crop_size < 0:
            raise ValueError(f"augmentation.crop_size: {self.crop_size} is below 0; give pixels, or 0 for no crops.")
        if any(size < 1 for size in self.min_sizes):
            raise ValueError(f"augmentation.min_sizes: {list(self.min_sizes)} has a length below 1; give pixels.")


def _check_range(name: str, value: float, most: float) -> None:
    if not 0 <= value <= most:
        raise ValueError(f"augmentation.{name}: {value} is not between 0 and {most:g}.")


def albumentations() -> Any:
    """The package, imported as late as this because it takes a second."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask a server for a newer version
    import albumentations as package  # type: ignore[import-untyped]

    return package


def colour_changes(augmentation: ImageAugmentation) -> Any:
    """What changes the colours of an image: an albumentations `Compose`."""
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


def drawn_by(draw: Sequence[int], *steps: Any) -> np.random.Generator:
    """Makes what albumentations' steps draw, and the generator that is returned, depend on some numbers alone.

    Args:
        draw: The numbers, such as seed, epoch, number of the image.
        steps: Each an albumentations `Compose`.
    """
    generator = np.random.default_rng(draw)
    # One stream for all steps. Compose.set_random_seed would give each step the same one, so that an image would be
    # flipped whenever its colours are changed.
    streams = generator, random.Random(int(generator.integers(1 << 32)))
    for step in steps:
        step.set_random_state(*streams)
    return generator


def resized_size(size: tuple[int, int], min_size: int, max_size: int) -> tuple[int, int]:
    """Height and width after resizing.

    Args:
        size: Height and width of the image.
        min_size: Length of the short side; 0 resizes only what is longer than `max_size`.
        max_size: Bound of the long side, which goes before; 0 for none.
    """
    short, long = min(size), max(size)
    scale = min_size / short if min_size else 1.0
    if max_size:
        scale = min(scale, max_size / long)
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return height, width


def resize_image(image: ImageArray, size: tuple[int, int]) -> ImageArray:
    """Resizes `[H, W, 3]` to a height and width: bilinear, or by the mean of the covered area where it shrinks."""
    height, width = image.shape[:2]
    if (height, width) == size:
        return image
    shrinks = size[0] < height or size[1] < width
    resized = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return np.asarray(resized, dtype=np.uint8)


def resize_boxes(boxes: npt.NDArray[Any], size: tuple[int, int], new_size: tuple[int, int]) -> Boxes:
    """Boxes (x1, y1, x2, y2) `[n, 4]` of an image of `size`, after it was resized to `new_size`; and back, the same.

    Args:
        boxes: In pixels of the image.
        size: Height and width of the image that the boxes are of.
        new_size: Height and width of the other.
    """
    scale = np.array([new_size[1] / size[1], new_size[0] / size[0]] * 2)
    return np.asarray(boxes * scale, dtype=np.float32)


class EvaluationTransform:
    """Resizes, and does nothing else.

    Args:
        min_size: As in `resized_size`.
        max_size: As in `resized_size`.
    """

    def __init__(self, min_size: int, max_size: int) -> None:
        self.min_size = min_size
        self.max_size = max_size

    def __call__(
        self, image: ImageArray, boxes: Boxes, labels: Labels, draw: Sequence[int]
    ) -> tuple[ImageArray, Boxes, Labels]:
        """The resized image `[H', W', 3]`, its boxes `[n, 4]` and their labels `[n]`; `draw` has no influence."""
        size = image.shape[0], image.shape[1]
        new_size = resized_size(size, self.min_size, self.max_size)
        return resize_image(image, new_size), resize_boxes(boxes, size, new_size), labels


class TrainingTransform:
    """Resizes, crops, flips, transposes and changes colours at random, by albumentations.

    What is drawn depends on the numbers that are given with each image and on nothing else, so it is the same in
    whatever process and order the images are made.

    Args:
        augmentation: What is drawn.
        min_size: As in `resized_size`; `augmentation.min_sizes` goes before it.
        max_size: As in `resized_size`.
    """

    def __init__(self, augmentation: Augmentation, min_size: int, max_size: int) -> None:
        library = albumentations()
        self.min_sizes = augmentation.min_sizes or (min_size,)
        self.max_size = max_size
        self.colours = colour_changes(augmentation)
        steps = [
            library.HorizontalFlip(p=augmentation.horizontal_flip),
            library.VerticalFlip(p=augmentation.vertical_flip),
            library.Transpose(p=augmentation.transpose),
        ]
        if augmentation.crop_size:
            side = augmentation.crop_size
            steps.insert(0, library.RandomCrop(side, side, pad_if_needed=True, fill=FILLING))
        boxes = library.BboxParams(
            format="pascal_voc",
            label_fields=["labels"],
            clip=True,
            min_width=_MIN_BOX_SIDE,
            min_height=_MIN_BOX_SIDE,
            min_visibility=augmentation.crop_visibility if augmentation.crop_size else 0.0,
        )
        self.geometry = library.Compose(steps, bbox_params=boxes)

    def __call__(
        self, image: ImageArray, boxes: Boxes, labels: Labels, draw: Sequence[int]
    ) -> tuple[ImageArray, Boxes, Labels]:
        """The changed image `[H', W', 3]`, the boxes that are left `[n, 4]` and their labels `[n]`.

        Args:
            image: `[H, W, 3]`.
            boxes: (x1, y1, x2, y2) in pixels, within the image, `[n, 4]`.
            labels: `[n]`.
            draw: What the drawing starts from: seed, epoch, number of the image.
        """
        generator = drawn_by(draw, self.colours, self.geometry)
        size = image.shape[0], image.shape[1]
        new_size = resized_size(size, self.min_sizes[generator.integers(len(self.min_sizes))], self.max_size)
        # Colours first: images usually grow.
        image = resize_image(self.colours(image=image)["image"], new_size)
        made = self.geometry(image=image, bboxes=resize_boxes(boxes, size, new_size), labels=labels)
        return (
            made["image"],
            np.asarray(made["bboxes"], dtype=np.float32).reshape(-1, 4),
            np.asarray(made["labels"], dtype=np.int64).reshape(-1),
        )

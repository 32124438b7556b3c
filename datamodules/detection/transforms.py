"""Transforms of an image and its boxes between the file and the network; for sizes see `images.transforms`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_attn.datamodules.images.files import ImageArray
from lightning_attn.datamodules.images.transforms import (
    FILLING,
    ImageAugmentation,
    albumentations,
    check_range,
    colour_changes,
    resize_image,
    resized_size,
    seed_transforms,
)
from lightning_attn.errors import InputError

Boxes = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

MIN_BOX_SIDE = 0.999
"""A box that is smaller than this on either side, after resizing, is no target: a pixel, less what rounding costs."""


@dataclass(frozen=True)
class Augmentation(ImageAugmentation):
    """Random changes of training images with boxes, beside those of `ImageAugmentation`.

    Args:
        vertical_flip: Probability that top and bottom are exchanged.
        transpose: Probability that rows and columns are exchanged; with both flips, all rotations by 90 degrees. Give
            `crop_size` too, or batches hold wide and tall images, and much padding.
        min_sizes: Lengths of the short side, one of which is drawn for each image; empty for the DataModule's
            `min_size` alone.
        crop_size: Side of the square that is cropped at a random place from the resized image, in pixels; a smaller
            image is padded in grey. 0 for none.
        crop_visibility: A box stays a target if at least this share of its area is inside the crop.

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
            check_range(name, getattr(self, name), 1.0)
        if self.crop_size < 0:
            raise InputError(f"augmentation.crop_size: {self.crop_size} is below 0; give pixels, or 0 for no crops.")
        if any(size < 1 for size in self.min_sizes):
            raise InputError(f"augmentation.min_sizes: {list(self.min_sizes)} has a length below 1; give pixels.")


def resize_boxes(boxes: npt.NDArray[Any], size: tuple[int, int], new_size: tuple[int, int]) -> Boxes:
    """Boxes (x1, y1, x2, y2) `[n, 4]` of an image of `size`, after it was resized to `new_size`.

    Args:
        boxes: In pixels of the image.
        size: Height and width of the image that the boxes are of.
        new_size: Height and width of the other.
    """
    scale = np.array([new_size[1] / size[1], new_size[0] / size[0]] * 2)
    return np.asarray(boxes * scale, dtype=np.float32)


class EvaluationTransform:
    """Resizes an image and its boxes.

    Args:
        min_size: As in `resized_size`.
        max_size: As in `resized_size`.
    """

    def __init__(self, min_size: int, max_size: int) -> None:
        self.min_size = min_size
        self.max_size = max_size

    def __call__(
        self, image: ImageArray, boxes: Boxes, labels: Labels, seed: Sequence[int]
    ) -> tuple[ImageArray, Boxes, Labels]:
        """The resized image `[H', W', 3]`, its boxes `[n, 4]` and their labels `[n]`; `seed` has no influence."""
        size = image.shape[0], image.shape[1]
        new_size = resized_size(size, self.min_size, self.max_size)
        return resize_image(image, new_size), resize_boxes(boxes, size, new_size), labels


class TrainingTransform:
    """Resizes, crops, flips, transposes and changes colours at random, by albumentations.

    The random draws depend on the seed that is given with each image alone, so they are the same in any process and
    order.

    Args:
        augmentation: The random changes.
        min_size: As in `resized_size`; `augmentation.min_sizes` takes precedence.
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
            min_width=MIN_BOX_SIDE,
            min_height=MIN_BOX_SIDE,
            min_visibility=augmentation.crop_visibility if augmentation.crop_size else 0.0,
        )
        self.geometry = library.Compose(steps, bbox_params=boxes)

    def __call__(
        self, image: ImageArray, boxes: Boxes, labels: Labels, seed: Sequence[int]
    ) -> tuple[ImageArray, Boxes, Labels]:
        """The changed image `[H', W', 3]`, the boxes that are left `[n, 4]` and their labels `[n]`.

        Args:
            image: `[H, W, 3]`.
            boxes: (x1, y1, x2, y2) in pixels, within the image, `[n, 4]`.
            labels: `[n]`.
            seed: Of the random draws: that of the run, epoch, index of the image.
        """
        generator = seed_transforms(seed, self.colours, self.geometry)
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

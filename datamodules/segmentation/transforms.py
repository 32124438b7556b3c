"""Transforms of an image and its labels between the files and the network.

An image is scaled by a random factor, and cropped to a fixed size. Here the part of the image that the crop shows is
cut out first, and only that is scaled, which gives the same result for less work. It is exact as follows: along an axis
on which the scaled image is longer than the crop, the part has a whole number of pixels, the nearest to crop / factor,
and covers the crop from edge to edge. So the factor is exact up to half a source pixel over the whole crop, and image
and labels are scaled alike, with pixel centres at halves. Only a border of one pixel differs, where interpolation would
have seen beyond the part. Along an axis on which the scaled image is shorter than the crop, all of it is used, and the
rest of the crop, below or to the right, is padded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from lightning_attn.datamodules.images.files import ImageArray, Window
from lightning_attn.datamodules.images.transforms import (
    FILLING,
    ImageAugmentation,
    albumentations,
    colour_changes,
    resize_image,
    seed_transforms,
)
from lightning_attn.datamodules.segmentation.classes import IGNORED, LabelMap
from lightning_attn.errors import InputError

# Attempts to find a crop without a dominating class; the last one is used in any case.
_MOST_CROPS = 10


@dataclass(frozen=True)
class SegmentationAugmentation(ImageAugmentation):
    """Random changes of training images with labels, beside those of `ImageAugmentation`.

    Args:
        scales: Smallest and largest factor by which images are scaled; one between them is drawn for each image.
        category_max_ratio: Crops are drawn again, up to ten times in all, while one class has more than this share of
            the labelled pixels, or none is labelled; 1 takes any crop. mmsegmentation has 0.75.

    Raises:
        ValueError: If a value is out of range.
    """

    scales: tuple[float, float] = (0.7, 2.0)
    category_max_ratio: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        smallest, largest = self.scales
        if not 0.01 <= smallest <= largest <= 100:
            raise InputError(
                f"augmentation.scales: {list(self.scales)} are not the smallest and the largest factor, both between "
                "0.01 and 100."
            )
        if not 0 < self.category_max_ratio <= 1:
            raise InputError(
                f"augmentation.category_max_ratio: {self.category_max_ratio} is not a share above 0 and up to 1."
            )


def source_length(length: int, crop: int, factor: float) -> tuple[int, int]:
    """Length of the part of an image that a crop shows, along one axis, before and after scaling.

    Args:
        length: Length of the image in pixels.
        crop: Length of the crop in pixels of the scaled image.
        factor: Factor that the image is scaled by.

    Returns:
        Pixels of the image, 1 to `length`, and pixels of the crop, 1 to `crop`; fewer than `crop` are padded.
    """
    scaled = max(1, round(length * factor))
    if scaled <= crop:
        return length, scaled
    return max(1, round(crop / factor)), crop


def resize_labels(labels: LabelMap, size: tuple[int, int]) -> LabelMap:
    """Resizes `[H, W]` to a height and width; each pixel gets the label of the nearest one."""
    if labels.shape == size:
        return labels
    # INTER_NEAREST takes corners for centres, which shifts labels against their image.
    resized = cv2.resize(labels, (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(resized, dtype=np.uint8)


class SegmentationTransform:
    """Scales, crops, changes colours and flips at random.

    The random draws depend on the seed that is given with each image, and on its size and labels, so they are the same
    in any process and order.

    Args:
        augmentation: The random changes.
        crop_size: Height and width of the results; None for those of each image.
    """

    def __init__(self, augmentation: SegmentationAugmentation, crop_size: tuple[int, int] | None) -> None:
        library = albumentations()
        self.scales = augmentation.scales
        self.category_max_ratio = augmentation.category_max_ratio
        self.crop_size = crop_size
        self.colours = colour_changes(augmentation)
        self.flip = library.Compose([library.HorizontalFlip(p=augmentation.horizontal_flip)])

    def __call__(
        self, read: Callable[[Window], ImageArray], labels: LabelMap, seed: Sequence[int]
    ) -> tuple[ImageArray, LabelMap]:
        """The changed image `[H', W', 3]` and its labels `[H', W']`.

        Args:
            read: Reads a part of the image as RGB.
            labels: 0..K-1 or `IGNORED`, of the whole image, `[H, W]`.
            seed: Of the random draws: that of the run, epoch, index of the image.
        """
        generator = seed_transforms(seed, self.colours, self.flip)
        height, width = self.crop_size or (labels.shape[0], labels.shape[1])
        factor = generator.uniform(*self.scales)
        rows, new_rows = source_length(labels.shape[0], height, factor)
        columns, new_columns = source_length(labels.shape[1], width, factor)
        for _ in range(_MOST_CROPS):
            top = int(generator.integers(labels.shape[0] - rows + 1))
            left = int(generator.integers(labels.shape[1] - columns + 1))
            part = labels[top : top + rows, left : left + columns]
            if self._is_varied(part):
                break
        image = resize_image(self.colours(image=read((top, left, rows, columns)))["image"], (new_rows, new_columns))
        part = resize_labels(part, (new_rows, new_columns))
        missing = height - new_rows, width - new_columns
        if any(missing):
            image = np.asarray(_padded(image, missing, FILLING), dtype=np.uint8)
            part = np.asarray(_padded(part, missing, (IGNORED,)), dtype=np.uint8)
        made = self.flip(image=image, mask=part)
        # A view would keep the whole array in memory, and workers would send it.
        return made["image"], np.ascontiguousarray(made["mask"])

    def _is_varied(self, labels: LabelMap) -> bool:
        if self.category_max_ratio == 1:
            return True
        counts = np.bincount(labels.reshape(-1), minlength=256)[:IGNORED]
        return bool(0 < counts.max() <= self.category_max_ratio * counts.sum())


def _padded(pixels: ImageArray, missing: tuple[int, int], value: tuple[int, ...]) -> cv2.typing.MatLike:
    """Padded by so many rows below and columns on the right."""
    return cv2.copyMakeBorder(pixels, 0, missing[0], 0, missing[1], cv2.BORDER_CONSTANT, value=value)

"""Batches of images of different sizes, normalised, and padded as a network's stride requires."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_attn.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Mean and standard deviation of RGB in 0..1 in the training of torchvision's weights."""


class NormalizedBatch(nn.Module):
    """Puts images of different sizes into one batch, normalised as ImageNet's networks were trained."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Sequence[Tensor], stride: int, *, align_corners: bool = False) -> Tensor:
        """Normalises and pads.

        Args:
            images: RGB, uint8, `[3, H, W]` each, on the device of this module.
            stride: See `padded_size`.
            align_corners: See `padded_size`.

        Returns:
            Float32, `[B, 3, H', W']`; images are at the top left, and the rest is zero, which is the mean colour.

        Raises:
            ValueError: If there are no images, or one is invalid; the message says which.
        """
        check_images(images)
        height, width = padded_size(images, stride, align_corners=align_corners)
        # On a CPU the whole network inherits this layout, and a training step of a detector is a sixth faster.
        layout = torch.channels_last if self.mean.device.type == "cpu" else torch.contiguous_format
        batch = torch.empty(
            (len(images), 3, height, width), dtype=self.mean.dtype, device=self.mean.device, memory_format=layout
        ).zero_()
        for image, padded in zip(images, batch, strict=True):
            inside = padded[:, : image.shape[1], : image.shape[2]]
            torch.div(image, 255, out=inside)
            inside.sub_(self.mean).div_(self.std)
        return batch


def padded_size(images: Sequence[Tensor], stride: int, *, align_corners: bool) -> tuple[int, int]:
    """Height and width of a batch that holds all images.

    Args:
        images: `[..., H, W]` each.
        stride: Of the smallest map: sides are multiples of it. The width is large enough for this map to have two
            values per image, which batch normalisation needs.
        align_corners: Makes sides 1 more than a multiple, so that the first and the last pixel both are at a pixel
            of the smallest map; resizing that map with `align_corners=True` then puts all of its pixels where they
            were computed.
    """

    def padded(size: int) -> int:
        return math.ceil((size - align_corners) / stride) * stride + align_corners

    height, width = (padded(max(image.shape[axis] for image in images)) for axis in (-2, -1))
    return height, max(width, padded(stride + 1))


def padded_labels(labels: Sequence[Tensor], size: tuple[int, int], value: int) -> Tensor:
    """Maps of labels, uint8 `[H, W]` each, in one batch `[B, *size]`, at the top left; the rest is `value`."""
    batch = torch.full((len(labels), *size), value, dtype=torch.uint8, device=labels[0].device)
    for padded, label in zip(batch, labels, strict=True):
        padded[: label.shape[0], : label.shape[1]] = label
    return batch


def check_images(images: Sequence[Tensor]) -> None:
    """Checks that there is at least one image, and that all are RGB, uint8 `[3, H, W]`.

    Raises:
        ValueError: If not; the message has the index, dtype and shape.
    """
    if not images:
        raise InputError("images is empty; give at least one.")
    for index, image in enumerate(images):
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3 or not image.numel():
            raise InputError(
                f"images[{index}] must be RGB as uint8 [3, H, W], neither H nor W zero; "
                f"got {image.dtype} {tuple(image.shape)}."
            )

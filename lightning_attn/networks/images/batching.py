"""Batches of images of different sizes, normalised, and padded as a network's stride requires."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_attn.errors import InputError

ChannelsLast = bool | Literal["auto"]
"""Whether maps lie in memory with the channels of a position side by side; see `NormalizedBatch`."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Mean and standard deviation of RGB in 0..1 in the training of torchvision's weights."""


class NormalizedBatch(nn.Module):
    """Puts images of different sizes into one batch, normalised as ImageNet's networks were trained.

    Attributes:
        channels_last: The memory format of the batch, which convolutions and normalisations pass on, so that it is that
            of the whole network: `[B, C, H, W]` with the channels of a position side by side, or with its rows.
            `"auto"` is channels last on CPUs and on CUDA. On a CPU a training step of a detector takes a sixth less
            time. The half precision and TF32 convolutions of NVIDIA's tensor cores are made for it, and otherwise
            convert their input and output; not measured. Results are the same up to rounding.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.channels_last: ChannelsLast = "auto"
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
        channels_last = prefers_channels_last(self.channels_last, self.mean.device)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        batch = torch.empty(
            (len(images), 3, height, width), dtype=self.mean.dtype, device=self.mean.device, memory_format=layout
        ).zero_()
        for image, padded in zip(images, batch, strict=True):
            inside = padded[:, : image.shape[1], : image.shape[2]]
            torch.div(image, 255, out=inside)
            inside.sub_(self.mean).div_(self.std)
        return batch


def prefers_channels_last(choice: ChannelsLast, device: torch.device) -> bool:
    """What a choice means on a device."""
    return device.type in ("cpu", "cuda") if choice == "auto" else choice


def use_channels_last(network: nn.Module, choice: ChannelsLast, device: torch.device) -> None:
    """Sets the memory format of a network's batches and of its weights.

    With `"auto"`, weights on a CPU stay as they are: they are laid out for every product there anyway.

    Args:
        network: With a `NormalizedBatch`.
        choice: See `NormalizedBatch`.
        device: Where the network will run.
    """
    for module in network.modules():
        if isinstance(module, NormalizedBatch):
            module.channels_last = choice
    if choice is True or (device.type != "cpu" and prefers_channels_last(choice, device)):
        network.to(memory_format=torch.channels_last)


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

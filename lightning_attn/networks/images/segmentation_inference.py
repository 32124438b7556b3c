"""Segmentation inference on whole images or overlapping tiles, with mirrored images and several scales."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from lightning_attn.errors import InputError
from lightning_attn.networks.images.tiling import tile_spans, tile_step
from lightning_attn.validation import is_number, refuse_unused, require_int

Mode = Literal["whole", "sliding"]

Network: TypeAlias = Callable[[list[Tensor]], Sequence[Tensor]]
"""Maps images, uint8 `[3, H, W]` each, to logits, `[K, H, W]` each: a `Segmenter` in evaluation mode."""


@dataclasses.dataclass(frozen=True)
class InferenceSpec:
    """How images are segmented. The default runs the network once on the whole image.

    Attributes:
        mode: `"whole"`, or `"sliding"` for overlapping square tiles, whose probabilities are averaged.
        tile: Height and width of a tile in pixels; CCNet's is its training crop, 769. An image that is smaller along an
            axis is not padded: tiles are as long as it is there.
        overlap: Minimum fraction of a tile, along each axis, that the next one covers again. CCNet's is 1/3.
        flip: Whether the probabilities of every image or tile are averaged with those of its mirror image.
        scales: Factors by which images are resized; the probabilities are resized back and averaged.

    Raises:
        ValueError: If a field has an invalid value; the message names the field and the fix.
    """

    mode: Mode = "whole"
    tile: int = 769
    overlap: float = 1 / 3
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise InputError(f"mode must be one of {list(get_args(Mode))}, got {self.mode!r}.")
        require_int("tile", self.tile)
        if not (is_number(self.overlap) and 0 <= self.overlap < 1):
            raise InputError(f"overlap must be at least 0 and below 1, got {self.overlap!r}; CCNet's is 1/3.")
        if tile_step(self.tile, self.overlap) < 1:
            raise InputError(
                f"overlap={self.overlap} leaves no step from one tile of {self.tile} pixels to the next. "
                "Set a smaller overlap or a larger tile."
            )
        refuse_unused(self, "mode", {"sliding": ("tile", "overlap")})
        if not isinstance(self.flip, bool):
            raise InputError(f"flip must be true or false, got {self.flip!r}.")
        if not (
            isinstance(self.scales, Sequence)
            and self.scales
            and all(is_number(scale) and math.isfinite(scale) and scale > 0 for scale in self.scales)
        ):
            raise InputError(
                f"scales must be a list of positive numbers such as [0.75, 1.0, 1.25], got {self.scales!r}."
            )


@torch.no_grad()
def segment(network: Network, images: Sequence[Tensor], spec: InferenceSpec) -> list[Tensor]:
    """Predicts the most probable class of every pixel.

    Args:
        network: The network.
        images: RGB, uint8, `[3, H, W]` each; may be empty. Without tiles, mirrored images and scales they are one
            batch, otherwise they are processed one after another.
        spec: The views and how they are averaged.

    Returns:
        Labels, uint8 `[H, W]` for every image, on its device; the lowest of equally probable ones.
    """
    if not images:
        return []
    if spec.mode == "whole" and not spec.flip and set(spec.scales) == {1}:
        found = network(list(images))
    else:
        found = [class_probabilities(network, image, spec) for image in images]
    return [scores.argmax(0).to(torch.uint8) for scores in found]


@torch.no_grad()
def class_probabilities(network: Network, image: Tensor, spec: InferenceSpec) -> Tensor:
    """The probabilities of the classes, `[K, H, W]`, averaged over tiles, then over scales; arguments as `segment`."""
    size = image.shape[1:]
    total = None
    for scale in spec.scales:
        resized = _resized(image, [max(1, round(scale * length)) for length in size])
        found = _resized(_at_one_scale(network, resized, spec), size)
        total = found if total is None else total.add_(found)
    assert total is not None  # a spec has scales
    return total.div_(len(spec.scales))


def _at_one_scale(network: Network, image: Tensor, spec: InferenceSpec) -> Tensor:
    """Probabilities averaged over tiles, `[K, H, W]`."""
    if spec.mode == "whole":
        return _of_tile(network, image, spec.flip)
    rows, columns = (tile_spans(length, spec.tile, spec.overlap) for length in image.shape[1:])
    if len(rows) == len(columns) == 1:
        return _of_tile(network, image, spec.flip)
    total = None
    counts = torch.zeros(image.shape[1:], device=image.device)
    for row in rows:
        for column in columns:
            found = _of_tile(network, image[:, row, column], spec.flip)
            if total is None:
                total = found.new_zeros(len(found), *image.shape[1:])
            total[:, row, column] += found
            counts[row, column] += 1
    assert total is not None  # there is a tile
    return total.div_(counts)


def _of_tile(network: Network, image: Tensor, flip: bool) -> Tensor:
    probabilities = network([image])[0].softmax(0)
    if flip:
        mirrored = network([image.flip(-1)])[0].softmax(0)
        probabilities = probabilities.add_(mirrored.flip(-1)).div_(2)
    return probabilities


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resizing, with antialiasing where it shrinks; `[C, H, W]`, uint8 or float."""
    resized: Tensor = transforms.resize(x, list(size), antialias=True) if x.shape[1:] != torch.Size(size) else x
    return resized

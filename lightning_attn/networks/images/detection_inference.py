"""Detector inference on whole images or overlapping tiles, with mirrored images and several scales."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from lightning_attn.errors import InputError
from lightning_attn.networks.images.heads.detection import Detection
from lightning_attn.networks.images.tiling import tile_spans
from lightning_attn.validation import is_number, refuse_unused, require_int

logger = logging.getLogger(__name__)

Mode = Literal["whole", "sliding"]
_WHOLE_SCORE = 0.5  # fraction of a cut detection's score from which a whole one of the same object replaces its box
_TINY = 1e-6
_MIN_SIDE = 2  # pixels; torch fails on resizing to one

Network: TypeAlias = Callable[[list[Tensor]], Sequence[Detection]]
"""Maps images, uint8 `[3, H, W]` each, to their boxes, labels and scores: a `Detector` in evaluation mode."""


@dataclasses.dataclass(frozen=True)
class DetectionInferenceSpec:
    """How the objects of an image are detected. The default runs the network once on the whole image.

    The detections of all views of an image are merged: of two detections of a class, the one with the lower score is
    dropped where they overlap by `merge_iou`, or where most of one is inside the other and one of them is cut by the
    border of a tile. Where the better one is cut, and the other, with at least half of its score, is not, the box is
    that of the other.

    Attributes:
        mode: `"whole"`, or `"sliding"` for overlapping square tiles *and* the whole image, for small objects in large
            images: these should then not be scaled down (`--data.min_size 0 --data.max_size 0`).
        tile: Height and width of a tile in pixels of the network's input.
        overlap: Minimum fraction of a tile, along each axis, that the next one covers again.
        flip: Whether the network also runs on the mirror image of each view.
        scales: Factors by which images are resized, each a view.
        merge_iou: Intersection over union from which the worse of two detections of a class is dropped.
        voting_iou: Box voting: a merged detection gets the mean of all uncut boxes of its class that it overlaps by
            this, weighted by their scores; 1 for no voting.
        detections_per_img: Maximum detections of an image; 0 for 100, or 1,000 with `sliding`, which is for many
            objects.

    Raises:
        ValueError: If a field has an invalid value; the message names the field and the fix.
    """

    mode: Mode = "whole"
    tile: int = 800
    overlap: float = 0.25
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    merge_iou: float = 0.5
    voting_iou: float = 0.8
    detections_per_img: int = 0

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise InputError(f"inference.mode must be one of {list(get_args(Mode))}, got {self.mode!r}.")
        require_int("inference.tile", self.tile)
        require_int("inference.detections_per_img", self.detections_per_img, least=0)
        if not (is_number(self.overlap) and 0 <= self.overlap < 1) or math.ceil(self.tile * self.overlap) >= self.tile:
            raise InputError(
                f"inference.overlap must be at least 0 and leave a step of at least one pixel from one tile of "
                f"{self.tile} pixels to the next, got {self.overlap!r}."
            )
        refuse_unused(self, "mode", {"sliding": ("tile", "overlap")})
        if not isinstance(self.flip, bool):
            raise InputError(f"inference.flip must be true or false, got {self.flip!r}.")
        for name in ("merge_iou", "voting_iou"):
            value = getattr(self, name)
            if not (is_number(value) and 0 < value <= 1):
                raise InputError(f"inference.{name} must be above 0 and at most 1, got {value!r}.")
        if not (
            isinstance(self.scales, Sequence)
            and self.scales
            and all(is_number(scale) and math.isfinite(scale) and scale > 0 for scale in self.scales)
        ):
            raise InputError(
                f"inference.scales must be a list of positive numbers such as [0.75, 1.0, 1.25], got {self.scales!r}."
            )

    @property
    def is_single_view(self) -> bool:
        """Whether the image itself is its only view."""
        return self.mode == "whole" and not self.flip and set(self.scales) == {1}

    @property
    def max_detections(self) -> int:
        """Maximum detections of an image."""
        return self.detections_per_img or (1000 if self.mode == "sliding" else 100)


@torch.no_grad()
def detect(network: Network, images: Sequence[Tensor], spec: DetectionInferenceSpec) -> list[Detection]:
    """Detects the objects of images.

    Args:
        network: The detector.
        images: RGB, uint8, `[3, H, W]` each; may be empty. With a single view per image they are one batch, otherwise
            they are processed one after another.
        spec: The views and how they are merged.

    Returns:
        For each image `boxes` `[n, 4]` in its pixels, `labels` `[n]` and `scores` `[n]`, best first.
    """
    if not images:
        return []
    if spec.is_single_view:
        return list(network(list(images)))
    return [_merged(list(_views(network, image, spec)), spec) for image in images]


def _views(network: Network, image: Tensor, spec: DetectionInferenceSpec) -> Iterator[Detection]:
    """The detections of each view, in pixels of the image; `cut` is True for boxes that a tile border cuts."""
    height, width = image.shape[1:]
    for scale in spec.scales:
        size = [max(_MIN_SIDE, round(scale * length)) for length in (height, width)]
        resized = image if size == [height, width] else transforms.resize(image, size, antialias=True)
        factors = torch.tensor([width / size[1], height / size[0]] * 2, device=image.device)
        for row, column in _tiles(size, spec):
            tile = resized[:, row, column]
            shift = torch.tensor([column.start, row.start] * 2, device=image.device)
            for mirrored in (False, True)[: 1 + spec.flip]:
                found = network([tile.flip(-1) if mirrored else tile])[0]
                boxes = found["boxes"]
                if mirrored:
                    boxes = torch.stack(
                        [tile.shape[2] - boxes[:, 2], boxes[:, 1], tile.shape[2] - boxes[:, 0], boxes[:, 3]], 1
                    )
                boxes = boxes + shift
                yield found | {"boxes": boxes * factors, "cut": _cut(boxes, row, column, size)}


def _tiles(size: Sequence[int], spec: DetectionInferenceSpec) -> list[tuple[slice, slice]]:
    """The whole image, and its tiles if there is more than one."""
    tiles = [(slice(0, size[0]), slice(0, size[1]))]
    if spec.mode == "sliding":
        rows, columns = (tile_spans(length, spec.tile, spec.overlap) for length in size)
        if len(rows) * len(columns) > 1:
            tiles += [(row, column) for row in rows for column in columns]
    return tiles


def _cut(boxes: Tensor, row: slice, column: slice, size: Sequence[int]) -> Tensor:
    """True for boxes that touch a border of their tile inside the image, where the object may continue, `[n]`."""
    cut = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for span, length, low, high in ((column, size[1], 0, 2), (row, size[0], 1, 3)):
        if span.start > 0:
            cut |= boxes[:, low] <= span.start + 1
        if span.stop < length:
            cut |= boxes[:, high] >= span.stop - 1
    return cut


def _merged(views: list[Detection], spec: DetectionInferenceSpec) -> Detection:
    """One detection of each object from all views: the best, with an uncut box if another view has one."""
    boxes, labels, scores, cut = (
        torch.cat([view[key] for view in views]) for key in ("boxes", "labels", "scores", "cut")
    )
    device = boxes.device
    order = scores.argsort(descending=True, stable=True)
    boxes, labels, scores, cut = (values[order].cpu() for values in (boxes, labels, scores, cut))
    remaining = torch.ones_like(cut)
    selected, selected_boxes = [], []
    for index in range(len(boxes)):  # compares only the few selected boxes with all others, not all pairs
        if not remaining[index]:
            continue
        box = boxes[index]
        same = remaining & (labels == labels[index]) & _same_object(box, cut[index], boxes, cut, spec.merge_iou)
        if cut[index]:
            whole = torch.nonzero(same & ~cut & (scores >= _WHOLE_SCORE * scores[index]))[:, 0]
            if len(whole):
                box = boxes[whole[0]]
                also = _same_object(box, cut[whole[0]], boxes, cut, spec.merge_iou)
                same |= remaining & (labels == labels[index]) & also
        overlapping = labels == labels[index]
        overlapping &= ~cut & (_box_iou(box, boxes) >= spec.voting_iou)
        if overlapping.any():  # the mean reduces the localisation errors of single views
            weights = scores[overlapping, None]
            box = (boxes[overlapping] * weights).sum(dim=0) / weights.sum()
        remaining &= ~same
        remaining[index] = False
        selected.append(index)
        selected_boxes.append(box)
        if len(selected) == spec.max_detections:
            if remaining.any():
                _report_limit(spec.max_detections)
            break
    chosen = torch.tensor(selected, dtype=torch.int64)
    return {
        "boxes": (torch.stack(selected_boxes) if selected_boxes else boxes[:0]).to(device),
        "labels": labels[chosen].to(device),
        "scores": scores[chosen].to(device),
    }


@functools.cache
def _report_limit(limit: int) -> None:
    """Logs once that detections were dropped."""
    logger.warning(
        f"Some images have more than {limit:,} detections, of which the best {limit:,} are kept "
        "(set --model.inference.detections_per_img for another limit)."
    )


def _box_iou(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of a box `[4]` with others `[n, 4]`, `[n]`."""
    shared, area, areas = _areas(box, boxes)
    return shared / (area + areas - shared).clamp(min=_TINY)


def _areas(box: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intersection areas of a box `[4]` with others `[n, 4]`, its area and theirs."""
    shared = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])).clamp(min=0).prod(dim=1)
    return shared, (box[2:] - box[:2]).clamp(min=0).prod(), (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)


def _same_object(box: Tensor, is_cut: Tensor, boxes: Tensor, cut: Tensor, min_iou: float) -> Tensor:
    """True for boxes `[n, 4]` of the same object as a box `[4]`: those that overlap it, or are parts of it cut off."""
    shared, area, areas = _areas(box, boxes)
    overlaps = shared >= min_iou * (area + areas - shared).clamp(min=_TINY)
    inside = shared >= min_iou * torch.minimum(area, areas).clamp(min=_TINY)
    return overlaps | (inside & (cut | is_cut))

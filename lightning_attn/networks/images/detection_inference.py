"""From a detector to the objects of an image: as a whole or in overlapping tiles, mirrored images, several scales."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as transforms

from lightning_attn.attention.checks import is_number, require_int
from lightning_attn.networks.segmentation_inference import tile_spans

Mode = Literal["whole", "sliding"]
Detection: TypeAlias = dict[str, Tensor]

Network: TypeAlias = Callable[[list[Tensor]], Sequence[Detection]]
"""Maps images, uint8 `[3, H, W]` each, to boxes, labels and scores of each: a `Detector` in evaluation mode."""


@dataclasses.dataclass(frozen=True)
class DetectionInferenceSpec:
    """How the objects of an image are found. The default looks at each image once, as a whole.

    What is found in all views of an image is put together: of two detections of a class, the one with the lower score
    is dropped where they overlap by `merge_iou`, or where most of one lies in the other and one of them is cut by the
    border of a tile.

    Attributes:
        mode: `"whole"`, or `"sliding"` for overlapping square tiles *and* the whole image, for small objects in large
            images: these should then not be scaled down (`--data.min_size 0 --data.max_size 0`).
        tile: Height and width of a tile in pixels of the image that the network gets.
        overlap: Share of a tile, along each axis, that the next one covers again at least.
        flip: Whether the mirror image of each view is looked at too.
        scales: Factors by which images are resized, each a view.
        merge_iou: Intersection over union from which the worse of two detections of a class is dropped.
        detections: Detections of an image at most.

    Raises:
        ValueError: If a field has a value that cannot be; the message names the field and the way out.
    """

    mode: Mode = "whole"
    tile: int = 800
    overlap: float = 0.25
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    merge_iou: float = 0.5
    detections: int = 100

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"inference.mode must be one of {list(get_args(Mode))}, got {self.mode!r}.")
        require_int("inference.tile", self.tile)
        require_int("inference.detections", self.detections)
        if not (is_number(self.overlap) and 0 <= self.overlap < 1) or math.ceil(self.tile * self.overlap) >= self.tile:
            raise ValueError(
                f"inference.overlap must be at least 0 and so far below 1 that a step is left from one tile of "
                f"{self.tile} pixels to the next, got {self.overlap!r}."
            )
        if not isinstance(self.flip, bool):
            raise ValueError(f"inference.flip must be true or false, got {self.flip!r}.")
        if not (is_number(self.merge_iou) and 0 < self.merge_iou <= 1):
            raise ValueError(f"inference.merge_iou must be above 0 and at most 1, got {self.merge_iou!r}.")
        if not (
            isinstance(self.scales, Sequence)
            and self.scales
            and all(is_number(scale) and math.isfinite(scale) and scale > 0 for scale in self.scales)
        ):
            raise ValueError(
                f"inference.scales must be a list of positive numbers such as [0.75, 1.0, 1.25], got {self.scales!r}."
            )

    @property
    def looks_once(self) -> bool:
        """Whether there is one view of an image, the image itself."""
        return self.mode == "whole" and not self.flip and set(self.scales) == {1}

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, fit for YAML and for checkpoints."""
        return dataclasses.asdict(self)


@torch.no_grad()
def detect(network: Network, images: Sequence[Tensor], spec: DetectionInferenceSpec) -> list[Detection]:
    """Finds the objects of images.

    Args:
        network: The detector.
        images: RGB, uint8, `[3, H, W]` each; there may be none. They go through the network together if each is looked
            at once, and otherwise one after another.
        spec: How it is done.

    Returns:
        For each image `boxes` `[n, 4]` in its pixels, `labels` `[n]` and `scores` `[n]`, best first.
    """
    if not images:
        return []
    if spec.looks_once:
        return list(network(list(images)))
    return [_merged(list(_views(network, image, spec)), spec) for image in images]


def _views(network: Network, image: Tensor, spec: DetectionInferenceSpec) -> Iterator[Detection]:
    """What is found in each view, in pixels of the image; `cut` says which boxes end where a tile does."""
    height, width = image.shape[1:]
    for scale in spec.scales:
        size = [max(1, round(scale * length)) for length in (height, width)]
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
    """The whole image, and its tiles if there are several."""
    tiles = [(slice(0, size[0]), slice(0, size[1]))]
    if spec.mode == "sliding":
        rows, columns = (tile_spans(length, spec.tile, spec.overlap) for length in size)
        if len(rows) * len(columns) > 1:
            tiles += [(row, column) for row in rows for column in columns]
    return tiles


def _cut(boxes: Tensor, row: slice, column: slice, size: Sequence[int]) -> Tensor:
    """Which boxes touch a border of their tile inside the image, where their object may go on, `[n]`."""
    cut = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for span, length, low, high in ((column, size[1], 0, 2), (row, size[0], 1, 3)):
        if span.start > 0:
            cut |= boxes[:, low] <= span.start + 1
        if span.stop < length:
            cut |= boxes[:, high] >= span.stop - 1
    return cut


def _merged(views: list[Detection], spec: DetectionInferenceSpec) -> Detection:
    """Of two detections of one object, from whatever views, the better."""
    boxes, labels, scores, cut = (
        torch.cat([view[key] for view in views]) for key in ("boxes", "labels", "scores", "cut")
    )
    order = scores.argsort(descending=True, stable=True)
    boxes, labels, scores, cut = boxes[order], labels[order], scores[order], cut[order]
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)
    iou = box_iou(boxes, boxes)
    sums = areas[:, None] + areas
    inside = (iou / (1 + iou) * sums) / torch.minimum(areas[:, None], areas).clamp(min=1e-6)
    same = labels[:, None] == labels
    drops = same & ((iou >= spec.merge_iou) | ((inside >= spec.merge_iou) & (cut[:, None] | cut)))
    kept: list[int] = []
    alive = torch.ones(len(boxes), dtype=torch.bool)
    drops = drops.cpu()
    for place in range(len(boxes)):
        if alive[place]:
            kept.append(place)
            alive &= ~drops[place]
            if len(kept) == spec.detections:
                break
    chosen = torch.tensor(kept, dtype=torch.int64, device=boxes.device)
    return {"boxes": boxes[chosen], "labels": labels[chosen], "scores": scores[chosen]}

"""COCO's average precision of resampled test sets: detections are matched once, and accumulated again for each set."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from lightning_attn.metrics.bootstrap import Counts, Replicates

__all__ = ["resampled_average_precision"]

Flags: TypeAlias = npt.NDArray[np.bool_]
Numbers: TypeAlias = npt.NDArray[np.float64]
Detections: TypeAlias = tuple[Numbers, npt.NDArray[np.int64], Numbers]
"""Boxes, category ids and scores of an image, as `ImageDetections` has them."""

_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the IoU
_RECALLS = torch.linspace(0.0, 1.0, 101, dtype=torch.float64)
_MAX_DETECTIONS = 100  # of a category in an image
_CHUNK = 4_000_000  # sets x detections at a time: 16 MB an array


@dataclass(frozen=True)
class _Category:
    """The detections of a category in all images, from the highest score to the lowest.

    Attributes:
        images: Index of each detection's image, `[D]`.
        right: Whether it is a true positive at each IoU threshold, `[10, D]`.
        wrong: Whether it is a false positive; neither if it lies in a crowd.
        objects: Number of objects in each image, without crowds, `[N]`.
    """

    images: npt.NDArray[np.int64]
    right: Flags
    wrong: Flags
    objects: npt.NDArray[np.int64]


def resampled_average_precision(
    annotations: Sequence[Mapping[str, Any]], detections: Mapping[int, Detections], counts: Counts
) -> dict[str, Replicates]:
    """AP, AP50 and AP75 of resampled sets of images.

    As COCO's evaluator computes them for a set in which image i (in the order of ids) occurs `counts[r, i]` times: a
    category counts if the set has an object of it. NaN for a set without objects.

    Args:
        annotations: Of COCO's files; those of other images are ignored.
        detections: Of the scored images by id.
        counts: `[R, number of images]`.

    Returns:
        `ap`, `ap50` and `ap75`, `[R]` each.
    """
    total, number = np.zeros((len(counts), len(_THRESHOLDS))), np.zeros((len(counts), 1))
    for category in _matched(annotations, detections):
        step = max(1, _CHUNK // max(1, len(category.images)))
        for first in range(0, len(counts), step):
            rows = slice(first, first + step)
            total[rows] += _average_precision(category, counts[rows])
        number[:, 0] += counts @ category.objects > 0
    with np.errstate(invalid="ignore"):
        mean = total / number
    return {"ap": mean.mean(axis=1), "ap50": mean[:, 0], "ap75": mean[:, 5]}


def _average_precision(category: _Category, counts: Counts) -> Numbers:
    """Mean precision at 101 recalls for each set and threshold, `[R, 10]`; 0 without detections or objects."""
    mean = np.zeros((len(counts), len(_THRESHOLDS)))
    objects = torch.from_numpy((counts @ category.objects).astype(np.float64))[:, None]
    weights = torch.from_numpy(counts[:, category.images].astype(np.float32))  # sums are exact up to 2^24
    counted = weights.cumsum(1)
    for number, (right, wrong) in enumerate(zip(category.right, category.wrong, strict=True)):
        places = torch.from_numpy(np.flatnonzero(right))  # the highest precision of any recall is at a true positive
        if not len(places):
            continue
        ignored = torch.from_numpy(~(right | wrong))
        before = counted if not ignored.any() else weights.masked_fill(ignored, 0.0).cumsum(1)
        found = weights[:, places].cumsum(1)
        precision = (found.double() / before[:, places].clamp(min=1.0)).flip(1).cummax(1).values.flip(1)
        recall = found.double() / objects.clamp(min=1.0)
        first = torch.searchsorted(recall, _RECALLS.expand(len(counts), -1).contiguous())
        reached = first < len(places)
        at_recalls = precision.gather(1, first.clamp_(max=len(places) - 1)) * reached
        mean[:, number] = (at_recalls.mean(1) * (objects[:, 0] > 0)).numpy()
    return mean


def _matched(annotations: Sequence[Mapping[str, Any]], detections: Mapping[int, Detections]) -> Iterator[_Category]:
    """The outcomes of all detections, for each category that has an object in these images."""
    index = {image: number for number, image in enumerate(sorted(detections))}
    objects: dict[int, dict[int, list[Mapping[str, Any]]]] = {}
    for one in annotations:
        if one["image_id"] in index:
            objects.setdefault(one["category_id"], {}).setdefault(one["image_id"], []).append(one)
    found: dict[int, list[tuple[int, Numbers, Flags, Flags]]] = {category: [] for category in objects}
    for image, number in index.items():
        boxes, categories, scores = detections[image]
        for category in set(categories.tolist()) & objects.keys():
            chosen = np.flatnonzero(categories == category)[:_MAX_DETECTIONS]
            outcomes = _outcomes(boxes[chosen], objects[category].get(image, []))
            found[category].append((number, scores[chosen], *outcomes))
    for category in sorted(objects):
        numbers = np.zeros(len(index), dtype=np.int64)
        for image, truth in objects[category].items():
            numbers[index[image]] = sum(not one["iscrowd"] for one in truth)
        if numbers.any():
            yield _sorted(found[category], numbers)


def _sorted(found: Sequence[tuple[int, Numbers, Flags, Flags]], objects: npt.NDArray[np.int64]) -> _Category:
    """Joins the images' detections: index, scores, true and false positives of each."""
    none: Flags = np.zeros((len(_THRESHOLDS), 0), dtype=bool)
    scores = np.concatenate([np.zeros(0), *(one[1] for one in found)])
    order = np.argsort(-scores, kind="stable")  # equal scores in the order of images, as in COCO's
    images = np.repeat([one[0] for one in found], [len(one[1]) for one in found]).astype(np.int64)
    right = np.concatenate([none, *(one[2] for one in found)], axis=1)
    wrong = np.concatenate([none, *(one[3] for one in found)], axis=1)
    return _Category(images[order], right[:, order], wrong[:, order], objects)


def _outcomes(boxes: Numbers, truth: Sequence[Mapping[str, Any]]) -> tuple[Flags, Flags]:
    """Which detections of an image, the best first, are true and which are false positives, `[10, n]` each.

    Each takes the free object that it overlaps most, or else a crowd, in which it does not count.
    """
    right = np.zeros((len(_THRESHOLDS), len(boxes)), dtype=bool)
    wrong = np.ones_like(right)
    if not len(boxes) or not truth:
        return right, wrong
    overlaps = _overlaps(boxes, truth)
    crowd = np.array([bool(one["iscrowd"]) for one in truth])
    free = np.broadcast_to(~crowd, (len(_THRESHOLDS), len(truth))).copy()
    rows = np.arange(len(_THRESHOLDS))
    for number, overlap in enumerate(overlaps):
        enough = overlap >= _THRESHOLDS[:, None]
        candidates = np.where(enough & free, overlap, -1.0)
        best = candidates.shape[1] - 1 - candidates[:, ::-1].argmax(axis=1)  # the last of equal ones, as in COCO's
        hit = candidates[rows, best] >= 0
        right[:, number] = hit
        free[rows[hit], best[hit]] = False
        wrong[:, number] = ~hit & ~(enough & crowd).any(axis=1)
    return right, wrong


def _overlaps(boxes: Numbers, truth: Sequence[Mapping[str, Any]]) -> Numbers:
    """IoU of detections and objects, `[n, objects]`; for a crowd the part of the detection that lies in it."""
    left, top, width, height = np.array([one["bbox"] for one in truth], dtype=np.float64).T
    crowd = np.array([bool(one["iscrowd"]) for one in truth])
    x1, y1, x2, y2 = boxes.T[:, :, None]
    across = (np.minimum(x2, left + width) - np.maximum(x1, left)).clip(min=0.0)
    down = (np.minimum(y2, top + height) - np.maximum(y1, top)).clip(min=0.0)
    area, common = (x2 - x1) * (y2 - y1), across * down
    whole = np.where(crowd, area, area + width * height - common)
    overlaps: Numbers = np.divide(common, whole, out=np.zeros_like(common), where=whole > 0)
    return overlaps

"""Analysis of a detector's errors: confusion matrix, precision-recall curves, and the images with most errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lightning_attn.metrics.detection import ImageDetections

__all__ = ["DetectionAnalysis", "ImageErrors", "Outcome", "PrecisionCurve", "analyse_detections"]

Numbers = npt.NDArray[np.float64]

Outcome = Literal["right", "wrong category", "not detected", "no object", "crowd"]
"""The outcome of an object or a detection; those of a crowd are ignored."""


@dataclass(frozen=True)
class ImageErrors:
    """The errors in an image.

    Attributes:
        image_id: Its id.
        right: Number of objects detected with their category.
        confused: Number of objects detected with another category.
        missed: Number of objects that were not detected.
        invented: Number of detections without an object (false positives).
        detections: Outcome of each detection with at least `min_score`, in their order.
        objects: Outcome of each object, in the order of the annotations.
    """

    image_id: int
    right: int
    confused: int
    missed: int
    invented: int
    detections: tuple[Outcome, ...] = ()
    objects: tuple[Outcome, ...] = ()

    @property
    def errors(self) -> int:
        """Number of all errors."""
        return self.confused + self.missed + self.invented


@dataclass(frozen=True)
class PrecisionCurve:
    """Precision and recall of a category by score threshold.

    Attributes:
        scores: Of the detections, descending, `[n]`.
        precision: Fraction of true positives among the detections up to each, `[n]`.
        recall: Fraction of the objects that these detect, `[n]`.
        num_objects: Number of objects.
    """

    scores: Numbers
    precision: Numbers
    recall: Numbers
    num_objects: int


@dataclass(frozen=True)
class DetectionAnalysis:
    """The errors of a detector in a set of images, at one intersection over union.

    Attributes:
        names: Names of the K categories.
        confusion: Number of objects of a category (row) detected as another (column), `[K + 1, K + 1]`; the last row
            is for detections without an object, the last column for objects that were not detected.
        curves: The precision-recall curve of each category.
        images: The errors in each image, most first.
        min_score: Detections of a lower score are used in the curves only.
        min_iou: Minimum intersection over union of a match.
    """

    names: tuple[str, ...]
    confusion: npt.NDArray[np.int64]
    curves: dict[str, PrecisionCurve]
    images: list[ImageErrors]
    min_score: float
    min_iou: float


def analyse_detections(
    ground_truth: Mapping[str, Any],
    detections: Mapping[int, ImageDetections],
    *,
    min_score: float,
    min_iou: float = 0.5,
) -> DetectionAnalysis:
    """Matches detections with objects, image by image.

    For confusion and errors, detections with at least `min_score` are matched, the best first, with the unmatched
    object of any category that they overlap most, if by at least `min_iou`. For the curves, all detections are matched
    with objects of their category, as in COCO's evaluation. Detections that match only a crowd are ignored.

    Args:
        ground_truth: `images`, `annotations` and `categories` as in COCO's annotation files.
        detections: Of every evaluated image, by image id.
        min_score: See above.
        min_iou: See above.
    """
    categories = sorted(ground_truth["categories"], key=lambda one: one["id"])
    label_of = {one["id"]: label for label, one in enumerate(categories)}
    names = tuple(one["name"] for one in categories)
    background = len(names)
    objects: dict[int, list[Mapping[str, Any]]] = {}
    for one in ground_truth["annotations"]:
        objects.setdefault(one["image_id"], []).append(one)
    confusion = np.zeros((background + 1, background + 1), dtype=np.int64)
    hits: list[list[tuple[float, bool]]] = [[] for _ in names]
    counts = np.zeros(background, dtype=np.int64)
    images = []
    for image_id, found in detections.items():
        truth = objects.get(image_id, [])
        true_boxes = np.array([one["bbox"] for one in truth], dtype=np.float64).reshape(-1, 4)
        true_boxes[:, 2:] += true_boxes[:, :2]
        true_labels = np.array([label_of[one["category_id"]] for one in truth], dtype=np.int64)
        crowd = np.array([bool(one["iscrowd"]) for one in truth], dtype=np.bool_)
        counts += np.bincount(true_labels[~crowd], minlength=background)
        labels = np.array([label_of[number] for number in found.category_ids.tolist()], dtype=np.int64)
        overlaps = _overlaps(found.boxes, true_boxes, crowd)
        for label in set(labels.tolist()):
            of_label, objects_of_label = np.flatnonzero(labels == label), true_labels == label
            matched = _match(overlaps[of_label][:, objects_of_label], crowd[objects_of_label], min_iou)
            hits[label] += [
                (float(found.scores[index]), match >= 0)
                for index, match in zip(of_label, matched.tolist(), strict=True)
                if match != _CROWD
            ]
        confident = found.scores >= min_score
        matched = _match(overlaps[confident], crowd, min_iou)
        pairs = [(labels[confident][index], match) for index, match in enumerate(matched.tolist()) if match != _CROWD]
        missed = sorted(set(np.flatnonzero(~crowd).tolist()) - {match for _, match in pairs})
        for predicted, match in pairs:
            confusion[background if match < 0 else true_labels[match], predicted] += 1
        for index in missed:
            confusion[true_labels[index], background] += 1
        detected = [
            _outcome(int(predicted), match, true_labels)
            for predicted, match in zip(labels[confident], matched.tolist(), strict=True)
        ]
        object_outcomes: list[Outcome] = ["crowd" if one else "not detected" for one in crowd.tolist()]
        for outcome, match in zip(detected, matched.tolist(), strict=True):
            if match >= 0:
                object_outcomes[match] = outcome
        images.append(
            ImageErrors(
                image_id,
                detected.count("right"),
                detected.count("wrong category"),
                len(missed),
                detected.count("no object"),
                tuple(detected),
                tuple(object_outcomes),
            )
        )
    curves = {name: _curve(one, int(count)) for name, one, count in zip(names, hits, counts, strict=True)}
    images.sort(key=lambda one: (-one.errors, one.image_id))
    return DetectionAnalysis(names, confusion, curves, images, min_score, min_iou)


_CROWD = -2


def _outcome(predicted: int, match: int, true_labels: npt.NDArray[np.int64]) -> Outcome:
    if match == _CROWD:
        return "crowd"
    if match < 0:
        return "no object"
    return "right" if true_labels[match] == predicted else "wrong category"


def _match(overlaps: Numbers, crowd: npt.NDArray[np.bool_], min_iou: float) -> npt.NDArray[np.int64]:
    """The index of the object that each detection is matched with, -1 for none, -2 for a crowd, `[n]`."""
    matched = np.full(len(overlaps), -1, dtype=np.int64)
    free = ~crowd
    for index, row in enumerate(overlaps):
        if not len(row):
            continue
        best = int(np.where(free, row, -1.0).argmax())
        if free[best] and row[best] >= min_iou:
            matched[index], free[best] = best, False
        elif crowd.any() and row[crowd].max() >= min_iou:
            matched[index] = _CROWD
    return matched


def _overlaps(boxes: Numbers, true_boxes: Numbers, crowd: npt.NDArray[np.bool_]) -> Numbers:
    """Intersection over union of detections and objects, for crowds over the detection's area, `[n, m]`."""
    low = np.maximum(boxes[:, None, :2], true_boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], true_boxes[None, :, 2:])
    common = np.prod(np.maximum(0.0, high - low), axis=2)
    areas, true_areas = (np.prod(one[:, 2:] - one[:, :2], axis=1) for one in (boxes, true_boxes))
    union = np.where(crowd[None], areas[:, None], areas[:, None] + true_areas[None] - common)
    return np.asarray(common / np.maximum(union, 1e-12))


def _curve(hits: Sequence[tuple[float, bool]], num_objects: int) -> PrecisionCurve:
    ordered = sorted(hits, key=lambda hit: -hit[0])
    right = np.cumsum([hit for _, hit in ordered], dtype=np.float64)
    count = np.arange(1, len(ordered) + 1)
    return PrecisionCurve(
        np.array([score for score, _ in ordered]),
        right / count if len(ordered) else right,
        right / num_objects if num_objects else np.full(len(ordered), np.nan),
        num_objects,
    )

"""What a detector gets wrong: confusion of categories, precision by recall, and the images with most errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lightning_attn.metrics.detection import ImageDetections

__all__ = ["DetectionAnalysis", "ImageErrors", "Outcome", "PrecisionCurve", "analyse_detections"]

Numbers = npt.NDArray[np.float64]

Outcome = Literal["right", "wrong category", "not detected", "no object", "crowd"]
"""What became of an object or a detection; what belongs to a crowd does not count."""


@dataclass(frozen=True)
class ImageErrors:
    """How well the objects of an image were found.

    Attributes:
        image_id: Its id.
        right: Objects that were found with their category.
        confused: Objects that were found with another category.
        missed: Objects that were not found.
        invented: Detections of no object.
        detections: What each detection of the image with at least the least score is, in their order.
        objects: What became of each object of the image, in the order of the annotations.
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
        """All that is wrong."""
        return self.confused + self.missed + self.invented


@dataclass(frozen=True)
class PrecisionCurve:
    """Precision and recall of a category as ever more detections count, from the best on.

    Attributes:
        scores: Of the detections, descending, `[n]`.
        precision: Share of right ones among the detections up to each, `[n]`.
        recall: Share of the objects that are found by them, `[n]`.
        num_objects: How many there are to find.
    """

    scores: Numbers
    precision: Numbers
    recall: Numbers
    num_objects: int


@dataclass(frozen=True)
class DetectionAnalysis:
    """What a detector gets wrong in a set of images, at one intersection over union.

    Attributes:
        names: Names of the K categories.
        confusion: How many objects of a category (row) were detected as which (column), `[K + 1, K + 1]`; the last row
            are detections of no object, the last column objects that were not detected.
        curves: Precision by recall of each category.
        images: The errors in each image, most first.
        min_score: Detections of a lower score count in the curves alone.
        min_iou: Detections and objects belong together from this intersection over union on.
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

    For confusion and errors, detections with at least `min_score` take, from the best on, the object of any category
    that they overlap most and that is not taken, if by at least `min_iou`. For the curves, all detections do, among the
    objects of their category, as in COCO's evaluation. Detections that match a crowd alone count nowhere.

    Args:
        ground_truth: `images`, `annotations` and `categories` as in COCO's annotation files.
        detections: Of every image that counts, by image id.
        min_score: See above.
        min_iou: See above.
    """
    categories = sorted(ground_truth["categories"], key=lambda one: one["id"])
    place = {one["id"]: index for index, one in enumerate(categories)}
    names = tuple(one["name"] for one in categories)
    nothing = len(names)
    objects: dict[int, list[Mapping[str, Any]]] = {}
    for one in ground_truth["annotations"]:
        objects.setdefault(one["image_id"], []).append(one)
    confusion = np.zeros((nothing + 1, nothing + 1), dtype=np.int64)
    hits: list[list[tuple[float, bool]]] = [[] for _ in names]
    counts = np.zeros(nothing, dtype=np.int64)
    images = []
    for image_id, found in detections.items():
        truth = objects.get(image_id, [])
        true_boxes = np.array([one["bbox"] for one in truth], dtype=np.float64).reshape(-1, 4)
        true_boxes[:, 2:] += true_boxes[:, :2]
        true_places = np.array([place[one["category_id"]] for one in truth], dtype=np.int64)
        crowd = np.array([bool(one["iscrowd"]) for one in truth], dtype=np.bool_)
        counts += np.bincount(true_places[~crowd], minlength=nothing)
        places = np.array([place[number] for number in found.category_ids.tolist()], dtype=np.int64)
        overlaps = _overlaps(found.boxes, true_boxes, crowd)
        for category in set(places.tolist()):
            own, theirs = np.flatnonzero(places == category), true_places == category
            matched = _matched(overlaps[own][:, theirs], crowd[theirs], min_iou)
            hits[category] += [
                (float(found.scores[index]), match >= 0)
                for index, match in zip(own, matched.tolist(), strict=True)
                if match != _CROWD
            ]
        shown = found.scores >= min_score
        matched = _matched(overlaps[shown], crowd, min_iou)
        pairs = [(places[shown][index], match) for index, match in enumerate(matched.tolist()) if match != _CROWD]
        missed = sorted(set(np.flatnonzero(~crowd).tolist()) - {match for _, match in pairs})
        for predicted, match in pairs:
            confusion[nothing if match < 0 else true_places[match], predicted] += 1
        for index in missed:
            confusion[true_places[index], nothing] += 1
        detected = [
            _outcome(int(predicted), match, true_places)
            for predicted, match in zip(places[shown], matched.tolist(), strict=True)
        ]
        of_objects: list[Outcome] = ["crowd" if one else "not detected" for one in crowd.tolist()]
        for outcome, match in zip(detected, matched.tolist(), strict=True):
            if match >= 0:
                of_objects[match] = outcome
        images.append(
            ImageErrors(
                image_id,
                detected.count("right"),
                detected.count("wrong category"),
                len(missed),
                detected.count("no object"),
                tuple(detected),
                tuple(of_objects),
            )
        )
    curves = {name: _curve(one, int(count)) for name, one, count in zip(names, hits, counts, strict=True)}
    images.sort(key=lambda one: (-one.errors, one.image_id))
    return DetectionAnalysis(names, confusion, curves, images, min_score, min_iou)


_CROWD = -2


def _outcome(predicted: int, match: int, true_places: npt.NDArray[np.int64]) -> Outcome:
    if match == _CROWD:
        return "crowd"
    if match < 0:
        return "no object"
    return "right" if true_places[match] == predicted else "wrong category"


def _matched(overlaps: Numbers, crowd: npt.NDArray[np.bool_], min_iou: float) -> npt.NDArray[np.int64]:
    """The object that each detection takes, from the best on; -1 for none, -2 for one of a crowd, `[n]`."""
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
    """Intersection over union of detections and objects, or for a crowd over the detection, `[n, m]`."""
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

"""Labels of points in a plot, placed so that they cover neither each other nor points."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Box", "Label", "place_labels"]

Box = tuple[float, float, float, float]  # left, top, right, bottom

_DISTANCES = (4.0, 9.0, 16.0, 26.0, 38.0, 52.0, 70.0, 92.0)
_DIRECTIONS = 16
_PASSES = 4
_OUTSIDE, _ON_LABEL, _ON_POINT, _ON_LINE = 1e6, 60.0, 30.0, 0.8  # costs of a square pixel


@dataclasses.dataclass(frozen=True)
class Label:
    """A text near a point.

    Attributes:
        x: Of the point.
        y: Of the point.
        width: Of the text.
        height: Of the text.
    """

    x: float
    y: float
    width: float
    height: float


def place_labels(labels: Sequence[Label], points: Sequence[Box], lines: Sequence[Box], bounds: Box) -> list[Box]:
    """Chooses a box for each label: greedily, then improved in turn.

    Args:
        labels: What is placed, the most important first.
        points: What must not be covered.
        lines: What is better not covered, such as intervals.
        bounds: What must not be left.

    Returns:
        The boxes, in the order of `labels`.
    """
    candidates = [_candidates(label) for label in labels]
    fixed = [
        _excess(boxes, bounds) * _OUTSIDE
        + _overlap(boxes, _array(points)) * _ON_POINT
        + _overlap(boxes, _array(lines)) * _ON_LINE
        + distance
        for boxes, distance in candidates
    ]
    chosen: list[int | None] = [None] * len(labels)
    for _ in range(_PASSES):
        before = list(chosen)
        for place, (boxes, _) in enumerate(candidates):
            others = [
                candidates[other][0][choice]
                for other, choice in enumerate(chosen)
                if choice is not None and other != place
            ]
            cost = fixed[place] + _overlap(_grown(boxes, 1.5), np.array(others).reshape(-1, 4)) * _ON_LABEL
            chosen[place] = int(cost.argmin())
        if chosen == before:
            break
    found = []
    for (boxes, _), choice in zip(candidates, chosen, strict=True):
        left, top, right, bottom = boxes[choice or 0].tolist()
        found.append((left, top, right, bottom))
    return found


def _candidates(label: Label) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Boxes around a point, `[C, 4]`, and what their distances cost."""
    boxes, costs = [], []
    for distance in _DISTANCES:
        for step in range(_DIRECTIONS):
            angle = 2 * math.pi * step / _DIRECTIONS
            across, down = math.cos(angle), math.sin(angle)
            # The nearest point of the box lies in that direction.
            x = label.x + across * (distance + 4) + (across - 1) / 2 * label.width
            y = label.y + down * (distance + 4) + (down - 1) / 2 * label.height
            boxes.append((x, y, x + label.width, y + label.height))
            costs.append(distance * 1.4 + (0.0 if across > 0.9 else 2.0 + 2.0 * (across < -0.1)))
    return np.array(boxes), np.array(costs)


def _array(boxes: Sequence[Box]) -> npt.NDArray[np.float64]:
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def _grown(boxes: npt.NDArray[np.float64], by: float) -> npt.NDArray[np.float64]:
    grown: npt.NDArray[np.float64] = boxes + np.array([-by, -by, by, by])
    return grown


def _overlap(boxes: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Area of each box, `[C, 4]`, that others, `[M, 4]`, cover, `[C]`."""
    reach_low, reach_high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    others = others[((others[:, 2:] > reach_low) & (others[:, :2] < reach_high)).all(-1)]
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    area: npt.NDArray[np.float64] = np.clip(high - low, 0, None).prod(-1).sum(-1)
    return area


def _excess(boxes: npt.NDArray[np.float64], bounds: Box) -> npt.NDArray[np.float64]:
    """How far each box leaves the bounds, `[C]`."""
    left, top, right, bottom = bounds
    beyond = np.stack([left - boxes[:, 0], top - boxes[:, 1], boxes[:, 2] - right, boxes[:, 3] - bottom], -1)
    total: npt.NDArray[np.float64] = np.clip(beyond, 0, None).sum(-1)
    return total

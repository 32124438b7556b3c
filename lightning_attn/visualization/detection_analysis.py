"""Figures of a detector's errors: confusion of categories, precision and recall."""

import numpy as np
from matplotlib.figure import Figure

from lightning_attn.metrics.detection_analysis import DetectionAnalysis

__all__ = ["draw_confusion", "draw_precision"]

_MAX_CURVES = 10
_MAX_NUMBERS = 25  # categories up to which the numbers are written into the matrix


def draw_confusion(analysis: DetectionAnalysis) -> Figure:
    """Draws the confusion matrix of categories: fractions of each row in colour, and counts."""
    size = len(analysis.names) + 1
    side = min(20.0, 2.5 + 0.5 * size)
    figure = Figure(figsize=(side + 1.5, side), dpi=110, layout="compressed")
    axes = figure.subplots()
    counts = analysis.confusion
    fractions = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    image = axes.imshow(fractions, vmin=0, vmax=1, cmap="Blues")
    small = max(4.0, min(9.0, 180 / size))
    axes.set_xticks(range(size), [*analysis.names, "not detected"], rotation=90, fontsize=small)
    axes.set_yticks(range(size), [*analysis.names, "no object"], fontsize=small)
    axes.set_xlabel("detected as")
    axes.set_ylabel("object")
    axes.set_title(f"score at least {analysis.min_score:g}, IoU at least {analysis.min_iou:g}", fontsize=9, loc="left")
    if size <= _MAX_NUMBERS:
        for row in range(size):
            for column in range(size):
                if counts[row, column]:
                    colour = "white" if fractions[row, column] > 0.6 else "black"
                    text = f"{counts[row, column]:,}"
                    axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=small)
    figure.colorbar(image, ax=axes, label="fraction of the row", shrink=0.8)
    return figure


def draw_precision(analysis: DetectionAnalysis) -> Figure:
    """Draws precision over recall, and both over the score threshold, of the categories with most objects."""
    figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = sorted(analysis.curves.items(), key=lambda pair: -pair[1].num_objects)
    drawn = [(name, curve) for name, curve in curves if curve.num_objects][:_MAX_CURVES]
    for number, (name, curve) in enumerate(drawn):
        colour = f"C{number}"
        left.plot(curve.recall, curve.precision, color=colour, label=f"{name} ({curve.num_objects:,})")
        right.plot(curve.scores, curve.precision, color=colour)
        right.plot(curve.scores, curve.recall, color=colour, linestyle="--")
    omitted = sum(bool(curve.num_objects) for _, curve in curves) - len(drawn)
    left.set_title(f"{omitted} categories with fewer objects are omitted" if omitted else "", fontsize=9, loc="left")
    left.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.01))
    right.set(xlabel="score threshold", xlim=(0, 1.01), ylim=(0, 1.01))
    right.set_title(f"precision (solid) and recall (dashed), IoU at least {analysis.min_iou:g}", fontsize=9, loc="left")
    if drawn:
        figure.legend(fontsize=8, loc="outside right upper", title="objects", title_fontsize=8, frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure

"""Writes the detections of a prediction, and the error analysis of a test."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from lightning_attn.io import write_figure, write_file, write_table
from lightning_attn.metrics.detection_analysis import DetectionAnalysis
from lightning_attn.tasks.prediction_files import Results, write_json_list
from lightning_attn.visualization.detection_analysis import draw_confusion, draw_precision

__all__ = ["write_analysis", "write_detections"]

_CSV_COLUMNS = ("file_name", "category", "score", "x1", "y1", "x2", "y2")


def write_detections(folder: Path, results: Results, names: Mapping[int, str]) -> Path:
    """Writes `detections.json`, `detections.csv` and `images.json` from the results of all ranks.

    Args:
        folder: The folder to write to.
        results: Of each image `id`, `file_name` and `detections`.
        names: Names of the categories by their ids.

    Returns:
        Path of `detections.json`.

    Raises:
        OSError: If they cannot be written.
    """
    detections = (record for image in results for record in image["detections"])
    path = write_file(folder / "detections.json", lambda file: write_json_list(file, detections))
    images = ({"id": image["id"], "file_name": image["file_name"]} for image in results)
    write_file(folder / "images.json", lambda file: write_json_list(file, images))
    write_file(folder / "detections.csv", lambda file: _write_csv(file, results, names))
    return path


def _write_csv(file: BinaryIO, images: Results, names: Mapping[int, str]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text)
    writer.writerow(_CSV_COLUMNS)
    for image in images:
        for one in image["detections"]:
            x, y, width, height = one["bbox"]
            corners = (x, y, x + width, y + height)
            rounded = [f"{value:.2f}" for value in corners]
            writer.writerow((image["file_name"], names[one["category_id"]], f"{one['score']:.4f}", *rounded))
    text.flush()
    text.detach()


def write_analysis(folder: Path, analysis: DetectionAnalysis, file_names: Mapping[int, str]) -> None:
    """Writes tables and figures of an error analysis.

    Args:
        folder: The folder to write to.
        analysis: The analysis.
        file_names: Names of the images by their ids.
    """
    write_table(
        folder / "confusion.csv",
        ("object", *analysis.names, "not detected"),
        [(name, *row) for name, row in zip((*analysis.names, "no object"), analysis.confusion.tolist(), strict=True)],
    )
    curves = [
        (name, f"{score:.6f}", f"{precision:.6f}", f"{recall:.6f}")
        for name, curve in analysis.curves.items()
        for score, precision, recall in zip(curve.scores, curve.precision, curve.recall, strict=True)
    ]
    write_table(folder / "precision_recall.csv", ("category", "score", "precision", "recall"), curves)
    images = [
        (one.image_id, file_names[one.image_id], one.right, one.confused, one.missed, one.invented)
        for one in analysis.images
    ]
    header = ("image_id", "file_name", "right", "wrong category", "not detected", "no object")
    write_table(folder / "images.csv", header, images)
    for name, figure in (("confusion", draw_confusion(analysis)), ("precision_recall", draw_precision(analysis))):
        write_figure(folder / f"{name}.png", figure)

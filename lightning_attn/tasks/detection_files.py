"""Files about detections: those of a prediction, written as they come, and what is wrong with those of a test."""

import csv
import functools
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from matplotlib.figure import Figure

from lightning_attn.files import write_file, write_table
from lightning_attn.metrics.detection import CocoRecord
from lightning_attn.metrics.detection_analysis import DetectionAnalysis
from lightning_attn.visualization.detection_analysis import draw_confusion, draw_precision

__all__ = ["DetectionFiles", "write_analysis"]

_CSV_COLUMNS = ("file_name", "category", "score", "x1", "y1", "x2", "y2")


class DetectionFiles:
    """What was detected in many images, in a file of each rank until all are done; memory does not grow with it.

    A prediction that is broken off leaves these files, which have a line of JSON for each image.

    Args:
        folder: Where the files of all ranks are; it is made.
        rank: Number of this rank.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self._path = folder / f"rank-{rank}.jsonl"
        self._file: TextIO | None = None

    def add(self, image_id: int, file_name: str, records: list[CocoRecord]) -> None:
        """Writes the detections of an image.

        Args:
            image_id: Its id.
            file_name: Its name.
            records: What was detected.
        """
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8")
        line = {"id": image_id, "file_name": file_name, "detections": records}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def flush(self) -> None:
        """Hands what was added to the system."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Ends writing; every rank does this before one joins the files."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def join(self, names: Mapping[int, str]) -> tuple[Path, int]:
        """Makes `detections.json`, `detections.csv` and `images.json` beside the folder out of the files of all ranks.

        Args:
            names: Names of the categories by their ids.

        Returns:
            Path of the first, and how many images there are.

        Raises:
            OSError: If they cannot be written; the files of the ranks are kept then.
        """
        parts = sorted(self.folder.glob("rank-*.jsonl")) if self.folder.is_dir() else []
        images = _Images(parts)
        beside = self.folder.parent
        path = write_file(beside / "detections.json", lambda file: _write_list(file, images.detections()))
        write_file(beside / "images.json", lambda file: _write_list(file, images.names()))
        write_file(beside / "detections.csv", lambda file: _write_csv(file, images, names))
        for part in parts:
            part.unlink()
        if self.folder.is_dir():
            self.folder.rmdir()
        return path, len(images)


class _Images:
    """The images in the files of all ranks, each once and in the order of their ids; only places are in memory."""

    def __init__(self, parts: list[Path]) -> None:
        self._places: dict[int, tuple[Path, int]] = {}
        for path in parts:
            with path.open("rb") as file:
                place = 0
                for line in file:
                    self._places.setdefault(json.loads(line)["id"], (path, place))
                    place += len(line)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        files: dict[Path, BinaryIO] = {}
        try:
            for _, (path, place) in sorted(self._places.items()):
                file = files.get(path) or files.setdefault(path, path.open("rb"))
                file.seek(place)
                yield json.loads(file.readline())
        finally:
            for file in files.values():
                file.close()

    def detections(self) -> Iterator[CocoRecord]:
        """The records of all images."""
        for image in self:
            yield from image["detections"]

    def names(self) -> Iterator[dict[str, Any]]:
        """Id and name of each image."""
        for image in self:
            yield {"id": image["id"], "file_name": image["file_name"]}


def _write_list(file: BinaryIO, values: Iterator[Any]) -> None:
    """A JSON list with one value in a line."""
    file.write(b"[")
    for number, value in enumerate(values):
        file.write(b",\n" if number else b"\n")
        file.write(json.dumps(value, ensure_ascii=False).encode())
    file.write(b"\n]\n")


def _write_csv(file: BinaryIO, images: _Images, names: Mapping[int, str]) -> None:
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
    """Tables and figures of what is wrong.

    Args:
        folder: Where they are written.
        analysis: What is wrong.
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
        write_file(folder / f"{name}.png", functools.partial(_save_figure, figure))


def _save_figure(figure: Figure, file: BinaryIO) -> None:
    figure.savefig(file, format="png")

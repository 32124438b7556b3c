"""Tiny segmentation data in the layout of Cityscapes, made with a seed: rectangles in the colours of their classes."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.segmentation.classes import CITYSCAPES_CLASSES

COUNTS = {"train": 7, "val": 5}
CITIES = ("aachen", "bochum", "ulm")
SIZES = ((40, 64),)  # height, width
UNLABELLED, PARKING = 0, 9  # ids that do not count
IDS = (UNLABELLED, 7, 8, PARKING, 11, 21, 23, 24, 26, 33)


def write_cityscapes(
    root: Path,
    counts: Mapping[str, int] = COUNTS,
    *,
    sizes: Sequence[tuple[int, int]] = SIZES,
    kind: str = "gtFine",
    seed: int = 0,
) -> Path:
    """Writes splits of so many images, dealt out to cities; what does not count is black. Returns `root`."""
    for split, count in counts.items():
        generator = np.random.default_rng((seed, *split.encode()))
        for number in range(count):
            height, width = sizes[number % len(sizes)]
            ids = np.zeros((height, width), dtype=np.uint8)
            for _ in range(8):
                top, left = generator.integers(0, height - 4), generator.integers(0, width - 4)
                rows, columns = generator.integers(4, 1 + max(height, width) // 2, 2)
                ids[top : top + rows, left : left + columns] = generator.choice(IDS)
            write_sample(root, split, number, colours_of(ids), ids, kind)
    return root


def write_sample(
    root: Path, split: str, number: int, pixels: np.ndarray, ids: np.ndarray, kind: str = "gtFine"
) -> None:
    for path, values in ((image_path(root, split, number), pixels), (label_path(root, split, number, kind), ids)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)


def truth_from_predictions(root: Path, predictions: Path, target: Path, split: str = "test") -> Path:
    """A copy of the data in which a split is labelled as predicted in its upper half: with scores above zero however
    little the network has learned."""
    shutil.copytree(root, target)
    for predicted in predictions.glob("*_pred_labelIds.png"):
        (path,) = target.glob(f"gtFine/{split}/*/{predicted.name.replace('_pred_', '_gtFine_')}")
        with Image.open(predicted) as found, Image.open(path) as labels:
            ids = np.array(labels)
            ids[: len(ids) // 2] = np.array(found)[: len(ids) // 2]
        Image.fromarray(ids).save(path)
    return target


def name_of(split: str, number: int) -> str:
    """Numbers are dealt out to cities, so the sorted order of files is another one: see `names_of`."""
    return f"{CITIES[number % len(CITIES)]}_{sum(split.encode()):06d}_{number:06d}"


def names_of(split: str, count: int) -> list[str]:
    """The names of a split, sorted as on the disk."""
    return sorted(name_of(split, number) for number in range(count))


def image_path(root: Path, split: str, number: int) -> Path:
    name = name_of(split, number)
    return root / "leftImg8bit" / split / name.split("_")[0] / f"{name}_leftImg8bit.png"


def label_path(root: Path, split: str, number: int, kind: str = "gtFine") -> Path:
    name = name_of(split, number)
    return root / kind / split / name.split("_")[0] / f"{name}_{kind}_labelIds.png"


def colours_of(ids: np.ndarray) -> np.ndarray:
    """The colours of ids, `[H, W, 3]`; black for those that do not count."""
    table = np.zeros((256, 3), dtype=np.uint8)
    for one in CITYSCAPES_CLASSES:
        table[one.id] = one.colour
    return table[ids]

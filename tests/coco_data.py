"""Tiny detection data in the layout of COCO, made with a seed: bright rectangles on dark noise."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = {1: "person", 13: "stop sign", 90: "toothbrush"}
COLOURS = {1: (250, 10, 10), 13: (10, 250, 10), 90: (10, 10, 250)}
SIZES = ((40, 60), (60, 40), (36, 48), (50, 50))  # height, width
COUNTS = {"train2017": 11, "val2017": 5}
FIRST_IDS = {"train2017": 100, "val2017": 500, "test2017": 900}


def write_coco(root: Path, counts: Mapping[str, int] = COUNTS, seed: int = 0) -> Path:
    """Writes splits of so many images. The fourth image of each has no box, and the second has a crowd."""
    for split, count in counts.items():
        generator = np.random.default_rng((seed, FIRST_IDS[split]))
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            height, width = SIZES[number % len(SIZES)]
            image_id = FIRST_IDS[split] + 3 * number
            pixels = generator.integers(0, 40, (height, width, 3), dtype=np.uint8)
            name = f"{image_id:012d}.png"
            for _ in range(0 if number == 3 else 1 + number % 3):
                w, h = generator.integers(6, 16, 2).tolist()
                x, y = int(generator.integers(0, width - w)), int(generator.integers(0, height - h))
                category = int(generator.choice(list(CATEGORIES)))
                pixels[y : y + h, x : x + w] = COLOURS[category]
                annotations.append(annotation(len(annotations) + 1, image_id, category, [x, y, w, h]))
            if number == 1:
                annotations.append(annotation(len(annotations) + 1, image_id, 1, [0, 0, 30, 30], iscrowd=1))
            Image.fromarray(pixels).save(root / split / name)
            images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        content = {
            "info": {},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for number, name in reversed(CATEGORIES.items())],
        }
        annotation_path(root, split).parent.mkdir(exist_ok=True)
        annotation_path(root, split).write_text(json.dumps(content))
    return root


def annotation(number: int, image_id: int, category: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    x, y, w, h = bbox
    outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    entry = {"id": number, "image_id": image_id, "category_id": category, "bbox": bbox, "segmentation": outline}
    return {**entry, "area": w * h * 0.75, "iscrowd": 0, **more}


def annotation_path(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def read_coco(root: Path, split: str) -> dict[str, Any]:
    return json.loads(annotation_path(root, split).read_text())


def truth_from_detections(root: Path, split: str, detections: list[dict[str, Any]], target: Path) -> Path:
    """A copy of the data whose boxes are some that a network found, moved by a pixel or by half: with scores above zero
    however little the network has learned."""
    shutil.copytree(root, target)

    def change(content: dict[str, Any]) -> None:
        content["annotations"] = []
        for image in content["images"]:
            found = [one for one in detections if one["image_id"] == image["id"] and min(one["bbox"][2:]) > 4]
            found.sort(key=lambda one: -one["score"])
            for rank, one in enumerate(found[:6:2]):
                x, y, w, h = one["bbox"]
                box = [x + (1 if rank < 2 else w / 2), y, w, h]
                number = len(content["annotations"]) + 1
                content["annotations"].append(annotation(number, image["id"], one["category_id"], box))

    change_coco(target, split, change)
    return target


def change_coco(root: Path, split: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """Applies a change to an annotation file."""
    content = read_coco(root, split)
    change(content)
    path = annotation_path(root, split)
    path.write_text(json.dumps(content))
    return path

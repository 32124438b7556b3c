"""The streets of the miniature segmentation set with boxes, in the layout of COCO: detection for a joint training.

The pictures are those of `miniature/segmentation.py`, pixel by pixel, so that one network can be trained on
their labels and on these boxes. The categories are traffic sign, person, car, truck and bus; as there, a sign in the
sky decides which of the last two a large vehicle is. A box is that of an object's visible pixels. What is hidden but
for a few pixels is annotated as a crowd, which neither is learnt nor counts.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_attn.datamodules.miniature.files import check_counts, coco_image, write_coco_part, write_generated
from lightning_attn.datamodules.miniature.segmentation import (
    COUNTABLE,
    DRAWING_VERSION,
    MINIATURE_PICTURES,
    StreetObject,
    draw_picture,
)

__all__ = ["write_miniature_street_detection"]

BOXES_VERSION = 1  # increase with every change of annotations
MANIFEST_NAME = "miniature_street_detection.json"

_FIRST_ID = {"train": 100_001, "val": 200_001, "test": 300_001}
_LEAST_AREA = 12  # pixels


def write_miniature_street_detection(root: Path, counts: Mapping[str, int] | None = None) -> None:
    """Writes the set in COCO's layout: `root/annotations/instances_{train,val,test}2017.json` and the pictures.

    Arguments and errors are those of `write_miniature_segmentation`.
    """
    counts = MINIATURE_PICTURES if counts is None else counts
    check_counts("counts", counts, MINIATURE_PICTURES)
    write_generated(
        Path(root),
        functools.partial(_write_parts, counts=counts),
        settings={"drawing": DRAWING_VERSION, "boxes": BOXES_VERSION, "counts": dict(counts)},
        libraries=("numpy", "pillow", "scikit-image"),
        owned=[
            *(f"{part}2017" for part in MINIATURE_PICTURES),
            *(f"annotations/instances_{part}2017.json" for part in MINIATURE_PICTURES),
        ],
        stale=[f"{part}2017/{'[0-9]' * 12}.png" for part in MINIATURE_PICTURES],
        manifest_name=MANIFEST_NAME,
        what="miniature set",
    )


def _write_parts(folder: Path, counts: Mapping[str, int]) -> None:
    for part, count in counts.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            picture, image_id = draw_picture(part, index), _FIRST_ID[part] + index
            images.append(coco_image(folder, part, image_id, picture.pixels))
            annotations += [_annotation(one, image_id, number) for number, one in enumerate(picture.objects, start=1)]
        content = {
            "info": {"description": f"Miniature streets with boxes, {part}", "version": str(BOXES_VERSION)},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": label_id, "name": name} for label_id, name in COUNTABLE.items()],
        }
        write_coco_part(folder, part, content)


def _annotation(one: StreetObject, image_id: int, number: int) -> dict[str, Any]:
    left, top, right, bottom = one.box
    return {
        "id": image_id * 1000 + number,
        "image_id": image_id,
        "category_id": one.label_id,
        "iscrowd": int(one.area < _LEAST_AREA),
        "bbox": [left, top, right - left, bottom - top],
        "area": one.area,
    }

"""COCO data in other layouts, for tests: Pascal VOC, YOLO and Roboflow's export."""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from coco_data import annotation_path


def _content(root: Path, split: str) -> dict[str, Any]:
    return json.loads(annotation_path(root, split).read_text())


def _objects(content: dict[str, Any], image_id: int) -> list[dict[str, Any]]:
    return [one for one in content["annotations"] if one["image_id"] == image_id]


def write_voc(root: Path, target: Path, splits: Mapping[str, str], corners_from: int = 1) -> Path:
    """COCO's splits (keys) under the names of VOC's (values); crowds are difficult."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (target / folder).mkdir(parents=True, exist_ok=True)
    for split, name in splits.items():
        content = _content(root, split)
        names = {one["id"]: one["name"] for one in content["categories"]}
        stems = []
        for image in content["images"]:
            stem = Path(image["file_name"]).stem
            stems.append(stem)
            shutil.copy(root / split / image["file_name"], target / "JPEGImages")
            tree = ElementTree.Element("annotation")
            ElementTree.SubElement(tree, "filename").text = image["file_name"]
            size = ElementTree.SubElement(tree, "size")
            for side in ("width", "height"):
                ElementTree.SubElement(size, side).text = str(image[side])
            for one in _objects(content, image["id"]):
                entry = ElementTree.SubElement(tree, "object")
                ElementTree.SubElement(entry, "name").text = names[one["category_id"]]
                ElementTree.SubElement(entry, "difficult").text = str(one["iscrowd"])
                box = ElementTree.SubElement(entry, "bndbox")
                x, y, w, h = one["bbox"]
                corners = {"xmin": x + corners_from, "ymin": y + corners_from, "xmax": x + w, "ymax": y + h}
                for key, value in corners.items():
                    ElementTree.SubElement(box, key).text = repr(value)
            ElementTree.ElementTree(tree).write(target / "Annotations" / f"{stem}.xml")
        (target / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))
    return target


def write_yolo(root: Path, target: Path, splits: Mapping[str, str]) -> Path:
    """COCO's splits (keys) under the names of YOLO's (values), with the paths as exports write them; without crowds."""
    names: list[str] = []
    for split, name in splits.items():
        content = _content(root, split)
        categories = sorted(content["categories"], key=lambda one: one["id"])
        names = [one["name"] for one in categories]
        place = {one["id"]: number for number, one in enumerate(categories)}
        shutil.copytree(root / split, target / name / "images")
        labels = target / name / "labels"
        labels.mkdir()
        for image in content["images"]:
            width, height = image["width"], image["height"]
            lines = []
            for one in _objects(content, image["id"]):
                x, y, w, h = one["bbox"]
                if not one["iscrowd"]:
                    numbers = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
                    lines.append(" ".join(map(repr, (place[one["category_id"]], *numbers))))
            if lines:
                (labels / f"{Path(image['file_name']).stem}.txt").write_text("\n".join(lines) + "\n")
    description = {name: f"../{name}/images" for name in splits.values()} | {"nc": len(names), "names": names}
    (target / "data.yaml").write_text(yaml.safe_dump(description))
    return target


def write_roboflow(root: Path, target: Path, splits: Mapping[str, str]) -> Path:
    """COCO's splits (keys) under the names of Roboflow's (values), with the category above all that it adds."""
    for split, name in splits.items():
        content = _content(root, split)
        shutil.copytree(root / split, target / name)
        categories = sorted(content["categories"], key=lambda one: one["id"])
        place = {one["id"]: number for number, one in enumerate(categories, start=1)}
        content["categories"] = [{"id": 0, "name": "things", "supercategory": "none"}] + [
            {"id": place[one["id"]], "name": one["name"], "supercategory": "things"} for one in categories
        ]
        for one in content["annotations"]:
            one["category_id"] = place[one["category_id"]]
        (target / name / "_annotations.coco.json").write_text(json.dumps(content))
    return target

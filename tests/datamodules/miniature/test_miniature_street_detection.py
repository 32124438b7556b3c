"""Boxes of the miniature streets, compared with the labels of their pixels."""

import json

import numpy as np
import pytest
from PIL import Image

from datamodules import MiniatureStreetDetectionDataModule
from datamodules.miniature.segmentation import COUNTABLE, draw_picture, write_miniature_segmentation
from datamodules.miniature.street_detection import write_miniature_street_detection

TINY = {"train": 5, "val": 2, "test": 1}


@pytest.mark.parametrize("part", ["train", "val"])
def test_boxes_are_those_of_the_labelled_pixels(part):
    """Of each class, up to the seams around later objects, which have no label."""
    counted = 0
    for index in range(12):
        picture = draw_picture(part, index)
        for label_id in COUNTABLE:
            mask = picture.label_ids == label_id
            covered = np.zeros_like(mask)
            for one in (one for one in picture.objects if one.label_id == label_id):
                left, top, right, bottom = one.box
                covered[top:bottom, left:right] = True
                assert 0 < one.area <= (right - left) * (bottom - top)
                counted += 1
            assert not (mask & ~covered).any()
            areas = sum(one.area for one in picture.objects if one.label_id == label_id)
            assert mask.sum() <= areas <= 1.5 * mask.sum() + 40
    assert counted > 20


def test_the_sign_decides_the_category_and_no_box():
    for index in range(8):
        sun, moon = (draw_picture("train", index, moon=one).objects for one in (False, True))
        assert [(one.box, one.area) for one in sun] == [(one.box, one.area) for one in moon]
        names = [[COUNTABLE[one.label_id] for one in objects] for objects in (sun, moon)]
        assert names[1] == ["truck" if name == "bus" else name for name in names[0]]


def test_pictures_are_those_of_the_segmentation_set(tmp_path):
    write_miniature_segmentation(tmp_path / "labels", TINY)
    write_miniature_street_detection(tmp_path / "boxes", TINY)
    for part in TINY:
        streets = [
            np.asarray(Image.open(path)).tobytes() for path in (tmp_path / "labels/leftImg8bit" / part).rglob("*.png")
        ]
        content = json.loads((tmp_path / f"boxes/annotations/instances_{part}2017.json").read_text())
        pictures = [
            np.asarray(Image.open(tmp_path / f"boxes/{part}2017" / one["file_name"])).tobytes()
            for one in content["images"]
        ]
        assert sorted(streets) == sorted(pictures)
        assert len(pictures) == TINY[part]


def test_the_data_module_reads_them(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "datamodules.miniature.street_detection_datamodule.write_miniature_street_detection",
        lambda root: write_miniature_street_detection(root, TINY),
    )
    data = MiniatureStreetDetectionDataModule(str(tmp_path), batch_size=5)
    data.prepare_data()
    data.setup("fit")
    assert data.categories == data.read_categories()
    batch = next(iter(data.train_dataloader()))
    assert [tuple(image.shape) for image in batch.images] == [(3, 96, 192)] * 5
    assert all(len(target["boxes"]) for target in batch.targets)

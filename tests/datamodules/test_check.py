"""The command that looks through all data before a long run."""

import numpy as np
import pytest
from cityscapes_data import label_path, write_cityscapes
from coco_data import CATEGORIES, write_coco
from data_layouts import write_yolo
from PIL import Image

from datamodules import CityscapesDataModule, COCODataModule, MiniatureTranslationDataModule
from datamodules.check import check_data, main


def arguments(root, name, *more):
    values = [f"--data={name}", f"--data.root={root}", *more]
    return [*values, f"--output={root.parent / 'data.png'}"]


def facts(report):
    return dict(report.facts)


def test_detection_data_are_counted(tmp_path):
    root = write_coco(tmp_path / "data")
    train, val = check_data(COCODataModule(str(root), min_size=20, max_size=0), workers=0)
    module = COCODataModule(str(root), min_size=20, max_size=0)
    module.setup("fit")
    annotations = module.annotations("train")
    assert (train.name, val.name) == ("train2017", "val2017")
    assert facts(train)["images"] == "11"
    assert facts(train)["annotations"] == str(len(annotations.labels))
    assert facts(train)["images without a box"] == "1"
    assert facts(train)["boxes of crowds"] == "1"
    labels = annotations.labels[~annotations.crowd].tolist()
    assert train.classes == {name: labels.count(place + 1) for place, name in enumerate(sorted_names())}
    assert len(train.distributions["boxes per image"]) == 11
    assert not train.problems


def sorted_names():
    return [CATEGORIES[number] for number in sorted(CATEGORIES)]


def test_damaged_files_are_named_and_end_with_a_status(tmp_path, capsys):
    root = write_coco(tmp_path / "data")
    victims = sorted((root / "train2017").iterdir())[2:4]
    for path in victims:
        path.write_bytes(path.read_bytes()[:150])  # the header is whole
    with pytest.raises(SystemExit) as stopped:
        main(arguments(root, "COCODataModule", "--workers=2"))
    assert stopped.value.code == 2
    output = capsys.readouterr().out
    for path in victims:
        assert f"{path.name}: image id" in output
    assert "2 files cannot be used" in output
    assert (tmp_path / "data.png").read_bytes().startswith(b"\x89PNG")


def test_files_whose_headers_are_damaged_are_all_named(tmp_path, capsys):
    root = write_yolo(write_coco(tmp_path / "coco"), tmp_path / "yolo", {"train2017": "train", "val2017": "val"})
    victims = sorted((root / "train" / "images").iterdir())[2:4]
    for path in victims:
        path.write_bytes(b"")
    with pytest.raises(SystemExit) as stopped:
        main(arguments(root, "YOLODetectionDataModule"))
    assert stopped.value.code == 2
    output = capsys.readouterr().out
    assert all(path.name in output for path in victims)
    assert "2 files cannot be used" in output


def test_segmentation_data_are_counted(tmp_path, capsys):
    root = write_cityscapes(tmp_path / "data")
    (train, _) = check_data(CityscapesDataModule(str(root)), workers=0)
    module = CityscapesDataModule(str(root), crop_size=0)
    module.setup("validate")
    pixels = np.concatenate([np.array(Image.open(label_path(root, "train", number))).ravel() for number in range(7)])
    road = 100 * float((pixels == 7).mean())
    assert train.classes["road"] == pytest.approx(road)
    assert facts(train)["images"] == "7"
    main(arguments(root, "CityscapesDataModule"))
    assert "0 files cannot be used" in capsys.readouterr().out


def test_translation_data_are_counted(tmp_path):
    root = tmp_path / "corpus"
    module = MiniatureTranslationDataModule(str(root), vocabulary_size=400)
    train, valid, test = check_data(module)
    assert facts(train)["pairs"] == f"{len(module.dataset('train')):,}"
    assert valid.name == "valid"
    assert facts(test)["unknown pieces of the source"].startswith("0 of ")


def test_other_data_are_refused(tmp_path):
    import pytorch_lightning as pl

    with pytest.raises(ValueError, match="LightningDataModule cannot be checked"):
        check_data(pl.LightningDataModule())


def test_missing_data_end_with_a_message(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments(tmp_path / "nowhere", "COCODataModule"))
    assert stopped.value.code == 2
    assert "error: root: the folder" in capsys.readouterr().err

"""Detection data in the layouts of VOC, YOLO and Roboflow, and several data sets as one."""

import json

import numpy as np
import pytest
import yaml
from coco_data import CATEGORIES, write_coco
from data_layouts import write_roboflow, write_voc, write_yolo

from datamodules import (
    Augmentation,
    COCODataModule,
    MergedDetectionDataModule,
    VOCDetectionDataModule,
    YOLODetectionDataModule,
)
from datamodules.images.files import ImageError

SPLITS = {"train2017": "train", "val2017": "val"}
SIZE = {"min_size": 30, "max_size": 0, "augmentation": Augmentation(horizontal_flip=0.0)}
OWN_SPLITS = {"train_split": "train", "val_split": "val"}


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("layouts") / "coco")


def ready(module, stage="fit"):
    module.prepare_data()
    module.setup(stage)
    return module


def targets_by_name(module, split):
    """What training sees of each image, by its file name: size, boxes and names of classes."""
    annotations = module.annotations(split)
    found = {}
    for index in range(len(annotations)):
        boxes, labels = annotations.targets(index)
        names = [annotations.categories.names[label - 1] for label in labels]
        found[annotations.names[index].rpartition("/")[2]] = (tuple(annotations.sizes[index]), boxes, names)
    return found


def assert_same_targets(module, reference):
    for split in ("train", "val"):
        ours, theirs = targets_by_name(module, split), targets_by_name(reference, split)
        assert ours.keys() == theirs.keys()
        for name, (size, boxes, names) in theirs.items():
            assert ours[name][0] == size
            assert ours[name][2] == names
            np.testing.assert_allclose(ours[name][1], boxes, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def reference(coco):
    return ready(COCODataModule(str(coco), **SIZE))


def test_voc_gives_the_same_targets(coco, reference, tmp_path):
    root = write_voc(coco, tmp_path / "voc", SPLITS)
    module = ready(VOCDetectionDataModule(str(root), **SIZE))
    assert set(module.categories.names) == set(CATEGORIES.values())
    assert list(module.categories.names) == sorted(module.categories.names), "classes of one's own, by the alphabet"
    assert_same_targets(module, reference)
    crowds = [bool(module.annotations(split).crowd.any()) for split in ("train", "val")]
    assert crowds == [True, True], "difficult objects are crowds"


def test_voc_coordinates_from_zero(coco, reference, tmp_path):
    root = write_voc(coco, tmp_path / "voc", SPLITS, corners_from=0)
    assert_same_targets(ready(VOCDetectionDataModule(str(root), corners_from=0, **SIZE)), reference)


def test_yolo_gives_the_same_targets(coco, reference, tmp_path):
    root = write_yolo(coco, tmp_path / "yolo", SPLITS)
    module = ready(YOLODetectionDataModule(str(root), **SIZE))
    assert module.categories.names == tuple(CATEGORIES[number] for number in sorted(CATEGORIES))
    assert module.categories.ids == (0, 1, 2)
    assert_same_targets(module, reference)


def test_yolo_names_as_a_mapping_and_validation_under_another_name(coco, reference, tmp_path):
    root = write_yolo(coco, tmp_path / "yolo", {"train2017": "train", "val2017": "valid"})
    text = (root / "data.yaml").read_text()
    names = "names:\n  0: person\n  1: stop sign\n  2: toothbrush\n"
    (root / "data.yaml").write_text(text[: text.index("names:")] + names + text[text.index("nc:") :])
    assert_same_targets(ready(YOLODetectionDataModule(str(root), **SIZE)), reference)


def test_yolo_outlines_become_the_boxes_around_them(coco, tmp_path):
    root = write_yolo(coco, tmp_path / "yolo", SPLITS)
    label = sorted((root / "train" / "labels").iterdir())[0]
    label.write_text("1 0.25 0.5 0.75 0.5 0.5 0.25 0.5 0.75\n")
    module = ready(YOLODetectionDataModule(str(root), **SIZE))
    size, boxes, names = targets_by_name(module, "train")[f"{label.stem}.png"]
    height, width = size
    np.testing.assert_allclose(boxes, [[width / 4, height / 4, 3 * width / 4, 3 * height / 4]], atol=1e-4)
    assert names == ["stop sign"]


def test_roboflow_is_found_by_itself_without_its_root_category(coco, reference, tmp_path, caplog):
    root = write_roboflow(coco, tmp_path / "roboflow", {"train2017": "train", "val2017": "valid"})
    module = ready(COCODataModule(str(root), train_split="train", val_split="valid", **SIZE))
    assert module.categories.names == tuple(CATEGORIES[number] for number in sorted(CATEGORIES))
    assert_same_targets(module, reference)


def test_annotation_files_and_folders_by_options(coco, reference, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    files = {}
    for split, name in SPLITS.items():
        (moved / name).symlink_to(coco / split)
        (moved / f"{name}_labels.json").write_bytes((coco / "annotations" / f"instances_{split}.json").read_bytes())
        files |= {f"{name}_annotations": f"{name}_labels.json", f"{name}_images": name}
    assert_same_targets(ready(COCODataModule(str(moved), **files, **SIZE)), reference)
    with pytest.raises(ValueError, match=r"train_images: it is empty, but train_annotations is given"):
        COCODataModule(str(moved), train_annotations="train_labels.json")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("data.yaml", "train: train/images\n", "names is None; it must be a list"),
        ("data.yaml", "names: [a, a, b]\ntrain: train/images\n", "the ids 0, 1 all have the name 'a'"),
        ("data.yaml", "names: [a, b]\nnc: 3\ntrain: train/images\n", "nc is 3, but there are 2 names"),
        ("data.yaml", "names: [a]\ntrain: no/such\n", "names 'no/such', and none of .* exists"),
        ("data.yaml", "names: [a]\ntest: train/images\n", "names no split 'train', but test"),
        ("labels", "0 0.5 0.5 0.5\n", "line 1: '0 0.5 0.5 0.5' is neither a class with"),
        ("labels", "7 0.5 0.5 0.5 0.5\n", "has the class 7, but data.yaml names the classes 0 to 2"),
        ("labels", "0 50 50 20 20\n", "has numbers far above 1"),
        ("labels", "0 nan 0.5 0.2 0.2\n", "is neither a class with"),
    ],
)
def test_bad_yolo_files_are_named(coco, tmp_path, file, text, message):
    root = write_yolo(coco, tmp_path / "yolo", SPLITS)
    path = root / file if file == "data.yaml" else sorted((root / "train" / "labels").iterdir())[0]
    path.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        ready(YOLODetectionDataModule(str(root), **SIZE))
    assert path.name in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", "is not a complete XML file"),
        ("<kml/>", "holds <kml>, not the <annotation>"),
        ("<annotation><object/></annotation>", "object 1 has no name"),
        (
            "<annotation><object><name>person</name><bndbox><xmin>a</xmin></bndbox></object></annotation>",
            r"object 1 \(person\) has bndbox/xmin 'a'; it must be a finite number",
        ),
    ],
)
def test_bad_voc_files_are_named(coco, tmp_path, text, message):
    root = write_voc(coco, tmp_path / "voc", SPLITS)
    path = sorted((root / "Annotations").iterdir())[0]
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        ready(VOCDetectionDataModule(str(root), **SIZE))
    assert path.name in str(error.value)


def test_what_voc_lacks_is_named(coco, tmp_path):
    root = write_voc(coco, tmp_path / "voc", SPLITS)
    with pytest.raises(
        FileNotFoundError, match=r"train_split: .*trainval.txt does not exist; .* holds train.txt, val.txt"
    ):
        ready(VOCDetectionDataModule(str(root), train_split="trainval", **SIZE))
    gone = sorted((root / "Annotations").iterdir())[0]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of the 11 images .* have no annotation .*: {gone.name}"):
        ready(VOCDetectionDataModule(str(root), **SIZE))
    with pytest.raises(ValueError, match=r"not among the classes person"):
        ready(VOCDetectionDataModule(str(write_voc(coco, tmp_path / "b", SPLITS)), classes=("person",), **SIZE))


# Several as one


def test_merged_sets_have_the_images_and_classes_of_all(coco, reference, tmp_path):
    other = write_coco(tmp_path / "other", seed=1)
    path = other / "annotations" / "instances_train2017.json"
    for split in ("train2017", "val2017"):
        path = other / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        for one in content["categories"]:
            one["name"] = {"person": "human", "stop sign": "stop sign", "toothbrush": "comb"}[one["name"]]
        path.write_text(json.dumps(content))
    second = ready(COCODataModule(str(other), **SIZE))
    members = [COCODataModule(str(coco), **SIZE), COCODataModule(str(other), **SIZE)]
    merged = ready(MergedDetectionDataModule(members, rename={"human": "person"}, **SIZE))
    assert merged.categories.names == ("person", "stop sign", "toothbrush", "comb")
    for split in ("train", "val"):
        found = merged.annotations(split)
        first = len(reference.annotations(split))
        assert len(found) == first + len(second.annotations(split))
        for index in range(first):
            boxes, labels = reference.annotations(split).targets(index)
            np.testing.assert_array_equal(found.targets(index)[0], boxes)
            np.testing.assert_array_equal(found.targets(index)[1], labels)
        for index in range(len(second.annotations(split))):
            boxes, labels = second.annotations(split).targets(index)
            np.testing.assert_array_equal(found.targets(first + index)[0], boxes)
            np.testing.assert_array_equal(found.targets(first + index)[1], np.array([1, 2, 4])[labels - 1])
    batch = next(iter(merged.val_dataloader()))
    assert batch.names[0].endswith(".png")


def test_weights_of_members_are_how_often_their_images_come(coco, tmp_path):
    other = write_coco(tmp_path / "other", seed=1)
    members = [COCODataModule(str(root), keep_empty=True, **SIZE) for root in (coco, other)]
    merged = ready(MergedDetectionDataModule(members, (2.0, 0.5), keep_empty=True, batch_size=1, **SIZE))
    loader = merged.train_dataloader()
    counts = np.zeros(22)
    for epoch in range(20):
        for batch in loader.batch_sampler.plan(epoch, range(len(loader.batch_sampler))):
            for request in batch:
                counts[request.index] += 1
    assert len(loader) == round(11 * 2 + 11 * 0.5)
    np.testing.assert_allclose(counts[:11] / 20, 2.0, atol=0.15)
    np.testing.assert_allclose(counts[11:].mean() / 20, 0.5, atol=0.05)


def test_rare_classes_come_more_often(coco):
    module = ready(COCODataModule(str(coco), repeat_threshold=1.0, **SIZE))
    annotations, dataset = module.annotations("train"), module.training_dataset()
    with_class = {
        label: sum(label in annotations.targets(index)[1] for index in range(len(annotations))) for label in (1, 2, 3)
    }
    for image, index in enumerate(dataset.chosen):
        labels = set(annotations.targets(index)[1].tolist())
        expected = max(np.sqrt(len(annotations) / with_class[label]) for label in labels)
        assert dataset.repeats[image] == pytest.approx(expected)


def test_images_whose_size_cannot_be_read_are_skipped_by_name(coco, tmp_path, caplog):
    for root, kind, images in (
        (write_yolo(coco, tmp_path / "yolo", SPLITS), YOLODetectionDataModule, "train/images"),
        (write_voc(coco, tmp_path / "voc", SPLITS), VOCDetectionDataModule, "JPEGImages"),
    ):
        for path in (root / "Annotations").glob("*.xml"):  # without a size, as some tools leave it out
            text = path.read_text()
            path.write_text(text[: text.index("<size>")] + text[text.index("</size>") + 7 :])
        victim = sorted((coco / "train2017").iterdir())[1].name
        (root / images / victim).write_bytes(b"")
        with pytest.raises(ImageError, match=victim):
            ready(kind(str(root), **SIZE))
        module = ready(kind(str(root), on_bad_image="skip", **SIZE))
        assert [image.name for image in module.unreadable] == [victim]
        assert victim in caplog.text
        names = [module.annotations("train").names[index] for index in range(len(module.annotations("train")))]
        assert len(names) == len(list((coco / "train2017").iterdir())) - 1
        assert victim not in names
        batches = list(module.train_dataloader())
        assert not [bad for batch in batches for bad in batch.bad]


def test_yolo_keypoints_are_no_outlines(coco, tmp_path):
    root = write_yolo(coco, tmp_path / "yolo", SPLITS)
    boxes = ready(YOLODetectionDataModule(str(root), **SIZE)).annotations("train").bboxes
    for path in root.glob("*/labels/*.txt"):
        path.write_text("".join(f"{line}{' 0.45 0.45' * 4}\n" for line in path.read_text().splitlines()))
    (root / "data.yaml").write_text((root / "data.yaml").read_text() + "kpt_shape: [4, 2]\n")
    np.testing.assert_array_equal(ready(YOLODetectionDataModule(str(root), **SIZE)).annotations("train").bboxes, boxes)
    (root / "data.yaml").write_text((root / "data.yaml").read_text() + "kpt_shape: [5, 2]\n")
    with pytest.raises(ValueError, match=r"has 13 numbers, but kpt_shape in data.yaml asks for 5 and 10"):
        ready(YOLODetectionDataModule(str(root), **SIZE))


def test_yolo_names_are_as_they_are_written(coco, tmp_path):
    root = write_yolo(coco, tmp_path / "yolo", SPLITS)
    description = yaml.safe_load((root / "data.yaml").read_text())
    paths = "".join(f"{split}: {description[split]}\n" for split in ("train", "val"))
    (root / "data.yaml").write_text(f"{paths}names: [no, 007, 1]\n")
    assert ready(YOLODetectionDataModule(str(root / "data.yaml"), **SIZE)).categories.names == ("no", "007", "1")


def test_a_wrong_path_of_yolo_finds_no_other_folder(coco, tmp_path):
    root = write_yolo(coco, tmp_path / "yolo", SPLITS)
    (root / "images").mkdir()
    description = yaml.safe_load((root / "data.yaml").read_text())
    (root / "data.yaml").write_text(yaml.safe_dump(description | {"val": "valid/images"}))
    with pytest.raises(FileNotFoundError, match=r"names 'valid/images', and none of"):
        ready(YOLODetectionDataModule(str(root), **SIZE))
    (root / "data.yaml").write_text(yaml.safe_dump(description | {"val": "/content/set/val/images"}))
    assert len(ready(YOLODetectionDataModule(str(root), **SIZE)).annotations("val")) == 5


def test_yolo_without_any_label_says_where_they_are_looked_for(coco, tmp_path):
    root = write_yolo(coco, tmp_path / "yolo", SPLITS)
    (root / "train" / "labels").rename(root / "train" / "Labels")
    with pytest.raises(FileNotFoundError, match=r"has a file of labels, such as .*train/labels/.*\.txt"):
        ready(YOLODetectionDataModule(str(root), **SIZE))


def test_linked_folders_belong_to_a_set(coco, tmp_path):
    root = write_yolo(coco, tmp_path / "yolo", SPLITS)
    count = len(list((root / "train" / "images").iterdir()))
    for kind in ("images", "labels"):
        (root / "train" / kind).rename(tmp_path / f"elsewhere_{kind}")
        (root / "train" / kind).mkdir()
        (root / "train" / kind / "sequence").symlink_to(tmp_path / f"elsewhere_{kind}")
    (tmp_path / "elsewhere_images" / "again").symlink_to(root / "train" / "images")  # must end
    names = ready(YOLODetectionDataModule(str(root), **SIZE)).annotations("train").names
    assert sorted(names[index] for index in range(len(names))) == sorted(
        path.name for path in (tmp_path / "elsewhere_images").iterdir() if path.is_file()
    )
    assert len(names) == count


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_text_of_another_encoding_is_named(coco, tmp_path, encoding):
    root = write_yolo(coco, tmp_path / "yolo", SPLITS)
    path = next((root / "train" / "labels").iterdir())
    path.write_text(path.read_text() + "é", encoding=encoding)
    with pytest.raises(ValueError, match=rf"{path.name} is not UTF-8 \(byte [0-9]+\).*Save it as UTF-8"):
        ready(YOLODetectionDataModule(str(root), **SIZE))
    root = write_voc(coco, tmp_path / "voc", SPLITS)
    path = sorted((root / "Annotations").iterdir())[0]
    path.write_bytes(b'<?xml version="1.0" encoding="utf8mb4"?>' + path.read_bytes())
    with pytest.raises(ValueError, match=f"{path.name} cannot be read"):
        ready(VOCDetectionDataModule(str(root), **SIZE))


def test_voc_names_with_blanks(coco, reference, tmp_path):
    root = write_voc(coco, tmp_path / "voc", SPLITS)
    for path in [*(root / "Annotations").iterdir(), *(root / "JPEGImages").iterdir()]:
        path.rename(path.with_name(f"street {path.name}"))
        (root / "JPEGImages" / f"street {path.stem}.json").write_text("{}")
    for path in (root / "ImageSets" / "Main").iterdir():
        path.write_text("".join(f"street {line}  1\n" for line in path.read_text().split()))
    module = ready(VOCDetectionDataModule(str(root), **SIZE))
    assert len(module.annotations("train")) == len(reference.annotations("train"))
    assert all(name.startswith("street ") for name in targets_by_name(module, "train"))


def test_a_name_that_no_member_has_is_not_renamed(coco):
    members = [COCODataModule(str(coco), **SIZE), COCODataModule(str(coco), **SIZE)]
    name = next(iter(CATEGORIES.values()))
    with pytest.raises(ValueError, match="rename: 'perso' is not a class of the members"):
        ready(MergedDetectionDataModule(members, rename={"perso": name}))


def test_a_merged_test_is_of_the_members_that_have_one(coco):
    with_test = COCODataModule(str(coco), test_split="train2017", **SIZE)
    module = ready(MergedDetectionDataModule([with_test, COCODataModule(str(coco), **SIZE)], **SIZE), "test")
    assert module.has_test_split
    assert len(module.annotations("test")) == len(list((coco / "train2017").iterdir()))
    assert not MergedDetectionDataModule([COCODataModule(str(coco), **SIZE)], **SIZE).has_test_split

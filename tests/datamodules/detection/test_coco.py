import gc
import json
import logging
import pickle

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from coco_data import (
    CATEGORIES,
    COLOURS,
    COUNTS,
    FIRST_IDS,
    annotation,
    annotation_path,
    change_coco,
    read_coco,
    write_coco,
)
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint

import datamodules
from datamodules import Augmentation, Categories, COCODataModule, DetectionBatch, MiniatureDetectionDataModule
from datamodules.detection import coco_files
from datamodules.images.files import ImageError
from datamodules.sampling.grouped_batches import SampleRequest

LABELS = {1: 1, 13: 2, 90: 3}
NO_CHANGE = Augmentation(horizontal_flip=0.0)


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco") / "data")


@pytest.fixture
def root(tmp_path):
    return write_coco(tmp_path / "data")


def module_of(root, **changes):
    return COCODataModule(str(root), **{"min_size": 0, "max_size": 0, **changes})


def ready(root, *stages, **changes):
    module = module_of(root, **changes)
    module.prepare_data()
    for stage in stages or ("fit",):
        module.setup(stage)
    return module


def by_id(loader):
    """Each image's parts by its id, and a check of the batch they are in."""
    found = {}
    for batch in loader:
        assert isinstance(batch, DetectionBatch)
        assert len(batch) == len(batch.images) == len(batch.sizes) == len(batch.names)
        assert batch.ids.dtype == batch.sizes.dtype == torch.int64
        targets = batch.targets or [None] * len(batch)
        for image_id, *rest in zip(batch.ids.tolist(), batch.images, targets, batch.sizes.tolist(), strict=True):
            assert image_id not in found
            found[image_id] = rest
    return found


# Batches


@pytest.mark.parametrize("augmentation", [NO_CHANGE, Augmentation(horizontal_flip=1.0), Augmentation(min_sizes=(80,))])
def test_training_batches_hold_the_data(shared_root, augmentation):
    found = by_id(ready(shared_root, augmentation=augmentation).train_dataloader())
    content = read_coco(shared_root, "train2017")
    entries = {entry["id"]: entry for entry in content["images"]}
    assert set(entries) - set(found) == {109}, "the image without a box"
    for image_id, (image, target, size) in found.items():
        entry = entries[image_id]
        assert size == [entry["height"], entry["width"]]
        assert image.dtype == torch.uint8
        assert image.is_contiguous()
        height, width = image.shape[1:]
        assert image.shape[0] == 3
        scale = 80 / min(size) if augmentation.min_sizes else 1
        assert (height, width) == tuple(round(side * scale) for side in size)
        expected = [
            (LABELS[one["category_id"]], one["bbox"])
            for one in content["annotations"]
            if one["image_id"] == image_id and not one["iscrowd"]
        ]
        assert target["boxes"].dtype == torch.float32
        assert target["labels"].dtype == torch.int64
        assert target["labels"].tolist() == [label for label, _ in expected]
        for (x1, y1, x2, y2), (_, (x, y, w, h)) in zip(target["boxes"].tolist(), expected, strict=True):
            assert [x2 - x1, y2 - y1] == pytest.approx([w * width / size[1], h * height / size[0]], abs=1e-3)
            if augmentation == NO_CHANGE:
                assert [x1, y1] == pytest.approx([x, y], abs=1e-3)
        # The last thing drawn is not hidden: the box must lie on its colour, wherever a flip has put it.
        x1, y1, x2, y2 = (round(value) for value in target["boxes"][-1].tolist())
        colour = COLOURS[list(LABELS)[int(target["labels"][-1]) - 1]]
        assert image[:, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].flatten(1).float().mean(1).tolist() == pytest.approx(
            colour, abs=1
        )


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_holds_every_image_once_and_boxes_lead_back(shared_root, stage):
    module = ready(shared_root, stage, min_size=100, max_size=130, eval_batch_size=3)
    found = by_id(module.val_dataloader() if stage == "validate" else module.test_dataloader())
    content = read_coco(shared_root, "val2017")
    assert sorted(found) == [entry["id"] for entry in content["images"]]
    for image_id, (image, target, size) in found.items():
        boxes = target["boxes"] * (torch.tensor(size) / torch.tensor(image.shape[1:])).flip(0).repeat(2)
        entries = [one for one in content["annotations"] if one["image_id"] == image_id and not one["iscrowd"]]
        expected = [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in entries)]
        assert boxes.numpy() == pytest.approx(np.array(expected).reshape(-1, 4), abs=1e-4)


@pytest.mark.parametrize(("keep_empty", "number"), [(True, 11), (False, 10)])
def test_images_without_a_box(shared_root, keep_empty, number, caplog):
    with caplog.at_level(logging.INFO, logger="pytorch_lightning"):
        found = by_id(ready(shared_root, keep_empty=keep_empty).train_dataloader())
    assert len(found) == number
    assert "1 boxes of crowds" in caplog.text
    assert "1 images without a box" in caplog.text
    if keep_empty:
        assert found[109][1]["boxes"].shape == (0, 4)
        assert found[109][1]["labels"].shape == (0,)


def test_categories():
    categories = Categories(tuple(CATEGORIES.values()), tuple(CATEGORIES))
    assert len(categories) == 3
    assert [categories.label(number) for number in CATEGORIES] == [1, 2, 3]
    assert [categories.category_id(label) for label in (1, 2, 3)] == list(CATEGORIES)
    with pytest.raises(ValueError, match="category id 2 is unknown; there are 1, 13, 90"):
        categories.label(2)
    for label in (0, 4):
        with pytest.raises(ValueError, match=rf"label {label} is not in 1\.\.3"):
            categories.category_id(label)
    with pytest.raises(ValueError, match="the ids 1, 2 all have the name 'a'"):
        Categories(("a", "a"), (1, 2))
    with pytest.raises(ValueError, match="two have the id 1"):
        Categories(("a", "b"), (1, 1))


def test_categories_are_ordered_by_id_whatever_the_file(shared_root):
    assert ready(shared_root).categories == Categories(tuple(CATEGORIES.values()), tuple(CATEGORIES))
    assert ready(shared_root, "predict").categories == Categories(tuple(CATEGORIES.values()), tuple(CATEGORIES))


def test_ground_truth_is_the_file(root):
    def disturb(content):
        content["annotations"].reverse()
        content["annotations"] += [
            annotation(90, 500, 1, [5, 5, 0, 3]),
            annotation(91, 500, 13, [-500, 0, 20, 20]),
            annotation(0, 503, 1, [1.25, 2.5, 3.125, 4.0625]),
        ]
        del content["annotations"][0]["area"], content["annotations"][0]["iscrowd"]

    change_coco(root, "val2017", disturb)
    module = ready(root)
    content, truth = read_coco(root, "val2017"), module.ground_truth("val")
    assert json.loads(json.dumps(truth)) == truth
    assert truth["images"] == content["images"]
    assert {one["id"]: one["name"] for one in truth["categories"]} == CATEGORIES
    content["annotations"][0] |= {"iscrowd": 0, "area": np.prod(content["annotations"][0]["bbox"][2:])}
    expected = {}
    for one in content["annotations"]:
        del one["segmentation"]
        expected[one["id"] + 1] = {**one, "id": one["id"] + 1}  # 0 means "no match" to the scorer
    assert {one["id"]: one for one in truth["annotations"]} == expected
    with pytest.raises(RuntimeError, match="'test' are known after setup"):
        ready(root, test_split="train2018").ground_truth("test")
    with pytest.raises(RuntimeError, match="'valid' are known after setup"):
        module.ground_truth("valid")


def test_ground_truth_scores_itself_perfectly(shared_root):
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    truth = coco.COCO()
    truth.dataset = ready(shared_root).ground_truth("val")
    truth.createIndex()
    detections = truth.loadRes([{**one, "score": 1.0} for one in truth.dataset["annotations"] if not one["iscrowd"]])
    score = COCOeval(truth, detections, "bbox")
    score.evaluate()
    score.accumulate()
    score.summarize()
    assert score.stats[0] == pytest.approx(1.0)


def test_a_test_split_of_its_own(tmp_path):
    root = write_coco(tmp_path / "data", {**COUNTS, "test2017": 3})
    module = ready(root, "test", test_split="test2017")
    assert sorted(by_id(module.test_dataloader())) == [900, 903, 906]
    assert len(module.ground_truth("test")["images"]) == 3
    assert len(by_id(ready(root, "predict", test_split="test2017").predict_dataloader())) == 3


def test_moving_batches(shared_root):
    batch = next(iter(ready(shared_root).train_dataloader()))
    moved = batch.to("meta")
    tensors = [*moved.images, *(one for target in moved.targets for one in target.values())]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert torch.equal(moved.ids, batch.ids), "read on the CPU, which would wait for a GPU"
    assert torch.equal(moved.sizes, batch.sizes)
    assert moved.names == batch.names
    assert len(moved) == len(batch)


def test_a_rank_without_images_gets_an_empty_batch(shared_root):
    dataset = ready(shared_root).val_dataloader().dataset
    batch = dataset.__getitems__([])
    assert len(batch) == 0
    assert (batch.ids.shape, batch.sizes.shape, batch.images, batch.targets) == ((0,), (0, 2), [], [])
    assert len(batch.to("cpu")) == 0


# Prediction


def test_prediction_has_no_targets(shared_root):
    batches = list(ready(shared_root, "predict").predict_dataloader())
    assert all(batch.targets == [] for batch in batches)
    assert sum(map(len, batches)) == 5


def test_prediction_of_a_folder(shared_root, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (30, 20)).save(folder / "b.JPG", format="JPEG", exif=exif)
    Image.new("CMYK", (20, 20)).save(folder / "a.jpeg")
    (folder / "notes.txt").write_text("none of these")
    (folder / "c.png").mkdir()
    module = ready(shared_root, "predict", predict_folder=str(folder))
    found = {name: (i, s) for b in module.predict_dataloader() for name, i, s in zip(b.names, b.ids, b.sizes)}  # noqa: B905
    assert {name: (int(i), s.tolist()) for name, (i, s) in found.items()} == {
        "a.jpeg": (1, [20, 20]),
        "b.JPG": (2, [30, 20]),
    }
    assert module.categories.ids == tuple(CATEGORIES)
    assert ready(tmp_path / "nowhere", "predict", predict_folder=str(folder)).categories is None


def test_numbers_in_the_names_of_a_folder_are_image_ids(shared_root):
    module = ready(shared_root, "predict", predict_folder=str(shared_root / "val2017"))
    assert sorted(by_id(module.predict_dataloader())) == [500, 503, 506, 509, 512]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere", FileNotFoundError, r"predict_folder: .*nowhere is not a folder.*--data\.predict_folder"),
        ("empty", FileNotFoundError, r"predict_folder: .* holds no image .*, but notes\.txt"),
    ],
)
def test_bad_folders(tmp_path, name, error, message):
    folder = tmp_path / "folder"
    (folder / "empty").mkdir(parents=True)
    (folder / "empty" / "notes.txt").write_text("no")
    with pytest.raises(error, match=message):
        ready(tmp_path, "predict", predict_folder=str(folder / name))


# Workers


def digest(batches):
    return [
        (batch.ids.tolist(), [image.numpy().tobytes() for image in batch.images], [t["boxes"] for t in batch.targets])
        for batch in batches
    ]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(shared_root, num_workers):
    changes = {"augmentation": Augmentation(min_sizes=(40, 60), brightness=0.5), "seed": 3}
    alone, helped = ready(shared_root, **changes), ready(shared_root, num_workers=num_workers, **changes)
    loaders = alone.train_dataloader(), helped.train_dataloader()
    epochs = []
    for epoch in range(2):
        for loader in loaders:
            loader.batch_sampler.set_epoch(epoch)
        one, other = digest(loaders[0]), digest(loaders[1])
        assert str(one) == str(other)
        epochs.append(str(one))
    assert epochs[0] != epochs[1]


def test_an_image_changes_from_epoch_to_epoch_and_not_with_its_batch(shared_root):
    dataset = ready(shared_root, augmentation=Augmentation(min_sizes=tuple(range(40, 80)))).train_dataloader().dataset
    shapes = [dataset.batch([SampleRequest(3, epoch)]).images[0].shape for epoch in range(8)]
    assert len(set(shapes)) > 4
    together = dataset.batch([SampleRequest(0, 5), SampleRequest(3, 5), SampleRequest(1, 5)])
    assert torch.equal(together.images[1], dataset.batch([SampleRequest(3, 5)]).images[0])
    assert dataset[3].images[0].shape == shapes[0]


def test_annotations_hold_no_object_per_image(tmp_path):
    """Reference counts would be written to by each worker, which copies the page that the object is in."""

    def objects(count):
        root = write_coco(tmp_path / str(count), {"train2017": count})
        dataset = ready_train_only(root)
        pending, seen = [dataset], set()
        while pending:
            one = pending.pop()
            if id(one) not in seen and not isinstance(one, type):
                seen.add(id(one))
                pending += gc.get_referents(one) if not hasattr(one, "__globals__") else []
        return len(seen), len(pickle.dumps(dataset.annotations))

    def ready_train_only(root):
        annotations = coco_files.read_coco(annotation_path(root, "train2017"))
        return datamodules.detection.datamodule.DetectionDataset(annotations, root, None, annotations.with_targets())

    (few, small), (many, large) = objects(10), objects(210)
    assert many <= few + 5
    assert large - small < 200 * 3 * 120


# Bad annotations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"].append(dict(c["images"][0])), r"image id 100 is repeated"),
        (lambda c: c["annotations"].append(dict(c["annotations"][2])), r"annotation id 3 is repeated"),
        (
            lambda c: c["annotations"][1].update(image_id=7),
            r"annotation id 2 has image id 7, which is not .*\(1 such annotations\)",
        ),
        (lambda c: c["annotations"][1].update(category_id=2), r"annotation id 2 has category id 2, which is not"),
        (
            lambda c: c["annotations"][1].update(bbox=[1, 2, float("nan"), 4]),
            r"annotation id 2 of image id 103 has bbox \[1, 2, nan, 4\]; it must be four finite numbers",
        ),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, float("inf"), 4]), r"has bbox \[1, 2, inf, 4\]"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), r"has bbox \[1, 2, 3\]; it must be four"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3, "x"]), r"has bbox \[1, 2, 3, 'x'\]; it must be four"),
        (lambda c: c["annotations"][1].update(bbox=None), r"has bbox None; it must be four"),
        (lambda c: c["annotations"][1].pop("bbox"), r"annotations\[1\] has no 'bbox'"),
        (lambda c: c["annotations"][1].pop("image_id"), r"annotations\[1\] has no 'image_id'"),
        (lambda c: c["annotations"][1].update(category_id="1"), r"annotations\[1\] has category_id '1'; it must be a"),
        (
            lambda c: c["annotations"][1].update(area=float("nan")),
            r"annotation id 2 has area nan; it must be a finite number",
        ),
        (lambda c: c["annotations"].insert(1, None), r"annotations\[1\] has no 'id': None"),
        (lambda c: c["images"][2].update(height=0), r"image id 106 has width 48 and height 0; both must be at least 1"),
        (lambda c: c["images"][2].update(width=-3), r"image id 106 has width -3"),
        (lambda c: c["images"][2].update(width=1.5), r"images\[2\] has width 1\.5; it must be a whole number"),
        (lambda c: c["images"][2].update(file_name="../a.png"), r"image id 106 has file_name '\.\./a\.png'.*below the"),
        (lambda c: c["images"][2].update(file_name="/etc/a.png"), r"image id 106 has file_name '/etc/a\.png'"),
        (lambda c: c["images"][2].update(file_name="a\\..\\..\\b"), r"image id 106 has file_name"),
        (lambda c: c["images"][2].update(file_name=""), r"image id 106 has file_name ''"),
        (lambda c: c["images"][2].update(file_name=5), r"image id 106 has file_name 5"),
        (lambda c: c["categories"].append({"id": 1, "name": "x"}), r"categories: two have the id 1"),
        (lambda c: c["categories"].append({"id": 2, "name": "person"}), r"the ids 1, 2 all have the name 'person'"),
        (lambda c: c["categories"].clear(), r"has no category in its list categories"),
        (lambda c: c["images"].clear(), r"has no image in its list images"),
        (lambda c: c["annotations"].clear(), r"has no annotation: there is nothing to learn from"),
        (lambda c: c.pop("images"), r"holds an object with info, annotations, categories; an annotation file is"),
    ],
)
def test_bad_annotations(root, change, message):
    path = change_coco(root, "train2017", change)
    with pytest.raises(ValueError, match=message) as error:
        ready(root)
    assert str(path) in str(error.value)


def test_results_are_no_annotations(root):
    path = annotation_path(root, "train2017")
    path.write_text(json.dumps([{"image_id": 1, "score": 0.5}]))
    with pytest.raises(ValueError, match="holds another kind of value; an annotation file is an object with the lists"):
        ready(root)


def test_files_that_are_cut_off_or_no_text(root):
    path = annotation_path(root, "train2017")
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(
        ValueError, match=r"instances_train2017\.json is not a complete JSON file.*It may be cut off"
    ) as error:
        ready(root)
    assert f"{len(text) // 2:,}" in str(error.value)
    path.write_bytes(b'{"images": "\xff"}')
    with pytest.raises(ValueError, match=r"instances_train2017\.json is not UTF-8 \(byte 12\)"):
        ready(root)


def test_whole_numbers_may_be_written_as_floats(root):
    change_coco(root, "train2017", lambda content: content["annotations"][1].update(category_id=1.0))
    assert ready(root).annotations("train").labels[1] == 1


def test_boxes_that_cannot_be_learnt_are_left_out_with_their_count(root, caplog):
    bad = [[5, 5, 0, 9], [5, 5, 9, -1], [70, 0, 9, 9], [-9, 3, 9, 9], [0, 50, 5, 5]]
    cut = [[-5, -5, 10, 10], [50, 30, 100, 100]]

    def add(content):
        content["annotations"] += [annotation(1000 + n, 100, 1, box) for n, box in enumerate(bad + cut)]

    before = len(by_id(ready(root, augmentation=NO_CHANGE).train_dataloader())[100][1]["boxes"])
    change_coco(root, "train2017", add)
    with caplog.at_level(logging.INFO, logger="pytorch_lightning"):
        module = ready(root, augmentation=NO_CHANGE)
    assert "2 boxes without area (annotations 1000, 1001)" in caplog.text
    assert "3 boxes outside of their image (annotations 1002, 1003, 1004)" in caplog.text
    boxes = by_id(module.train_dataloader())[100][1]["boxes"]
    assert boxes[before:].tolist() == [pytest.approx([0, 0, 5, 5]), pytest.approx([50, 30, 60, 40])]


def test_only_boxes_that_cannot_be_learnt(root):
    change_coco(root, "train2017", lambda c: [one.update(bbox=[0, 0, 0, 0]) for one in c["annotations"]])
    with pytest.raises(
        ValueError, match=r"has 21 annotations that cannot be learnt \(1 boxes of crowds, 20 boxes without"
    ):
        ready(root)


def test_evaluation_without_a_box_is_fine(root):
    change_coco(root, "val2017", lambda content: content["annotations"].clear())
    module = ready(root)
    assert len(by_id(module.val_dataloader())) == 5
    assert module.ground_truth("val")["annotations"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["categories"].append({"id": 2, "name": "x"}), r"4 and 3; id 2 \('x'\) is not the same in both"),
        (lambda c: c["categories"][0].update(name="x"), r"3 and 3; id 90 \('toothbrush'\) is not the same in both"),
    ],
)
def test_splits_of_different_categories(root, change, message):
    path = change_coco(root, "val2017", change)
    with pytest.raises(ValueError, match=message) as error:
        ready(root)
    assert str(path) in str(error.value)


# Bad images


def test_missing_images_are_named_and_counted(root):
    for number in (100, 106, 109, 112, 115, 118, 121):
        (root / "train2017" / f"{number:012d}.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"7 of the 11 images of .*train2017\.json are missing in ") as error:
        ready(root)
    for number in (100, 106, 109, 112, 115):
        assert f"{number:012d}.png (image id {number})" in str(error.value)
    assert "118" not in str(error.value)
    assert ", ...." in str(error.value)


def test_images_in_folders_of_a_split(root):
    (root / "train2017" / "part").mkdir()
    (root / "train2017" / f"{100:012d}.png").rename(root / "train2017" / "part" / "first.png")
    change_coco(root, "train2017", lambda content: content["images"][0].update(file_name="part/first.png"))
    assert len(by_id(ready(root).train_dataloader())) == 10
    change_coco(root, "train2017", lambda content: content["images"][1].update(file_name="gone/first.png"))
    with pytest.raises(FileNotFoundError, match=r"1 of the 11 .*gone/first\.png \(image id 103\)"):
        ready(root)


def test_an_image_of_another_size_is_found_before_training(root):
    change_coco(root, "train2017", lambda content: content["images"][2].update(width=47))
    text = r"image id 106: .*106\.png is 48x36 pixels, but its annotation says 47x36 \(width x height\)"
    with pytest.raises(ImageError, match=text):
        ready(root)


def test_turned_images_meet_their_annotations(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = root / "train2017" / f"{100:012d}.png"
    with Image.open(path) as opened:
        stored = opened.copy()
    stored.save(path, exif=exif)
    image = by_id(ready(root, augmentation=NO_CHANGE).train_dataloader())[100][0]
    assert (image.permute(1, 2, 0).numpy() == np.asarray(stored)).all(), "COCO's boxes are those of the stored pixels"
    change_coco(root, "train2017", lambda content: content["images"][0].update(width=40, height=60))
    image = by_id(ready(root, augmentation=NO_CHANGE).train_dataloader())[100][0]
    assert (image.permute(1, 2, 0).numpy() == np.asarray(stored.rotate(270, expand=True))).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_is_named_with_its_id(root, num_workers):
    path = root / "train2017" / f"{106:012d}.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (36, 48, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    module = ready(root, num_workers=num_workers)
    with pytest.raises(
        ImageError, match=r"^image id 106: .*106\.png is damaged, cut short.* take it out of the data\.$"
    ):
        list(module.train_dataloader())


def test_an_image_that_vanishes(root):
    module = ready(root)
    (root / "train2017" / f"{106:012d}.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"106\.png does not exist"):
        list(module.train_dataloader())


@pytest.mark.parametrize("size", [(1, 1), (1, 700)])
def test_thin_images(root, size):
    height, width = size
    Image.new("L", (width, height)).save(root / "train2017" / f"{100:012d}.png")

    def change(content):
        content["images"][0].update(height=height, width=width)
        content["annotations"][0].update(bbox=[0, 0, width, height])

    change_coco(root, "train2017", change)
    found = by_id(ready(root, min_size=80, max_size=130, augmentation=NO_CHANGE).train_dataloader())
    image, target, _ = found[100]
    assert image.shape[1:] == ((80, 80) if width == 1 else (1, 130))
    assert target["boxes"].tolist() == [pytest.approx([0, 0, image.shape[2], image.shape[1]])]


# Bad arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, r"batch_size: 0 is too small; give 1 or more \(--data\.batch_size 1\)"),
        ({"num_workers": -1}, "num_workers: -1 is too small"),
        ({"min_size": -1}, "min_size: -1 is too small"),
        ({"max_size": -1}, "max_size: -1 is too small"),
        ({"seed": -1}, "seed: -1 is too small"),
        ({"eval_batch_size": -1}, "eval_batch_size: -1 is too small"),
        ({"train_split": ""}, "train_split: '' is not the name of a split"),
        ({"val_split": "../val"}, "val_split: '../val' is not the name of a split"),
        ({"test_split": ".."}, "test_split: '..' is not the name of a split"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        module_of("anywhere", **changes)


def test_wrong_folders_say_what_is_there(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root: the folder .*nowhere does not exist.*--data\.download true"):
        ready(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"train_split: .*annotations/instances_train2017\.json .* holds data/\."
    ):
        ready(tmp_path)
    text = r"train_split: .*instances_train\.json does not exist; .*annotations holds instances_train2017\.json, inst"
    with pytest.raises(FileNotFoundError, match=text):
        ready(root, train_split="train")
    (root / "val2017").rename(root / "valid2017")
    text = (
        r"val_split: .*val2017 does not exist; .*data holds annotations/, train2017/, valid2017/\. .*--data\.val_split"
    )
    with pytest.raises(FileNotFoundError, match=text):
        ready(root)


def test_categories_before_setup(root):
    with pytest.raises(RuntimeError, match=r"after setup\(\)"):
        _ = module_of(root).categories


# Where data come from


def test_download_fetches_what_the_stage_needs(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("datamodules.downloads.coco.download_coco", lambda root, splits: calls.append((root, splits)))
    module_of(tmp_path, download=True).prepare_data()
    module_of(tmp_path).prepare_data()
    assert calls == [(tmp_path, ["train2017", "val2017"])]
    calls.clear()
    write_coco(tmp_path / "data")
    for function in ("validate", "predict"):
        trainer = trainer_of()
        getattr(trainer, function)(Recorder(), datamodule=module_of(tmp_path / "data", download=True))
    folder = str(tmp_path / "data" / "val2017")
    trainer_of().predict(Recorder(), datamodule=module_of(tmp_path / "data", download=True, predict_folder=folder))
    assert [splits for _, splits in calls] == [["val2017"], ["val2017"], []]


def test_miniature_set_is_made_on_the_spot(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def write_miniature_detection(root):
        made.append(root)
        write_coco(root, {**COUNTS, "test2017": 3})

    monkeypatch.setattr(
        "datamodules.miniature.detection_datamodule.write_miniature_detection", write_miniature_detection
    )
    module = MiniatureDetectionDataModule()
    module.prepare_data()
    assert made == [tmp_path / "lightning_attn" / "miniature_detection"]
    module.setup("fit")
    module.setup("test")
    assert len(by_id(module.train_dataloader())) == 10
    assert {tuple(image.shape[1:]) for image, _, _ in by_id(module.test_dataloader()).values()} == {
        (40, 60),
        (60, 40),
        (36, 48),
    }


# With the Trainer


class Recorder(pl.LightningModule):
    """Notes which images it is trained and evaluated on."""

    def __init__(self, fail_after=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fail_after = fail_after
        self.trained, self.validated, self.predicted = [], [], []

    def training_step(self, batch, batch_idx):
        if len(self.trained) == self.fail_after:
            raise RuntimeError("the power is gone")
        pixels = sum(int(image.sum()) for image in batch.images)  # tells the random changes apart
        self.trained.append([self.current_epoch, batch.ids.tolist(), pixels])
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch.ids.tolist())

    def predict_step(self, batch, batch_idx):
        self.predicted.append(batch.ids.tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer_of(**options):
    settings = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "enable_checkpointing": "callbacks" in options,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**settings, **options})


def fit(root, model, checkpoint=None, num_workers=0, **options):
    trainer = trainer_of(**options)
    module = module_of(root, num_workers=num_workers, augmentation=Augmentation(min_sizes=(40, 50, 60)))
    trainer.fit(model, datamodule=module, ckpt_path=checkpoint, weights_only=True)
    return model.trained, trainer


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_sees_each_batch_exactly_once(shared_root, tmp_path, num_workers):
    checkpoints = [
        ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1),
        ModelCheckpoint(tmp_path, filename="end {epoch}", save_on_train_epoch_end=True, save_top_k=-1),
    ]
    whole, trainer = fit(shared_root, Recorder(), num_workers=num_workers, callbacks=checkpoints)
    batches = trainer.num_training_batches
    assert batches == 5
    for epoch in range(3):
        seen = [image for number, ids, _ in whole if number == epoch for image in ids]
        assert len(set(seen)) == len(seen) == 10
    assert whole[0][1:] != whole[batches][1:]
    done = {f"step={step}": step for step in (4, 8, 12)} | {f"end epoch={e}": (e + 1) * batches for e in range(3)}
    for name, count in done.items():
        rest, trainer = fit(shared_root, Recorder(), tmp_path / f"{name}.ckpt", num_workers=num_workers)
        assert rest == whole[count:], name
        assert trainer.current_epoch == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_resuming_after_a_failed_step_repeats_that_batch(shared_root, tmp_path):
    whole, _ = fit(shared_root, Recorder())
    broken = Recorder(fail_after=3)
    keep = ModelCheckpoint(tmp_path, filename="broken", save_on_exception=True)
    with pytest.raises(RuntimeError, match="the power is gone"):
        fit(shared_root, broken, num_workers=2, callbacks=[keep])
    rest, _ = fit(shared_root, Recorder(), tmp_path / "broken.ckpt", num_workers=2)
    assert broken.trained + rest == whole


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_overfitting_repeats_the_same_batches(shared_root):
    whole, _ = fit(shared_root, Recorder(), overfit_batches=2)
    assert [one[1:] for one in whole] == [one[1:] for one in whole[:2]] * 3


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_take_the_batches(shared_root, precision):
    whole, trainer = fit(shared_root, Recorder(), precision=precision, max_epochs=1)
    assert len(whole) == trainer.num_training_batches


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_trainer_has_nothing_to_warn_about(shared_root, recwarn):
    model = Recorder()
    for num_workers in (0, 2):
        trainer = trainer_of(max_epochs=2)
        module = module_of(shared_root, num_workers=num_workers)
        trainer.fit(model, datamodule=module)
        trainer.predict(model, datamodule=module)
    assert sorted(image for ids in model.predicted for image in ids) == sorted([500, 503, 506, 509, 512] * 2)
    mentioned = [str(warning.message) for warning in recwarn if "dataloader" in str(warning.message).lower()]
    # On a machine with one core, two workers are more than Lightning suggests.
    of_machine = ("many workers", "suggested max number of worker")
    assert [text for text in mentioned if not any(words in text for words in of_machine)] == []


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from test_coco import Recorder, fit, module_of, trainer_of

torch.set_num_threads(1)
root, folder = Path(sys.argv[1]), Path(sys.argv[2])
two = {"devices": 2, "strategy": "ddp"}
checkpoint = ModelCheckpoint(folder / "checkpoints", filename="{step}", every_n_train_steps=2, save_top_k=-1)
whole, trainer = fit(root, Recorder(), max_epochs=2, callbacks=[checkpoint], **two)
result = {"whole": whole}
result["rest"] = fit(root, Recorder(), folder / "checkpoints" / "step=2.ckpt", max_epochs=2, **two)[0]
model = Recorder()
trainer = trainer_of(**two)
trainer.validate(model, datamodule=module_of(root), verbose=False)
trainer.predict(model, datamodule=module_of(root, predict_folder=str(folder / "one")))
result |= {"validated": model.validated, "predicted": model.predicted}
try:
    fit(root, Recorder(), use_distributed_sampler=True, **two)
except ValueError as error:
    result["refused"] = str(error)
(folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))
"""


@pytest.mark.ddp
def test_two_ranks(run_on_two_ranks, root, tmp_path):
    (tmp_path / "one").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "one" / "7.png")
    run_on_two_ranks(SCRIPT, root, tmp_path)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert len(ranks[0]["whole"]) == len(ranks[1]["whole"]) == 6
    for rank in ranks:
        assert rank["rest"] == rank["whole"][2:]
        assert "--trainer.use_distributed_sampler false" in rank["refused"]
    for epoch in range(2):
        seen = [image for rank in ranks for number, ids, _ in rank["whole"] if number == epoch for image in ids]
        assert len(set(seen)) == len(seen) == 10, "an epoch sees every image once, whatever the number of ranks"
    validated = [[image for ids in rank["validated"] for image in ids] for rank in ranks]
    assert sorted(validated[0] + validated[1]) == [FIRST_IDS["val2017"] + 3 * number for number in range(5)]
    assert [rank["predicted"] for rank in ranks] == [[[7]], [[]]], "a rank without images takes part all the same"


def test_public_names():
    assert set(datamodules.__all__) >= {
        "COCODataModule",
        "MiniatureDetectionDataModule",
        "DetectionBatch",
        "Categories",
    }
    assert all(hasattr(datamodules, name) for name in datamodules.__all__)

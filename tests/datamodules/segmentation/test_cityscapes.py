import json
import logging
import pickle
import re
import shutil
import types

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from cityscapes_data import (
    CITIES,
    COUNTS,
    colours_of,
    image_path,
    label_path,
    name_of,
    names_of,
    write_cityscapes,
    write_sample,
)
from PIL import Image

import datamodules
from datamodules import (
    CityscapesDataModule,
    MiniatureSegmentationDataModule,
    SegmentationAugmentation,
    SegmentationBatch,
    SegmentationClasses,
)
from datamodules.images.files import ImageError
from datamodules.miniature import segmentation_datamodule
from datamodules.miniature.segmentation import MINIATURE_CLASSES
from datamodules.sampling.grouped_batches import SampleRequest
from datamodules.segmentation.cityscapes import read_label_ids
from datamodules.segmentation.classes import CITYSCAPES_CLASSES, HIGHEST_ID, IGNORED
from datamodules.segmentation.datamodule import SegmentationFiles

NO_CHANGE = SegmentationAugmentation(horizontal_flip=0.0, scales=(1.0, 1.0))
COLOURS = np.array([one.colour for one in CITYSCAPES_CLASSES] + [(0, 0, 0)])


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory):
    return write_cityscapes(tmp_path_factory.mktemp("cityscapes") / "data")


@pytest.fixture
def root(tmp_path):
    return write_cityscapes(tmp_path / "data")


def module_of(root, **changes):
    return CityscapesDataModule(str(root), **{"crop_size": 32, **changes})


def ready(root, *stages, **changes):
    module = module_of(root, **changes)
    module.prepare_data()
    for stage in stages or ("fit",):
        module.setup(stage)
    return module


def by_name(loader):
    """Each image's id, pixels and labels by its name, and a check of the batch they are in."""
    found = {}
    for batch in loader:
        assert isinstance(batch, SegmentationBatch)
        assert len(batch) == len(batch.images) == len(batch.names)
        assert batch.ids.dtype == torch.int64
        labels = batch.labels or [None] * len(batch)
        for number, name, image, label_map in zip(batch.ids.tolist(), batch.names, batch.images, labels, strict=True):
            assert name not in found
            assert image.dtype == torch.uint8
            assert image.is_contiguous()
            if label_map is not None:
                assert label_map.dtype == torch.uint8
                assert label_map.is_contiguous()
                assert label_map.shape == image.shape[1:]
            found[name] = number, image.permute(1, 2, 0).numpy(), None if label_map is None else label_map.numpy()
    return found


def stored(root, split, number, kind="gtFine"):
    with Image.open(image_path(root, split, number)) as image, Image.open(label_path(root, split, number, kind)) as ids:
        return np.array(image), np.array(ids)


# Classes


def test_the_classes_are_those_of_cityscapes_scripts():
    facts = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    scored = sorted((one for one in facts if not one.ignoreInEval), key=lambda one: one.trainId)
    assert [(one.name, one.id, one.trainId, one.color) for one in scored] == [
        (one.name, one.id, one.train_id, one.colour) for one in CITYSCAPES_CLASSES
    ]
    assert max(one.id for one in facts) == HIGHEST_ID
    classes = SegmentationClasses.chosen()
    ids = np.array([[one.id for one in facts if one.id >= 0] + [255]], dtype=np.uint8)
    train_ids = [one.trainId for one in facts if one.id >= 0] + [IGNORED]
    assert classes.to_labels(ids).tolist() == [train_ids]


def test_labels_lead_back_to_ids():
    for names in ((), ("car", "road", "sky")):
        classes = SegmentationClasses.chosen(names)
        labels = np.array([[*range(len(classes)), IGNORED]] * 2, dtype=np.uint8)
        ids = classes.to_ids(labels)
        assert ids.dtype == np.uint8
        assert ids.tolist() == [[*classes.ids, 0]] * 2
        assert (classes.to_labels(ids) == labels).all()
        everything = np.arange(256, dtype=np.uint8).reshape(2, 128)
        assert set(classes.to_labels(everything)[~np.isin(everything, classes.ids)].tolist()) == {IGNORED}
        assert classes.to_labels(everything[:, ::-1]).tolist() == classes.to_labels(everything)[:, ::-1].tolist()


def test_chosen_classes():
    classes = SegmentationClasses.chosen(("car", "road", "sky"))
    assert classes.names == ("road", "sky", "car"), "the order is Cityscapes' own"
    assert classes.ids == (7, 23, 26)
    assert classes.colours == ((128, 64, 128), (70, 130, 180), (0, 0, 142))
    assert len(SegmentationClasses.chosen()) == 19
    with pytest.raises(ValueError, match=r"classes: 'street' is unknown; there are road, sidewalk, .*, bicycle\."):
        SegmentationClasses.chosen(("road", "street"))
    with pytest.raises(ValueError, match="classes: 'road' is repeated; give each class once"):
        SegmentationClasses.chosen(("road", "road"))
    with pytest.raises(ValueError, match="two have the id 7"):
        SegmentationClasses(("a", "b"), (7, 7), ((0, 0, 0), (0, 0, 0)))
    with pytest.raises(ValueError, match="1 names, 0 ids and 0 colours"):
        SegmentationClasses(("a",), (), ())


# Batches


@pytest.mark.parametrize("classes", [(), ("sky", "road", "bicycle")])
def test_training_crops_hold_the_data(shared_root, classes):
    augmentation = SegmentationAugmentation(scales=(1.0, 1.0))
    found = by_name(ready(shared_root, batch_size=3, classes=classes, augmentation=augmentation).train_dataloader())
    assert sorted(found) == names_of("train", 7)
    chosen = SegmentationClasses.chosen(classes)
    colours = np.array([*chosen.colours, (0, 0, 0)])
    for name, (number, image, labels) in found.items():
        assert name == names_of("train", 7)[number]
        assert image.shape == (32, 32, 3)
        known = labels != IGNORED
        assert (colours[labels[known]] == image[known]).all(), "labels are where their colours are"
        others = {tuple(one.colour) for one in CITYSCAPES_CLASSES if one.name not in chosen.names} | {(0, 0, 0)}
        assert {tuple(colour) for colour in image[~known].tolist()} <= others


def test_scaled_labels_stay_with_their_pixels(shared_root):
    """Away from where two colours meet, a scaled image has the colour of its label, and outside that of the filling."""
    for _, image, labels in by_name(ready(shared_root, crop_size=(48, 90)).train_dataloader()).values():
        assert image.shape == (48, 90, 3)
        known = labels != IGNORED
        same = (COLOURS[np.where(known, labels, 19)] == image).all(axis=2)
        filled = (image == (124, 116, 104)).all(axis=2)
        assert not (filled & known).any()
        assert (same | filled).mean() > 0.7


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_holds_every_image_once_as_it_is(shared_root, stage):
    module = ready(shared_root, stage, eval_batch_size=2)
    found = by_name(module.val_dataloader() if stage == "validate" else module.test_dataloader())
    assert {name: number for name, (number, _, _) in found.items()} == {
        name: number for number, name in enumerate(names_of("val", 5))
    }
    for number in range(5):
        pixels, ids = stored(shared_root, "val", number)
        _, image, labels = found[name_of("val", number)]
        assert (image == pixels).all()
        expected = [[module.classes.ids.index(i) if i in module.classes.ids else IGNORED for i in row] for row in ids]
        assert labels.tolist() == expected


def test_evaluation_agrees_with_torchvision(shared_root):
    peer = pytest.importorskip("torchvision.datasets").Cityscapes(
        str(shared_root), split="val", mode="fine", target_type="semantic"
    )
    names = [path.rsplit("/", 1)[1].removesuffix("_leftImg8bit.png") for path in peer.images]
    found = by_name(ready(shared_root, "validate").val_dataloader())
    assert sorted(names) == sorted(found)
    classes = SegmentationClasses.chosen()
    for name, (image, target) in zip(names, peer, strict=True):
        assert (found[name][1] == np.asarray(image)).all()
        assert (found[name][2] == classes.to_labels(np.asarray(target))).all()


def test_images_of_several_sizes(tmp_path):
    root = write_cityscapes(tmp_path / "data", {"train": 8, "val": 8}, sizes=((40, 64), (30, 50)))
    module = ready(root, eval_batch_size=2, batch_size=2, crop_size=0)
    for loader in (module.val_dataloader(), module.train_dataloader()):
        batches = [[tuple(image.shape) for image in batch.images] for batch in loader]
        assert sum(map(len, batches)) == 8
        assert all(len(set(batch)) == 1 for batch in batches)
        assert {shape for batch in batches for shape in batch} == {(3, 40, 64), (3, 30, 50)}
    sizes = {tuple(image.shape) for batch in ready(root, crop_size=40).train_dataloader() for image in batch.images}
    assert sizes == {(3, 40, 40)}


def test_a_crop_of_the_whole_image(shared_root):
    for name, (_, image, labels) in by_name(
        ready(shared_root, crop_size=0, augmentation=NO_CHANGE).train_dataloader()
    ).items():
        number = next(number for number in range(7) if name_of("train", number) == name)
        pixels, ids = stored(shared_root, "train", number)
        assert (image == pixels).all()
        assert (labels == SegmentationClasses.chosen().to_labels(ids)).all()


def test_a_crop_larger_than_the_image_is_ignored_outside(shared_root):
    for _, image, labels in by_name(
        ready(shared_root, crop_size=(70, 80), augmentation=NO_CHANGE).train_dataloader()
    ).values():
        assert labels.shape == (70, 80)
        assert (labels[40:] == IGNORED).all()
        assert (labels[:, 64:] == IGNORED).all()
        assert (image[40:] == (124, 116, 104)).all()


def test_coarse_labels_are_added(tmp_path, caplog):
    root = write_cityscapes(tmp_path / "data")
    write_cityscapes(root, {"train_extra": 4}, kind="gtCoarse")
    with caplog.at_level(logging.INFO, logger="pytorch_lightning"):
        module = ready(root, coarse=True, crop_size=0, augmentation=NO_CHANGE)
    found = by_name(module.train_dataloader())
    assert sorted(found, key=lambda name: found[name][0]) == names_of("train", 7) + names_of("train_extra", 4)
    assert "train: 4 images of train_extra with coarse labels are added" in caplog.text
    assert "train: 11 images, 19 classes" in caplog.text
    _, image, labels = found[name_of("train_extra", 1)]
    pixels, ids = stored(root, "train_extra", 1, "gtCoarse")
    assert (image == pixels).all()
    assert (labels == module.classes.to_labels(ids)).all()
    assert len(by_name(ready(root).train_dataloader())) == 7
    assert len(by_name(module.val_dataloader())) == 5


def test_a_test_split_of_its_own(tmp_path):
    root = write_cityscapes(tmp_path / "data", {**COUNTS, "test": 3})
    assert sorted(by_name(ready(root, "test", test_split="test").test_dataloader())) == names_of("test", 3)
    for path in (root / "gtFine" / "test").rglob("*.png"):
        Image.fromarray(np.zeros((40, 64), dtype=np.uint8)).save(path)  # as those that Cityscapes gives out
    module = ready(root, "test", "predict", test_split="test")
    assert all((labels == IGNORED).all() for _, _, labels in by_name(module.test_dataloader()).values())
    assert len(by_name(module.predict_dataloader())) == 3


def test_moving_batches(shared_root):
    batch = next(iter(ready(shared_root, batch_size=2).train_dataloader()))
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in [*moved.images, *moved.labels]} == {"meta"}
    assert torch.equal(moved.ids, batch.ids), "read on the CPU, which would wait for a GPU"
    assert moved.names == batch.names
    assert len(moved) == len(batch) == 2


def test_a_rank_without_images_gets_an_empty_batch(shared_root):
    batch = ready(shared_root).val_dataloader().dataset.__getitems__([])
    assert len(batch) == 0
    assert (batch.ids.shape, batch.images, batch.labels, batch.names) == ((0,), [], [], [])
    assert batch.ids.dtype == torch.int64
    assert len(batch.to("cpu")) == 0


# Prediction


def test_prediction_needs_no_labels(tmp_path):
    root = write_cityscapes(tmp_path / "data", {"test": 4})
    shutil.rmtree(root / "gtFine")
    module = ready(root, "predict", test_split="test")
    batches = list(module.predict_dataloader())
    assert all(batch.labels == [] for batch in batches)
    found = by_name(batches)
    assert sorted(found) == names_of("test", 4)
    with Image.open(image_path(root, "test", 2)) as image:
        assert (found[name_of("test", 2)][1] == np.asarray(image)).all()
    with pytest.raises(FileNotFoundError, match=r"test_split: .*gtFine/test does not exist; .*holds leftImg8bit/\."):
        module.setup("test")


def test_prediction_of_a_folder(tmp_path):
    folder = tmp_path / "mine"
    for name in ("b.JPG", "a.jpeg", "x/b.png", "x/y/c.png", "x_b.png", "x/d_leftImg8bit.png", "e.png", "e.tif"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (30, 20), len(name)).convert("RGB").save(folder / name, format="PNG")
    (folder / "notes.txt").write_text("none of these")
    module = ready(tmp_path / "nowhere", "predict", predict_folder=str(folder), eval_batch_size=2)
    found = by_name(module.predict_dataloader())
    # In the order of their paths: a.jpeg, b.JPG, e.png, e.tif, x/b.png, x/d_leftImg8bit.png, x/y/c.png, x_b.png.
    # x/b.png and x_b.png are told apart by their endings, since both would be x_b.
    names = ["a", "b", "e.png", "e.tif", "x_b.png", "d", "c", "x_b"]
    assert sorted(found, key=lambda name: found[name][0]) == names
    assert all(image.shape == (20, 30, 3) for _, image, _ in found.values())
    assert len(module.classes) == 19


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere", FileNotFoundError, r"predict_folder: .*nowhere is not a folder.*--data\.predict_folder"),
        ("empty", FileNotFoundError, r"predict_folder: .* holds no image .*, but notes\.txt"),
    ],
)
def test_bad_folders(tmp_path, name, error, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_bytes(b"no")
    with pytest.raises(error, match=message):
        ready(tmp_path, "predict", predict_folder=str(tmp_path / name))


# Draws and workers


def digest(batches):
    return [
        (batch.ids.tolist(), *([t.numpy().tobytes() for t in ts] for ts in (batch.images, batch.labels)))
        for batch in batches
    ]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(shared_root, num_workers):
    changes = {"augmentation": SegmentationAugmentation(brightness=0.5, category_max_ratio=0.75), "seed": 3}
    alone = ready(shared_root, batch_size=2, **changes)
    helped = ready(shared_root, batch_size=2, num_workers=num_workers, **changes)
    loaders = alone.train_dataloader(), helped.train_dataloader()
    epochs = []
    for epoch in range(2):
        for loader in loaders:
            loader.batch_sampler.set_epoch(epoch)
        one, other = digest(loaders[0]), digest(loaders[1])
        assert one == other
        epochs.append(one)
    assert epochs[0] != epochs[1]


def test_an_image_changes_from_epoch_to_epoch_and_not_with_its_batch(shared_root):
    dataset = ready(shared_root).train_dataloader().dataset
    crops = {dataset.batch([SampleRequest(3, epoch)]).images[0].numpy().tobytes() for epoch in range(8)}
    assert len(crops) > 6
    together = dataset.batch([SampleRequest(0, 5), SampleRequest(3, 5), SampleRequest(1, 5)])
    assert torch.equal(together.images[1], dataset.batch([SampleRequest(3, 5)]).images[0])
    assert together.ids.tolist() == [0, 3, 1]
    other = ready(shared_root, seed=1).train_dataloader().dataset.batch([SampleRequest(3, 5)])
    assert not torch.equal(together.images[1], other.images[0])


def test_files_hold_no_object_per_image():
    """Reference counts would be written to by each worker, which copies the page that the object is in."""
    paths = [f"leftImg8bit/train/city/city_000000_{number:06d}_leftImg8bit.png" for number in range(1000)]
    files = SegmentationFiles.from_paths(types.SimpleNamespace(), paths, paths)
    assert len(pickle.dumps([files.images, files.labels, files.names])) < 1000 * 250
    assert not any(isinstance(value, list | tuple | dict) for value in vars(files.images).values())
    assert files.names[999] == "city_000000_000999"


# Missing data


def test_missing_data_say_where_they_come_from(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        ready(tmp_path / "nowhere")
    message = str(error.value)
    for part in (
        "root: the folder ",
        "nowhere does not exist",
        "www.cityscapes-dataset.com",
        "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip",
        "csDownload leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip",
        "cityscapesscripts",
        "holds leftImg8bit/train/ and gtFine/train/",
        "--data.root FOLDER",
    ):
        assert part in message


def test_wrong_folders_say_what_is_there(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train_split: .*leftImg8bit/train does not exist; \S+ holds data/\."):
        ready(tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=r"val_split: .*dev does not exist; .*leftImg8bit holds train/, val/\..*--data\.val_split",
    ):
        ready(root, val_split="dev")
    with pytest.raises(
        FileNotFoundError,
        match=r"coarse: .*leftImg8bit/train_extra does not exist.*leftImg8bit_trainextra\.zip and gtCoarse\.zip.*"
        r"--data\.coarse false",
    ):
        ready(root, coarse=True)
    shutil.rmtree(root / "gtFine" / "val")
    with pytest.raises(FileNotFoundError, match=r"val_split: .*gtFine/val does not exist; .*gtFine holds train/"):
        ready(root)


def test_an_empty_split(root):
    shutil.rmtree(root / "leftImg8bit" / "val")
    (root / "leftImg8bit" / "val" / "aachen").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"val_split: .*val holds no image \(\*/\*_leftImg8bit\.png\), but aachen/\. Cityscapes"
    ):
        ready(root)


def test_missing_labels_are_named_and_counted(root):
    for number in range(6):
        label_path(root, "train", number).unlink()
    with pytest.raises(FileNotFoundError, match=r"6 of the 7 images in .*leftImg8bit/train have no labels\.") as error:
        ready(root)
    missing = sorted(name_of("train", number) for number in range(6))
    for name in missing[:5]:
        assert f"{name.split('_')[0]}/{name}_gtFine_labelIds.png" in str(error.value)
    assert missing[5] not in str(error.value)
    assert ", ...." in str(error.value)
    assert str(root / "gtFine" / "train") in str(error.value)


def test_labels_without_an_image(root):
    image_path(root, "val", 3).unlink()
    name = f"{CITIES[0]}/{name_of('val', 3)}_leftImg8bit.png"
    with pytest.raises(
        FileNotFoundError,
        match=rf"1 of the 5 label files in .*gtFine/val have no image\. Missing in .*leftImg8bit/val: {name}\. Copy",
    ):
        ready(root)


# Bad files


def test_labels_of_another_size_are_found_before_training(root):
    Image.new("L", (64, 39)).save(label_path(root, "train", 4))
    text = r"_leftImg8bit\.png is 64x40 pixels, but its annotation says 64x39 .*\(Its labels are .*_labelIds\.png\.\)"
    with pytest.raises(ImageError, match=text) as error:
        ready(root)
    assert name_of("train", 4) in str(error.value)


def test_labels_of_another_size_are_found_at_reading(root):
    module = ready(root)
    Image.new("L", (65, 40)).save(label_path(root, "train", 4))
    with pytest.raises(ImageError, match=r"64x40 pixels, but its annotation says 65x40"):
        list(module.train_dataloader())


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (lambda ids: Image.fromarray(colours_of(ids)), r"has pixels of RGB, but a label file holds class ids"),
        (lambda ids: Image.fromarray(ids.astype(np.uint16) * 1000), r"has 16 bits, but a label file"),
        (lambda ids: Image.fromarray(colours_of(ids)).quantize(8), r"has a palette, but a label file"),
        (lambda ids: Image.fromarray(colours_of(ids)).convert("RGBA"), r"has pixels of RGBA, but"),
    ],
)
def test_labels_that_are_no_ids_are_found_before_training(root, image, message):
    path = label_path(root, "train", 2)
    image(stored(root, "train", 2)[1]).save(path)
    with pytest.raises(ImageError, match=re.escape(str(path)) + f" {message}"):
        ready(root)


def test_ids_out_of_range(root):
    pixels, ids = stored(root, "val", 1)
    ids[0, :4] = (34, 200, 255, 34)
    write_sample(root, "val", 1, pixels, ids)
    text = r"gtFine_labelIds\.png holds 34, 200, but the ids of Cityscapes' classes are 0 to 33 .* labelIds\.png, or"
    with pytest.raises(ImageError, match=text):
        ready(root)
    ids[0, :4] = 255  # a license plate
    write_sample(root, "val", 1, pixels, ids)
    module = ready(root)
    assert read_label_ids(label_path(root, "val", 1))[0, :4].tolist() == [255] * 4
    found = by_name(module.val_dataloader())
    assert (found[name_of("val", 1)][2][0, :4] == IGNORED).all()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("path_of", [image_path, label_path])
def test_damaged_files_are_named(root, num_workers, path_of):
    values = np.random.default_rng(0).integers(0, 33, (40, 64, 3), dtype=np.uint8)
    write_sample(root, "train", 5, values, values[:, :, 0].copy())
    path = path_of(root, "train", 5)
    module = ready(root, num_workers=num_workers)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ImageError, match="^" + re.escape(str(path)) + " is damaged, cut short, or not an image"):
        list(module.train_dataloader())


def test_a_file_that_vanishes(root):
    module = ready(root)
    label_path(root, "train", 5).unlink()
    with pytest.raises(FileNotFoundError, match=r"_labelIds\.png does not exist"):
        list(module.train_dataloader())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, r"batch_size: 0 is too small; give 1 or more \(--data\.batch_size 1\)"),
        ({"num_workers": -1}, "num_workers: -1 is too small"),
        ({"seed": -1}, "seed: -1 is too small"),
        ({"eval_batch_size": -1}, "eval_batch_size: -1 is too small"),
        ({"crop_size": -1}, r"crop_size: -1 is too small; give height and width in pixels, or 0"),
        ({"crop_size": (0, 64)}, r"crop_size: \(0, 64\) is too small"),
        ({"train_split": ""}, "train_split: '' is not the name of a split"),
        ({"val_split": "../val"}, "val_split: '../val' is not the name of a split"),
        ({"test_split": ".."}, "test_split: '..' is not the name of a split"),
        ({"classes": ("street",)}, "classes: 'street' is unknown"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        module_of("anywhere", **changes)


# The miniature set


def test_miniature_set_is_made_on_the_spot(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def write_miniature_segmentation(root):
        made.append(root)
        write_cityscapes(root, {**COUNTS, "test": 3})

    monkeypatch.setattr(segmentation_datamodule, "write_miniature_segmentation", write_miniature_segmentation)
    module = MiniatureSegmentationDataModule()
    assert module.classes.names == MINIATURE_CLASSES
    module.prepare_data()
    assert made == [tmp_path / "lightning_attn" / "miniature_segmentation"]
    module.setup("fit")
    module.setup("test")
    found = by_name(module.train_dataloader())
    assert {image.shape for _, image, _ in found.values()} == {(40, 64, 3)}
    assert len(by_name(module.test_dataloader())) == 3
    assert MiniatureSegmentationDataModule(classes=("sky", "car")).classes.names == ("sky", "car")


# With the Trainer


class Recorder(pl.LightningModule):
    """Notes which images it is trained and evaluated on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trained, self.validated, self.predicted = [], [], []

    def training_step(self, batch, batch_idx):
        self.trained.append(batch.ids.tolist())
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated += zip(batch.ids.tolist(), batch.names, strict=True)

    def predict_step(self, batch, batch_idx):
        assert batch.labels == []
        self.predicted += batch.names

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_with_the_trainer(shared_root, precision):
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    model, module = Recorder(), module_of(shared_root, batch_size=2)
    trainer.fit(model, datamodule=module)
    epochs = model.trained[:4], model.trained[4:]
    assert all(sorted(image for ids in epoch for image in ids) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert model.validated == list(enumerate(names_of("val", 5))) * 2
    trainer.predict(model, datamodule=module)
    assert model.predicted == names_of("val", 5)


def test_classes_are_plain_values(shared_root):
    classes = ready(shared_root).classes
    content = json.loads(json.dumps({"names": classes.names, "ids": classes.ids, "colours": classes.colours}))
    again = {
        name: tuple(tuple(one) if isinstance(one, list) else one for one in part) for name, part in content.items()
    }
    assert SegmentationClasses(**again) == classes


def test_public_names():
    assert set(datamodules.__all__) >= {
        "CityscapesDataModule",
        "MiniatureSegmentationDataModule",
        "SegmentationAugmentation",
        "SegmentationBatch",
        "SegmentationClasses",
    }

"""Segmentation data in folders and lists, with classes of their own, and several data sets as one."""

import logging

import numpy as np
import pytest
import torch
from cityscapes_data import COUNTS, write_cityscapes
from PIL import Image

from datamodules import (
    CityscapesDataModule,
    MergedSegmentationDataModule,
    SegmentationAugmentation,
    SegmentationFolderDataModule,
)
from datamodules.images.files import ImageError
from datamodules.segmentation.classes import CITYSCAPES_CLASSES, IGNORED

CLASSES = ("road", "building", "sky", "car")
IDS = (7, 11, 23, 26)
COLOURS = tuple(one.colour for one in CITYSCAPES_CLASSES if one.name in CLASSES)
PLAIN = {"crop_size": 0, "augmentation": SegmentationAugmentation(horizontal_flip=0.0, scales=(1.0, 1.0))}


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory):
    return write_cityscapes(tmp_path_factory.mktemp("folders") / "cityscapes")


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO)
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def ready(module, stage="fit"):
    module.setup(stage)
    return module


def as_folders(cityscapes, target, write):
    """The images and masks of both splits as `images/{split}/{city}/{name}` and `masks/...`; `write` writes a mask."""
    for split in COUNTS:
        for image in sorted((cityscapes / "leftImg8bit" / split).rglob("*.png")):
            stem = image.name.removesuffix("_leftImg8bit.png")
            label = cityscapes / "gtFine" / split / image.parent.name / f"{stem}_gtFine_labelIds.png"
            for kind in ("images", "masks"):
                (target / kind / split / image.parent.name).mkdir(parents=True, exist_ok=True)
            (target / "images" / split / image.parent.name / f"{stem}.png").write_bytes(image.read_bytes())
            write(np.array(Image.open(label)), target / "masks" / split / image.parent.name / stem)
    return target


def grey(ids, path):
    Image.fromarray(ids).save(f"{path}.png")


def palette(ids, path):
    image = Image.fromarray(ids).convert("P")
    image.putdata(ids.ravel().tolist())
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    image.save(f"{path}.png")


def sixteen_bits(ids, path):
    Image.fromarray(ids.astype(np.uint16)).save(f"{path}.png")


def coloured(ids, path):
    table = np.zeros((256, 3), dtype=np.uint8)
    for number, colour in zip(IDS, COLOURS, strict=True):
        table[number] = colour
    Image.fromarray(table[ids]).save(f"{path}.png")


def labels_of(module, split="val"):
    loader = module.train_dataloader() if split == "train" else module.val_dataloader()
    return {name: labels for batch in loader for name, labels in zip(batch.names, batch.labels, strict=True)}


def assert_same_labels(module, cityscapes):
    reference = labels_of(ready(CityscapesDataModule(str(cityscapes), classes=CLASSES, **PLAIN), "validate"))
    found = labels_of(module)
    assert found.keys() == reference.keys()
    for name, labels in reference.items():
        assert torch.equal(found[name], labels)


@pytest.mark.parametrize(
    ("write", "options"),
    [
        (grey, {"ids": IDS}),
        (palette, {"ids": IDS}),
        (sixteen_bits, {"ids": IDS}),
        (coloured, {"colours": COLOURS}),
        (grey, {"ids": IDS, "colours": COLOURS}),
    ],
)
def test_masks_of_every_kind_give_the_labels_of_cityscapes(cityscapes, tmp_path, write, options):
    root = as_folders(cityscapes, tmp_path / "own", write)
    module = SegmentationFolderDataModule(str(root), CLASSES, others="ignore", **options, **PLAIN)
    assert_same_labels(ready(module, "validate"), cityscapes)


def test_masks_with_a_suffix_and_lists(cityscapes, tmp_path):
    root = as_folders(cityscapes, tmp_path / "own", lambda ids, path: grey(ids, f"{path}_mask"))
    module = SegmentationFolderDataModule(
        str(root), CLASSES, ids=IDS, others="ignore", mask_suffix="_mask", eval_batch_size=2, **PLAIN
    )
    assert_same_labels(ready(module, "validate"), cityscapes)
    images = sorted(path.relative_to(root / "images" / "val") for path in (root / "images" / "val").rglob("*.png"))
    lists = {
        "stems.txt": [str(path.with_suffix("")) for path in images],
        "pairs.csv": [f"images/val/{path},masks/val/{path.with_suffix('')}_mask.png" for path in images],
    }
    for name, lines in lists.items():
        (root / name).write_text("".join(f"{line}\n" for line in lines))
        module = SegmentationFolderDataModule(
            str(root), CLASSES, ids=IDS, others="ignore", mask_suffix="_mask", val_list=name, **PLAIN
        )
        assert_same_labels(ready(module, "validate"), cityscapes)


def binary(tmp_path, values, mode="L", ending=".png"):
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / kind / split).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(
                tmp_path / "images" / split / f"{number}.png"
            )
            inside = np.zeros((24, 32), dtype=bool)
            inside[4:16, 8 : 20 + number] = True
            mask = Image.fromarray(np.where(inside, values[1], values[0]).astype(np.uint8))
            (mask.convert(mode) if mode != "L" else mask).save(
                tmp_path / "masks" / split / f"{number}{ending}", **({"quality": 80} if ending == ".jpg" else {})
            )
    return tmp_path


@pytest.mark.parametrize(
    ("values", "mode", "options"),
    [
        ((0, 255), "L", {"ids": (0, 255), "ignored_ids": ()}),
        ((0, 1), "L", {}),
        ((0, 255), "1", {"ids": (0, 1)}),
        ((0, 77), "L", {"ids": (0, 1), "others": "thing"}),
    ],
)
def test_binary_masks(tmp_path, values, mode, options):
    root = binary(tmp_path, values, mode)
    module = ready(SegmentationFolderDataModule(str(root), ("nothing", "thing"), **options, **PLAIN))
    for labels in labels_of(module).values():
        assert (labels[4:16, 8:20] == 1).all()
        assert (labels[:4] == 0).all()


def test_jpeg_masks_are_read_by_the_nearest_value(tmp_path):
    root = binary(tmp_path, (0, 255), ending=".jpg")
    module = ready(SegmentationFolderDataModule(str(root), ("nothing", "thing"), ids=(0, 255), ignored_ids=(), **PLAIN))
    for labels in labels_of(module).values():
        assert set(labels.unique().tolist()) <= {0, 1}
        assert (labels[6:14, 10:18] == 1).all()


def test_binary_masks_without_their_ids_are_refused(tmp_path):
    """255 is ignored unless it is said to be a class: nothing but the background would be learnt."""
    root = binary(tmp_path, (0, 255))
    with pytest.raises(ValueError, match=r"All values are 0 and 255: these are binary masks.*--data.ids '\[0, 255\]'"):
        ready(SegmentationFolderDataModule(str(root), ("nothing", "thing"), **PLAIN))


def test_ids_that_jpeg_blurs_into_each_other_are_refused(tmp_path):
    root = binary(tmp_path, (3, 7), ending=".jpg")
    with pytest.raises(ImageError, match=r"is a JPEG file, whose compression blurs values, and 3 and 7 are too close"):
        ready(SegmentationFolderDataModule(str(root), ("a", "b"), ids=(3, 7), **PLAIN))


def test_borders_in_coloured_jpeg_masks_are_ignored(tmp_path):
    root = binary(tmp_path, (0, 255), ending=".jpg")
    for path in root.glob("masks/*/*.jpg"):
        inside = np.asarray(Image.open(path)) > 128
        colours = np.where(inside[..., None], np.array([255, 0, 0]), np.array([0, 0, 0])).astype(np.uint8)
        Image.fromarray(colours).resize((96, 72), Image.Resampling.NEAREST).save(path, quality=75)
    for path in root.glob("images/*/*.png"):
        Image.open(path).resize((96, 72)).save(path)
    options = {"colours": ((0, 0, 0), (255, 0, 0)), **PLAIN}
    module = ready(SegmentationFolderDataModule(str(root), ("nothing", "thing"), **options))
    labels = module.files("train").read_labels(0)
    assert set(np.unique(labels)) <= {0, 1, IGNORED}
    assert (labels == 1).mean() == pytest.approx(12 * 12 / (24 * 32), abs=0.02)
    with pytest.raises(ValueError, match="hold values of no class"):  # a class of its own is no border
        ready(SegmentationFolderDataModule(str(root), ("nothing", "x"), colours=((0, 0, 0), (0, 0, 255)), **PLAIN))


def test_masks_beside_their_images_are_no_images(tmp_path):
    root = binary(tmp_path, (0, 255))
    for split in ("train", "val"):
        for path in sorted((root / "images" / split).iterdir()):
            Image.open(path).save(path.with_suffix(".jpg"))
            (root / "masks" / split / path.name).replace(path)
    options = {"ids": (0, 255), "train_masks": "images/train", "val_masks": "images/val", **PLAIN}
    files = ready(SegmentationFolderDataModule(str(root), ("nothing", "thing"), **options)).files("train")
    assert [files.images[index] for index in range(len(files))] == [f"images/train/{n}.jpg" for n in range(3)]
    assert files.labels[0] == "images/train/0.png"
    for path in root.glob("images/*/*.png"):
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    options["mask_suffix"] = "_mask"
    files = ready(SegmentationFolderDataModule(str(root), ("nothing", "thing"), **options)).files("train")
    assert [files.labels[index] for index in range(len(files))] == [f"images/train/{n}_mask.png" for n in range(3)]


def test_two_masks_of_one_image_are_refused(tmp_path):
    root = binary(tmp_path, (0, 255))
    Image.open(root / "masks/train/1.png").save(root / "masks/train/1.tif")
    with pytest.raises(ValueError, match=r"holds two masks of one name, 1.png and 1.tif"):
        ready(SegmentationFolderDataModule(str(root), ("nothing", "thing"), ids=(0, 255), **PLAIN))


def test_lists_with_blanks_in_names_and_without_repetitions(tmp_path):
    root = binary(tmp_path, (0, 255))
    for kind in ("images", "masks"):
        (root / kind / "train" / "1.png").rename(root / kind / "train" / "one more.png")
    (root / "list.txt").write_text("images/train/one more.png, masks/train/one more.png\n")
    options = {"ids": (0, 255), "train_list": "list.txt", **PLAIN}
    files = ready(SegmentationFolderDataModule(str(root), ("nothing", "thing"), **options)).files("train")
    assert files.labels[0] == "masks/train/one more.png"
    (root / "list.txt").write_text("0\n0.png\n")
    with pytest.raises(ValueError, match=r"lists the image images/train/0.png twice"):
        ready(SegmentationFolderDataModule(str(root), ("nothing", "thing"), **options))
    (root / "list.txt").write_text("0\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"list.txt is not UTF-8"):
        ready(SegmentationFolderDataModule(str(root), ("nothing", "thing"), **options))


@pytest.mark.parametrize(("value", "dtype", "message"), [(65536, np.int32, "65,536"), (0.5, np.float32, "fractions")])
def test_numbers_that_are_no_ids_are_refused(tmp_path, value, dtype, message):
    root = binary(tmp_path, (0, 255))
    (root / "masks/train/1.png").unlink()
    Image.fromarray(np.full((24, 32), value, dtype=dtype)).save(root / "masks/train/1.tif")
    options = {"colours": ((0, 0, 0), (255, 255, 255)), "ids": (0, 255), **PLAIN}
    with pytest.raises(ImageError, match=message):
        ready(SegmentationFolderDataModule(str(root), ("nothing", "thing"), **options))


def test_a_list_of_classes_without_the_background_is_noticed(tmp_path):
    root = binary(tmp_path, (0, 1))
    with pytest.raises(ValueError, match=r"The ids of the 1 classes are 0 to 0.*if 0 is a background, name it first"):
        ready(SegmentationFolderDataModule(str(root), ("thing",), **PLAIN))


def test_merged_classes_have_colours_of_their_own(tmp_path):
    members = [
        SegmentationFolderDataModule(str(binary(tmp_path / name, (0, 255))), ("nothing", name), ids=(0, 255))
        for name in ("lane", "car", "tree")
    ]
    colours = MergedSegmentationDataModule(members).classes.colours
    assert len(set(colours)) == len(colours) == 4


def test_unknown_values_are_refused_with_their_shares(tmp_path):
    root = binary(tmp_path, (0, 255))
    path = next((root / "masks" / "train").iterdir())
    pixels = np.array(Image.open(path))
    pixels[0] = 200
    Image.fromarray(pixels).save(path)
    module = SegmentationFolderDataModule(str(root), ("nothing", "thing"), ids=(0, 255), ignored_ids=(), **PLAIN)
    with pytest.raises(ValueError, match=r"hold values of no class: 200 \(1.39 %\)"):  # a row of 24, in one of 3
        ready(module)


def test_masks_of_colours_without_colours_say_what_is_missing(cityscapes, tmp_path):
    root = as_folders(cityscapes, tmp_path / "own", coloured)
    with pytest.raises(ImageError, match=r"has pixels of RGB, and the classes have no colours. Give them"):
        ready(SegmentationFolderDataModule(str(root), CLASSES, **PLAIN))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ()}, "classes: the list is empty"),
        ({"ids": (1,)}, "ids: there are 1 for 4 classes"),
        ({"ids": (1, 1, 2, 3)}, "two have the id 1"),
        ({"colours": ((1, 2, 3),) * 4}, "two classes have"),
        ({"colours": ((1, 2),) * 4}, "must be red, green and blue"),
        ({"others": "backgruond"}, "others: 'backgruond' is neither"),
        ({"mask_values": "colours"}, "'colours' needs the colours"),
        ({"train_images": "nowhere"}, "train_images: .*nowhere is not a folder; .* holds images/, masks/"),
        ({"val_masks": "images/val", "mask_suffix": "_x"}, "val_masks: 5 of the 5 images have no mask"),
        ({"train_list": "no.txt"}, "train_list: .*no.txt does not exist"),
    ],
)
def test_bad_options_are_named(cityscapes, tmp_path, options, message):
    root = as_folders(cityscapes, tmp_path / "own", grey)
    stage = "validate" if "val_masks" in options else "fit"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ready(
            SegmentationFolderDataModule(
                str(root),
                **{"classes": CLASSES, "ids": IDS if "ids" not in options else (), "others": "ignore"} | options,
            ),
            stage,
        )


# Labels that mean something else


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ((0, 255), r"All values are 0 and 255: these are binary masks"),
        ((0, 1), r"All values are 0 and 1: these are binary masks"),
    ],
)
def test_labels_without_a_class_are_refused_with_what_they_look_like(cityscapes, tmp_path, values, hint):
    root = write_cityscapes(tmp_path / "data")
    for path in root.rglob("*_labelIds.png"):
        pixels = np.array(Image.open(path))
        Image.fromarray(np.where(pixels > 10, values[1], values[0]).astype(np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"no pixel belongs to one of the classes road.*" + hint):
        ready(CityscapesDataModule(str(root)))


def test_train_ids_are_noticed(tmp_path, messages):
    root = write_cityscapes(tmp_path / "data")
    train_ids = np.full(256, 255, dtype=np.uint8)
    for one in CITYSCAPES_CLASSES:
        train_ids[one.id] = one.train_id
    for path in root.rglob("*_labelIds.png"):
        Image.fromarray(train_ids[np.array(Image.open(path))]).save(path)
    ready(CityscapesDataModule(str(root)))
    assert "as in Cityscapes' *_labelTrainIds.png, or a numbering of your own" in messages()


def test_the_shares_of_classes_are_logged(cityscapes, messages):
    ready(CityscapesDataModule(str(cityscapes), classes=CLASSES))
    line = next(line for line in messages().splitlines() if line.startswith("train: pixels of 7 files"))
    shares = {
        part.rsplit(" ", 2)[0]: float(part.rsplit(" ", 2)[1]) for part in line.partition("files: ")[2].split(", ")
    }
    assert sum(shares.values()) == pytest.approx(100, rel=0.05)
    assert set(shares) == {*CLASSES, "ignored"}


# Several as one


def test_merged_sets_have_the_classes_of_all(cityscapes, tmp_path):
    root = binary(tmp_path / "own", (0, 1))
    members = [
        CityscapesDataModule(str(cityscapes), classes=CLASSES, **PLAIN),
        SegmentationFolderDataModule(str(root), ("ground", "vehicle"), **PLAIN),
    ]
    module = MergedSegmentationDataModule(members, (1.0, 2.0), rename={"vehicle": "car", "ground": ""}, **PLAIN)
    ready(module)
    assert module.classes.names == CLASSES
    labels = labels_of(module)
    assert len(labels) == 5 + 3
    own = [value for name, value in labels.items() if len(name) <= 3 or name.isdigit()]
    assert len(own) == 3
    for one in own:
        assert set(one.unique().tolist()) == {CLASSES.index("car"), IGNORED}
    assert len(module.train_dataloader()) == 7 + 2 * 3

"""Detection data as people really have it: nothing is lost without a word."""

import logging

import numpy as np
import pytest
from coco_data import annotation_path, change_coco, write_coco
from PIL import Image

from datamodules import Augmentation, COCODataModule
from datamodules.images.files import ImageError, pixels_of

PLAIN = {"min_size": 0, "max_size": 0, "augmentation": Augmentation(horizontal_flip=0.0)}
EXIF_ORIENTATION = 0x0112
TURNED = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels),
}


def ready(root, stage="fit", **options):
    module = COCODataModule(str(root), **PLAIN | options)
    module.setup(stage)
    return module


def changed(root, change, split="train2017"):
    change_coco(root, split, change)
    return root


@pytest.fixture
def root(tmp_path):
    return write_coco(tmp_path / "data")


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO)
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


# Orientation


def photo(path, orientation, size, exif=True):
    """A picture that is stored so that viewers show a red corner on the upper left, at the upright size."""
    height, width = size
    upright = np.zeros((height, width, 3), dtype=np.uint8)
    upright[: height // 2, : width // 2] = (255, 0, 0)
    back = {6: 8, 8: 6}.get(orientation, orientation)
    data = Image.Exif()
    if exif:
        data[EXIF_ORIENTATION] = orientation
    Image.fromarray(np.ascontiguousarray(TURNED[back](upright))).save(path, exif=data, lossless=True)


def one_photo(tmp_path, orientation, size, annotated):
    root = write_coco(tmp_path / "data", {"train2017": 1, "val2017": 1})

    def change(content):
        content["images"] = [{"id": 1, "file_name": "photo.webp", "height": annotated[0], "width": annotated[1]}]
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 8, 8], "area": 64, "iscrowd": 0}
        content["annotations"] = [box]

    for split in ("train2017", "val2017"):
        changed(root, change, split)
        for path in (root / split).iterdir():
            path.unlink()
        photo(root / split / "photo.webp", orientation, size)
    return root


def red_corner(pixels):
    """Which quarter is red: rows, then columns."""
    height, width = pixels.shape[1:]
    quarters = [pixels[0, : height // 2, : width // 2], pixels[0, : height // 2, width // 2 :]]
    quarters += [pixels[0, height // 2 :, : width // 2], pixels[0, height // 2 :, width // 2 :]]
    return int(np.argmax([float(quarter.float().mean()) for quarter in quarters]))


@pytest.mark.parametrize("size", [(40, 60), (50, 50)])
@pytest.mark.parametrize("orientation", TURNED)
def test_photos_annotated_as_they_are_shown_are_turned(tmp_path, orientation, size):
    root = one_photo(tmp_path, orientation, size, annotated=size)
    module = ready(root)
    for loader in (module.train_dataloader(), module.val_dataloader()):
        batch = next(iter(loader))
        assert tuple(batch.images[0].shape[1:]) == size
        assert red_corner(batch.images[0]) == 0
    folder = ready(root, "predict", predict_folder=str(root / "val2017"))
    assert red_corner(next(iter(folder.predict_dataloader())).images[0]) == 0


@pytest.mark.parametrize("orientation", TURNED)
def test_photos_annotated_as_they_are_stored(tmp_path, orientation):
    stored = (60, 40) if orientation >= 5 else (40, 60)
    root = one_photo(tmp_path, orientation, (40, 60), annotated=stored)
    expected = {1: 0, 2: 1, 3: 3, 4: 2, 5: 0, 6: 2, 7: 3, 8: 1}[orientation]
    batch = next(iter(ready(root, exif="ignore").val_dataloader()))
    assert tuple(batch.images[0].shape[1:]) == stored
    assert red_corner(batch.images[0]) == expected
    folder = ready(root, "predict", predict_folder=str(root / "val2017"), exif="ignore")
    assert red_corner(next(iter(folder.predict_dataloader())).images[0]) == expected
    if orientation >= 5:  # only the stored size fits, whatever the option says
        assert red_corner(next(iter(ready(root).val_dataloader())).images[0]) == expected


def test_turned_photos_are_counted(tmp_path, messages):
    ready(one_photo(tmp_path, 6, (40, 60), annotated=(40, 60)))
    assert "1 of the 1 images that were checked have an EXIF orientation and are turned upright" in messages()


def test_a_size_that_only_the_other_policy_fits(tmp_path):
    root = one_photo(tmp_path, 6, (40, 60), annotated=(40, 60))
    with pytest.raises(ImageError, match=r"The annotations were made for the upright image: use --data.exif apply"):
        ready(root, exif="ignore")


# Boxes


def test_normalised_boxes_are_refused_with_what_they_look_like(root):
    def change(content):
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        for one in content["annotations"]:
            width, height = sizes[one["image_id"]]
            x, y, w, h = one["bbox"]
            one["bbox"] = [x / width, y / height, w / width, h / height]

    with pytest.raises(ValueError, match=r"smaller than a pixel at the network's size.*look normalised"):
        ready(changed(root, change))


def test_corners_in_the_place_of_sizes_are_noticed(root, messages):
    def change(content):
        for one in content["annotations"]:
            x, y, w, h = one["bbox"]
            one["bbox"] = [x, y, x + w, y + h]

    ready(changed(root, change))
    assert "they look like corners, where width and height are meant" in messages()


def test_boxes_below_a_pixel_are_counted_at_the_network_s_size(root, messages):
    def change(content):
        content["annotations"][0]["bbox"] = [3, 3, 1.5, 1.5]
        content["annotations"][1]["bbox"] = [3, 3, 4, 4]

    changed(root, change)
    module = ready(root, min_size=20)  # 40 x 60 images become half as large
    assert "1 boxes smaller than a pixel at the network's size (annotations 1)" in messages()
    seen = sum(len(target["labels"]) for batch in module.train_dataloader() for target in batch.targets)
    crowds = int(module.annotations("train").crowd.sum())
    assert seen == len(module.annotations("train").labels) - crowds - 1
    said = len(messages())
    ready(root)
    assert "left out of training" in messages()[said:]
    assert "smaller than a pixel" not in messages()[said:]


def test_boxes_cut_at_borders_are_counted(root, messages):
    def change(content):
        content["annotations"][0]["bbox"] = [-5, 0, 20, 20]

    ready(changed(root, change))
    assert "1 boxes are cut at a border of their image" in messages()


def test_areas_larger_than_their_boxes_are_noticed(root, messages):
    def change(content):
        content["annotations"][0]["area"] = 10_000

    ready(changed(root, change))
    assert "1 annotations have an area larger than their box (such as annotation 1)" in messages()


@pytest.mark.parametrize(("value", "crowd"), [(0, False), (1, True), (True, True), (0.0, False)])
def test_flags_of_crowds(root, value, crowd):
    changed(root, lambda content: content["annotations"][0].update(iscrowd=value))
    assert ready(root).annotations("train").crowd[0] == crowd


@pytest.mark.parametrize("value", ["0", "false", 2, None, [1]])
def test_other_flags_of_crowds_are_refused(root, value):
    changed(root, lambda content: content["annotations"][0].update(iscrowd=value))
    with pytest.raises(ValueError, match=r"annotation id 1 has iscrowd .*; it must be 0 or 1"):
        ready(root)


# Files


def test_a_byte_order_mark_is_read(root):
    path = annotation_path(root, "train2017")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(ready(root).annotations("train")) == 11


def test_latin_1_is_named_with_the_way_out(root):
    path = annotation_path(root, "train2017")
    path.write_bytes(path.read_bytes().replace(b"stop sign", "Fu\xdfg\xe4nger".encode("latin1")))
    with pytest.raises(ValueError, match=r"is not UTF-8 \(byte .*Latin-1. Convert it, for instance by: iconv"):
        ready(root)


def test_ids_as_text_are_named_with_who_writes_them(root):
    changed(root, lambda content: content["images"][0].update(id=str(content["images"][0]["id"])))
    with pytest.raises(ValueError, match=r"has id '100'; it must be a whole number. It is text: converters"):
        ready(root)


def test_a_name_of_two_categories_is_named_with_their_ids(root):
    changed(root, lambda content: content["categories"][0].update(name="person"))
    with pytest.raises(ValueError, match=r"the ids 1, 90 all have the name 'person'"):
        ready(root)


def test_backslashes_in_missing_names_are_explained(root):
    changed(root, lambda content: content["images"][0].update(file_name="train2017\\photo.png"))
    with pytest.raises(FileNotFoundError, match=r"have backslashes, which are Windows' separators"):
        ready(root)


def test_a_16_bit_image_of_few_values_is_noticed(tmp_path, messages):
    from datamodules.images import files

    files.reported_few_bits.clear()
    path = tmp_path / "scan.png"
    Image.fromarray(np.full((8, 8), 900, dtype=np.uint16)).save(path)
    files.read_image(path)
    assert "of which the largest is 900 of 65,535: it becomes nearly black" in messages()


# Files that cannot be used while a stage runs


def damage(path):
    path.write_bytes(path.read_bytes()[:120])


def test_a_damaged_training_image_stops_or_is_replaced(root):
    victim = root / "train2017" / ready(root).annotations("train").names[4]
    damage(victim)  # its header is whole, so that only decoding finds it
    with pytest.raises(ImageError, match=victim.name):
        list(ready(root).train_dataloader())
    module = ready(root, on_bad_image="skip")
    batches = list(module.train_dataloader())
    (bad,) = [image for batch in batches for image in batch.bad]
    assert bad.name == victim.name
    assert victim.name in bad.reason
    images = sum(len(batch) for batch in batches)
    assert images == len(module.training_dataset()), "the next image comes in its place"


def test_nothing_but_damaged_images_stops_a_training_that_skips(root):
    for path in (root / "train2017").iterdir():
        damage(path)
    with pytest.raises(ImageError, match="damaged, cut short, or not an image"):
        list(ready(root, on_bad_image="skip").train_dataloader())


def test_a_damaged_image_is_left_out_of_a_prediction(root):
    module = ready(root, "predict", predict_folder=str(root / "val2017"))
    names = [module.annotations("predict").names[index] for index in range(5)]
    damage(root / "val2017" / names[2])
    module = ready(root, "predict", predict_folder=str(root / "val2017"))
    batches = list(module.predict_dataloader())
    assert sorted(name for batch in batches for name in batch.names) == sorted(names[:2] + names[3:])
    (bad,) = [image for batch in batches for image in batch.bad]
    assert bad.name == names[2]
    assert "image id" in bad.reason, "the names of these files are numbers, which are the ids"


def test_images_below_the_predicted_folder_have_names_of_their_own(root):
    (root / "photos" / "a.b").mkdir(parents=True)
    source = sorted((root / "val2017").iterdir())
    places = ("frame.0001.png", "frame.0002.png", "a.b/frame.0001.png", "x.png", "X.PNG")
    for path, name in zip(source, places, strict=False):
        (root / "photos" / name).write_bytes(path.read_bytes())
    module = ready(root, "predict", predict_folder=str(root / "photos"))
    batches = list(module.predict_dataloader())
    outputs = {name: output for batch in batches for name, output in zip(batch.names, batch.outputs, strict=True)}
    assert outputs.keys() == set(places)
    assert len({output.casefold() for output in outputs.values()}) == len(places)
    assert outputs["frame.0002.png"] == "frame.0002"


def test_long_and_odd_names_have_outputs_that_can_be_written(root):
    source = next((root / "val2017").iterdir()).read_bytes()
    folder = root / "photos" / ("d" * 120) / ("e" * 120)
    folder.mkdir(parents=True)
    names = ["b" * 235 + ".png", "日本" * 40 + ".png", "..png", f"{'d' * 120}/{'e' * 120}/a.png", "a.png"]
    for name in names:
        (root / "photos" / name).write_bytes(source)
    module = ready(root, "predict", predict_folder=str(root / "photos"))
    outputs = [output for batch in module.predict_dataloader() for output in batch.outputs]
    assert len(set(outputs)) == len(names)
    for output in outputs:
        assert len(output.encode()) <= 160
        assert output.strip(".")
        (root / f".{output}_pred_labelIds.png.abcdefgh.part").touch()


def test_images_of_other_formats_are_named(root, messages):
    (root / "val2017" / "photo.heic").touch()
    ready(root, "predict", predict_folder=str(root / "val2017"))
    assert "1 files with the endings .heic are left out" in messages()


@pytest.mark.parametrize("bbox", [[[5, 8], [30, 38]], [5, 8, 10**400, 3]])
def test_boxes_that_are_not_four_numbers(root, bbox):
    def change(content):
        for one in content["annotations"]:
            one["bbox"] = bbox

    with pytest.raises(ValueError, match="it must be four finite numbers"):
        ready(changed(root, change))


def test_boxes_without_width_are_no_targets(root):
    def change(content):
        content["annotations"][0]["bbox"] = [22.59, 3, 2e-6, 4]

    module = ready(changed(root, change))
    list(module.train_dataloader())
    index = int(module.annotations("train").image_indices()[0])
    assert len(module.annotations("train").targets(index)[0]) < len(module.annotations("train").bboxes)


def test_double_separators_in_names(root):
    changed(root, lambda content: [one.update(file_name=f".//{one['file_name']}") for one in content["images"]])
    ready(root)


def test_a_damaged_pillow_image_is_named(root):
    path = root / "val2017" / "cut.png"
    path.write_bytes(next((root / "val2017").iterdir()).read_bytes()[:150])
    with Image.open(path) as image, pytest.raises(ImageError, match=r"cut.png is damaged"):
        pixels_of(image)


# Without validation


def test_training_without_a_validation_split(root):
    module = ready(root, val_split="")
    assert module.val_dataloader() == []
    with pytest.raises(ValueError, match="val_split: it is empty, and validate needs it"):
        module.setup("validate")


def test_an_annotation_file_that_is_nested_without_end(tmp_path):
    write_coco(tmp_path, {"train2017": 2, "val2017": 2})
    annotation_path(tmp_path, "train2017").write_text('{"images": ' + "[" * 1_000_000)
    with pytest.raises(ValueError, match="is not an annotation file: lists or objects in it are nested too deeply"):
        ready(tmp_path)

import hashlib
import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.miniature import backgrounds
from datamodules.miniature import detection as miniature_detection
from datamodules.miniature.backgrounds import SCENES, SURFACES, background, crop, photograph
from datamodules.miniature.detection import (
    MINIATURE_CATEGORIES,
    MINIATURE_PICTURES,
    SIGN_SIZE,
    draw_picture,
    write_miniature_detection,
)

COUNTS = {"train": 48, "val": 20, "test": 12}
TINY = {"train": 3, "val": 2, "test": 1}
FLOWERS = {MINIATURE_CATEGORIES["day_flower"], MINIATURE_CATEGORIES["night_flower"]}
FIRST_IDS = {"train": 100_001, "val": 200_001, "test": 300_001}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    write_miniature_detection(folder, COUNTS)
    return folder


def load(root: Path, part: str) -> dict:
    return json.loads((root / f"annotations/instances_{part}2017.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def sign_box(picture) -> tuple[slice, slice]:
    top, left = picture.sign
    return slice(top, top + SIGN_SIZE), slice(left, left + SIGN_SIZE)


# ------------------------------------------------------------------------------------------------------ determinism


def test_same_bytes_each_time_whatever_the_global_random_state(tmp_path):
    np.random.seed(1)
    write_miniature_detection(tmp_path / "a", TINY)
    np.random.seed(2)
    write_miniature_detection(tmp_path / "b", TINY)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_picture_does_not_depend_on_how_many_others_there_are(tmp_path, root):
    write_miniature_detection(tmp_path, TINY)
    few, many = contents(tmp_path), contents(root)
    pictures = [name for name in few if name.endswith(".png")]
    assert len(pictures) == sum(TINY.values())
    assert all(few[name] == many[name] for name in pictures)
    for part in TINY:
        all_annotations = {a["id"]: a for a in load(root, part)["annotations"]}
        assert all(all_annotations[a["id"]] == a for a in load(tmp_path, part)["annotations"])


@pytest.mark.skipif(
    (version("numpy"), version("pillow"), version("scikit-image")) != ("2.4.6", "13.0.0", "0.26.0"),
    reason="other releases may draw other pixels",
)
def test_pixels_and_annotations_are_the_same_on_every_machine(root):
    # If this changes on purpose, raise DRAWING_VERSION, or sets on disk will not be drawn anew.
    digest = hashlib.sha256()
    for part in COUNTS:
        digest.update((root / f"annotations/instances_{part}2017.json").read_bytes())
        for path in sorted((root / f"{part}2017").iterdir()):
            with Image.open(path) as image:
                digest.update(np.asarray(image).tobytes())
    assert miniature_detection.DRAWING_VERSION == 1
    assert digest.hexdigest() == "0d801603817bd3796f3268d94f2c6e3da88a943518c921d4285101ab1545d53b"


# ------------------------------------------------------------------------------------------------- COCO's layout


def test_layout_ids_and_sizes(root):
    assert MINIATURE_PICTURES == {"train": 400, "val": 80, "test": 80}
    assert len(set(MINIATURE_CATEGORIES.values())) == 8
    assert sorted(MINIATURE_CATEGORIES.values()) != list(range(1, 9))  # gaps, as in COCO
    image_ids, annotation_ids, sizes = [], [], Counter()
    for part, count in COUNTS.items():
        content = load(root, part)
        assert {c["name"]: c["id"] for c in content["categories"]} == MINIATURE_CATEGORIES
        assert len(content["images"]) == count
        assert sorted(path.name for path in (root / f"{part}2017").iterdir()) == [
            image["file_name"] for image in content["images"]
        ]
        for image in content["images"]:
            assert image["file_name"] == f"{image['id']:012d}.png"
            with Image.open(root / f"{part}2017" / image["file_name"]) as picture:
                assert picture.mode == "RGB"
                assert picture.size == (image["width"], image["height"])
                sizes[picture.size] += 1
        image_ids += [image["id"] for image in content["images"]]
        annotation_ids += [a["id"] for a in content["annotations"]]
        assert {a["image_id"] for a in content["annotations"]} <= {image["id"] for image in content["images"]}
    assert len(set(image_ids)) == len(image_ids)
    assert len(set(annotation_ids)) == len(annotation_ids)
    assert all(min(size) >= 120 and max(size) <= 192 for size in sizes)
    assert len({width / height for width, height in sizes}) >= 4
    assert {width > height for width, height in sizes} == {True, False}


def test_pycocotools_reads_it_and_finds_the_annotated_areas_and_boxes(root, capsys):
    coco_module = pytest.importorskip("pycocotools.coco")
    crowds, gaps = 0, []
    for part in COUNTS:
        coco = coco_module.COCO(str(root / f"annotations/instances_{part}2017.json"))
        assert sorted(coco.getCatIds()) == sorted(MINIATURE_CATEGORIES.values())
        for annotation in coco.anns.values():
            mask = coco.annToMask(annotation)
            ys, xs = np.nonzero(mask)
            left, top, width, height = annotation["bbox"]
            found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            gap = np.abs(found - [left, top, left + width, top + height])
            if annotation["iscrowd"]:
                assert gap.max() == 0
                assert annotation["area"] == mask.sum()
                crowds += 1
            else:  # outlines end between pixels, and the tip of a star is thinner than one
                assert gap.max() <= 2
                assert abs(mask.sum() - annotation["area"]) <= 8 + 0.1 * annotation["area"]
                gaps += gap.tolist()
    assert crowds >= 4
    assert np.mean(gaps) < 0.4


def test_boxes_are_tight_around_what_is_visible():
    for index in range(40):
        picture = draw_picture("val", index)
        for thing, annotation in zip(picture.objects, picture.annotations(1), strict=True):
            rows, columns = (np.flatnonzero((thing.coverage > 0.5).any(axis)) for axis in (1, 0))
            left, top, width, height = annotation["bbox"]
            visible = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert np.abs(visible - [left, top, left + width, top + height]).max() <= 1


def test_a_perfect_detector_has_an_ap_of_one(root, capsys):
    coco_module, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    truth = coco_module.COCO(str(root / "annotations/instances_val2017.json"))
    detections = [
        {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for a in truth.anns.values()
        if not a["iscrowd"]
    ]
    scores = cocoeval.COCOeval(truth, truth.loadRes(detections), "bbox")
    scores.evaluate()
    scores.accumulate()
    scores.summarize()
    assert scores.stats[0] == pytest.approx(1)


def test_boxes_lie_inside_their_pictures_and_are_of_useful_size(root):
    longest = []
    for part in COUNTS:
        content = load(root, part)
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        for annotation in content["annotations"]:
            left, top, width, height = annotation["bbox"]
            picture_width, picture_height = sizes[annotation["image_id"]]
            assert 0 <= left < left + width <= picture_width + 1e-9
            assert 0 <= top < top + height <= picture_height + 1e-9
            assert min(width, height) > 3
            assert 0 < annotation["area"] <= width * height + 0.01
            if not annotation["iscrowd"]:
                longest.append(max(width, height))
                assert all(len(polygon) >= 6 for polygon in annotation["segmentation"])
    assert np.mean([16 <= side <= 64 for side in longest]) > 0.9


def test_all_kinds_of_pictures_occur(root):
    seen = Counter()
    for part in COUNTS:
        content = load(root, part)
        per_image = Counter(a["image_id"] for a in content["annotations"])
        seen["empty"] += len(content["images"]) - len(per_image)
        seen["crowd"] += sum(a["iscrowd"] for a in content["annotations"])
        seen["several"] += sum(2 <= count <= 6 for count in per_image.values())
        seen.update(a["category_id"] for a in content["annotations"] if not a["iscrowd"])
        assert max(per_image.values()) <= 7  # six things and a crowd
    assert seen["empty"] == 3 + 1 + 1  # number 5, 21, 37, ... of each part
    assert seen["crowd"] >= 4
    assert seen["several"] > 50
    assert all(seen[number] >= 10 for number in MINIATURE_CATEGORIES.values())


# ---------------------------------------------------------------------------------------------------- occlusion


def test_things_are_hidden_and_cut_but_never_too_much():
    shares = []
    for index in range(60):
        objects = draw_picture("train", index).objects
        if objects:
            assert sum(one.coverage for one in objects).max() <= 1 + 1e-9  # no pixel is counted for two objects
        shares += [(one.coverage > 0.5).sum() / one.full_area for one in objects if not one.crowd]
    assert min(shares) >= 0.4
    assert sum(share < 0.85 for share in shares) > 15
    assert sum(share > 0.97 for share in shares) > 60


def test_outlines_and_run_lengths_show_what_is_visible():
    masks = pytest.importorskip("pycocotools.mask")
    crowds, overlaps = 0, []
    for index in range(40):
        picture = draw_picture("train", index)
        size = picture.pixels.shape[:2]
        for one, annotation in zip(picture.objects, picture.annotations(1), strict=True):
            packed = masks.frPyObjects(annotation["segmentation"], *size)
            found = masks.decode(packed if one.crowd else masks.merge(packed)).astype(bool)
            visible = one.coverage > 0.5
            if one.crowd:
                assert np.array_equal(found, visible)
                crowds += 1
            else:
                overlaps.append((found & visible).sum() / (found | visible).sum())
    assert crowds >= 3
    assert min(overlaps) > 0.75
    assert np.mean(overlaps) > 0.93


# ---------------------------------------------------------------------------------- long-range context


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_nothing_but_the_sign_depends_on_the_context(part):
    """Same random stream, either sign: same boxes, and same pixels everywhere outside the square of the sign."""
    flowers = 0
    for index in range(30):
        day, night = draw_picture(part, index, night=False), draw_picture(part, index, night=True)
        assert day.sign == night.sign
        differs = (day.pixels != night.pixels).any(-1)
        assert differs[sign_box(day)].mean() > 0.5  # the signs differ
        differs[sign_box(day)] = False
        assert not differs.any()
        first, second = (picture.annotations(7) for picture in (day, night))
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            pair = (a.pop("category_id"), b.pop("category_id"))
            assert a == b
            if pair[0] in FLOWERS or pair[1] in FLOWERS:
                assert pair == (MINIATURE_CATEGORIES["day_flower"], MINIATURE_CATEGORIES["night_flower"])
                flowers += 1
            else:
                assert pair[0] == pair[1]
    assert flowers > 10


def test_a_flower_is_half_a_picture_away_from_its_sign_which_is_in_a_corner():
    distances, corners = [], Counter()
    for index in range(80):
        picture = draw_picture("train", index)
        shape, (top, left) = picture.pixels.shape[:2], picture.sign
        for start, limit in zip((top, left), shape, strict=True):
            assert min(start, limit - start - SIGN_SIZE) <= 6
        corners[top > shape[0] / 2, left > shape[1] / 2] += 1
        axis = int(shape[1] > shape[0])
        for thing in picture.objects:
            assert not thing.coverage[sign_box(picture)].any()  # nothing hides the sign
            if thing.name == "flower":
                span = np.flatnonzero(thing.coverage.any(1 - axis))
                gap = max(picture.sign[axis] - span[-1] - 1, span[0] - picture.sign[axis] - SIGN_SIZE)
                distances.append(gap / shape[axis])
    assert len(distances) > 40
    assert min(distances) >= 0.5
    assert len(corners) == 4


def test_the_written_category_of_flowers_is_what_the_sign_says(root):
    told = Counter()
    for part, count in COUNTS.items():
        by_image: dict[int, set[int]] = {}
        for annotation in load(root, part)["annotations"]:
            if annotation["category_id"] in FLOWERS:
                by_image.setdefault(annotation["image_id"], set()).add(annotation["category_id"])
        for index in range(count):
            image_id = FIRST_IDS[part] + index
            picture = draw_picture(part, index)
            with Image.open(root / f"{part}2017/{image_id:012d}.png") as image:
                assert np.array_equal(np.asarray(image), picture.pixels)
            # The moon's square is blue and dark, the sun's is bright: from the file alone, without knowing the bit.
            red, _, blue = picture.pixels[sign_box(picture)].astype(float).reshape(-1, 3).mean(0)
            assert picture.night == (red < blue * 0.9 and red < 110)
            told[picture.night] += 1
            if image_id in by_image:
                expected = "night_flower" if picture.night else "day_flower"
                assert by_image[image_id] == {MINIATURE_CATEGORIES[expected]}
    assert min(told.values()) > 0.35 * told.total()


# ---------------------------------------------------------------------------------------------------- photographs


def test_photographs_are_read_without_a_network_and_cannot_be_changed(monkeypatch):
    monkeypatch.setattr("socket.socket", None)
    photograph.cache_clear()
    for name in (*SCENES, *SURFACES):
        pixels = photograph(name)
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
        assert min(pixels.shape[:2]) >= 300
        with pytest.raises(ValueError, match="read-only"):
            pixels[0, 0] = 0


def test_training_and_evaluation_share_no_pixel_of_a_photograph(monkeypatch):
    columns = np.zeros((300, 450, 3), np.uint8)
    columns[:, 300:] = 200  # the right third
    monkeypatch.setattr(backgrounds, "photograph", lambda name: columns)
    rng = np.random.default_rng(0)
    for _ in range(40):
        assert crop(rng, "coffee", 128, 160, held_out=False).max() == 0
        assert crop(rng, "coffee", 160, 128, held_out=True).min() == 200


def test_crops_have_the_asked_size_however_large_and_vary():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (128, 160), (700, 40), (256, 1024)):
        for held_out in (False, True):
            pixels = background(rng, height, width, held_out=held_out)
            assert pixels.shape == (height, width, 3)
            assert pixels.dtype == np.uint8
    assert len({background(rng, 60, 60, held_out=False).tobytes() for _ in range(20)}) == 20


def test_bad_photographs_and_sizes_are_refused(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"name='lena': the photographs are astronaut, .*gravel"):
        photograph("lena")
    with pytest.raises(ValueError, match=r"height=0, width=5: give at least one pixel"):
        crop(rng, "grass", 0, 5, held_out=False)
    photograph.cache_clear()
    monkeypatch.setattr(backgrounds, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"coffee\.png: the installed scikit-image lacks .*Reinstall"):
        photograph("coffee")


# --------------------------------------------------------------------------------------------- atomic writing


def test_second_call_does_nothing_and_other_counts_replace_the_set(tmp_path):
    write_miniature_detection(tmp_path, TINY)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write_miniature_detection(tmp_path, TINY)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    fewer = TINY | {"train": 1}
    write_miniature_detection(tmp_path, fewer)
    write_miniature_detection(tmp_path / "fresh", fewer)
    fresh = contents(tmp_path / "fresh")
    assert {name: data for name, data in contents(tmp_path).items() if not name.startswith("fresh")} == fresh


def test_a_damaged_set_is_written_anew(tmp_path):
    write_miniature_detection(tmp_path, TINY)
    first = contents(tmp_path)
    pictures = sorted((tmp_path / "train2017").iterdir())
    pictures[0].write_bytes(pictures[0].read_bytes()[:100])
    pictures[1].unlink()
    (tmp_path / "annotations/instances_val2017.json").write_text("{")
    write_miniature_detection(tmp_path, TINY)
    assert contents(tmp_path) == first


def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(part, index):
        if part == "val":
            raise KeyboardInterrupt
        return draw_picture(part, index)

    monkeypatch.setattr(miniature_detection, "draw_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_miniature_detection(tmp_path, TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moves", [1, 2, 5, 9])
def test_interrupted_exchange_is_finished_by_the_next_call(tmp_path, monkeypatch, moves):
    write_miniature_detection(tmp_path, TINY)
    replace, calls = Path.replace, []

    def broken(self, target):
        calls.append(target)
        if len(calls) > moves:
            raise OSError("broken")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="broken"):
        write_miniature_detection(tmp_path, TINY | {"val": 3})
    monkeypatch.undo()
    assert not list(tmp_path.glob(".miniature-*"))
    manifest = json.loads((tmp_path / miniature_detection.MANIFEST_NAME).read_text())
    assert "sha256" not in manifest  # not taken for complete, whichever set is asked for
    write_miniature_detection(tmp_path, TINY)
    write_miniature_detection(tmp_path / "fresh", TINY)
    fresh = contents(tmp_path / "fresh")
    assert {name: data for name, data in contents(tmp_path).items() if not name.startswith("fresh")} == fresh


@pytest.mark.parametrize("taken", ["annotations/instances_val2017.json", "train2017/000000000009.jpg"])
def test_somebody_elses_coco_is_left_alone(tmp_path, taken):
    (tmp_path / taken).parent.mkdir()
    (tmp_path / taken).write_text("mine")
    with pytest.raises(FileExistsError, match=r"already holds .*2017.*folder of its own"):
        write_miniature_detection(tmp_path, TINY)
    assert contents(tmp_path) == {taken: b"mine"}


@pytest.mark.parametrize("wrong", [{"train": 3}, TINY | {"val": 0}, TINY | {"valid": 2}, {}])
def test_wrong_counts_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"counts=.*at least 1 for each of train, val, test"):
        write_miniature_detection(tmp_path / "new", wrong)
    assert not (tmp_path / "new").exists()

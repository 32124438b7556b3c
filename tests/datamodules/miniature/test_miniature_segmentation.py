import hashlib
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.miniature import segmentation as miniature_segmentation
from datamodules.miniature.painting import SIGN_SIZE, Camera, Painting, Shape
from datamodules.miniature.segmentation import (
    MINIATURE_CLASSES,
    MINIATURE_PICTURES,
    draw_picture,
    write_miniature_segmentation,
)
from datamodules.segmentation.classes import SegmentationClasses

COUNTS = {"train": 40, "val": 14, "test": 10}
TINY = {"train": 3, "val": 2, "test": 1}
SHAPE = (96, 192)
ROAD, POLE, TRAFFIC_SIGN, SKY, TRUCK, BUS = 7, 17, 20, 23, 27, 28
UNLABELLED, EGO = 0, 1
ENDINGS = ("leftImg8bit", "gtFine_labelIds")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    write_miniature_segmentation(folder, COUNTS)
    return folder


@pytest.fixture(scope="module")
def labels(root) -> list[np.ndarray]:
    """The label ids of all pictures."""
    return [np.asarray(Image.open(path)) for path in sorted(root.rglob("*_labelIds.png"))]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def sign_box(picture) -> tuple[slice, slice]:
    top, left = picture.sign
    return slice(top, top + SIGN_SIZE), slice(left, left + SIGN_SIZE)


# ------------------------------------------------------------------------------------------------------ determinism


def test_same_bytes_each_time_whatever_the_global_random_state(tmp_path):
    np.random.seed(1)
    write_miniature_segmentation(tmp_path / "a", TINY)
    np.random.seed(2)
    write_miniature_segmentation(tmp_path / "b", TINY)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_picture_does_not_depend_on_how_many_others_there_are(tmp_path, root):
    write_miniature_segmentation(tmp_path, TINY)
    few, many = contents(tmp_path), contents(root)
    files = [name for name in few if name.endswith(".png")]
    assert len(files) == 2 * sum(TINY.values())
    assert all(few[name] == many[name] for name in files)
    assert len({data for name, data in many.items() if "leftImg8bit" in name}) == sum(COUNTS.values())


@pytest.mark.skipif(
    (version("numpy"), version("pillow"), version("scikit-image")) != ("2.4.6", "13.0.0", "0.26.0"),
    reason="other releases may draw other pixels",
)
def test_pixels_and_labels_are_the_same_on_every_machine(root):
    # If this changes on purpose, raise DRAWING_VERSION, or sets on disk will not be drawn anew.
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.png")):
        with Image.open(path) as image:
            digest.update(np.asarray(image).tobytes())
    assert miniature_segmentation.DRAWING_VERSION == 1
    assert digest.hexdigest() == "3d3e85a114a0acc816bc1b8146b3bdfe387fe3ffcefdef111e69c7591a8f1c9f"


# ------------------------------------------------------------------------------------------------ Cityscapes' layout


def test_layout_names_and_sizes(root):
    assert MINIATURE_PICTURES == {"train": 320, "val": 64, "test": 64}
    cities: dict[str, str] = {}
    for part, count in COUNTS.items():
        images = sorted((root / "leftImg8bit" / part).rglob("*.*"))
        assert len(images) == count
        frames = Counter()
        for path in images:
            match = re.fullmatch(r"([a-z]+)_(\d{6})_(\d{6})_leftImg8bit\.png", path.name)
            assert match
            assert path.parent.name == match[1]
            assert cities.setdefault(match[1], part) == part  # no city in two parts
            frames[match[1]] += 1
            label = root / "gtFine" / part / match[1] / path.name.replace("leftImg8bit", "gtFine_labelIds")
            with Image.open(path) as image, Image.open(label) as ids:
                assert (image.mode, ids.mode) == ("RGB", "L")
                assert image.size == ids.size == SHAPE[::-1]
        assert max(frames.values()) - min(frames.values()) <= 1
        assert len(list((root / "gtFine" / part).rglob("*.*"))) == count
    assert len(cities) > 3


def test_classes_are_cityscapes_own_in_the_order_of_their_train_ids():
    table = pytest.importorskip("cityscapesscripts.helpers.labels").name2label
    train_ids = [table[name].trainId for name in MINIATURE_CLASSES]
    assert train_ids == sorted(train_ids)
    assert max(train_ids) < 19
    assert len(MINIATURE_CLASSES) >= 8
    classes = SegmentationClasses.chosen(MINIATURE_CLASSES)
    assert [table[name].id for name in MINIATURE_CLASSES] == list(classes.ids)
    assert (table["unlabeled"].id, table["ego vehicle"].id) == (UNLABELLED, EGO)


def test_all_classes_occur_often_and_large_enough_to_be_learned(labels):
    classes = SegmentationClasses.chosen(MINIATURE_CLASSES)
    assert classes.names == MINIATURE_CLASSES
    pictures, pixels = Counter(), Counter()
    for ids in labels:
        assert set(np.unique(ids).tolist()) <= {*classes.ids, UNLABELLED, EGO}
        for number, count in zip(*np.unique(ids, return_counts=True), strict=True):
            pictures[int(number)] += 1
            pixels[int(number)] += int(count)
    assert all(pictures[number] >= 0.25 * len(labels) for number in classes.ids)
    assert all(pixels[number] >= 0.006 * pixels.total() for number in classes.ids)
    assert pixels[ROAD] < 0.4 * pixels.total()
    large = [np.isin(ids, (TRUCK, BUS)).sum() for ids in labels]
    assert 0.6 < np.mean([count > 0 for count in large]) < 0.85
    assert np.median([count for count in large if count]) > 0.1 * SHAPE[0] * SHAPE[1]


def test_own_car_and_thin_seams_do_not_count(labels):
    seams = 0
    for ids in labels:
        rows = np.flatnonzero((ids == EGO).any(1))
        assert rows[-1] == SHAPE[0] - 1
        assert 4 <= len(rows) <= 10
        assert (ids == EGO).mean() < 0.08
        unlabelled = ids == UNLABELLED
        assert unlabelled.mean() < 0.06
        seams += unlabelled.any()
        # Thin: hardly any block of 3 x 3 pixels is unlabelled as a whole.
        blocks = np.lib.stride_tricks.sliding_window_view(unlabelled, (3, 3)).all((2, 3))
        assert blocks.mean() < 0.005
    assert seams > 0.7 * len(labels)


# ---------------------------------------------------------------------------------------- painting and perspective


def painting(sign=(2, 2)) -> Painting:
    return Painting(Image.new("RGB", SHAPE[::-1], (100, 150, 200)), sign)


def rectangle(left, top, right, bottom, colour=(200, 10, 10), surface=0):
    return Shape([(left, top), (right, top), (right, bottom), (left, bottom)], colour, surface)


def test_a_label_is_what_is_at_the_centre_of_a_pixel():
    canvas = painting()
    assert canvas.thing(POLE, [rectangle(60.6, 40.0, 69.1, 49.7)])
    ids = canvas.ids()
    rows, columns = np.nonzero(ids == POLE)
    assert (rows.min(), rows.max()) == (40, 49)
    assert (columns.min(), columns.max()) == (61, 68)
    assert (ids == POLE).sum() == 10 * 8
    assert (ids == SKY).sum() == ids.size - 10 * 8
    colours = canvas.colours({})
    assert colours.shape == (*SHAPE, 3)
    assert np.array_equal(colours[45, 65], (200, 10, 10))
    assert 100 < colours[45, 60, 0] < 200  # covered in part


def test_marks_keep_labels_and_surfaces_change_brightness_only_there():
    canvas = painting()
    canvas.thing(ROAD, [rectangle(50, 50, 100, 80)])
    canvas.mark(rectangle(60, 60, 70, 70, (20, 40, 60), surface=3))
    assert set(np.unique(canvas.ids()).tolist()) == {SKY, ROAD}
    plain, textured = canvas.colours({}), canvas.colours({3: np.full(SHAPE, 1.5)})
    assert np.allclose(textured[65, 65], 1.5 * np.array([20, 40, 60]))
    outside = np.ones(SHAPE, bool)
    outside[59:72, 59:72] = False
    assert np.array_equal(plain[outside], textured[outside])


def test_a_seam_surrounds_a_thing_and_takes_nothing_from_it():
    canvas, other = painting(), painting()
    shapes = [rectangle(60, 40, 80, 60), rectangle(70, 50, 90, 70)]  # their inner borders have none
    canvas.thing(POLE, shapes, seam=True)
    other.thing(POLE, shapes)
    ids = canvas.ids()
    assert np.array_equal(ids == POLE, other.ids() == POLE)
    assert np.array_equal(canvas.colours({}), other.colours({}))
    assert set(np.unique(ids[grown(ids == POLE, 1) & (ids != POLE)]).tolist()) == {UNLABELLED}
    assert not (ids == UNLABELLED)[~grown(ids == POLE, 2)].any()


def grown(mask: np.ndarray, steps: int) -> np.ndarray:
    """With the pixels above, below, left and right of it, so many times; nothing may be at the border."""
    for _ in range(steps):
        mask = mask | np.any([np.roll(mask, step, axis) for step in (-1, 1) for axis in (0, 1)], axis=0)
    return mask


@pytest.mark.parametrize(
    ("box", "free"),
    [((30, 3, 40, 9), True), ((3, 30, 40, 60), True), ((20, 20, 40, 40), False), ((0, 0, 90, 90), False)],
)
def test_nothing_is_painted_that_reaches_into_the_square_of_the_sign(box, free):
    canvas = painting()
    assert canvas.leaves_sign_free([rectangle(*box)]) == free
    assert canvas.thing(POLE, [rectangle(50, 50, 60, 60), rectangle(*box)]) == free
    assert (canvas.ids() == POLE).any() == free


def test_perspective_halves_what_is_twice_as_far():
    camera = Camera(focal=110, height=1.7, column=100, row=43)
    for x, y in ((2.0, 0.0), (-3.0, 1.0), (0.5, 4.0)):
        near, far = np.array(camera(x, y, 6)), np.array(camera(x, y, 12))
        assert np.allclose(near - (100, 43), 2 * (far - (100, 43)))
    assert camera(5, 1.7, 9)[1] == 43  # what is as high as the camera is on the horizon
    left, right = camera.front(-1, 1, 0, 2, 11)[:2]
    assert right[0] - left[0] == pytest.approx(20)  # 2 m at 10 pixels a metre


def test_posts_and_plates_are_wide_enough_to_be_seen_at_an_eighth(labels):
    posts = [width for ids in labels for width in runs(ids == POLE)]
    assert 6 <= np.median(posts) <= 8
    assert np.mean([width >= 6 for width in posts]) > 0.7
    plates = [max(widths) for ids in labels if (widths := runs(ids == TRAFFIC_SIGN))]
    assert min(plates) >= 12
    assert 13 <= np.median(plates) <= 25


def runs(mask: np.ndarray) -> list[int]:
    """Lengths of the horizontal runs of a mask."""
    steps = np.diff(np.pad(mask.astype(int), ((0, 0), (1, 1))), axis=1)
    return (np.nonzero(steps == -1)[1] - np.nonzero(steps == 1)[1]).tolist()


def test_evaluation_takes_its_surfaces_from_other_parts_of_the_photographs(monkeypatch):
    asked = Counter()
    crop = miniature_segmentation.crop

    def recorded(rng, name, height, width, *, held_out):
        asked[name, held_out] += 1
        return crop(rng, name, height, width, held_out=held_out)

    monkeypatch.setattr(miniature_segmentation, "crop", recorded)
    for part in COUNTS:
        draw_picture(part, 0)
    assert asked == {
        (name, held_out): 1 + held_out for name in ("brick", "grass", "gravel") for held_out in (True, False)
    }


# ---------------------------------------------------------------------------------- long-range context


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_nothing_but_the_sign_depends_on_the_context(part):
    """Same random stream, either sign: same pixels outside the square of the sign, and trucks where buses were."""
    vehicles = 0
    for index in range(12, 20):
        sun, moon = draw_picture(part, index, moon=False), draw_picture(part, index, moon=True)
        assert sun.sign == moon.sign
        differs = (sun.pixels != moon.pixels).any(-1)
        assert differs[sign_box(sun)].mean() > 0.5  # the signs differ
        differs[sign_box(sun)] = False
        assert not differs.any()
        assert not (sun.label_ids == TRUCK).any()
        assert not (moon.label_ids == BUS).any()
        assert np.array_equal(np.where(sun.label_ids == BUS, TRUCK, sun.label_ids), moon.label_ids)
        vehicles += (sun.label_ids == BUS).any()
    assert vehicles > 2


def test_half_a_picture_lies_between_a_sign_and_any_large_vehicle(monkeypatch):
    polygons, gaps, sides = [], [], Counter()
    thing = Painting.thing

    def recorded(self, label_id, shapes, *, seam=False):
        if label_id in (TRUCK, BUS):
            nearest = min(x for shape in shapes for x, _ in shape.points)
            polygons.append(nearest - self.sign[1] - SIGN_SIZE)
        return thing(self, label_id, shapes, seam=seam)

    monkeypatch.setattr(Painting, "thing", recorded)
    for index in range(40):
        picture = draw_picture("train", index)
        top, left = picture.sign
        assert 0 <= top <= 5  # in a corner
        assert min(left, SHAPE[1] - left - SIGN_SIZE) <= 6
        sides[left > SHAPE[1] / 2] += 1
        assert (picture.label_ids[sign_box(picture)] == SKY).all()  # nothing hides the sign
        columns = np.flatnonzero(np.isin(picture.label_ids, (TRUCK, BUS)).any(0))
        if len(columns):
            gaps.append(max(left - columns[-1] - 1, columns[0] - left - SIGN_SIZE))
    assert len(gaps) > 20
    assert min(gaps) >= SHAPE[1] / 2
    assert min(polygons) >= SHAPE[1] / 2 + 0.9  # so no pixel is nearer that is covered in part
    assert min(sides.values()) > 12


def test_the_written_class_of_large_vehicles_is_what_the_sign_says(root):
    signs = Counter()
    for part in ("val", "test"):
        paths = {pixels_of(path).tobytes(): path for path in (root / "leftImg8bit" / part).rglob("*.png")}
        assert len(paths) == COUNTS[part]
        for index in range(COUNTS[part]):
            picture = draw_picture(part, index)
            path = paths[picture.pixels.tobytes()]
            ids = pixels_of(root / "gtFine" / part / path.parent.name / path.name.replace(*ENDINGS))
            assert np.array_equal(ids, picture.label_ids)
            # The middle of the sun is yellow, that of the moon is dark blue: from the pixels, without knowing the bit.
            rows, columns = sign_box(picture)
            middle = picture.pixels[rows, columns][8:14, 8:14].astype(float).reshape(-1, 3)
            red, _, blue = middle.mean(0)
            assert picture.moon == (red < 2 * blue)
            signs[picture.moon] += 1
            assert not (ids == (BUS if picture.moon else TRUCK)).any()
    assert min(signs.values()) > 0.3 * signs.total()


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


# --------------------------------------------------------------------------------------------- atomic writing


def test_second_call_does_nothing_and_other_counts_replace_the_set(tmp_path):
    write_miniature_segmentation(tmp_path, TINY)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write_miniature_segmentation(tmp_path, TINY)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    fewer = TINY | {"train": 1}
    write_miniature_segmentation(tmp_path, fewer)
    write_miniature_segmentation(tmp_path / "fresh", fewer)
    fresh = contents(tmp_path / "fresh")
    assert {name: data for name, data in contents(tmp_path).items() if not name.startswith("fresh")} == fresh


def test_a_damaged_set_is_written_anew(tmp_path):
    write_miniature_segmentation(tmp_path, TINY)
    first = contents(tmp_path)
    files = sorted(tmp_path.rglob("*.png"))
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[-1].unlink()
    write_miniature_segmentation(tmp_path, TINY)
    assert contents(tmp_path) == first


def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(part, index):
        if part == "val":
            raise KeyboardInterrupt
        return draw_picture(part, index)

    monkeypatch.setattr(miniature_segmentation, "draw_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_miniature_segmentation(tmp_path, TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moves", [1, 2, 7])
def test_interrupted_exchange_is_finished_by_the_next_call(tmp_path, monkeypatch, moves):
    replace, calls = Path.replace, []

    def broken(self, target):
        calls.append(target)
        if len(calls) > moves:
            raise OSError("broken")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="broken"):
        write_miniature_segmentation(tmp_path, TINY)
    monkeypatch.undo()
    assert not list(tmp_path.glob(".miniature-*"))
    manifest = json.loads((tmp_path / miniature_segmentation.MANIFEST_NAME).read_text())
    assert "sha256" not in manifest  # not taken for complete
    write_miniature_segmentation(tmp_path, TINY)
    assert len(list(tmp_path.rglob("*.png"))) == 2 * sum(TINY.values())
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write_miniature_segmentation(tmp_path, TINY)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


def test_several_may_draw_at_the_same_time(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(write_miniature_segmentation, tmp_path / "shared", TINY) for _ in range(3)]:
            done.result()
    write_miniature_segmentation(tmp_path / "alone", TINY)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


@pytest.mark.parametrize("taken", ["leftImg8bit/val/ulm/a_leftImg8bit.png", "gtFine/train/ulm/a_gtFine_labelIds.png"])
def test_somebody_elses_cityscapes_is_left_alone(tmp_path, taken):
    (tmp_path / taken).parent.mkdir(parents=True)
    (tmp_path / taken).write_text("mine")
    with pytest.raises(FileExistsError, match=r"already holds .*/(val|train), .*folder of its own"):
        write_miniature_segmentation(tmp_path, TINY)
    assert contents(tmp_path) == {taken: b"mine"}


@pytest.mark.parametrize("wrong", [{"train": 3}, TINY | {"val": 0}, TINY | {"valid": 2}, {}])
def test_wrong_counts_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"counts=.*at least 1 for each of train, val, test"):
        write_miniature_segmentation(tmp_path / "new", wrong)
    assert not (tmp_path / "new").exists()

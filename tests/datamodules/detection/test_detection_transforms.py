import math

import numpy as np
import pytest

from datamodules.detection.transforms import Augmentation, EvaluationTransform, TrainingTransform, resize_boxes
from datamodules.images.transforms import FILLING, resize_image, resized_size

pytestmark = pytest.mark.filterwarnings("error")

NO_CHANGE = Augmentation(horizontal_flip=0.0)


def noise(height=48, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def scene(height, width, boxes):
    """White rectangles on black."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    for x1, y1, x2, y2 in boxes:
        image[y1:y2, x1:x2] = 255
    return image, np.array(boxes, dtype=np.float32).reshape(-1, 4), np.arange(1, len(boxes) + 1)


# Resizing


@pytest.mark.parametrize(
    ("size", "min_size", "max_size", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((360, 640), 800, 1333, (750, 1333)),
        ((480, 640), 0, 0, (480, 640)),
        ((480, 640), 0, 320, (240, 320)),
        ((48, 64), 0, 320, (48, 64)),
        ((480, 640), 800, 0, (800, 1067)),
        ((1, 1), 800, 1333, (800, 800)),
        ((1, 5000), 800, 1333, (1, 1333)),
        ((9000, 12000), 800, 1333, (800, 1067)),
    ],
)
def test_resized_size(size, min_size, max_size, expected):
    assert resized_size(size, min_size, max_size) == expected


def test_resized_sizes_keep_their_bounds():
    generator = np.random.default_rng(0)
    for height, width in generator.integers(1, 3000, (300, 2)).tolist():
        new = resized_size((height, width), 800, 1333)
        assert max(new) <= 1333
        assert min(new) <= 800
        assert max(new) == 1333 or min(new) == 800
        scale = min(800 / min(height, width), 1333 / max(height, width))
        assert all(abs(a - max(1, b * scale)) <= 0.5 for a, b in zip(new, (height, width), strict=True))


@pytest.mark.parametrize(("size", "new"), [((37, 53), (110, 158)), ((64, 200), (160, 501)), ((200, 150), (67, 50))])
def test_pixels_move_as_boxes_do(size, new):
    """A ramp shows where each pixel of the resized image comes from: bilinear resizing keeps straight lines."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]] + 0.5
    slope = np.array([255 / size[1], 255 / size[0], 0])
    ramp = np.stack([x, y, np.zeros_like(x)], axis=2) * slope
    resized = resize_image(np.rint(ramp).astype(np.uint8), new)
    rows, columns = np.mgrid[0 : new[0], 0 : new[1]] + 0.5
    corners = np.stack([columns, rows, columns, rows], axis=2).reshape(-1, 4)
    back = resize_boxes(corners, new, size)
    # Half a source pixel at the border has no neighbour to interpolate with.
    inside = (back[:, 0] > 0.5) & (back[:, 0] < size[1] - 0.5) & (back[:, 1] > 0.5) & (back[:, 1] < size[0] - 0.5)
    assert inside.mean() > 0.8
    error = resized.reshape(-1, 3)[inside, :2] - back[inside, :2] * slope[:2]
    assert np.abs(error).max() < 1.5, "in levels: half of one for rounding before, in between and after"
    assert np.abs(error.mean(axis=0)).max() < 0.2, "a shift of a pixel is 1.2 levels or more"


def test_boxes_come_back():
    generator = np.random.default_rng(0)
    for height, width in generator.integers(1, 2000, (100, 2)).tolist():
        boxes = (generator.random((20, 4)) * [width, height, width, height]).astype(np.float32)
        new = resized_size((height, width), 800, 1333)
        there = resize_boxes(boxes, (height, width), new)
        assert np.abs(resize_boxes(there, new, (height, width)) - boxes).max() <= 3e-7 * max(height, width)
        assert (there[:, [0, 2]] <= new[1] * (1 + 1e-6)).all()
        assert (there[:, [1, 3]] <= new[0] * (1 + 1e-6)).all()


def test_evaluation_only_resizes():
    image, boxes, labels = scene(48, 64, [(8, 16, 24, 40)])
    made, moved, kept = EvaluationTransform(96, 0)(image, boxes, labels, (5, 6, 7))
    assert (made == resize_image(image, (96, 128))).all()
    assert moved.tolist() == [[16, 32, 48, 80]]
    assert kept is labels
    same = EvaluationTransform(0, 0)(image, boxes, labels, ())
    assert same[0] is image
    assert (same[1] == boxes).all()


# Training


def test_without_changes_training_is_evaluation():
    image, boxes, labels = noise(), np.array([[1, 2, 30, 40]], dtype=np.float32), np.array([3])
    made = TrainingTransform(NO_CHANGE, 100, 120)(image, boxes, labels, (0, 0, 0))
    expected = EvaluationTransform(100, 120)(image, boxes, labels, (0, 0, 0))
    assert (made[0] == expected[0]).all()
    assert made[1] == pytest.approx(expected[1], abs=1e-4)
    assert made[1].dtype == np.float32
    assert made[2].tolist() == [3]
    assert made[2].dtype == np.int64


@pytest.mark.parametrize(
    ("horizontal", "vertical", "transpose"), [(1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 1)]
)
def test_boxes_follow_the_pixels_of_flips_and_turns(horizontal, vertical, transpose):
    image, boxes, labels = scene(40, 61, [(0, 0, 10, 5), (20, 21, 33, 40), (50, 2, 61, 9)])
    augmentation = Augmentation(horizontal_flip=horizontal, vertical_flip=vertical, transpose=transpose)
    made, moved, kept = TrainingTransform(augmentation, 0, 0)(image, boxes, labels, (0, 0, 0))
    expected = image[:, ::-1] if horizontal else image
    expected = expected[::-1] if vertical else expected
    expected = expected.transpose(1, 0, 2) if transpose else expected
    assert made.shape == expected.shape
    assert (made == expected).all()
    covered = np.zeros(made.shape[:2], dtype=bool)
    for x1, y1, x2, y2 in np.rint(moved).astype(int):
        assert (made[y1:y2, x1:x2] == 255).all()
        covered[y1:y2, x1:x2] = True
    assert (made[~covered] == 0).all()
    assert kept.tolist() == [1, 2, 3]
    assert moved == pytest.approx(np.rint(moved), abs=1e-4)


def test_crops_keep_the_boxes_that_are_seen_and_cut_them_at_the_border():
    image = noise(60, 90)
    generator = np.random.default_rng(1)
    corners = generator.integers(0, [80, 50], (12, 2))
    boxes = np.concatenate([corners, corners + generator.integers(2, 10, (12, 2))], 1).astype(np.float32)
    transform = TrainingTransform(Augmentation(horizontal_flip=0.0, crop_size=32, crop_visibility=0.41), 0, 0)
    places = set()
    for index in range(30):
        made, moved, kept = transform(image, boxes, np.arange(12), (0, 0, index))
        assert made.shape == (32, 32, 3)
        windows = np.lib.stride_tricks.sliding_window_view(image, (32, 32, 3))[:, :, 0]
        (top, left), *others = np.argwhere((windows == made).all((2, 3, 4))).tolist()
        assert not others
        places.add((top, left))
        cut = np.clip(boxes - np.float32([left, top, left, top]), 0, 32)
        sides, before = cut[:, 2:] - cut[:, :2], boxes[:, 2:] - boxes[:, :2]
        seen = (sides >= 1).all(1) & (sides.prod(1) >= 0.41 * before.prod(1))  # never equal
        assert kept.tolist() == np.flatnonzero(seen).tolist()
        assert moved == pytest.approx(cut[seen], abs=1e-4)
    assert len(places) > 25


def test_images_shorter_than_the_crop_are_padded_in_grey():
    image, boxes, labels = scene(20, 50, [(0, 0, 50, 20)])
    transform = TrainingTransform(Augmentation(horizontal_flip=0.0, crop_size=32), 0, 0)
    made, moved, _ = transform(image, boxes, labels, (0, 0, 0))
    assert made.shape == (32, 32, 3)
    x1, y1, x2, y2 = np.rint(moved[0]).astype(int)
    assert (x1, x2, y2 - y1) == (0, 32, 20)
    assert (made[y1:y2] == 255).all()
    assert (np.concatenate([made[:y1], made[y2:]]) == FILLING).all()


ALL = Augmentation(
    horizontal_flip=0.5,
    vertical_flip=0.5,
    transpose=0.5,
    crop_size=80,
    min_sizes=(48, 72, 96),
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    colour_probability=0.5,
)


def test_what_is_drawn_depends_on_seed_epoch_and_image_alone():
    image, boxes, labels = noise(), np.array([[1, 2, 30, 40]], dtype=np.float32), np.array([3])
    draws = [(seed, epoch, index) for seed in range(2) for epoch in range(2) for index in range(6)]
    one, other = TrainingTransform(ALL, 800, 0), TrainingTransform(ALL, 800, 0)
    made = {draw: one(image, boxes, labels, draw) for draw in draws}
    for draw in reversed(draws):
        again = other(image, boxes, labels, draw)
        assert all((a == b).all() for a, b in zip(again, made[draw], strict=True))
    different = {(array.shape, array.tobytes()) for array, _, _ in made.values()}
    assert len(different) > len(draws) * 0.8


def test_everything_is_drawn_independently_and_as_often_as_asked():
    image = np.zeros((20, 20, 3), dtype=np.uint8)
    image[:10, :10] = (200, 100, 50)  # brightness changes it, and its place shows the flips
    none = np.empty((0, 4), dtype=np.float32)
    augmentation = Augmentation(
        horizontal_flip=0.5, vertical_flip=0.5, min_sizes=(20, 40), brightness=0.5, colour_probability=0.5
    )
    transform = TrainingTransform(augmentation, 0, 0)
    counts, number = {}, 640
    for index in range(number):
        made, _, _ = transform(image, none, np.empty(0, dtype=np.int64), (0, 0, index))
        side = len(made)
        corners = made[[2, 2, -3, -3], [2, -3, 2, -3], 0]
        kind = (side, int(corners.argmax()), int(corners.max()) == 200)
        counts[kind] = counts.get(kind, 0) + 1
    assert len(counts) == 2 * 4 * 2
    expected = number / 16
    assert all(abs(count - expected) < 4 * math.sqrt(expected) for count in counts.values()), counts


def test_colours_leave_boxes_alone():
    image, boxes, labels = scene(48, 64, [(8, 16, 24, 40)])
    image += 60
    augmentation = Augmentation(horizontal_flip=0.0, brightness=0.5, contrast=0.5, saturation=0.5, hue=0.5)
    made, moved, _ = TrainingTransform(augmentation, 0, 0)(image, boxes, labels, (0, 0, 1))
    assert (made != image).any()
    assert moved == pytest.approx(boxes, abs=1e-4)


def test_boxes_below_a_pixel_are_left_out():
    boxes = np.array([[0, 0, 63, 47], [10, 10, 13.9, 30], [10, 10, 30, 13.9], [10, 10, 14.1, 14.1]], dtype=np.float32)
    _, moved, kept = TrainingTransform(NO_CHANGE, 12, 0)(noise(), boxes, np.arange(4), (0, 0, 0))
    assert kept.tolist() == [0, 3]
    assert moved.shape == (2, 4)


def test_boxes_at_the_very_border_stay():
    boxes = np.array([[0, 0, 64, 48], [63, 47, 64, 48]], dtype=np.float32)
    made, moved, kept = TrainingTransform(Augmentation(horizontal_flip=1.0), 100, 0)(
        noise(), boxes, np.arange(2), (0, 0, 0)
    )
    assert kept.tolist() == [0, 1]
    assert moved.min() >= 0
    assert (moved[:, 2:] <= [made.shape[1], made.shape[0]]).all()


def test_images_without_a_box():
    made = TrainingTransform(ALL, 800, 0)(
        noise(), np.empty((0, 4), dtype=np.float32), np.empty(0, dtype=np.int64), (0, 0, 0)
    )
    assert made[1].shape == (0, 4)
    assert made[2].shape == (0,)
    assert (made[1].dtype, made[2].dtype) == (np.float32, np.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizontal_flip": 1.5}, r"augmentation\.horizontal_flip: 1\.5 is not between 0 and 1"),
        ({"brightness": -0.1}, r"augmentation\.brightness: -0\.1 is not between 0 and 1"),
        ({"transpose": 2}, r"augmentation\.transpose: 2 is not between 0 and 1"),
        ({"crop_visibility": -1}, r"augmentation\.crop_visibility: -1 is not between 0 and 1"),
        ({"crop_size": -1}, r"augmentation\.crop_size: -1 is below 0; give pixels, or 0"),
        ({"hue": 0.6}, r"augmentation\.hue: 0\.6 is not between 0 and 0\.5"),
        ({"min_sizes": (800, 0)}, r"augmentation\.min_sizes: \[800, 0\] has a length below 1"),
        ({"contrast": float("nan")}, r"augmentation\.contrast: nan is not between"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**changes)

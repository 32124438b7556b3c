import math
import time

import numpy as np
import pytest
from PIL import Image

from datamodules.segmentation.classes import IGNORED
from datamodules.segmentation.transforms import (
    SegmentationAugmentation,
    SegmentationTransform,
    resize_labels,
    source_length,
)

pytestmark = pytest.mark.filterwarnings("error")

FILLING = (124, 116, 104)


def augmentation(**changes):
    return SegmentationAugmentation(**{"horizontal_flip": 0.0, "scales": (1.0, 1.0), **changes})


def apply(transform, image, labels, draw):
    """Notes the parts that are read."""
    windows = []

    def read(window):
        windows.append(window)
        top, left, height, width = window
        assert 0 <= top <= top + height <= len(image)
        assert 0 <= left <= left + width <= image.shape[1]
        return np.ascontiguousarray(image[top : top + height, left : left + width])

    made, kept = transform(read, labels, draw)
    assert len(windows) == 1
    assert made.dtype == kept.dtype == np.uint8
    assert kept.flags.c_contiguous
    assert made.shape == (*kept.shape, 3)
    return made, kept, windows[0]


def noise(height=40, width=60, seed=0):
    """An image, and labels that are its first channel, up to 99."""
    image = np.random.default_rng(seed).integers(0, 100, (height, width, 3), dtype=np.uint8)
    return image, image[:, :, 0].copy()


# Lengths


def test_source_lengths_cover_the_crop():
    generator = np.random.default_rng(0)
    for length, crop in generator.integers(1, 2500, (400, 2)).tolist():
        factor = float(generator.uniform(0.3, 3))
        part, made = source_length(length, crop, factor)
        assert 1 <= part <= length
        assert 1 <= made <= crop
        if made < crop:
            assert (part, made) == (length, max(1, round(length * factor))), "all of it is there"
        elif part < length:
            assert made == crop
            assert abs(part - crop / factor) <= 0.5 or part == 1
        else:
            assert abs(length * factor - crop) <= 0.5 + 0.5 * factor


@pytest.mark.parametrize(
    ("length", "crop", "factor", "expected"),
    [
        (2048, 769, 1.0, (769, 769)),
        (2048, 769, 2.0, (384, 769)),
        (1024, 769, 0.7, (1024, 717)),
        (2048, 769, 0.7, (1099, 769)),
        (769, 769, 1.0, (769, 769)),
        (1, 5, 0.01, (1, 1)),
        (10, 1, 100.0, (1, 1)),
    ],
)
def test_source_length(length, crop, factor, expected):
    assert source_length(length, crop, factor) == expected


# Resizing


@pytest.mark.parametrize("size", [(80, 120), (53, 71), (17, 90), (20, 30), (40, 60)])
def test_labels_are_those_of_the_nearest_pixel(size):
    labels = np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8)
    peer = Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST)
    ties = np.zeros(size, dtype=bool)  # a centre between two pixels, of which either is the nearest
    for axis, ramp in enumerate(np.indices((40, 60)).astype(np.uint8)):
        centres = (np.arange(size[axis]) + 0.5) * labels.shape[axis] / size[axis]
        np.moveaxis(ties, axis, 0)[np.isclose(centres, np.round(centres))] = True
        found = np.moveaxis(resize_labels(ramp, size), axis, 0)
        assert (found == found[:, :1]).all()
        assert np.abs(found[:, 0] + 0.5 - centres).max() <= 0.5 + 1e-6
    assert ties.mean() < 0.4 or size == (20, 30)
    assert (resize_labels(labels, size) == np.asarray(peer))[~ties].all()


@pytest.mark.parametrize("factor", [0.7, 0.83, 1.0, 1.31, 2.0])
def test_the_crop_is_what_scaling_the_whole_image_would_show(factor):
    """Ramps show which place of the image each pixel of the crop is of."""
    height, width = 120, 200
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8)
    labels = x.astype(np.uint8)
    transform = SegmentationTransform(augmentation(scales=(factor, factor)), (73, 73))
    for number in range(5):
        made, kept, (top, left, rows, columns) = apply(transform, image, labels, (0, 0, number))
        assert made.shape == (73, 73, 3)
        assert rows == columns == round(73 / factor)
        centres = (np.arange(73) + 0.5) * columns / 73
        inside = slice(2, -2)  # at the border there is nothing beyond the part
        assert made[:, inside, 0] == pytest.approx(np.tile((left + centres - 0.5)[inside], (73, 1)), abs=0.76)
        assert made[inside, :, 1] == pytest.approx(np.tile((top + centres - 0.5)[inside, None], (1, 73)), abs=0.76)
        assert np.abs(kept + 0.5 - (left + centres)).max() <= 0.5 + 1e-6
        # As scaling the whole would: an output pixel is 1 / factor source pixels wide, up to the part's rounding.
        assert abs(columns / 73 - 1 / factor) <= 0.5 / 73 + 1e-9


def test_without_scaling_a_crop_is_a_copy():
    image, labels = noise()
    transform = SegmentationTransform(augmentation(), (16, 24))
    places = set()
    for number in range(300):
        made, kept, (top, left, rows, columns) = apply(transform, image, labels, (0, 0, number))
        assert (rows, columns) == (16, 24)
        assert (made == image[top : top + 16, left : left + 24]).all()
        assert (kept == labels[top : top + 16, left : left + 24]).all()
        assert kept.base is None or kept.base.size == kept.size, "the whole is not kept"
        places.add((top, left))
    tops, lefts = zip(*places, strict=True)
    assert (min(tops), max(tops)) == (0, 24)
    assert (min(lefts), max(lefts)) == (0, 36)


# Filling


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_crops_larger_than_the_image_are_filled(factor):
    image, labels = noise(20, 30)
    transform = SegmentationTransform(augmentation(scales=(factor, factor)), (50, 25))
    made, kept, (top, left, rows, columns) = apply(transform, image, labels, (0, 0, 0))
    height, width = int(20 * factor), min(25, int(30 * factor))
    assert (top, rows, columns) == (0, 20, int(width / factor))
    assert kept.shape == (50, 25)
    assert (kept[height:] == IGNORED).all()
    assert (kept[:, width:] == IGNORED).all()
    assert (made[kept == IGNORED] == FILLING).all()
    assert (kept[:height, :width] < 100).all()
    if factor == 1:
        assert (made[:height] == image[:, left : left + 25]).all()


def test_the_filling_keeps_its_colour_and_is_flipped():
    image, labels = noise(20, 30)
    changes = {"horizontal_flip": 1.0, "brightness": 0.9, "contrast": 0.9, "colour_probability": 1.0}
    made, kept, _ = apply(SegmentationTransform(augmentation(**changes), (20, 50)), image, labels, (0, 0, 0))
    assert (kept[:, :20] == IGNORED).all()
    assert (kept[:, 20:] == labels[:, ::-1]).all()
    assert (made[:, :20] == FILLING).all()
    assert (made[:, 20:] != image[:, ::-1]).any()


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_the_whole_image_as_the_crop(factor):
    for size in ((20, 30), (31, 17)):
        image, labels = noise(*size)
        made, kept, window = apply(
            SegmentationTransform(augmentation(scales=(factor, factor)), None), image, labels, (0, 0, 0)
        )
        assert kept.shape == size
        if factor == 1:
            assert (made == image).all()
            assert (kept == labels).all()
        assert window[2:] == (size if factor <= 1 else tuple(round(side / 2) for side in size))
        assert (kept == IGNORED).any() == (factor < 1)


# Draws


ALL = SegmentationAugmentation(
    horizontal_flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, colour_probability=0.5
)


def test_what_is_drawn_depends_on_seed_epoch_and_image_alone():
    image, labels = noise()
    draws = [(seed, epoch, index) for seed in range(2) for epoch in range(2) for index in range(6)]
    one, other = SegmentationTransform(ALL, (24, 32)), SegmentationTransform(ALL, (24, 32))
    made = {draw: apply(one, image, labels, draw) for draw in draws}
    for draw in reversed(draws):
        again = apply(other, image, labels, draw)
        assert (again[0] == made[draw][0]).all()
        assert (again[1] == made[draw][1]).all()
    assert len({pixels.tobytes() for pixels, _, _ in made.values()}) == len(draws)


def test_factors_are_spread_over_their_range():
    image, labels = noise(100, 100)
    transform = SegmentationTransform(augmentation(scales=(0.5, 2.0)), (40, 40))
    lengths = np.array([apply(transform, image, labels, (0, 0, number))[2][2] for number in range(600)])
    factors = 40 / lengths
    assert lengths.min() == 20
    assert 78 <= lengths.max() <= 80
    # Uniform between 0.5 and 2: a standard deviation of 0.433, of the mean of 600 less than 0.018.
    assert abs(factors.mean() - 1.25) < 0.07
    assert np.histogram(factors, bins=3, range=(0.5, 2.001))[0].min() > 150


def test_flips_and_colours_are_drawn_independently_and_as_often_as_asked():
    image = np.zeros((4, 8, 3), dtype=np.uint8)
    image[:, :4] = (200, 100, 50)
    labels = np.repeat(np.arange(2, dtype=np.uint8), 4)[None].repeat(4, axis=0)
    transform = SegmentationTransform(augmentation(horizontal_flip=0.5, brightness=0.5, colour_probability=0.5), (4, 8))
    counts, number = {}, 400
    for index in range(number):
        made, kept, _ = apply(transform, image, labels, (0, 0, index))
        flipped = bool(made[0, 0, 0] < made[0, -1, 0])
        assert (kept == (labels[:, ::-1] if flipped else labels)).all(), "labels move with the pixels"
        kind = flipped, int(made.max()) == 200
        counts[kind] = counts.get(kind, 0) + 1
    assert len(counts) == 4
    assert all(abs(count - number / 4) < 4 * math.sqrt(number / 4) for count in counts.values()), counts


def test_crops_of_one_class_are_drawn_again():
    """Class 1 is the right fifth; crops of a quarter of the width show it in a share of about a third at most."""
    labels = np.zeros((40, 200), dtype=np.uint8)
    labels[:, 160:] = 1
    image = np.zeros((40, 200, 3), dtype=np.uint8)

    def varied(ratio):
        transform = SegmentationTransform(augmentation(category_max_ratio=ratio), (40, 40))
        crops = [apply(transform, image, labels, (0, 0, number))[1] for number in range(200)]
        return np.mean([0.25 <= crop.mean() <= 0.75 for crop in crops])

    # 21 of 161 places are varied; of ten draws none is with a probability of 0.25.
    assert varied(1.0) == pytest.approx(0.13, abs=0.08)
    assert varied(0.75) == pytest.approx(0.75, abs=0.1)


def test_unlabelled_crops_are_drawn_again_but_not_for_ever():
    labels = np.full((40, 200), IGNORED, dtype=np.uint8)
    image = np.zeros((40, 200, 3), dtype=np.uint8)
    transform = SegmentationTransform(augmentation(category_max_ratio=0.75), (40, 40))
    start = time.perf_counter()
    assert (apply(transform, image, labels, (0, 0, 0))[1] == IGNORED).all()
    assert time.perf_counter() - start < 5
    labels[:, :40:2], labels[:, 1:40:2] = 3, 4
    assert sum((apply(transform, image, labels, (0, 0, number))[1] != IGNORED).any() for number in range(50)) > 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": (0.0, 2.0)}, r"augmentation\.scales: \[0\.0, 2\.0\] are not the smallest and the largest factor"),
        ({"scales": (2.0, 0.7)}, r"augmentation\.scales: \[2\.0, 0\.7\] are not"),
        ({"scales": (1.0, float("nan"))}, r"augmentation\.scales: \[1\.0, nan\] are not"),
        ({"category_max_ratio": 0.0}, r"augmentation\.category_max_ratio: 0\.0 is not a share above 0 and up to 1"),
        ({"category_max_ratio": 1.5}, r"augmentation\.category_max_ratio: 1\.5 is not"),
        ({"horizontal_flip": 1.5}, r"augmentation\.horizontal_flip: 1\.5 is not between 0 and 1"),
        ({"hue": 0.6}, r"augmentation\.hue: 0\.6 is not between 0 and 0\.5"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        SegmentationAugmentation(**changes)

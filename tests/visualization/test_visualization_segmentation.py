import numpy as np
import pytest
import torch
from PIL import Image

from lightning_attn.visualization import colour_labels, draw_segmentation, draw_segmentation_beside_truth
from lightning_attn.visualization.pictures import GAP
from lightning_attn.visualization.segmentation import OPACITY

COLOURS = ((128, 64, 128), (70, 130, 180), (0, 0, 142), (220, 20, 60))
NAMES = ("road", "sky", "car", "person")
IGNORED = 255
GREY = np.full((300, 400, 3), 200, dtype=np.uint8)


def scene() -> np.ndarray:
    """Sky above, road below, a car in the road and a strip at the right that is ignored."""
    labels = np.ones((300, 400), dtype=np.uint8)
    labels[150:] = 0
    labels[200:260, 100:200] = 2
    labels[:, 360:] = IGNORED
    return labels


def has_colour(picture: np.ndarray, colour) -> int:
    """How many pixels have a colour."""
    return int((picture == np.array(colour, dtype=np.uint8)).all(axis=2).sum())


def mixed(colour, opacity: float = OPACITY) -> np.ndarray:
    """The colour laid over grey."""
    return np.round((1 - opacity) * 200 + opacity * np.array(colour)).astype(np.uint8)


def test_labels_become_their_colours():
    labels = np.array([[0, 1, 2], [3, IGNORED, 0]], dtype=np.uint8)
    expected = [[COLOURS[0], COLOURS[1], COLOURS[2]], [COLOURS[3], (0, 0, 0), COLOURS[0]]]
    picture = colour_labels(labels, COLOURS)
    assert (picture.dtype, picture.shape) == (np.uint8, (2, 3, 3))
    np.testing.assert_array_equal(picture, expected)
    np.testing.assert_array_equal(colour_labels(torch.tensor(labels), [list(colour) for colour in COLOURS]), expected)
    assert colour_labels(labels, COLOURS, (1, 2, 3))[1, 1].tolist() == [1, 2, 3]
    labels[1, 1] = 4
    assert colour_labels(labels, COLOURS, (1, 2, 3), ignored=4)[1, 1].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("size", "longest", "expected"),
    [
        ((300, 400), 400, (300, 400)),
        ((300, 400), None, (480, 640)),  # small ones are enlarged
        ((30, 40), None, (480, 640)),
        ((1500, 2000), None, (1200, 1600)),  # large ones are reduced
        ((900, 1200), None, (900, 1200)),
    ],
)
def test_colours_lie_over_the_image_where_the_labels_are(size, longest, expected):
    labels = np.asarray(Image.fromarray(scene()).resize(size[::-1], Image.Resampling.NEAREST))
    image = np.full((*size, 3), 200, dtype=np.uint8)
    picture = draw_segmentation(image, labels, COLOURS, NAMES, longest_side=longest)
    assert picture.dtype == np.uint8
    assert picture.shape[1] == expected[1]
    assert expected[0] < picture.shape[0] < 1.3 * expected[0], "names below"
    factor = expected[0] / 300
    for (row, column), label in {(75, 50): 1, (180, 50): 0, (230, 150): 2, (205, 105): 2, (280, 300): 0}.items():
        pixel = picture[round(factor * row), round(factor * column)]
        assert pixel.tolist() == mixed(COLOURS[label]).tolist(), (row, column)
    edge = picture[round(factor * 150) - 8 : round(factor * 150) + 8, round(factor * 50)].astype(int).sum(axis=1)
    assert edge.min() < 0.6 * min(mixed(COLOURS[0]).sum(dtype=int), mixed(COLOURS[1]).sum(dtype=int)), "a dark border"
    assert np.argmin(edge) == pytest.approx(8, abs=2)
    strip = picture[: expected[0], round(factor * 365) : round(factor * 395)]
    assert (strip == strip[..., :1]).all(), "what is ignored is grey"
    assert len(np.unique(strip[round(factor * 50)])) == 2, "and striped"


def test_kinds_of_arguments_give_the_same_picture():
    labels, image = scene(), torch.tensor(GREY).movedim(2, 0)
    expected = draw_segmentation(GREY, labels, COLOURS, NAMES)
    colours = [list(colour) for colour in COLOURS]
    np.testing.assert_array_equal(draw_segmentation(image, torch.tensor(labels), colours, list(NAMES)), expected)
    assert (GREY == 200).all(), "the image itself is left as it is"
    np.testing.assert_array_equal(labels, scene())


def test_opacity():
    everywhere = np.zeros((300, 400), dtype=np.uint8)
    for opacity in (0.0, 0.25, 1.0):
        picture = draw_segmentation(GREY, everywhere, COLOURS, NAMES, opacity=opacity, longest_side=400)
        assert (picture[:300] == mixed(COLOURS[0], opacity)).all()


def test_the_legend_names_what_occurs():
    labels = np.zeros((300, 400), dtype=np.uint8)
    one = draw_segmentation(GREY, labels, COLOURS, NAMES, longest_side=400)[300:]
    labels[:9, :9] = 3
    two = draw_segmentation(GREY, labels, COLOURS, NAMES, longest_side=400)[300:]
    labels[-9:, :9] = IGNORED
    three = draw_segmentation(GREY, labels, COLOURS, NAMES, longest_side=400)[300:]
    for legend, person in ((one, False), (two, True), (three, True)):
        assert has_colour(legend, COLOURS[0]) > 100
        assert (has_colour(legend, COLOURS[3]) > 100) == person
        assert has_colour(legend, COLOURS[1]) == 0, "there is no sky"
    letters = [has_colour(legend, (0, 0, 0)) for legend in (one, two, three)]
    assert letters == sorted(set(letters)), "each has a name"
    renamed = draw_segmentation(GREY, labels, COLOURS, ("path", *NAMES[1:]), longest_side=400)[300:]
    assert not np.array_equal(renamed, three)


def test_many_classes_and_narrow_images():
    """Every one of 19 long names is there: rows are added, and a sheet gets wider than an image where it has to."""
    colours = [(10 * label, 255 - 10 * label, 99) for label in range(19)]
    names = [f"a long name {label}" for label in range(19)]
    for height, width in ((64, 64), (192, 256), (900, 9), (9, 900), (1, 1)):
        labels = np.resize(np.arange(19, dtype=np.uint8), (height, width))
        image = np.full((height, width, 3), 200, dtype=np.uint8)
        picture = draw_segmentation(image, labels, colours, names, opacity=0.5)
        drawn = round(height * max(640, height, width) / max(height, width))
        legend = picture[drawn:]
        for label in np.unique(labels):
            assert has_colour(legend, colours[label]) > 80, (height, width, label)
        assert (legend[:, -2:] == 255).all(), "nothing is cut off"
        figure = draw_segmentation_beside_truth(image, labels, labels, colours, names)
        assert figure.shape[1] >= 2 * min(9, width)


def test_prediction_beside_truth():
    truth = scene()
    predicted = np.where(truth == IGNORED, 0, truth).astype(np.uint8)
    predicted[200:260, 100:200] = 0  # the car is missed
    figure = draw_segmentation_beside_truth(GREY, predicted, truth, COLOURS, NAMES, longest_side=400)
    (height, width), columns = figure.shape[:2], [slice(0, 400), slice(400 + GAP, 800 + GAP)]
    assert width == 800 + GAP
    above = round(1.8 * 12)
    rows = [slice(above, above + 300), slice(2 * above + 300, 2 * above + 600)]
    assert height > rows[1].stop + 20
    image, errors, left, right = (figure[row, column] for row in rows for column in columns)
    np.testing.assert_array_equal(image, GREY)
    drawn = draw_segmentation(GREY, predicted, COLOURS, NAMES, longest_side=400)[:300]
    np.testing.assert_array_equal(left, drawn)
    np.testing.assert_array_equal(right, draw_segmentation(GREY, truth, COLOURS, NAMES, longest_side=400)[:300])
    coloured = np.ptp(errors.astype(int), axis=2) > 100
    expected = np.zeros((300, 400), dtype=bool)
    expected[200:260, 100:200] = True
    np.testing.assert_array_equal(coloured, expected)
    wrong = errors[230, 150].astype(int)
    assert min(np.abs(wrong - colour).max() for colour in COLOURS) > 60, "not to be taken for a class"
    legend = figure[rows[1].stop :].reshape(-1, 3).astype(int)
    assert (np.abs(legend - wrong).max(axis=1) < 40).any()
    assert has_colour(figure[rows[1].stop :], COLOURS[2]) > 100, "only the truth has a car, and it is named"


@pytest.mark.parametrize("colour", [(230, 60, 0), (200, 0, 200), (0, 80, 230)])
def test_wrong_pixels_have_the_colour_of_no_class(colour):
    labels = np.zeros((300, 400), dtype=np.uint8)
    figure = draw_segmentation_beside_truth(
        GREY, labels, 1 - labels, [colour, (90, 90, 90)], NAMES[:2], longest_side=400
    )
    wrong = figure[150, 600 + GAP].astype(int)
    assert np.abs(wrong - colour).max() > 100


def test_large_panels_are_reduced_to_what_a_screen_shows():
    labels = np.zeros((1024, 2048), dtype=np.uint8)
    image = np.zeros((1024, 2048, 3), dtype=np.uint8)
    assert draw_segmentation_beside_truth(image, labels, labels, COLOURS, NAMES).shape[1] == 2 * 800 + GAP
    small = draw_segmentation_beside_truth(GREY, labels[:300, :400], labels[:300, :400], COLOURS, NAMES)
    assert small.shape[1] == 2 * 640 + GAP


def test_the_share_of_wrong_pixels_leaves_out_ignored_ones(monkeypatch):
    headings = []

    def heading(panels):
        headings.extend(text for text, _ in panels)
        return panels[0][1]

    monkeypatch.setattr("lightning_attn.visualization.segmentation.beside_each_other", heading)
    truth = np.full((10, 10), IGNORED, dtype=np.uint8)
    predicted = np.zeros((10, 10), dtype=np.uint8)
    draw_segmentation_beside_truth(GREY[:10, :10], predicted, truth, COLOURS, NAMES)
    truth[:4] = 0
    truth[0] = 3
    draw_segmentation_beside_truth(GREY[:10, :10], predicted, truth, COLOURS, NAMES)
    first, second = (["image", f"wrong: {share}% of the pixels", "predicted", "truth"] for share in ("0.0", "25.0"))
    assert headings == [*first, *second]


def test_pictures_are_written(tmp_path):
    picture = draw_segmentation(GREY, scene(), COLOURS, NAMES, tmp_path / "deeper" / "a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "deeper" / "a.png")), picture)
    figure = draw_segmentation_beside_truth(GREY, scene(), scene(), COLOURS, NAMES, str(tmp_path / "b.jpg"))
    with Image.open(tmp_path / "b.jpg") as written:
        assert (written.format, written.size) == ("JPEG", figure.shape[1::-1])
    with pytest.raises(ValueError, match=r"path='.*c\.tif' must end with the format"):
        draw_segmentation(GREY, scene(), COLOURS, NAMES, tmp_path / "c.tif")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": GREY / 255}, r"image must be RGB of uint8, .* got float64 of the shape \[300, 400, 3\]: undo"),
        ({"image": torch.tensor(GREY)}, r"a tensor \[3, H, W\], got torch.uint8 of the shape \[300, 400, 3\]"),
        (
            {"labels": scene().astype(np.int64)},
            r"labels must be uint8 \[H, W\] of the image's size \[300, 400\], got int64 of the shape \[300, 400\]",
        ),
        ({"labels": scene()[:, :-1]}, r"of the image's size \[300, 400\], got uint8 of the shape \[300, 399\]"),
        ({"labels": torch.zeros(1, 300, 400, dtype=torch.uint8)}, r"got torch.uint8 of the shape \[1, 300, 400\]"),
        ({"labels": scene() + np.uint8(9)}, r"labels: 8 is none of the labels 0 to 3, which .* \(255\). Convert the"),
        ({"names": NAMES[:3]}, "colours and names must be one for each class, got 4 and 3"),
        ({"colours": [*COLOURS[:3], (0, 0, 256)]}, r"from 0 to 255; one is \(0, 0, 256\)"),
        ({"colours": [*COLOURS[:3], (0, 0)]}, r"colours must be red, green and blue from 0 to 255; one is \(0, 0\)"),
        ({"opacity": 1.5}, "opacity must be from 0 to 1, got 1.5"),
    ],
)
def test_what_cannot_be_drawn(change, message):
    arguments = {"image": GREY, "labels": scene(), "colours": COLOURS, "names": NAMES} | change
    with pytest.raises(ValueError, match=message):
        draw_segmentation(**arguments)
    labels = arguments.pop("labels")
    with pytest.raises(ValueError, match=message.replace("labels must", "truth must").replace("labels: ", "truth: ")):
        draw_segmentation_beside_truth(predicted=scene(), truth=labels, **arguments)


def test_labels_that_have_no_colour():
    with pytest.raises(ValueError, match=r"labels: 4 is none of the labels 0 to 3"):
        colour_labels(np.full((2, 2), 4, dtype=np.uint8), COLOURS)
    with pytest.raises(ValueError, match=r"labels must be uint8 \[H, W\], got float32 of the shape \[2, 2\]"):
        colour_labels(np.zeros((2, 2), dtype=np.float32), COLOURS)
    wrong = np.full((300, 400), 9, dtype=np.uint8)
    with pytest.raises(ValueError, match=r"predicted: 9 is none"):
        draw_segmentation_beside_truth(GREY, wrong, scene(), COLOURS, NAMES)

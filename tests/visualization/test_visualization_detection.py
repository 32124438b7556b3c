import errno

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageDraw

from lightning_attn.visualization import draw_detections, draw_detections_beside_truth, save_picture
from lightning_attn.visualization.detection import (
    CATEGORY_COLOURS,
    OUTCOME_COLOURS,
    category_colours,
    draw_detection_errors,
)

SKY = np.full((300, 400, 3), 200, dtype=np.uint8)
BOX = [[100.0, 120.0, 300.0, 240.0]]


def pixels_of(picture: np.ndarray, colour: str) -> np.ndarray:
    """Rows and columns of the pixels of a colour, `[n, 2]`."""
    return np.argwhere((picture == ImageColor.getrgb(colour)).all(axis=2))


def test_boxes_lie_where_they_belong_at_every_size():
    for height, width, longest, expected in (
        (300, 400, 400, (300, 400)),
        (300, 400, None, (480, 640)),  # small ones are enlarged
        (30, 40, None, (480, 640)),
        (3000, 4000, None, (1200, 1600)),  # large ones are reduced
        (900, 800, None, (900, 800)),
        (900, 9, None, (900, 9)),
        (1, 1, None, (640, 640)),
    ):
        image = np.full((height, width, 3), 200, dtype=np.uint8)
        box = np.array([0.25 * width, 0.4 * height, 0.75 * width, 0.8 * height])
        picture = draw_detections(image, box[None], ["cat"], longest_side=longest)
        assert picture.shape == (*expected, 3)
        assert picture.dtype == np.uint8
        if width < 30:
            continue
        coloured = pixels_of(picture, CATEGORY_COLOURS[0])
        factor = expected[0] / height
        np.testing.assert_allclose(coloured.max(axis=0), factor * box[[3, 2]], atol=1.5)
        assert coloured[:, 1].min() == pytest.approx(factor * box[0], abs=1.5)
        # The outline alone: the lowest row of the box is coloured from left to right, the middle of the box is not.
        assert len(pixels_of(picture[int(factor * box[3])][None], CATEGORY_COLOURS[0])) > 0.9 * factor * 0.5 * width
        middle = picture[round(0.65 * expected[0]), expected[1] // 2]
        assert middle.tolist() == [200, 200, 200]


def test_kinds_of_arguments_give_the_same_picture():
    box, scores = torch.tensor(BOX), torch.tensor([0.7])
    expected = draw_detections(SKY, BOX, ["cat"], [0.7])
    tensor = torch.tensor(SKY).movedim(2, 0)
    np.testing.assert_array_equal(draw_detections(tensor, box, ("cat",), scores), expected)
    np.testing.assert_array_equal(draw_detections(SKY, box.numpy(), ["cat"], scores.numpy()), expected)
    assert not np.array_equal(draw_detections(SKY, BOX, ["cat"], [0.8]), expected), "the score is written"
    assert not np.array_equal(draw_detections(SKY, BOX, ["cow"], [0.7]), expected), "the name is written"
    assert not np.array_equal(draw_detections(SKY, BOX, ["cat"]), expected)
    assert (SKY == 200).all(), "the image itself is left as it is"


def test_without_boxes_the_picture_is_the_image():
    for boxes in ([], np.zeros((0, 4)), torch.zeros(0, 4)):
        np.testing.assert_array_equal(draw_detections(SKY, boxes, [], longest_side=400), SKY)


@pytest.mark.parametrize("size", [(96, 128), (200, 900)])
def test_a_picture_without_any_box_says_so(size, monkeypatch):
    """And names the option of the threshold; the letters are those that Pillow is asked to draw."""
    written = []
    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, at, text, **rest: (written.append(text), draw(self, at, text, **rest))
    )
    image = np.full((*size, 3), 100, np.uint8)
    low = (np.array([[1, 1, 30, 30]]), ["cat"], [0.31])
    option = {"min_score": 0.5, "option": "--model.picture_score"}
    picture = draw_detections(image, *low, **option)
    said = " ".join(written)
    assert "Nothing was detected with a score of at least 0.5; the highest is 0.31." in said
    assert "--model.picture_score sets this threshold." in said
    assert (picture[-3] == 255).mean() > 0.9, "at the bottom"
    assert (picture[: len(picture) // 3] != 255).all(), "not over all of the picture"
    written.clear()
    draw_detections_beside_truth(image, np.zeros((0, 4)), [], [], low[0], low[1], **option)
    said = " ".join(written)
    assert "at least 0.5, nor with a lower one. --model.picture_score sets this threshold." in said
    written.clear()
    draw_detections(image, *low, min_score=0.1)
    draw_detections_beside_truth(image, *low, low[0], low[1], min_score=0.1)
    assert not [text for text in written if "Nothing" in text]


def test_low_scores_are_left_out():
    boxes, names = [*BOX, [10.0, 10.0, 60.0, 60.0]], ["cat", "dog"]
    both = draw_detections(SKY, boxes, names, [0.9, 0.3], min_score=0.3)
    one = draw_detections(SKY, boxes, names, [0.9, 0.3], min_score=0.31)
    assert len(pixels_of(both, CATEGORY_COLOURS[1])) > 100
    np.testing.assert_array_equal(one, draw_detections(SKY, BOX, ["cat"], [0.9]))


def test_labels_stay_in_the_picture_and_off_each_other():
    """Boxes at every edge and beyond, and several of one place: as many areas of colour as if each were alone."""
    boxes = [[-50, -50, 40, 40], [380, -9, 450, 20], [370, 280, 500, 400], [-9, 290, 30, 310], [500, 500, 600, 600]]
    for box in boxes:
        picture = draw_detections(SKY, [box], ["cat"], [0.5])
        assert len(pixels_of(picture, CATEGORY_COLOURS[0])) > 500, "the label is there"
    alone = len(pixels_of(draw_detections(SKY, BOX, ["cat"], [0.5]), CATEGORY_COLOURS[0]))
    names = ["cat", "dog", "cow"]
    together = draw_detections(SKY, BOX * 3, names, [0.5, 0.4, 0.3])
    for colour in CATEGORY_COLOURS[:3]:
        label = len(pixels_of(together, colour))
        assert 500 < label <= alone * 1.5
    many = draw_detections(SKY, BOX * 60, ["cat"] * 60, np.linspace(0, 1, 60))
    assert many.shape == (480, 640, 3)


def test_a_box_of_no_size_is_still_drawn():
    assert len(pixels_of(draw_detections(SKY, [[50, 50, 50, 50]], ["cat"]), CATEGORY_COLOURS[0])) > 200


def test_colours_tell_categories_apart_and_stay_with_them():
    names = [f"category {number:02d}" for number in range(80)]
    alone = {name: category_colours([name], names)[name] for name in names}
    assert [alone[name] for name in names[:7]] == list(CATEGORY_COLOURS)
    present = [names[3], names[10], names[40], names[3]]  # the first two have one place in the palette
    colours = category_colours(present, names)
    assert colours[names[3]] == alone[names[3]]
    assert colours[names[40]] == alone[names[40]]
    assert len(set(colours.values())) == 3
    assert set(category_colours(names, names).values()) == set(CATEGORY_COLOURS), "more than there are colours"
    assert category_colours(["b", "a"]) == category_colours(["a", "b"])
    assert len(set(category_colours("abcdefg").values())) == 7


def test_truth_beside_prediction():
    figure = draw_detections_beside_truth(
        SKY, BOX * 2, ["dog", "cat"], [0.9, 0.1], BOX, ["cat"], categories=["cat", "dog"]
    )
    height, width, _ = figure.shape
    assert width == 2 * 640 + 10
    assert height > 480
    heading = height - 480
    assert (figure[:heading] == 0).any(), "headings are written"
    left, right = figure[heading:, :640], figure[heading:, -640:]
    np.testing.assert_array_equal(left, draw_detections(SKY, BOX, ["dog"], [0.9], categories=["cat", "dog"]))
    np.testing.assert_array_equal(right, draw_detections(SKY, BOX, ["cat"], categories=["cat", "dog"]))


def test_a_category_has_one_colour_on_both_sides():
    """Without `categories`, "zebra" alone would have the first colour, and beside a cat the second."""
    figure = draw_detections_beside_truth(SKY, BOX, ["zebra"], [0.9], BOX, ["cat"])
    assert len(pixels_of(figure[:, :640], CATEGORY_COLOURS[0])) == 0
    assert len(pixels_of(figure[:, :640], CATEGORY_COLOURS[1])) > 500
    assert len(pixels_of(figure[:, -640:], CATEGORY_COLOURS[0])) > 500


def test_pictures_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    picture = draw_detections(SKY, BOX, ["cat"], [0.7], tmp_path / "deeper" / "a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "deeper" / "a.png")), picture)
    figure = draw_detections_beside_truth(SKY, BOX, ["cat"], [0.7], [], [], str(tmp_path / "b.JPG"))
    with Image.open(tmp_path / "b.JPG") as written:
        assert (written.format, written.size) == ("JPEG", figure.shape[1::-1])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"path='.*a\.gif' must end with the format of the picture, one of \['.png',"):
        save_picture(picture, tmp_path / "a.gif")

    def full(self, file, **settings):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_picture(picture, tmp_path / "new.png")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SKY / 255, BOX, ["cat"]), r"image must be RGB of uint8, .* got float64 of the shape \[300, 400, 3\]: undo"),
        ((torch.zeros(3, 4, 5), BOX, ["cat"]), r"got torch.float32 of the shape \[3, 4, 5\]"),
        ((SKY[..., 0], BOX, ["cat"]), r"got uint8 of the shape \[300, 400\]"),
        ((torch.tensor(SKY), BOX, ["cat"]), r"a tensor \[3, H, W\], got torch.uint8 of the shape \[300, 400, 3\]"),
        ((SKY, BOX[0], ["cat"]), r"boxes must be \[n, 4\] and finite, with n names; got the shape \[4\] and 1 names"),
        ((SKY, BOX, []), r"got the shape \[1, 4\] and 0 names"),
        ((SKY, [[0, 0, np.nan, 1]], ["cat"]), "must be .* finite"),
        ((SKY, BOX, ["cat"], [0.1, 0.2]), r"scores must be one for each of the 1 boxes, got the shape \[2\]"),
    ],
)
def test_what_cannot_be_drawn(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_detections(*arguments)


def test_crowded_boxes_keep_their_outlines_visible():
    """A hundred boxes: smaller letters, and no label over more than a part of another."""
    boxes = [[40.0 * x + 4, 30.0 * y + 4, 40.0 * x + 36, 30.0 * y + 26] for x in range(10) for y in range(10)]
    picture = draw_detections(SKY, boxes, ["cat"] * 100, np.linspace(1, 0.5, 100))
    covered = np.mean((picture != 200).any(axis=2))
    assert covered < 0.6
    assert len(pixels_of(picture, CATEGORY_COLOURS[0])) > 100 * 150


def test_errors_have_colours_and_are_counted():
    box = (100.0, 120.0, 300.0, 240.0)
    other = (20.0, 20.0, 60.0, 60.0)
    colours = {name: ImageColor.getrgb(colour) for name, colour in OUTCOME_COLOURS.items()}

    def halves(detections, objects):
        picture = draw_detection_errors(SKY, detections, objects)
        return [
            {name for name, colour in colours.items() if (half == colour).all(axis=2).any()}
            for half in np.array_split(picture, 2, axis=1)
        ]

    assert halves([(box, "cat", 0.9, "right")], [(box, "cat", "right")]) == [{"right"}, {"right"}]
    assert halves([(box, "cat", 0.9, "no object")], [(other, "cat", "not detected")]) == [
        {"no object"},
        {"not detected"},
    ]
    wrong = "wrong category"
    assert halves([(box, "cat", 0.9, wrong)], [(box, "dog", wrong), (other, "cat", "crowd")]) == [
        {wrong},
        {wrong, "right"},
    ]
    assert halves([], []) == [set(), set()]

"""Objects of an image from several views of it, with a detector that finds coloured rectangles."""

import pytest
import torch
from scipy import ndimage
from torchvision.ops import batched_nms

from lightning_attn.networks.images.detection_inference import DetectionInferenceSpec, detect


class FindsRectangles:
    """Boxes around what is bright: label 1 for red, 2 for green; larger things have higher scores."""

    def __init__(self):
        self.seen = []

    def __call__(self, images):
        return [self.find(image) for image in images]

    def find(self, image):
        self.seen.append(tuple(image.shape[1:]))
        rows = []
        for channel, label in ((0, 1), (1, 2)):
            parts, count = ndimage.label(image[channel].numpy() > 127)
            for y, x in ndimage.find_objects(parts)[:count]:
                area = (y.stop - y.start) * (x.stop - x.start)
                rows.append((x.start, y.start, x.stop, y.stop, label, area / (area + 100)))
        values = torch.tensor(sorted(rows, key=lambda row: -row[5]), dtype=torch.float32).reshape(-1, 6)
        return {"boxes": values[:, :4], "labels": values[:, 4].long(), "scores": values[:, 5]}


def picture(size, *boxes):
    image = torch.zeros(3, *size, dtype=torch.uint8)
    for x1, y1, x2, y2, label in boxes:
        image[label - 1, y1:y2, x1:x2] = 255
    return image


BOXES = ((5, 8, 25, 20, 1), (60, 30, 75, 66, 2), (48, 2, 56, 10, 1), (38, 40, 62, 52, 1))


def rows(detection):
    return sorted(
        [*map(round, box), label]
        for box, label in zip(detection["boxes"].tolist(), detection["labels"].tolist(), strict=True)
    )


@pytest.mark.parametrize(
    "spec",
    [
        DetectionInferenceSpec(),
        DetectionInferenceSpec(flip=True),
        DetectionInferenceSpec(scales=(1.0, 2.0)),
        DetectionInferenceSpec(scales=(2.0,), flip=True),
        DetectionInferenceSpec(mode="sliding", tile=40, overlap=0.5),
        DetectionInferenceSpec(mode="sliding", tile=40, overlap=0.25, flip=True, scales=(1.0, 2.0)),
    ],
    ids=str,
)
def test_every_way_finds_every_object_once_and_where_it_is(spec):
    image = picture((72, 90), *BOXES)
    (found,) = detect(FindsRectangles(), [image], spec)
    assert rows(found) == sorted([list(box) for box in BOXES])
    assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)


def test_what_is_looked_at():
    network = FindsRectangles()
    detect(network, [picture((72, 90)), picture((20, 30))], DetectionInferenceSpec())
    assert network.seen == [(72, 90), (20, 30)]
    network.seen.clear()
    detect(network, [picture((72, 90))], DetectionInferenceSpec(mode="sliding", tile=60, overlap=0.0, flip=True))
    assert network.seen == [(72, 90)] * 2 + [(60, 60)] * 8, "the whole image, then tiles that end with it"
    network.seen.clear()
    detect(network, [picture((40, 50))], DetectionInferenceSpec(mode="sliding", tile=60))
    assert network.seen == [(40, 50)]


def test_a_part_that_a_tile_cuts_gives_way_to_the_whole():
    """The object is in the whole image with a low score, and cut off in a tile with a high one."""

    def network(images):
        (image,) = images
        whole = image.shape[1:] == (40, 80)
        box = [20.0, 10.0, 60.0, 30.0] if whole else [20.0, 10.0, 40.0, 30.0]
        scores = 0.9 if whole else 0.5
        here = whole or image[0, 0, 0] == 1  # the left tile
        count = 1 if here else 0
        return [
            {
                "boxes": torch.tensor([box] * count).reshape(-1, 4),
                "labels": torch.ones(count, dtype=torch.int64),
                "scores": torch.full((count,), scores),
            }
        ]

    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    image[0, 0, 0] = 1
    spec = DetectionInferenceSpec(mode="sliding", tile=40, overlap=0.0)
    (found,) = detect(network, [image], spec)
    assert found["boxes"].tolist() == [[20, 10, 60, 30]]


def test_most_detections_and_none():
    boxes = [(10 * n, 2, 10 * n + 6, 8, 1) for n in range(8)]
    (found,) = detect(
        FindsRectangles(), [picture((20, 90), *boxes)], DetectionInferenceSpec(flip=True, detections_per_img=3)
    )
    assert len(found["scores"]) == 3
    (found,) = detect(FindsRectangles(), [picture((20, 90))], DetectionInferenceSpec(flip=True))
    assert found["boxes"].shape == (0, 4)
    assert detect(FindsRectangles(), [], DetectionInferenceSpec(flip=True)) == []


@pytest.mark.parametrize("part_score", [0.5, 0.9, 0.95])
def test_a_part_with_a_better_score_does_not_replace_the_whole(part_score):
    def network(images):
        (image,) = images
        if image.shape[1:] == (40, 80):
            box, score = [20.0, 10.0, 60.0, 30.0], 0.9
        else:
            left = bool(image[0, 0, 0] == 1)
            box, score = ([20.0, 10.0, 40.0, 30.0] if left else [0.0, 10.0, 20.0, 30.0]), part_score
        return [{"boxes": torch.tensor([box]), "labels": torch.tensor([1]), "scores": torch.tensor([score])}]

    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    image[0, 0, 0] = 1
    (found,) = detect(network, [image], DetectionInferenceSpec(mode="sliding", tile=40, overlap=0.0))
    assert found["boxes"].tolist() == [[20, 10, 60, 30]]
    assert found["scores"].tolist() == pytest.approx([max(0.9, part_score)])


def test_many_detections_are_merged_like_few():
    """Against the definition: in the order of scores, each that overlaps none that was kept."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(3000, 2, generator=generator) * 300
    boxes = torch.cat([corners, corners + 20 + 20 * torch.rand(3000, 2, generator=generator)], dim=1)
    scores = torch.rand(3000, generator=generator)
    labels = torch.randint(1, 4, (3000,), generator=generator)

    def network(images):
        return [{"boxes": boxes, "labels": labels, "scores": scores}]

    spec = DetectionInferenceSpec(scales=(0.999,), detections_per_img=200, voting_iou=1.0)
    (found,) = detect(network, [torch.zeros(3, 400, 400, dtype=torch.uint8)], spec)
    kept = batched_nms(boxes, scores, labels, spec.merge_iou)[:200]
    torch.testing.assert_close(found["boxes"], boxes[kept])
    assert found["labels"].tolist() == labels[kept].tolist()


def test_boxes_of_several_views_are_averaged_by_their_scores():
    turns = iter(([10.0, 10.0, 30.0, 30.0], 0.9, [11.0, 10.0, 31.0, 30.0], 0.3))

    def network(images):
        box, score = next(turns), next(turns)
        return [{"boxes": torch.tensor([box]), "labels": torch.tensor([1]), "scores": torch.tensor([score])}]

    spec = DetectionInferenceSpec(scales=(1.0, 1.001), voting_iou=0.8)
    (found,) = detect(network, [torch.zeros(3, 40, 40, dtype=torch.uint8)], spec)
    assert found["boxes"].flatten().tolist() == pytest.approx([10.25, 10, 30.25, 30])
    assert found["scores"].tolist() == pytest.approx([0.9])


def test_small_images_at_small_scales():
    (found,) = detect(FindsRectangles(), [picture((3, 3))], DetectionInferenceSpec(scales=(0.001, 1.0)))
    assert found["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "tiles"}, r"inference.mode must be one of \['whole', 'sliding'\], got 'tiles'"),
        ({"tile": 0}, "inference.tile"),
        ({"overlap": 1.0}, "inference.overlap must be at least 0"),
        ({"flip": 1}, "inference.flip must be true or false"),
        ({"scales": ()}, "inference.scales must be a list of positive numbers"),
        ({"scales": (0.0,)}, "inference.scales must be a list of positive numbers"),
        ({"merge_iou": 0.0}, "inference.merge_iou must be above 0"),
    ],
)
def test_bad_fields_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DetectionInferenceSpec(**options)

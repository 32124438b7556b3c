"""What a detector gets wrong, on cases that were worked out by hand, and beside pycocotools."""

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scoring import scores_of

from lightning_attn.metrics.detection import CocoDetectionMetrics, coco_records, image_detections
from lightning_attn.metrics.detection_analysis import ImageErrors, analyse_detections


def found(*rows):
    """x1, y1, x2, y2, category id, score each."""
    values = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)
    return image_detections(1, {"boxes": values[:, :4], "labels": values[:, 4].long(), "scores": values[:, 5]})


def truth(objects, images=(1,), names=("cat", "dog")):
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": crowd,
        }
        for number, (image, x1, y1, x2, y2, category, crowd) in enumerate(objects, start=1)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    return {"images": [{"id": image} for image in images], "annotations": annotations, "categories": categories}


def test_confusion_by_hand():
    ground = truth(
        [
            (1, 0, 0, 10, 10, 1, 0),  # found as a cat
            (1, 20, 0, 30, 10, 1, 0),  # found as a dog
            (1, 40, 0, 50, 10, 2, 0),  # not found
            (1, 60, 0, 90, 10, 2, 1),  # a crowd of dogs
        ]
    )
    detections = found(
        (0, 0, 10, 9, 1, 0.9),
        (20, 0, 30, 10, 2, 0.8),
        (70, 0, 80, 10, 2, 0.7),  # within the crowd
        (0, 50, 10, 60, 2, 0.6),  # nothing there
        (40, 0, 50, 10, 2, 0.1),  # below the least score
    )
    analysis = analyse_detections(ground, {1: detections}, min_score=0.5)
    assert analysis.names == ("cat", "dog")
    assert analysis.confusion.tolist() == [[1, 1, 0], [0, 0, 1], [0, 1, 0]]
    assert analysis.images == [
        ImageErrors(
            1,
            right=1,
            confused=1,
            missed=1,
            invented=1,
            detections=("right", "wrong category", "crowd", "no object"),
            objects=("right", "wrong category", "not detected", "crowd"),
        )
    ]
    assert analysis.curves["dog"].num_objects == 1
    # 0.8 hits no dog, 0.7 counts nowhere, 0.6 is wrong, 0.1 is right.
    assert analysis.curves["dog"].precision.tolist() == [0, 0, pytest.approx(1 / 3)]
    assert analysis.curves["dog"].recall.tolist() == [0, 0, 1]
    assert analysis.curves["cat"].recall.tolist() == [0.5]


def test_images_with_most_errors_come_first():
    ground = truth([(1, 0, 0, 9, 9, 1, 0), (2, 0, 0, 9, 9, 1, 0), (2, 20, 20, 29, 29, 2, 0)], images=(1, 2, 3))
    nothing = found()
    analysis = analyse_detections(ground, {1: nothing, 2: nothing, 3: nothing}, min_score=0.0)
    assert [(one.image_id, one.errors) for one in analysis.images] == [(2, 2), (1, 1), (3, 0)]


@pytest.mark.parametrize("seed", range(5))
def test_the_area_under_a_curve_is_coco_s_precision(seed):
    """Interpolated at COCO's 101 recalls, precision is what its evaluation has at an IoU of 0.5."""
    generator = np.random.default_rng(seed)
    objects, detections = [], {}
    for image in range(1, 9):
        rows = []
        for _ in range(generator.integers(1, 6)):
            x, y, w, h = generator.uniform(0, 60, 2).tolist() + generator.uniform(5, 30, 2).tolist()
            category, crowd = int(generator.integers(1, 3)), int(generator.random() < 0.15)
            objects.append((image, x, y, x + w, y + h, category, crowd))
            dx, dy = generator.normal(0, 2, 2)
            guess = category if generator.random() < 0.8 else 3 - category
            rows.append((x + dx, y + dy, x + w + dx, y + h + dy, guess, generator.random()))
        detections[image] = found(*rows)
    ground = truth(objects, images=range(1, 9))
    analysis = analyse_detections(ground, detections, min_score=0.0)
    peer = COCO()
    peer.dataset = ground
    peer.createIndex()
    evaluation = COCOeval(peer, peer.loadRes([dict(one) for one in coco_records(detections)]), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    for place, name in enumerate(analysis.names):
        curve = analysis.curves[name]
        expected = evaluation.eval["precision"][0, :, place, 0, -1]
        envelope = np.maximum.accumulate(curve.precision[::-1])[::-1]
        at = np.searchsorted(curve.recall, evaluation.params.recThrs, side="left")
        ours = np.array([envelope[index] if index < len(envelope) else 0.0 for index in at])
        np.testing.assert_allclose(ours, expected, atol=1e-9)


@pytest.mark.parametrize(("image_base", "category_base"), [(2**53, 0), (2**60, 0), (-(2**60), 0), (0, 2**60)])
def test_ids_beyond_the_integers_of_doubles_score_as_any_others(image_base, category_base):
    """Swapped detections of two images, or two categories, are wrong, whatever the ids are."""
    images, categories = (image_base + 1, image_base + 2), (category_base + 1, category_base + 2)

    def scores(swap):
        metrics = CocoDetectionMetrics(
            {
                "images": [{"id": image} for image in images],
                "categories": [{"id": number, "name": str(number)} for number in categories],
                "annotations": [
                    {
                        "id": place + 1,
                        "image_id": images[place],
                        "category_id": categories[place],
                        "bbox": [90.0 * place, 10, 20, 20],
                        "area": 400,
                        "iscrowd": 0,
                    }
                    for place in (0, 1)
                ],
            }
        )
        for place in (0, 1):
            x = 90.0 * (1 - place if swap and not category_base else place)
            box = torch.tensor([[x, 10, x + 20, 30]], dtype=torch.float64)
            label = categories[1 - place if swap and category_base else place]
            metrics.update([images[place]], [{"boxes": box, "labels": torch.tensor([label]), "scores": torch.ones(1)}])
        scored = scores_of(metrics)
        assert {record["image_id"] for record in metrics.records()} == set(images)
        return scored

    right = scores(swap=False)
    assert right["ap"] == 1.0
    assert right["ap_per_category"] == {str(number): 1.0 for number in categories}
    assert scores(swap=True)["ap"] == 0.0

import contextlib
import copy
import io
import json
import logging
import math

import numpy as np
import pytest
import torch
from scoring import scores_of

from lightning_attn.metrics.detection import COCO_NUMBERS, CocoDetectionMetrics, coco_records, image_detections

CATEGORIES = {3: "cat", 7: "dog", 18: "traffic light", 90: "toothbrush"}
SIZE = 23  # odd, so that two ranks cannot share evenly


def ground_truth(size: int = SIZE) -> dict:
    """Objects of three categories and all sizes, some crowds; every fifth image and the last category have none."""
    rng = np.random.default_rng(0)
    annotations = []
    for image_id in range(100, 100 + size):
        for _ in range(0 if image_id % 5 == 0 else rng.integers(1, 9)):
            (x, y), side = rng.uniform(0, 300, 2), rng.choice([16.0, 60.0, 150.0]) * rng.uniform(0.6, 1.4, 2)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.choice([3, 7, 18])),
                    "bbox": [float(x), float(y), float(side[0]), float(side[1])],
                    "area": float(0.8 * side.prod()),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
    return {
        "images": [{"id": image_id, "width": 500, "height": 500} for image_id in range(100, 100 + size)],
        "annotations": annotations,
        "categories": [{"id": category_id, "name": name} for category_id, name in CATEGORIES.items()],
    }


def detections(truth: dict, seed: int = 1) -> dict[int, dict[str, torch.Tensor]]:
    """Shifted copies of most objects, some of another category, among boxes at random; scores with ties."""
    rng = np.random.default_rng(seed)
    found = {}
    for image in truth["images"]:
        boxes, labels = [], []
        for one in truth["annotations"]:
            for _ in range(rng.integers(0, 4) if one["image_id"] == image["id"] else 0):
                x, y, width, height = one["bbox"]
                shift = rng.normal(0, 0.06, 4) * [width, height, width, height]
                boxes.append(np.array([x, y, x + width, y + height]) + shift)
                labels.append(one["category_id"] if rng.random() < 0.9 else rng.choice(list(CATEGORIES)))
        for _ in range(rng.integers(0, 5)):
            x, y, width, height = rng.uniform(0, 200, 4)
            boxes.append(np.array([x, y, x + width, y + height]))
            labels.append(rng.choice(list(CATEGORIES)))
        found[image["id"]] = {
            "boxes": torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32),
            "labels": torch.tensor(np.array(labels), dtype=torch.int64),
            "scores": torch.tensor(rng.integers(1, 30, len(boxes)) / 30, dtype=torch.float32),
        }
    return found


def nothing() -> dict[str, torch.Tensor]:
    return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}


def scored(truth: dict, found: dict, ids=None) -> CocoDetectionMetrics:
    metric = CocoDetectionMetrics(truth)
    ids = list(found) if ids is None else ids
    metric.update(ids, [found[image_id] for image_id in ids])
    return metric


def by_pycocotools(truth: dict, records: list, image_ids: list[int]) -> tuple[list[float], dict[str, float]]:
    """The twelve numbers and the AP of each category, -1 where there is none."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):
        data = coco.COCO()
        data.dataset = copy.deepcopy(truth)
        data.createIndex()
        evaluation = cocoeval.COCOeval(data, data.loadRes(records), "bbox")
        evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][..., 0, -1]
    per_category = {}
    for place, category_id in enumerate(evaluation.params.catIds):
        values = precision[..., place][precision[..., place] > -1]
        per_category[CATEGORIES[category_id]] = values.mean() if len(values) else -1.0
    return list(evaluation.stats), per_category


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_pycocotools_on_the_written_file(tmp_path, seed):
    truth = ground_truth()
    metric = scored(truth, detections(truth, seed))
    scores = scores_of(metric)
    (tmp_path / "detections.json").write_text(json.dumps(metric.records()))
    records = json.loads((tmp_path / "detections.json").read_text())
    numbers, per_category = by_pycocotools(truth, records, [image["id"] for image in truth["images"]])
    assert [scores[name] for name in COCO_NUMBERS] == pytest.approx(numbers, abs=1e-9)
    assert per_category.pop("toothbrush") == -1
    assert scores["ap_per_category"] == pytest.approx(per_category, abs=1e-9)
    assert scores["ap"] == pytest.approx(sum(per_category.values()) / 3), "no mean over a category without objects"
    assert len({round(number, 3) for number in numbers}) > 9, "the case tells the twelve apart"
    assert 0.2 < scores["ap"] < 0.9
    assert any(one["iscrowd"] for one in truth["annotations"])
    assert (scores["num_images"], scores["num_images_in_split"]) == (SIZE, SIZE)


def test_only_images_that_were_seen_are_scored():
    truth = ground_truth()
    found = detections(truth)
    seen = [102, 103, 110, 104]
    metric = scored(truth, found, seen)
    scores = scores_of(metric)
    numbers, _ = by_pycocotools(truth, metric.records(), sorted(seen))
    assert [scores[name] for name in COCO_NUMBERS] == pytest.approx(numbers, abs=1e-9)
    assert scores["ap"] != pytest.approx(scores_of(scored(truth, found))["ap"])
    assert (scores["num_images"], scores["num_images_in_split"]) == (4, SIZE)


def test_perfect_detections_score_one_and_none_score_zero():
    truth = ground_truth()
    for one in truth["annotations"]:
        one["iscrowd"] = 0
    perfect = {image["id"]: nothing() for image in truth["images"]}
    for image_id in perfect:
        objects = [one for one in truth["annotations"] if one["image_id"] == image_id]
        boxes = torch.tensor([one["bbox"] for one in objects], dtype=torch.float64).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([one["category_id"] for one in objects], dtype=torch.int64)
        perfect[image_id] = {"boxes": boxes, "labels": labels, "scores": torch.linspace(0, 1, len(objects))}
    scores = scores_of(scored(truth, perfect))
    for name in set(COCO_NUMBERS) - {"ar1"}:
        assert scores[name] == pytest.approx(1.0), name
    assert scores["ar1"] < 1, "one detection an image cannot find all"

    metric = scored(truth, {image_id: nothing() for image_id in perfect})
    scores = scores_of(metric)
    assert [scores[name] for name in COCO_NUMBERS] == [0.0] * 12
    assert scores["ap_per_category"] == {"cat": 0.0, "dog": 0.0, "traffic light": 0.0}
    assert metric.records() == []


def test_where_there_is_nothing_to_find_the_number_is_nan():
    truth = ground_truth()
    for one in truth["annotations"]:
        one["area"] = 50.0**2
    scores = scores_of(scored(truth, detections(truth)))
    assert {name for name in COCO_NUMBERS if math.isnan(scores[name])} == {
        *("ap_small", "ap_large", "ar_small", "ar_large")
    }
    scores = scores_of(scored(truth, detections(truth), [100, 105]))  # images without objects
    assert all(math.isnan(scores[name]) for name in COCO_NUMBERS)
    assert scores["ap_per_category"] == {}
    assert scores["num_images"] == 2


def test_records_are_plain_sorted_and_not_rounded():
    truth = ground_truth(3)
    found = {image["id"]: nothing() for image in truth["images"]}
    boxes = torch.tensor([[0.1, 0.2, 10.3, 20.7], [1 / 3, 5.0, 1 / 3, 5.0], [7.0, 8.0, 9.0, 10.0]])
    found[101] = {"boxes": boxes, "labels": torch.tensor([7, 3, 90]), "scores": torch.tensor([0.1, 0.9, 0.1])}
    found[100] = {"boxes": boxes[:1], "labels": torch.tensor([18]), "scores": torch.tensor([0.3])}
    metric = scored(truth, found, [101, 102, 100])
    metric.compute()
    records = metric.records()
    assert [(one["image_id"], one["category_id"]) for one in records] == [(100, 18), (101, 3), (101, 7), (101, 90)]
    x1, y1, x2, y2 = boxes[0].tolist()
    assert records[2]["bbox"] == [x1, y1, x2 - x1, y2 - y1]
    assert records[2]["score"] == torch.tensor(0.1).item()
    assert records[1]["bbox"][2:] == [0.0, 0.0]
    for one in records:
        assert {name: type(value) for name, value in one.items()} == {
            **{"image_id": int, "category_id": int, "bbox": list, "score": float}
        }
        assert {type(value) for value in one["bbox"]} == {float}
    assert json.loads(json.dumps(records)) == records


def test_records_without_ground_truth():
    """What a prediction on a folder of images writes."""
    found = detections(ground_truth(3))
    records = coco_records({image_id: image_detections(image_id, found[image_id]) for image_id in (102, 101)})
    assert [one["image_id"] for one in records] == sorted(
        [101] * len(found[101]["scores"]) + [102] * len(found[102]["scores"])
    )


def test_repeats_and_the_order_of_images_change_nothing():
    truth = ground_truth()
    found = detections(truth)
    plain, shuffled = scored(truth, found), scored(truth, found, [110, 101])
    shuffled.update(torch.tensor([110, 110]), [nothing(), nothing()])
    order = sorted(found, key=lambda image_id: (7 * image_id) % SIZE)
    shuffled.update(order, [found[image_id] for image_id in order])
    assert scores_of(shuffled) == scores_of(plain)
    assert shuffled.records() == plain.records()


def test_the_ground_truth_is_left_as_it_is_and_may_be_scored_again():
    truth = ground_truth()
    truth["annotations"][0]["id"] = 0  # the evaluators' mark of "no match"
    before = copy.deepcopy(truth)
    metric = scored(truth, detections(truth))
    first = scores_of(metric)
    assert scores_of(metric) == first
    assert truth == before
    truth["annotations"][0]["id"] = 10**6
    assert scores_of(scored(truth, detections(truth))) == first


def test_scoring_is_silent(capfd, caplog):
    caplog.set_level(logging.INFO)
    truth = ground_truth()
    scores_of(scored(truth, detections(truth)))
    scores_of(scored(truth, {100: nothing()}))
    assert "".join(capfd.readouterr()) + caplog.text == ""


def test_records_need_a_computation_and_reset_forgets():
    truth = ground_truth()
    found = detections(truth)
    metric = scored(truth, found, [101])
    for change in (lambda: None, lambda: metric.update([102], [found[102]]), metric.reset):
        change()
        with pytest.raises(RuntimeError, match=r"call compute\(\) on every rank first"):
            metric.records()
        metric.update([101], [found[101]])
        metric.compute()
    metric.reset()
    with pytest.raises(ValueError, match=r"no image of the split 'val' to score: .*limit_val_batches is 0"):
        metric.compute()


def one_box(**changes) -> dict[str, torch.Tensor]:
    return {"boxes": torch.tensor([[1.0, 2, 3, 4]]), "labels": torch.tensor([3]), "scores": torch.ones(1)} | changes


@pytest.mark.parametrize(
    ("ids", "found", "message"),
    [
        ([100, 101], [one_box()], "equal length, got 2 and 1"),
        ([1], [one_box()], "image id 1 is not in the ground truth of the split 'test', which has 23 images"),
        (
            [101],
            [one_box(labels=torch.tensor([1]))],
            "image 101: 1 is not a category id .*'test' .3, 7, 18, 90.. Convert the",
        ),
        ([101], [one_box(labels=torch.ones(1))], "image 101: .*labels of torch.float32"),
        ([101], [one_box(boxes=torch.zeros(4))], r"image 101: boxes must be \[n, 4\].*shapes \[4\], \[1\] and \[1\]"),
        ([101], [one_box(scores=torch.ones(2))], r"shapes \[1, 4\], \[1\] and \[2\]"),
        ([101], [one_box(scores=torch.tensor([math.nan]))], r"image 101: .*the score nan .*has diverged"),
        ([101], [one_box(boxes=torch.tensor([[0, 0, math.inf, 1]]))], r"box \[0.0, 0.0, inf, 1.0\]"),
        ([101], [one_box(boxes=torch.tensor([[5.0, 0, 4, 1]]))], r"box \[5.0, 0.0, 4.0, 1.0\] .* x1 <= x2"),
    ],
)
def test_mistakes(ids, found, message):
    with pytest.raises(ValueError, match=message):
        CocoDetectionMetrics(ground_truth(), "test").update(ids, found)


def test_categories_of_one_name_are_refused():
    truth = ground_truth()
    truth["categories"].append({"id": 91, "name": "dog"})
    with pytest.raises(ValueError, match=r"categories of the split 'val': more than one has the name 'dog'"):
        CocoDetectionMetrics(truth)


IDS = list(range(100, 100 + SIZE))
# What two ranks see: unequally dealt, some images on both; then all of them on one rank, the first or the second.
DEALT = [([*IDS[::2], 101], [*IDS[1::2], 100, 104]), (IDS, []), ([], IDS)]


def _compute(ids: list[int]) -> list[object]:
    truth = ground_truth()
    found = detections(truth)
    metric = CocoDetectionMetrics(truth)
    for image_id in ids:
        metric.update([image_id], [found[image_id]])
    return [scores_of(metric), metric.records()]


def _compute_on_rank(rank: int) -> list[object]:
    results: list[object] = [_compute(ids[rank]) for ids in DEALT]
    try:
        CocoDetectionMetrics(ground_truth()).compute()
    except ValueError as error:
        results += [str(error)]
    return results


@pytest.mark.ddp
@pytest.mark.timeout(900)
def test_two_ranks_give_the_scores_of_one_to_the_last_digit(on_two_ranks):
    expected = _compute(IDS)
    for *results, error in on_two_ranks(_compute_on_rank):
        assert results == [expected] * 3
        assert "no image of the split 'val'" in error

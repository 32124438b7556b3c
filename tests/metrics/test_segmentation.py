import contextlib
import copy
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scoring import scores_of

from lightning_attn.metrics.segmentation import SegmentationMetrics

NAMES = ("road", "sky", "car", "rider", "train")
SIZE = 7  # odd, so that two ranks cannot share evenly
IGNORED = 255


def maps(size: int = SIZE, num_classes: int = len(NAMES)) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """Predictions and truths by id, of different sizes: about two thirds right, a tenth of the pixels ignored.

    The last class is absent and never predicted on a pixel that counts; the one before is absent but predicted.
    """
    rng = np.random.default_rng(0)
    predicted, labels = {}, {}
    for sample in range(50, 50 + size):
        shape = tuple(rng.integers(8, 40, 2))
        truth = rng.integers(0, num_classes - 2, shape).astype(np.uint8)
        found = np.where(rng.random(shape) < 0.6, truth, rng.integers(0, num_classes - 1, shape)).astype(np.uint8)
        truth[rng.random(shape) < 0.1] = IGNORED
        found[(truth == IGNORED) & (rng.random(shape) < 0.5)] = num_classes - 1
        predicted[sample], labels[sample] = torch.from_numpy(found), torch.from_numpy(truth)
    return predicted, labels


def scored(predicted: dict, labels: dict, ids=None, classes=NAMES) -> SegmentationMetrics:
    metric = SegmentationMetrics(classes)
    ids = list(labels) if ids is None else ids
    metric.update(ids, [predicted[sample] for sample in ids], [labels[sample] for sample in ids])
    return metric


def plain(scores: dict) -> dict:
    """As JSON holds it, and equal to itself: NaN is None."""
    ious = {name: None if math.isnan(iou) else iou for name, iou in scores["iou_per_class"].items()}
    return {**scores, "iou_per_class": ious, "confusion": scores["confusion"].tolist()}


def by_sets(predicted: dict, labels: dict, label: int) -> float:
    """The IoU by its definition: sets of pixels of the whole split."""
    found, truth = set(), set()
    for sample, true in labels.items():
        for row, column in np.argwhere(true.numpy() != IGNORED).tolist():
            if predicted[sample][row, column] == label:
                found.add((sample, row, column))
            if true[row, column] == label:
                truth.add((sample, row, column))
    return len(found & truth) / len(found | truth) if found | truth else math.nan


def test_scores_are_those_of_the_definition():
    predicted, labels = maps()
    scores = scores_of(scored(predicted, labels))
    expected = [by_sets(predicted, labels, label) for label in range(len(NAMES))]
    assert list(scores["iou_per_class"]) == list(NAMES)
    np.testing.assert_allclose(list(scores["iou_per_class"].values()), expected, rtol=1e-12)
    assert 0.3 < expected[0] < 0.8
    assert expected[3] == 0, "absent, but predicted: it counts in the mean"
    assert math.isnan(expected[4]), "absent and predicted on ignored pixels only: it does not"
    assert scores["miou"] == pytest.approx(sum(expected[:4]) / 4, rel=1e-12)

    counted = torch.cat([labels[sample][labels[sample] != IGNORED] for sample in labels])
    right = torch.cat([predicted[sample][labels[sample] != IGNORED] for sample in labels]) == counted
    assert scores["pixel_accuracy"] == pytest.approx(float(right.double().mean()), rel=1e-12)
    assert scores["num_images"] == SIZE
    confusion = scores["confusion"]
    assert (confusion.dtype, confusion.shape) == (np.int64, (5, 5))
    assert confusion.sum(axis=1).tolist() == torch.bincount(counted, minlength=5).tolist(), "rows are the truth"
    assert confusion[2, 3] == sum(int(((labels[one] == 2) & (predicted[one] == 3)).sum()) for one in labels)


def by_cityscapes_scripts(folder, predicted: dict, labels: dict) -> dict:
    """The evaluator's own results on PNGs of label ids; ignored pixels get ids of all kinds that it ignores."""
    evaluator = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    table = pytest.importorskip("cityscapesscripts.helpers.labels")
    ids = np.zeros(256, dtype=np.uint8)
    for label, one in table.trainId2label.items():
        if 0 <= label < IGNORED:
            ids[label] = one.id
    ignored = [one.id for one in table.labels if one.ignoreInEval and one.id >= 0]
    found, truth = [], []
    for sample in labels:
        stem = folder / f"town_000000_{sample:06d}"
        found.append(f"{stem}_pred_labelIds.png")
        truth.append(f"{stem}_gtFine_labelIds.png")
        truth_ids = ids[labels[sample].numpy()]
        hidden = labels[sample].numpy() == IGNORED
        truth_ids[hidden] = np.resize(ignored, hidden.sum())
        Image.fromarray(ids[predicted[sample].numpy()]).save(found[-1])
        Image.fromarray(truth_ids).save(truth[-1])
    settings = copy.copy(evaluator.args)
    settings.evalInstLevelScore, settings.JSONOutput, settings.quiet = False, False, True
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluateImgLists(found, truth, settings)


def test_scores_are_those_of_cityscapes_scripts_on_written_files(tmp_path):
    labels_table = pytest.importorskip("cityscapesscripts.helpers.labels")
    evaluated = [labels_table.trainId2label[label] for label in range(19)]
    # Of the 19 classes 17 occur, one is predicted without occurring, and one is neither.
    predicted, labels = maps(9, num_classes=19)
    results = by_cityscapes_scripts(tmp_path, predicted, labels)
    scores = scores_of(scored(predicted, labels, classes=[one.name for one in evaluated]))
    for one in evaluated:
        expected = results["classScores"][one.name]
        assert scores["iou_per_class"][one.name] == pytest.approx(expected, abs=1e-12, nan_ok=True), one.name
    assert scores["miou"] == pytest.approx(results["averageScoreClasses"], abs=1e-12)
    assert scores["iou_per_class"]["motorcycle"] == 0
    assert math.isnan(scores["iou_per_class"]["bicycle"])
    ids = [one.id for one in evaluated]
    np.testing.assert_array_equal(scores["confusion"], np.array(results["confMatrix"])[ids][:, ids])


def test_repeats_and_the_order_of_images_change_nothing():
    predicted, labels = maps()
    expected = plain(scores_of(scored(predicted, labels)))
    metric = scored(predicted, labels, [53, 51])
    metric.update(torch.tensor([53, 53]), [torch.zeros_like(predicted[53])] * 2, [labels[53]] * 2)
    order = sorted(labels, key=lambda sample: (3 * sample) % SIZE)
    metric.update(order, [predicted[sample] for sample in order], [labels[sample] for sample in order])
    assert plain(scores_of(metric)) == expected
    assert plain(scores_of(metric)) == expected, "it may be computed again"


def test_only_images_since_the_reset_are_scored():
    predicted, labels = maps()
    metric = scored(predicted, labels)
    metric.reset()
    metric.update([], [], [])
    with pytest.raises(ValueError, match=r"no segmented image to score: .*trainer.limit_val_batches .* is 0"):
        metric.compute()
    metric.update([52], [predicted[52]], [labels[52]])
    assert plain(scores_of(metric)) == plain(scores_of(scored(predicted, labels, [52])))


def test_where_no_pixel_counts_scores_are_nan():
    ignored = torch.full((4, 6), IGNORED, dtype=torch.uint8)
    scores = scores_of(scored({1: torch.zeros_like(ignored)}, {1: ignored}))
    numbers = [scores["miou"], scores["pixel_accuracy"], *scores["iou_per_class"].values()]
    assert all(math.isnan(number) for number in numbers)
    assert scores["num_images"] == 1
    assert scores["confusion"].sum() == 0


def test_a_perfect_prediction_scores_one():
    _, labels = maps()
    predicted = {sample: truth.where(truth != IGNORED, 3) for sample, truth in labels.items()}
    scores = scores_of(scored(predicted, labels))
    assert (scores["miou"], scores["pixel_accuracy"]) == (1.0, 1.0)
    assert math.isnan(scores["iou_per_class"]["rider"]), "what is predicted on ignored pixels does not count"


@pytest.mark.parametrize("number", [1, 2, 128, 129, 255])
def test_any_number_of_classes_that_uint8_can_hold(number):
    """Pairs of labels are numbered in 16 bits up to 128 classes, and in 32 above."""
    ends = torch.tensor([0, number - 1], dtype=torch.uint8)
    truth = torch.cat((ends.repeat_interleave(3), torch.tensor([IGNORED, IGNORED], dtype=torch.uint8))).view(2, 4)
    found = torch.cat((ends.repeat(3), ends)).view(2, 4)
    confusion = scores_of(scored({0: found}, {0: truth}, classes=[str(label) for label in range(number)]))["confusion"]
    expected = np.zeros((number, number), dtype=np.int64)
    np.add.at(expected, (truth.flatten()[:6].numpy(), found.flatten()[:6].numpy()), 1)
    np.testing.assert_array_equal(confusion, expected)


def test_maps_of_any_layout_and_another_ignored_label():
    predicted, labels = maps()
    metric = SegmentationMetrics(NAMES, ignored=5)
    truth = labels[50].where(labels[50] != IGNORED, 5).T.contiguous().T
    metric.update([50], [predicted[50].T.contiguous().T], [truth])
    assert plain(scores_of(metric)) == plain(scores_of(scored(predicted, labels, [50])))
    with pytest.raises(ValueError, match=r"labels has the label 255, .* not the ignored one \(5\)"):
        metric.update([51], [predicted[51]], [labels[51]])


def one_map(label: int = 0, shape=(3, 4), dtype=torch.uint8) -> list[torch.Tensor]:
    return [torch.full(shape, label, dtype=dtype)]


@pytest.mark.parametrize(
    ("ids", "predicted", "labels", "message"),
    [
        ([7, 8], one_map(), one_map(), "equal length, got 2, 1 and 1"),
        (
            [7],
            one_map(shape=(3, 5)),
            one_map(),
            r"image 7: .* torch.uint8 \[3, 5\] and torch.uint8 \[3, 4\]. Resize the",
        ),
        ([7], one_map(dtype=torch.int64), one_map(), r"image 7: .* one size; got torch.int64 \[3, 4\] and torch.uint8"),
        ([7], one_map(), one_map(dtype=torch.float32), r"image 7: .* torch.float32 \[3, 4\]"),
        ([7], one_map(shape=(1, 3, 4)), one_map(shape=(1, 3, 4)), r"uint8 \[H, W\] of one size; got"),
        (
            [7],
            one_map(5),
            one_map(),
            "image 7: predicted has the label 5, but the 5 classes are 0 to 4, .*not the data",
        ),
        ([7], one_map(IGNORED), one_map(), "image 7: predicted has the label 255"),
        ([7], one_map(IGNORED), one_map(IGNORED), "image 7: predicted has the label 255"),
        (
            [7],
            one_map(),
            one_map(33),
            r"image 7: labels has the label 33, .* 5 classes \(0 to 4\) .* \(255\). Convert the",
        ),
    ],
)
def test_mistakes(ids, predicted, labels, message):
    metric = SegmentationMetrics(NAMES)
    with pytest.raises(ValueError, match=message):
        metric.update(ids, predicted, labels)


def test_an_id_of_two_images_is_refused():
    metric = SegmentationMetrics(NAMES)
    metric.update([7], one_map(), one_map())
    with pytest.raises(ValueError, match=r"sample id 7 .* two different samples, \[12, 0, 0, 0, 0\] and \[0, 12, 0"):
        metric.update([7], one_map(), one_map(1))


@pytest.mark.parametrize(
    ("classes", "ignored", "message"),
    [
        ([], 255, r"classes must be one or more different names, got \[\]"),
        (["car", "sky", "car"], 255, "one or more different names, got .'car', 'sky', 'car'"),
        (NAMES, 4, "ignored must be a label that none of the 5 classes has, from 5 to 255; got 4"),
        (NAMES, -1, "got -1"),
        (NAMES, 256, "got 256"),
    ],
)
def test_classes_that_cannot_be_told_apart(classes, ignored, message):
    with pytest.raises(ValueError, match=message):
        SegmentationMetrics(classes, ignored)


IDS = list(range(50, 50 + SIZE))
# What two ranks see: unequally dealt, some images on both; then all of them on one rank, the first or the second.
DEALT = [([*IDS[::2], 51], [*IDS[1::2], 50, 54]), (IDS, []), ([], IDS)]


def _compute_on_rank(rank: int) -> list[object]:
    predicted, labels = maps()
    results: list[object] = [plain(scores_of(scored(predicted, labels, ids[rank]))) for ids in DEALT]
    clash = scored(predicted, labels, [])
    clash.update([7], one_map(), one_map(rank))  # counted from 0 on every rank
    for metric in (clash, SegmentationMetrics(NAMES)):
        try:
            metric.compute()
        except ValueError as error:
            results.append(str(error))
    return results


@pytest.mark.ddp
@pytest.mark.timeout(900)
def test_two_ranks_give_the_scores_of_one_to_the_last_digit(on_two_ranks):
    predicted, labels = maps()
    expected = plain(scores_of(scored(predicted, labels)))
    for *results, clash, nothing in on_two_ranks(_compute_on_rank):
        assert results == [expected] * 3
        assert clash.startswith("sample id 7 belongs to two different samples")
        assert "no segmented image to score" in nothing

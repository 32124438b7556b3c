"""Scores of resampled test sets, against each metric's own score of the set with its samples repeated."""

import numpy as np
import pytest
import torch
from sacrebleu import BLEU
from sacrebleu.significance import PairedTest

from lightning_attn.metrics.bootstrap import resampled_counts, samples_digest
from lightning_attn.metrics.detection import CocoDetectionMetrics, ImageDetections
from lightning_attn.metrics.detection_resampling import resampled_average_precision
from lightning_attn.metrics.segmentation import SegmentationMetrics
from lightning_attn.metrics.translation import CorpusTranslationMetrics
from lightning_attn.metrics.weighted_mean import WeightedMean


def test_sets_are_drawn_with_replacement_and_depend_on_the_number_of_samples_alone():
    counts = resampled_counts(50)
    assert counts.shape == (1000, 50)
    assert (counts.sum(axis=1) == 50).all()
    assert np.array_equal(counts, resampled_counts(50))
    # A sample is missing from a set with the probability (1 - 1/n)^n.
    assert (counts == 0).mean() == pytest.approx((1 - 1 / 50) ** 50, abs=0.01)
    assert samples_digest([1, 2]) == samples_digest([1, 2]) != samples_digest([12])


@pytest.fixture
def detection():
    """Objects, crowds among them, and detections of ten images, some of which have neither."""
    generator = np.random.default_rng(3)
    annotations, detections = [], {}
    for image in range(10):
        boxes = generator.uniform(0, 60, (generator.integers(0, 5), 2))
        for number, (x, y) in enumerate(boxes):
            width, height = generator.uniform(10, 40, 2)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(generator.integers(1, 4)),
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": int(number == 3),
                }
            )
        found = []
        for one in annotations:
            if one["image_id"] == image:
                x, y, width, height = np.array(one["bbox"]) + generator.normal(0, 3, 4)
                found += [[x, y, x + max(width, 1), y + max(height, 1)]] * 2
        found += [[x, y, x + 20, y + 20] for x, y in generator.uniform(0, 60, (3, 2))]
        order = generator.permutation(len(found))
        detections[image] = ImageDetections(
            np.array(found)[order],
            generator.integers(1, 4, len(found)),
            np.sort(generator.uniform(0, 1, len(found)))[::-1],
        )
    return annotations, detections


def coco_scores(annotations, detections, counts):
    """COCO's scores of a set in which each image occurs as often as `counts` says, as images of their own."""
    copies = [(image, copy) for image, count in enumerate(counts) for copy in range(count)]
    truth = {
        "images": [{"id": number} for number in range(len(copies))],
        "categories": [{"id": one, "name": str(one)} for one in (1, 2, 3)],
        "annotations": [
            one | {"image_id": number}
            for number, (image, _) in enumerate(copies)
            for one in annotations
            if one["image_id"] == image
        ],
    }
    metric = CocoDetectionMetrics(truth)
    for number, (image, _) in enumerate(copies):
        boxes, labels, scores = map(torch.from_numpy, map(np.ascontiguousarray, detections[image]))
        metric.update([number], [{"boxes": boxes, "labels": labels, "scores": scores}])
    metric.compute()
    return metric


def test_average_precision_is_that_of_the_repeated_images(detection):
    annotations, detections = detection
    counts = np.concatenate((np.ones((1, 10), dtype=np.int64), resampled_counts(10, 12)))
    found = resampled_average_precision(annotations, detections, counts)
    for number, row in enumerate(counts):
        expected = coco_scores(annotations, detections, row).scores()
        assert {name: values[number] for name, values in found.items()} == pytest.approx(
            {name: expected[name] for name in ("ap", "ap50", "ap75")}, abs=1e-9
        )


def test_the_metric_of_detection_resamples_what_it_scored(detection):
    metric = coco_scores(*detection, [1] * 10)
    resampled = metric.resampled_scores()
    assert resampled.num_samples == 10
    assert resampled.scores["ap"].shape == (1000,)
    assert resampled.scores["ap50"].min() < metric.scores()["ap50"] < resampled.scores["ap50"].max()


def test_a_set_without_objects_has_no_average_precision(detection):
    annotations, detections = detection
    counts = np.zeros((1, 10), dtype=np.int64)
    assert np.isnan(resampled_average_precision(annotations, detections, counts)["ap"][0])


def test_mean_iou_is_that_of_the_repeated_images():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (6, 8, 8), generator=generator, dtype=torch.uint8)
    labels[0] = 0
    labels[1:][labels[1:] == 3] = 255  # the last class is in the first image alone, if at all
    predicted = torch.randint(0, 4, (6, 8, 8), generator=generator, dtype=torch.uint8)
    metric = SegmentationMetrics(["a", "b", "c", "d"])
    metric.update(range(6), predicted, labels)
    metric.compute()
    found = metric.resampled_scores().scores
    for number, row in enumerate(resampled_counts(6)[:20]):
        repeated = SegmentationMetrics(["a", "b", "c", "d"])
        indices = np.repeat(np.arange(6), row)
        repeated.update(range(6), predicted[indices], labels[indices])
        expected = {name: float(value) for name, value in repeated.compute().items()}
        assert {name: found[name][number] for name in expected} == pytest.approx(expected, abs=1e-12)


WORDS = ["the", "a", "man", "dog", "runs", "jumps", "over", "red", "blue", "street", "and"]


def test_bleu_is_that_of_the_repeated_sentences():
    generator = np.random.default_rng(1)
    references = [" ".join(generator.choice(WORDS, 12)) for _ in range(15)]
    hypotheses = [" ".join(generator.permutation(line.split())[:11]) for line in references]
    hypotheses[:5] = references[:5]
    metric = CorpusTranslationMetrics("test")
    metric.update(range(15), hypotheses, references)
    metric.compute()
    found = metric.resampled_scores().scores["bleu"]
    for number, row in enumerate(resampled_counts(15)[:20]):
        indices = np.repeat(np.arange(15), row)
        chosen = [hypotheses[i] for i in indices], [[references[i] for i in indices]]
        assert found[number] == pytest.approx(BLEU().corpus_score(*chosen).score, abs=1e-9)


def test_the_interval_of_bleu_is_close_to_sacrebleus_own():
    generator = np.random.default_rng(2)
    references = [" ".join(generator.choice(WORDS, 12)) for _ in range(200)]
    hypotheses = [line if i % 3 else " ".join(generator.permutation(line.split())) for i, line in enumerate(references)]
    metric = CorpusTranslationMetrics("test")
    metric.update(range(200), hypotheses, references)
    metric.compute()
    low, high = np.percentile(metric.resampled_scores().scores["bleu"], [2.5, 97.5])
    systems = [("ours", hypotheses), ("same", hypotheses)]
    _, results = PairedTest(systems, {"BLEU": BLEU()}, [references], test_type="bs", n_samples=1000)()
    theirs = results["BLEU"][0]
    assert (high - low) / 2 == pytest.approx(theirs.ci, rel=0.1)
    assert (high + low) / 2 == pytest.approx(theirs.mean, abs=0.1 * theirs.ci)


def test_a_weighted_mean_is_that_of_the_repeated_samples():
    metric = WeightedMean("test")
    metric.update([4, 2, 9], torch.tensor([1.0, 4.0, 6.0]), torch.tensor([1, 2, 3]))
    metric.compute()
    counts = resampled_counts(3)
    sums, numbers = counts @ [4.0, 1.0, 6.0], counts @ [2, 1, 3]  # in the order of ids
    assert metric.resampled_scores().scores["mean"] == pytest.approx(sums / numbers)

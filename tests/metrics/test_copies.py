"""Metrics of tensors on a GPU: no update waits for the batch that is being computed; scores are those of the CPU."""

import pytest
import torch
from fake_cuda import fake_cuda

from lightning_attn.metrics import CocoDetectionMetrics, SegmentationMetrics, WeightedMean
from lightning_attn.metrics.copies import DelayedCopies

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TRUTH = {
    "images": [{"id": number, "width": 50, "height": 40} for number in (1, 2, 3)],
    "categories": [{"id": 7, "name": "thing"}],
    "annotations": [
        {"id": number, "image_id": number, "category_id": 7, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}
        for number in (1, 2, 3)
    ],
}


def batches(device):
    """For each metric, its batches."""
    generator = torch.Generator().manual_seed(0)
    losses = [
        (torch.tensor([2 * n, 2 * n + 1]), torch.rand(2, generator=generator), torch.tensor([3, n])) for n in range(3)
    ]
    maps = [torch.randint(0, 3, (2, 9, 11), generator=generator).to(torch.uint8) for _ in range(6)]
    found = [
        [{"boxes": torch.tensor([[4.0, 4, 20, 20 + n]]), "labels": torch.tensor([7]), "scores": torch.tensor([0.9])}]
        for n in range(3)
    ]

    def moved(one):
        return {key: value.to(device) for key, value in one.items()}

    return {
        "mean": (WeightedMean("val"), [(ids, sums.to(device), counts.to(device)) for ids, sums, counts in losses]),
        "segmentation": (
            SegmentationMetrics(("a", "b", "c")),
            [([2 * n, 2 * n + 1], list(maps[2 * n].to(device)), list(maps[2 * n + 1].to(device))) for n in range(3)],
        ),
        "detection": (
            CocoDetectionMetrics(TRUTH),
            [([n + 1], [moved(one) for one in detections]) for n, detections in enumerate(found)],
        ),
    }


def test_tensors_on_the_cpu_are_used_at_once():
    used, copies = [], DelayedCopies()
    copies.add([torch.ones(2), torch.zeros(1)], used.append)
    assert [one.tolist() for one in used[0]] == [[1, 1], [0]]
    copies.finish()
    assert len(used) == 1


class Moment:
    """A CUDA event that says when it is waited for."""

    waited = 0

    def record(self, stream):
        pass

    def synchronize(self):
        type(self).waited += 1


@pytest.mark.parametrize("name", ["mean", "segmentation", "detection"])
def test_an_update_waits_for_no_batch_but_earlier_ones(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "Event", Moment)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(Moment, "waited", 0)
    received = []
    add = DelayedCopies.add
    monkeypatch.setattr(DelayedCopies, "add", lambda self, tensors, use: add(self, tensors, received.append))
    with fake_cuda():
        metric, updates = batches("cuda")[name]
        for number, update in enumerate(updates):
            metric.update(*update)
            assert Moment.waited == len(received) == number, "the batch before"


@needs_gpu
@pytest.mark.parametrize("name", ["mean", "segmentation", "detection"])
def test_scores_are_those_of_the_cpu(name):
    (metric, updates), (expected, on_cpu) = batches("cuda")[name], batches("cpu")[name]
    for update, other in zip(updates, on_cpu, strict=True):
        metric.update(*update)
        expected.update(*other)
    assert metric.compute() == expected.compute()


@needs_gpu
def test_labels_that_are_no_class_are_refused_one_batch_later():
    metric = SegmentationMetrics(("a", "b"))
    good, bad = (torch.full((4, 5), value, dtype=torch.uint8, device="cuda") for value in (1, 2))
    metric.update([0], [bad], [good])
    with pytest.raises(ValueError, match="image 0: predicted has the label 2"):
        metric.update([1], [good], [good])

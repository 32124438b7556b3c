"""The metrics in torchmetrics' collections and trackers, and in a LightningModule that is not ours."""

import copy
import math
import os
import pickle
from typing import Any

import pytest
import pytorch_lightning as pl
import sacrebleu
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from test_detection import by_pycocotools, detections, ground_truth
from test_segmentation import IGNORED, NAMES, by_sets, maps
from test_translation import corpus
from test_weighted_mean import loss_terms
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import MetricTracker

from lightning_attn.errors import InputError
from lightning_attn.metrics import CocoDetectionMetrics, CorpusTranslationMetrics, SegmentationMetrics, WeightedMean
from lightning_attn.metrics.detection import COCO_NUMBERS, coco_records, image_detections

SIZE = 23
IDS = list(range(100, 100 + SIZE))
TRUTH = ground_truth(SIZE)
FOUND = detections(TRUTH)
PREDICTED, LABELS = ({50 + image: one for image, one in part.items()} for part in maps(SIZE))
HYPOTHESES, REFERENCES = (dict(zip(IDS, texts, strict=True)) for texts in corpus(SIZE))
SUMS, COUNTS = loss_terms(SIZE)


def arguments(ids: list[int]) -> dict[str, Any]:
    """What all metrics are given of a batch, by name: a collection hands on to each what it takes."""
    places = [sample - IDS[0] for sample in ids]
    return {
        "ids": ids,
        "detections": [FOUND[sample] for sample in ids],
        "predicted": [PREDICTED[sample] for sample in ids],
        "labels": [LABELS[sample] for sample in ids],
        "hypotheses": [HYPOTHESES[sample] for sample in ids],
        "references": [REFERENCES[sample] for sample in ids],
        "sums": SUMS[places],
        "counts": COUNTS[places],
    }


def new_metrics() -> dict[str, Metric]:
    return {
        "coco": CocoDetectionMetrics(TRUTH),
        "segmentation": SegmentationMetrics(NAMES),
        "translation": CorpusTranslationMetrics("val"),
        "mean": WeightedMean("val"),
    }


def by_others(ids: list[int]) -> dict[str, float]:
    """The scores of some samples by pycocotools, sacreBLEU and the definitions."""
    records = coco_records({sample: image_detections(sample, FOUND[sample]) for sample in ids})
    numbers, _ = by_pycocotools(TRUTH, records, sorted(ids))
    predicted, labels = ({sample: part[sample] for sample in ids} for part in (PREDICTED, LABELS))
    ious = [by_sets(predicted, labels, label) for label in range(len(NAMES))]
    hits = [(predicted[one] == labels[one])[labels[one] != IGNORED] for one in ids]
    texts = [HYPOTHESES[sample] for sample in sorted(ids)], [[REFERENCES[sample] for sample in sorted(ids)]]
    return {
        **{name: value if value > -1 else math.nan for name, value in zip(COCO_NUMBERS, numbers, strict=True)},
        "miou": sum(iou for iou in ious if not math.isnan(iou)) / sum(not math.isnan(iou) for iou in ious),
        "pixel_accuracy": torch.cat(hits).double().mean().item(),
        "bleu": sacrebleu.corpus_bleu(*texts).score,
        "chrf": sacrebleu.corpus_chrf(*texts).score,
        "mean": mean_of(ids),
    }


def mean_of(ids: list[int]) -> float:
    places = [sample - IDS[0] for sample in ids]
    return math.fsum(SUMS[places].tolist()) / int(COUNTS[places].sum())


def plain(results: dict[str, torch.Tensor]) -> dict[str, float]:
    assert {value.dtype for value in results.values()} == {torch.float64}
    return {name: value.item() for name, value in results.items()}


class SomebodysModule(pl.LightningModule):
    """Logs each metric in each way that Lightning has."""

    def __init__(self, validation: list[list[int]], training: list[list[int]]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches = {"val": validation, "train": training}
        metrics = new_metrics()
        self.computed_here = MetricCollection(new_metrics(), prefix="here/")
        self.coco, self.mean, self.train_mean = metrics["coco"], metrics["mean"], WeightedMean("train")
        self.by_lightning = MetricCollection(
            {name: self.coco[name] for name in COCO_NUMBERS},
            prefix="lightning/",
            postfix="_val",
            compute_groups=[[*COCO_NUMBERS]],  # all are one metric, which is to be updated once
        )
        self.mixed = MetricCollection(
            {
                **{name: metrics["segmentation"][name] for name in ("miou", "pixel_accuracy")},
                **{name: metrics["translation"][name] for name in ("bleu", "chrf")},
            }
        )

    def training_step(self, ids: list[int], batch_idx: int) -> torch.Tensor:
        given = arguments(ids)
        self.train_mean(given["ids"], given["sums"], given["counts"])
        self.log("train_mean", self.train_mean, on_step=True, on_epoch=True)
        return self.weight**2

    def validation_step(self, ids: list[int], batch_idx: int) -> None:
        given = arguments(ids)
        self.computed_here.update(**given)
        self.by_lightning.update(**given)
        self.log_dict(self.by_lightning)
        self.mixed.update(**given)
        self.log_dict(self.mixed)
        self.mean(given["ids"], given["sums"], given["counts"])
        self.log("mean", self.mean)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.computed_here.compute())
        self.computed_here.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches["train"], batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.batches["val"], batch_size=None)


class Recorder(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.logged: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append({name: value for name, value in metrics.items() if name != "epoch"})


def fit(validation: list[list[int]], training: list[list[int]], devices: int = 1) -> list[dict[str, float]]:
    """What is logged in two epochs, in order; what Lightning and the module log of one pass is one dictionary."""
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=2,
        logger=recorder,
        log_every_n_steps=1,
        num_sanity_val_steps=1,  # a part of the data: nothing of it may remain
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(SomebodysModule(validation, training))
    return recorder.logged


def in_batches(ids: list[int], size: int = 5) -> list[list[int]]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]


TRAINING = [IDS[:6], IDS[6:7], IDS[7:]]
# What two ranks see: unequally dealt with repeats; then one of them nothing.
DEALT = [(in_batches([*IDS[::2], 101]), in_batches([*IDS[1::2], 100, 104], 3)), (in_batches(IDS), [[]])]


def expected_epoch() -> dict[str, float]:
    numbers = by_others(IDS)
    mean = numbers.pop("mean")
    coco = {f"lightning/{name}_val": numbers[name] for name in COCO_NUMBERS}
    mixed = {name: numbers[name] for name in ("miou", "pixel_accuracy", "bleu", "chrf")}
    return {
        **{f"here/{name}": value for name, value in numbers.items()},
        "here/mean": mean,
        **coco,
        **mixed,
        "mean": mean,
    }


def by_kind(logged: list[dict[str, float]]) -> tuple[list[dict[str, float]], list[float], list[float]]:
    """What was logged of validation, of training steps, and of training epochs."""
    validation = [one for one in logged if "mean" in one]
    steps = [one["train_mean_step"] for one in logged if "train_mean_step" in one]
    epochs = [one["train_mean_epoch"] for one in logged if "train_mean_epoch" in one]
    return validation, steps, epochs


def test_lightning_logs_what_others_compute_in_every_epoch():
    validation, steps, epochs = by_kind(fit(in_batches(IDS), TRAINING))
    assert len(validation) == 2
    for one in validation:
        assert one == pytest.approx(expected_epoch(), abs=1e-9)
    assert steps == [mean_of(ids) for ids in TRAINING] * 2, "on a step, the value of the batch"
    assert epochs == [mean_of(IDS)] * 2


def _fit_on_rank(rank: int) -> list[Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "here"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # not used: the processes are connected already
    training = [[*TRAINING[0][rank::2], 100], [106], TRAINING[2][rank::2]]
    return [by_kind(fit(dealt[rank], training, devices=2)) for dealt in DEALT]


TURNED = (*DEALT, DEALT[1][::-1])


def _collect_on_rank(rank: int) -> list[Any]:
    collection = MetricCollection(new_metrics(), prefix="val/")
    results: list[Any] = []
    for dealt in TURNED:
        first, *others = dealt[rank]
        batch = plain(collection(**arguments(first)))
        for ids in others:
            collection.update(**arguments(ids))
        results += [[plain(collection.compute()), batch["val/mean"]], collection["coco"].records()]
        collection.reset()
    mean = WeightedMean("val")
    for ids in ([100], [[101], []][rank], [102]):  # a further result asks all ranks, also one that was not updated
        if ids:
            mean.update(*(arguments(ids)[name] for name in ("ids", "sums", "counts")))
        results.append(mean.compute().item())
    try:
        collection.compute()
    except InputError as error:
        results.append(str(error))
    return results


def _on_rank(rank: int) -> list[Any]:
    return [_collect_on_rank(rank), _fit_on_rank(rank)]


@pytest.mark.ddp
@pytest.mark.timeout(900)
def test_two_ranks_give_what_one_gives(on_two_ranks):
    """Of a collection by hand, and by Lightning."""
    collection = MetricCollection(new_metrics(), prefix="val/")
    collection.update(**arguments(IDS))
    expected, records = plain(collection.compute()), collection["coco"].records()
    (first, logged), (second, _) = on_two_ranks(_on_rank)
    for rank, (*results, one, two, three, error) in enumerate((first, second)):
        for (scores, batch), found, dealt in zip(results[::2], results[1::2], TURNED, strict=True):
            assert (scores, found) == (expected, records)
            ids = dealt[rank][0]
            assert batch == mean_of(ids) if ids else math.isnan(batch), "forward is of this rank alone"
        assert [one, two, three] == [mean_of([*range(100, last)]) for last in (101, 102, 103)]
        assert "to score" in error

    validation, _, epochs = by_kind(fit(in_batches(IDS), TRAINING))
    assert [(one[0], one[2]) for one in logged] == [(validation, epochs)] * 2, "only rank 0 has a logger"


def test_forward_gives_the_scores_of_the_batch_and_adds_it():
    collection = MetricCollection(new_metrics())
    for ids in (IDS[3:9], [*IDS[5:], 110], IDS[:3]):
        assert plain(collection(**arguments(ids))) == pytest.approx(by_others([*{*ids}]), abs=1e-9, nan_ok=True)
    assert plain(collection.compute()) == pytest.approx(by_others(IDS), abs=1e-9)
    nothing = plain(collection(**arguments([])))
    assert list(nothing) == list(collection.compute())
    assert all(math.isnan(value) for value in nothing.values())
    assert plain(collection.compute()) == pytest.approx(by_others(IDS), abs=1e-9)


def test_a_batch_that_forward_refuses_changes_nothing():
    for metric in new_metrics().values():
        given = metric._filter_kwargs(**arguments(IDS[:4]))
        metric.update(**given)
        before = metric.compute()
        with pytest.raises(ValueError, match=r"different samples|not in the ground truth|entry for each"):
            metric(**{**given, **_wrong(given)})
        assert metric.compute() == before


def _wrong(given: dict[str, Any]) -> dict[str, Any]:
    """The last sample of a batch made impossible."""
    ids = given["ids"]
    if "detections" in given:
        return {"ids": [*ids[:-1], 7]}
    if "labels" in given:
        return {"ids": [*ids[:-1], ids[0]]}
    return {"references": [*given["references"][:-1], "another"]} if "references" in given else {"sums": SUMS[:3]}


def test_metrics_of_equal_content_stay_two_in_a_collection():
    """`compute_groups` would take one for the other where states are equal after the first batch."""
    collection = MetricCollection(
        {"one": CorpusTranslationMetrics("val"), "two": CorpusTranslationMetrics("val"), "mean": WeightedMean("val")}
    )
    for ids in (IDS[:5], IDS[5:]):
        collection.update(**arguments(ids))
    assert sorted(map(len, collection.compute_groups.values())) == [1, 1, 1]
    collection["two"].update([7], ["another"], ["sentence"])
    scores = collection.compute()
    assert scores["one_bleu"].item() == by_others(IDS)["bleu"] != scores["two_bleu"].item()


def copies(metric: Any) -> dict[str, Any]:
    return {
        "pickle": pickle.loads(pickle.dumps(metric)),  # noqa: S301 - of our own
        "deepcopy": copy.deepcopy(metric),
        "clone": metric.clone(),
    }


@pytest.mark.parametrize("name", list(new_metrics()))
def test_copies_have_the_samples_and_go_their_own_way(name):
    metric = new_metrics()[name]
    metric.update(**metric._filter_kwargs(**arguments(IDS[:9])))
    before = metric.compute()
    for kind, other in copies(metric).items():
        assert other.compute() == before, kind
        other.update(**metric._filter_kwargs(**arguments(IDS[9:])))
        assert other.compute() != before, kind
        other.reset()
        with pytest.raises(InputError, match="to score"):
            other.compute()
        assert metric.compute() == before, kind
    moved = metric.clone().to("meta").compute()
    assert {one.device.type for one in (moved.values() if isinstance(moved, dict) else [moved])} == {"meta"}
    assert metric.state_dict() == {}
    metric.load_state_dict(metric.state_dict())
    metric.to("cpu").double().set_dtype(torch.float16)
    assert metric.compute() == before
    assert metric.is_differentiable is False
    assert metric.higher_is_better is (None if name == "mean" else True)
    with pytest.raises(RuntimeError, match="merge_state"):
        metric.merge_state(metric.clone())


def test_a_score_is_a_metric_of_its_own():
    coco = CocoDetectionMetrics(TRUTH)
    coco.update(IDS, [FOUND[sample] for sample in IDS])
    small = coco["ap_small"]
    assert small.compute().item() == coco.scores()["ap_small"]
    for kind, other in {"itself": small, **copies(small)}.items():
        assert other.compute() == small.compute(), kind
        assert other.higher_is_better is True
        assert repr(other) == "CocoDetectionMetrics()['ap_small']"
    batch = small(IDS[:5], [FOUND[sample] for sample in IDS[:5]]).item()
    assert batch == pytest.approx(by_others(IDS[:5])["ap_small"], abs=1e-9)
    small.reset()
    with pytest.raises(InputError, match="no image"):
        coco.compute()
    with pytest.raises(KeyError, match="CocoDetectionMetrics has no score 'map'; use one of ap, ap50, ap75"):
        coco["map"]


def test_copies_share_the_ground_truth():
    coco = CocoDetectionMetrics(TRUTH)
    tracked = MetricTracker(MetricCollection({"ap": coco["ap"], "ar": coco["ar100"]}))
    for ids in (IDS[:5], IDS[5:]):
        tracked.increment()
        tracked.update(ids=ids, detections=[FOUND[sample] for sample in ids])
    assert {id(one._ground_truth) for one in tracked.modules() if isinstance(one, CocoDetectionMetrics)} == {id(TRUTH)}
    expected = [by_others(ids) for ids in (IDS[:5], IDS[5:])]
    best = tracked.best_metric()
    assert best["ap"] == pytest.approx(max(one["ap"] for one in expected), abs=1e-9)
    assert best["ar"] == pytest.approx(max(one["ar100"] for one in expected), abs=1e-9)
    tracker = MetricTracker(coco)
    tracker.increment()
    tracker.update(IDS, [FOUND[sample] for sample in IDS])
    assert tracker.compute_all()["ap50"].tolist() == pytest.approx([by_others(IDS)["ap50"]], abs=1e-9)

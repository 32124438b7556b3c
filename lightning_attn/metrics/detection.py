"""COCO's detection metrics, bitwise identical on any number of ranks."""

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypedDict, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor
from typing_extensions import override

from lightning_attn.errors import InputError
from lightning_attn.metrics.base import ScoresMetric, nothing_to_score, sample_ids
from lightning_attn.metrics.bootstrap import Counts, Replicates
from lightning_attn.metrics.detection_resampling import resampled_average_precision
from lightning_attn.metrics.gather import several_ranks

# COCO's twelve metrics in the order of its evaluator's `stats`.
COCO_NUMBERS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)


class CocoRecord(TypedDict):
    """A detection in the format of COCO's results files; `bbox` is x, y, width, height in original pixels."""

    image_id: int
    category_id: int
    bbox: list[float]
    score: float


class DetectionScores(TypedDict):
    """COCO's twelve metrics from 0 to 1, the AP of each category, and the number of images.

    `ap` is the mean over the IoU thresholds 0.50 to 0.95, `ap50` and `ap75` are at one of them; `ar1`, `ar10` and
    `ar100` allow as many detections per image; objects below 32² pixels are small, above 96² large. A metric is NaN
    if there is no object for it, such as a large one (COCO's evaluators return -1); categories without objects are not
    in `ap_per_category` and in no mean. `num_images` of `num_images_in_split` images were scored.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    ap_per_category: dict[str, float]
    num_images: int
    num_images_in_split: int


class ImageDetections(NamedTuple):
    """The detections of one image, from the highest score to the lowest.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels of the original image, `[n, 4]`.
        category_ids: ids of the data set's categories, `[n]`.
        scores: `[n]`.
    """

    boxes: npt.NDArray[np.float64]
    category_ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]


def image_detections(image_id: int, detections: Mapping[str, Tensor]) -> ImageDetections:
    """The detections of one image, sorted by score, on the CPU. Waits for the device.

    Args:
        image_id: For messages.
        detections: `"boxes"` `[n, 4]` as x1, y1, x2, y2 in pixels of the original image; `"labels"` `[n]`, which are
            ids of the data set's *categories*, not the network's outputs; `"scores"` `[n]`. n may be 0.

    Raises:
        ValueError: If shapes do not fit, a number is not finite, or a box ends before it begins.
    """
    boxes, labels, scores = (detections[key].detach().cpu() for key in ("boxes", "labels", "scores"))
    number = len(scores)
    if boxes.shape != (number, 4) or labels.shape != (number,) or scores.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"detections of image {image_id}: boxes must be [n, 4], labels n integers and scores [n]; got shapes "
            f"{list(boxes.shape)}, {list(labels.shape)} and {list(scores.shape)} and labels of {labels.dtype}."
        )
    bad = ~(boxes.isfinite().all(dim=1) & scores.isfinite() & (boxes[:, 2:] >= boxes[:, :2]).all(dim=1))
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"detections of image {image_id}: box {boxes[first].tolist()} with the score {scores[first].item()} cannot "
            "be scored: numbers must be finite and boxes x1, y1, x2, y2 with x1 <= x2 and y1 <= y2. NaN means that the "
            "training has diverged: lower the learning rate."
        )
    order = scores.argsort(descending=True, stable=True)
    return ImageDetections(
        boxes[order].to(torch.float64).numpy(), labels[order].numpy(), scores[order].to(torch.float64).numpy()
    )


def coco_records(detections: Mapping[int, ImageDetections]) -> list[CocoRecord]:
    """Converts detections by image id to the list of COCO's results files.

    Nothing is rounded: coordinates and scores are Python floats of the same value, width and height are differences in
    double precision. So the scores of a file that is read back from JSON are bitwise identical.

    Returns:
        Sorted by image id, then from the highest score to the lowest.
    """
    records: list[CocoRecord] = []
    for image_id, (boxes, category_ids, scores) in sorted(detections.items()):
        bounds = np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1).tolist()
        for bbox, category_id, score in zip(bounds, category_ids.tolist(), scores.tolist(), strict=True):
            records.append(CocoRecord(image_id=image_id, category_id=category_id, bbox=bbox, score=score))
    return records


class CocoDetectionMetrics(ScoresMetric[ImageDetections, DetectionScores]):
    """COCO's average precision and recall of boxes, by faster-coco-eval.

    It is not a mean over batches or ranks. So this stores detections by image id, gathers those of all ranks, drops
    repeats, and scores once, on rank 0 (100 detections in each of 5,000 images: about 1 GB and 10 s). If only a part of
    the split was evaluated, as under `limit_val_batches`, only that part is scored. `compute` returns COCO's twelve
    metrics, `scores()` also the rest of `DetectionScores`, and `gathered()` the detections that were scored.

    Args:
        ground_truth: `images`, `annotations` (`image_id`, `category_id`, `bbox`, `area`, `iscrowd`) and `categories` as
            in COCO's annotation files. It is not modified.
        split: name of the split, for messages.

    Raises:
        ValueError: If two categories have the same name, which makes `ap_per_category` ambiguous.
    """

    higher_is_better = True
    score_names: ClassVar[tuple[str, ...]] = COCO_NUMBERS

    def __init__(self, ground_truth: Mapping[str, Any], split: str = "val") -> None:
        super().__init__(nothing_to_score("image", split))
        self.split = split
        self._ground_truth = ground_truth
        self._image_ids = {image["id"] for image in ground_truth["images"]}
        self._names: dict[int, str] = {category["id"]: category["name"] for category in ground_truth["categories"]}
        twice = [name for name, count in Counter(self._names.values()).items() if count > 1]
        if twice:
            raise InputError(
                f"categories of the split {split!r}: more than one has the name {twice[0]!r}; rename one of them in "
                "the annotation file."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self._ground_truth)] = self._ground_truth  # shared: it may be large, and is never modified
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    @override
    def update(self, ids: Sequence[int] | Tensor, detections: Sequence[Mapping[str, Tensor]]) -> None:
        """Add images. An id that was added before is ignored.

        Args:
            ids: image ids, B integers.
            detections: of each image, as for `image_detections`, which may be empty.

        Raises:
            ValueError: If an image or a category is not in the ground truth, the two differ in length, or a detection
                cannot be scored.
        """
        if len(ids) != len(detections):
            raise ValueError(f"ids and detections must be of equal length, got {len(ids)} and {len(detections)}.")
        image_ids = sample_ids(ids)
        for image_id in image_ids:
            if image_id not in self._image_ids:
                raise ValueError(
                    f"image id {image_id} is not in the ground truth of the split {self.split!r}, which has "
                    f"{len(self._image_ids)} images: pass the ids of its annotation file."
                )
        keys = ("boxes", "labels", "scores")

        def add(copies: list[Tensor]) -> None:
            for number, image_id in enumerate(image_ids):
                self._add_image(image_id, dict(zip(keys, copies[3 * number : 3 * number + 3], strict=True)))

        if image_ids:
            self._add_later([found[key] for found in detections for key in keys], add)

    def _add_image(self, image_id: int, found: Mapping[str, Tensor]) -> None:
        record = image_detections(image_id, found)
        unknown = set(record.category_ids.tolist()) - self._names.keys()
        if unknown:
            raise ValueError(
                f"detections of image {image_id}: {min(unknown)} is not a category id of the split {self.split!r} "
                f"({_shortened(self._names)}). Convert the network's labels to category ids first."
            )
        self._add(image_id, record)

    def records(self) -> list[CocoRecord]:
        """The scored detections of all ranks in the format of a results file. Not a collective: one rank may call it.

        Raises:
            RuntimeError: If `compute` was not called since the last `update` or `reset`.
        """
        return coco_records(self.gathered())

    @override
    def _score(self, records: Mapping[int, ImageDetections]) -> DetectionScores | None:
        if not records:
            return None
        scores = _evaluate(self._ground_truth, records, self._names)
        return cast(DetectionScores, scores | {"num_images_in_split": len(self._image_ids)})

    @override
    def _score_resampled(self, records: Mapping[int, ImageDetections], counts: Counts) -> Mapping[str, Replicates]:
        """`ap`, `ap50` and `ap75`."""
        return resampled_average_precision(self._ground_truth["annotations"], records, counts)

    @override
    def _score_gathered(self, records: Mapping[int, ImageDetections]) -> DetectionScores | None:
        """Scores on rank 0 only, since it needs much memory."""
        if not several_ranks():
            return self._score(records)
        outcome = [self._score(records) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(outcome, src=0)
        return outcome[0]


def _evaluate(
    ground_truth: Mapping[str, Any], detections: Mapping[int, ImageDetections], names: Mapping[int, str]
) -> dict[str, Any]:
    """COCO's evaluation of the images in `detections`."""
    # The evaluator stores ids as doubles, which are exact up to 2^53 only, and reserves 0 for "no match". So ids are
    # replaced by numbers from 1, in the order of the ids, which breaks ties between equal scores.
    image_numbers = {image_id: number for number, image_id in enumerate(sorted(detections), start=1)}
    category_numbers = {category_id: number for number, category_id in enumerate(sorted(names), start=1)}
    objects = (one for one in ground_truth["annotations"] if one["image_id"] in detections)
    truth = COCO(
        {
            "images": [{"id": number} for number in image_numbers.values()],
            "categories": [{"id": number, "name": names[one]} for one, number in category_numbers.items()],
            # Copies, because the evaluator modifies them.
            "annotations": [
                {key: one[key] for key in ("bbox", "area", "iscrowd")}
                | {
                    "id": number,
                    "image_id": image_numbers[one["image_id"]],
                    "category_id": category_numbers[one["category_id"]],
                }
                for number, one in enumerate(objects, start=1)
            ],
        }
    )
    # An empty segmentation prevents the evaluator from creating one for each record.
    results = [
        {
            **record,
            "image_id": image_numbers[record["image_id"]],
            "category_id": category_numbers[record["category_id"]],
            "segmentation": [],
        }
        for record in coco_records(detections)
    ]
    # By default it prints by the root logger.
    evaluation = COCOeval_faster(truth, truth.loadRes(results), "bbox", print_function=lambda *_: None)
    evaluation.run()
    # [IoU thresholds, recalls, categories, areas, numbers of detections]; -1 where there is no object.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    per_category = {}
    by_number = {number: names[category_id] for category_id, number in category_numbers.items()}
    for index_of_category, category_id in enumerate(evaluation.params.catIds):
        values = precision[:, :, index_of_category]
        if (values > -1).any():
            per_category[by_number[int(category_id)]] = float(values[values > -1].mean())
    numbers = {
        name: float(value) if value > -1 else math.nan
        for name, value in zip(COCO_NUMBERS, evaluation.stats, strict=True)
    }
    return numbers | {"ap_per_category": per_category, "num_images": len(detections)}


def _shortened(ids: Iterable[int]) -> str:
    listed = sorted(ids)
    return ", ".join(map(str, listed[:10])) + (f" and {len(listed) - 10} more" if len(listed) > 10 else "")

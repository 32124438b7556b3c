"""Cityscapes' segmentation metrics, bitwise identical on any number of ranks."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from lightning_attn.errors import InputError
from lightning_attn.metrics.base import ScoresMetric, sample_ids
from lightning_attn.metrics.bootstrap import Counts, Replicates

Confusion = npt.NDArray[np.int64]


class SegmentationScores(TypedDict):
    """Scores from 0 to 1 of all images, and their confusion matrix.

    `iou_per_class` has every class, `miou` is the mean of those that are not NaN; see `SegmentationMetrics`.
    `pixel_accuracy` is the fraction of labelled pixels whose class is right. Without labelled pixels, scores are NaN.
    `confusion` is `[K, K]`: rows are the true classes, columns the predicted ones.
    """

    miou: float
    pixel_accuracy: float
    iou_per_class: dict[str, float]
    confusion: Confusion
    num_images: int


class SegmentationMetrics(ScoresMetric[Confusion, SegmentationScores]):
    """Mean intersection over union from one confusion matrix of the whole split, as cityscapesScripts computes it.

    Pixels whose ground truth is ignored are excluded, whatever was predicted. For every class, all other pixels of all
    images are counted once: the IoU is TP / (TP + FP + FN). It is NaN, and excluded from the mean, only where that
    denominator is 0: the class does not occur in the split *and* was never predicted on a labelled pixel. A class that
    is absent but was predicted has an IoU of 0, which is included in the mean. To exclude such a class, remove it from
    the network's classes: pixels of such a class are ignored here, while cityscapesScripts, which always scores all 19,
    counts them as wrong.

    It is not a mean over images or ranks. So this stores one small matrix per image by sample id (2.9 kB for 19
    classes), gathers those of all ranks, drops repeats, and sums them. `compute` returns `miou` and `pixel_accuracy`,
    `scores()` also the rest of `SegmentationScores`.

    Args:
        classes: names of the classes, in the order of the labels 0 to K - 1.
        ignored: the label of ignored pixels.

    Raises:
        ValueError: if there is no class, two have the same name, or `ignored` is the label of a class or not a uint8.
    """

    higher_is_better = True
    score_names: ClassVar[tuple[str, ...]] = ("miou", "pixel_accuracy")

    def __init__(self, classes: Sequence[str], ignored: int = 255) -> None:
        super().__init__(
            "there is no segmented image to score: the split is empty, or trainer.limit_val_batches (in a test, "
            "trainer.limit_test_batches) is 0."
        )
        self.classes, self.ignored = tuple(classes), ignored
        twice = [name for name, count in Counter(self.classes).items() if count > 1]
        if twice or not self.classes:
            raise InputError(f"classes must be one or more different names, got {list(self.classes)}.")
        if not len(self.classes) <= ignored <= 255:
            raise InputError(
                f"ignored must be a label that none of the {len(self.classes)} classes has, from {len(self.classes)} "
                f"to 255; got {ignored}."
            )

    @override
    def update(self, ids: Sequence[int] | Tensor, predicted: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
        """Add images. An id that was added before is ignored.

        Pixels are counted on their device, and only the counts are copied to the CPU.

        Args:
            ids: index of each image in the split, B integers.
            predicted: B maps of labels 0 to K - 1, uint8 `[H, W]`, on any device.
            labels: the ground truth of each, uint8 of the same shape; may contain `ignored`.

        Raises:
            ValueError: if the three differ in length, a map does not fit its ground truth, a label is invalid, or an id
                was added with another ground truth.
        """
        if not len(ids) == len(predicted) == len(labels):
            raise ValueError(
                f"ids, predicted and labels must be of equal length, got {len(ids)}, {len(predicted)} and "
                f"{len(labels)}."
            )
        samples = sample_ids(ids)
        counted = [self._counts(*image) for image in zip(samples, predicted, labels, strict=True)]

        def add(copies: list[Tensor]) -> None:
            for sample, highest, counts in zip(samples, copies[::2], copies[1::2], strict=True):
                self._add(sample, self._confusion(sample, int(highest), counts.numpy()))

        if samples:
            self._add_later([tensor for pair in counted for tensor in pair], add)

    @staticmethod
    @override
    def _truth(record: Confusion) -> object:
        """Number of pixels of each class in the ground truth."""
        return record.sum(axis=1).tolist()

    @override
    def _score(self, records: Mapping[int, Confusion]) -> SegmentationScores | None:
        if not records:
            return None
        confusion = sum(records.values(), start=np.zeros((len(self.classes),) * 2, dtype=np.int64))
        right = confusion.diagonal().tolist()
        union = (confusion.sum(axis=0) + confusion.sum(axis=1) - confusion.diagonal()).tolist()
        ious = [_ratio(*counts) for counts in zip(right, union, strict=True)]
        defined = [iou for iou in ious if not math.isnan(iou)]
        return SegmentationScores(
            miou=_ratio(sum(defined), len(defined)),
            pixel_accuracy=_ratio(sum(right), int(confusion.sum())),
            iou_per_class=dict(zip(self.classes, ious, strict=True)),
            confusion=confusion,
            num_images=len(records),
        )

    @override
    def _score_resampled(self, records: Mapping[int, Confusion], counts: Counts) -> Mapping[str, Replicates]:
        """`miou` and `pixel_accuracy`."""
        confusions = np.stack(list(records.values()))
        # Pixels as doubles: exact up to 2^53, and their product is a fast one.
        right, union, labelled = (
            counts.astype(np.float64) @ values.astype(np.float64)
            for values in (
                confusions.diagonal(axis1=1, axis2=2),
                confusions.sum(axis=1) + confusions.sum(axis=2) - confusions.diagonal(axis1=1, axis2=2),
                confusions.sum(axis=(1, 2))[:, None],
            )
        )
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: no such class, or nothing labelled
            ious, defined = right / union, union > 0
            return {
                "miou": np.where(defined, ious, 0.0).sum(axis=1) / defined.sum(axis=1),
                "pixel_accuracy": right.sum(axis=1) / labelled[:, 0],
            }

    def _counts(self, sample: int, predicted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The highest predicted label, and the number of pixels by value of `labels` and predicted class, `[256, K]`.

        Both on the device of the prediction. The counts are right only if the highest label is a class.
        """
        number, device = len(self.classes), predicted.device
        if (
            predicted.shape != labels.shape
            or predicted.dim() != 2
            or not predicted.dtype == labels.dtype == torch.uint8
        ):
            raise ValueError(
                f"image {sample}: predicted and labels must both be uint8 [H, W] of one size; got {predicted.dtype} "
                f"{list(predicted.shape)} and {labels.dtype} {list(labels.shape)}. Resize the prediction to the size "
                "of the labels, not the labels."
            )
        highest = predicted.amax() if predicted.numel() else predicted.new_zeros(())
        predicted = predicted.clamp(max=number - 1)
        # One number per pixel, in the smallest possible dtype: 16 bits need a third of the time and a quarter of the
        # memory of 64. Selecting the labelled pixels first would take ten times as long as counting all.
        dtype = torch.int16 if 256 * number <= 2**15 else torch.int32
        pairs = labels.to(device, dtype).mul_(number).add_(predicted).flatten()
        if device.type == "cpu":
            counts = torch.bincount(pairs, minlength=256 * number)
        else:  # bincount would make the host wait for a GPU
            counts = torch.zeros(256 * number, dtype=torch.int64, device=device)
            counts.scatter_add_(0, pairs.long(), counts.new_ones(()).expand(pairs.shape))
        return highest, counts.view(256, number)

    def _confusion(self, sample: int, highest: int, counts: Confusion) -> Confusion:
        """The confusion matrix of an image, by true (row) and predicted class (column), without ignored pixels."""
        number = len(self.classes)
        if highest >= number:
            raise ValueError(
                f"image {sample}: predicted has the label {highest}, but the {number} classes are 0 to {number - 1}, "
                "and every pixel needs one of them. Pass the network's labels, not the data set's ids."
            )
        unknown = [label for label in np.flatnonzero(counts.any(axis=1)).tolist() if label >= number]
        if unknown not in ([], [self.ignored]):
            label = next(label for label in unknown if label != self.ignored)
            raise ValueError(
                f"image {sample}: labels has the label {label}, which is none of the {number} classes (0 to "
                f"{number - 1}) and not the ignored one ({self.ignored}). Convert the data set's ids to labels first."
            )
        return counts[:number].copy()


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else math.nan

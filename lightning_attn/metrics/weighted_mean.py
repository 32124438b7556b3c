"""The exact mean of a quantity over a split."""

import math
from collections.abc import Mapping, Sequence
from operator import index

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_attn.metrics.base import GatheredMetric, nothing_to_score
from lightning_attn.metrics.bootstrap import Counts, Replicates

Term = tuple[float, int]
"""A sample's sum and count."""


class WeightedMean(GatheredMetric[Term, float, Tensor]):
    """The exact mean of a quantity over a split, such as the loss per target token; `compute` returns a scalar.

    It is the exact sum of the samples' sums divided by the sum of their counts. So it does not depend on batches, the
    distribution of samples over ranks, or repeats, if the samples' sums do not.

    Args:
        split: name of the split, for messages.
    """

    higher_is_better = None  # that depends on the quantity

    def __init__(self, split: str) -> None:
        super().__init__(nothing_to_score("element", split))
        self.split = split

    @override
    def update(self, ids: Sequence[int] | Tensor, sums: Tensor, counts: Tensor) -> None:
        """Add samples. An id that was added before is ignored.

        Args:
            ids: index of each sample in the split, B integers.
            sums: each sample's quantity summed over its elements, `[B]`, floating point.
            counts: number of elements of each sample, `[B]`, integer.

        Raises:
            ValueError: if shapes or types do not fit, or an id was added with another count.
        """
        if not sums.shape == counts.shape == (len(ids),) or counts.is_floating_point():
            raise ValueError(
                f"sums and counts must have one entry for each of the {len(ids)} ids, and counts must be integers; got "
                f"shapes {list(sums.shape)} and {list(counts.shape)} and counts of {counts.dtype}."
            )
        given = ids if isinstance(ids, Tensor) else torch.tensor(list(map(index, ids)), dtype=torch.long)

        def add(copies: list[Tensor]) -> None:
            samples, totals, numbers = (copy.tolist() for copy in copies)
            for sample, total, count in zip(samples, totals, numbers, strict=True):
                self._add(index(sample), (total, count))

        if len(given):
            self._add_later([given, sums, counts], add)

    @staticmethod
    @override
    def _truth(record: Term) -> object:
        return record[1]

    @override
    def _score(self, records: Mapping[int, Term]) -> float | None:
        count = sum(count for _, count in records.values())
        return math.fsum(total for total, _ in records.values()) / count if count else None

    @override
    def _score_resampled(self, records: Mapping[int, Term], counts: Counts) -> Mapping[str, Replicates]:
        """`mean`; NaN for a set without elements."""
        sums, numbers = (counts @ np.array(values, dtype=np.float64) for values in zip(*records.values(), strict=True))
        with np.errstate(invalid="ignore"):
            return {"mean": sums / numbers}

    @override
    def _result(self, scores: float | None) -> Tensor:
        return self._tensor(math.nan if scores is None else scores)

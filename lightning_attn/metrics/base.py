"""The base of the metrics: a `torchmetrics.Metric` that gathers a record of each sample by id and scores it once."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from operator import index, itemgetter
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.metric import CompositionalMetric
from typing_extensions import override

from lightning_attn.errors import InputError
from lightning_attn.metrics.bootstrap import Counts, Replicates, ResampledScores, resampled_counts, samples_digest
from lightning_attn.metrics.copies import DelayedCopies
from lightning_attn.metrics.gather import add_record, gather_by_id, true_on_any_rank

__all__ = ["GatheredMetric", "Score", "ScoresMetric", "nothing_to_score", "sample_ids"]

RecordT = TypeVar("RecordT")
ScoresT = TypeVar("ScoresT")
ResultT = TypeVar("ResultT")
T = TypeVar("T")


class GatheredMetric(Metric, Generic[RecordT, ScoresT, ResultT]):
    """A metric of a whole split that does not depend on batches, repeated samples or the number of ranks.

    `update` turns samples into records; `compute` gathers the records of all ranks by sample id, drops repeats, and
    computes the scores.

    Records are an ordinary attribute rather than states of torchmetrics: states are tensors, and torchmetrics
    concatenates those of all ranks without sample ids. Consequences:

    - `compute` gathers by itself, and is always a collective. So torchmetrics neither synchronizes
      (`sync_on_compute`) nor caches: a rank that returns a cached result would leave the others waiting. Without
      updates since the last call, it only checks that no rank has any.
    - `forward` adds the samples, and returns the scores of these alone, of this rank: no collective.
    - `MetricCollection` never merges two of these metrics (`compute_groups`).
    - `state_dict` is empty, and `to` moves results only: records stay on the CPU. Pickling, `deepcopy` and `clone`
      include them; `merge_state` raises an error.
    - Samples on a GPU become records in the next `update` or `compute`, so that no batch waits for its results
      (`DelayedCopies`); an error about them is raised there.

    Args:
        nothing_to_score: The error message of `compute` if no rank has anything to score.
    """

    is_differentiable = False
    full_state_update = True  # `update` depends on the ids that were added before

    def __init__(self, nothing_to_score: str) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self._nothing_to_score = nothing_to_score
        self._records: dict[int, RecordT] = {}
        self._gathered: dict[int, RecordT] | None = None
        self._scores: ScoresT | None = None
        self._copies = DelayedCopies()

    @override
    def compute(self) -> ResultT:
        """Scores all samples. A collective: every rank must call it, and every rank gets the same result.

        Raises:
            InputError: On every rank, if no rank has anything to score.
            ValueError: On every rank, if ranks have different ground truths for an id.
        """
        self._copies.finish()
        if true_on_any_rank(self._scores is None):
            gathered = gather_by_id(self._records, self._truth)
            self._scores = self._score_gathered(gathered)
            self._gathered = None if self._scores is None else gathered
        if self._scores is None:
            raise InputError(self._nothing_to_score)
        return self._result(self._scores)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> ResultT:
        """Adds samples as `update` does; returns the scores of these alone, of this rank, NaN if there are none."""
        self._copies.finish()
        records, self._records = self._records, {}
        try:
            self.update(*args, **kwargs)
            self._copies.finish()
            batch = self._records
        finally:
            self._records = records
        for sample, record in batch.items():
            self._add(sample, record)
        result = self._result(self._score(batch))
        self._forward_cache: Any = result  # Lightning reads it when it logs the metric on a step
        return result

    @override
    def reset(self) -> None:
        super().reset()
        self._records, self._gathered, self._scores = {}, None, None
        self._copies = DelayedCopies()

    @override
    def __getstate__(self) -> dict[str, Any]:
        self._copies.finish()
        return super().__getstate__()

    def gathered(self) -> dict[int, RecordT]:
        """The records that `compute` scored, of all ranks, sorted by sample id. Not a collective: one rank may call it.

        Raises:
            RuntimeError: If `compute` was not called since the last `update` or `reset`.
        """
        return _computed(self._gathered)

    def resampled_scores(self) -> ResampledScores:
        """The scores of test sets drawn from the scored samples with replacement. Not a collective.

        Scores that cannot be computed from numbers of each sample are left out.

        Raises:
            RuntimeError: If `compute` was not called since the last `update` or `reset`.
        """
        records = self.gathered()
        scores = self._score_resampled(records, resampled_counts(len(records)))
        return ResampledScores(samples_digest(records), len(records), scores)

    def _score_resampled(self, records: Mapping[int, RecordT], counts: Counts) -> Mapping[str, Replicates]:
        """The scores of sets in which the records, sorted by sample id, occur `counts` times, `[R, N]`."""
        return {}

    def _add_later(self, tensors: Sequence[Tensor], add: Callable[[list[Tensor]], None]) -> None:
        """Calls `add`, which adds records, with the tensors on the CPU; see `DelayedCopies`."""
        self._gathered = self._scores = None
        self._copies.add(tensors, add)

    def _add(self, sample: int, record: RecordT) -> None:
        """Adds a sample's record, unless its id was added before."""
        self._gathered = self._scores = None
        add_record(self._records, sample, record, self._truth)

    @staticmethod
    def _truth(record: RecordT) -> object:
        """The part that must be equal in all records of a sample, such as its reference."""
        return None

    @abstractmethod
    def _score(self, records: Mapping[int, RecordT]) -> ScoresT | None:
        """The scores of these records, sorted by sample id or not; None if there is nothing to score."""

    def _score_gathered(self, records: Mapping[int, RecordT]) -> ScoresT | None:
        """The scores of the records of all ranks, equal on all ranks."""
        return self._score(records)

    @abstractmethod
    def _result(self, scores: ScoresT | None) -> ResultT:
        """Converts scores to the return value of `compute`; NaN for None."""

    def _tensor(self, value: float) -> Tensor:
        """A result on the metric's device, in double precision to avoid rounding; MPS supports single only."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.tensor(value, dtype=dtype, device=self.device)


class ScoresMetric(GatheredMetric[RecordT, ScoresT, dict[str, Tensor]]):
    """A metric of several scores: `compute` returns a flat dictionary of tensors for logging.

    Lightning can log a metric itself (`self.log(name, metric)`, `self.log_dict(collection)`) only if it returns one
    tensor: `metric["name"]` is a metric of one score that shares samples and computation with this one.

    Attributes:
        score_names: The keys of the dictionary.
    """

    score_names: ClassVar[tuple[str, ...]]

    def scores(self) -> ScoresT:
        """All scores of the last `compute`, also those that cannot be logged, as plain numbers. Not a collective.

        Raises:
            RuntimeError: If `compute` was not called since the last `update` or `reset`.
        """
        return _computed(self._scores)

    @override
    def __getitem__(self, name: str) -> "Score":  # type: ignore[override]  # typed int, but torchmetrics allows any key
        if name not in self.score_names:
            raise KeyError(f"{type(self).__name__} has no score {name!r}; use one of {', '.join(self.score_names)}.")
        return Score(self, name)

    @override
    def _result(self, scores: ScoresT | None) -> dict[str, Tensor]:
        values: Any = dict.fromkeys(self.score_names, float("nan")) if scores is None else scores
        return {name: self._tensor(values[name]) for name in self.score_names}


class Score(CompositionalMetric):
    """One score of a metric with several, as a separate metric; samples and computation are shared.

    Args:
        metric: The metric.
        name: One of its `score_names`.
    """

    def __init__(self, metric: ScoresMetric[Any, Any], name: str) -> None:
        super().__init__(itemgetter(name), metric, None)
        self.name = name

    @property
    @override
    def higher_is_better(self) -> bool | None:  # type: ignore[override]  # of an instance, not of the class
        return self.metric_a.higher_is_better  # type: ignore[union-attr]

    @override
    def __repr__(self) -> str:
        return f"{self.metric_a!r}[{self.name!r}]"


def sample_ids(ids: Sequence[int] | Tensor) -> list[int]:
    """Ids as integers; those of a tensor are read at once.

    Raises:
        TypeError: If one is no integer.
    """
    return list(map(index, ids.tolist() if isinstance(ids, Tensor) else ids))


def nothing_to_score(what: str, split: str) -> str:
    """The error message for an empty split."""
    stage = "val" if split == "valid" else split
    return (
        f"there is no {what} of the split {split!r} to score: it is empty, all samples were filtered out, or "
        f"trainer.limit_{stage}_batches is 0."
    )


def _computed(value: T | None) -> T:
    if value is None:
        raise RuntimeError("call compute() on every rank first: it gathers and scores the samples of all ranks.")
    return value

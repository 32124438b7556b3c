"""Batches of samples of one group, such as images of one shape: data sets that make them, the sampler, the loaders."""

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_attn.datamodules.sampling.planned_batches import (
    PlannedBatchSampler,
    PlannedLoader,
    planned_loader,
    rank_and_world_size,
    reshuffles,
)
from lightning_attn.errors import InputError, UserError

__all__ = [
    "BatchedDataset",
    "GroupedBatchSampler",
    "SampleRequest",
    "evaluation_loader",
    "training_loader",
]

BatchType = TypeVar("BatchType")


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A sample that a sampler asks a data set for: random changes depend on both numbers.

    Args:
        index: Index of the sample.
        epoch: Number of the epoch; 0 where nothing is random.
    """

    index: int
    epoch: int


class BatchedDataset(Dataset[BatchType], abc.ABC):
    """Samples that are read a batch at a time.

    Attributes:
        repeats: How often each sample comes in an epoch of training, on average, `[samples]`; None for once.
    """

    repeats: npt.NDArray[np.float64] | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    def groups(self) -> npt.NDArray[np.int64]:
        """The group of each sample, `[samples]`: those of one group make batches. Here all are in one."""
        return np.zeros(len(self), dtype=np.int64)

    @abc.abstractmethod
    def batch(self, requests: Sequence[SampleRequest]) -> BatchType:
        """One batch; without requests, one without samples.

        Raises:
            UserError: If a sample cannot be used; the message says which.
            OSError: If a file cannot be read.
        """

    def start_worker(self) -> None:
        """Called once in each process that makes batches."""

    def __getitem__(self, index: int) -> BatchType:
        return self.batch([SampleRequest(index, 0)])

    def __getitems__(self, requests: list[SampleRequest]) -> BatchType | Exception:
        """One batch, or the error to show; the DataLoader's fetcher calls this for the whole list at once."""
        try:
            return self.batch(requests)
        except (UserError, OSError) as error:
            return error


class GroupedBatchSampler(PlannedBatchSampler[SampleRequest]):
    """Yields batches of samples of one group each, for use as a DataLoader's `batch_sampler`.

    For training (`shuffle=True`) the samples, each of them once, and the batches are shuffled each epoch. What is left
    of the groups makes mixed and smaller batches. Batches are halved until their number is a multiple of the world
    size; where all hold one sample and that is not enough, up to world size - 1 samples come twice. Every rank thus has
    the same number of batches in every epoch.

    For evaluation (`shuffle=False`) groups follow each other in the order of the samples. Nothing is repeated, and
    ranks may differ by one batch. A rank without any gets one empty batch, because Lightning would skip its epoch, and
    the other ranks would wait for it in the scoring.

    Args:
        groups: The group of each sample, such as wide and tall images, `[samples]`.
        batch_size: Samples in a batch.
        shuffle: Whether this is training.
        seed: Seed of the random draws, together with the epoch.
        reshuffle: Whether epochs differ; otherwise all are like the first.
        rank: Which share to yield.
        world_size: Number of shares.
        repeats: How often each sample comes in an epoch of training, on average, `[samples]`; in one epoch it is one of
            the whole numbers around that, and all epochs are equally long. None for once.

    Raises:
        ValueError: If there is nothing to train on, or a number is out of range.
    """

    def __init__(
        self,
        groups: npt.NDArray[np.integer[Any]],
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        reshuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        repeats: npt.NDArray[np.float64] | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size: {batch_size} is too small; give 1 or more.")
        super().__init__(shuffle=shuffle, seed=seed, reshuffle=reshuffle, rank=rank, world_size=world_size)
        if shuffle and not len(groups):
            raise InputError("there is nothing to train on: the data set is empty.")
        self.groups = groups
        self.batch_size = batch_size
        self.repeats = repeats if shuffle else None
        if self.repeats is not None and not (
            np.isfinite(self.repeats).all() and self.repeats.min() >= 0 < self.repeats.sum()
        ):
            raise InputError("repeats: they must be finite numbers from 0, not all 0.")
        self.num_samples = len(groups) if self.repeats is None else max(1, round(float(self.repeats.sum())))
        sizes = _sizes(self.num_samples, batch_size)
        while shuffle and len(sizes) % world_size:
            sizes = _one_more(sizes)
        self.bounds = np.cumsum([0, *sizes])

    @property
    @override
    def settings(self) -> dict[str, int]:
        return {"batch_size": self.batch_size, "seed": self.seed, "samples": self.num_samples}

    @override
    def __len__(self) -> int:
        """As in `PlannedBatchSampler`, but at least the empty one."""
        return max(1, super().__len__())

    @override
    def plan(self, epoch: int, share: range) -> Iterator[list[SampleRequest]]:
        if self.shuffle:
            generator = np.random.default_rng((self.seed, epoch))
            drawn = (
                np.arange(len(self.groups))
                if self.repeats is None
                else _repeated(self.repeats, self.num_samples, generator)
            )
            order = _leftovers_last(generator.permutation(drawn), self.groups, self.batch_size)
            order = np.resize(order, self.bounds[-1])  # begins again where samples come twice
            turn = generator.permutation(self.num_batches)
        else:
            order, turn = np.argsort(self.groups, kind="stable"), np.arange(self.num_batches)
            if not len(share):
                yield []
        for batch in turn[share.start : share.stop : share.step]:
            yield [SampleRequest(index, epoch) for index in order[self.bounds[batch] : self.bounds[batch + 1]].tolist()]


def training_loader(
    module: pl.LightningDataModule,
    dataset: BatchedDataset[Any],
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
) -> PlannedLoader:
    """The training loader of a DataModule, for this rank of its trainer, resumable if there is one.

    Args:
        module: The DataModule.
        dataset: The samples.
        batch_size: Samples in a batch on one rank.
        num_workers: Processes that make batches; 0 makes them in the training process.
        seed: Decides, with the epoch, what is in a batch and the order of batches.

    Raises:
        ValueError: If the trainer would distribute the batches a second time.
    """
    rank, world_size = rank_and_world_size(module)
    sampler = GroupedBatchSampler(
        dataset.groups(),
        batch_size,
        shuffle=True,
        seed=seed,
        reshuffle=reshuffles(module),
        rank=rank,
        world_size=world_size,
        repeats=dataset.repeats,
    )
    return planned_loader(module, dataset, sampler, num_workers)


def evaluation_loader(
    module: pl.LightningDataModule, dataset: BatchedDataset[Any], *, batch_size: int, num_workers: int
) -> PlannedLoader:
    """A loader for validation, test or prediction, for this rank; arguments and errors as in `training_loader`."""
    rank, world_size = rank_and_world_size(module)
    sampler = GroupedBatchSampler(dataset.groups(), batch_size, shuffle=False, rank=rank, world_size=world_size)
    return planned_loader(module, dataset, sampler, num_workers)


def _repeated(repeats: npt.NDArray[np.float64], number: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Indices of samples, each as often as one of the two whole numbers around its repeats, `number` in all."""
    ends = np.cumsum(repeats)
    places = (np.arange(number) + generator.random()) * (ends[-1] / number)
    drawn = np.searchsorted(ends, places, side="right")
    return np.asarray(np.minimum(drawn, len(repeats) - 1), dtype=np.int64)


def _sizes(samples: int, batch_size: int) -> list[int]:
    full, left = divmod(samples, batch_size)
    return [batch_size] * full + [left] * (left > 0)


def _one_more(sizes: list[int]) -> list[int]:
    """Halves the last batch of the largest, or adds one of a single sample where all are such."""
    largest = max(sizes)
    if largest == 1:
        return [*sizes, 1]
    index = len(sizes) - 1 - sizes[::-1].index(largest)
    return [*sizes[:index], largest - largest // 2, largest // 2, *sizes[index + 1 :]]


def _leftovers_last(
    order: npt.NDArray[np.int64], groups: npt.NDArray[np.integer[Any]], batch_size: int
) -> npt.NDArray[np.int64]:
    """Sorts samples by group, those of a group in the given order; those of a group that fill no batch come last."""
    order = order[np.argsort(groups[order], kind="stable")]
    _, starts, counts = np.unique(groups[order], return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(starts, counts)
    left = place >= np.repeat(counts // batch_size * batch_size, counts)
    return np.concatenate([order[~left], order[left]])

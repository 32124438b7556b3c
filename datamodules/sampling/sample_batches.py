"""Loaders for any map-style data set that are exact on several ranks and resume in the middle of an epoch."""

from collections.abc import Sequence
from typing import Any, Protocol

import pytorch_lightning as pl
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from typing_extensions import override

from lightning_attn.datamodules.sampling.grouped_batches import (
    BatchedDataset,
    SampleRequest,
    evaluation_loader,
    training_loader,
)

__all__ = ["sample_loader"]


class Samples(Protocol):
    """A map-style data set, such as a list."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int, /) -> Any:
        """One sample: tensors, numbers and text, also in tuples and dictionaries."""


class _CollatedSamples(BatchedDataset[Any]):
    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    @override
    def __len__(self) -> int:
        return len(self.samples)

    @override
    def batch(self, requests: Sequence[SampleRequest]) -> Any:
        if requests:
            return default_collate([self.samples[request.index] for request in requests])
        return _emptied(default_collate([self.samples[0]]))


def sample_loader(
    module: pl.LightningDataModule,
    samples: Samples,
    *,
    batch_size: int,
    shuffle: bool,
    num_workers: int = 0,
    seed: int = 0,
) -> DataLoader[Any]:
    """The loader of a DataModule over samples that torch's `default_collate` can batch.

    Training batches (`shuffle=True`) depend on seed and epoch alone, are distributed so that every rank has the same
    number, and are resumed in the middle of an epoch. Evaluation repeats nothing; a rank without samples gets one batch
    whose tensors have no entries.

    Args:
        module: The DataModule.
        samples: The samples.
        batch_size: Samples in a batch on one rank.
        shuffle: Whether this is for training.
        num_workers: Processes that make batches; 0 makes them in the training process.
        seed: Seed of the random order, together with the epoch.

    Raises:
        ValueError: If the trainer would distribute the batches a second time, or there is nothing to train on.
    """
    collated = _CollatedSamples(samples)
    if not shuffle:
        return evaluation_loader(module, collated, batch_size=batch_size, num_workers=num_workers)
    return training_loader(module, collated, batch_size=batch_size, num_workers=num_workers, seed=seed)


def _emptied(value: Any) -> Any:
    """A collated batch without its samples."""
    if isinstance(value, Tensor):
        return value[:0]
    if isinstance(value, dict):
        return {name: _emptied(one) for name, one in value.items()}
    return [] if all(isinstance(one, str | bytes) for one in value) else [_emptied(one) for one in value]

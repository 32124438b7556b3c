"""Loaders for any map-style data set that are exact on several ranks and go on in the middle of an epoch."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from datamodules.sampling.image_batches import ImageDataset, SampleRequest, evaluation_loader, training_loader

__all__ = ["sample_loader"]


class Samples(Protocol):
    """A map-style data set: a list will do."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int, /) -> Any:
        """One sample: tensors, numbers and text, also in tuples and dictionaries."""


class _Collated(ImageDataset[Any]):
    """Samples as batches."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def groups(self) -> npt.NDArray[np.int64]:
        """All samples go together."""
        return np.zeros(len(self), dtype=np.int64)

    def batch(self, draws: Sequence[SampleRequest]) -> Any:
        """The samples with a first axis more; without any, that axis is empty."""
        if draws:
            return default_collate([self.samples[draw.image] for draw in draws])
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
    """The loader of a DataModule over samples that torch's `default_collate` can put together.

    Training batches (`shuffle=True`) are drawn from seed and epoch alone, dealt out so that every rank has the same
    number, and resumed in the middle of an epoch. Evaluation repeats nothing; a rank without samples gets one batch
    whose tensors have no entries.

    Args:
        module: The DataModule.
        samples: What there is.
        batch_size: Samples in a batch on one rank.
        shuffle: Whether this is for training.
        num_workers: Processes that make batches; 0 makes them in the training process.
        seed: What the drawing starts from.

    Raises:
        ValueError: If the trainer would deal the batches out a second time, or there is nothing to train on.
    """
    collated = _Collated(samples)
    if not shuffle:
        return evaluation_loader(module, collated, batch_size=batch_size, num_workers=num_workers)
    return training_loader(module, collated, batch_size=batch_size, num_workers=num_workers, seed=seed)


def _emptied(value: Any) -> Any:
    """What `default_collate` made of samples, without any."""
    if isinstance(value, Tensor):
        return value[:0]
    if isinstance(value, dict):
        return {name: _emptied(one) for name, one in value.items()}
    return [] if all(isinstance(one, str | bytes) for one in value) else [_emptied(one) for one in value]

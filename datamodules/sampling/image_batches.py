"""Batches of images of one shape, and the loaders that make them."""

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, Self, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from torch import LongTensor, Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.images.files import ImageError
from datamodules.images.folders import printable
from datamodules.sampling.planned_batches import (
    PlannedBatchSampler,
    ResumableLoader,
    ignore_stop_signals,
    loader_options,
    rank_and_world_size,
    reshuffles,
    resumable,
)
from lightning_attn.errors import InputError

BadImagePolicy = Literal["stop", "skip"]
"""What is done about a file that is damaged or no image while a stage runs.

`stop` ends the run with an error that names it. `skip` passes over it and says so: training takes the next image in its
place, and evaluation leaves it out of the scores.
"""


class BadImage(NamedTuple):
    """A file that could not be used.

    Args:
        name: Its name below the folder of the split.
        reason: Why.
    """

    name: str
    reason: str


class SampleRequest(NamedTuple):
    """One image as a data set is asked for it: random changes depend on both numbers.

    Args:
        image: Number of the image.
        epoch: Number of the epoch; 0 where nothing is random.
    """

    image: int
    epoch: int


@dataclass
class ImageBatch:
    """Images, each of its own size. It may hold none. A subclass adds what is to be learnt from them.

    Not frozen only because Lightning refuses frozen dataclasses when it converts the precision of inputs.

    Args:
        ids: One for each image, `[B]`.
        images: RGB images as the network gets them, uint8 `[3, H, W]` each.
        outputs: For each image a name for what is written about it, each once in a split and fit for a file.
        paths: The files.
        bad: Images that would be here, but could not be used.
    """

    ids: LongTensor
    images: list[Tensor]
    outputs: list[str] = field(default_factory=list, kw_only=True)
    paths: list[str] = field(default_factory=list, kw_only=True)
    bad: list[BadImage] = field(default_factory=list, kw_only=True)

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Self:
        """A copy on another device."""
        asynchronous = torch.device(device).type == "cuda"
        return self._each(lambda tensor: tensor.to(device, non_blocking=asynchronous))

    def pin_memory(self) -> Self:
        """A copy in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{one.name: _changed(getattr(self, one.name), change) for one in fields(self)})


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of lists and dictionaries in which tensors are changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list):
        return [_changed(one, change) for one in value]
    if isinstance(value, dict):
        return {name: _changed(one, change) for name, one in value.items()}
    return value


BatchType = TypeVar("BatchType", bound=ImageBatch)
T = TypeVar("T")

_MOST_REPLACEMENTS = 100  # bad images in a row after which there is something wrong with all of them


class ImageDataset(Dataset[BatchType], abc.ABC):
    """Images that are read and transformed a batch at a time.

    Attributes:
        on_bad_image: See `BadImagePolicy`; a subclass reads by `read_each` to keep to it.
        replaces_bad_images: Whether the next image is taken for a bad one, as in training.
        repeats: How often each image comes in an epoch of training, in the mean, `[images]`; None for once.
    """

    on_bad_image: BadImagePolicy = "stop"
    replaces_bad_images: bool = False
    repeats: npt.NDArray[np.float64] | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abc.abstractmethod
    def groups(self) -> npt.NDArray[np.int64]:
        """The group of each image, `[images]`: those of one group make batches."""

    @abc.abstractmethod
    def batch(self, draws: Sequence[SampleRequest]) -> BatchType:
        """One batch.

        Raises:
            ImageError: If an image cannot be used; the message names the file.
            OSError: If a file cannot be read.
        """

    def name(self, image: int) -> str:
        """What an image is called in messages."""
        return f"image {image}"

    def read_each(
        self, draws: Sequence[SampleRequest], read: Callable[[SampleRequest], T]
    ) -> tuple[list[SampleRequest], list[T], list[BadImage]]:
        """Reads images by `on_bad_image`.

        Args:
            draws: Which images.
            read: Reads one.

        Returns:
            The images that were read, what `read` gave of each, and those that could not be used.

        Raises:
            ImageError: If an image cannot be used and is not to be passed over, or no image can be used.
            OSError: If a file cannot be read, likewise.
        """
        used, results, bad = [], [], []
        turns = min(len(self), _MOST_REPLACEMENTS) if self.replaces_bad_images else 1
        for draw in draws:
            for turn in range(turns):
                chosen = draw._replace(image=(draw.image + turn) % len(self))
                try:
                    result = read(chosen)
                except (ImageError, OSError) as error:
                    if self.on_bad_image == "stop" or (self.replaces_bad_images and turn == turns - 1):
                        raise
                    bad.append(BadImage(self.name(chosen.image), printable(str(error))))
                else:
                    used.append(chosen)
                    results.append(result)
                    break
        return used, results, bad

    def __getitem__(self, image: int) -> BatchType:
        return self.batch([SampleRequest(image, 0)])

    def __getitems__(self, draws: list[SampleRequest]) -> BatchType | Exception:
        """One batch, or what went wrong; the DataLoader's fetcher calls this for the whole list at once."""
        try:
            return self.batch(draws)
        except (ImageError, OSError) as error:
            return error


class GroupedBatchSampler(PlannedBatchSampler[SampleRequest]):
    """Yields batches of images of one group each, for use as a DataLoader's `batch_sampler`.

    For training (`shuffle=True`) the images come in an order drawn anew each epoch, each of them once, and so do the
    batches. What is left of the groups makes mixed and smaller batches. Batches are halved until their number is a
    multiple of the world size; where all hold one image and that is not enough, up to world size - 1 images come twice.
    Every rank thus has the same number of batches in every epoch.

    For evaluation (`shuffle=False`) groups follow each other in the order of the images. Nothing is repeated, and ranks
    may differ by one batch. A rank without any gets one batch without images, because Lightning would skip its epoch,
    and the other ranks would wait for it in the scoring.

    Args:
        groups: The group of each image, such as wide and tall, `[images]`.
        batch_size: Images in a batch.
        shuffle: Whether this is training.
        seed: What the drawing starts from, together with the epoch.
        reshuffle: Whether each epoch is drawn anew; otherwise all are like the first.
        rank: Which share to yield.
        world_size: Number of shares.
        repeats: How often each image comes in an epoch of training, in the mean, `[images]`: as often as the whole
            numbers around it, so that all epochs are equally long. None for once.

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
        self.num_draws = len(groups) if self.repeats is None else max(1, round(float(self.repeats.sum())))
        sizes = _sizes(self.num_draws, batch_size)
        while shuffle and len(sizes) % world_size:
            sizes = _one_more(sizes)
        self.bounds = np.cumsum([0, *sizes])

    @property
    def settings(self) -> dict[str, int]:
        """What the plan depends on."""
        return {"batch_size": self.batch_size, "seed": self.seed, "images": self.num_draws}

    def __len__(self) -> int:
        """As in `PlannedBatchSampler`, but at least the one without images."""
        return max(1, super().__len__())

    def plan(self, epoch: int, share: range) -> Iterator[list[SampleRequest]]:
        """The batches of an epoch whose numbers are in `share`, or the one without images."""
        if self.shuffle:
            generator = np.random.default_rng((self.seed, epoch))
            drawn = (
                np.arange(len(self.groups))
                if self.repeats is None
                else _repeated(self.repeats, self.num_draws, generator)
            )
            order = _leftovers_last(generator.permutation(drawn), self.groups, self.batch_size)
            order = np.resize(order, self.bounds[-1])  # begins again where images come twice
            turn = generator.permutation(self.num_batches)
        else:
            order, turn = np.argsort(self.groups, kind="stable"), np.arange(self.num_batches)
            if not len(share):
                yield []
        for index in turn[share.start : share.stop : share.step]:
            yield [SampleRequest(image, epoch) for image in order[self.bounds[index] : self.bounds[index + 1]].tolist()]


class ImageLoader(DataLoader[Any]):
    """A DataLoader that raises what a data set returned as an exception.

    An exception that is raised in a worker arrives buried in the text of its traceback; a message for the user is
    returned by the data set instead of a batch.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches.

        Raises:
            Exception: What the data set returned.
        """
        # The iterator is made now, not when the first batch is asked for: see the sampler.
        return _raising(super().__iter__())


class ResumableImageLoader(ImageLoader, ResumableLoader):
    """Both in one."""


def training_loader(
    module: pl.LightningDataModule,
    dataset: ImageDataset[Any],
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
) -> DataLoader[Any]:
    """The training loader of a DataModule, for this rank of its trainer, resumable if there is one.

    Args:
        module: The DataModule.
        dataset: The images.
        batch_size: Images in a batch on one rank.
        num_workers: Processes that make batches; 0 makes them in the training process.
        seed: Decides, with the epoch, what is in a batch and the order of batches.

    Raises:
        ValueError: If the trainer would deal the batches out a second time.
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
    options = loader_options(module, num_workers) | {"worker_init_fn": _begin_worker}
    if module.trainer is None:
        return ImageLoader(dataset, batch_sampler=sampler, **options)
    return resumable(ResumableImageLoader, module.trainer, dataset, sampler, **options)


def evaluation_loader(
    module: pl.LightningDataModule,
    dataset: ImageDataset[Any],
    *,
    batch_size: int,
    num_workers: int,
) -> ImageLoader:
    """A loader for validation, test or prediction, for this rank; arguments and errors as in `training_loader`."""
    rank, world_size = rank_and_world_size(module)
    sampler = GroupedBatchSampler(dataset.groups(), batch_size, shuffle=False, rank=rank, world_size=world_size)
    options = loader_options(module, num_workers) | {"worker_init_fn": _begin_worker}
    return ImageLoader(dataset, batch_sampler=sampler, **options)


def _begin_worker(worker: int) -> None:
    """Also keeps OpenCV in each worker from starting a thread per core."""
    ignore_stop_signals(worker)
    cv2.setNumThreads(0)


def _raising(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _repeated(repeats: npt.NDArray[np.float64], number: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Numbers of images, each as often as one of the two whole numbers around its repeats, `number` in all."""
    ends = np.cumsum(repeats)
    places = (np.arange(number) + generator.random()) * (ends[-1] / number)
    drawn = np.searchsorted(ends, places, side="right")
    return np.asarray(np.minimum(drawn, len(repeats) - 1), dtype=np.int64)


def _sizes(images: int, batch_size: int) -> list[int]:
    full, left = divmod(images, batch_size)
    return [batch_size] * full + [left] * (left > 0)


def _one_more(sizes: list[int]) -> list[int]:
    """Halves the last batch of the largest, or adds an image where all hold one."""
    largest = max(sizes)
    if largest == 1:
        return [*sizes, 1]
    index = len(sizes) - 1 - sizes[::-1].index(largest)
    return [*sizes[:index], largest - largest // 2, largest // 2, *sizes[index + 1 :]]


def _leftovers_last(
    order: npt.NDArray[np.int64], groups: npt.NDArray[np.integer[Any]], batch_size: int
) -> npt.NDArray[np.int64]:
    """Sorts images by group, those of a group in the given order, and the last ones of each that fill no batch last."""
    order = order[np.argsort(groups[order], kind="stable")]
    _, starts, counts = np.unique(groups[order], return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(starts, counts)
    left = place >= np.repeat(counts // batch_size * batch_size, counts)
    return np.concatenate([order[~left], order[left]])

"""Batches of images, planned for a whole epoch at once, and the loaders that make them.

The plan is a function of the images' groups, the seed, the epoch and nothing else. It is the same on every rank; rank r
takes batches r, r + world size, and so on.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

# Lightning cannot tell that this sampler leaves nothing out of a prediction and says so each time.
warnings.filterwarnings("ignore", message=".*custom batch sampler `GroupedBatchSampler` for prediction.*")


class Draw(NamedTuple):
    """One image as a data set is asked for it: random changes depend on both numbers.

    Args:
        image: Number of the image.
        epoch: Number of the epoch; 0 where nothing is random.
    """

    image: int
    epoch: int


class GroupedBatchSampler(Sampler[list[Draw]]):
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

    Raises:
        ValueError: If there is no image to train on, or a number is out of range.
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
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} is too small; give 1 or more.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: {rank} is not in 0..{world_size - 1}.")
        if shuffle and not len(groups):
            raise ValueError("there is no image to train on.")
        self.groups = groups
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.reshuffle = reshuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._running_epoch = 0
        self._skip = 0
        sizes = _sizes(len(groups), batch_size)
        while shuffle and len(sizes) % world_size:
            sizes = _one_more(sizes)
        self._bounds = np.cumsum([0, *sizes])

    @property
    def sampler(self) -> Sampler[Any]:
        """What Lightning hands the epoch to (itself), or takes as a sign that nothing is shuffled."""
        return self if self.shuffle else SequentialSampler(range(len(self.groups)))

    @property
    def num_batches(self) -> int:
        """Batches of an epoch on all ranks together, without those that hold no image."""
        return len(self._bounds) - 1

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration yield this epoch, from its start unless a place in it was loaded."""
        if epoch != self.epoch:
            self.epoch, self._skip = epoch, 0

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank, also when an iteration resumes in the middle."""
        return max(1, len(range(self.rank, self.num_batches, self.world_size)))

    def __iter__(self) -> Iterator[list[Draw]]:
        # Not a generator itself: the epoch must be fixed now, not when the first batch is asked for, because
        # Lightning calls set_epoch in between and DataLoader workers fetch ahead.
        self._running_epoch = self.epoch
        share = range(self.rank, self.num_batches, self.world_size)
        return self._batches(self.epoch * self.reshuffle, share, self._skip)

    def state_dict(self, consumed: int, finished: bool = False) -> dict[str, int]:
        """The place to go on from, the same on every rank.

        Args:
            consumed: Batches of the running epoch that this rank has trained on.
            finished: Whether the epoch ends there.
        """
        finished = finished or consumed >= len(self)
        return {
            "epoch": self._running_epoch + int(finished),
            "consumed": 0 if finished else consumed,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "images": len(self.groups),
            "world_size": self.world_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next iteration yield what is left of an epoch.

        Raises:
            ValueError: If the place is in the middle of an epoch and the plan is no longer the same.
        """
        if state["consumed"]:
            here = self.state_dict(0)
            changed = [
                f"{name} {state[name]} became {here[name]}"
                for name in ("world_size", "batch_size", "seed", "images")
                if state[name] != here[name]
            ]
            if changed:
                raise ValueError(
                    f"the checkpoint stopped after batch {state['consumed']} of epoch {state['epoch']}, but since then "
                    f"{', '.join(changed)}, so the rest of that epoch cannot be told. Resume with the same data, "
                    "settings and number of ranks, resume from a checkpoint of an epoch's end, or start anew from the "
                    "weights alone."
                )
        self.epoch, self._skip = state["epoch"], state["consumed"]

    def _batches(self, epoch: int, share: range, skip: int) -> Iterator[list[Draw]]:
        if self.shuffle:
            generator = np.random.default_rng((self.seed, epoch))
            order = _leftovers_last(generator.permutation(len(self.groups)), self.groups, self.batch_size)
            order = np.resize(order, self._bounds[-1])  # begins again where images come twice
            turn = generator.permutation(self.num_batches)
        else:
            order, turn = np.argsort(self.groups, kind="stable"), np.arange(self.num_batches)
            if not len(share):
                yield []
        for index in turn[share.start : share.stop : share.step][skip:]:
            yield [Draw(image, epoch) for image in order[self._bounds[index] : self._bounds[index + 1]].tolist()]


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


class ResumableImageLoader(ImageLoader):
    """A training loader that Lightning saves and restores in the middle of an epoch.

    Lightning stores `state_dict()` in the checkpoint's fit loop and calls `load_state_dict` before it iterates. What
    the sampler has yielded says nothing about what was trained on, since workers fetch ahead and a step may be broken
    off; so the count comes from outside.

    Args:
        dataset: A map-style data set whose `__getitems__` takes a list of `Draw` and returns a batch.
        batch_sampler: The plan.
        consumed: Tells how many batches of the running epoch have been trained on, and whether the epoch ends there.
        options: Further arguments of the DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_sampler: GroupedBatchSampler,
        consumed: Callable[[], tuple[int, bool]],
        **options: Any,
    ) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **options)
        self.batches = batch_sampler
        self._consumed = consumed

    def state_dict(self) -> dict[str, int]:
        """The place in the data; see `GroupedBatchSampler.state_dict`."""
        return self.batches.state_dict(*self._consumed())

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from a place in the data; see `GroupedBatchSampler.load_state_dict`."""
        self.batches.load_state_dict(state)


def training_loader(
    module: pl.LightningDataModule,
    dataset: Dataset[Any],
    groups: npt.NDArray[np.integer[Any]],
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
) -> ImageLoader:
    """The training loader of a DataModule, for this rank of its trainer, resumable if there is one.

    Args:
        module: The DataModule.
        dataset: As in `ResumableImageLoader`.
        groups: As in `GroupedBatchSampler`.
        batch_size: Images in a batch on one rank.
        num_workers: Processes that make batches; 0 makes them in the training process.
        seed: Decides, with the epoch, what is in a batch and the order of batches.

    Raises:
        ValueError: If the trainer would deal the batches out a second time.
    """
    trainer = module.trainer
    rank, world_size = _share(module)
    # With overfit_batches the same few batches are to come again in every epoch.
    reshuffle = not getattr(trainer, "overfit_batches", 0)
    sampler = GroupedBatchSampler(
        groups, batch_size, shuffle=True, seed=seed, reshuffle=reshuffle, rank=rank, world_size=world_size
    )
    options = _loader_options(module, num_workers)
    if trainer is None:
        return ImageLoader(dataset, batch_sampler=sampler, **options)
    # Lightning iterates the loader once before its first set_epoch. Not `trainer.current_epoch`: when a run resumes
    # from the end of an epoch, that one still lags behind.
    sampler.set_epoch(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]

    def consumed() -> tuple[int, bool]:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        done: int = progress.current.processed  # type: ignore[attr-defined]
        return done, progress.is_last_batch and done == progress.current.ready

    return ResumableImageLoader(dataset, sampler, consumed, **options)


def evaluation_loader(
    module: pl.LightningDataModule,
    dataset: Dataset[Any],
    groups: npt.NDArray[np.integer[Any]],
    *,
    batch_size: int,
    num_workers: int,
) -> ImageLoader:
    """A loader for validation, test or prediction, for this rank; arguments and errors as in `training_loader`."""
    rank, world_size = _share(module)
    sampler = GroupedBatchSampler(groups, batch_size, shuffle=False, rank=rank, world_size=world_size)
    return ImageLoader(dataset, batch_sampler=sampler, **_loader_options(module, num_workers))


def _share(module: pl.LightningDataModule) -> tuple[int, int]:
    """This rank and the number of ranks."""
    trainer = module.trainer
    if trainer is None:
        return 0, 1
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise ValueError(
            f"use_distributed_sampler: with {trainer.world_size} ranks the Trainer would replace the batches of "
            f"{type(module).__name__}, which are dealt out to the ranks already. Set use_distributed_sampler to false "
            "(--trainer.use_distributed_sampler false)."
        )
    return trainer.global_rank, trainer.world_size


def _loader_options(module: pl.LightningDataModule, num_workers: int) -> dict[str, Any]:
    return {
        "collate_fn": _whole,
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": module.trainer is not None and module.trainer.strategy.root_device.type == "cuda",
        "worker_init_fn": _one_thread,
    }


def _whole(batch: Any) -> Any:
    return batch


def _one_thread(worker: int) -> None:
    """Keeps OpenCV in each worker from starting a thread per core."""
    cv2.setNumThreads(0)


def _raising(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        yield batch


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

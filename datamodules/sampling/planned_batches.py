"""Batches that are planned for a whole epoch, distributed over ranks, and resumed in the middle of an epoch.

The plan is a function of the data, the seed and the epoch alone. It is the same on every rank; rank r takes batches r,
r + world size, and so on.
"""

import abc
import atexit
import functools
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler, get_worker_info
from typing_extensions import override

from lightning_attn.errors import InputError

__all__ = [
    "PlannedBatchSampler",
    "PlannedLoader",
    "ResumableLoader",
    "ignore_stop_signals",
    "planned_loader",
    "rank_and_world_size",
    "reshuffles",
]

Item = TypeVar("Item")

# Lightning does not know that these samplers leave nothing out of a prediction, and warns each time.
warnings.filterwarnings("ignore", message=".*custom batch sampler .* for prediction.*")


class PlannedBatchSampler(Sampler[list[Item]], abc.ABC, Generic[Item]):
    """Yields a rank's share of planned batches, for use as a DataLoader's `batch_sampler`.

    A subclass sets `bounds`, says in `settings` what its plan depends on, and makes the batches in `plan`.

    Args:
        shuffle: Whether this is training.
        seed: Seed of the random draws, together with the epoch.
        reshuffle: Whether epochs differ; otherwise all are like the first.
        rank: Which share to yield.
        world_size: Number of shares.

    Attributes:
        bounds: Where batches start and end in an epoch's order of samples, `[batches + 1]`.

    Raises:
        ValueError: If `rank` is not below `world_size`.
    """

    bounds: npt.NDArray[np.int64]

    def __init__(self, *, shuffle: bool, seed: int, reshuffle: bool, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise InputError(f"rank: {rank} is not in 0..{world_size - 1}.")
        self.shuffle = shuffle
        self.seed = seed
        self.reshuffle = reshuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._running_epoch = 0
        self._skip = 0

    @property
    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the plan depends on, by the names of options: plain values."""

    @abc.abstractmethod
    def plan(self, epoch: int, share: range) -> Iterator[list[Item]]:
        """The batches of an epoch with the numbers in `share`."""

    @property
    def sampler(self) -> Sampler[Any]:
        """What Lightning sets the epoch of (itself), or takes as a sign that nothing is shuffled."""
        return self if self.shuffle else SequentialSampler(range(int(self.bounds[-1])))

    @property
    def num_batches(self) -> int:
        """Planned batches of an epoch on all ranks together."""
        return len(self.bounds) - 1

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration yield this epoch, from its start unless a place in it was loaded."""
        if epoch != self.epoch:
            self.epoch, self._skip = epoch, 0

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank, also when an iteration resumes in the middle."""
        return len(range(self.rank, self.num_batches, self.world_size))

    def __iter__(self) -> Iterator[list[Item]]:
        # Not a generator itself: the epoch must be fixed now, not when the first batch is asked for, because
        # Lightning calls set_epoch in between and DataLoader workers fetch ahead.
        self._running_epoch = self.epoch
        return self.batches_of(self.epoch, self._skip)

    def batches_of(self, epoch: int, skip: int = 0) -> Iterator[list[Item]]:
        """This rank's batches of an epoch, without the first `skip`; independent of the place of the iteration."""
        return self.plan(epoch * self.reshuffle, range(self.rank, self.num_batches, self.world_size)[skip:])

    def state_dict(self, consumed: int, finished: bool = False) -> dict[str, Any]:
        """The place to resume from, the same on every rank.

        Args:
            consumed: Batches of the running epoch that this rank has trained on.
            finished: Whether the epoch ends there.
        """
        finished = finished or consumed >= len(self)
        place = {"epoch": self._running_epoch + int(finished), "consumed": 0 if finished else consumed}
        return place | {"world_size": self.world_size} | self.settings

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration yield what is left of an epoch.

        Raises:
            ValueError: If the state is damaged, or in the middle of an epoch and the plan is no longer the same.
        """
        if not self._is_place(state):
            raise InputError(f"the checkpoint's place in the data is damaged: {str(state)[:200]}. Use another one.")
        if state["consumed"]:
            here = {"world_size": self.world_size} | self.settings
            changed = [f"{name} {state[name]} became {now}" for name, now in here.items() if state[name] != now]
            if changed:
                raise InputError(
                    f"the checkpoint stopped after batch {state['consumed']} of epoch {state['epoch']}, but since then "
                    f"{', '.join(changed)}, so the rest of that epoch is not known. Resume with the same data, "
                    "settings and number of ranks, resume from a checkpoint of an epoch's end, or start anew from the "
                    "weights alone."
                )
        self.epoch, self._skip = state["epoch"], state["consumed"]

    def _is_place(self, state: object) -> bool:
        """Whether this could come from `state_dict`."""
        if not isinstance(state, dict) or not state.keys() >= {"epoch", "consumed", "world_size", *self.settings}:
            return False
        return all(type(state[name]) is int and 0 <= state[name] < 1 << 53 for name in ("epoch", "consumed"))


class PlannedLoader(DataLoader[Any]):
    """A DataLoader whose data set makes whole batches, or returns the error to raise instead of one.

    An error that a data set raises in a worker arrives buried in the text of its traceback.
    """

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # The iterator is made now, not when the first batch is asked for: see the sampler.
        return _raising(super().__iter__())


class ResumableLoader(PlannedLoader):
    """A training loader that Lightning saves and restores in the middle of an epoch.

    Lightning stores `state_dict()` in the checkpoint's fit loop and calls `load_state_dict` before it iterates. What
    the sampler has yielded does not count as trained on, since workers fetch ahead and a step may be interrupted; so
    the count comes from outside.

    Args:
        dataset: A map-style data set whose `__getitems__` takes what the sampler yields and returns a batch.
        batch_sampler: The plan.
        consumed: Returns how many batches of the running epoch have been trained on, and whether the epoch ends there.
        options: Further arguments of the DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_sampler: PlannedBatchSampler[Any],
        consumed: Callable[[], tuple[int, bool]],
        **options: Any,
    ) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **options)
        self.batches = batch_sampler
        self._consumed = consumed

    def state_dict(self) -> dict[str, Any]:
        """The place in the data; see `PlannedBatchSampler.state_dict`."""
        return self.batches.state_dict(*self._consumed())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a place in the data; see `PlannedBatchSampler.load_state_dict`."""
        self.batches.load_state_dict(state)


def rank_and_world_size(module: pl.LightningDataModule) -> tuple[int, int]:
    """This rank and the number of ranks.

    Raises:
        ValueError: If the trainer would distribute the batches a second time.
    """
    trainer = module.trainer
    if trainer is None:
        return 0, 1
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise InputError(
            f"use_distributed_sampler: with {trainer.world_size} ranks the Trainer would replace the batches of "
            f"{type(module).__name__}, which are distributed over the ranks already. Set use_distributed_sampler to "
            "false (--trainer.use_distributed_sampler false)."
        )
    return trainer.global_rank, trainer.world_size


def reshuffles(module: pl.LightningDataModule) -> bool:
    """Whether epochs differ: with overfit_batches the same few batches come in every epoch."""
    return not getattr(module.trainer, "overfit_batches", 0)


def planned_loader(
    module: pl.LightningDataModule,
    dataset: Dataset[Any],
    sampler: PlannedBatchSampler[Any],
    num_workers: int,
) -> PlannedLoader:
    """The loader of a DataModule; in training with a Trainer it resumes where the checkpoint stopped.

    Args:
        module: The DataModule.
        dataset: Makes a whole batch of what the sampler asks for. Its `start_worker`, if it has one, is called first in
            each process that makes batches.
        sampler: Plans the batches.
        num_workers: Processes that make batches; 0 makes them in the training process.
    """
    if num_workers:
        _end_workers_at_exit()
    trainer = module.trainer
    options: dict[str, Any] = {
        "collate_fn": _unchanged,
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "worker_init_fn": _start_worker,
        # Without one, every iteration would draw from the random stream of the training, and a training that resumes
        # in the middle of an epoch iterates once more often.
        "generator": torch.Generator(),
        "pin_memory": trainer is not None and trainer.strategy.root_device.type == "cuda",
    }
    if trainer is None or not sampler.shuffle:
        return PlannedLoader(dataset, batch_sampler=sampler, **options)
    # Lightning iterates the loader once before its first set_epoch. Not `trainer.current_epoch`: when a run resumes
    # from the end of an epoch, that one still lags behind.
    sampler.set_epoch(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
    batches = trainer.fit_loop.epoch_loop.batch_progress

    def consumed() -> tuple[int, bool]:
        """Batches of the running epoch that went through a training step here, and whether it was the last."""
        done: int = batches.current.processed  # type: ignore[attr-defined]
        return done, batches.is_last_batch and done == batches.current.ready

    return ResumableLoader(dataset, sampler, consumed, **options)


@functools.cache
def _end_workers_at_exit() -> None:
    """Ends workers that still have batches: Python would send them SIGTERM, which they ignore, and wait."""
    atexit.register(_end_workers)  # before the handler of multiprocessing, which was registered earlier


def _end_workers() -> None:
    if hasattr(signal, "SIGCHLD"):  # torch's handler would report workers that end here; Windows has none
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    children = [child for child in multiprocessing.active_children() if child.daemon]
    for child in children:
        child.terminate()  # as Python does; a process of the user's own may heed it
    for child in children:
        child.join(timeout=0.5)
        if child.is_alive():
            child.kill()


def _start_worker(worker: int) -> None:
    ignore_stop_signals(worker)
    info = get_worker_info()
    assert info is not None, "called in a worker"
    if hasattr(info.dataset, "start_worker"):
        info.dataset.start_worker()


def ignore_stop_signals(worker: int) -> None:
    """Leaves Ctrl-C and SIGTERM, which a terminal or SLURM sends to every process, to the training process.

    It still needs its workers to finish the step and to save; they end when it does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _unchanged(batch: Any) -> Any:
    return batch


def _raising(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, Exception):
            try:
                raise batch
            finally:
                # The error's traceback holds this frame. With the error in it there would be a cycle, and the garbage
                # collector closes the queues of a loader before its workers are told to end: 10 seconds for each.
                del batch, batches
        yield batch

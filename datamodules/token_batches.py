"""Batches of about equally long sentences, bounded by tokens and planned for a whole epoch at once.

The plan is a function of the lengths, the seed, the epoch and nothing else. It is the same on every rank; rank r takes
batches r, r + world size, and so on.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

Lengths = npt.NDArray[np.int32]

# Pairs whose lengths are equal up to this step are mixed. On Multi30k (vocabulary 8000, 2500 tokens) 1, 2, 3 and 4 give
# 3, 6, 7 and 10 % padding, while a batch shares 64, 36, 23 and 18 % of its pairs with some batch of the next epoch.
_LENGTH_STEP = 2


class TokenBatchSampler(Sampler[list[int]]):
    """Yields lists of sentence indices, for use as a DataLoader's ``batch_sampler``.

    A batch of n pairs takes ``n * longest source`` and ``n * longest target`` tokens, padding included; each of the two
    is at most `max_tokens`.

    For training (``shuffle=True``) pairs are sorted by source and target length, both rounded up to an even number;
    pairs that are then equal come in an order drawn anew each epoch, and so do the batches cut from the sorted pairs.
    Where the batches start depends on the lengths alone, so every epoch has the same number of batches. Batches are
    halved, largest first, until the number is a multiple of the world size: no rank runs short and no pair is left out.

    For evaluation (``shuffle=False``) the longest come first and the batches are the same for every world size, unless
    there are fewer than ranks: then they are halved until every rank has one, since a rank that never logs would keep
    the others waiting. Ranks may differ by one batch; nothing is repeated.

    Args:
        source_lengths: tokens of each source sentence as they count against `max_tokens`, `[pairs]`.
        target_lengths: the same of each target sentence, `[pairs]`; zeros where there is none.
        max_tokens: the bound on either side of a batch.
        shuffle: whether this is training.
        seed: what the drawing starts from, together with the epoch.
        reshuffle: whether each epoch is drawn anew; otherwise all are like the first.
        rank: which share to yield.
        world_size: number of shares.

    Raises:
        ValueError: if a sentence alone is longer than `max_tokens`, or there are fewer pairs than ranks.
    """

    def __init__(
        self,
        source_lengths: Lengths,
        target_lengths: Lengths,
        max_tokens: int,
        *,
        shuffle: bool,
        seed: int = 0,
        reshuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(source_lengths) != len(target_lengths):
            raise ValueError(f"source_lengths has {len(source_lengths)} values, target_lengths {len(target_lengths)}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: {rank} is not in 0..{world_size - 1}.")
        longest = np.maximum(source_lengths, target_lengths)
        if len(longest) and int(longest.max()) > max_tokens:
            index = int(longest.argmax())
            raise ValueError(
                f"max_tokens: pair {index} alone has {int(longest[index])} tokens with its end of sentence, more than "
                f"the {max_tokens} of a batch. Raise max_tokens or leave the pair out."
            )
        self.max_tokens = max_tokens
        self.shuffle = shuffle
        self.seed = seed
        self.reshuffle = reshuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._running_epoch = 0
        self._skip = 0
        if shuffle:
            source_lengths, target_lengths = (
                np.minimum(-(-lengths // _LENGTH_STEP) * _LENGTH_STEP, max_tokens)
                for lengths in (source_lengths, target_lengths)
            )
        self._key = _sorting_key(source_lengths, target_lengths)
        order = self._order(None)
        self._bounds = _cut(source_lengths[order], target_lengths[order], max_tokens)
        while self.num_batches % world_size if shuffle else self.num_batches < world_size:
            self._bounds = _halve_largest(self._bounds, world_size)

    @property
    def sampler(self) -> Sampler[Any]:
        """What Lightning hands the epoch to (itself), or takes as a sign that nothing is shuffled."""
        return self if self.shuffle else SequentialSampler(range(len(self._key)))

    @property
    def num_batches(self) -> int:
        """Batches of an epoch on all ranks together."""
        return len(self._bounds) - 1

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration yield this epoch, from its start unless a place in it was loaded."""
        if epoch != self.epoch:
            self.epoch, self._skip = epoch, 0

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank, also when an iteration resumes in the middle."""
        return len(range(self.rank, self.num_batches, self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        # Not a generator itself: the epoch must be fixed now, not when the first batch is asked for, because
        # Lightning calls set_epoch in between and DataLoader workers fetch ahead.
        self._running_epoch = self.epoch
        share = range(self.rank, self.num_batches, self.world_size)[self._skip :]
        return (batch.tolist() for batch in self._batches(self.epoch, share))

    def state_dict(self, consumed: int, finished: bool = False) -> dict[str, int]:
        """The place to go on from, the same on every rank.

        Args:
            consumed: batches of the running epoch that this rank has trained on.
            finished: whether the epoch ends there.
        """
        finished = finished or consumed >= len(self)
        return {
            "epoch": self._running_epoch + int(finished),
            "consumed": 0 if finished else consumed,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "pairs": len(self._key),
            "batches": self.num_batches,
            "world_size": self.world_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next iteration yield what is left of an epoch.

        Raises:
            ValueError: if the place is in the middle of an epoch and the plan is no longer the same.
        """
        if state["consumed"]:
            here = self.state_dict(0)
            changed = [
                f"{name} {state[name]} became {here[name]}"
                for name in ("world_size", "max_tokens", "seed", "pairs", "batches")
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

    def _order(self, generator: np.random.Generator | None) -> npt.NDArray[np.integer[Any]]:
        if generator is None:
            order = np.argsort(self._key, kind="stable")
            return order if self.shuffle else order[::-1]
        shuffled = np.arange(len(self._key), dtype=np.int32)
        generator.shuffle(shuffled)
        return shuffled[np.argsort(self._key[shuffled], kind="stable")]

    def _batches(self, epoch: int, share: range) -> Iterator[npt.NDArray[np.integer[Any]]]:
        generator = np.random.default_rng((self.seed, epoch * self.reshuffle)) if self.shuffle else None
        order = self._order(generator)
        turn = np.arange(self.num_batches) if generator is None else generator.permutation(self.num_batches)
        for index in turn[share.start : share.stop : share.step]:
            yield order[self._bounds[index] : self._bounds[index + 1]]


class ResumableTokenLoader(DataLoader[Any]):
    """A training DataLoader that Lightning saves and restores in the middle of an epoch.

    Lightning stores ``state_dict()`` in the checkpoint's fit loop and calls ``load_state_dict`` before it iterates.
    What the sampler has yielded says nothing about what was trained on, since workers fetch ahead and a step may be
    broken off; so the count comes from outside.

    Args:
        dataset: a map-style dataset whose ``__getitems__`` returns a batch.
        batch_sampler: the plan.
        consumed: tells how many batches of the running epoch have been trained on, and whether the epoch ends there.
        options: further arguments of the DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_sampler: TokenBatchSampler,
        consumed: Callable[[], tuple[int, bool]],
        **options: Any,
    ) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **options)
        self.batches = batch_sampler
        self._consumed = consumed

    def state_dict(self) -> dict[str, int]:
        """The place in the data; see `TokenBatchSampler.state_dict`."""
        return self.batches.state_dict(*self._consumed())

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from a place in the data; see `TokenBatchSampler.load_state_dict`."""
        self.batches.load_state_dict(state)


def _sorting_key(source_lengths: Lengths, target_lengths: Lengths) -> npt.NDArray[np.integer[Any]]:
    """Sorts by source length, and within one by target length, up and down in turn.

    The turn makes a batch that reaches over two source lengths hold target lengths that are close to each other.
    """
    width = int(target_lengths.max(initial=0)) + 1
    target = np.where(source_lengths % 2, width - 1 - target_lengths, target_lengths)
    most = (int(source_lengths.max(initial=0)) + 1) * width
    # With millions of pairs the plan is the largest thing in memory; four bytes are enough for all usual lengths.
    narrow = source_lengths.astype(np.int32 if most < 1 << 31 else np.int64)
    return np.asarray(narrow * width + target, dtype=narrow.dtype)


def _cut(source_lengths: Lengths, target_lengths: Lengths, max_tokens: int) -> npt.NDArray[np.int64]:
    """Where batches start and end when every batch takes as many of the sorted pairs as it can hold."""
    bounds = [0]
    while bounds[-1] < len(source_lengths):
        start = bounds[-1]
        most = max_tokens // max(int(source_lengths[start]), int(target_lengths[start]), 1)
        window = slice(start, start + most)
        longest = np.maximum.accumulate(np.maximum(source_lengths[window], target_lengths[window]))
        # Grows with every pair, so what fits is a beginning of the window.
        fits = longest.astype(np.int64) * np.arange(1, len(longest) + 1) <= max_tokens
        bounds.append(start + int(np.count_nonzero(fits)))
    return np.array(bounds, dtype=np.int64)


def _halve_largest(bounds: npt.NDArray[np.int64], world_size: int) -> npt.NDArray[np.int64]:
    """Halves the batch with most pairs."""
    sizes = np.diff(bounds)
    index = int(sizes.argmax()) if len(sizes) else 0
    if not len(sizes) or sizes[index] < 2:
        raise ValueError(f"{int(bounds[-1])} sentences cannot be dealt out to {world_size} ranks; use fewer ranks.")
    return np.insert(bounds, index + 1, bounds[index] + sizes[index] // 2)

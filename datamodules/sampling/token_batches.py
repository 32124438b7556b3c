"""Batches of sentences of similar length, bounded by their number of tokens."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from lightning_attn.datamodules.sampling.planned_batches import PlannedBatchSampler
from lightning_attn.errors import InputError

Lengths = npt.NDArray[np.int32]

# Pairs whose lengths are equal up to this step are mixed. On Multi30k (vocabulary 8000, 2500 tokens) 1, 2, 3 and 4 give
# 3, 6, 7 and 10 % padding, while a batch shares 64, 36, 23 and 18 % of its pairs with some batch of the next epoch.
_LENGTH_STEP = 2


class TokenBatchSampler(PlannedBatchSampler[int]):
    """Yields lists of sentence indices, for use as a DataLoader's ``batch_sampler``.

    A batch of n pairs takes ``n * longest source`` and ``n * longest target`` tokens, padding included; each of the two
    is at most `max_tokens`.

    For training (``shuffle=True``) pairs are sorted by source and target length, both rounded up to an even number;
    pairs of equal rounded lengths are shuffled each epoch, and so are the batches cut from the sorted pairs.
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
        seed: seed of the random draws, together with the epoch.
        reshuffle: whether epochs differ; otherwise all are like the first.
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
            raise InputError(f"source_lengths has {len(source_lengths)} values, target_lengths {len(target_lengths)}.")
        super().__init__(shuffle=shuffle, seed=seed, reshuffle=reshuffle, rank=rank, world_size=world_size)
        longest = np.maximum(source_lengths, target_lengths)
        if len(longest) and int(longest.max()) > max_tokens:
            index = int(longest.argmax())
            raise InputError(
                f"max_tokens: pair {index} alone has {int(longest[index])} tokens with its end of sentence, more than "
                f"the {max_tokens} of a batch. Raise max_tokens or leave the pair out."
            )
        self.max_tokens = max_tokens
        if shuffle:
            source_lengths, target_lengths = (
                np.minimum(-(-lengths // _LENGTH_STEP) * _LENGTH_STEP, max_tokens)
                for lengths in (source_lengths, target_lengths)
            )
        self._key = _sorting_key(source_lengths, target_lengths)
        order = self._order(None)
        self.bounds = _cut(source_lengths[order], target_lengths[order], max_tokens)
        while self.num_batches % world_size if shuffle else self.num_batches < world_size:
            self.bounds = _halve_largest(self.bounds, world_size)

    @property
    @override
    def settings(self) -> dict[str, int]:
        return {
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "pairs": len(self._key),
            "batches": self.num_batches,
        }

    @override
    def plan(self, epoch: int, share: range) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self._batches(epoch, share))

    def _order(self, generator: np.random.Generator | None) -> npt.NDArray[np.integer[Any]]:
        if generator is None:
            order = np.argsort(self._key, kind="stable")
            return order if self.shuffle else order[::-1]
        shuffled = np.arange(len(self._key), dtype=np.int32)
        generator.shuffle(shuffled)
        return shuffled[np.argsort(self._key[shuffled], kind="stable")]

    def _batches(self, epoch: int, share: range) -> Iterator[npt.NDArray[np.integer[Any]]]:
        generator = np.random.default_rng((self.seed, epoch)) if self.shuffle else None
        order = self._order(generator)
        turn = np.arange(self.num_batches) if generator is None else generator.permutation(self.num_batches)
        for index in turn[share.start : share.stop : share.step]:
            yield order[self.bounds[index] : self.bounds[index + 1]]


def _sorting_key(source_lengths: Lengths, target_lengths: Lengths) -> npt.NDArray[np.integer[Any]]:
    """Sorts by source length, and pairs of one source length by target length, ascending and descending in turn.

    So a batch with two source lengths holds target lengths that are close to each other.
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
        # Grows with every pair, so what fits is a prefix of the window.
        fits = longest.astype(np.int64) * np.arange(1, len(longest) + 1) <= max_tokens
        bounds.append(start + int(np.count_nonzero(fits)))
    return np.array(bounds, dtype=np.int64)


def _halve_largest(bounds: npt.NDArray[np.int64], world_size: int) -> npt.NDArray[np.int64]:
    """Halves the batch with most pairs."""
    sizes = np.diff(bounds)
    index = int(sizes.argmax()) if len(sizes) else 0
    if not len(sizes) or sizes[index] < 2:
        raise InputError(f"{int(bounds[-1])} sentences cannot be distributed over {world_size} ranks; use fewer ranks.")
    return np.insert(bounds, index + 1, bounds[index] + sizes[index] // 2)

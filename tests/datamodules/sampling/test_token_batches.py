import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.sampling.planned_batches import ResumableLoader
from datamodules.sampling.token_batches import TokenBatchSampler


def natural_lengths(pairs, seed=0):
    """Log-normal source lengths and targets of about the same length, as in natural text."""
    generator = np.random.default_rng(seed)
    source = np.clip(generator.lognormal(2.7, 0.4, pairs), 2, 90).astype(np.int32)
    target = np.clip(source * generator.normal(1.05, 0.15, pairs), 2, 90).astype(np.int32)
    return source, target


def epoch_of(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return list(sampler)


lengths = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=40, max_size=120)


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(30, 200), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3))
def test_training_plan(pairs, max_tokens, world_size, seed, epoch):
    source, target = (np.array(side, dtype=np.int32) for side in zip(*pairs, strict=True))
    options = {"shuffle": True, "seed": seed}
    alone = TokenBatchSampler(source, target, max_tokens, rank=0, world_size=1, **options)
    if len(alone) == len(pairs) and len(pairs) % world_size:
        # A sentence each: there is nothing to divide further, so that every rank had as many.
        with pytest.raises(ValueError, match=f"{len(pairs)} sentences cannot be distributed over {world_size} ranks"):
            TokenBatchSampler(source, target, max_tokens, rank=0, world_size=world_size, **options)
        return
    ranks = [
        TokenBatchSampler(source, target, max_tokens, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    dealt = [epoch_of(sampler, epoch) for sampler in ranks]
    assert {len(batches) for batches in dealt} == {len(ranks[0])}, "ranks must have equal numbers of batches"
    batches = [batch for share in dealt for batch in share]
    assert sorted(index for batch in batches for index in batch) == list(range(len(pairs)))
    for batch in batches:
        assert batch
        assert len(batch) * source[batch].max() <= max_tokens
        assert len(batch) * target[batch].max() <= max_tokens
    assert epoch_of(ranks[0], epoch) == dealt[0], "the plan depends on seed and epoch only"
    assert len(epoch_of(ranks[0], epoch + 1)) == len(dealt[0])


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(30, 200), st.integers(1, 5))
def test_evaluation_plan(pairs, max_tokens, world_size):
    source, target = (np.array(side, dtype=np.int32) for side in zip(*pairs, strict=True))
    alone = list(TokenBatchSampler(source, target, max_tokens, shuffle=False))
    assert sorted(index for batch in alone for index in batch) == list(range(len(pairs)))
    longest = [source[index] for batch in alone for index in batch]
    assert longest == sorted(longest, reverse=True)
    for batch in alone:
        assert len(batch) * max(source[batch].max(), target[batch].max()) <= max_tokens
    shares = [
        list(TokenBatchSampler(source, target, max_tokens, shuffle=False, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    if len(alone) >= world_size:
        assert shares == [alone[rank::world_size] for rank in range(world_size)]
    else:
        assert all(len(share) == 1 for share in shares)
    assert sorted(index for share in shares for batch in share for index in batch) == list(range(len(pairs)))


def test_global_plan_is_the_same_on_any_number_of_ranks_when_it_divides():
    source, target = natural_lengths(500)
    one = epoch_of(TokenBatchSampler(source, target, 300, shuffle=True, seed=4), 3)
    for world_size in (2, 3):
        shares = [
            epoch_of(TokenBatchSampler(source, target, 300, shuffle=True, seed=4, rank=rank, world_size=world_size), 3)
            for rank in range(world_size)
        ]
        if len(one) % world_size == 0:
            assert shares == [one[rank::world_size] for rank in range(world_size)]
        else:
            assert len(one) < sum(map(len, shares)) < len(one) + world_size


def test_epochs_and_seeds_differ_in_order_and_in_what_shares_a_batch():
    source, target = natural_lengths(3000)
    sampler = TokenBatchSampler(source, target, 500, shuffle=True, seed=1)
    first, second = ({frozenset(batch) for batch in epoch_of(sampler, epoch)} for epoch in (0, 1))
    assert len(first & second) < 0.15 * len(first)
    other = TokenBatchSampler(source, target, 500, shuffle=True, seed=2)
    assert epoch_of(other, 0) != epoch_of(sampler, 0)
    lengths_in_order = [source[batch].max() for batch in epoch_of(sampler, 0)]
    assert abs(np.corrcoef(lengths_in_order, np.arange(len(lengths_in_order)))[0, 1]) < 0.3


def test_without_reshuffling_all_epochs_are_the_same():
    source, target = natural_lengths(300)
    sampler = TokenBatchSampler(source, target, 300, shuffle=True, reshuffle=False)
    assert epoch_of(sampler, 0) == epoch_of(sampler, 5)


@pytest.mark.parametrize("world_size", [1, 8])
def test_padding_is_small(world_size):
    source, target = natural_lengths(29_000)
    shares = [
        epoch_of(TokenBatchSampler(source, target, 2500, shuffle=True, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    cells = sum(len(batch) * (source[batch].max() + target[batch].max()) for share in shares for batch in share)
    assert 1 - (source.sum() + target.sum()) / cells < 0.10


def test_planning_millions_is_fast():
    source, target = natural_lengths(1_000_000)
    start = time.perf_counter()
    sampler = TokenBatchSampler(source, target, 4096, shuffle=True, seed=1)
    next(iter(sampler))
    assert time.perf_counter() - start < 8, "about 1 s on an idle core"


def test_epoch_is_fixed_when_iteration_begins():
    source, target = natural_lengths(300)
    sampler = TokenBatchSampler(source, target, 300, shuffle=True)
    expected = epoch_of(sampler, 0)
    iterator = iter(sampler)
    sampler.set_epoch(1)
    assert list(iterator) == expected


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("consumed", [0, 1, 7])
def test_state_gives_exactly_the_rest(consumed, world_size):
    source, target = natural_lengths(600)

    def make(rank):
        return TokenBatchSampler(source, target, 300, shuffle=True, seed=3, rank=rank, world_size=world_size)

    for rank in range(world_size):
        running, resumed = make(rank), make(rank)
        batches = epoch_of(running, 2)
        resumed.load_state_dict(running.state_dict(consumed))
        assert len(resumed) == len(batches), "the length stays that of the whole epoch"
        resumed.set_epoch(2)  # Lightning names the epoch again before it iterates
        assert list(resumed) == batches[consumed:]
        resumed.set_epoch(3)
        assert list(resumed) == epoch_of(running, 3)


@pytest.mark.parametrize("finished", [True, False])
def test_state_of_a_finished_epoch_is_the_next_one(finished):
    source, target = natural_lengths(300)
    sampler = TokenBatchSampler(source, target, 300, shuffle=True)
    epoch_of(sampler, 4)
    state = sampler.state_dict(5, finished=True) if finished else sampler.state_dict(len(sampler))
    assert (state["epoch"], state["consumed"]) == (5, 0)
    assert all(type(value) is int for value in state.values()), "plain values load with weights_only=True"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 310}, "max_tokens 300 became 310"),
        ({"seed": 9}, "seed 0 became 9"),
        ({"rank": 0, "world_size": 2}, "world_size 1 became 2"),
        ({"pairs": 301}, "pairs 300 became 301"),
    ],
)
def test_resuming_a_changed_plan_mid_epoch_is_refused(changes, message):
    state = TokenBatchSampler(*natural_lengths(300), 300, shuffle=True).state_dict(3)
    source, target = natural_lengths(changes.pop("pairs", 300))
    other = TokenBatchSampler(source, target, **{"max_tokens": 300, "shuffle": True, **changes})
    with pytest.raises(ValueError, match=f"stopped after batch 3 of epoch 0, .*{message}"):
        other.load_state_dict(state)
    other.load_state_dict({**state, "consumed": 0, "epoch": 2})  # at an epoch's end nothing is lost
    assert other.epoch == 2


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_pair_longer_than_a_batch_is_named(shuffle):
    with pytest.raises(ValueError, match=r"pair 1 alone has 31 tokens .*more than the 30 of a batch. Raise max_tokens"):
        TokenBatchSampler(np.array([3, 4]), np.array([3, 31]), 30, shuffle=shuffle)
    assert len(TokenBatchSampler(np.array([3, 4]), np.array([3, 29]), 29, shuffle=shuffle)) == 2


@pytest.mark.parametrize("shuffle", [True, False])
def test_fewer_pairs_than_ranks(shuffle):
    with pytest.raises(ValueError, match="2 sentences cannot be distributed over 3 ranks; use fewer ranks"):
        TokenBatchSampler(np.array([3, 4]), np.array([3, 4]), 30, shuffle=shuffle, world_size=3)


def test_bad_arguments():
    with pytest.raises(ValueError, match="source_lengths has 2 values, target_lengths 1"):
        TokenBatchSampler(np.array([3, 4]), np.array([3]), 30, shuffle=True)
    with pytest.raises(ValueError, match=r"rank: 2 is not in 0\.\.1"):
        TokenBatchSampler(np.array([3, 4]), np.array([3, 4]), 30, shuffle=True, rank=2, world_size=2)


class Indices:
    def __getitem__(self, index):
        return index


def test_loader_state_counts_what_was_trained_not_what_was_fetched():
    source, target = natural_lengths(300)
    trained = 0
    sampler = TokenBatchSampler(source, target, 300, shuffle=True)
    loader = ResumableLoader(Indices(), sampler, lambda: (trained, False), collate_fn=list)
    batches = iter(loader)
    seen = [next(batches) for _ in range(4)]
    trained = 3
    state = loader.state_dict()
    resumed = TokenBatchSampler(source, target, 300, shuffle=True)
    again = ResumableLoader(Indices(), resumed, lambda: (0, False), collate_fn=list)
    again.load_state_dict(state)
    rest = list(again)
    assert rest[0] == seen[3]
    assert sorted(index for batch in seen[:3] + rest for index in batch) == list(range(300))

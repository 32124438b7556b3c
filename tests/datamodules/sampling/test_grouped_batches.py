import itertools
import multiprocessing

import numpy as np
import pytest
from torch.utils.data import Dataset

from datamodules.sampling.grouped_batches import GroupedBatchSampler, SampleRequest
from datamodules.sampling.planned_batches import PlannedLoader

GROUPS = np.array([0, 1, 1, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0])  # 5 and 8


def sampler(groups=GROUPS, batch_size=2, shuffle=True, epoch=0, **options):
    made = GroupedBatchSampler(np.asarray(groups), batch_size, shuffle=shuffle, **options)
    made.set_epoch(epoch)
    return made


def indices(batches):
    return [[request.index for request in batch] for batch in batches]


@pytest.mark.parametrize("number", [1, 2, 5, 8, 13, 40])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_training_ranks_have_equal_numbers_and_each_image_once(number, batch_size, world_size):
    groups = np.random.default_rng(0).integers(0, 2, number)
    for epoch in range(2):
        ranks = [
            sampler(groups, batch_size, epoch=epoch, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        batches = [indices(rank) for rank in ranks]
        assert len({len(share) for share in batches}) == 1
        assert [len(rank) for rank in ranks] == [len(share) for share in batches]
        seen = [image for share in batches for batch in share for image in batch]
        assert set(seen) == set(range(number))
        assert all(1 <= len(batch) <= batch_size for share in batches for batch in share)
        repeated = len(seen) - number
        assert repeated < world_size
        if number >= world_size and batch_size > 1 and number // batch_size >= world_size:
            assert repeated == 0
        if repeated:
            assert all(len(batch) == 1 for share in batches for batch in share)


def test_batches_are_of_one_group_but_the_leftovers():
    groups = np.random.default_rng(0).integers(0, 3, 100)
    batches = indices(sampler(groups, batch_size=8))
    mixed = [batch for batch in batches if len(set(groups[batch])) > 1]
    full = sum(count // 8 for count in np.bincount(groups))
    assert len(batches) == 13
    assert len(batches) - len(mixed) >= full == 11


def test_epochs_differ_and_repeat_exactly():
    first = list(sampler())
    assert first == list(sampler())
    assert indices(first) != indices(sampler(epoch=1))
    assert indices(first) != indices(sampler(seed=1))
    made = sampler()
    assert [list(made), made.set_epoch(1), list(made)][2] == list(sampler(epoch=1))
    assert {request.epoch for batch in sampler(epoch=3) for request in batch} == {3}
    assert {len(list(sampler(epoch=epoch))) for epoch in range(5)} == {7}


def test_without_reshuffling_epochs_are_alike():
    assert list(sampler(reshuffle=False, epoch=4)) == list(sampler(reshuffle=False))


def test_the_order_of_batches_and_of_images_in_a_group_is_drawn():
    groups = np.repeat([0, 1], 500)
    batches = indices(sampler(groups, batch_size=4))
    kinds = [int(groups[batch[0]]) for batch in batches]
    assert 80 < sum(a != b for a, b in itertools.pairwise(kinds)) < 170
    flat = [image for batch in batches for image in batch if groups[batch[0]] == 0]
    assert sum(a < b for a, b in itertools.pairwise(flat)) in range(200, 300)


def test_the_epoch_is_fixed_when_the_iteration_begins():
    made = sampler()
    iterator = iter(made)
    made.set_epoch(1)
    assert list(iterator) == list(sampler())


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_repeats_and_leaves_out_nothing(world_size):
    for number in (0, 1, 2, 7, 13):
        groups = GROUPS[:number]
        shares = [
            indices(sampler(groups, shuffle=False, rank=rank, world_size=world_size)) for rank in range(world_size)
        ]
        seen = [image for share in shares for batch in share for image in batch]
        assert sorted(seen) == list(range(number))
        assert all(len(share) >= 1 for share in shares), "a rank without a batch would not take part in the scoring"
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        lengths = [len(sampler(groups, shuffle=False, rank=rank, world_size=world_size)) for rank in range(world_size)]
        assert lengths == [len(share) for share in shares]


def test_evaluation_keeps_the_order_within_groups():
    assert indices(sampler(shuffle=False, batch_size=3)) == [[0, 3, 7], [9, 12, 1], [2, 4, 5], [6, 8, 10], [11]]


@pytest.mark.parametrize("consumed", [1, 3, 6])
def test_resuming_goes_on_in_the_same_epoch(consumed):
    before = sampler(seed=3, epoch=2)
    whole = list(before)
    after = sampler(seed=3)
    after.load_state_dict(before.state_dict(consumed))
    assert list(after) == whole[consumed:]
    assert len(after) == len(whole)
    after.set_epoch(3)
    assert list(after) == list(sampler(seed=3, epoch=3))


@pytest.mark.parametrize(("consumed", "finished"), [(7, False), (4, True)])
def test_resuming_at_the_end_begins_the_next_epoch(consumed, finished):
    before = sampler(epoch=2)
    list(before)
    after = sampler()
    after.load_state_dict(before.state_dict(consumed, finished))
    assert list(after) == list(sampler(epoch=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3}, "batch_size 2 became 3"),
        ({"seed": 1}, "seed 0 became 1"),
        ({"groups": GROUPS[1:]}, "samples 13 became 12"),
        ({"world_size": 2}, "world_size 1 became 2"),
    ],
)
def test_resuming_another_plan_is_refused_in_the_middle_of_an_epoch(changes, message):
    before = sampler()
    list(before)
    with pytest.raises(ValueError, match=f"stopped after batch 3 of epoch 0, but since then {message}"):
        sampler(**changes).load_state_dict(before.state_dict(3))
    sampler(**changes).load_state_dict(before.state_dict(7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0 is too small"),
        ({"rank": 2, "world_size": 2}, r"rank: 2 is not in 0\.\.1"),
        ({"groups": GROUPS[:0]}, "there is nothing to train on: the data set is empty"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        sampler(**changes)


class Numbers(Dataset):
    def __getitems__(self, requests):
        if any(request.index == 5 for request in requests):
            return ValueError("image 5 is broken")
        return [request.index for request in requests]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_that_a_worker_returns_is_raised_as_it_is(num_workers):
    batches = [[SampleRequest(image, 0)] for image in range(8)]
    loader = PlannedLoader(Numbers(), batch_sampler=batches, collate_fn=lambda batch: batch, num_workers=num_workers)
    seen, before = [], multiprocessing.active_children()
    with pytest.raises(ValueError, match=r"^image 5 is broken$"):
        seen.extend(iter(loader))
    assert set(multiprocessing.active_children()) <= set(before), "workers wait for the garbage collector"
    iterator = iter(loader)
    assert [next(iterator) for _ in range(5)] == [[image] for image in range(5)]
    assert len(loader) == 8

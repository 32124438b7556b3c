"""The schedule of several data sets, compared with the members' own plans laid end to end."""

import itertools

import numpy as np
import pytest
import torch

from datamodules.sampling.grouped_batches import GroupedBatchSampler
from datamodules.sampling.joint_batches import JointBatch, JointBatchSampler

LENGTHS = {"long": 14, "short": 6}  # samples, two in a batch


def members(rank=0, world_size=1, **changes):
    return {
        name: GroupedBatchSampler(
            np.zeros(number, dtype=int), 2, shuffle=True, seed=number, rank=rank, world_size=world_size
        )
        for name, number in (LENGTHS | changes).items()
    }


def endless(name, rank=0, world_size=1):
    """A member's own training, epoch after epoch."""
    sampler = members(rank, world_size)[name]
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from sampler


def epochs(sampler, number, first=0):
    """The batches of some epochs."""
    found = []
    for epoch in range(first, first + number):
        sampler.set_epoch(epoch)
        found += list(sampler)
    return found


def of_member(steps, name):
    return [request for step in steps for member, request in step if member == name]


@pytest.mark.parametrize(("epoch", "steps"), [("longest", 7), ("shortest", 3), (5, 5)])
def test_together_every_member_goes_through_its_own_training(epoch, steps):
    sampler = JointBatchSampler(members(), epoch=epoch)
    found = epochs(sampler, 4)
    assert len(sampler) == steps
    assert [[name for name, _ in step] for step in found] == [["long", "short"]] * (4 * steps)
    for name in LENGTHS:
        assert of_member(found, name) == list(itertools.islice(endless(name), 4 * steps))


@pytest.mark.parametrize("ratio", [{}, {"long": 3.0}, {"short": 2.5}])
def test_alternating_every_member_goes_through_its_own_training(ratio):
    sampler = JointBatchSampler(members(), order="alternating", ratio=ratio, epoch=10)
    found = epochs(sampler, 6)
    assert all(len(step) == 1 for step in found)
    long = ratio.get("long", 1) / (ratio.get("long", 1) + ratio.get("short", 1))
    for name, share in (("long", long), ("short", 1 - long)):
        own = of_member(found, name)
        assert len(own) == pytest.approx(60 * share, abs=6)
        assert own == list(itertools.islice(endless(name), len(own)))
    turns = [step[0][0] for step in found]
    assert turns[:10] != turns[10:20], "drawn anew in each epoch"


@pytest.mark.parametrize("ratio", [{}, {"short": 3.0}])
def test_the_longest_has_been_through_once_and_the_shortest_not_more(ratio):
    by_epoch = {
        epoch: JointBatchSampler(members(), order="alternating", ratio=ratio, epoch=epoch)
        for epoch in ("longest", "shortest")
    }
    counts = {
        epoch: [len(of_member(epochs(sampler, 1), name)) for name in LENGTHS] for epoch, sampler in by_epoch.items()
    }
    assert counts["longest"][0] >= 7
    assert counts["longest"][1] >= 3
    assert 1 <= counts["shortest"][0] <= 7
    assert 1 <= counts["shortest"][1] <= 3


@pytest.mark.parametrize("order", ["together", "alternating"])
def test_two_ranks_have_the_same_members_and_all_samples(order):
    ranks = [epochs(JointBatchSampler(members(rank, 2), order=order, epoch="longest", seed=3), 3) for rank in range(2)]
    assert [[name for name, _ in step] for step in ranks[0]] == [[name for name, _ in step] for step in ranks[1]]
    for name in LENGTHS:
        for rank, steps in enumerate(ranks):
            own = of_member(steps, name)
            assert own == list(itertools.islice(endless(name, rank, 2), len(own)))


@pytest.mark.parametrize("order", ["together", "alternating"])
@pytest.mark.parametrize("consumed", [1, 4, 6])
def test_resuming_in_the_middle_of_a_cycle(order, consumed):
    """In epoch 2 the shorter member has begun anew several times, and is in the middle of its own epoch."""

    def make():
        return JointBatchSampler(members(), order=order, epoch=7, seed=5)

    whole, broken, resumed = make(), make(), make()
    broken.set_epoch(2)
    iter(broken)
    state = broken.state_dict(consumed)
    resumed.load_state_dict(state)
    resumed.set_epoch(2)
    assert len(resumed) == 7
    assert [*resumed, *epochs(resumed, 1, 3)] == epochs(whole, 2, 2)[consumed:]
    before = of_member(epochs(whole, 2) + epochs(whole, 1, 2)[:consumed], "short")
    assert state["members"]["short"] == {"epoch": len(before) // 3, "consumed": len(before) % 3}


def test_a_place_is_resumed_with_the_same_schedule_only():
    sampler = JointBatchSampler(members(), epoch=5)
    iter(sampler)
    state = sampler.state_dict(3)
    changed = {
        "steps 5 became 6": JointBatchSampler(members(), epoch=6),
        "order together became alternating": JointBatchSampler(members(), epoch=5, order="alternating"),
        "short.samples 6 became 8": JointBatchSampler(members(short=8), epoch=5),
    }
    for message, other in changed.items():
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        other.load_state_dict(state | {"consumed": 0})
    for damage in ({"members": {}}, {"epoch": -1}, {"consumed": "3"}):
        with pytest.raises(ValueError, match="damaged"):
            sampler.load_state_dict(state | damage)


def test_overfitting_repeats_the_first_epoch():
    short = members()
    for one in short.values():
        one.reshuffle = False
    sampler = JointBatchSampler(short, epoch=4)
    assert epochs(sampler, 1) == epochs(sampler, 1, 3)


def test_a_batch_moves_with_its_parts_and_names_its_samples():
    batch = JointBatch({"a": {"ids": [3, 4], "x": [torch.zeros(2)]}, "b": {"ids": torch.tensor([7])}})
    assert batch.ids == ["a 3", "a 4", "b 7"]
    moved = batch.to("meta")
    assert moved.parts["a"]["x"][0].is_meta
    assert moved.parts["b"]["ids"].is_meta
    assert moved.parts["a"]["ids"] == [3, 4]
    assert not batch.parts["a"]["x"][0].is_meta

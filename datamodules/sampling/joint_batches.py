"""Batches of several data sets as one schedule, which begins a shorter set anew, resumed in the middle of a cycle.

The schedule is a function of the seed, the epoch and the plans of the members alone. Batch k of a member, counted from
the start of the training, is batch k mod n of its own epoch k div n, where n is the number of its batches; so its order
and its random changes are those of its own training, whatever the lengths of the others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_attn.datamodules.sampling.grouped_batches import BatchedDataset
from lightning_attn.datamodules.sampling.planned_batches import PlannedBatchSampler
from lightning_attn.errors import InputError

__all__ = ["EpochLength", "JointBatch", "JointBatchSampler", "JointDataset", "Order"]

Order = Literal["together", "alternating"]
"""Whether each step has a batch of every member, or of one."""

EpochLength = Literal["longest", "shortest"] | int
"""Which member's end is that of an epoch, or the number of its steps."""

Request = tuple[str, list[Any]]
"""A member, and what its own sampler asks its data set for."""


class JointBatchSampler(PlannedBatchSampler[Request]):
    """Yields, for each step, the batches of one or of all members.

    All ranks train on the same members in the same step.

    Args:
        members: The sampler of each member, for the same rank and number of ranks; each of them shuffles.
        order: With "together" each step has a batch of every member. With "alternating" it has one of a single member:
            in each epoch every member has its share of the steps, as the ratio says, in an order that is drawn.
        ratio: Relative number of batches of each member, for "alternating"; empty for as many of each.
        epoch: An epoch ends when every member has been through once ("longest"), when the first has ("shortest"), or
            after this number of steps.
        seed: Seed of the drawn order, together with the epoch.

    Raises:
        ValueError: If there is no member, or an argument does not fit them.
    """

    def __init__(
        self,
        members: Mapping[str, PlannedBatchSampler[Any]],
        *,
        order: Order = "together",
        ratio: Mapping[str, float] | None = None,
        epoch: EpochLength = "longest",
        seed: int = 0,
    ) -> None:
        if not members:
            raise InputError("members: there is none; give at least one.")
        places = {(one.rank, one.world_size, one.reshuffle) for one in members.values()}
        if len(places) > 1:
            raise InputError(f"members: their ranks differ: {sorted(places)}.")
        ((rank, world_size, reshuffle),) = places
        super().__init__(shuffle=True, seed=seed, reshuffle=reshuffle, rank=rank, world_size=world_size)
        self.members = dict(members)
        self.order = order
        shares = self._shares(ratio or {})
        lengths = {name: len(one) for name, one in members.items()}
        if isinstance(epoch, int):
            self.steps = epoch
        elif epoch == "longest":
            self.steps = max(int(np.ceil(lengths[name] / share - 1e-9)) for name, share in shares.items())
        else:
            self.steps = max(1, min(int(lengths[name] / share + 1e-9) for name, share in shares.items()))
        self.counts = dict.fromkeys(members, self.steps) if order == "together" else _apportioned(self.steps, shares)
        if idle := [name for name, count in self.counts.items() if not count]:
            raise InputError(
                f"epoch: with {self.steps} steps, {', '.join(idle)} has none in any epoch: its share by the ratio is "
                f"{shares[idle[0]]:.3g} of the steps. Give more steps, or another ratio."
            )
        self.bounds = np.arange(self.steps * world_size + 1)

    def _shares(self, ratio: Mapping[str, float]) -> dict[str, float]:
        """Batches of each member per step."""
        if self.order == "together":
            return dict.fromkeys(self.members, 1.0)
        numbers = {name: ratio.get(name, 1.0) for name in self.members}
        return {name: number / sum(numbers.values()) for name, number in numbers.items()}

    @property
    @override
    def settings(self) -> dict[str, Any]:
        own = {"order": self.order, "seed": self.seed, "steps": self.steps}
        counts = {f"{name}.batches": count for name, count in self.counts.items()}
        of_members = {
            f"{name}.{key}": value for name, one in self.members.items() for key, value in one.settings.items()
        }
        return own | counts | of_members

    @override
    def plan(self, epoch: int, share: range) -> Iterator[list[Request]]:
        names = list(self.members)
        turns = None if self.order == "together" else self._turns(epoch)
        first = len(range(self.rank, share.start, self.world_size))
        streams = {name: self._from(name, self._done(name, epoch, first, turns)) for name in names}
        for step in range(first, first + len(share)):
            due = names if turns is None else [names[turns[step]]]
            yield [(name, next(streams[name])) for name in due]

    def _from(self, name: str, number: int) -> Iterator[list[Any]]:
        """A member's batches from one on, counted from the start of the training."""
        sampler = self.members[name]
        epoch, skip = divmod(number, len(sampler))
        while True:
            yield from sampler.batches_of(epoch, skip)
            epoch, skip = epoch + 1, 0

    def _turns(self, epoch: int) -> npt.NDArray[np.int64]:
        """The index of the member of each step of an epoch, `[steps]`."""
        once = np.repeat(np.arange(len(self.members)), list(self.counts.values()))
        return np.random.default_rng((self.seed, epoch)).permutation(once)

    def _done(self, name: str, epoch: int, steps: int, turns: npt.NDArray[np.int64] | None) -> int:
        """Batches of a member before a step of an epoch."""
        in_epoch = steps if turns is None else int(np.count_nonzero(turns[:steps] == list(self.members).index(name)))
        return epoch * self.counts[name] + in_epoch

    def places(self, epoch: int, steps: int) -> dict[str, dict[str, int]]:
        """Each member's own epoch, and how many batches of it precede a step of an epoch of the schedule."""
        epoch *= self.reshuffle
        turns = None if self.order == "together" else self._turns(epoch)
        found = {}
        for name, sampler in self.members.items():
            own, consumed = divmod(self._done(name, epoch, steps, turns), len(sampler))
            found[name] = {"epoch": own, "consumed": consumed}
        return found

    @override
    def state_dict(self, consumed: int, finished: bool = False) -> dict[str, Any]:
        """The place to resume from, and under `members` each member's own."""
        place = super().state_dict(consumed, finished)
        return place | {"members": self.places(place["epoch"], place["consumed"])}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state["consumed"] and state.get("members") != self.places(state["epoch"], state["consumed"]):
            self.epoch, self._skip = 0, 0
            raise InputError(
                "the checkpoint's place in the data is damaged: those of the members do not belong to that of the "
                f"schedule: {str(state)[:200]}. Use another one."
            )


@dataclass
class JointBatch:
    """The batches of one step.

    Not frozen only because Lightning refuses frozen dataclasses when it converts the precision of inputs.

    Args:
        parts: The batch of each member that has one, by its name, in the order of the members.
    """

    parts: dict[str, Any]

    @property
    def ids(self) -> list[str]:
        """Member and id of each sample, for messages."""
        return [f"{name} {one}" for name, part in self.parts.items() for one in _ids(part)]

    def to(self, device: torch.device | str) -> Self:
        """A copy on another device."""
        return self._each("to", device)

    def pin_memory(self) -> Self:
        """A copy in page-locked memory."""
        return self._each("pin_memory")

    def _each(self, method: str, *arguments: Any) -> Self:
        def call(value: Any) -> Any:
            return getattr(value, method)(*arguments)

        return type(self)({name: _changed(part, method, call) for name, part in self.parts.items()})


class JointDataset(Dataset[JointBatch]):
    """Makes a batch of each member that a `JointBatchSampler` asks for.

    Args:
        members: The data set of each member, which makes whole batches, as a `BatchedDataset` does.
    """

    def __init__(self, members: Mapping[str, Any]) -> None:
        self.members = dict(members)

    def __getitems__(self, requests: Sequence[Request]) -> JointBatch | Exception:
        """The batches of one step, or the error to show."""
        batches = {}
        for name, request in requests:
            batch = self.members[name].__getitems__(request)
            if isinstance(batch, Exception):
                return batch
            batches[name] = batch
        return JointBatch(batches)

    def start_worker(self) -> None:
        """Prepares the data sets in a process that makes batches."""
        for dataset in self.members.values():
            if isinstance(dataset, BatchedDataset):
                dataset.start_worker()


def _ids(part: Any) -> list[Any]:
    """The ids of the samples of a batch, if it has any."""
    ids = part.get("ids") if isinstance(part, Mapping) else getattr(part, "ids", None)
    return [] if ids is None else ids.tolist() if isinstance(ids, Tensor) else list(ids)


def _changed(value: Any, method: str, call: Callable[[Any], Any]) -> Any:
    """A copy of lists and dictionaries in which everything that has a method was changed by it."""
    if hasattr(value, method):
        return call(value)
    if isinstance(value, Mapping):
        return {name: _changed(one, method, call) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(one, method, call) for one in value]
    return value


def _apportioned(steps: int, shares: Mapping[str, float]) -> dict[str, int]:
    """The steps of each member, in all `steps`; what is left after rounding down goes to the largest remainders."""
    counts = {name: int(steps * share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - steps * shares[name])  # stable: first ones first
    for name in by_remainder[: steps - sum(counts.values())]:
        counts[name] += 1
    return counts

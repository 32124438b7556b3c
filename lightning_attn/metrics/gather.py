"""Collecting what every rank has found out about its own samples."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch.distributed as dist

K = TypeVar("K", int, str)
T = TypeVar("T")
V = TypeVar("V")


def add_record(records: dict[K, T], sample: K, record: T, same: Callable[[T], object] | None = None) -> None:
    """Add a record under its sample id, unless there is one already: of a repeated sample the first record counts.

    Args:
        records: where to add it.
        sample: id of the sample, unique in its split.
        record: what is known about the sample.
        same: what has to be equal in all records of one sample, such as its reference. None checks nothing.

    Raises:
        ValueError: if `same` differs between the two records of a sample.
    """
    first = records.setdefault(sample, record)
    if same is not None and same(first) != same(record):
        raise ValueError(
            f"sample id {sample} stands for two different samples, {same(first)!r} and {same(record)!r}: ids must be "
            "unique in the whole split, not counted from 0 on every rank, and metrics are reset before the next pass"
        )


def gather_by_id(records: Mapping[K, T], same: Callable[[T], object] | None = None) -> dict[K, T]:
    """Collect the records of all ranks, on all ranks.

    Samplers that give every rank as many samples as the others repeat some. Here each sample counts once, so that what
    is computed from the result does not depend on the number of ranks. Ranks may hold different numbers of records,
    also none at all.

    Without an initialised process group, or with one process, this only sorts. Otherwise it is a collective: every
    rank has to call it. Records travel pickled, with NCCL through the memory of `torch.cuda.current_device()`: keep
    them small and on the CPU.

    Args:
        records: this rank's records by sample id.
        same: what has to be equal in all records of one sample, such as its reference. None checks nothing.

    Returns:
        The union over the ranks, sorted by sample id. Of a repeated sample the record of the lowest rank counts.

    Raises:
        ValueError: on every rank, if `same` differs between two records of a sample.
    """
    union: dict[K, T] = {}
    for part in _of_all_ranks(dict(records)):
        for sample, record in part.items():
            add_record(union, sample, record, same)
    return dict(sorted(union.items()))


def true_on_any_rank(value: bool) -> bool:
    """Whether the value is true on at least one rank. A collective, as `gather_by_id`."""
    return any(_of_all_ranks(value))


def several_ranks() -> bool:
    """Whether there is a process group of more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _of_all_ranks(value: V) -> list[V]:
    """The value of each rank, in the order of the ranks."""
    if not several_ranks():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values

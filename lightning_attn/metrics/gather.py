"""Gathers records of samples from all ranks."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch.distributed as dist

from lightning_attn.errors import InputError

K = TypeVar("K", int, str)
T = TypeVar("T")
V = TypeVar("V")


def add_record(records: dict[K, T], sample: K, record: T, same: Callable[[T], object] | None = None) -> None:
    """Add a record under its sample id, unless one exists: of a repeated sample the first record is used.

    Args:
        records: the records to add to.
        sample: id of the sample, unique in its split.
        record: the record of the sample.
        same: the part that must be equal in all records of one sample, such as its reference. None for no check.

    Raises:
        ValueError: if `same` differs between the two records of a sample.
    """
    first = records.setdefault(sample, record)
    if same is not None and same(first) != same(record):
        raise InputError(
            f"sample id {sample} belongs to two different samples, {same(first)!r} and {same(record)!r}: ids must be "
            "unique in the whole split, not counted from 0 on every rank, and metrics must be reset before each pass."
        )


def gather_by_id(records: Mapping[K, T], same: Callable[[T], object] | None = None) -> dict[K, T]:
    """Gather the records of all ranks, on all ranks.

    Distributed samplers repeat some samples to give all ranks the same number. Here each sample is used once, so that
    results do not depend on the number of ranks. Ranks may have different numbers of records, or none.

    Without an initialised process group, or with one process, this only sorts. Otherwise it is a collective: every
    rank must call it. Records are sent pickled, with NCCL through the memory of `torch.cuda.current_device()`: keep
    them small and on the CPU.

    Args:
        records: this rank's records by sample id.
        same: the part that must be equal in all records of one sample, such as its reference. None for no check.

    Returns:
        The union over the ranks, sorted by sample id. Of a repeated sample the record of the lowest rank is used.

    Raises:
        ValueError: on every rank, if `same` differs between two records of a sample.
    """
    union: dict[K, T] = {}
    for part in _all_gather(dict(records)):
        for sample, record in part.items():
            add_record(union, sample, record, same)
    return dict(sorted(union.items()))


def true_on_any_rank(value: bool) -> bool:
    """Whether the value is true on at least one rank. A collective, as `gather_by_id`."""
    return any(_all_gather(value))


def several_ranks() -> bool:
    """Whether a process group of more than one rank is initialised."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _all_gather(value: V) -> list[V]:
    """The values of all ranks, in the order of the ranks."""
    if not several_ranks():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values

"""Functions of the DataModules that merge several data sets."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from lightning_attn.datamodules.images.datamodule import ImageDataModule
from lightning_attn.errors import InputError

__all__ = ["check_members", "member_splits", "member_weights", "members_with", "prepare_members"]

T = TypeVar("T", bound=ImageDataModule)


def check_members(members: Sequence[ImageDataModule], weights: Sequence[float], kind: str) -> None:
    """Checks the arguments of a merged DataModule.

    Args:
        members: The data sets.
        weights: How often the training images of each come in an epoch; empty for once.
        kind: Task of the members, for the message.

    Raises:
        ValueError: If there is no member, or weights and members differ in number, or a weight is out of range.
    """
    if not members:
        raise InputError(f"members: the list is empty; give at least one DataModule of {kind}.")
    if weights and len(weights) != len(members):
        raise InputError(f"weights: there are {len(weights)} for {len(members)} members; give one for each.")
    if any(not 0 <= weight < 1000 for weight in weights) or (weights and not any(weights)):
        raise InputError(f"weights: {list(weights)} must be from 0 to below 1000, not all 0.")


def member_splits(members: Sequence[ImageDataModule]) -> dict[str, str]:
    """The names of the merged splits; "" for validation and test if no member has them."""
    has_tests = any(member.has_test_split for member in members)
    has_validation = any(member.split_names["val"] for member in members)
    return {"train": "train", "val": "val" if has_validation else "", "test": "test" if has_tests else ""}


def members_with(members: Sequence[T], split: str) -> list[T]:
    """The members that have a split; for "test" those whose test split is not their validation split, if any."""
    with_tests = [member for member in members if member.has_test_split]
    return with_tests if split == "test" and with_tests else [member for member in members if member.split_names[split]]


def prepare_members(members: Sequence[ImageDataModule], splits: Sequence[str]) -> None:
    """Calls `prepare_files` of each member for some of the splits "train", "val" and "test"."""
    for member in members:
        member.prepare_files(sorted({member.split_names[split] for split in splits} - {""}))


def member_weights(weights: Sequence[float], sizes: Sequence[int]) -> npt.NDArray[np.float64] | None:
    """The weight of each training image, `[images]`, from that of its member; None without weights."""
    return np.repeat(np.array(weights, dtype=np.float64), sizes) if weights else None

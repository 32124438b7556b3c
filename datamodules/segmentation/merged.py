"""Several segmentation data sets as one, with the classes of all."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from lightning_attn.datamodules.images.folders import listed
from lightning_attn.datamodules.images.members import (
    check_members,
    member_splits,
    member_weights,
    members_with,
    prepare_members,
)
from lightning_attn.datamodules.segmentation.classes import IGNORED, LabelMap, SegmentationClasses, distinct_colours
from lightning_attn.datamodules.segmentation.datamodule import LabelReader, SegmentationDataModule, SegmentationFiles
from lightning_attn.errors import InputError

__all__ = ["MergedSegmentationDataModule", "RenamedLabels"]


class MergedSegmentationDataModule(SegmentationDataModule):
    """Several data sets as one: all their images, and the union of their classes by name.

    Its options take precedence over those of the members.

    Args:
        members: The data sets; each lists its own splits. A member without a validation or test split is left
            out of these.
        weights: How often the training images of each member come in an epoch, on average: 1 for once, 0.5 for half of
            them; empty for once each.
        rename: New names of classes by their old ones, such as `{automobile: car}`; those of one new name become one.
            The new name "" ignores the pixels of a class.
        batch_size: Training images in a batch on one rank.
        num_workers: Processes that make batches; 0 makes them in the training process.
        options: Those of `SegmentationDataModule` and `ImageDataModule`.

    Raises:
        ValueError: If a value is out of range, there is no member, or weights and members differ in number.
    """

    def __init__(
        self,
        members: list[SegmentationDataModule],
        weights: tuple[float, ...] = (),
        rename: dict[str, str] | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **options: Any,
    ) -> None:
        check_members(members, weights, "segmentation")
        new_names = dict(rename or {})
        super().__init__(
            str(members[0].root),
            member_splits(members),
            _united([member.classes for member in members], new_names),
            batch_size=batch_size,
            num_workers=num_workers,
            **options,
        )
        self.members = members
        self.weights = tuple(weights)
        self.rename = new_names
        self._member_sizes: list[int] = []

    @override
    def prepare_files(self, splits: Sequence[str]) -> None:
        prepare_members(self.members, splits)

    @override
    def list_files(self, split: str, *, with_labels: bool = True) -> SegmentationFiles:
        members = members_with(self.members, split)
        parts = [member.list_files(split, with_labels=with_labels) for member in members]
        if split == "train":
            self._member_sizes = list(map(len, parts))
        folder = Path(os.path.commonpath([part.folder.absolute() for part in parts]))
        readers: list[LabelReader] = []
        reader_of = []
        for member, part in zip(members, parts, strict=True):
            own = np.zeros(len(part), dtype=np.int64) if part.reader_of is None else part.reader_of
            reader_of.append(own + len(readers))
            labels = np.full(256, IGNORED, dtype=np.uint8)
            for label, name in enumerate(member.classes.names):
                new = self.rename.get(name, name)
                labels[label] = self.classes.names.index(new) if new else IGNORED
            readers += [RenamedLabels(reader, labels) for reader in part.readers]
        return SegmentationFiles.from_paths(
            folder,
            [_below(folder, part.image(index)) for part in parts for index in range(len(part))],
            [_below(folder, part.label(index)) for part in parts for index in range(len(part))] if with_labels else [],
            readers,
            np.concatenate(reader_of),
        )

    @override
    def image_weights(self) -> npt.NDArray[np.float64] | None:
        return member_weights(self.weights, self._member_sizes)


@dataclass(frozen=True, eq=False)
class RenamedLabels(LabelReader):
    """Reads the labels of a member as those of the merged data set.

    Args:
        reader: The reader of the member.
        new_labels: The merged label of each of its labels, `[256]`.
    """

    reader: LabelReader
    new_labels: LabelMap

    @property
    @override
    def refuses_unknown(self) -> bool:
        return self.reader.refuses_unknown

    @override
    def size(self, path: Path) -> tuple[int, int]:
        return self.reader.size(path)

    @override
    def values(self, path: Path) -> npt.NDArray[Any]:
        return self.reader.values(path)

    @override
    def labels(self, values: npt.NDArray[Any], path: Path) -> LabelMap:
        return self.new_labels[self.reader.labels(values, path)]

    @override
    def is_known(self, value: int) -> bool:
        return self.reader.is_known(value)

    @override
    def described(self, value: int) -> str:
        return self.reader.described(value)


def _united(classes: Sequence[SegmentationClasses], rename: dict[str, str]) -> SegmentationClasses:
    """Every name once, in order of first occurrence, with its first colour and ids from 0."""
    colours = {name: colour for one in reversed(classes) for name, colour in zip(one.names, one.colours, strict=True)}
    unknown = [name for name in rename if name not in colours]
    if unknown:
        raise InputError(
            f"rename: {unknown[0]!r} is not a class of the members, which have {listed(sorted(colours), 90)}."
        )
    names = tuple(
        dict.fromkeys(rename.get(name, name) for one in classes for name in one.names if rename.get(name, name))
    )
    first = {rename.get(name, name): colour for name, colour in reversed(colours.items())} | colours
    return SegmentationClasses(names, tuple(range(len(names))), distinct_colours([first[name] for name in names]))


def _below(folder: Path, path: Path) -> str:
    return path.absolute().relative_to(folder).as_posix()

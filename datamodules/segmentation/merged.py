"""Several data sets of segmentation as one, with the classes of all."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.images.folders import listed
from datamodules.images.members import check_members, member_splits, member_weights, members_with, prepare_members
from datamodules.segmentation.classes import IGNORED, LabelMap, SegmentationClasses, distinct_colours
from datamodules.segmentation.datamodule import LabelReader, SegmentationDataModule, SegmentationFiles
from lightning_attn.errors import InputError

__all__ = ["MergedSegmentationDataModule", "RenamedLabels"]


class MergedSegmentationDataModule(SegmentationDataModule):
    """Several data sets as one: their images together, and every class of any of them by its name.

    Its options take precedence over those of the members.

    Args:
        members: The data sets; each lists its own splits. A member without a validation or test split has no part in
            these.
        weights: How often the training images of each member come in an epoch, in the mean: 1 for once, 0.5 for half of
            them; none for once each.
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

    def prepare_files(self, splits: Sequence[str]) -> None:
        """Lets each member fetch or make its files.

        Args:
            splits: Of "train", "val" and "test", those that are needed.
        """
        prepare_members(self.members, splits)

    def list_files(self, split: str, *, with_labels: bool = True) -> SegmentationFiles:
        """See `SegmentationDataModule.list_files`."""
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
        return SegmentationFiles.of_paths(
            folder,
            [_below(folder, part.image(index)) for part in parts for index in range(len(part))],
            [_below(folder, part.label(index)) for part in parts for index in range(len(part))] if with_labels else [],
            readers,
            np.concatenate(reader_of),
        )

    def image_weights(self) -> npt.NDArray[np.float64] | None:
        """See `SegmentationDataModule.image_weights`."""
        return member_weights(self.weights, self._member_sizes)


@dataclass(frozen=True, eq=False)
class RenamedLabels:
    """Reads the labels of a data set as those of another; see `LabelReader`.

    Args:
        reader: Reads its own.
        new_labels: The new label of each of these, `[256]`.
    """

    reader: LabelReader
    new_labels: LabelMap

    @property
    def refuses_unknown(self) -> bool:
        """See `LabelReader.refuses_unknown`."""
        return self.reader.refuses_unknown

    def size(self, path: Path) -> tuple[int, int]:
        """See `LabelReader.size`."""
        return self.reader.size(path)

    def values(self, path: Path) -> npt.NDArray[Any]:
        """See `LabelReader.values`."""
        return self.reader.values(path)

    def labels(self, values: npt.NDArray[Any], path: Path) -> LabelMap:
        """See `LabelReader.labels`."""
        return self.new_labels[self.reader.labels(values, path)]

    def is_known(self, value: int) -> bool:
        """See `LabelReader.is_known`."""
        return self.reader.is_known(value)

    def described(self, value: int) -> str:
        """See `LabelReader.described`."""
        return self.reader.described(value)


def _united(classes: Sequence[SegmentationClasses], rename: dict[str, str]) -> SegmentationClasses:
    """Every name once, in the order in which they come, with the colour that it has first and ids from 0."""
    colours = {name: colour for one in reversed(classes) for name, colour in zip(one.names, one.colours, strict=True)}
    unknown = [name for name in rename if name not in colours]
    if unknown:
        raise InputError(
            f"rename: {unknown[0]!r} is no class of the members, which have {listed(sorted(colours), 90)}."
        )
    names = tuple(
        dict.fromkeys(rename.get(name, name) for one in classes for name in one.names if rename.get(name, name))
    )
    first = {rename.get(name, name): colour for name, colour in reversed(colours.items())} | colours
    return SegmentationClasses(names, tuple(range(len(names))), distinct_colours([first[name] for name in names]))


def _below(folder: Path, path: Path) -> str:
    return path.absolute().relative_to(folder).as_posix()

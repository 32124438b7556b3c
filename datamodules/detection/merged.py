"""Several detection data sets as one, with the classes of all."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from lightning_attn.datamodules.detection.annotations import Categories, DetectionAnnotations
from lightning_attn.datamodules.detection.datamodule import DetectionDataModule
from lightning_attn.datamodules.images.folders import listed
from lightning_attn.datamodules.images.members import (
    check_members,
    member_splits,
    member_weights,
    members_with,
    prepare_members,
)
from lightning_attn.errors import InputError

__all__ = ["MergedDetectionDataModule", "merged_annotations"]


class MergedDetectionDataModule(DetectionDataModule):
    """Several data sets as one: all their images, and the union of their classes by name.

    Images and annotations get new ids. Note that a data set in which a class is not annotated teaches that its objects
    are background.

    Its options take precedence over those of the members.

    Args:
        members: The data sets; each reads its own splits. A member without a validation or test split is left
            out of these.
        weights: How often the training images of each member come in an epoch, on average: 1 for once, 0.5 for half of
            them; empty for once each.
        rename: New names of classes by their old ones, such as `{automobile: car}`; those of one new name become one.
        batch_size: Training images in a batch on one rank.
        num_workers: Processes that make batches; 0 makes them in the training process.
        options: Those of `DetectionDataModule` and `ImageDataModule`.

    Raises:
        ValueError: If a value is out of range, there is no member, or weights and members differ in number.
    """

    def __init__(
        self,
        members: list[DetectionDataModule],
        weights: tuple[float, ...] = (),
        rename: dict[str, str] | None = None,
        batch_size: int = 2,
        num_workers: int = 0,
        **options: Any,
    ) -> None:
        check_members(members, weights, "detection")
        super().__init__(
            str(members[0].root),
            member_splits(members),
            batch_size=batch_size,
            num_workers=num_workers,
            **options,
        )
        self.members = members
        self.weights = tuple(weights)
        self.rename = dict(rename or {})
        self._member_sizes: list[int] = []

    @override
    def prepare_files(self, splits: Sequence[str]) -> None:
        prepare_members(self.members, splits)

    @override
    def read_split(self, split: str) -> tuple[DetectionAnnotations, Path]:
        parts = [member.read_split(split) for member in members_with(self.members, split)]
        if split == "train":
            self._member_sizes = [len(annotations) for annotations, _ in parts]
        # The classes are those of all training splits, also for other splits.
        known = [annotations.categories for annotations, _ in parts] if split == "train" else self._member_categories()
        if split == "train" or self._categories is None:  # those known from an earlier split are renamed already
            _check_rename(self.rename, [*known, *(annotations.categories for annotations, _ in parts)])
        annotations, folder = merged_annotations(parts, self.rename, known)
        if split == "train":
            self._report_missing([own for own, _ in parts], annotations.categories)
        return annotations, folder

    @override
    def read_categories(self) -> Categories | None:
        found = [member.read_categories() for member in self.members]
        return None if None in found else _united([one for one in found if one is not None], self.rename)

    @override
    def image_weights(self) -> npt.NDArray[np.float64] | None:
        return member_weights(self.weights, self._member_sizes)

    def _report_missing(self, parts: Sequence[DetectionAnnotations], categories: Categories) -> None:
        """Logs the classes that a member does not have: they are annotated in a part of the images only."""
        for member, part in zip(self.members, parts, strict=True):
            own = {self.rename.get(name, name) for name in part.categories.names}
            missing = [name for name in categories.names if name not in own]
            if missing:
                rank_zero_info(
                    f"train: note: {member.root} has no class {listed(missing, 10)}. Where its images show some, they "
                    "are taken for background; if another name means the same, rename it (--data.rename)."
                )

    def _member_categories(self) -> list[Categories]:
        """The categories of all members, of their training splits where they are not known."""
        if self._categories is not None:
            return [self._categories]
        found = []
        for member in self.members:
            categories = member.read_categories()
            found.append(member.read_split("train")[0].categories if categories is None else categories)
        return found


def merged_annotations(
    parts: Sequence[tuple[DetectionAnnotations, Path]],
    rename: Mapping[str, str],
    categories: Sequence[Categories],
) -> tuple[DetectionAnnotations, Path]:
    """The annotations of several data sets as one, and the common folder of all their images.

    Args:
        parts: Annotations, each with the folder of their images.
        rename: New names of classes by their old ones.
        categories: Further categories to unite with those of the parts.
    """
    own = [annotations.categories for annotations, _ in parts]
    united = _united([*categories, *own], rename)
    label = {name: place for place, name in enumerate(united.names, start=1)}
    folder = Path(os.path.commonpath([path.absolute() for _, path in parts]))
    names = [
        (path.absolute() / annotations.names[index]).relative_to(folder).as_posix()
        for annotations, path in parts
        for index in range(len(annotations))
    ]
    labels = [
        np.array([label[rename.get(name, name)] for name in annotations.categories.names])[annotations.labels - 1]
        for annotations, _ in parts
    ]
    columns = [annotations for annotations, _ in parts]
    sizes = np.cumsum([0, *map(len, columns)])
    annotations = DetectionAnnotations.from_objects(
        folder,
        united,
        names=names,
        sizes=np.concatenate([one.sizes for one in columns]),
        image_indices=np.concatenate([one.image_indices() + start for one, start in zip(columns, sizes, strict=False)]),
        bboxes=np.concatenate([one.bboxes for one in columns]),
        labels=np.concatenate(labels).astype(np.int64),
        crowd=np.concatenate([one.crowd for one in columns]),
        areas=np.concatenate([one.areas for one in columns]),
        unreadable={name: reason for one in columns for name, reason in one.unreadable.items()},
    )
    return annotations, folder


def _check_rename(rename: Mapping[str, str], categories: Sequence[Categories]) -> None:
    known = {name for one in categories for name in one.names}
    unknown = [name for name in rename if name not in known]
    if unknown:
        raise InputError(
            f"rename: {unknown[0]!r} is not a class of the members, which have {listed(sorted(known), 90)}."
        )


def _united(categories: Sequence[Categories], rename: Mapping[str, str]) -> Categories:
    """Every name once, in order of first occurrence."""
    names = tuple(dict.fromkeys(rename.get(name, name) for one in categories for name in one.names))
    return Categories(names, tuple(range(1, len(names) + 1)))

"""Semantic segmentation data in folders of images and masks, with classes of the user's own."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from typing_extensions import override

from lightning_attn.datamodules.images.files import IMAGE_SUFFIXES, ImageError, decoding
from lightning_attn.datamodules.images.folders import contents, first_duplicate, images_below, listed, read_lines
from lightning_attn.datamodules.segmentation.classes import (
    IGNORED,
    LabelMap,
    SegmentationClasses,
    distinct_colours,
    value_counts,
)
from lightning_attn.datamodules.segmentation.datamodule import (
    LabelCensus,
    LabelReader,
    SegmentationDataModule,
    SegmentationFiles,
)
from lightning_attn.errors import InputError, MissingFileError

__all__ = ["MaskLabels", "MaskValues", "SegmentationFolderDataModule"]

MaskValues = Literal["auto", "ids", "colours"]
"""How masks encode classes: `ids`, `colours`, or `auto`, which is colours for RGB files."""

Colour = tuple[int, int, int]

_LOSSY = (".jpg", ".jpeg")
_JPEG_DISTANCE = 48  # largest change of an id or a colour channel by compression
_JPEG_GAP = 16  # ids or colours that are closer than this cannot be distinguished after compression
_BLURRED_SHARE = 0.05  # largest share of a file's pixels at borders of areas


class SegmentationFolderDataModule(SegmentationDataModule):
    """Images and masks in folders or lists, with names, ids and colours of your own.

    The mask of an image has its path, but for suffixes and `mask_suffix`, relative to the folder of masks. It is a grey
    or palette image of class `ids`, or an RGB image of class `colours`; palettes and binary masks (1 bit, or 0 and 255)
    hold ids too. In JPEG masks, which compression has blurred, each pixel gets the nearest id or colour.

    Args:
        root: Folder that the other paths are relative to.
        classes: Names of the classes.
        ids: The id of each class in the masks; empty for 0, 1, 2, ...
        colours: Red, green and blue of each class, 0 to 255, in RGB masks and in pictures; empty to choose colours
            for pictures from a palette.
        ignored_ids: Ids of pixels that are ignored, such as borders.
        ignored_colours: Colours of pixels that are ignored.
        others: How all other ids and colours are treated: `error`, `ignore`, or the name of the class that they belong
            to, such as a background.
        mask_values: How masks encode classes: `ids`, `colours`, or `auto`, which is colours for RGB files.
        mask_suffix: Suffix of the stems of masks that those of their images do not have, such as `_mask`.
        batch_size: Training images in a batch on one rank.
        num_workers: Processes that make batches; 0 makes them in the training process.
        train_images: Folder of the training images, subfolders included.
        train_masks: Folder of their masks.
        train_list: A text file of the images of the split, one per line: its path relative to `train_images`, with or
            without suffix; or the paths of the image and of its mask, both relative to `root`, separated by blanks or a
            comma. "" for all images of the folder.
        val_images: Of the validation split; "" for none, unless there is a `val_list`.
        val_masks: Of the validation split; "" means `train_masks`.
        val_list: Of the validation split; with it, `val_images` may be "" and means `train_images`.
        test_images: Of the test split; "" means the validation split, unless there is a `test_list`.
        test_masks: Of the test split; "" means `train_masks`.
        test_list: Of the test split; with it, `test_images` may be "" and means `train_images`.
        crop_size: Height and width of training crops in pixels, or one number for both. Where a scaled image is
            smaller, the rest is filled and ignored. 0 means the height and width of each image.
        options: Those of `SegmentationDataModule` and `ImageDataModule`.

    Raises:
        ValueError: If a value is out of range, or classes, ids and colours do not fit each other.
    """

    def __init__(
        self,
        root: str,
        classes: tuple[str, ...],
        ids: tuple[int, ...] = (),
        colours: tuple[tuple[int, int, int], ...] = (),
        ignored_ids: tuple[int, ...] = (255,),
        ignored_colours: tuple[tuple[int, int, int], ...] = (),
        others: str = "error",
        mask_values: MaskValues = "auto",
        mask_suffix: str = "",
        batch_size: int = 2,
        num_workers: int = 0,
        train_images: str = "images/train",
        train_masks: str = "masks/train",
        train_list: str = "",
        val_images: str = "images/val",
        val_masks: str = "masks/val",
        val_list: str = "",
        test_images: str = "",
        test_masks: str = "",
        test_list: str = "",
        crop_size: int | tuple[int, int] = 0,
        **options: Any,
    ) -> None:
        given = {
            "train": (train_images, train_masks, train_list),
            "val": (val_images or (train_images if val_list else ""), val_masks or train_masks, val_list),
            "test": (test_images or (train_images if test_list else ""), test_masks or train_masks, test_list),
        }
        if not given["test"][0]:
            given["test"] = given["val"]
        names = {split: split if folder else "" for split, (folder, _, _) in given.items()}
        if not names["train"]:
            raise InputError("train_images: it is empty; give the folder of the training images below root.")
        if given["test"] == given["val"] and names["val"]:
            names["test"] = "val"
        own = _classes(classes, ids, colours)
        super().__init__(
            root,
            names,
            own,
            batch_size=batch_size,
            num_workers=num_workers,
            crop_size=crop_size,
            **options,
        )
        if mask_values not in get_args(MaskValues):
            raise InputError(f"mask_values: {mask_values!r} is unknown; give {', '.join(get_args(MaskValues))}.")
        if mask_values == "colours" and not colours:
            raise InputError("mask_values: 'colours' needs the colours of the classes (--data.colours).")
        if others not in ("error", "ignore", *own.names):
            raise InputError(
                f"others: {others!r} is neither 'error' nor 'ignore' nor a class; the classes are "
                f"{listed(own.names, 30)}."
            )
        self.mask_suffix = mask_suffix
        self._given = given
        self.reader = MaskLabels(
            own,
            has_colours=bool(colours),
            ignored_ids=tuple(ignored_ids),
            ignored_colours=tuple(map(tuple, ignored_colours)),  # type: ignore[arg-type]
            others=others,
            values_are=mask_values,
        )

    @override
    def list_files(self, split: str, *, with_labels: bool = True) -> SegmentationFiles:
        images, masks, listing = self._given[split]
        mask_names = None
        if listing:
            pairs = self._listed(split, images, listing)
        else:
            folder = self._folder(f"{split}_images", images)
            names = images_below(folder)
            if self._is_shared(images, masks):
                names, mask_names = self._divided(names)
            if not names:
                raise MissingFileError(
                    f"{split}_images: {folder} holds no image ({', '.join(IMAGE_SUFFIXES)}), but {contents(folder)}."
                )
            pairs = [(f"{images}/{name}", None) for name in names]
        if with_labels:
            found = self._masks(split, images, masks, [image for image, mask in pairs if mask is None], mask_names)
            pairs = [(image, found.get(image) if mask is None else mask) for image, mask in pairs]
        return SegmentationFiles.from_paths(
            self.root,
            [image for image, _ in pairs],
            [mask for _, mask in pairs if mask is not None] if with_labels else [],
            (self.reader,),
        )

    @override
    def encoding_hint(self, census: LabelCensus) -> str:
        if not census.unknown:
            return ""
        ids = self.classes.ids
        if ids == tuple(range(len(ids))) and str(len(ids)) in census.unknown:
            return (
                f"The ids of the {len(ids)} classes are 0 to {len(ids) - 1}, as none were given: if 0 is a background, "
                "name it first among the classes, or give the ids (--data.ids)."
            )
        return (
            "Correct ids or colours, name them in ignored_ids or ignored_colours, or say what all others are (others)."
        )

    @override
    def likely_mistake(self, census: LabelCensus) -> str:
        if set(census.values) == {0, 255} and 255 not in self.classes.ids and len(self.classes) > 1:
            return (
                "All values are 0 and 255: these are binary masks, but no class has the id 255, which is ignored. Say "
                "what they mean (--data.ids '[0, 255]')."
            )
        return ""

    def _is_shared(self, images: str, masks: str) -> bool:
        """Whether images and masks are in one folder."""
        image_folder, mask_folder = self.root / images, self.root / masks
        return image_folder.is_dir() and mask_folder.is_dir() and image_folder.samefile(mask_folder)

    def _folder(self, option: str, name: str) -> Path:
        folder = self.root / name
        if not folder.is_dir():
            above = next((parent for parent in folder.parents if parent.is_dir()), None)
            holds = "" if above is None else f"; {above} holds {contents(above)}"
            raise MissingFileError(
                f"{option}: {folder} is not a folder{holds}. Give one below root (--data.{option} FOLDER, --data.root "
                "FOLDER)."
            )
        return folder

    def _listed(self, split: str, images: str, listing: str) -> list[tuple[str, str | None]]:
        """The image of each line of a list, and its mask if the line has one."""
        path = self.root / listing
        if not path.is_file():
            raise MissingFileError(f"{split}_list: {path} does not exist. Give a text file (--data.{split}_list FILE).")
        lines = read_lines(path)
        if not lines:
            raise InputError(f"{split}_list: {path} lists no image.")
        by_stem: dict[str, str] = {}
        pairs: list[tuple[str, str | None]] = []
        for line in lines:
            columns = [one.strip() for one in line.split(",")] if "," in line else line.split()
            if len(columns) == 2 and all((self.root / one.lstrip("/")).is_file() for one in columns):
                pairs.append((columns[0].lstrip("/"), columns[1].lstrip("/")))
                continue
            if not by_stem:
                by_stem = {_stem(name): name for name in images_below(self._folder(f"{split}_images", images))}
            name = line if line in by_stem.values() else by_stem.get(line) or by_stem.get(_stem(line))
            if name is None:
                raise MissingFileError(
                    f"{split}_list: {path} lists {line!r}, which is no image of {self.root / images}, and not the "
                    "paths of an image and its mask below root."
                )
            pairs.append((f"{images}/{name}", None))
        twice = first_duplicate([image for image, _ in pairs])
        if twice is not None:
            raise InputError(f"{split}_list: {path} lists the image {twice} twice. Remove one.")
        return pairs

    def _divided(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """The images and the masks of one folder: masks have the `mask_suffix`, or are PNG files beside others.

        Raises:
            ValueError: If it is not clear which are the masks.
        """
        among = self._masks_among(names)
        return [name for name in names if name not in among], [name for name in names if name in among]

    def _masks_among(self, names: Sequence[str]) -> set[str]:
        by_stem: dict[str, list[str]] = {}
        for name in names:
            by_stem.setdefault(_stem(name), []).append(name)
        if self.mask_suffix:
            ends = len(self.mask_suffix)
            masks = [s for s in by_stem if s.endswith(self.mask_suffix) and s[:-ends] in by_stem]
            return {name for stem in masks for name in by_stem[stem]}
        found: set[str] = set()
        for stem, same in by_stem.items():
            masks = [name for name in same if name.lower().endswith(".png")]
            if len(same) > 1 and (len(masks) != 1 or len(same) != 2):
                raise InputError(
                    f"train_masks: images and masks are in one folder, and which of {listed(same, 5)} is the mask of "
                    f"{stem} is not clear. Put masks into a folder of their own, or give their names an ending of "
                    "its own (--data.mask_suffix _mask)."
                )
            found.update(masks if len(same) > 1 else ())
        return found

    def _masks(
        self, split: str, images: str, masks: str, wanted: Sequence[str], names: Sequence[str] | None
    ) -> dict[str, str]:
        """The mask of each image; `names` are those of all masks in the folder, if they are known."""
        if not wanted:
            return {}
        folder = self._folder(f"{split}_masks", masks)
        if names is None:
            names = images_below(folder)
            names = self._divided(names)[1] if self._is_shared(images, masks) else names
        by_stem: dict[str, str] = {}
        for name in names:
            if _stem(name) in by_stem:
                raise InputError(
                    f"{split}_masks: {folder} holds two masks of one name, {by_stem[_stem(name)]} and {name}. Remove "
                    "one."
                )
            by_stem[_stem(name)] = name
        found, missing = {}, []
        for image in wanted:
            stem = _stem(image.removeprefix(f"{images}/"))
            mask = by_stem.get(stem + self.mask_suffix)
            if mask is None:
                missing.append(f"{stem}{self.mask_suffix}.*")
            else:
                found[image] = f"{masks}/{mask}"
        if missing:
            raise MissingFileError(
                f"{split}_masks: {len(missing):,} of the {len(wanted):,} images have no mask in {folder}, which holds "
                f"{contents(folder)}. Missing: {listed(missing, 5)}. Copy these there, say what the names of masks end "
                f"in (--data.mask_suffix _mask), or list the images that have one (--data.{split}_list FILE)."
            )
        return found


@dataclass(frozen=True)
class MaskLabels(LabelReader):
    """Reads masks of ids or colours.

    Args:
        classes: The classes that the network learns.
        has_colours: Whether the colours of the classes are those in masks.
        ignored_ids: Numbers of pixels that do not count.
        ignored_colours: Colours of pixels that are ignored.
        others: What all other values are: `error`, `ignore`, or the name of a class.
        values_are: What masks say of a pixel.
    """

    classes: SegmentationClasses
    has_colours: bool = False
    ignored_ids: tuple[int, ...] = (255,)
    ignored_colours: tuple[Colour, ...] = ()
    others: str = "error"
    values_are: MaskValues = "auto"

    @override
    def size(self, path: Path) -> tuple[int, int]:
        with decoding(path) as image:
            self._by_colour(image, path)
            return image.height, image.width

    @override
    def values(self, path: Path) -> npt.NDArray[Any]:
        with decoding(path) as image:
            by_colour = self._by_colour(image, path)
            image.load()
            if by_colour:
                red, green, blue = (np.asarray(band, dtype=np.int32) for band in image.convert("RGB").split())
                # Above all 16-bit ids, so that no value is both an id and a colour.
                values: npt.NDArray[Any] = (red << 16) + (green << 8) + blue + _FIRST_COLOUR
            elif image.mode == "F":
                raise ImageError(f"{path} holds fractions (32-bit floats), not ids of classes. Store it as integers.")
            else:
                values = np.asarray(
                    image if image.mode in ("L", "P", "1") or image.mode[0] == "I" else image.getchannel(0)
                )
                values = values.astype(np.uint8 if image.mode in ("L", "P", "1", "LA") else np.int32)
                if values.min(initial=0) < 0 or values.max(initial=0) >= _FIRST_COLOUR:
                    raise ImageError(
                        f"{path} holds numbers from {values.min():,} to {values.max():,}; ids of classes are 0 to "
                        "65,535. Store those."
                    )
        if path.suffix.lower() in _LOSSY:
            values = self._nearest(values, path)
        return values

    @override
    def labels(self, values: npt.NDArray[Any], path: Path) -> LabelMap:
        known = self._known
        if values.dtype == np.uint8:
            table = np.full(256, self._other(), dtype=np.uint8)
            for value, label in known.items():
                if value < 256:
                    table[value] = label
            labels = np.asarray(cv2.LUT(values, table), dtype=np.uint8)
        else:
            order = np.array(sorted(known), dtype=np.int64)
            place = np.minimum(np.searchsorted(order, values), len(order) - 1)
            label_of = np.array([known[value] for value in order.tolist()], dtype=np.uint8)
            labels = np.where(order[place] == values, label_of[place], np.uint8(self._other()))
        if self.refuses_unknown:
            unknown = [self.described(value) for value in value_counts(values) if not self.is_known(value)]
            if unknown:
                raise ImageError(
                    f"{path} holds {listed(unknown, 5)}, which no class has. Correct ids or colours, name them in "
                    "ignored_ids or ignored_colours, or say what all others are (--data.others ignore, or the name of "
                    "a class)."
                )
        return labels

    @property
    @override
    def refuses_unknown(self) -> bool:
        return self.others == "error"

    @override
    def is_known(self, value: int) -> bool:
        return value in self._known or self.others not in ("error", "ignore")

    @override
    def described(self, value: int) -> str:
        if value == _BLURRED:
            return "blurred"
        if value < _FIRST_COLOUR:
            return str(value)
        value -= _FIRST_COLOUR
        return f"({value >> 16}, {value >> 8 & 255}, {value & 255})"

    def _by_colour(self, image: Image.Image, path: Path) -> bool:
        """Whether a mask encodes classes by colours."""
        is_rgb = image.mode in ("RGB", "RGBA", "CMYK", "YCbCr")
        if self.values_are == "ids":
            if is_rgb:
                raise ImageError(
                    f"{path} has pixels of {image.mode}, but mask_values is 'ids'. Give grey masks, or the colours of "
                    "the classes with mask_values 'colours'."
                )
            return False
        if self.values_are == "colours":
            return True
        if is_rgb and not self.has_colours:
            raise ImageError(
                f"{path} has pixels of {image.mode}, and the classes have no colours. Give them (--data.colours), or "
                "masks of one channel with the ids of classes."
            )
        return is_rgb

    @functools.cached_property
    def _known(self) -> dict[int, int]:
        """The label of every value, id or colour, that belongs to a class or is ignored on purpose."""
        known = {_BLURRED: IGNORED} | dict.fromkeys(self.ignored_ids, IGNORED)
        known |= {number: label for label, number in enumerate(self.classes.ids)}
        if self.has_colours:
            known |= {_packed(colour): IGNORED for colour in self.ignored_colours}
            known |= {_packed(colour): label for label, colour in enumerate(self.classes.colours)}
        return known

    def _other(self) -> int:
        return IGNORED if self.others in ("error", "ignore") else self.classes.names.index(self.others)

    def _nearest(self, values: npt.NDArray[Any], path: Path) -> npt.NDArray[Any]:
        """Values of a lossy file, each replaced by the nearest known one; a few that are far from all are ignored."""
        present, counts = np.unique(values, return_counts=True)
        of_colours = bool(len(present)) and present[0] >= _FIRST_COLOUR
        known = np.array(
            [value for value in self._known if value >= 0 and (value >= _FIRST_COLOUR) == of_colours], dtype=np.int64
        )
        if not len(known):
            return values
        gaps = np.abs(_parts(known)[:, None] - _parts(known)[None]).max(axis=2)
        close = np.argwhere(np.triu(gaps < _JPEG_GAP, k=1))
        if len(close):
            one, other = (self.described(int(known[place])) for place in close[0])
            raise ImageError(
                f"{path} is a JPEG file, whose compression blurs values, and {one} and {other} are too close to be "
                "distinguished in it. Store masks as PNG; or if they are binary, give the ids 0 and 255."
            )
        distances = np.abs(_parts(present)[:, None] - _parts(known)[None]).max(axis=2)
        far = distances.min(axis=1) > _JPEG_DISTANCE
        # Borders of areas have all values in between; many of them mean a class that is missing here.
        blurred = _BLURRED if counts[far].sum() <= _BLURRED_SHARE * values.size else present
        moved = np.where(far, blurred, known[distances.argmin(axis=1)])
        return np.asarray(moved[np.searchsorted(present, values)], dtype=np.int64)


_FIRST_COLOUR = 1 << 16
_BLURRED = -1


def _packed(colour: Colour) -> int:
    red, green, blue = colour
    return _FIRST_COLOUR + (red << 16) + (green << 8) + blue


def _parts(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Red, green and blue of packed colours, or the ids themselves, `[n, 1 or 3]`."""
    values = values.astype(np.int64)
    if len(values) and values[0] < _FIRST_COLOUR:
        return values[:, None]
    values = values - _FIRST_COLOUR
    return np.stack([values >> 16, values >> 8 & 255, values & 255], axis=1)


def _classes(names: Sequence[str], ids: Sequence[int], colours: Sequence[Sequence[int]]) -> SegmentationClasses:
    if not names:
        raise InputError("classes: the list is empty; give the names of the classes (--data.classes '[road, sky]').")
    for what, values in (("ids", ids), ("colours", colours)):
        if values and len(values) != len(names):
            raise InputError(f"{what}: there are {len(values)} for {len(names)} classes; give one for each.")
    for number in ids:
        if not isinstance(number, int) or isinstance(number, bool):
            raise InputError(f"ids: {number!r} is not an integer; give the ids of the classes in the masks.")
    for colour in colours:
        if len(colour) != 3 or not all(isinstance(part, int) and 0 <= part <= 255 for part in colour):
            raise InputError(f"colours: {list(colour)} must be red, green and blue from 0 to 255.")
    twice = [colour for place, colour in enumerate(colours) if colour in colours[:place]]
    if twice:
        raise InputError(f"colours: two classes have {list(twice[0])}; give each its own.")
    shown = distinct_colours([tuple(map(int, colour)) for colour in colours] or [None] * len(names))  # type: ignore[misc]
    return SegmentationClasses(tuple(names), tuple(ids) or tuple(range(len(names))), shown)


def _stem(path: str) -> str:
    """A path without the suffix of an image."""
    suffix = Path(path).suffix
    return path[: -len(suffix)] if suffix.lower() in IMAGE_SUFFIXES else path

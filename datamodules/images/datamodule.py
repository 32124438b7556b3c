"""Base of the DataModules of images: splits, the splits that a stage needs, and loaders."""

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_attn.datamodules.images.batches import BadImage, BadImagePolicy, ImageDataset
from lightning_attn.datamodules.images.files import ExifPolicy
from lightning_attn.datamodules.sampling.grouped_batches import evaluation_loader, training_loader
from lightning_attn.errors import InputError

STAGE_SPLITS: Mapping[str, tuple[str, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}
"""The splits that a stage reads."""


def require_at_least(name: str, value: int, least: int) -> None:
    """Refuses an argument of a DataModule that is below a bound.

    Raises:
        ValueError: If it is less than `least`.
    """
    if value < least:
        raise InputError(f"{name}: {value} is too small; give {least} or more (--data.{name} {least}).")


class ImageDataModule(pl.LightningDataModule, abc.ABC):
    """Base of the DataModules of images.

    A subclass reads the files of a stage in `setup`, and then returns the data sets of its splits.

    Args:
        root: Folder of the data.
        split_names: Names of the splits "train", "val" and "test". That of "val" may be "" for no validation, and
            that of "test" to use the validation split.
        batch_size: Training images in a batch on one rank.
        num_workers: Processes that make batches; 0 makes them in the training process.
        seed: Seed, with the epoch, of the order of samples and batches and of the random changes.
        eval_batch_size: Images in a batch of validation, test and prediction; 0 means `batch_size`.
        predict_folder: Folder of images for prediction, subfolders included; "" means the test split.
        exif: How the orientation in the EXIF data of photos is treated: `apply` turns images upright, as annotation
            tools show them, where that fits the annotated size; `ignore` takes the pixels as they are stored.
        on_bad_image: How a file that cannot be used is treated: `stop` with an error that names it, or `skip` it and
            log it. Prediction always skips it, and lists it at the end.

    Attributes:
        usual_size: Height and width of the largest images, of data whose images are all alike; None for others.

    Raises:
        ValueError: If a value is out of range, or no split is named.
    """

    usual_size: ClassVar[tuple[int, int] | None] = None

    def __init__(
        self,
        root: str,
        split_names: Mapping[str, str],
        *,
        batch_size: int = 2,
        num_workers: int = 0,
        seed: int = 0,
        eval_batch_size: int = 0,
        predict_folder: str = "",
        exif: ExifPolicy = "apply",
        on_bad_image: BadImagePolicy = "stop",
    ) -> None:
        super().__init__()
        require_at_least("batch_size", batch_size, 1)
        require_at_least("num_workers", num_workers, 0)
        require_at_least("seed", seed, 0)
        require_at_least("eval_batch_size", eval_batch_size, 0)
        for split, name in split_names.items():
            if (not name and split == "train") or "/" in name or "\\" in name or name in (".", ".."):
                raise InputError(
                    f"{split}_split: {name!r} is not the name of a split; give that of a folder of images, such as "
                    f"those in root (--data.{split}_split NAME)."
                )
        self.root = Path(root)
        self.split_names = {split: name or split_names["val"] for split, name in split_names.items()}
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.eval_batch_size = eval_batch_size or batch_size
        self.predict_folder = predict_folder
        for name, value, known in (
            ("exif", exif, get_args(ExifPolicy)),
            ("on_bad_image", on_bad_image, get_args(BadImagePolicy)),
        ):
            if value not in known:
                raise InputError(f"{name}: {value!r} is unknown; give {' or '.join(known)} (--data.{name} {known[0]}).")
        self.exif: ExifPolicy = exif
        self.on_bad_image: BadImagePolicy = on_bad_image

    @property
    def preprocessing(self) -> dict[str, int | str]:
        """The preprocessing of every image, by arguments of the DataModule."""
        return {"exif": self.exif}

    @property
    def has_test_split(self) -> bool:
        """Whether there is a test split that is not the validation split."""
        return self.split_names["test"] not in ("", self.split_names["val"])

    @property
    def unreadable(self) -> list[BadImage]:
        """Images that `setup` left out because not even their size can be read."""
        return []

    def splits_of(self, stage: str) -> list[str]:
        """The splits that a stage reads, by `STAGE_SPLITS`; logs that a test is of the validation split.

        Raises:
            ValueError: If the stage needs a split that is not named.
        """
        splits = [split for split in STAGE_SPLITS[stage] if self.split_names.get(split, "-") or stage != "fit"]
        for split in splits:
            role = "test" if split == "predict" and not self.predict_folder else split
            if not self.split_names.get(role, "-"):
                name = getattr(stage, "value", stage)  # Lightning's enumeration prints as its member's name
                raise InputError(
                    f"{role}_split: it is empty, and {name} needs it. Name a split (--data.{role}_split NAME)."
                )
        if stage == "test" and not self.has_test_split:
            rank_zero_info(
                "There is no test split: these are scores of the validation split, by which best.ckpt was chosen."
            )
        return splits

    @abc.abstractmethod
    def training_dataset(self) -> ImageDataset[Any]:
        """The training images, randomly changed; call `setup` first."""

    @abc.abstractmethod
    def evaluation_dataset(self, split: str) -> ImageDataset[Any]:
        """All images of "val", "test" or "predict" (without targets); call `setup` first."""

    def prepare_files(self, splits: Sequence[str]) -> None:
        """Downloads or generates files in `root`, if a subclass does so; runs in one process per node.

        Args:
            splits: Names of the splits that are needed.

        Raises:
            OSError: If a file cannot be downloaded or written.
            ValueError: If there is no such split.
        """

    @override
    def prepare_data(self) -> None:
        function = None if self.trainer is None else self.trainer.state.fn
        stages = STAGE_SPLITS if function is None else [function.value]
        needed = {split for stage in stages for split in STAGE_SPLITS[stage]}
        if "predict" in needed:
            needed.remove("predict")
            needed |= set() if self.predict_folder else {"test"}
        self.prepare_files(sorted({self.split_names[split] for split in needed} - {""}))

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return training_loader(
            self, self.training_dataset(), batch_size=self.batch_size, num_workers=self.num_workers, seed=self.seed
        )

    @override
    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._evaluation_loader("val") if self.split_names["val"] else []

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluation_loader("test")

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        return self._evaluation_loader("predict")

    def _evaluation_loader(self, split: str) -> DataLoader[Any]:
        return evaluation_loader(
            self, self.evaluation_dataset(split), batch_size=self.eval_batch_size, num_workers=self.num_workers
        )

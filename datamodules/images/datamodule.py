"""What the DataModules of images share: splits, what a stage needs of them, and loaders."""

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info
from torch.utils.data import DataLoader

from datamodules.images.batches import BadImage, BadImagePolicy, ImageDataset
from datamodules.images.files import ExifPolicy
from datamodules.sampling.grouped_batches import evaluation_loader, training_loader
from lightning_attn.errors import InputError

STAGE_SPLITS: Mapping[str, tuple[str, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}
"""The splits that a stage reads."""


def check_least(name: str, value: int, least: int) -> None:
    """Refuses an argument of a DataModule that is too small.

    Raises:
        ValueError: If it is less than `least`.
    """
    if value < least:
        raise InputError(f"{name}: {value} is too small; give {least} or more (--data.{name} {least}).")


class ImageDataModule(pl.LightningDataModule, abc.ABC):
    """Base of the DataModules of images.

    A subclass reads the files of a stage in `setup`, and then gives the data sets of its splits.

    Args:
        root: Folder of the data.
        split_names: Names of the splits "train", "val" and "test". That of "val" may be "" for none, and that of "test"
            for the one of "val".
        batch_size: Training images in a batch on one rank.
        num_workers: Processes that make batches; 0 makes them in the training process.
        seed: Decides, with the epoch, what is in a batch, the order of batches and the random changes.
        eval_batch_size: Images in a batch of validation, test and prediction; 0 means `batch_size`.
        predict_folder: Folder of images for prediction, with those of the folders in it; "" means the test split.
        exif: What is done about the orientation in the EXIF data of photos: `apply` turns images upright, as annotation
            tools show them, wherever that fits the annotated size; `ignore` takes the pixels as they are stored.
        on_bad_image: What is done about a file that cannot be used: `stop` with its name, or `skip` it and say so.
            Prediction always skips it, and lists it at the end.

    Raises:
        ValueError: If a value is out of range, or no split is named.
    """

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
        check_least("batch_size", batch_size, 1)
        check_least("num_workers", num_workers, 0)
        check_least("seed", seed, 0)
        check_least("eval_batch_size", eval_batch_size, 0)
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
        """What is done to every image before the network sees it, by arguments of the DataModule."""
        return {"exif": self.exif}

    @property
    def has_test_split(self) -> bool:
        """Whether there is a test split beside that of validation."""
        return self.split_names["test"] not in ("", self.split_names["val"])

    @property
    def unreadable(self) -> list[BadImage]:
        """Images of the splits that were set up which are left out, since not even their size can be read."""
        return []

    def splits_of(self, stage: str) -> list[str]:
        """The splits that a stage reads, those of `STAGE_SPLITS`; says so where a training has no validation.

        Raises:
            ValueError: If the stage needs a split that is not named.
        """
        splits = [split for split in STAGE_SPLITS[stage] if self.split_names.get(split, "-") or stage != "fit"]
        for split in splits:
            role = "test" if split == "predict" and not self.predict_folder else split
            if not self.split_names.get(role, "-"):
                raise InputError(
                    f"{role}_split: there is none, and {stage} needs it. Name one (--data.{role}_split NAME)."
                )
        if stage == "fit" and "val" not in splits:
            rank_zero_info("There is no validation split: best.ckpt is not written, and last.ckpt is the result.")
        if stage == "test" and not self.has_test_split:
            rank_zero_info(
                "There is no test split: these are scores of the validation split, by which best.ckpt was chosen."
            )
        return splits

    @abc.abstractmethod
    def training_dataset(self) -> ImageDataset[Any]:
        """The training images, randomly changed; there after `setup`."""

    @abc.abstractmethod
    def evaluation_dataset(self, split: str) -> ImageDataset[Any]:
        """All images of "val", "test" or "predict" (which has nothing but images); there after `setup`."""

    def prepare_files(self, splits: Sequence[str]) -> None:
        """Puts files into `root` where they have to be fetched or made; runs on one process a node.

        Args:
            splits: Names of the splits that are needed.
        """

    def prepare_data(self) -> None:
        """Fetches or makes what the trainer's stage needs, where a subclass does so.

        Raises:
            OSError: If it cannot be fetched or written.
            ValueError: If there is no such split.
        """
        function = None if self.trainer is None else self.trainer.state.fn
        stages = STAGE_SPLITS if function is None else [function.value]
        needed = {split for stage in stages for split in STAGE_SPLITS[stage]}
        if "predict" in needed:
            needed.remove("predict")
            needed |= set() if self.predict_folder else {"test"}
        self.prepare_files(sorted({self.split_names[split] for split in needed} - {""}))

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of training images of one group each, randomly changed."""
        return training_loader(
            self, self.training_dataset(), batch_size=self.batch_size, num_workers=self.num_workers, seed=self.seed
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Batches of all validation images, once each; no loader where there is no validation split."""
        return self._evaluation_loader("val") if self.split_names["val"] else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of all test images, once each."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the images of `predict_folder`, or of the test split, and nothing but images."""
        return self._evaluation_loader("predict")

    def _evaluation_loader(self, split: str) -> DataLoader[Any]:
        return evaluation_loader(
            self, self.evaluation_dataset(split), batch_size=self.eval_batch_size, num_workers=self.num_workers
        )

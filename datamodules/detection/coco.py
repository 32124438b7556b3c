"""Object detection data in the layout of COCO, or as tools export it: annotation files beside folders of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_attn.datamodules.detection.annotations import Categories, DetectionAnnotations
from lightning_attn.datamodules.detection.coco_files import read_coco
from lightning_attn.datamodules.detection.datamodule import DetectionDataModule
from lightning_attn.datamodules.images.folders import contents
from lightning_attn.errors import InputError, MissingFileError

__all__ = ["COCODataModule"]

_ROBOFLOW_FILE = "_annotations.coco.json"


class COCODataModule(DetectionDataModule):
    """COCO, or any other detection data with annotations in COCO's format.

    The files of a split are those of the first of these that exist:

    - by the options: `train_annotations` and `train_images`, and so for the other splits;
    - COCO's own layout: `root/annotations/instances_{split}.json` and the images in `root/{split}/`;
    - Roboflow's: `root/{split}/_annotations.coco.json`, and the images beside it. The root category that Roboflow adds
      is left out where nothing is annotated with it.

    Args:
        root: Folder of the data.
        batch_size: Training images in a batch on one rank.
        num_workers: Processes that make batches; 0 makes them in the training process.
        train_split: Name of the training split.
        val_split: Name of the validation split; "" for none.
        test_split: Name of the test split; "" means the validation split, as the boxes of COCO's own are not public.
        download: Fetches COCO 2017 into `root` first.
        train_annotations: Annotation file of the training split, below `root` or anywhere; "" for those of the layouts.
        train_images: Folder of its images, likewise.
        val_annotations: Of the validation split.
        val_images: Of the validation split.
        test_annotations: Of the test split.
        test_images: Of the test split.
        options: Those of `DetectionDataModule` and `ImageDataModule`.

    Raises:
        ValueError: If a value is out of range, or no split is named.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 2,
        num_workers: int = 0,
        train_split: str = "train2017",
        val_split: str = "val2017",
        test_split: str = "",
        download: bool = False,
        train_annotations: str = "",
        train_images: str = "",
        val_annotations: str = "",
        val_images: str = "",
        test_annotations: str = "",
        test_images: str = "",
        **options: Any,
    ) -> None:
        given = {
            "train": (train_annotations, train_images),
            "val": (val_annotations, val_images),
            "test": (test_annotations, test_images),
        }
        for split, (annotations, images) in given.items():
            if bool(annotations) != bool(images):
                named, missing = ("annotations", "images") if annotations else ("images", "annotations")
                raise InputError(
                    f"{split}_{missing}: it is empty, but {split}_{named} is given; a split needs both "
                    f"(--data.{split}_{missing} PATH)."
                )
        super().__init__(
            root,
            {"train": train_split, "val": val_split, "test": test_split or ("test" if test_annotations else "")},
            batch_size=batch_size,
            num_workers=num_workers,
            **options,
        )
        self.download = download
        # The validation split serves as test split.
        if not test_split and not test_annotations:
            given["test"] = given["val"]
        self._given = given

    @override
    def prepare_files(self, splits: Sequence[str]) -> None:
        if self.download:
            from lightning_attn.datamodules.downloads.coco import download_coco

            download_coco(self.root, splits)

    @override
    def read_split(self, split: str) -> tuple[DetectionAnnotations, Path]:
        path, folder = self._files(split)
        for needed, exists in ((path, path.is_file()), (folder, folder.is_dir())):
            if not exists:
                self._raise_missing(split, needed)
        return read_coco(path, drop_root=path.name == _ROBOFLOW_FILE), folder

    @override
    def read_categories(self) -> Categories | None:
        """Those of the validation split."""
        path, _ = self._files("val" if self.split_names["val"] else "train")
        return read_coco(path, drop_root=path.name == _ROBOFLOW_FILE).categories if path.is_file() else None

    def _files(self, split: str) -> tuple[Path, Path]:
        """Annotation file and folder of images of a split, which may not exist."""
        annotations, images = self._given[split]
        if annotations:
            return self.root / annotations, self.root / images
        name = self.split_names[split]
        official = self.root / "annotations" / f"instances_{name}.json"
        roboflow = self.root / name / _ROBOFLOW_FILE
        if not official.is_file() and roboflow.is_file():
            return roboflow, roboflow.parent
        return official, self.root / name

    def _raise_missing(self, split: str, path: Path) -> None:
        if not self.root.is_dir():
            raise MissingFileError(
                f"root: the folder {self.root} does not exist. Give the folder that holds annotations/ and the images "
                "(--data.root FOLDER), or fetch COCO 2017 into it (--data.download true)."
            )
        roboflow = sorted(one.parent.name for one in self.root.glob(f"*/{_ROBOFLOW_FILE}"))
        if roboflow:
            raise MissingFileError(
                f"{split}_split: {self.root} is a Roboflow export with the splits {', '.join(roboflow)}, and has no "
                f"{self.split_names[split]!r}. Name one of them (--data.{split}_split NAME)"
                + (', or "" for none.' if split == "val" else ".")
            )
        found = f"{self.root} holds {contents(self.root)}"
        if path.parent.is_dir() and path.parent != self.root:
            found = f"{path.parent} holds {contents(path.parent)}"
        raise MissingFileError(
            f"{split}_split: {path} does not exist; {found}. Give the folder that holds annotations/ and the images "
            f"(--data.root FOLDER) and the name of a split in it (--data.{split}_split NAME), or the files themselves "
            f"(--data.{split}_annotations FILE --data.{split}_images FOLDER), or fetch COCO 2017 (--data.download "
            "true)"
            + ('. Training without validation: --data.val_split "".' if split == "val" else ".")
            + " Data in other formats have DataModules of their own: VOCDetectionDataModule, YOLODetectionDataModule."
        )

"""Object detection data in the layout of COCO: `root/annotations/instances_{split}.json` and `root/{split}/`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from pytorch_lightning.utilities import rank_zero_info
from torch import LongTensor, Tensor

from datamodules.detection.annotations import (
    Categories,
    CocoAnnotations,
    Integers,
    check_categories,
    check_images,
    of_image,
)
from datamodules.detection.transforms import Augmentation, EvaluationTransform, TrainingTransform
from datamodules.images.datamodule import STAGE_SPLITS, ImageDataModule, check_least
from datamodules.images.files import channels_first, read_image
from datamodules.images.folders import contents, listed
from datamodules.images.sampling import Draw, ImageBatch, ImageDataset
from datamodules.token_cache import user_cache_folder

__all__ = ["COCODataModule", "Categories", "DetectionBatch", "DetectionDataset", "MiniatureDetectionDataModule"]


@dataclass
class DetectionBatch(ImageBatch):
    """Images, each of its own size, and what is to be found in them. It may hold no image.

    Args:
        ids: Image ids, `[B]`.
        images: RGB images as the network gets them, uint8 `[3, H, W]` each.
        targets: For each image `boxes`, float32 `[n, 4]` (x1, y1, x2, y2) in pixels of that image, and `labels`,
            `[n]` in 1..K; no entries at all in prediction.
        sizes: Height and width of each image before it was resized, `[B, 2]`.
        names: File names, below the folder of the split.
    """

    targets: list[dict[str, Tensor]]
    sizes: LongTensor
    names: list[str] = field(default_factory=list)


class DetectionDataset(ImageDataset[DetectionBatch]):
    """Images and their boxes, read and transformed a batch at a time.

    Args:
        annotations: What there is.
        folder: Where the images are.
        transform: What is done to each image.
        chosen: Numbers of the images in `annotations` that this data set holds, `[images]`.
        seed: What random changes start from, together with the epoch and the image.
        with_targets: Whether batches hold boxes.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        folder: Path,
        transform: TrainingTransform | EvaluationTransform,
        chosen: Integers,
        *,
        seed: int = 0,
        with_targets: bool = True,
    ) -> None:
        self.annotations = annotations
        self.folder = folder
        self.transform = transform
        self.chosen = chosen
        self.seed = seed
        self.with_targets = with_targets

    def __len__(self) -> int:
        return len(self.chosen)

    def groups(self) -> Integers:
        """1 for wide images and 0 for tall ones, `[images]`."""
        sizes = self.annotations.sizes[self.chosen]
        return np.asarray(sizes[:, 1] >= sizes[:, 0], dtype=np.int64)

    def batch(self, draws: Sequence[Draw]) -> DetectionBatch:
        """One batch.

        Raises:
            ImageError: If an image cannot be used; the message names the file and the image id.
            OSError: If a file cannot be read.
        """
        annotations = self.annotations
        chosen = [int(self.chosen[draw.image]) for draw in draws]
        images, targets = [], []
        for index, draw in zip(chosen, draws, strict=True):
            pixels = of_image(annotations, index, read_image, self.folder)
            boxes, labels = annotations.targets(index)
            pixels, boxes, labels = self.transform(pixels, boxes, labels, (self.seed, draw.epoch, index))
            images.append(channels_first(pixels))
            targets.append({"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)})
        return DetectionBatch(
            torch.from_numpy(annotations.image_ids[chosen]),  # type: ignore[arg-type]
            images,
            targets if self.with_targets else [],
            torch.from_numpy(annotations.sizes[chosen]),  # type: ignore[arg-type]
            [annotations.names[index] for index in chosen],
        )


class COCODataModule(ImageDataModule):
    """COCO, or any other detection data in the same layout.

    `root` holds `annotations/instances_{split}.json` and, for each split, a folder of images. Training targets are the
    boxes of single things, cut at the borders of their image; crowds, and boxes without an area inside the image, are
    none. Evaluation reads every annotation.

    Train with `Trainer(use_distributed_sampler=False)`: batches are planned here for all ranks.

    Args:
        root: Folder of the data.
        batch_size: Training images in a batch on one rank.
        num_workers: Processes that make batches; 0 makes them in the training process.
        train_split: Name of the training split.
        val_split: Name of the validation split.
        test_split: Name of the test split; "" means the validation split, as the boxes of COCO's own are not public.
        min_size: Length of the short side that images are resized to, in pixels; 0 leaves images as they are unless
            they are longer than `max_size`.
        max_size: Bound of the long side; 0 for none.
        augmentation: What is changed at random in training images.
        keep_empty: Whether training images without a box are used.
        seed: Decides, with the epoch, what is in a batch, the order of batches and the random changes.
        eval_batch_size: Images in a batch of validation, test and prediction; 0 means `batch_size`.
        download: Fetches COCO 2017 into `root` first.
        predict_folder: Folder of images for prediction; "" means the test split.

    Raises:
        ValueError: If a number is out of range, or no split is named.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 2,
        num_workers: int = 0,
        train_split: str = "train2017",
        val_split: str = "val2017",
        test_split: str = "",
        min_size: int = 800,
        max_size: int = 1333,
        augmentation: Augmentation = Augmentation(),  # noqa: B008 (frozen)
        keep_empty: bool = False,
        seed: int = 0,
        eval_batch_size: int = 0,
        download: bool = False,
        predict_folder: str = "",
    ) -> None:
        super().__init__(
            root,
            {"train": train_split, "val": val_split, "test": test_split},
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            eval_batch_size=eval_batch_size,
            predict_folder=predict_folder,
        )
        check_least("min_size", min_size, 0)
        check_least("max_size", max_size, 0)
        self.min_size = min_size
        self.max_size = max_size
        self.augmentation = augmentation
        self.keep_empty = keep_empty
        self.download = download
        self._annotations: dict[str, CocoAnnotations] = {}
        self._categories: Categories | None = None

    @property
    def categories(self) -> Categories | None:
        """What is annotated; there after `setup`, and None where a folder is predicted and `root` has no annotations.

        Raises:
            RuntimeError: Before `setup`.
        """
        if not self._annotations:
            raise RuntimeError("the categories are there after setup(); the Trainer calls it, or do so yourself.")
        return self._categories

    @property
    def preprocessing(self) -> dict[str, int]:
        """The lengths that images are resized to."""
        return {"min_size": self.min_size, "max_size": self.max_size}

    def ground_truth(self, split: str) -> dict[str, Any]:
        """What COCO's scorer reads: `images`, `annotations` and `categories`.

        Args:
            split: "train", "val" or "test".

        Raises:
            RuntimeError: If `setup` has not read that split.
        """
        if split not in self.split_names or self.split_names[split] not in self._annotations:
            raise RuntimeError(f"the annotations of {split!r} are there after setup() of its stage.")
        return self._annotations[self.split_names[split]].ground_truth()

    def prepare_files(self, splits: Sequence[str]) -> None:
        """Fetches COCO 2017, if asked to.

        Args:
            splits: Names of the splits that are needed.

        Raises:
            OSError: If it cannot be fetched or written.
            ValueError: If COCO 2017 has no such split.
        """
        if self.download:
            from datamodules.detection.coco_sources import download_coco

            download_coco(self.root, splits)

    def setup(self, stage: str) -> None:
        """Reads and checks the annotations that a stage needs, and what can be told of the images without decoding.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            FileNotFoundError: If annotations or images are missing.
            ValueError: On bad annotations or images; the message names the file and the entry or image id.
        """
        for split in STAGE_SPLITS[stage]:
            if split == "predict" and self.predict_folder:
                self._annotations[""] = CocoAnnotations.from_folder(Path(self.predict_folder))
                path = self._annotation_path("val")
                if self._categories is None and path.is_file():
                    self._categories = CocoAnnotations.read(path).categories
            elif split == "predict":
                self._load("test")
            else:
                self._load(split)
        if stage == "fit":
            self._check_training()

    def training_dataset(self) -> DetectionDataset:
        """The training images, randomly changed, in groups of wide and of tall ones."""
        annotations = self._annotations[self.split_names["train"]]
        return DetectionDataset(
            annotations,
            self.root / self.split_names["train"],
            TrainingTransform(self.augmentation, self.min_size, self.max_size),
            np.arange(len(annotations)) if self.keep_empty else annotations.with_targets(),
            seed=self.seed,
        )

    def evaluation_dataset(self, split: str) -> DetectionDataset:
        """All images of "val", "test" or "predict", resized; without targets in prediction."""
        of_folder = split == "predict" and self.predict_folder
        name = "" if of_folder else self.split_names["test" if split == "predict" else split]
        annotations = self._annotations[name]
        return DetectionDataset(
            annotations,
            Path(self.predict_folder) if of_folder else self.root / name,
            EvaluationTransform(self.min_size, self.max_size),
            np.arange(len(annotations)),
            with_targets=split != "predict",
        )

    def browse_figure(self, split: str, num: int) -> Figure:
        """A sheet of the first `num` images of a split as the network gets them, with their boxes.

        Args:
            split: "train", "val", "test" or "predict".
            num: Most images to show.
        """
        from datamodules.browse import draw_detection_sheet, split_loader

        loader = split_loader(self, split)
        names = self.categories.names if self.categories is not None else ()
        return draw_detection_sheet(loader, num, names, f"{split} images of {self.root}")

    def _annotation_path(self, split: str) -> Path:
        return self.root / "annotations" / f"instances_{self.split_names[split]}.json"

    def _load(self, split: str) -> None:
        name = self.split_names[split]
        if name in self._annotations:
            return
        path, folder = self._annotation_path(split), self.root / name
        for needed, there in ((path, path.is_file()), (folder, folder.is_dir())):
            if not there:
                self._raise_missing(split, needed)
        annotations = CocoAnnotations.read(path)
        if self._categories is None:
            self._categories = annotations.categories
        check_categories(annotations, self._categories)
        check_images(annotations, folder)
        self._annotations[name] = annotations
        rank_zero_info(
            f"{name}: {len(annotations):,} images, {len(annotations.labels):,} annotations, "
            f"{len(annotations.categories)} categories ({path})"
        )

    def _raise_missing(self, split: str, path: Path) -> None:
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"root: the folder {self.root} does not exist. Give the folder that holds annotations/ and the images "
                "(--data.root FOLDER), or fetch COCO 2017 into it (--data.download true)."
            )
        there = f"{self.root} holds {contents(self.root)}"
        if path.parent.is_dir() and path.parent != self.root:
            there = f"{path.parent} holds {contents(path.parent)}"
        raise FileNotFoundError(
            f"{split}_split: {path} is not there; {there}. Give the folder that holds annotations/ and the images "
            f"(--data.root FOLDER) and the name of a split in it (--data.{split}_split NAME), or fetch COCO 2017 "
            "(--data.download true)."
        )

    def _check_training(self) -> None:
        """Says what is left out of training, and refuses data that nothing can be learnt from."""
        annotations = self._annotations[self.split_names["train"]]
        usable = annotations.usable()
        if not usable.any():
            found = f"{len(annotations.labels)} annotations, but no box of a single thing with an area in its image"
            raise ValueError(
                f"{annotations.path} has {found if len(annotations.labels) else 'no annotation'}: there is nothing to "
                "learn from. Give another training split (--data.train_split NAME)."
            )
        flat = (annotations.bboxes[:, 2:] <= 0).any(axis=1)
        outside = ~usable & ~flat & ~annotations.crowd
        left_out = [f"{int(annotations.crowd.sum()):,} crowds"]
        for what, which in (("without area", flat & ~annotations.crowd), ("outside of their image", outside)):
            ids = annotations.annotation_ids[which]
            left_out.append(f"{len(ids):,} boxes {what}" + (f" (annotations {listed(ids, 5)})" if len(ids) else ""))
        empty = len(annotations) - len(annotations.with_targets())
        left_out.append(f"{empty:,} images without a box" + (" (kept)" if self.keep_empty else ""))
        rank_zero_info(f"{self.split_names['train']}: left out of training: {', '.join(left_out)}")


class MiniatureDetectionDataModule(COCODataModule):
    """A small detection set drawn on the spot, without a network.

    It is written in the layout of COCO into `root`, by default a folder of the user's cache, and read like any other.
    Images are not resized. See `COCODataModule` for the arguments.
    """

    def __init__(
        self,
        root: str = "",
        batch_size: int = 8,
        num_workers: int = 0,
        min_size: int = 0,
        max_size: int = 0,
        augmentation: Augmentation = Augmentation(),  # noqa: B008 (frozen)
        keep_empty: bool = False,
        seed: int = 0,
        eval_batch_size: int = 0,
        predict_folder: str = "",
    ) -> None:
        super().__init__(
            root=root or str(user_cache_folder() / "miniature_detection"),
            batch_size=batch_size,
            num_workers=num_workers,
            test_split="test2017",
            min_size=min_size,
            max_size=max_size,
            augmentation=augmentation,
            keep_empty=keep_empty,
            seed=seed,
            eval_batch_size=eval_batch_size,
            predict_folder=predict_folder,
        )

    def prepare_files(self, splits: Sequence[str]) -> None:
        """Draws the set, all of it."""
        from datamodules.miniature_detection import write_miniature_detection

        write_miniature_detection(self.root)

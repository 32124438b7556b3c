"""The miniature streets with boxes as a DataModule."""

from collections.abc import Sequence

from typing_extensions import override

from datamodules.detection.annotations import Categories
from datamodules.detection.coco import COCODataModule
from datamodules.detection.transforms import Augmentation
from datamodules.machine import user_cache_folder
from datamodules.miniature.painting import HEIGHT, WIDTH
from datamodules.miniature.segmentation import COUNTABLE
from datamodules.miniature.street_detection import write_miniature_street_detection

__all__ = ["MiniatureStreetDetectionDataModule"]


class MiniatureStreetDetectionDataModule(COCODataModule):
    """The streets of `MiniatureSegmentationDataModule` with boxes: a small detection set that is generated.

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
            root=root or str(user_cache_folder() / "miniature_street_detection"),
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

    usual_size = (HEIGHT, WIDTH)

    @override
    def read_categories(self) -> Categories:
        """Those that are drawn, whether or not the set is there."""
        return Categories(tuple(COUNTABLE.values()), tuple(COUNTABLE))

    @override
    def prepare_files(self, splits: Sequence[str]) -> None:
        write_miniature_street_detection(self.root)

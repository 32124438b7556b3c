"""The miniature detection set as a DataModule."""

from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import override

from lightning_attn.datamodules.detection.annotations import Categories
from lightning_attn.datamodules.detection.coco import COCODataModule
from lightning_attn.datamodules.detection.transforms import Augmentation
from lightning_attn.datamodules.machine import user_cache_folder
from lightning_attn.datamodules.miniature.detection import MINIATURE_CATEGORIES, write_miniature_detection

__all__ = ["MiniatureDetectionDataModule"]


class MiniatureDetectionDataModule(COCODataModule):
    """A small detection set that is generated, without downloads.

    It is written in the layout of COCO into `root`, by default a folder of the user's cache, and read like any other.
    Images are not resized. See `COCODataModule` for the arguments.

    Attributes:
        folder_name: Of the set in the cache.
    """

    folder_name: ClassVar[str] = "miniature_detection"

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
            root=root or str(user_cache_folder() / self.folder_name),
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

    usual_size = (160, 192)

    @override
    def read_categories(self) -> Categories:
        """Those that are drawn, whether or not the set is there."""
        return Categories(tuple(MINIATURE_CATEGORIES), tuple(MINIATURE_CATEGORIES.values()))

    @override
    def prepare_files(self, splits: Sequence[str]) -> None:
        write_miniature_detection(self.root)

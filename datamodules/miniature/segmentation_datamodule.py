"""The miniature segmentation set as a DataModule."""

from collections.abc import Sequence

from typing_extensions import override

from lightning_attn.datamodules.machine import user_cache_folder
from lightning_attn.datamodules.miniature.painting import HEIGHT, WIDTH
from lightning_attn.datamodules.miniature.segmentation import MINIATURE_CLASSES, write_miniature_segmentation
from lightning_attn.datamodules.segmentation.cityscapes import CityscapesDataModule
from lightning_attn.datamodules.segmentation.transforms import SegmentationAugmentation

__all__ = ["MiniatureSegmentationDataModule"]


class MiniatureSegmentationDataModule(CityscapesDataModule):
    """A small segmentation set that is generated, without downloads.

    It is written in the layout of Cityscapes into `root`, by default a folder of the user's cache, and read like any
    other. Its classes are those that it shows. See `CityscapesDataModule` for the arguments.
    """

    def __init__(
        self,
        root: str = "",
        batch_size: int = 8,
        num_workers: int = 0,
        classes: tuple[str, ...] = (),
        crop_size: int | tuple[int, int] = 0,
        augmentation: SegmentationAugmentation = SegmentationAugmentation(),  # noqa: B008 (frozen)
        seed: int = 0,
        eval_batch_size: int = 0,
        predict_folder: str = "",
    ) -> None:
        super().__init__(
            root=root or str(user_cache_folder() / "miniature_segmentation"),
            batch_size=batch_size,
            num_workers=num_workers,
            test_split="test",
            classes=classes or MINIATURE_CLASSES,
            crop_size=crop_size,
            augmentation=augmentation,
            seed=seed,
            eval_batch_size=eval_batch_size,
            predict_folder=predict_folder,
        )

    usual_size = (HEIGHT, WIDTH)

    @override
    def prepare_files(self, splits: Sequence[str]) -> None:
        write_miniature_segmentation(self.root)

"""The miniature streets with boxes as a DataModule."""

from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import override

from lightning_attn.datamodules.detection.annotations import Categories
from lightning_attn.datamodules.miniature.detection_datamodule import MiniatureDetectionDataModule
from lightning_attn.datamodules.miniature.painting import HEIGHT, WIDTH
from lightning_attn.datamodules.miniature.segmentation import COUNTABLE
from lightning_attn.datamodules.miniature.street_detection import write_miniature_street_detection

__all__ = ["MiniatureStreetDetectionDataModule"]


class MiniatureStreetDetectionDataModule(MiniatureDetectionDataModule):
    """The streets of `MiniatureSegmentationDataModule` with boxes: a small detection set that is generated.

    It is written and read as `MiniatureDetectionDataModule` is. See `COCODataModule` for the arguments.
    """

    folder_name: ClassVar[str] = "miniature_street_detection"
    usual_size = (HEIGHT, WIDTH)

    @override
    def read_categories(self) -> Categories:
        """Those that are drawn, whether or not the set is there."""
        return Categories(tuple(COUNTABLE.values()), tuple(COUNTABLE))

    @override
    def prepare_files(self, splits: Sequence[str]) -> None:
        write_miniature_street_detection(self.root)

import subprocess
import sys

import pytest

import datamodules

IMAGES = """
from datamodules import CityscapesDataModule, COCODataModule, MergedDetectionDataModule, MergedSegmentationDataModule
from datamodules import MiniatureDetectionDataModule, MiniatureSegmentationDataModule, SegmentationFolderDataModule
from datamodules import VOCDetectionDataModule, YOLODetectionDataModule
"""
OPTIONAL = ("albumentations", "babel", "cv2", "num2words", "sentencepiece", "skimage")


@pytest.mark.parametrize(
    ("statement", "packages"),
    [
        ("import datamodules", OPTIONAL),
        (IMAGES, ("albumentations", "babel", "num2words", "sentencepiece", "skimage")),
        (
            "from datamodules import WMT14DataModule\nfrom datamodules.sampling.sample_batches import sample_loader",
            ("albumentations", "babel", "cv2", "num2words", "skimage"),
        ),
    ],
)
def test_data_are_imported_without_the_packages_of_others(statement, packages):
    # Lightning imports some of these where they are installed, so they are made impossible to import.
    missing = f"import sys\nsys.modules |= dict.fromkeys({packages})\n"
    done = subprocess.run([sys.executable, "-c", missing + statement], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_an_attribute():
    assert set(datamodules.__all__) <= set(dir(datamodules))
    for name in datamodules.__all__:
        assert getattr(datamodules, name).__name__ == name
    with pytest.raises(AttributeError, match=r"module 'lightning_attn\.datamodules' has no attribute 'COCO'"):
        datamodules.COCO  # noqa: B018

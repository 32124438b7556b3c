"""The generalized attention of Zhu et al. (ICCV 2019), trained on three tasks with PyTorch Lightning."""

from pathlib import Path

__version__ = "0.1.0"

if not Path(__file__).with_name("datamodules").is_dir():  # a checkout without symbolic links
    __path__.append(str(Path(__file__).parents[1]))

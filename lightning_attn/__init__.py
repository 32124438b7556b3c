"""The generalized attention of Zhu et al. (ICCV 2019), trained on three tasks with PyTorch Lightning."""

from importlib.metadata import version

__version__ = version("lightning-attn")

"""Weights of other projects: torchvision's and mmcv's."""

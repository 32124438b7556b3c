"""Conversion and loading of weights of other projects: torchvision's and mmcv's."""

"""Semantic segmentation data: the layout of Cityscapes, and folders of images and masks."""

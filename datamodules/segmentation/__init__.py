"""Data sets with a class for every pixel: the layout of Cityscapes, and folders of images and masks."""

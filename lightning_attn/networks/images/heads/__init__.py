"""Heads for detection and segmentation: they map features of a backbone to losses or results."""

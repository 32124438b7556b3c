"""Data sets of objects in boxes: COCO's layout and those that tools export."""

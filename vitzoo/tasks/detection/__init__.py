"""Boxes and masks in images: COCO-style data, COCO's metrics and the task."""

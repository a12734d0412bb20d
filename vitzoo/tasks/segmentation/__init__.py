"""Semantic segmentation: images and masks, training, whole and sliding inference, mIoU."""

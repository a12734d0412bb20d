"""Semantic segmentation: segmentation-models-pytorch's decoders over maps of strides 4 to 32."""

from vitzoo.heads.segmentation.decoders import HEADS
from vitzoo.heads.segmentation.segmenter import Segmenter, build_segmenter

__all__ = ["HEADS", "Segmenter", "build_segmenter"]

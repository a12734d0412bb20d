"""torchvision's detectors over any backbone: boxes and masks in images."""

from vitzoo.heads.detection.detector import HEADS, build_detector
from vitzoo.heads.detection.fpn import FeaturePyramid

__all__ = ["HEADS", "FeaturePyramid", "build_detector"]

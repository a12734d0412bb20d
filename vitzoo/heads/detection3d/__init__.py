"""Detection in LiDAR sweeps: pillars, bird's-eye neck, CenterPoint head, boxes, suppression."""

from vitzoo.heads.detection3d.boxes import from_mmdet3d, iou_3d, iou_from_above, to_mmdet3d
from vitzoo.heads.detection3d.centerpoint import CenterHead
from vitzoo.heads.detection3d.decode import DecodeConfig, Detections3D, apply_nms, decode
from vitzoo.heads.detection3d.detector import PillarDetector, build_detector3d
from vitzoo.heads.detection3d.neck import BevNeck
from vitzoo.heads.detection3d.nms import nms, suppress
from vitzoo.heads.detection3d.pillars import PillarEncoder, PillarGrid, join_frames
from vitzoo.heads.detection3d.targets import Targets, losses, make_targets

__all__ = [
    "BevNeck",
    "CenterHead",
    "DecodeConfig",
    "Detections3D",
    "PillarDetector",
    "PillarEncoder",
    "PillarGrid",
    "Targets",
    "apply_nms",
    "build_detector3d",
    "decode",
    "from_mmdet3d",
    "iou_3d",
    "iou_from_above",
    "join_frames",
    "losses",
    "make_targets",
    "nms",
    "suppress",
    "to_mmdet3d",
]

"""vitzoo: vision transformers with efficient attention, registered with timm under `vz_*` names."""

from timm import create_model as build_classifier

from vitzoo import ops
from vitzoo.backbones import ModelInfo, info, list_models
from vitzoo.heads.detection3d import build_detector3d

__version__ = "0.1.0"
__all__ = ["ModelInfo", "build_classifier", "build_detector3d", "info", "list_models", "ops"]

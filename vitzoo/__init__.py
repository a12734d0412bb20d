"""vitzoo: vision transformers with efficient attention, registered with timm under `vz_*` names."""

from timm import create_model as build_classifier

from vitzoo import ops
from vitzoo.backbones import ModelInfo, info, list_models

__version__ = "0.1.0"
__all__ = ["ModelInfo", "build_classifier", "info", "list_models", "ops"]

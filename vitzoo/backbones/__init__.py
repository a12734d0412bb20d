"""The families, one file each; importing this package registers them with timm."""

from vitzoo.backbones import davit, flatformer
from vitzoo.backbones._registry import ModelInfo, info, list_models

__all__ = ["ModelInfo", "davit", "flatformer", "info", "list_models"]

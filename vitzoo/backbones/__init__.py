"""The families, one file each; importing this package registers them with timm."""

from vitzoo.backbones import (
    biformer,
    davit,
    flatformer,
    halonet,
    litv2,
    lookupvit,
    nat,
    sparsifiner,
    uhalonet,
)
from vitzoo.backbones._registry import ModelInfo, info, list_models

__all__ = [
    "ModelInfo",
    "biformer",
    "davit",
    "flatformer",
    "halonet",
    "info",
    "list_models",
    "litv2",
    "lookupvit",
    "nat",
    "sparsifiner",
    "uhalonet",
]

"""vitzoo: vision transformers with efficient attention, registered with timm under `vz_*` names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from timm import create_model as build_classifier

from vitzoo import ops
from vitzoo.backbones import ModelInfo, info, list_models
from vitzoo.heads.detection import build_detector
from vitzoo.heads.detection3d import build_detector3d
from vitzoo.heads.segmentation import build_segmenter

if TYPE_CHECKING:
    from vitzoo.tasks import Prediction

__version__ = "0.1.0"
__all__ = [
    "ModelInfo",
    "build_classifier",
    "build_detector",
    "build_detector3d",
    "build_segmenter",
    "info",
    "list_models",
    "ops",
    "predict",
]


def predict(model_or_run: Any, images: Any, values: Sequence[str] = ()) -> list[Prediction]:
    """Typed results for images, each with `.draw()` and `.to_dict()`.

    Args:
        model_or_run: a run (its folder, or its name under `runs/`), a weights file, a model's
            `NAME.TAG` with published weights, or a timm model in memory.
        images: one image or a sequence of them: paths, PIL images, uint8 arrays (H, W, 3), or
            tensors (3, H, W) of uint8 or of floats from 0 to 1; also (N, ...) at once.
        values: recipe values to change, such as `data.size=288`.

    Raises:
        InputError: nothing of that name, or weights that do not fit.
        UnreadableSample: a path that is no readable image.
    """
    from vitzoo.engine.predict import predict as run

    return run(model_or_run, images, values)

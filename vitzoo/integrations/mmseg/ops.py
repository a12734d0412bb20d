"""What mmsegmentation cannot be imported without of `mmcv.ops`, for mmcv-lite."""

from __future__ import annotations

import importlib.util
import logging
import sys
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger("vitzoo.mmseg")


def point_sample(
    input: Tensor, points: Tensor, align_corners: bool = False, **kwargs: Any
) -> Tensor:
    """Values of maps at points.

    Args:
        input: (N, C, H, W).
        points: (N, P, 2) or (N, Hg, Wg, 2), x and y from 0 to 1.
        align_corners: as in `grid_sample`.
        **kwargs: for `grid_sample`.

    Returns:
        (N, C, P) or (N, C, Hg, Wg).
    """
    flat = points.dim() == 3
    grid = points.unsqueeze(2) if flat else points
    found = F.grid_sample(input, 2 * grid - 1, align_corners=align_corners, **kwargs)
    return found.squeeze(3) if flat else found


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Focal loss of logits (N, classes) against class numbers (N,), as mmcv's operator has it.

    A target of `classes` is background: no class is right. `weight` (classes,) scales each
    sample by its class.

    Raises:
        ValueError: unknown reduction.
    """
    from torchvision.ops import sigmoid_focal_loss as focal

    classes = input.shape[1]
    right = F.one_hot(target, classes + 1)[:, :classes].to(input.dtype)
    loss = focal(input, right, alpha=alpha, gamma=gamma, reduction="none")
    if weight is not None:
        # Background has no weight of its own.
        padded = F.pad(weight, (0, 1), value=1.0)
        loss = loss * padded[target][:, None]
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / len(input)
    raise ValueError(f"reduction is none, mean or sum, not {reduction!r}")


def _missing(name: str) -> Any:
    # mmsegmentation guards most of its imports against ModuleNotFoundError, and against that only.
    if name.startswith("__"):
        raise AttributeError(name)
    raise ModuleNotFoundError(
        f"mmcv.ops.{name} needs the full mmcv with its compiled operators", name="mmcv._ext"
    )


def install_stand_in() -> bool:
    """Put the stand-in in the place of `mmcv.ops`, if mmcv has no compiled operators.

    Returns:
        Whether the stand-in is there now.

    Raises:
        ModuleNotFoundError: there is no mmcv at all.
    """
    present = sys.modules.get("mmcv.ops")
    if present is not None:
        return bool(getattr(present, "vitzoo_stand_in", False))
    if importlib.util.find_spec("mmcv") is None:
        raise ModuleNotFoundError("No module named 'mmcv'", name="mmcv")
    if importlib.util.find_spec("mmcv._ext") is not None:
        return False
    import mmcv

    module: Any = ModuleType("mmcv.ops", "vitzoo's stand-in for mmcv-lite.")
    module.point_sample = point_sample
    module.sigmoid_focal_loss = sigmoid_focal_loss
    module.vitzoo_stand_in = True
    module.__getattr__ = _missing
    sys.modules["mmcv.ops"] = mmcv.ops = module
    logger.warning(
        "mmcv has no compiled operators: a stand-in with point_sample and sigmoid_focal_loss takes "
        "the place of mmcv.ops; other operators need the full mmcv"
    )
    return True

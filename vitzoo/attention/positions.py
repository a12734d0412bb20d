"""Position tables for grids of any size."""

from __future__ import annotations

import math

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from vitzoo.ops._sides import exporting


def resample_positions(table: Tensor, height: int, width: int) -> Tensor:
    """A square table (1, L, C) resized to a grid, (1, height, width, C).

    Bicubic with antialiasing, as timm's `resample_abs_pos_embed`. An exported graph holds the same
    as two products, since OpenVINO leaves the antialiasing of ONNX out.
    """
    if not exporting():
        resized = resample_abs_pos_embed(table, [height, width], num_prefix_tokens=0)
        return resized.unflatten(1, (height, width))
    side = math.isqrt(table.shape[1])
    square = table.unflatten(1, (side, side)).float()
    rows = bicubic_matrix(side, height, device=table.device)
    columns = bicubic_matrix(side, width, device=table.device)
    # (h, side) @ (side, side * C), then (w, side) @ (h, side, C).
    tall = (rows @ square[0].flatten(1)).unflatten(1, (side, -1))
    return (columns @ tall)[None].to(table.dtype)


def bicubic_matrix(source: int, target: int, *, device: torch.device | None = None) -> Tensor:
    """Weights (target, source) of an antialiased bicubic resize along one axis.

    Keys' kernel with a = -0.5, stretched over the source's pixels where it shrinks; pixel centres
    aligned; weights outside the source are dropped and the rest add up to one.

    Args:
        source: pixels before.
        target: pixels after; may be a symbol.
        device: of the result.
    """
    scale = source / torch.scalar_tensor(target, device=device)
    centre = (torch.arange(target, device=device) + 0.5) * scale
    distance = torch.arange(source, device=device) + 0.5 - centre[:, None]
    x = (distance / scale.clamp(min=1)).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    weight = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weight / weight.sum(dim=1, keepdim=True)

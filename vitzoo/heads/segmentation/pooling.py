"""Adaptive pooling that an exported graph computes at every size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.ops._sides import exporting


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """torch's, to a square, and in an exported graph the same as two products.

    On the way to ONNX torch unrolls its own over the bins of the size that it was traced with; at
    another size the graph reads other pixels, or none.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, output_size, output_size)."""
        if not exporting():
            pooled: Tensor = super().forward(x)
            return pooled
        bins: Any = self.output_size  # torch types it for two sides, too.
        rows, columns = (_bin_means(side, bins, x) for side in x.shape[-2:])
        return rows @ x @ columns.mT


def _bin_means(side: int, bins: int, like: Tensor) -> Tensor:
    """Weights (bins, side) of the mean over each bin; bins overlap where they do not divide."""
    index = torch.arange(bins, device=like.device)
    start = index * side // bins
    end = ((index + 1) * side + bins - 1) // bins
    position = torch.arange(side, device=like.device)
    inside = (position >= start[:, None]) & (position < end[:, None])
    return inside.to(like.dtype) / (end - start)[:, None].to(like.dtype)

"""A feature pyramid over any backbone, in the form that torchvision's detectors expect."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from vitzoo.heads.pyramid import Maps


class FeaturePyramid(nn.Module):
    """Backbone and FPN.

    BatchNorm keeps its running statistics in training, too: batches of detection are too small to
    renew them. Its weights learn.

    Args:
        maps: the backbone.
        channels: of every level.
        extra: `pool` for one more level (R-CNN), `convolve` for two (RetinaNet, FCOS).
    """

    def __init__(self, maps: Maps, channels: int, *, extra: str) -> None:
        super().__init__()
        self.maps = maps
        self.out_channels = channels
        more: Any = LastLevelMaxPool()
        if extra == "convolve":
            more = LastLevelP6P7(maps.channels[-1], channels)
        self.fpn = FeaturePyramidNetwork(list(maps.channels), channels, extra_blocks=more)

    def train(self, mode: bool = True) -> FeaturePyramid:
        """Training mode, but for BatchNorm's statistics."""
        super().train(mode)
        for module in self.maps.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) -> levels by name, finest first."""
        return self.fpn({str(i): level for i, level in enumerate(self.maps(x))})

"""The 2-D network between a bird's-eye map and the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_NORM: dict[str, Any] = {"eps": 1e-3, "momentum": 0.01}


class ConvNorm(nn.Module):
    """Convolution without bias (transposed or not), BatchNorm, ReLU; a residual if asked."""

    def __init__(self, conv: nn.Module, dim: int, *, residual: bool = False, **norm: Any) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(dim, **norm)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dim, H', W')."""
        # The sum comes after the ReLU and has none of its own.
        out = torch.relu(self.bn(self.conv(x)))
        return out + x if self.residual else out


def conv3x3(in_dim: int, dim: int, *, stride: int = 1, residual: bool = False, **norm: Any) -> Any:
    """A `ConvNorm` of 3x3."""
    conv = nn.Conv2d(in_dim, dim, 3, stride=stride, padding=1, bias=False)
    return ConvNorm(conv, dim, residual=residual, **norm)


class BevNeck(nn.Module):
    """SECOND's two stages with residuals, brought back to the first one's size and joined.

    Args:
        in_dim: channels of the map.
        dims: channels of the stages.
        depths: convolutions of a stage after its first.
        strides: of the stages' first convolutions; the output has the first one's size.
        out_dim: channels that each stage adds to the output.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        dims: Sequence[int] = (64, 128),
        depths: Sequence[int] = (3, 3),
        strides: Sequence[int] = (1, 2),
        out_dim: int = 128,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        self.ups = nn.ModuleList()
        scale = 1
        for i, (dim, depth, stride) in enumerate(zip(dims, depths, strides, strict=True)):
            before = dims[i - 1] if i else in_dim
            first = conv3x3(
                before, dim, stride=stride, residual=stride == 1 and before == dim, **_NORM
            )
            rest = (conv3x3(dim, dim, residual=True, **_NORM) for _ in range(depth))
            self.stages.append(nn.Sequential(first, *rest))
            scale = scale * stride if i else 1
            up = nn.ConvTranspose2d(dim, out_dim, scale, stride=scale, bias=False)
            self.ups.append(ConvNorm(up, out_dim, **_NORM))
        self.stride = strides[0]
        self.num_features = out_dim * len(dims)
        self.init_weights()

    def init_weights(self) -> None:
        """Kaiming's normal initialisation over the fan out."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """(B, in_dim, H, W) -> the stages' maps."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_dim, H, W) -> (B, C, H / stride, W / stride)."""
        maps = self.forward_stages(x)
        H, W = maps[0].shape[-2:]
        # An odd side doubles to one more than it was.
        ups = [up(x)[..., :H, :W] for up, x in zip(self.ups, maps, strict=True)]
        return torch.cat(ups, dim=1)

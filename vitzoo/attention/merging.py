"""Deformable token merging."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from vitzoo.attention.layers import conv_channels_last
from vitzoo.ops import deformable_merge


@register_notrace_module
class DeformableMerge(nn.Module):
    """Blocks of 2x2 tokens, sampled where the input says, to one token (arXiv 2105.14217, 3.3).

    A deformable convolution with kernel and stride 2; an ordinary one of the same shape predicts
    its offsets. Fresh offsets are zero.
    """

    def __init__(self, in_dim: int, dim: int, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, in_dim, 2, 2, **factory))
        self.bias = nn.Parameter(torch.empty(dim, **factory))
        self.conv_offset = nn.Conv2d(in_dim, 8, 2, stride=2, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A convolution's default initialisation for the kernel, zeros for the offsets."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.bias, -bound, bound)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, in_dim) -> (B, H // 2, W // 2, dim)."""
        offset = conv_channels_last(x, self.conv_offset)
        return deformable_merge(x, offset, self.weight, self.bias)

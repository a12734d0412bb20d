"""Attention blocks that the families share, over `vitzoo.ops`; maps are (B, H, W, C)."""

from vitzoo.attention.channel import ChannelAttention
from vitzoo.attention.layers import (
    DepthwiseResidual,
    Linear,
    Mlp,
    add_mlp,
    conv_channels_last,
    depthwise_residual,
    pad_image_to_multiple,
    pad_to_multiple,
)
from vitzoo.attention.window import WindowAttention, projected_zero

__all__ = [
    "ChannelAttention",
    "DepthwiseResidual",
    "Linear",
    "Mlp",
    "WindowAttention",
    "add_mlp",
    "conv_channels_last",
    "depthwise_residual",
    "pad_image_to_multiple",
    "pad_to_multiple",
    "projected_zero",
]

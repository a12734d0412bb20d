"""A depthwise convolution and its activation in one pass over the map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.ops._dispatch import Backend, Operator
from vitzoo.ops._onednn import records_gradient, why_not_onednn


def depthwise_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution, then exact GELU."""
    padding = weight.shape[-1] // 2
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=x.shape[-1])
    return F.gelu(out.permute(0, 2, 3, 1))


def depthwise_gelu_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN applies the GELU to each output while it is in a register."""
    padding = [weight.shape[-1] // 2] * 2
    # The last argument but one is for other activations; the last names the exact GELU.
    out = torch.ops.mkldnn._convolution_pointwise(
        x.permute(0, 3, 1, 2),
        weight,
        bias,
        padding,
        [1, 1],
        [1, 1],
        x.shape[-1],
        "gelu",
        [],
        "none",
    )
    return out.permute(0, 2, 3, 1)


def _why_not_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if records_gradient(x, weight, bias):
        return "oneDNN's fused convolution has no backward pass."
    return why_not_onednn(x, weight, bias)


DEPTHWISE_GELU = Operator(
    "depthwise_gelu",
    [
        Backend("onednn", depthwise_gelu_onednn, why_not=_why_not_onednn),
        Backend("reference", depthwise_gelu_reference),
    ],
)


def depthwise_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str = "auto"
) -> Tensor:
    """GELU of a depthwise convolution with stride 1 and the padding that keeps the map's size.

    Args:
        x: map (B, H, W, C).
        weight: (C, 1, kernel_size, kernel_size), kernel_size odd.
        bias: (C,) or None.
        backend: `auto`, `onednn` (inference on the CPU in float32) or `reference`.

    Returns:
        (B, H, W, C).
    """
    return DEPTHWISE_GELU(x, weight, bias, backend=backend)

"""A depthwise convolution and its activation in one pass over the map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from vitzoo.ops._dispatch import Backend, Operator


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
    if torch.compiler.is_compiling():
        return "torch.compile and torch.export see the two steps and fuse them themselves."
    if x.device.type != "cpu" or not (x.dtype == weight.dtype == torch.float32):
        return "oneDNN's fused convolution is used for float32 on the CPU only."
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "this torch has no oneDNN, or it is switched off."
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        return "oneDNN's fused convolution has no backward pass."
    if torch.is_autocast_enabled("cpu") or _get_current_dispatch_mode() is not None:
        return "autocast, FLOP counters and tracers act on the two steps."
    return None


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

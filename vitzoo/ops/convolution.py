"""A convolution, a sum and an activation in one pass over the map."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.ops._dispatch import Backend, Operator, forced_backend
from vitzoo.ops._onednn import contiguous_bias, records_gradient, why_not_onednn

Pair = int | tuple[int, ...]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
# What oneDNN calls them; the second word says which GELU.
_ONEDNN_NAMES = {
    None: ("none", ""),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}


def add_and_activate(x: Tensor, add: Tensor | None, activation: str | None) -> Tensor:
    """activation(add + x), of which either may be left out."""
    if add is not None:
        x = add + x
    return x if activation is None else _ACTIVATIONS[activation](x)


def convolution_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    add: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The convolution, then the sum, then the activation."""
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return add_and_activate(out, add, activation)


def convolution_onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    add: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """oneDNN adds and activates each output while it is in a register.

    The weight may also be what `pack_kernel` made of it.
    """
    bias = contiguous_bias(bias)
    settings = (_pair(padding), _pair(stride), _pair(dilation), groups)
    fused, form = _ONEDNN_NAMES[activation]
    # The empty list is for activations with numbers of their own.
    if add is None:
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *settings, fused, [], form)
    after = activation and fused
    run = torch.ops.mkldnn._convolution_pointwise.binary
    return run(x, add, weight, bias, *settings, "add", 1.0, after, [], form)


def pack_kernel(
    weight: Tensor, x: Tensor, *, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """The kernel in oneDNN's order for maps like x; it serves other sizes too."""
    settings = (_pair(padding), _pair(stride), _pair(dilation), groups)
    return torch.ops.aten.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *settings, x.shape)


def _pair(value: Pair) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else value


def _why_not_onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    add: Tensor | None = None,
    activation: str | None = None,
) -> str | None:
    if records_gradient(x, weight, bias, add):
        return "oneDNN's fused convolution has no backward pass."
    reason = why_not_onednn(x, weight, bias, add)
    # The shapes last: a compiler would remember the questions for a map's size.
    if reason is None and x.dim() != 4:
        reason = "oneDNN takes batches of maps."
    if reason is None and x.numel() == 0:
        reason = "oneDNN has no kernel for an empty batch."
    if reason is None and add is not None:
        if activation not in (None, "relu"):
            reason = "After a sum oneDNN applies ReLU only."
        elif len(add) != len(x):
            reason = "A batch that is broadcast is torch's to add."
        elif add.shape[-2] * add.shape[-1] == 1:
            reason = "torch 2.11 fails to add to a map of one position."
    return reason


CONVOLUTION = Operator(
    "convolution",
    [
        Backend("onednn", convolution_onednn, why_not=_why_not_onednn),
        Backend("reference", convolution_reference),
    ],
)


def fuses(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> bool:
    """Whether a layer may take oneDNN's one step: it serves, and nobody forces the reference.

    A layer must run where a forced oneDNN cannot serve, as in training: it asks, and does not get
    the sentence of a caller of `convolution`.
    """
    if forced_backend(CONVOLUTION.name) == "reference":
        return False
    return CONVOLUTION.why_not("onednn", x, weight, bias, **options) is None


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    add: Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """activation(convolution of x + add), zeros beyond the border.

    Args:
        x: map (B, C, H, W), best channels-last in memory.
        weight: (C', C / groups, height, width).
        bias: (C',) or None.
        stride, padding, dilation: one number or one a side.
        groups: of channels.
        add: (B, C', H', W'), like the result, or None.
        activation: `relu`, `silu`, `gelu` (exact), `gelu_tanh` or None.
        backend: `auto`, `onednn` (inference on the CPU in float32) or `reference`.

    Returns:
        (B, C', H', W').

    Raises:
        ValueError: the activation is unknown, or the forced backend cannot serve.
    """
    if activation is not None and activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"activation must be None or one of {known}, got {activation!r}")
    return CONVOLUTION(
        x,
        weight,
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        add=add,
        activation=activation,
        backend=backend,
    )

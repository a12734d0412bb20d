"""The few layers that timm.layers lacks, for maps with channels last (B, H, W, C)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from vitzoo.ops import linear, linear_gelu
from vitzoo.ops._dispatch import forced_backend
from vitzoo.ops._half import computed_dtype
from vitzoo.ops._onednn import records_gradient, why_not_apart
from vitzoo.ops._sides import overhang, symbolic, unknown
from vitzoo.ops.convolution import (
    add_and_activate,
    convolution_onednn,
    convolution_reference,
    fuses,
)

# Hidden values of an MLP that leave the caches, and what is then computed at a time.
_LARGE_HIDDEN_BYTES = 16 << 20
_HIDDEN_BYTES = 5 << 20


class Linear(nn.Linear):
    """nn.Linear whose product goes through `vitzoo.ops.linear`; same parameters and names."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(input, self.weight, self.bias)


# A leaf for torch.fx, like every attention module: its operator chooses by shape and dtype.
register_notrace_module(Linear)


def listened_to(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says: hooks, or another `forward`."""
    # accelerate, for one, moves weights to the device in a `forward` of the object.
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def untouched(layer: nn.Module) -> bool:
    """Whether a step may read the parameters of a `Linear` instead of calling it.

    Not where somebody put another layer in its place, or listens.
    """
    return type(layer) is Linear and _is_plain(layer.weight) and not listened_to(layer)


def _is_plain(weight: Any) -> bool:
    """Not a subclass that knows some operators only, such as a quantised weight."""
    return type(weight) is nn.Parameter or type(weight) is Tensor


@register_notrace_module
class Mlp(nn.Module):
    """Linear, exact GELU, Linear on the last axis, as in ViT."""

    mixes_tokens = False

    def __init__(self, dim: int, hidden_dim: int, *, drop: float = 0.0, **factory: Any) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.fc1 = Linear(dim, hidden_dim, **factory)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden_dim, dim, **factory)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.drop2(self.fc2(self.drop1(self._hidden(x))))

    def _hidden(self, x: Tensor) -> Tensor:
        fc1, act = self.fc1, self.act
        exact = type(act) is nn.GELU and act.approximate == "none" and not listened_to(act)
        if exact and untouched(fc1):
            return linear_gelu(x, fc1.weight, fc1.bias)
        return act(fc1(x))


def add_mlp(x: Tensor, norm: nn.Module, mlp: Any, *branch: nn.Module) -> Tensor:
    """x + branch(mlp(norm(x))), the second half of a block.

    In inference on the CPU a large map goes in parts whose hidden values stay in the cache, if the
    MLP's class says so: `mixes_tokens` is False where tokens pass it one by one, True where it
    needs whole images, and `hidden_dim` is its inner width. In eval mode norm and branch must treat
    each token alone.

    Args:
        x: (B, ..., C).
        norm, mlp: of the block.
        branch: what follows the MLP, in order (layer scale, drop path).
    """
    steps = (norm, mlp, *branch)
    count = _items_at_a_time(x, mlp, steps)
    if count is None:
        return x + _in_turn(steps, x)
    items = x if mlp.mixes_tokens else x.reshape(-1, x.shape[-1])
    out = torch.empty_like(items)
    for part, result in zip(items.split(count), out.split(count), strict=True):
        torch.add(part, _in_turn(steps, part), out=result)
    return out.view(x.shape)


def _in_turn(steps: Sequence[nn.Module], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _items_at_a_time(x: Tensor, mlp: Any, steps: Sequence[nn.Module]) -> int | None:
    """How many tokens or images, or None for all: a small map, gradients, somebody who listens."""
    # torch.fx traces with something that is no tensor. A subclass may compute something else.
    if type(x) is not Tensor or "mixes_tokens" not in vars(type(mlp)):
        return None
    # Compilers first: they would remember the question for a map's size.
    if why_not_apart(x) is not None or symbolic(*x.shape):
        return None
    row_bytes = mlp.hidden_dim * x.element_size()
    rows = x.numel() // max(1, x.shape[-1])
    if rows * row_bytes < _LARGE_HIDDEN_BYTES:
        return None
    parts = [part for step in steps for part in step.modules()]
    if any(p.training or listened_to(p) for p in parts):
        return None
    weights = [weight for step in steps for weight in step.parameters()]
    if records_gradient(x, *weights) or why_not_apart(*weights) is not None:
        return None
    item_bytes = row_bytes * rows // len(x) if mlp.mixes_tokens else row_bytes
    return max(1, _HIDDEN_BYTES // item_bytes)


@register_notrace_module
class DepthwiseResidual(nn.Module):
    """x + depthwise convolution of x on a (B, H, W, C) map: a conditional position encoding.

    In single precision and above the identity is added to the kernel's centre tap, which saves a
    pass over the map.
    """

    def __init__(self, dim: int, kernel_size: int = 3, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(
            dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **factory
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return depthwise_residual(x, self.proj)


def depthwise_residual(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """x + conv(x) for a stride-1 depthwise `conv` and x (B, H, W, C)."""
    # 1 + w keeps none of the last bits of a small w in half precision.
    halves = computed_dtype(x).itemsize < 4
    if halves or not plain_convolution(conv) or forced_backend("convolution") == "reference":
        return conv_channels_last(x, conv, add=x)
    centre = conv.kernel_size[0] // 2
    identity = torch.zeros_like(conv.weight)
    identity[:, :, centre, centre] = 1
    # Nothing is left to fuse, so torch's convolution serves every device.
    out = F.conv2d(
        x.permute(0, 3, 1, 2), conv.weight + identity, conv.bias, **convolution_settings(conv)
    )
    return out.permute(0, 2, 3, 1)


def conv_channels_last(
    x: Tensor, conv: nn.Module, *, add: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """activation(add + conv(x)) on (B, H, W, C) maps, one step where `convolution` has one.

    Without copies: the permuted view of such a map is channels-last memory.

    Args:
        x: (B, H, W, C).
        conv: its weights are read where it is a plain nn.Conv2d, else it is called.
        add: (B, H', W', C'), like the result, or None.
        activation: a name that `vitzoo.ops.convolution` knows, or None.

    Returns:
        (B, H', W', C').
    """
    x = x.permute(0, 3, 1, 2)
    add = None if add is None else add.permute(0, 3, 1, 2)
    if (add is None and activation is None) or not plain_convolution(conv):
        out = add_and_activate(conv(x), add, activation)
    else:
        given: Any = (x, conv.weight, conv.bias)
        options = convolution_settings(conv) | {"add": add, "activation": activation}
        run = convolution_onednn if fuses(*given, **options) else convolution_reference
        out = run(*given, **options)
    return out.permute(0, 2, 3, 1)


def plain_convolution(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a step may read the parameters of an nn.Conv2d instead of calling it."""
    return (
        type(conv) is nn.Conv2d
        and _is_plain(conv.weight)
        and not listened_to(conv)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def convolution_settings(conv: nn.Conv2d) -> dict[str, Any]:
    """What `vitzoo.ops.convolution` takes beside the tensors."""
    return {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}


@register_notrace_function
def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zeros on the right and bottom of x (B, H, W, C) up to multiples of `multiple`."""
    bottom, right = overhang(x.shape[1], multiple), overhang(x.shape[2], multiple)
    if unknown(bottom, right) or bottom or right:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    return x


@register_notrace_function
def pad_image_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zeros on the right and bottom of x (B, C, H, W) up to multiples of `multiple`."""
    bottom, right = overhang(x.shape[2], multiple), overhang(x.shape[3], multiple)
    if unknown(bottom, right) or bottom or right:
        x = F.pad(x, (0, right, 0, bottom))
    return x

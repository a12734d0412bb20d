"""Convolution, batch norm and activation as one step, channels-last, where nothing is trained.

In eval mode on a CPU in float32, without gradients, the norm is folded into the kernel and oneDNN
adds the residual and applies the activation while it writes the result; anywhere else the modules
are called one after the other. The two for ByobNets hold timm's parameters under timm's names.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from timm.layers import BatchNormAct2d, ConvNormAct, register_notrace_module
from torch import Tensor, nn

from vitzoo.attention.layers import listened_to, may_fuse, onednn_sum
from vitzoo.ops._derived import Derived
from vitzoo.ops._onednn import records_gradient, takes_sum, why_not_onednn

_folded: Derived[tuple[Tensor, Tensor]] = Derived()
# What oneDNN calls an activation; of that very class, since a subclass may compute something else.
_FUSED_NAMES = {nn.ReLU: "relu", nn.SiLU: "swish", nn.GELU: "gelu"}


def conv_bn_act(
    x: Tensor, conv: nn.Module, bn: nn.Module, *, act: nn.Module | None = None
) -> Tensor:
    """act(bn(conv(x))), channels-last in memory; its caller is a leaf for torch.fx.

    Args:
        x: map (B, C, H, W).
        conv: convolution.
        bn: its norm; timm's BatchNormAct2d has an activation of its own.
        act: activation, where the norm has none.

    Returns:
        (B, C', H', W').
    """
    x = x.contiguous(memory_format=torch.channels_last)
    if not _fusible(conv, bn, act, x):
        x = bn(conv(x))
        return x if act is None else act(x)
    weight, bias = _kernel(conv, bn, x)
    return _convolve(conv, x, weight, bias, *_activations(bn, act))


@register_notrace_module
class ConvBnAct(nn.Module):
    """timm's ConvNormAct, of which it takes over the modules.

    Args:
        source: the module whose convolution and norm (with its activation) this one uses.
    """

    def __init__(self, source: ConvNormAct) -> None:
        super().__init__()
        self.conv = source.conv
        self.bn = source.bn

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W'), channels-last in memory."""
        return conv_bn_act(x, self.conv, self.bn)


@register_notrace_module
class ResidualConvBn(nn.Module):
    """Convolution and norm, the residual's sum, activation: the end of a bottleneck.

    Args:
        source: the module whose convolution and norm this one uses.
        drop_path: stochastic depth of the branch.
        act: activation of the sum.
    """

    def __init__(self, source: ConvNormAct, drop_path: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.conv = source.conv
        self.bn = source.bn
        self.drop_path = drop_path
        self.act = act

    def forward(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        """Branch (B, C, H, W) and shortcut (B, C', H', W'), if there is one -> its shape."""
        if not self._fuses(x, shortcut):
            x = self.drop_path(self.bn(self.conv(x)))
            return self.act(x if shortcut is None else x + shortcut)
        x = x.contiguous(memory_format=torch.channels_last)
        weight, bias = _kernel(self.conv, self.bn, x)
        if shortcut is None:
            return _convolve(self.conv, x, weight, bias, *_activations(self.bn, self.act))
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        # The sum can only be followed by ReLU.
        relu = type(self.act) is nn.ReLU
        out = onednn_sum(self.conv, x, shortcut, weight, bias, relu=relu)
        return out if relu else self.act(out)

    def _fuses(self, x: Tensor, shortcut: Tensor | None) -> bool:
        if self.drop_path.training or listened_to(self.drop_path) or _activations(self.bn, None):
            return False
        # The shortcut last: a compiler would remember the question for a map's size.
        return _fusible(self.conv, self.bn, self.act, x, shortcut) and (
            shortcut is None or takes_sum(shortcut)
        )


def fuse_conv_bn(module: nn.Module) -> None:
    """Put a `ConvBnAct` in the place of every ConvNormAct below `module`."""
    for name, child in module.named_children():
        if isinstance(child, ConvNormAct):
            setattr(module, name, ConvBnAct(child))
        else:
            fuse_conv_bn(child)


def _fusible(
    conv: nn.Module, bn: Any, act: nn.Module | None, *maps: Tensor | None
) -> TypeGuard[nn.Conv2d]:
    """Whether one oneDNN call may stand for convolution, norm and activation of these maps."""
    # torch.fx traces with something that is no tensor.
    if not all(x is None or isinstance(x, Tensor) for x in maps):
        return False
    if type(conv) is not nn.Conv2d or type(bn) not in (nn.BatchNorm2d, BatchNormAct2d):
        return False
    if bn.training or bn.running_mean is None:
        return False
    acts = _activations(bn, act)
    if len(acts) > 1 or any(type(a) not in _FUSED_NAMES for a in acts):
        return False
    steps = (conv, bn, getattr(bn, "act", None), act)
    if any(step is not None and listened_to(step) for step in steps):
        return False
    tensors = (*maps, *conv.parameters(), *bn.parameters(), bn.running_mean, bn.running_var)
    if records_gradient(*tensors) or why_not_onednn(*tensors) is not None or not may_fuse():
        return False
    # oneDNN has no kernel for an empty batch; compilers have left by now.
    if any(x is not None and x.numel() == 0 for x in maps):
        return False
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _activations(bn: nn.Module, act: nn.Module | None) -> list[nn.Module]:
    """What follows the norm, its own activation first."""
    both = (getattr(bn, "act", None), act)
    return [a for a in both if a is not None and type(a) is not nn.Identity]


def _kernel(conv: nn.Conv2d, bn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What `_fold` gives, the kernel packed, kept until a parameter or statistic changes."""
    sources = (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    given = [t for t in sources if t is not None]
    if any(t.is_inference() for t in given):
        return _fold(conv, bn)

    def fold_and_pack() -> tuple[Tensor, Tensor]:
        weight, bias = _fold(conv, bn)
        return _pack(conv, weight, x), bias

    return _folded.get(given, fold_and_pack, setting=bn.eps)


@torch.no_grad()
def _fold(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel and bias of the convolution followed by the norm of its running statistics."""
    mean, variance = bn.running_mean, bn.running_var
    assert mean is not None
    assert variance is not None
    scale = torch.rsqrt(variance + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight
    bias = -mean * scale
    if bn.bias is not None:
        bias = bias + bn.bias
    if conv.bias is not None:
        bias = bias + conv.bias * scale
    return conv.weight * scale[:, None, None, None], bias


def _pack(conv: nn.Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    """The kernel in oneDNN's order for maps like x; it serves other sizes too."""
    padding, stride, dilation = (list(pair) for pair in (conv.padding, conv.stride, conv.dilation))
    return torch.ops.aten.mkldnn_reorder_conv2d_weight(
        weight.to_mkldnn(), padding, stride, dilation, conv.groups, list(x.shape)
    )


def _convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor, *acts: nn.Module) -> Tensor:
    """One call; of activations there is one or none."""
    return torch.ops.mkldnn._convolution_pointwise(
        x,
        weight,
        bias,
        conv.padding,
        conv.stride,
        conv.dilation,
        conv.groups,
        _FUSED_NAMES[type(acts[0])] if acts else "none",
        [],
        # Which GELU; the other activations have no choice.
        getattr(acts[0], "approximate", "") if acts else "",
    )

"""Convolution, batch norm and activation as one step, channels-last, where nothing is trained.

The modules hold timm's parameters under timm's names. In eval mode on a CPU in float32, without
gradients, the norm is folded into the kernel and oneDNN adds the residual and applies the
activation while it writes the result; anywhere else they compute what timm's modules compute.
"""

from __future__ import annotations

import torch
from timm.layers import BatchNormAct2d, ConvNormAct, register_notrace_module
from torch import Tensor, nn

from vitzoo.attention.layers import listened_to, may_fuse, onednn_sum
from vitzoo.ops._derived import Derived
from vitzoo.ops._onednn import records_gradient, takes_sum, why_not_onednn

_folded: Derived[tuple[Tensor, Tensor]] = Derived()
_FUSED_NAME = {nn.Identity: "none", nn.ReLU: "relu", nn.SiLU: "swish"}


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
        x = x.contiguous(memory_format=torch.channels_last)
        if not _fusible(self, x):
            return self.bn(self.conv(x))
        weight, bias = _kernel(self.conv, self.bn, x)
        return _convolve(self.conv, x, weight, bias, _FUSED_NAME[type(self.bn.act)])


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
        fused = _fusible(self, x, shortcut) and (shortcut is None or takes_sum(shortcut))
        if not fused:
            x = self.drop_path(self.bn(self.conv(x)))
            return self.act(x if shortcut is None else x + shortcut)
        x = x.contiguous(memory_format=torch.channels_last)
        weight, bias = _kernel(self.conv, self.bn, x)
        name = _FUSED_NAME[type(self.act)]
        if shortcut is None:
            return _convolve(self.conv, x, weight, bias, name)
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        # The sum can only be followed by ReLU.
        relu = name == "relu"
        out = onednn_sum(self.conv, x, shortcut, weight, bias, relu=relu)
        return out if relu else self.act(out)


def fuse_conv_bn(module: nn.Module) -> None:
    """Put a `ConvBnAct` in the place of every ConvNormAct below `module`."""
    for name, child in module.named_children():
        if isinstance(child, ConvNormAct):
            setattr(module, name, ConvBnAct(child))
        else:
            fuse_conv_bn(child)


def _fusible(module: ConvBnAct | ResidualConvBn, x: Tensor, shortcut: Tensor | None = None) -> bool:
    """Whether one oneDNN call may stand for the module's steps."""
    conv, bn = module.conv, module.bn
    if module.training or bn.training:
        return False
    if type(conv) is not nn.Conv2d or type(bn) is not BatchNormAct2d:
        return False
    if any(listened_to(m) for m in (conv, bn, bn.act)):
        return False
    tensors = (x, shortcut, *conv.parameters(), *bn.parameters())
    if records_gradient(*tensors) or why_not_onednn(*tensors) is not None or not may_fuse():
        return False
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    acts = (bn.act, module.act) if isinstance(module, ResidualConvBn) else (bn.act,)
    return all(type(act) in _FUSED_NAME for act in acts)


def _kernel(conv: nn.Conv2d, bn: BatchNormAct2d, x: Tensor) -> tuple[Tensor, Tensor]:
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
def _fold(conv: nn.Conv2d, bn: BatchNormAct2d) -> tuple[Tensor, Tensor]:
    """Kernel and bias of the convolution followed by the norm of its running statistics."""
    scale = torch.rsqrt(bn.running_var + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight
    bias = -bn.running_mean * scale
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


def _convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor, act: str) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups, act, [], ""
    )

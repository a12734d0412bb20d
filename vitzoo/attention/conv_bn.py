"""Convolution, batch norm, residual and activation as one step, where nothing is trained.

In eval mode on a CPU in float32, without gradients, the norm is folded into the kernel and oneDNN
adds the residual and applies the activation while it writes the result; anywhere else the modules
are called one after the other. The two modules for ByobNets hold timm's parameters under timm's
names.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from timm.layers import BatchNormAct2d, ConvNormAct, register_notrace_module
from torch import Tensor, nn

from vitzoo.attention.layers import convolution_settings, listened_to, plain_convolution
from vitzoo.ops._derived import Derived
from vitzoo.ops._onednn import records_gradient, why_not_onednn
from vitzoo.ops.convolution import convolution_onednn, fuses, pack_kernel

_folded: Derived[tuple[Tensor, Tensor]] = Derived()
# Of that very class: a subclass may compute something else.
_FUSED_NAMES = {nn.ReLU: "relu", nn.SiLU: "silu"}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


def conv_bn_act(
    x: Tensor,
    conv: nn.Module,
    bn: nn.Module,
    *,
    add: Tensor | None = None,
    act: nn.Module | None = None,
) -> Tensor:
    """act(bn(conv(x)) + add), channels-last in memory; its caller is a leaf for torch.fx.

    Args:
        x: map (B, C, H, W).
        conv: convolution.
        bn: its norm; timm's BatchNormAct2d has an activation of its own, ahead of the sum.
        add: (B, C', H', W'), like the result, or None.
        act: what follows the sum, or None.

    Returns:
        (B, C', H', W').
    """
    x = x.contiguous(memory_format=torch.channels_last)
    own_act = getattr(bn, "act", None)
    if (add is not None and _computes(own_act)) or not _folds(conv, bn, x, add):
        x = bn(conv(x))
        x = x if add is None else x + add
        return x if act is None else act(x)
    acts = [a for a in (own_act, act) if _computes(a)]
    name = _fused_name(acts[0]) if acts else None
    if add is not None:
        add = add.contiguous(memory_format=torch.channels_last)
        # The only one that oneDNN applies to a sum.
        name = "relu" if name == "relu" else None
    weight, bias = _kernel(conv, bn, x)
    settings = convolution_settings(conv)
    x = convolution_onednn(x, weight, bias, add=add, activation=name, **settings)
    for a in acts[1:] if name else acts:
        x = a(x)
    return x


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
        if self.drop_path.training or listened_to(self.drop_path):
            x = self.drop_path(self.bn(self.conv(x)))
            return self.act(x if shortcut is None else x + shortcut)
        return conv_bn_act(x, self.conv, self.bn, add=shortcut, act=self.act)


def fuse_conv_bn(module: nn.Module) -> None:
    """Put a `ConvBnAct` in the place of every ConvNormAct below `module`."""
    for name, child in module.named_children():
        if isinstance(child, ConvNormAct):
            setattr(module, name, ConvBnAct(child))
        else:
            fuse_conv_bn(child)


def _folds(conv: nn.Module, bn: Any, x: Tensor, add: Tensor | None) -> TypeGuard[nn.Conv2d]:
    """Whether one oneDNN call may stand for convolution, norm and sum of these maps."""
    # torch.fx traces with something that is no tensor.
    if not isinstance(x, Tensor) or not plain_convolution(conv):
        return False
    if type(bn) not in (nn.BatchNorm2d, BatchNormAct2d) or listened_to(bn):
        return False
    if bn.training or bn.running_mean is None:
        return False
    tensors = (*bn.parameters(), bn.running_mean, bn.running_var)
    if records_gradient(*tensors) or why_not_onednn(*tensors) is not None:
        return False
    return fuses(x, conv.weight, conv.bias, add=add)


def _computes(act: nn.Module | None) -> TypeGuard[nn.Module]:
    """Whether an activation must be applied, or heard by whoever listens to it."""
    return act is not None and (type(act) is not nn.Identity or listened_to(act))


def _fused_name(act: nn.Module) -> str | None:
    """What `vitzoo.ops.convolution` calls the activation, None if it must be called."""
    if listened_to(act):
        return None
    return _GELUS[act.approximate] if type(act) is nn.GELU else _FUSED_NAMES.get(type(act))


def _kernel(conv: nn.Conv2d, bn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What `_fold` gives, the kernel packed, kept until a parameter or statistic changes."""
    sources = (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    given = [t for t in sources if t is not None]
    if any(t.is_inference() for t in given):
        return _fold(conv, bn)

    def fold_and_pack() -> tuple[Tensor, Tensor]:
        weight, bias = _fold(conv, bn)
        return pack_kernel(weight, x, **convolution_settings(conv)), bias

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

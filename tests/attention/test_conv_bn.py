"""Convolution and norm as one step compute what two modules do, whatever becomes of the weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn

from vitzoo.attention.conv_bn import ConvBnAct, ResidualConvBn


def make_source(*, bias: bool = False, act: bool = True) -> ConvNormAct:
    torch.manual_seed(0)
    source = ConvNormAct(16, 32, kernel_size=3, bias=bias, apply_act=act).eval()
    nn.init.normal_(source.bn.running_mean)
    nn.init.uniform_(source.bn.running_var, 0.5, 2)
    nn.init.normal_(source.bn.weight)
    return source


def scale_kernel(source: ConvNormAct) -> None:
    with torch.no_grad():
        source.conv.weight.mul_(2)


def scale_kernel_through_data(source: ConvNormAct) -> None:
    source.conv.weight.data.mul_(2)


def shift_one_mean_through_data(source: ConvNormAct) -> None:
    source.bn.running_mean.data[7] += 3


def train(source: ConvNormAct) -> None:
    source.train()(torch.randn(4, 16, 8, 8) * 5)
    source.eval()


def load(source: ConvNormAct) -> None:
    source.load_state_dict({k: v * 2 for k, v in source.state_dict().items()})


@pytest.mark.parametrize(
    "change", [scale_kernel, scale_kernel_through_data, shift_one_mean_through_data, train, load]
)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_folded_kernels_are_never_stale(change: Callable[[ConvNormAct], None], bias: bool) -> None:
    source = make_source(bias=bias)
    module = ConvBnAct(source).eval()
    x = torch.randn(2, 16, 9, 7)
    before = module(x)
    torch.testing.assert_close(before, source(x), rtol=1e-5, atol=1e-5)
    change(source)
    torch.testing.assert_close(module(x), source(x), rtol=1e-5, atol=1e-5)
    assert (module(x) - before).abs().max() > 1e-2


@torch.no_grad()
def test_one_kernel_serves_other_sizes_and_residuals() -> None:
    source = make_source(act=False)
    alone, residual = ConvBnAct(source).eval(), ResidualConvBn(source, nn.Identity(), nn.ReLU())
    for size in ((2, 16, 9, 7), (1, 16, 30, 3), (3, 16, 1, 1)):
        x = torch.randn(size)
        shortcut: Tensor = torch.randn(size[0], 32, *size[2:])
        torch.testing.assert_close(alone(x), source(x), rtol=1e-5, atol=1e-5)
        expected = torch.relu(source(x) + shortcut)
        torch.testing.assert_close(residual.eval()(x, shortcut), expected, rtol=1e-5, atol=1e-5)

"""The shared layers: what they compute whatever is put into them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitzoo.attention.layers import Mlp, add_conv


def test_an_mlp_with_and_without_gradients() -> None:
    mlp, x = Mlp(8, 32).eval(), torch.randn(5, 3, 4, 8)
    before = x.clone()
    hidden = F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias))
    expected = F.linear(hidden, mlp.fc2.weight, mlp.fc2.bias)
    torch.testing.assert_close(mlp(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x), expected, rtol=0, atol=1e-6)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["fc1", "act"])
def test_a_hook_inside_an_mlp_sees_what_its_layer_gives(name: str) -> None:
    mlp, x, seen = Mlp(8, 32).eval(), torch.randn(5, 3, 8), []
    mlp.get_submodule(name).register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.inference_mode():
        mlp(x)
        first = F.linear(x, mlp.fc1.weight, mlp.fc1.bias)
    torch.testing.assert_close(seen[0], first if name == "fc1" else F.gelu(first))


def test_another_layer_in_an_mlp_is_called() -> None:
    mlp, x = Mlp(8, 32).eval(), torch.randn(5, 3, 8)
    mlp.act = nn.ReLU()
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x), mlp.fc2(mlp.fc1(x).relu()))


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_a_convolution_and_a_sum_with_and_without_gradients(kernel_size: int) -> None:
    conv = nn.Conv2d(8, 8, kernel_size, padding=kernel_size // 2, groups=8)
    x, other = torch.randn(2, 9, 7, 24)[..., 16:], torch.randn(2, 11, 7, 8)[:, :9]
    expected = other + conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    before = other.clone()
    torch.testing.assert_close(add_conv(x, conv, other), expected)
    with torch.inference_mode():
        torch.testing.assert_close(add_conv(x, conv, other), expected, rtol=0, atol=1e-6)
        assert torch.equal(other, before)
        heard: list[int] = []
        conv.register_forward_hook(lambda *_: heard.append(1))
        add_conv(x, conv, other)
    assert heard

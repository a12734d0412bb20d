"""A convolution with its sum and activation: every backend against the single steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitzoo.ops import OPERATORS, convolution

ACTIVATIONS: dict[str | None, nn.Module] = {
    None: nn.Identity(),
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
}
SETTINGS: list[dict[str, Any]] = [
    {"padding": 1, "groups": 24},
    {"padding": (1, 1), "stride": (2, 1)},
    {"padding": 2, "dilation": 2, "groups": 2},
    {"padding": 1, "stride": 2},
]


def tensors(H: int, W: int, *, groups: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 24, H, W), (24, 24 // groups, 3, 3), (24,)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def why_not(*given: Any, **options: Any) -> str:
    return OPERATORS["convolution"].why_not("onednn", *given, **options) or ""


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_sum", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("H", "W"), [(1, 1), (3, 3), (7, 9), (13, 30)])
def test_backends_agree(
    H: int, W: int, settings: dict[str, Any], with_sum: bool, activation: str | None
) -> None:
    x, weight, bias = tensors(H, W, groups=settings.get("groups", 1))
    x = x.contiguous(memory_format=torch.channels_last)
    for b in (bias, None):
        conv = nn.Conv2d(24, 24, 3, bias=b is not None, **settings)
        conv.load_state_dict({"weight": weight} | ({} if b is None else {"bias": b}))
        conv.requires_grad_(False)
        out = conv(x)
        add = torch.randn_like(out) if with_sum else None
        expected = ACTIVATIONS[activation](out if add is None else out + add)
        options = {**settings, "add": add, "activation": activation}
        assert torch.equal(convolution(x, weight, b, backend="reference", **options), expected)
        torch.testing.assert_close(convolution(x, weight, b, **options), expected)
        lone = not with_sum or (activation in (None, "relu") and out[0, 0].numel() > 1)
        assert (why_not(x, weight, b, **options) == "") == lone
        if lone:
            fused = convolution(x, weight, b, backend="onednn", **options)
            torch.testing.assert_close(fused, expected, rtol=1e-6, atol=1e-5)


def test_the_fused_form_is_for_inference_in_float32() -> None:
    x, weight, bias = tensors(7, 9)
    assert "float32" in why_not(*(t.bfloat16() for t in (x, weight, bias)))
    assert "empty" in why_not(x[:0], weight, bias)
    weight.requires_grad_()
    assert "backward" in why_not(x, weight, bias)
    convolution(x, weight, bias, activation="gelu").sum().backward()
    assert weight.grad is not None


def test_sums_that_onednn_does_not_fuse() -> None:
    x, weight, bias = tensors(3, 3)
    one, map_ = torch.randn(2, 24, 1, 1), torch.randn(2, 24, 3, 3)
    assert "one position" in why_not(x, weight, bias, add=one)
    assert "ReLU" in why_not(x, weight, bias, padding=1, add=map_, activation="gelu")
    with pytest.raises(ValueError, match="After a sum"):
        convolution(x, weight, padding=1, add=map_, activation="silu", backend="onednn")


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="'swish'"):
        convolution(*tensors(7, 9), activation="swish")


@torch.no_grad()
def test_a_bias_that_is_a_view() -> None:
    x, weight, _ = tensors(7, 9)
    for bias in (torch.randn(48)[::2], torch.randn(1).expand(24)):
        expected = convolution(x, weight, bias, activation="gelu", backend="reference")
        found = convolution(x, weight, bias, activation="gelu")
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)

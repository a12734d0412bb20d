"""Convolution and norm as one step compute what two modules do, whatever becomes of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d, ConvNormAct
from torch import Tensor, nn

from vitzoo.attention import conv_bn
from vitzoo.attention.conv_bn import ConvBnAct, ResidualConvBn, conv_bn_act
from vitzoo.ops import use_backend


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


def change_eps(source: ConvNormAct) -> None:
    source.bn.eps = 0.5


def load(source: ConvNormAct) -> None:
    source.load_state_dict({k: v * 2 for k, v in source.state_dict().items()})


CHANGES = [
    scale_kernel,
    scale_kernel_through_data,
    shift_one_mean_through_data,
    change_eps,
    train,
    load,
]


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """One entry for each kernel that was folded and packed."""
    shapes: list[torch.Size] = []
    run = conv_bn.pack_kernel

    def noted(weight: Tensor, x: Tensor, **settings: Any) -> Tensor:
        shapes.append(weight.shape)
        return run(weight, x, **settings)

    monkeypatch.setattr(conv_bn, "pack_kernel", noted)
    return shapes


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_folded_kernels_are_never_stale(
    change: Callable[[ConvNormAct], None], bias: bool, packed: list[torch.Size]
) -> None:
    source = make_source(bias=bias)
    module = ConvBnAct(source).eval()
    x = torch.randn(2, 16, 9, 7)
    before = module(x)
    torch.testing.assert_close(before, source(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(module(x), before)
    assert len(packed) == 1
    change(source)
    torch.testing.assert_close(module(x), source(x), rtol=1e-5, atol=1e-5)
    assert (module(x) - before).abs().max() > 1e-2
    assert len(packed) == 2


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


@pytest.mark.parametrize("act", [None, nn.ReLU(), nn.SiLU(), nn.GELU(), nn.GELU("tanh")])
@torch.no_grad()
def test_torchs_norm_and_each_activation(act: nn.Module | None, packed: list[torch.Size]) -> None:
    source = make_source()
    norm = nn.BatchNorm2d(32).eval()
    norm.load_state_dict(source.bn.state_dict())
    x = torch.randn(2, 16, 9, 7)
    expected = norm(source.conv(x))
    expected = expected if act is None else act(expected)
    out = conv_bn_act(x, source.conv, norm, act=act)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert len(packed) == 1


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("norm", "act", "folds"),
    [
        (nn.BatchNorm2d(32, track_running_stats=False), nn.ReLU(), False),
        (nn.InstanceNorm2d(32), nn.ReLU(), False),
        (Doubled(32), nn.ReLU(), False),
        # What cannot be fused follows.
        (BatchNormAct2d(32), nn.SiLU(), True),
        (nn.BatchNorm2d(32), nn.Hardswish(), True),
    ],
)
@torch.no_grad()
def test_what_one_step_does_not_compute_stays_apart(
    norm: nn.Module, act: nn.Module, folds: bool, packed: list[torch.Size]
) -> None:
    conv, x = make_source().conv, torch.randn(2, 16, 9, 7)
    norm = norm.eval()
    torch.testing.assert_close(conv_bn_act(x, conv, norm, act=act), act(norm(conv(x))))
    assert len(packed) == folds


@pytest.mark.parametrize("act", [None, nn.ReLU(), nn.GELU()])
@pytest.mark.parametrize("own_act", [False, True])
@torch.no_grad()
def test_the_norms_own_activation_comes_before_a_sum(
    own_act: bool, act: nn.Module | None, packed: list[torch.Size]
) -> None:
    source, x, add = make_source(act=own_act), torch.randn(2, 16, 9, 7), torch.randn(2, 32, 9, 7)
    expected = source(x) + add
    expected = expected if act is None else act(expected)
    out = conv_bn_act(x, source.conv, source.bn, add=add, act=act)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert len(packed) == (not own_act)


@pytest.mark.parametrize("trained", ["conv.weight", "bn.weight", "bn.bias"])
def test_whatever_is_trained_gets_its_gradient(trained: str, packed: list[torch.Size]) -> None:
    source = make_source().requires_grad_(False)
    source.get_parameter(trained).requires_grad_()
    ConvBnAct(source).eval()(torch.randn(2, 16, 9, 7)).sum().backward()
    assert source.get_parameter(trained).grad is not None
    assert packed == []


@pytest.mark.parametrize("heard", ["conv", "bn", "bn.act"])
@torch.no_grad()
def test_whoever_listens_hears_every_step(heard: str, packed: list[torch.Size]) -> None:
    source = make_source(act=False)
    calls: list[nn.Module] = []
    source.get_submodule(heard).register_forward_hook(lambda module, *_: calls.append(module))
    ConvBnAct(source).eval()(torch.randn(2, 16, 9, 7))
    assert calls == [source.get_submodule(heard)]
    # An activation that somebody listens to follows the folded norm.
    assert len(packed) == (heard == "bn.act")


@torch.no_grad()
def test_an_empty_batch() -> None:
    source = make_source()
    residual = ResidualConvBn(make_source(act=False), nn.Identity(), nn.ReLU()).eval()
    x = torch.randn(0, 16, 9, 7)
    assert ConvBnAct(source).eval()(x).shape == (0, 32, 9, 7)
    assert residual(x, x.new_empty(0, 32, 9, 7)).shape == (0, 32, 9, 7)


@torch.no_grad()
def test_hooks_and_a_norm_in_training_keep_the_steps_apart(packed: list[torch.Size]) -> None:
    heard: list[str] = []
    source = make_source()
    module, x = ConvBnAct(source).eval(), torch.randn(2, 16, 9, 7)
    handle = source.conv.register_forward_hook(lambda *_: heard.append("conv"))
    module(x)
    handle.remove()
    source.bn.train()
    before = source.bn.running_mean.clone()
    module(x)
    assert heard == ["conv"]
    assert packed == []
    assert not torch.equal(source.bn.running_mean, before)


@torch.no_grad()
def test_the_reference_is_a_convolution_and_a_norm(packed: list[torch.Size]) -> None:
    source = make_source()
    module = ConvBnAct(source).eval()
    x = torch.randn(2, 16, 5, 7).contiguous(memory_format=torch.channels_last)
    with use_backend("reference"):
        assert torch.equal(module(x), source(x))
        assert not packed
    module(x)
    assert len(packed) == 1

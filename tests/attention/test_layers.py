"""The shared layers: what they compute whatever is put into them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from vitzoo.attention import layers
from vitzoo.attention.halo import MaskedHaloAttention
from vitzoo.attention.layers import DepthwiseResidual, Mlp, add_mlp, conv_channels_last
from vitzoo.attention.routing import BiLevelRoutingAttention
from vitzoo.ops import use_backend


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
    torch.testing.assert_close(conv_channels_last(x, conv, add=other), expected)
    with torch.inference_mode():
        torch.testing.assert_close(
            conv_channels_last(x, conv, add=other), expected, rtol=0, atol=1e-6
        )
        assert torch.equal(other, before)
        heard: list[int] = []
        conv.register_forward_hook(lambda *_: heard.append(1))
        conv_channels_last(x, conv, add=other)
    assert heard


def test_a_convolution_and_a_sum_on_one_position() -> None:
    # Torch 2.11 makes no fused sum of it.
    conv, x = nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.randn(3, 1, 1, 8)
    with torch.inference_mode():
        expected = x + conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        torch.testing.assert_close(conv_channels_last(x, conv, add=x), expected)


def test_the_reference_is_a_convolution_and_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[object] = []
    run = layers.convolution_onednn

    def noted(*given: Tensor, **options: Any) -> Tensor:
        fused.append(given)
        return run(*given, **options)

    monkeypatch.setattr(layers, "convolution_onednn", noted)
    position, x = DepthwiseResidual(8), torch.randn(3, 5, 4, 8)
    with torch.inference_mode():
        expected = x + position.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        torch.testing.assert_close(conv_channels_last(x, position.proj, add=x), expected)
        assert len(fused) == 1
        with use_backend("reference"):
            assert torch.equal(conv_channels_last(x, position.proj, add=x), expected)
            assert torch.equal(position(x), expected)
            # Convolutions have no such backend, and it is not asked of them.
            with use_backend("portable"):
                conv_channels_last(x, position.proj, add=x)
        with use_backend("reference", operator="convolution"):
            conv_channels_last(x, position.proj, add=x)
    assert len(fused) == 2


def make_half_block(width: int = 8) -> tuple[nn.LayerNorm, Mlp, nn.Module]:
    torch.manual_seed(0)
    return nn.LayerNorm(width).eval(), Mlp(width, 3 * width).eval(), nn.Dropout(0.5).eval()


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of the MLP's first layer."""
    rows: list[int] = []
    run = layers.linear_gelu

    def counted(x: Tensor, *args: Tensor) -> Tensor:
        rows.append(x.shape[:-1].numel())
        return run(x, *args)

    monkeypatch.setattr(layers, "linear_gelu", counted)
    return rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_small_position_weights_survive_half_precision(dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    position, x = DepthwiseResidual(64), torch.randn(2, 32, 32, 64).to(dtype).float()
    nn.init.normal_(position.proj.weight, std=1e-2)

    def gains(out: Tensor) -> Tensor:
        return (out * x).sum((0, 1, 2)) / (x * x).sum((0, 1, 2))

    expected = gains(position(x))
    position.to(torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        found = gains(position(x if autocast else x.to(dtype)).float())
    # Rounding of the results averages out over a channel; a tap rounded with its 1 does not.
    assert (found - expected).abs().mean() < 1e-4


def test_add_mlp_takes_large_maps_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, mlp, drop = make_half_block()
    monkeypatch.setattr(layers, "_LARGE_HIDDEN_BYTES", 4 * 24 * 30)
    monkeypatch.setattr(layers, "_HIDDEN_BYTES", 4 * 24 * 13)
    rows = count_calls(monkeypatch)
    x = torch.randn(2, 8, 5, 3).permute(0, 2, 3, 1)
    with torch.no_grad():
        found = add_mlp(x, norm, mlp, drop)
        assert rows == [13, 13, 4]
        torch.testing.assert_close(found, x + mlp(norm(x)))
        rows.clear()
        add_mlp(x[:, 1:], norm, mlp, drop)
    add_mlp(x, norm, mlp, drop).sum().backward()
    assert rows == [24, 30]


def test_add_mlp_shows_whole_maps_to_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_LARGE_HIDDEN_BYTES", 0)
    monkeypatch.setattr(layers, "_HIDDEN_BYTES", 1)
    for listened in (0, 1, 2, 3):
        steps = make_half_block()
        heard = steps[1].fc2 if listened == 3 else steps[listened]
        seen: list[torch.Size] = []

        def note(module: nn.Module, args: object, out: Tensor, to: list = seen) -> None:
            to.append(out.shape)

        heard.register_forward_hook(note)
        with torch.no_grad():
            add_mlp(torch.randn(2, 3, 4, 8), *steps)
        assert seen == [(2, 3, 4, 8)]


@pytest.mark.parametrize("trained", ["norm", "mlp"])
def test_add_mlp_keeps_whole_what_is_trained(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_LARGE_HIDDEN_BYTES", 0)
    monkeypatch.setattr(layers, "_HIDDEN_BYTES", 1)
    norm, mlp, drop = make_half_block()
    module = norm if trained == "norm" else mlp
    for parameter in (*norm.parameters(), *mlp.parameters()):
        parameter.requires_grad_(False)
    weight = next(module.parameters()).requires_grad_()
    add_mlp(torch.randn(2, 3, 4, 8), norm, mlp, drop).sum().backward()
    assert weight.grad is not None
    assert weight.grad.any()


@torch.no_grad()
def test_add_mlp_drops_whole_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stochastic depth draws once an image, also where it alone is in training mode."""
    monkeypatch.setattr(layers, "_LARGE_HIDDEN_BYTES", 0)
    monkeypatch.setattr(layers, "_HIDDEN_BYTES", 1)
    norm, mlp, _ = make_half_block()
    x = torch.randn(8, 3, 4, 8)
    changed = (add_mlp(x, norm, mlp, DropPath(0.5).train()) != x).any(-1).flatten(1)
    assert torch.equal(changed.all(1), changed.any(1))
    assert 0 < changed.all(1).sum() < 8


def test_mlp_computes_what_is_put_on_its_parts() -> None:
    torch.manual_seed(0)
    mlp, x = Mlp(16, 32), torch.randn(3, 16)
    mlp.act = nn.GELU(approximate="tanh")
    expected = mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh"))
    assert torch.equal(mlp(x), expected)
    mlp.act = nn.GELU()
    seen: list[str] = []
    mlp.act.register_forward_pre_hook(lambda *_: seen.append("act"))
    mlp.fc1.register_full_backward_hook(lambda *_: seen.append("fc1"))
    mlp(x.requires_grad_()).sum().backward()
    assert seen == ["act", "fc1"]


@pytest.mark.parametrize(
    ("block", "inner"),
    [
        (Mlp(16, 32), "fc1"),
        (DepthwiseResidual(16), "proj"),
        (MaskedHaloAttention(16, 2, block_size=4, halo_size=1), "kv"),
        (BiLevelRoutingAttention(16, 2, n_win=2, top_k=2), "qkv"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_a_layer_whose_forward_was_replaced_is_called(block: nn.Module, inner: str) -> None:
    # As accelerate does, which brings a weight to the device only then.
    x = torch.randn(1, 8, 8, 16)
    with torch.no_grad():
        expected = block(x)
        layer = block.get_submodule(inner)
        own, weight, bias = layer.forward, layer.weight, layer.bias

        def bring_weights(*given: Tensor) -> Tensor:
            layer.weight, layer.bias = weight, bias
            out = own(*given)
            layer.weight, layer.bias = away
            return out

        away = [None if t is None else nn.Parameter(t.to("meta")) for t in (weight, bias)]
        layer.weight, layer.bias = away
        layer.forward = bring_weights
        try:
            torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)
        finally:
            layer.weight, layer.bias = weight, bias
            del layer.forward

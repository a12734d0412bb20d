"""Channel attention: the layer folded into matrices computes what its four projections compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from vitzoo.attention import channel
from vitzoo.attention.channel import ChannelAttention
from vitzoo.ops import use_backend
from vitzoo.ops._dispatch import listen

# Tokens enough for the folded form to cost less; 8 channels a head.
SIZE, DIM, HEADS = (18, 15), 24, 3


def make_layer(**options: object) -> ChannelAttention:
    torch.manual_seed(0)
    layer = ChannelAttention(DIM, HEADS, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.eval()


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of the folded form."""
    calls: list[int] = []
    run = channel.folded_channel_attention

    def count(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append(len(x))
        return run(x, *args, **kwargs)

    monkeypatch.setattr(channel, "folded_channel_attention", count)
    return calls


@pytest.mark.parametrize("mixes", ["query", "value"])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_folded_is_the_layer(mixes: str, offset: float, folded: list[int]) -> None:
    layer = make_layer(mixes=mixes)
    x = torch.randn(2, *SIZE, DIM) + offset * torch.randn(DIM)
    with torch.no_grad():
        found = layer(x)
        with use_backend("reference", operator="channel_attention"):
            plain = layer(x)
        exact = make_layer(mixes=mixes).double()(x.double())
    assert folded == [2]
    error, of_plain = ((t - exact).abs().max() for t in (found, plain))
    assert error <= max(10 * of_plain, 1e-6 * exact.abs().max())


def test_sums_over_many_tokens_keep_their_digits(folded: list[int]) -> None:
    """Closer to float64 than the layer by itself; with logits in float32 it is 1.6 times as far."""
    torch.manual_seed(0)
    layer = ChannelAttention(96, 3).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.05)
    x = torch.randn(1, 64, 64, 96)
    with torch.no_grad():
        found = layer(x)
        with use_backend("portable", operator="channel_attention"):
            plain = layer(x)
        exact = layer.double()(x.double())
    assert folded == [1]
    error, of_plain = ((t - exact).norm() for t in (found, plain))
    assert error < 0.9 * of_plain


def test_folds_only_where_it_pays_and_nobody_listens(folded: list[int]) -> None:
    layer, x = make_layer(), torch.randn(1, *SIZE, DIM)
    layer(x)  # with gradients
    with torch.no_grad():
        layer(x[:, :4, :4])
        make_layer(qkv_bias=False)(x)
        layer.double()(x.double())
        layer.float()
        with listen(lambda *_: None):
            layer(x)
        layer.proj.register_forward_hook(lambda *_: None)
        layer(x)
    assert folded == []


@torch.no_grad()
def test_weights_may_be_registered_after_biases(folded: list[int]) -> None:
    layer, x = make_layer(), torch.randn(1, *SIZE, DIM)
    expected = layer(x)
    for linear in (layer.qkv, layer.proj):
        prune.identity(linear, "weight")
        prune.remove(linear, "weight")
        assert next(linear.named_parameters())[0] == "bias"
    torch.testing.assert_close(layer(x), expected)
    assert folded == [1, 1]

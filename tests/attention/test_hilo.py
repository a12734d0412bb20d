"""HiLo's split of heads, its padding, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.attention.hilo import HiLo


def filled(*args: int, **kwargs: float) -> HiLo:
    torch.manual_seed(0)
    attn = HiLo(*args, **kwargs)
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.2)
    return attn.double()


def by_definition(attn: HiLo, x: Tensor, head_dim: int) -> Tensor:
    """The map is padded with zeros first; then windows and means are cut from it in loops."""
    (_B, H, W, _), s = x.shape, attn.window_size
    x = F.pad(x, (0, 0, 0, -W % s, 0, -H % s))
    parts = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, head_dim)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.mT * head_dim**-0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    if attn.high_heads:
        high = x.new_zeros(*x.shape[:3], attn.high_heads * head_dim)
        for y in range(0, x.shape[1], s):
            for column in range(0, x.shape[2], s):
                window = x[:, y : y + s, column : column + s].flatten(1, 2)
                out = attend(*attn.h_qkv(window).chunk(3, -1)).unflatten(1, (s, s))
                high[:, y : y + s, column : column + s] = out
        parts.append(attn.h_proj(high)[:, :H, :W])
    if attn.low_heads:
        rows = x.unflatten(2, (-1, s)).unflatten(1, (-1, s))
        k, v = attn.l_kv(rows.mean((2, 4)).flatten(1, 2)).chunk(2, -1)
        low = attend(attn.l_q(x).flatten(1, 2), k, v).unflatten(1, x.shape[1:3])
        parts.append(attn.l_proj(low)[:, :H, :W])
    return torch.cat(parts, -1)


@pytest.mark.parametrize("window_size", [1, 2, 3, 4])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_any_size_window_and_alpha(window_size: int, alpha: float) -> None:
    attn = filled(24, 6, window_size, alpha=alpha)
    for H, W in ((1, 1), (5, 7), (8, 4)):
        x = torch.randn(2, H, W, 24, dtype=torch.float64)
        torch.testing.assert_close(attn(x), by_definition(attn, x, 4))


@pytest.mark.parametrize(
    ("heads", "alpha", "low"),
    [(12, a, n) for a, n in ((0, 0), (0.2, 2), (0.4, 4), (0.5, 6), (0.7, 8), (0.9, 10), (1, 12))]
    + [(16, 0.9, 14)],
)
def test_split_of_heads(heads: int, alpha: float, low: int) -> None:
    attn = HiLo(2 * heads, heads, 2, alpha=alpha)
    assert (attn.low_heads, attn.high_heads) == (low, heads - low)
    names = {name.split(".")[0] for name, _ in attn.named_parameters()}
    assert ("h_qkv" in names) == (low < heads)
    assert ("l_q" in names) == (low > 0)


def test_a_window_of_one_is_ordinary_attention_whatever_alpha() -> None:
    attn = filled(24, 6, 1, alpha=0.3)
    assert attn.low_heads == 6
    assert not hasattr(attn, "h_qkv")


def test_registration_order_is_the_authors() -> None:
    names = dict.fromkeys(name.split(".")[0] for name in HiLo(24, 6).state_dict())
    assert list(names) == ["l_q", "l_kv", "l_proj", "h_qkv", "h_proj"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 5}, "5 heads do not divide 24 channels"),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HiLo(24, **({"num_heads": 6} | arguments))

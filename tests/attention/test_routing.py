"""Bi-level routing attention beyond the golden cases, and recorded choices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.attention.choices import make_choice, record_choices, replay_choices
from vitzoo.attention.routing import AttentionLePE, BiLevelRoutingAttention
from vitzoo.ops.routed import routed_attention_reference

SIZES = [(1, 1), (1, 9), (7, 9), (13, 30), (16, 12)]


def by_definition(block: BiLevelRoutingAttention, x: Tensor) -> Tensor:
    """The block, step by step: descriptors are means of the projected map."""
    H, W = x.shape[1:3]
    n = block.n_win
    height, width = (
        (max(1, H // n), max(1, W // n)) if block.pad_after else (-(-H // n), -(-W // n))
    )
    rows, cols = (-(-H // height), -(-W // width)) if block.pad_after else (n, n)
    pads = (0, 0, 0, cols * width - W, 0, rows * height - H)
    if not block.pad_after:
        x = F.pad(x, pads)
    q, k, v = F.linear(x, block.qkv.weight, block.qkv.bias).chunk(3, dim=-1)
    q_means, k_means = (
        F.avg_pool2d(
            t.movedim(-1, 1), (height, width), ceil_mode=True, count_include_pad=False
        ).flatten(2)
        for t in (q, k)
    )
    scores = q_means.transpose(1, 2) @ k_means
    regions = scores.topk(min(block.top_k, rows * cols), dim=-1).indices
    local = F.conv2d(
        v.movedim(-1, 1), block.lepe.weight, block.lepe.bias, padding=2, groups=x.shape[-1]
    ).movedim(1, -1)
    q, k, v = (F.pad(t, pads) if block.pad_after else t for t in (q, k, v))
    out = routed_attention_reference(
        *(t.unflatten(-1, (block.num_heads, -1)) for t in (q, k, v)),
        regions,
        region_grid=(rows, cols),
        scale=x.shape[-1] ** -0.5,
    ).flatten(-2)
    return F.linear(out[:, :H, :W] + local[:, :H, :W], block.proj.weight, block.proj.bias)


@pytest.mark.parametrize("pad_after", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_any_size(size: tuple[int, int], pad_after: bool) -> None:
    torch.manual_seed(0)
    block = BiLevelRoutingAttention(32, 2, n_win=4, top_k=5, pad_after=pad_after)
    x = torch.randn(2, *size, 32)
    torch.testing.assert_close(block(x), by_definition(block, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lepe_on", ["input", "value"])
def test_full_attention(lepe_on: str) -> None:
    torch.manual_seed(0)
    block = AttentionLePE(32, 4, lepe_on=lepe_on)
    x = torch.randn(2, 5, 3, 32)
    q, k, v = block.qkv(x).chunk(3, dim=-1)
    local = block.lepe((x if lepe_on == "input" else v).movedim(-1, 1)).movedim(1, -1)
    q, k, v = (t.flatten(1, 2).unflatten(-1, (4, 8)).transpose(1, 2) for t in (q, k, v))
    attended = ((q @ k.mT) * 8**-0.5).softmax(-1) @ v
    expected = block.proj(attended.transpose(1, 2).reshape(x.shape) + local)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_pool", ["ada_avgpool", "ada_maxpool", "avgpool", "maxpool"])
def test_pools_work_inside_each_region(kv_pool: str) -> None:
    torch.manual_seed(0)
    block = BiLevelRoutingAttention(32, 2, n_win=2, top_k=2, kv_pool=kv_pool, kv_size=2)
    x = torch.randn(1, 12, 8, 32)
    pool = {
        "ada_avgpool": lambda t: F.adaptive_avg_pool2d(t, 2),
        "ada_maxpool": lambda t: F.adaptive_max_pool2d(t, 2),
        "avgpool": lambda t: F.avg_pool2d(t, 2),
        "maxpool": lambda t: F.max_pool2d(t, 2),
    }[kv_pool]
    found = block._pool_regions(x, (2, 2))
    h, w = found.shape[1] // 2, found.shape[2] // 2
    for row in range(2):
        for col in range(2):
            region = x[:, row * 6 : row * 6 + 6, col * 4 : col * 4 + 4].movedim(-1, 1)
            mine = found[:, row * h : row * h + h, col * w : col * w + w].movedim(-1, 1)
            torch.testing.assert_close(mine, pool(region))
    assert block(x).shape == x.shape


def test_soft_routing_trains_the_router() -> None:
    block = BiLevelRoutingAttention(
        32, 2, n_win=2, top_k=2, soft_routing=True, diff_routing=True, param_routing=True
    )
    block(torch.randn(1, 4, 4, 32)).square().sum().backward()
    assert block.router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_win": 3, "top_k": 10}, "1 to 9"),
        ({"top_k": 0}, "1 to 49"),
        ({"diff_routing": True}, "soft_routing"),
        ({"soft_routing": True, "param_routing": True}, "diff_routing"),
        ({"qk_dim": 33}, "do not divide"),
        ({"kv_pool": "fracpool"}, "kv_pool must be"),
    ],
)
def test_arguments_are_checked(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BiLevelRoutingAttention(32, 2, **arguments)


def test_recorded_choices_are_replayed() -> None:
    torch.manual_seed(0)
    block = BiLevelRoutingAttention(32, 2, n_win=4, top_k=3)
    x, other = torch.randn(2, 1, 8, 8, 32)
    with record_choices() as choices:
        expected = block(x)
        block(other)
    assert [tuple(c.shape) for c in choices] == [(1, 16, 3)] * 2
    with replay_choices(choices), record_choices() as again:
        assert torch.equal(block(x), expected)
        block(x)
    assert all(torch.equal(a, b) for a, b in zip(choices, again, strict=True))
    with replay_choices(choices[1:]):
        assert not torch.equal(block(x), expected)
    assert torch.equal(block(x), expected)


def test_replay_counts_and_checks_shapes() -> None:
    def ask() -> Tensor:
        return make_choice(lambda: torch.zeros(2, 3))

    with pytest.raises(ValueError, match="fewer choices than the 2"), replay_choices([ask()] * 2):
        ask()
    with pytest.raises(ValueError, match="more choices"), replay_choices([]):
        ask()
    shapes = r"\(1, 3\), this pass needs \(2, 3\)"
    with pytest.raises(ValueError, match=shapes), replay_choices([torch.zeros(1, 3)]):
        ask()

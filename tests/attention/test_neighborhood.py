"""The neighborhood attention block: small maps are padded before the projection."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitzoo.attention.neighborhood import NeighborhoodAttention


@pytest.mark.parametrize("size", [(5, 20), (16, 3), (1, 1)])
def test_a_small_map_is_padded_before_the_projection(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block = NeighborhoodAttention(16, 2, 7, dilation=2).double()
    nn.init.normal_(block.qkv.bias)
    nn.init.normal_(block.rpb)
    H, W = size
    x = torch.randn(2, H, W, 16, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, max(14 - W, 0), 0, max(14 - H, 0)))
    torch.testing.assert_close(block(x), block(padded)[:, :H, :W])
    # The padded positions are keys: what the projection makes of zero counts.
    before = block(x)
    with torch.no_grad():
        block.qkv.bias.add_(1)
    assert (block(x) - before).abs().max() > 1e-3


def test_heads_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="3 heads do not divide 16"):
        NeighborhoodAttention(16, 3)

"""Position tables for grids of any size."""

from __future__ import annotations

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vitzoo.attention.positions import bicubic_matrix, resample_positions


class _Resampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(1, 49, 8))

    def forward(self, x: Tensor) -> Tensor:
        return resample_positions(self.table, *x.shape[1:])


def test_an_exported_graph_resizes_as_timm_does() -> None:
    torch.manual_seed(0)
    module = _Resampled()
    free = {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    graph = torch.export.export(module, (torch.zeros(1, 9, 11),), dynamic_shapes=(free,)).module()
    for height, width in ((2, 3), (7, 7), (5, 16), (21, 7)):
        expected = resample_abs_pos_embed(module.table, [height, width], num_prefix_tokens=0)
        found = graph(torch.zeros(1, height, width))
        assert found.shape == (1, height, width, 8)
        torch.testing.assert_close(found.flatten(1, 2), expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize("target", [1, 3, 8, 20])
def test_weights_keep_a_constant(target: int) -> None:
    weight = bicubic_matrix(8, target)
    torch.testing.assert_close(weight.sum(1), torch.ones(target))
    torch.testing.assert_close(weight, weight.flip(0, 1), atol=1e-6, rtol=0)

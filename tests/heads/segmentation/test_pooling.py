"""Adaptive pooling in a graph of any size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitzoo.heads.segmentation.pooling import AdaptiveAvgPool2d


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_an_exported_graph_pools_as_torch_does(bins: int) -> None:
    torch.manual_seed(0)
    free = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        AdaptiveAvgPool2d(bins), (torch.zeros(1, 4, 7, 9),), dynamic_shapes=(free,)
    )
    # The operator itself would be unrolled for this size later.
    assert not [node for node in program.graph.nodes if "adaptive" in str(node.target)]
    for height, width in ((2, 3), (7, 7), (13, 6), (1, 32)):
        x = torch.randn(1, 4, height, width)
        found = program.module()(x)
        torch.testing.assert_close(found, F.adaptive_avg_pool2d(x, bins), atol=1e-6, rtol=0)

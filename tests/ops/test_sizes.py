"""A compiled graph of unknown sides serves maps that need padding and maps that do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental import _config

from vitzoo.attention.layers import pad_image_to_multiple, pad_to_multiple
from vitzoo.ops import halo_attention, window_attention


def _windows(x: Tensor) -> Tensor:
    q = x.unflatten(-1, (2, 8))
    return window_attention(q, q, q, window_size=7)


def _halos(x: Tensor) -> Tensor:
    q = x.unflatten(-1, (2, 8))
    return halo_attention(q, q, q, block_size=4, halo_size=1)


@pytest.mark.parametrize(
    "step",
    [
        _windows,
        _halos,
        lambda x: pad_to_multiple(x, 4),
        lambda x: pad_image_to_multiple(x, 4),
    ],
    ids=["windows", "halos", "maps", "images"],
)
# Otherwise torch itself asks whether a cropped map is contiguous.
@_config.patch(backed_size_oblivious=True)
def test_one_graph_for_padded_and_whole_maps(step: Callable[[Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    # Padded on both sides, on none, on one; of more than two windows or blocks a side.
    shapes = [(2, 18, 23, 16), (3, 28, 56, 16), (4, 15, 28, 16), (5, 28, 30, 16)]
    first, *others = (torch.randn(shape) for shape in shapes)
    with torch.no_grad():
        torch.testing.assert_close(compiled(first), step(first))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for x in others:
                torch.testing.assert_close(compiled(x), step(x))

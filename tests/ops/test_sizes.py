"""Under torch.compile the zoo asks unknown sides nothing: padding needs no second graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental import _config

from vitzoo.attention.layers import pad_image_to_multiple, pad_to_multiple
from vitzoo.ops import halo_attention, window, window_attention
from vitzoo.ops._sides import crop

FILL = (torch.zeros(2, 8), torch.ones(2, 8))
TABLES = (torch.linspace(-1, 1, 11 * 8).view(11, 8), torch.linspace(1, 0, 11 * 8).view(11, 8))


def _windows(x: Tensor, **options: Any) -> Tensor:
    q = x.unflatten(-1, (2, 8))
    return window_attention(q, q, q, window_size=7, **options)


def _halos(x: Tensor, **options: Any) -> Tensor:
    q = x.unflatten(-1, (2, 8))
    return halo_attention(q, q, q, block_size=4, halo_size=1, **options)


def _plain_backends(x: Tensor) -> Tensor:
    """Whether those without a mask are passed over, as a tensor."""
    q = x.unflatten(-1, (2, 8))
    return x.new_tensor(window._why_not_plain(q, q, q, window_size=7) is not None)


@pytest.mark.parametrize(
    "step",
    [
        _windows,
        partial(_windows, fill=FILL),
        partial(_halos, axial_bias=TABLES),
        partial(_halos, border="mask"),
        lambda x: pad_to_multiple(x, 4),
        lambda x: pad_image_to_multiple(x, 4),
    ],
    ids=["windows", "filled", "halos", "masked-halos", "maps", "images"],
)
# Otherwise torch itself asks whether a cropped map is contiguous.
@_config.patch(backed_size_oblivious=True)
def test_one_graph_for_padded_and_whole_maps(step: Callable[[Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    # Padded on both sides, on none, on one; of more than two windows or blocks a side.
    # No two sizes are equal, or torch takes them for one.
    shapes = [(3, 18, 23, 16), (5, 28, 56, 16), (6, 15, 28, 16), (9, 28, 30, 16)]
    first, *others = (torch.randn(shape) for shape in shapes)
    with torch.no_grad():
        torch.testing.assert_close(compiled(first), step(first))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for x in others:
                torch.testing.assert_close(compiled(x), step(x))


def test_backends_without_a_mask_decline_unknown_sides() -> None:
    x = torch.randn(3, 28, 42, 16)
    assert not _plain_backends(x)
    assert torch.compile(_plain_backends, backend="eager", dynamic=True)(x)


def test_a_batch_of_any_size_copies_nothing() -> None:
    class Crop(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return crop(x, 0, 18, 0, 18)

    program = torch.export.export(
        Crop(), (torch.randn(3, 28, 28, 16),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    assert not [node for node in program.graph.nodes if "clone" in str(node.target)]

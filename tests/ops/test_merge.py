"""Deformable token merging against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.comparison import assert_backend_agrees, random_tensors
from vitzoo.ops import deformable_merge

BACKENDS = ("reference", "portable", "torchvision")


def tensors(
    H: int, W: int, *, spread: float = 2.0, dtype: torch.dtype = torch.float32, channels: int = 5
) -> dict[str, Tensor]:
    """Two maps and offsets of `spread` pixels, which often leave the map."""
    shapes = (2, H, W, channels), (2, H // 2, W // 2, 8), (6, channels, 2, 2), (6,)
    x, offset, weight, bias = random_tensors(0, *shapes, dtype=dtype)
    offset = (spread * offset).detach().requires_grad_()
    return {"x": x, "offset": offset, "weight": weight, "bias": bias}


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("size", [(2, 2), (2, 3), (7, 9), (13, 30)])
def test_backends_agree(backend: str, size: tuple[int, int]) -> None:
    assert_backend_agrees(deformable_merge, backend, tensors(*size), bound=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_offsets_it_is_a_convolution(backend: str) -> None:
    x, _, weight, bias = tensors(7, 9).values()
    out = deformable_merge(x, torch.zeros(2, 3, 4, 8), weight, bias, backend=backend)
    expected = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=2).permute(0, 2, 3, 1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dy", "dx", "expected"),
    # The one-channel map counts 1, 2, 3, 4 row by row; only the first point has a weight.
    [
        (0, 0, 1.0),
        (0, 1, 2.0),
        (1, 0, 3.0),
        (0.5, 0.5, 2.5),
        (-0.25, 0, 0.75),
        (1.5, 1, 2.0),
        (-1, 0, 0.0),
        (2, 0, 0.0),
        (0, 1e20, 0.0),
    ],
)
def test_offset_order_and_zero_border(backend: str, dy: float, dx: float, expected: float) -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 2, 2, 1)
    offset = torch.tensor([dy, dx, *[0.0] * 6]).view(1, 1, 1, 8)
    weight = torch.tensor([1.0, 0, 0, 0]).view(1, 1, 2, 2)
    assert deformable_merge(x, offset, weight, backend=backend).item() == pytest.approx(expected)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_gradcheck(backend: str) -> None:
    given = tuple(tensors(4, 5, dtype=torch.float64, channels=2).values())
    assert torch.autograd.gradcheck(lambda *a: deformable_merge(*a, backend=backend), given)


def test_bfloat16_keeps_positions_exact() -> None:
    given = tensors(2, 200, spread=0.5)
    half = [t.detach().bfloat16() for t in given.values()]
    exact = deformable_merge(*(t.float() for t in half), backend="reference")
    for backend in BACKENDS[:2]:
        out = deformable_merge(*half, backend=backend).float()
        assert (out - exact).abs().max() < 0.03 * exact.abs().max()


def test_a_diverged_offset_gives_nan_and_stays_inside_the_map() -> None:
    x, offset, weight, bias = (t.detach() for t in tensors(4, 4).values())
    offset[0, 0, 0, 0] = float("nan")
    out = deformable_merge(x, offset, weight, bias)
    assert out[0, 0, 0].isnan().all()
    assert not out[1].isnan().any()


def test_offsets_of_another_shape_are_refused() -> None:
    x, offset, weight, bias = tensors(7, 9).values()
    with pytest.raises(ValueError, match=r"must have the shape \(2, 3, 4, 8\)"):
        deformable_merge(x, offset[:, :2], weight, bias)


def test_an_exported_graph_has_no_bags() -> None:
    given = {name: x.detach() for name, x in tensors(7, 9).items()}

    class Merge(torch.nn.Module):
        def forward(self, x: Tensor, offset: Tensor) -> Tensor:
            return deformable_merge(x, offset, given["weight"], given["bias"])

    inputs = (given["x"], given["offset"])
    program = torch.export.export(Merge(), inputs)
    assert not [node for node in program.graph.nodes if "embedding_bag" in str(node.target)]
    expected = deformable_merge(**given, backend="reference")
    torch.testing.assert_close(program.module()(*inputs), expected, atol=2e-5, rtol=0)

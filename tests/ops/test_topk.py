"""The k largest of each row, by each backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitzoo.ops import topk, topk_mask
from vitzoo.ops.topk import TOPK_MASK, topk_mask_reference

SHAPES = [(1, 1), (7, 9), (2, 3, 13, 30), (3, 1500, 17), (0, 5)]
EXACT = ["numpy", "portable"]


def scores(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference(backend: str, shape: tuple[int, ...]) -> None:
    x = scores(*shape)
    for k in {1, (shape[-1] + 1) // 2, shape[-1]}:
        assert torch.equal(topk_mask(x, k, backend=backend), topk_mask_reference(x, k))


@pytest.mark.parametrize("part", [1, 1 << 19])
def test_parts_change_nothing(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "_PART_BYTES", part)
    x = scores(500, 12)
    assert torch.equal(topk_mask(x, 5, backend="numpy"), topk_mask_reference(x, 5))


@pytest.mark.parametrize("backend", EXACT)
def test_ties_go_to_the_left(backend: str) -> None:
    x = torch.tensor([[0.0, 1.0, 0.0, 0.0, 2.0], [3.0, 3.0, 3.0, 3.0, 3.0], [4.0, 3, 2, 1, 0]])
    expected = [[1, 1, 0, 0, 1], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    assert topk_mask(x, 3, backend=backend).int().tolist() == expected


@pytest.mark.parametrize("backend", EXACT)
def test_zeros_are_equal_whatever_their_sign(backend: str) -> None:
    x = torch.tensor([[-0.0, 0.0, 1.0], [0.0, -0.0, 1.0]])
    assert topk_mask(x, 2, backend=backend).int().tolist() == [[1, 0, 1]] * 2


@pytest.mark.parametrize("backend", EXACT)
def test_rows_that_exclude_entries(backend: str) -> None:
    x = scores(6, 10).masked_fill(torch.arange(10) > 6, float("-inf"))
    assert torch.equal(topk_mask(x, 4, backend=backend), topk_mask_reference(x, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", EXACT)
def test_other_types_take_exactly_k(backend: str, dtype: torch.dtype) -> None:
    x = scores(40, 33).to(dtype)
    mask = topk_mask(x, 8, backend=backend)
    assert mask.dtype == torch.bool
    assert (mask.sum(-1) == 8).all()
    chosen = x.masked_fill(~mask, float("-inf")).sort(-1, descending=True).values[:, :8]
    assert torch.equal(chosen, x.sort(-1, descending=True).values[:, :8])


@pytest.mark.parametrize("backend", EXACT)
def test_views_are_taken_as_they_read(backend: str) -> None:
    x = scores(4, 20, 6).transpose(1, 2)
    assert torch.equal(topk_mask(x, 7, backend=backend), topk_mask_reference(x, 7))


def test_one_node_of_a_compiled_graph() -> None:
    x = scores(5, 8)
    torch.library.opcheck(torch.ops.vitzoo.topk_mask_numpy.default, (x, 3))
    compiled = torch.compile(lambda x: topk_mask(x, 3), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), topk_mask_reference(x, 3))


def test_impossible_counts_and_devices() -> None:
    for k in (0, 6):
        with pytest.raises(ValueError, match="1 to 5"):
            topk_mask(scores(2, 5), k)
    reason = TOPK_MASK.why_not("numpy", scores(2, 5).to("meta"), 1)
    assert reason is not None
    assert "meta" in reason


@pytest.mark.parametrize("backend", ["numpy", "portable", "reference"])
def test_numbers_that_float32_does_not_tell_apart(backend: str) -> None:
    scores = torch.tensor([[1.0, 1.0 + 1e-12, 0.5]], dtype=torch.float64)
    assert topk_mask(scores, 1, backend=backend).tolist() == [[False, True, False]]
    whole = torch.tensor([[2**24, 2**24 + 1, 3]])
    assert topk_mask(whole, 1, backend=backend).tolist() == [[False, True, False]]

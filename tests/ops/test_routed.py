"""Routed attention: every path against the definition."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

from tests.ops.comparison import assert_backend_agrees, random_tensors
from vitzoo.ops import _products, attention, routed, routed_attention
from vitzoo.ops.routed import routed_attention_reference

assert_agrees = partial(assert_backend_agrees, routed_attention, "portable")

# Map, grid, regions chosen: those of few tokens and many choices are masked, the rest gathered.
CASES = {
    "one token": ((1, 1), (1, 1), 1),
    "one row of regions": ((7, 9), (7, 3), 2),
    "oblong": ((13, 30), (13, 5), 4),
    "biformer stage 1": ((56, 56), (7, 7), 1),
    "biformer stage 2": ((28, 28), (7, 7), 4),
    "biformer stage 3": ((14, 14), (7, 7), 16),
    "all regions": ((6, 10), (3, 5), 15),
}


def make_inputs(
    size: tuple[int, int],
    grid: tuple[int, int],
    chosen: int,
    *,
    kv_size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], Tensor]:
    """Random q, k (2 heads of 8) and v (2 heads of 12), and region numbers."""
    kv_size = kv_size or size
    tensors = random_tensors(
        0, (2, *size, 2, 8), (2, *kv_size, 2, 8), (2, *kv_size, 2, 12), dtype=dtype
    )
    p = grid[0] * grid[1]
    scores = torch.rand(2, p, p, generator=torch.Generator().manual_seed(0))
    return dict(zip("qkv", tensors, strict=True)), scores.topk(chosen, dim=-1).indices


@pytest.mark.parametrize("case", CASES)
def test_portable_is_the_definition(case: str) -> None:
    size, grid, chosen = CASES[case]
    qkv, regions = make_inputs(size, grid, chosen)
    assert_agrees(qkv, regions=regions, region_grid=grid, scale=0.3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("piece", [1, 2 << 20])
def test_products_are_the_definition(
    case: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_products, "_PIECE_BYTES", piece)
    size, grid, chosen = CASES[case]
    qkv, regions = make_inputs(size, grid, chosen)
    with torch.no_grad():
        found, expected = (
            routed_attention(**qkv, regions=regions, region_grid=grid, scale=0.3, backend=backend)
            for backend in ("products", "reference")
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_products_take_numbers_in_another_order() -> None:
    qkv, regions = make_inputs((12, 9), (3, 3), 2)
    turned = regions.transpose(1, 2).contiguous().transpose(1, 2)
    with torch.no_grad():
        found, expected = (
            routed_attention(**qkv, regions=given, region_grid=(3, 3), backend="products")
            for given in (turned, regions)
        )
    assert torch.equal(found, expected)


def test_products_take_pooled_keys_and_refuse_gradients() -> None:
    qkv, regions = make_inputs((14, 21), (7, 7), 3, kv_size=(7, 14))
    given = {"regions": regions, "region_grid": (7, 7)}
    with pytest.raises(ValueError, match="no backward"):
        routed_attention(**qkv, **given, backend="products")
    with torch.no_grad():
        found = routed_attention(**qkv, **given, backend="products")
        torch.testing.assert_close(found, routed_attention_reference(**qkv, **given))


@pytest.mark.parametrize("piece", [1, 20_000])
def test_a_few_regions_at_a_time(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed, "_PIECE_BYTES", piece)
    qkv, regions = make_inputs((28, 21), (7, 7), 3)
    assert_agrees(qkv, regions=regions, region_grid=(7, 7))


@pytest.mark.parametrize("kv_size", [(3, 6), (30, 6)])
def test_pooled_keys(kv_size: tuple[int, int]) -> None:
    qkv, regions = make_inputs((12, 9), (3, 3), 2, kv_size=kv_size)
    assert_agrees(qkv, regions=regions, region_grid=(3, 3))


def test_weights() -> None:
    qkv, regions = make_inputs((12, 9), (3, 3), 2)
    weights = torch.rand(regions.shape, requires_grad=True)
    assert_agrees({**qkv, "weights": weights}, regions=regions, region_grid=(3, 3))


def test_masked_and_gathered_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, regions = make_inputs((14, 14), (7, 7), 16)
    with profile() as masked_run:
        masked = routed_attention(*qkv.values(), regions, region_grid=(7, 7))
    monkeypatch.setattr(routed, "_MASKED_TOKENS", 0)
    with profile() as gathered_run:
        gathered = routed_attention(*qkv.values(), regions, region_grid=(7, 7))
    calls = [{e.name for e in run.events()} for run in (masked_run, gathered_run)]
    assert ["aten::index_select" in names for names in calls] == [False, True]
    torch.testing.assert_close(masked, gathered, rtol=1e-5, atol=1e-5)


def test_all_regions_are_full_attention() -> None:
    qkv, regions = make_inputs((6, 10), (3, 5), 15)
    full = attention(*(x.flatten(1, 2) for x in qkv.values())).unflatten(1, (6, 10))
    found = routed_attention(*qkv.values(), regions, region_grid=(3, 5))
    torch.testing.assert_close(found, full, rtol=1e-5, atol=1e-5)


def test_gradients_of_the_definition() -> None:
    qkv, regions = make_inputs((2, 4), (2, 2), 3, dtype=torch.float64)
    weights = torch.rand(regions.shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        partial(routed_attention_reference, regions=regions, region_grid=(2, 2), weights=weights),
        tuple(qkv.values()),
    )


def test_backward_keeps_no_gathered_keys() -> None:
    """What autograd keeps is as large as q, k, v and the region numbers, whatever is chosen."""
    qkv, regions = make_inputs((56, 56), (7, 7), 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        routed_attention(*qkv.values(), regions, region_grid=(7, 7))
    assert sum(kept) <= sum(x.numel() for x in qkv.values()) + regions.numel()


@pytest.mark.parametrize("chosen", [4, 16])
def test_compiled(chosen: int) -> None:
    qkv, regions = make_inputs((14, 14), (7, 7), chosen)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routed_attention(q, k, v, regions, region_grid=(7, 7))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, found = run(**qkv), compiled(**qkv)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), list(qkv.values())),
        torch.autograd.grad(expected.square().sum(), list(qkv.values())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_arguments_are_checked() -> None:
    qkv, regions = make_inputs((6, 9), (3, 3), 2)
    with pytest.raises(ValueError, match="2 x 3 regions does not divide q, 5 x 9"):
        routed_attention(**qkv | {"q": qkv["q"][:, :5]}, regions=regions, region_grid=(2, 3))
    with pytest.raises(ValueError, match=r"\(B, 6, chosen\)"):
        routed_attention(*qkv.values(), regions, region_grid=(2, 3))
    with pytest.raises(ValueError, match="q has 4 axes"):
        routed_attention(**qkv | {"q": qkv["q"][0]}, regions=regions, region_grid=(3, 3))

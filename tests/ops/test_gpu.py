"""What only a GPU shows of the kernels beyond `vitzoo bench gpu`'s comparisons."""

from __future__ import annotations

import pytest
import torch

from vitzoo.engine import bench_cases as cases
from vitzoo.ops import OPERATORS, attention, use_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CALLS = {
    "window": cases.window(13, 30, batch=2, biased=True, filled=True),
    "halo": cases.halo(13, 30, batch=2),
    "neighborhood": cases.neighborhood(13, 30, batch=2),
    "routed": cases.routed(24, grid=3, chosen=2, heads=3),
    "grouped": cases.grouped(300, 7),
}


def results(name: str, form: str = "triton") -> list[torch.Tensor]:
    case = CALLS[name].on("cuda")
    leaves = case.leaves(torch.bfloat16, "cuda")
    out = case.run(leaves, form)
    return [out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))]


@pytest.mark.parametrize("name", CALLS)
def test_results_repeat_bit_for_bit(name: str) -> None:
    first = results(name)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, results(name), strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_one_graph_under_compile(name: str) -> None:
    case = CALLS[name].on("cuda")
    leaves = case.leaves(torch.bfloat16, "cuda")
    compiled = torch.compile(lambda **given: case.run(given, "triton"), fullgraph=True)
    found = compiled(**leaves)
    gradients = torch.autograd.grad(found, list(leaves.values()), torch.ones_like(found))
    for a, b in zip([found, *gradients], results(name), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["window", "halo", "neighborhood", "routed"])
def test_an_empty_batch(name: str) -> None:
    case = CALLS[name].on("cuda")
    given = case.leaves(torch.bfloat16, "cuda")
    empty = {n: t[:0] if t.dim() == 5 else t for n, t in given.items()}
    settings = {"regions": case.settings["regions"][:0]} if name == "routed" else {}
    out = cases.replace(case, settings={**case.settings, **settings}).run(empty, "triton")
    assert out.shape[0] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", CALLS)
def test_what_is_not_finite_propagates(name: str, bad: float) -> None:
    case = CALLS[name].on("cuda")
    leaves = {n: t.detach() for n, t in case.leaves(torch.bfloat16, "cuda").items()}
    leaves["v"][(0,) * leaves["v"].dim()] = bad
    assert not case.run(leaves, "triton").isfinite().all()


def test_a_batch_of_more_than_2_to_31_numbers() -> None:
    shape = (7200, 56, 56, 3, 32)
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    assert q.numel() > 2**31
    for seed, x in enumerate((q, k, v)):
        torch.manual_seed(seed)
        for t in (x[0], x[-1]):
            t.normal_()
    operator = OPERATORS["window_attention"]
    whole = operator(q, k, v, window_size=7, backend="triton")
    for i in (0, -1):
        alone = (x[i][None].clone() for x in (q, k, v))
        assert torch.equal(whole[i], operator(*alone, window_size=7, backend="triton")[0])


def test_more_windows_than_a_grid_can_number() -> None:
    q = torch.randn(70_000, 4, 2, 16, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    out = attention(q, q, q)
    (found,) = torch.autograd.grad(out.sum(), q)
    few = q[-3:].detach().requires_grad_()
    alone = attention(few, few, few)
    torch.testing.assert_close(out[-3:], alone)
    torch.testing.assert_close(found[-3:], *torch.autograd.grad(alone.sum(), few))


def test_auto_takes_what_was_proven_here() -> None:
    case = CALLS["window"].on("cuda")
    leaves = case.leaves(torch.bfloat16, "cuda")
    q, k, v = (leaves[n] for n in "qkv")
    chosen = OPERATORS["window_attention"].select(q, k, v, window_size=7)
    assert chosen.name == "triton"
    with use_backend("portable"):
        chosen = OPERATORS["window_attention"].select(q, k, v, window_size=7)
    assert chosen.name == "portable"

"""Routed regions and groups: outputs and all gradients against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.comparison import assert_backend_agrees, random_tensors
from tests.ops.triton_interpreter.common import assert_half_precision_agrees, surrounded
from vitzoo.ops import OPERATORS, grouped_attention, routed_attention

# images, map, map of keys, grid, regions chosen, heads, head_dim of q and of v
ROUTED = [
    (1, (1, 1), (1, 1), (1, 1), 1, 1, 16, 16),
    (2, (7, 6), (7, 6), (7, 2), 2, 1, 20, 12),
    (1, (6, 10), (6, 10), (3, 5), 15, 1, 16, 48),
    (2, (6, 4), (2, 6), (2, 2), 2, 2, 32, 32),
    (1, (10, 7), (10, 7), (2, 1), 1, 2, 8, 8),
]
# tokens of the frames, of a group
GROUPED = [((70,), 48), ((1, 5), 4), ((0, 9, 4, 0), 4), ((3, 8), 9)]


def choose(grid: tuple[int, int], chosen: int, batch: int = 1) -> Tensor:
    """Numbers of so many regions for each."""
    p = grid[0] * grid[1]
    scores = torch.rand(batch, p, p, generator=torch.Generator().manual_seed(0))
    return scores.topk(chosen, dim=-1).indices


@pytest.mark.parametrize(
    ("batch", "size", "key_size", "grid", "chosen", "heads", "d", "d_v"), ROUTED
)
def test_routed(
    batch: int,
    size: tuple[int, int],
    key_size: tuple[int, int],
    grid: tuple[int, int],
    chosen: int,
    heads: int,
    d: int,
    d_v: int,
) -> None:
    shapes = [(batch, *s, heads, n) for s, n in ((size, d), (key_size, d), (key_size, d_v))]
    tensors = dict(zip("qkv", random_tensors(0, *shapes), strict=True))

    def call(**t: Tensor) -> dict:
        return {name: surrounded(t[name]) for name in "qkv"}

    regions = choose(grid, chosen, batch)
    options = {"regions": regions, "region_grid": grid, "scale": 0.3}
    assert_backend_agrees(routed_attention, "triton", tensors, call, **options)


@pytest.mark.parametrize(("counts", "group"), GROUPED)
def test_grouped(counts: tuple[int, ...], group: int) -> None:
    tokens = sum(counts)
    shapes = (tokens, 2, 16), (tokens, 2, 16), (tokens, 2, 24)
    tensors = dict(zip("qkv", random_tensors(0, *shapes), strict=True))

    def call(**t: Tensor) -> dict:
        return {name: surrounded(t[name]) for name in "qkv"}

    options = {"group_size": group, "frame_offsets": torch.tensor([0, *counts]).cumsum(0)}
    assert_backend_agrees(grouped_attention, "triton", tensors, call, **options)


def test_float16_is_as_good_as_the_plain_path() -> None:
    tensors = [t.detach() for t in random_tensors(1, *[(1, 6, 6, 1, 16)] * 3)]
    options = {"regions": choose((2, 2), 3), "region_grid": (2, 2)}
    results = {}
    for name in ("exact", "triton", "reference"):
        dtype = torch.float32 if name == "exact" else torch.float16
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        backend = "reference" if name == "exact" else name
        out = routed_attention(*leaves, backend=backend, **options)
        ramp = torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype)
        results[name] = [out.detach(), *torch.autograd.grad((out * ramp).sum(), leaves)]
    assert_half_precision_agrees(results, results["exact"])


def test_log_sum_exp_and_its_gradient() -> None:
    from vitzoo.ops import _triton_backends

    q, k, v = random_tensors(0, *[(9, 1, 16)] * 3)
    options = {"group_size": 9, "frame_offsets": torch.tensor([0, 9])}
    out, lse = _triton_backends.grouped_attention(q, k, v, return_lse=True, **options)
    logits = torch.einsum("nhd,mhd->hnm", q, k) / 4
    expected = logits.logsumexp(-1).transpose(0, 1)
    torch.testing.assert_close(lse, expected)
    found = torch.autograd.grad((lse * lse.detach()).sum() + out.sum(), (q, k))
    plain = torch.einsum("hnm,mhd->nhd", logits.softmax(-1), v)
    wanted = torch.autograd.grad((expected * lse.detach()).sum() + plain.sum(), (q, k))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def _calls(q: Tensor) -> dict[str, Tensor]:
    options = {"backend": "triton"}
    regions, line = choose((2, 1), 1, len(q)), q.flatten(0, 2)
    offsets = torch.tensor([0, len(line)])
    return {
        "routed": routed_attention(q, q, q, regions, region_grid=(2, 1), **options),
        "grouped": grouped_attention(
            line, line, line, group_size=7, frame_offsets=offsets, **options
        ),
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_propagates(bad: float) -> None:
    q = torch.ones(1, 4, 3, 1, 16)
    q[0, 0, 0, 0, 0] = bad
    for name, out in _calls(q).items():
        assert not out.flatten(0, -3)[0].isfinite().all(), name


def test_an_empty_batch() -> None:
    q = torch.zeros(0, 4, 3, 2, 16, requires_grad=True)
    for name, out in _calls(q).items():
        assert out.numel() == 0, name
        (gradient,) = torch.autograd.grad(out.sum(), q)
        assert gradient.shape == q.shape


def test_results_repeat_bit_for_bit() -> None:
    leaves = random_tensors(0, *[(1, 6, 6, 1, 16)] * 3)
    regions = choose((2, 2), 3)
    runs = []
    for _ in range(2):
        out = routed_attention(*leaves, regions, region_grid=(2, 2), backend="triton")
        runs.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_autocast_takes_its_dtype() -> None:
    q = torch.randn(4, 1, 16)
    offsets = torch.tensor([0, 4])
    with torch.autocast("cpu", dtype=torch.float16):
        out = grouped_attention(q, q, q, group_size=4, frame_offsets=offsets, backend="triton")
    assert out.dtype == torch.float16


def test_weights_of_regions_are_left_to_others() -> None:
    q, regions = torch.zeros(1, 2, 2, 1, 16), choose((1, 1), 1)
    asked = {"region_grid": (1, 1), "weights": torch.ones(1, 1, 1)}
    sentence = OPERATORS["routed_attention"].why_not("triton", q, q, q, regions, **asked)
    assert sentence == "its kernels take no weights of regions."


def test_operator_contract() -> None:
    from vitzoo.ops._triton.library import tiles

    leaves = random_tensors(0, *[(1, 2, 3, 1, 16)] * 3)
    torch.library.opcheck(
        tiles, (*leaves, torch.zeros(1, 1, 1, dtype=torch.int32), None, None, [1, 1], 0.25)
    )


def test_one_graph_with_gradients() -> None:
    torch._dynamo.reset()
    leaves = random_tensors(0, *[(7, 1, 16)] * 3)
    offsets = torch.tensor([0, 5, 7])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return grouped_attention(q, k, v, group_size=4, frame_offsets=offsets, backend="triton")

    plain = attend(*leaves)
    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(out, plain)
    found = torch.autograd.grad(out.square().sum(), leaves)
    wanted = torch.autograd.grad(plain.square().sum(), leaves)
    torch.testing.assert_close(found, wanted)

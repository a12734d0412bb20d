"""Halo attention: the fast path against the definition, and the definition's own derivative."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitzoo.ops import _halo, halo_attention

SIZES = [(1, 1), (7, 9), (13, 30), (16, 24)]


def inputs(
    H: int, W: int, *, stride: int = 1, heads: int = 2, dims: tuple[int, int] = (4, 6), window: int
) -> dict[str, Tensor]:
    torch.manual_seed(H * 100 + W)
    qk, dv = dims
    shapes = {
        "q": (2, -(-H // stride), -(-W // stride), heads, qk),
        "k": (2, H, W, heads, qk),
        "v": (2, H, W, heads, dv),
        "height": (2 * window - 1, qk),
        "width": (2 * window - 1, qk),
        "k_fill": (heads, qk),
        "v_fill": (heads, dv),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def call(
    given: dict[str, Tensor], *, border: str = "zero", bias: bool = True, **kwargs: object
) -> Tensor:
    return halo_attention(
        given["q"],
        given["k"],
        given["v"],
        axial_bias=(given["height"], given["width"]) if bias else None,
        border=border,
        fill=(given["k_fill"], given["v_fill"]) if border == "constant" else None,
        **kwargs,
    )


@pytest.mark.parametrize("border", ["zero", "mask", "constant"])
@pytest.mark.parametrize(
    ("block", "halo_size", "stride", "on_amd"),
    [(8, 3, 1, False), (8, 3, 1, True), (7, 2, 1, True), (4, 1, 2, False)],
)
@pytest.mark.parametrize(("H", "W"), SIZES)
def test_portable_is_the_reference(
    H: int,
    W: int,
    block: int,
    halo_size: int,
    stride: int,
    on_amd: bool,
    border: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_halo, "mkl_on_amd", lambda: on_amd)
    given = inputs(H, W, stride=stride, window=block + 2 * halo_size)
    used = [name for name in given if border == "constant" or "fill" not in name]
    arguments = {"block_size": block, "halo_size": halo_size, "stride": stride, "border": border}
    weight = torch.randn_like(call(given, **arguments))
    results = []
    for backend in ("reference", "portable"):
        leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
        out = call(leaves, backend=backend, **arguments)
        grads = torch.autograd.grad((out * weight).sum(), [leaves[name] for name in used])
        results.append([out.detach(), *grads])
    for name, expected, found in zip(["out", *used], *results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(call(given, **arguments), results[0][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("border", ["zero", "mask"])
def test_without_relative_logits(border: str) -> None:
    given = inputs(9, 14, window=10)
    arguments = {"block_size": 8, "halo_size": 1, "bias": False, "border": border, "scale": 0.3}
    expected = call(given, backend="reference", **arguments)
    torch._dynamo.reset()
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        found = run(given, backend="portable", **arguments)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_one_block_as_large_as_the_map_is_dense_attention() -> None:
    given = inputs(5, 5, window=5)
    q, k, v = (given[name].flatten(1, 2).transpose(1, 2) for name in "qkv")
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    for backend in ("reference", "portable"):
        found = call(given, block_size=5, halo_size=0, bias=False, backend=backend)
        torch.testing.assert_close(found.flatten(1, 2), dense, rtol=1e-4, atol=1e-5)


# Bytes of scores and of queries, and what they make of 2 images of 4 rows of blocks: (rows whose
# queries are made ready, rows at a time).
CHUNKS = [
    (1, 1, [(1, 1)] * 8),
    (100_000, 50_000, [(2, 1)] * 4),
    (200_000, 2**20, [(4, 3)] * 2),
    (300_000, 1, [(4, 4)] * 2),
    (2**20, 1, [(4, 4)]),
]


@pytest.mark.parametrize(("scores", "queries", "chunks"), CHUNKS)
@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize(("value_dim", "on_amd"), [(6, False), (6, True), (16, False)])
def test_chunks_do_not_change_the_result(
    scores: int,
    queries: int,
    chunks: list[tuple[int, int]],
    border: str,
    value_dim: int,
    on_amd: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = inputs(13, 30, dims=(4, value_dim), window=8)
    arguments = {"block_size": 4, "halo_size": 2, "backend": "portable", "border": border}
    whole = call(given, **arguments | {"backend": "reference"})
    monkeypatch.setattr(_halo, "mkl_on_amd", lambda: on_amd)
    monkeypatch.setattr(_halo, "_CPU_CHUNK_BYTES", scores)
    monkeypatch.setattr(_halo, "_CPU_QUERY_BYTES", queries)
    sizes = _halo.Geometry(B=2, H=13, W=30, heads=2, block=4, halo=2, stride=1)
    found = [(rows.stop - rows.start, step) for _, rows, step in sizes.chunks(given["q"], 20)]
    assert found == chunks
    torch.testing.assert_close(call(given, **arguments), whole)
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    torch.testing.assert_close(call(leaves, **arguments), whole)


@pytest.mark.parametrize("border", ["zero", "mask", "constant"])
def test_gradcheck_of_the_reference(border: str) -> None:
    given = inputs(3, 2, heads=1, dims=(1, 2), window=4)
    leaves = {name: value.double().requires_grad_() for name, value in given.items()}

    def run(*tensors: Tensor) -> Tensor:
        named = dict(zip(leaves, tensors, strict=True))
        return call(named, block_size=2, halo_size=1, border=border, backend="reference")

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("border", ["zero", "mask"])
def test_half_precision(dtype: torch.dtype, border: str) -> None:
    given = inputs(13, 18, heads=4, dims=(16, 16), window=14)
    given["height"] *= 0.25
    given["width"] *= 0.25
    exact = call(given, block_size=8, halo_size=3, border=border, backend="reference")
    half = {name: value.to(dtype) for name, value in given.items()}
    arguments = {"block_size": 8, "halo_size": 3, "border": border}
    plain = call(half, backend="reference", **arguments).float() - exact
    fast = call(half, backend="portable", **arguments).float() - exact
    assert fast.isfinite().all()
    assert fast.abs().max() <= 2 * plain.abs().max()


def test_poisoned_memory_never_reaches_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(13, 30, window=14)
    expected = call(given, block_size=8, halo_size=3, border="mask", backend="reference")
    empty = Tensor.new_empty
    monkeypatch.setattr(
        Tensor, "new_empty", lambda self, *size: empty(self, *size).fill_(float("nan"))
    )
    found = call(given, block_size=8, halo_size=3, border="mask", backend="portable")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 3}, "stride 3"),
        ({"border": "wrap"}, "'wrap'"),
        ({"border": "constant"}, "fill missing"),
        ({"stride": 2}, "need queries on 3x5, got 6x9"),
        ({"halo_size": 1}, r"tables of shape \(11, 4\)"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    given = inputs(6, 9, window=8)
    arguments: dict = {"block_size": 4, "halo_size": 2} | change
    with pytest.raises(ValueError, match=message):
        halo_attention(
            given["q"],
            given["k"],
            given["v"],
            axial_bias=(given["height"], given["width"]),
            **arguments,
        )

"""natten beside our definition; `make test-natten` installs it, without kernels: forward, CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("natten", reason="natten is not installed: make test-natten")

from tests.golden_cases import draw_input, load_case
from vitzoo.ops import OPERATORS, neighborhood_attention

# shape, kernel, dilation, head_dim
CASES = [
    ((7, 9), 7, 1, 8),
    ((13, 30), 5, 2, 16),
    ((14, 15), 7, 2, 32),
    ((28, 9), (3, 9), (4, 1), 16),
    ((12, 9), (1, 5), (1, 1), 16),
    ((50,), 7, 1, 32),
    ((23,), 7, 3, 16),
]


def draw(shape: tuple[int, ...], dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, *shape, 2, dim, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize(("shape", "kernel", "dilation", "dim"), CASES)
def test_natten_computes_our_definition(
    shape: tuple[int, ...], kernel: object, dilation: object, dim: int
) -> None:
    options = {"kernel_size": kernel, "dilation": dilation, "scale": 0.3}
    found, expected = (
        neighborhood_attention(*draw(shape, dim), backend=backend, **options)
        for backend in ("natten", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    halves = draw((9, 11), 16, dtype)
    exact = neighborhood_attention(*(t.float() for t in halves), kernel_size=5, backend="reference")
    errors = {}
    for backend in ("natten", "reference"):
        found = neighborhood_attention(*halves, kernel_size=5, backend=backend)
        errors[backend] = (found.float() - exact).abs().max().item()
    assert errors["natten"] <= 2 * max(errors["reference"], torch.finfo(dtype).eps)


@pytest.mark.parametrize("file", ["na1d_ops", "na2d_ops"])
def test_golden_cases(file: str) -> None:
    """The cases of natten 0.14, the authors' release, by the natten of today."""
    golden = load_case("nat", file)
    ran = 0
    for case in (c for c in golden.spec["cases"] if not c["rpb"]):
        q, k, v = (
            draw_input(case[shape], seed)
            for shape, seed in (("q_shape", 1), ("q_shape", 2), ("v_shape", 3))
        )
        options = {"kernel_size": case["kernel"], "dilation": case["dilation"]}
        axes = q.dim() - 3
        both = {n: (o,) * axes if isinstance(o, int) else tuple(o) for n, o in options.items()}
        maps = [t if axes == 2 else t[:, None] for t in (q, k, v)]
        if axes == 1:
            both = {n: (1, *o) for n, o in both.items()}
        if OPERATORS["neighborhood_attention"].why_not("natten", *maps, **both) is None:
            golden.check(case["name"], neighborhood_attention(q, k, v, backend="natten", **options))
            ran += 1
    assert ran


def test_what_natten_cannot_serve() -> None:
    q = torch.zeros(1, 7, 7, 2, 16)
    options = {"kernel_size": 3, "backend": "natten"}
    with pytest.raises(ValueError, match="natten computes no bias"):
        neighborhood_attention(q, q, q, bias=torch.zeros(2, 5, 5), **options)
    with pytest.raises(ValueError, match="natten gives no gradients on cpu"):
        neighborhood_attention(q.requires_grad_(), q, q, **options)
    narrow = torch.zeros(1, 7, 7, 2, 12)
    with pytest.raises(ValueError, match="power of two from 8 on as head_dim on cpu, got 12"):
        neighborhood_attention(narrow, narrow, narrow, **options)


def test_auto_does_not_take_it() -> None:
    q = torch.zeros(1, 7, 7, 2, 16)
    chosen = OPERATORS["neighborhood_attention"].select(q, q, q, kernel_size=(3, 3))
    assert chosen.name == "portable"


def test_what_natten_takes_for_something_else() -> None:
    q = torch.zeros(1, 7, 7, 2, 16)
    options = {"kernel_size": (3, 3), "dilation": (1, 1)}
    why_not = OPERATORS["neighborhood_attention"].why_not
    assert "scale" in (why_not("natten", q, q, q, scale=0.0, **options) or "")
    assert "empty" in (why_not("natten", q[:0], q[:0], q[:0], **options) or "")
    assert "one key" in (why_not("natten", q, q, q, kernel_size=(3, 1)) or "")

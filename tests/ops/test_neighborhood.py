"""Neighborhood attention: the definition, its golden cases, and the tiles against it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.golden_cases import GoldenCase, draw_input, draw_weight, load_case
from vitzoo.ops import neighborhood_attention
from vitzoo.ops.neighborhood import _why_not_triton, portable
from vitzoo.ops.neighborhood.flat import neighborhood_attention_flat
from vitzoo.ops.neighborhood.symbolic import neighborhood_attention_symbolic

GOLDEN = [
    (file, case["name"])
    for file in ("na1d_ops", "na2d_ops", "na2d_rpb_ops")
    for case in load_case("nat", file).spec["cases"]
]
# shape, kernel, dilation
CASES = [
    ((1, 1), 1, 1),
    ((7, 9), 7, 1),
    ((13, 30), 5, 1),
    ((17, 29), 7, 1),
    ((67, 9), 7, 1),
    ((16, 15), 7, 2),
    ((28, 9), (3, 9), (4, 1)),
    ((30, 17), (13, 3), (1, 5)),
    ((50,), 7, 1),
    ((23,), 7, 3),
    ((40,), 33, 1),
]


def inputs(
    shape: tuple[int, ...], kernel: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """q, k, v and a bias table for two images and two heads; v is wider than q."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, *shape, 2, 8), (2, *shape, 2, 8), (2, *shape, 2, 12)]
    sizes.append((2, *(2 * k - 1 for k in kernel)))
    drawn = [torch.randn(size, generator=generator) for size in sizes]
    return [t.to(dtype).requires_grad_() for t in drawn]


def both(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """One number per axis."""
    return (value,) * axes if isinstance(value, int) else tuple(value)


def run(tensors: list[Tensor], *, with_bias: bool = True, **options: object) -> list[Tensor]:
    """Output and all gradients of one backend, for an uneven loss."""
    q, k, v, bias = tensors
    out = neighborhood_attention(q, k, v, bias=bias if with_bias else None, **options)
    ramp = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    wanted = tensors if with_bias else tensors[:3]
    return [out, *torch.autograd.grad((out * (1 + ramp) * out.cos()).sum(), wanted)]


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize(("file", "name"), GOLDEN)
def test_golden(file: str, name: str, backend: str) -> None:
    golden: GoldenCase = load_case("nat", file)
    (case,) = (c for c in golden.spec["cases"] if c["name"] == name)
    axes = len(case["shape"]) - 1
    kernel = both(case["kernel"], axes)
    dilation = both(case["dilation"], axes)
    q, k = (draw_input(case["q_shape"], seed) for seed in (1, 2))
    table = (case["heads"], *(2 * k - 1 for k in kernel))
    bias = 8 * torch.from_numpy(draw_weight("rpb", table)) if case["rpb"] else None
    out = neighborhood_attention(
        q,
        k,
        draw_input(case["v_shape"], 3),
        kernel_size=kernel,
        dilation=dilation,
        bias=bias,
        backend=backend,
    )
    golden.check(name, out)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("shape", "kernel", "dilation"), CASES)
def test_tiles_agree_with_the_definition(
    shape: tuple[int, ...],
    kernel: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    with_bias: bool,
) -> None:
    tensors = inputs(shape, both(kernel, len(shape)), torch.float64)
    options = {"kernel_size": kernel, "dilation": dilation, "with_bias": with_bias}
    found = run(tensors, backend="portable", **options)
    for a, b in zip(found, run(tensors, backend="reference", **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("shape", "kernel", "dilation"), [c for c in CASES if len(c[0]) == 2])
def test_the_form_for_export_agrees(
    shape: tuple[int, int], kernel: int | tuple[int, ...], dilation: int | tuple[int, ...]
) -> None:
    q, k, v, bias = inputs(shape, both(kernel, 2), torch.float64)
    kernel, dilation = both(kernel, 2), both(dilation, 2)
    found = neighborhood_attention_flat(q, k, v, bias, kernel, dilation, 0.3)
    wanted = neighborhood_attention(
        q, k, v, kernel_size=kernel, dilation=dilation, bias=bias, scale=0.3, backend="reference"
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


def test_a_batch_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitzoo.ops.neighborhood.portable._CHUNK_BYTES", 1)
    tensors = inputs((20, 17), (7, 7), torch.float64)
    found = run(tensors, kernel_size=7, backend="portable")
    for a, b in zip(found, run(tensors, kernel_size=7, backend="reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dilation", [1, 2])
def test_bfloat16_is_as_good_as_the_plain_path(dilation: int) -> None:
    exact = run(inputs((20, 17), (7, 7)), kernel_size=7, dilation=dilation, backend="reference")
    half = {
        backend: run(
            inputs((20, 17), (7, 7), torch.bfloat16),
            kernel_size=7,
            dilation=dilation,
            backend=backend,
        )
        for backend in ("portable", "reference")
    }
    for i, wanted in enumerate(exact):
        error, plain = (
            (half[backend][i].float() - wanted).abs().max() for backend in ("portable", "reference")
        )
        assert error <= 2 * plain


def test_memory_is_not_read_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs((17, 23), (7, 7))
    expected = run(tensors, kernel_size=7)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        found = run(tensors, kernel_size=7)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_gradcheck_of_the_definition() -> None:
    q, k, v, bias = inputs((4, 3), (3, 3), torch.float64)
    assert torch.autograd.gradcheck(
        lambda *t: neighborhood_attention(*t[:3], kernel_size=3, bias=t[3], backend="reference"),
        (q, k, v, bias),
        fast_mode=True,
    )


def test_every_query_has_its_own_keys() -> None:
    """A value that only marks its position shows which keys a query averages."""
    length, kernel, dilation = 11, 3, 2
    marks = torch.eye(length).view(1, length, 1, length)
    q = torch.zeros(1, length, 1, 8)
    for backend in ("reference", "portable"):
        out = neighborhood_attention(
            q, q, marks, kernel_size=kernel, dilation=dilation, backend=backend
        )
        for position, row in enumerate(out[0, :, 0]):
            keys = row.nonzero().flatten().tolist()
            assert len(keys) == kernel
            assert all(b - a == dilation for a, b in pairwise(keys))
            assert position in keys
        assert out[0, 0, 0].nonzero().flatten().tolist() == [0, 2, 4]
        assert out[0, 9, 0].nonzero().flatten().tolist() == [5, 7, 9]


def test_compiled_in_one_graph_with_gradients() -> None:
    torch._dynamo.reset()
    tensors = inputs((18, 15), (7, 7))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return neighborhood_attention(q, k, v, kernel_size=7, dilation=2, bias=bias)

    plain = neighborhood_attention(*tensors[:3], kernel_size=7, dilation=2, bias=tensors[3])
    out = compiled(*tensors)
    torch.testing.assert_close(out, plain)
    found = torch.autograd.grad(out.square().sum(), tensors)
    for a, b in zip(found, torch.autograd.grad(plain.square().sum(), tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "odd, got 4"),
        ({"kernel_size": 7, "dilation": 2}, "a side of 13 is shorter"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be 2"),
        ({"kernel_size": 3, "dilation": 0}, "dilation must be 2"),
        ({"kernel_size": 3, "bias": torch.zeros(2, 3, 3)}, r"bias must have shape \(2, 5, 5\)"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, message: str) -> None:
    q = torch.zeros(1, 13, 20, 2, 8)
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(q, q, q, **options)
    with pytest.raises(ValueError, match="got 3 dimensions"):
        neighborhood_attention(q[0, 0], q[0, 0], q[0, 0], kernel_size=3)


@pytest.mark.parametrize(
    ("H", "W", "kernel", "dilation"), [(3, 5, 3, 1), (7, 9, 7, 1), (13, 30, 7, 2), (9, 40, 3, 8)]
)
def test_the_form_for_unknown_sides_is_the_padded_map_cropped(
    H: int, W: int, kernel: int, dilation: int
) -> None:
    torch.manual_seed(0)
    padding, inner = torch.randn(2, 4, 3), torch.randn(2, H, W, 2, 4, 3)
    bias = torch.randn(2, 2 * kernel - 1, 2 * kernel - 1)
    reach = kernel * dilation
    whole = padding.expand(2, max(H, reach), max(W, reach), 2, 4, 3).clone()
    edged = padding.expand(2, H + 1, W + 1, 2, 4, 3).clone()
    whole[:, :H, :W] = edged[:, :H, :W] = inner
    expected = neighborhood_attention(
        *whole.unbind(-1), kernel_size=kernel, dilation=dilation, bias=bias, backend="reference"
    )
    found = neighborhood_attention_symbolic(
        *edged.unbind(-1),
        sides=(H, W),
        kernel_size=(kernel, kernel),
        dilation=(dilation, dilation),
        bias=bias,
    )
    torch.testing.assert_close(found, expected[:, :H, :W], rtol=1e-5, atol=1e-5)


def test_what_runs_out_of_registers_in_triton_is_asked_of_the_computed_dtype() -> None:
    q = torch.zeros(1, 8, 8, 1, 64)
    bias = torch.zeros(1, 5, 5, requires_grad=True)
    assert "registers" in str(_why_not_triton(q, q, q, kernel_size=(3, 3), bias=bias))
    assert _why_not_triton(q, q, q, kernel_size=(3, 3), bias=bias.detach()) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _why_not_triton(q, q, q, kernel_size=(3, 3), bias=bias) is None


@pytest.mark.parametrize("scale", [0.0, -0.5, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_and_training_agree(scale: float | None, dtype: torch.dtype) -> None:
    tensors = inputs((17, 9), (7, 7), dtype)
    options = {"kernel_size": 7, "bias": tensors[3], "scale": scale, "backend": "portable"}
    recorded = neighborhood_attention(*tensors[:3], **options)
    with torch.inference_mode():
        assert torch.equal(neighborhood_attention(*tensors[:3], **options), recorded)
    expected = neighborhood_attention(*tensors[:3], **options | {"backend": "reference"})
    # Scores, weights and results are rounded to eight bits each.
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(recorded, expected, rtol=bound, atol=bound)


def test_inference_ignores_autocast() -> None:
    q, k, v, bias = (t.detach() for t in inputs((9, 8), (7, 7)))
    expected = neighborhood_attention(q, k, v, kernel_size=7, bias=bias, backend="portable")
    with torch.autocast("cpu", torch.bfloat16):
        found = neighborhood_attention(q, k, v, kernel_size=7, bias=bias, backend="portable")
    assert torch.equal(found, expected)


def test_fake_tensors_meet_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    # Called directly, the tiles would run on fake tensors, too.
    monkeypatch.delattr(portable, "_forward")
    with FakeTensorMode():
        q, v = torch.empty(2, 9, 8, 2, 8), torch.empty(2, 9, 8, 2, 12)
        out = neighborhood_attention(q, q, v, kernel_size=7, backend="portable")
        assert isinstance(out, FakeTensor)
        assert out.shape == v.shape

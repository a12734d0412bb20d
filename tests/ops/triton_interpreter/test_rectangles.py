"""Windows, halos and neighborhoods: outputs and all gradients against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.golden_cases import draw_input, draw_weight, load_case
from tests.ops.comparison import assert_backend_agrees, random_tensors
from tests.ops.triton_interpreter.common import assert_half_precision_agrees, surrounded
from vitzoo.ops import OPERATORS, halo_attention, neighborhood_attention, window_attention

# map, window, shift, bias, fill, head_dim of q and of v
WINDOWS = [
    ((1, 1), 7, 0, True, False, 16, 16),
    pytest.param((7, 9), 7, 0, False, False, 32, 32, marks=pytest.mark.slow),
    ((6, 7), 4, 3, True, True, 20, 12),
    pytest.param((5, 13), 6, 2, True, False, 16, 48, marks=pytest.mark.slow),
    pytest.param((9, 6), 8, 0, False, True, 8, 8, marks=pytest.mark.slow),
]


def _qkv(H: int, W: int, d: int, d_v: int, *, heads: int = 2, dtype=torch.float32) -> list[Tensor]:
    return random_tensors(
        0, (1, H, W, heads, d), (1, H, W, heads, d), (1, H, W, heads, d_v), dtype=dtype
    )


@pytest.mark.parametrize(("size", "side", "shift", "biased", "filled", "d", "d_v"), WINDOWS)
def test_windows(
    size: tuple[int, int], side: int, shift: int, biased: bool, filled: bool, d: int, d_v: int
) -> None:
    tensors = dict(zip("qkv", _qkv(*size, d, d_v), strict=True))
    bias, k_fill, v_fill = random_tensors(1, (2, side**2, side**2), (2, d), (2, d_v))
    tensors |= {"bias": bias} if biased else {}
    tensors |= {"k_fill": k_fill, "v_fill": v_fill} if filled else {}

    def call(**t: Tensor) -> dict:
        given = {name: surrounded(t[name]) for name in "qkv"} | {"bias": t.get("bias")}
        return given | {"fill": (t["k_fill"], t["v_fill"]) if filled else None}

    assert_backend_agrees(
        window_attention, "triton", tensors, call, window_size=side, shift=shift, scale=0.3
    )


@pytest.mark.parametrize(
    ("size", "kernel", "dilation", "biased"),
    [
        ((1, 1), 1, 1, False),
        ((7, 9), 7, 1, True),
        ((7, 8), 3, 2, True),
        pytest.param((14, 17), (3, 5), (3, 1), True, marks=pytest.mark.slow),
        pytest.param((17, 12), 9, 1, False, marks=pytest.mark.slow),
    ],
)
def test_neighborhoods(
    size: tuple[int, int],
    kernel: int | tuple[int, int],
    dilation: int | tuple[int, int],
    biased: bool,
) -> None:
    kernels = (kernel, kernel) if isinstance(kernel, int) else kernel
    tensors = dict(zip("qkv", _qkv(*size, 16, 24), strict=True))
    if biased:
        (tensors["bias"],) = random_tensors(1, (2, *(2 * n - 1 for n in kernels)))

    def call(**t: Tensor) -> dict:
        return {name: surrounded(t[name]) for name in "qkv"} | {"bias": t.get("bias")}

    assert_backend_agrees(
        neighborhood_attention, "triton", tensors, call, kernel_size=kernel, dilation=dilation
    )


def test_a_line() -> None:
    q, k, v = random_tensors(0, *[(1, 70, 2, 16)] * 3)
    options = {"kernel_size": 7, "dilation": 2}
    assert_backend_agrees(neighborhood_attention, "triton", {"q": q, "k": k, "v": v}, **options)
    table = torch.zeros(2, 13, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient for the bias of a line"):
        neighborhood_attention(q, k, v, bias=table, backend="triton", **options)


# map, block, halo, stride, border, biased, head_dim of v
HALOS = [
    ((1, 1), 4, 1, 1, "zero", True, 16),
    ((7, 9), 7, 2, 1, "mask", True, 16),
    ((5, 9), 4, 2, 1, "constant", True, 20),
    pytest.param((9, 13), 4, 1, 2, "zero", True, 20, marks=pytest.mark.slow),
    ((11, 6), 4, 2, 2, "constant", True, 16),
    pytest.param((9, 6), 8, 3, 1, "zero", False, 16, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("size", "block", "halo", "stride", "border", "biased", "d_v"), HALOS)
def test_halos(
    size: tuple[int, int], block: int, halo: int, stride: int, border: str, biased: bool, d_v: int
) -> None:
    H, W = size
    table = (2 * (block + 2 * halo) - 1, 16)
    shapes = {
        "q": (1, -(-H // stride), -(-W // stride), 2, 16),
        "k": (1, H, W, 2, 16),
        "v": (1, H, W, 2, d_v),
        **({"height": table, "width": table} if biased else {}),
        **({"k_fill": (2, 16), "v_fill": (2, d_v)} if border == "constant" else {}),
    }
    tensors = dict(zip(shapes, random_tensors(0, *shapes.values()), strict=True))

    def call(**t: Tensor) -> dict:
        given = {name: surrounded(t[name]) for name in "qkv"}
        given["axial_bias"] = (t["height"], t["width"]) if biased else None
        return given | {"fill": (t["k_fill"], t["v_fill"]) if border == "constant" else None}

    assert_backend_agrees(
        halo_attention,
        "triton",
        tensors,
        call,
        block_size=block,
        halo_size=halo,
        stride=stride,
        border=border,
    )


def test_float16_is_as_good_as_the_plain_path() -> None:
    tensors = [t.detach() for t in _qkv(9, 10, 16, 16)]
    tensors += [t.detach() for t in random_tensors(1, (2, 13, 13))]
    results = {}
    for name, dtype in (
        ("exact", torch.float32),
        ("triton", torch.float16),
        ("reference", torch.float16),
    ):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        backend = "reference" if name == "exact" else name
        out = neighborhood_attention(*leaves[:3], kernel_size=7, bias=leaves[3], backend=backend)
        ramp = torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype)
        results[name] = [out.detach(), *torch.autograd.grad((out * ramp).sum(), leaves)]
    assert_half_precision_agrees(results, results["exact"])


def test_log_sum_exp_and_its_gradient() -> None:
    from vitzoo.ops import _triton_backends

    q, k, v = _qkv(5, 5, 16, 16)
    out, lse = _triton_backends.window_attention(q, k, v, window_size=5, return_lse=True)
    logits = torch.einsum("bnhd,bmhd->bhnm", q.flatten(1, 2), k.flatten(1, 2)) / 4
    expected = logits.logsumexp(-1).transpose(1, 2).view_as(lse)
    torch.testing.assert_close(lse, expected)
    found = torch.autograd.grad((lse * lse.detach()).sum() + out.sum(), (q, k))
    plain = torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v.flatten(1, 2))
    wanted = torch.autograd.grad((expected * lse.detach()).sum() + plain.sum(), (q, k))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def _calls(q: Tensor) -> dict[str, Tensor]:
    options = {"backend": "triton"}
    return {
        "window": window_attention(q, q, q, window_size=4, shift=1, **options),
        "halo": halo_attention(q, q, q, block_size=4, halo_size=1, **options),
        "neighborhood": neighborhood_attention(q, q, q, kernel_size=3, **options),
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_propagates(bad: float) -> None:
    q = torch.ones(1, 5, 6, 1, 16)
    q[0, 2, 2, 0, 0] = bad
    for name, out in _calls(q).items():
        assert not out[0, 2, 2].isfinite().all(), name


def test_an_empty_batch() -> None:
    q = torch.zeros(0, 5, 6, 2, 16, requires_grad=True)
    for name, out in _calls(q).items():
        assert out.shape == q.shape, name
        (gradient,) = torch.autograd.grad(out.sum(), q)
        assert gradient.shape == q.shape


def test_biases_of_an_empty_batch_get_zeros() -> None:
    q = torch.zeros(0, 5, 6, 2, 16)
    dense, table, fill = (
        torch.randn(s, requires_grad=True) for s in ((2, 16, 16), (2, 5, 5), (2, 16))
    )
    axial = torch.randn(11, 16, requires_grad=True)
    halo = {"block_size": 4, "halo_size": 1, "backend": "triton"}
    outs = [
        window_attention(q, q, q, window_size=4, bias=dense, fill=(fill, fill), backend="triton"),
        neighborhood_attention(q, q, q, kernel_size=3, bias=table, backend="triton"),
        halo_attention(q, q, q, axial_bias=(axial, axial), **halo),
    ]
    for gradient in torch.autograd.grad([x.sum() for x in outs], (dense, table, fill, axial)):
        assert gradient.abs().max() == 0


def test_autocast_takes_its_dtype() -> None:
    q = torch.randn(1, 4, 4, 1, 16)
    with torch.autocast("cpu", dtype=torch.float16):
        out = window_attention(q, q, q, window_size=4, backend="triton")
    assert out.dtype == torch.float16


def test_results_repeat_bit_for_bit() -> None:
    q, k, v = _qkv(6, 9, 16, 16, heads=1)
    (bias,) = random_tensors(1, (1, 5, 5))
    runs = []
    for _ in range(2):
        out = neighborhood_attention(q, k, v, kernel_size=3, bias=bias, backend="triton")
        runs.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v, bias))])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_auto_leaves_the_interpreter_alone() -> None:
    q = torch.zeros(1, 4, 4, 1, 16)
    assert OPERATORS["window_attention"].select(q, q, q, window_size=4).name != "triton"


def test_operator_contract() -> None:
    from vitzoo.ops._triton.library import rectangles

    q, k, v = _qkv(2, 3, 16, 16, heads=1)
    (bias,) = random_tensors(1, (1, 4, 4))
    axis = [2, 2, 0, 0, 0, 2, 1, 1, 0]
    given = (q, k, v, bias, None, None, None, None, [*axis, *axis], False, 0.25)
    torch.library.opcheck(rectangles, given)


def test_one_graph_with_gradients() -> None:
    torch._dynamo.reset()
    q, k, v = _qkv(4, 4, 16, 16)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q, k, v, window_size=4, backend="triton")

    plain = attend(q, k, v)
    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(out, plain)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    wanted = torch.autograd.grad(plain.square().sum(), (q, k, v))
    torch.testing.assert_close(found, wanted)


def test_an_exported_graph_takes_the_portable_path() -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return window_attention(q, q, q, window_size=4)

    graph = torch.export.export(Attend(), (torch.zeros(1, 4, 4, 1, 16),))
    assert "vitzoo" not in str(graph.graph)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "name"),
    [
        (file, case["name"])
        for file in ("na2d_ops", "na2d_rpb_ops")
        for case in load_case("nat", file).spec["cases"]
        if case["shape"][-1] <= 16
    ][:4],
)
def test_golden_neighborhoods(file: str, name: str) -> None:
    golden = load_case("nat", file)
    (case,) = (c for c in golden.spec["cases"] if c["name"] == name)
    kernel = case["kernel"] if isinstance(case["kernel"], list) else [case["kernel"]] * 2
    table = (case["heads"], *(2 * n - 1 for n in kernel))
    bias = 8 * torch.from_numpy(draw_weight("rpb", table)) if case["rpb"] else None
    q, k, v = (
        draw_input(case[shape], seed)
        for shape, seed in (("q_shape", 1), ("q_shape", 2), ("v_shape", 3))
    )
    dilation = case["dilation"]
    out = neighborhood_attention(
        q, k, v, kernel_size=kernel, dilation=dilation, bias=bias, backend="triton"
    )
    golden.check(name, out)

"""Half precision on the CPU: computed in float32 where the processor lacks the instructions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vitzoo.ops import (
    _half,
    attention,
    channel_attention,
    deformable_merge,
    halo_attention,
    neighborhood_attention,
    routed_attention,
    window_attention,
)

MAPS = (1, 9, 10, 2, 8)
OPERATORS: dict[str, tuple[Callable[..., Tensor], dict]] = {
    "attention": (attention, {}),
    "channel": (channel_attention, {"axis_scale": "head_dim"}),
    "window": (window_attention, {"window_size": 4}),
    "halo": (halo_attention, {"block_size": 4, "halo_size": 1}),
    "neighborhood": (neighborhood_attention, {"kernel_size": 5}),
}


def run(name: str, leaves: list[Tensor], backend: str) -> list[Tensor]:
    """Output and gradients for an uneven loss."""
    operator, options = OPERATORS[name]
    given = leaves if name not in ("attention", "channel") else [t.flatten(1, 2) for t in leaves]
    if name == "halo":
        tables = torch.linspace(-1, 1, 22 * 8).view(2, 11, 8).to(leaves[0].dtype)
        options = options | {"axial_bias": (tables[0], tables[1])}
    out = operator(*given, backend=backend, **options)
    ramp = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad((out * ramp).sum(), leaves)]


def draw(dtype: torch.dtype) -> list[Tensor]:
    """q, k and v; the same numbers in every dtype, up to rounding to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(MAPS, generator=generator).bfloat16() for _ in range(3)]
    return [t.to(dtype).requires_grad_() for t in drawn]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPERATORS)
def test_half_precision_is_as_good_as_plain(
    name: str, dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_half, "_has_instructions", lambda dtype: native)
    exact = run(name, draw(torch.float32), "reference")
    plain, found = (run(name, draw(dtype), backend) for backend in ("reference", "portable"))
    for wanted, usual, ours in zip(exact, plain, found, strict=True):
        assert ours.dtype == dtype
        scale = max(1.0, wanted.abs().max().item())
        allowed = max(2 * (usual.float() - wanted).abs().max().item(), scale * _roundings(dtype))
        assert (ours.float() - wanted).abs().max().item() <= allowed


def _roundings(dtype: torch.dtype) -> float:
    return 2 * torch.finfo(dtype).eps


def test_sums_are_in_float32_where_instructions_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_half, "_has_instructions", lambda dtype: False)
    found, exact = (
        run("neighborhood", draw(dtype), "portable")[0] for dtype in (torch.bfloat16, torch.float32)
    )
    assert torch.equal(found, exact.bfloat16())


def test_autocast_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_half, "_has_instructions", lambda dtype: False)
    q, k, v = (t.detach() for t in draw(torch.bfloat16))
    options = {"block_size": 4, "halo_size": 1, "backend": "portable"}
    plain = halo_attention(q, k, v, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(halo_attention(q, k, v, **options), plain)


def test_an_export_keeps_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_half, "_has_instructions", lambda dtype: False)

    class Attend(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return channel_attention(q, q, q, axis_scale="head_dim")

    q = torch.zeros(1, 4, 1, 8, dtype=torch.bfloat16)
    graph = torch.export.export(Attend(), (q,)).graph
    values = [node.meta.get("val") for node in graph.nodes]
    assert {v.dtype for v in values if isinstance(v, Tensor)} == {torch.bfloat16}


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@HALVES
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("instructions", [False, True])
@pytest.mark.parametrize("name", ["attention", "window", "halo", "neighborhood", "routed", "merge"])
def test_tables_and_weights_in_float32_beside_halves(
    name: str,
    instructions: bool,
    trained: bool,
    backend: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_half, "_has_instructions", lambda _: instructions)
    torch.manual_seed(0)
    bias, tables = torch.randn(2, 90, 90), (torch.randn(11, 8), torch.randn(11, 8))
    regions, weights = torch.tensor([[[0, 1], [1, 0]]]), torch.rand(1, 2, 2)
    offset, kernel = torch.randn(1, 4, 5, 8), torch.randn(6, 16, 2, 2) / 8

    def call(q: Tensor) -> Tensor:
        if name == "attention":
            return attention(*[q.flatten(1, 2)] * 3, bias=bias, backend=backend)
        if name == "window":
            own = bias[:, :16, :16]
            return window_attention(q, q, q, window_size=4, bias=own, backend=backend)
        if name == "halo":
            options = {"block_size": 4, "halo_size": 1, "axial_bias": tables}
            return halo_attention(q, q, q, **options, backend=backend)
        if name == "neighborhood":
            own = bias[:, :9, :9]
            return neighborhood_attention(q, q, q, kernel_size=5, bias=own, backend=backend)
        if name == "routed":
            options = {"region_grid": (1, 2), "weights": weights}
            return routed_attention(q, q, q, regions, **options, backend=backend)
        return deformable_merge(q.flatten(3), offset, kernel, bias[0, 0, :6], backend=backend)

    q = draw(dtype)[0].requires_grad_(trained)
    out = call(q)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), call(q.float()), rtol=0.05, atol=0.05)


@HALVES
@pytest.mark.parametrize("border", ["zero", "mask"])
def test_keys_that_do_not_exist_stay_finite_under_autocast(border: str, dtype: torch.dtype) -> None:
    q, k, v = (t.float().requires_grad_() for t in draw(torch.float32))
    options = {"block_size": 4, "halo_size": 2, "border": border}
    expected = halo_attention(q, k, v, **options)
    with torch.autocast("cpu", dtype):
        out = halo_attention(q, k, v, **options)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


@HALVES
def test_the_windows_reference_under_autocast(dtype: torch.dtype) -> None:
    q, k, v = draw(torch.float32)
    with torch.autocast("cpu", dtype):
        out = window_attention(q, k, v, window_size=4, backend="reference")
    expected = window_attention(q, k, v, window_size=4)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shapes_on_the_meta_device_which_has_no_autocast(dtype: torch.dtype) -> None:
    x = torch.empty(1, 9, 9, 2, 8, dtype=dtype, device="meta")
    tokens = x.flatten(1, 2)
    assert channel_attention(tokens, tokens, tokens, axis_scale="tokens").shape == tokens.shape
    assert neighborhood_attention(x, x, x, kernel_size=(3, 3)).shape == x.shape
    found = halo_attention(x, x, x, block_size=4, halo_size=1, border="mask")
    assert (found.shape, found.dtype, found.device.type) == (x.shape, dtype, "meta")

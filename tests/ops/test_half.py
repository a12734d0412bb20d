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
    halo_attention,
    neighborhood_attention,
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

"""An empty batch is a batch: every form takes it, in inference and with gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vitzoo.engine import bench_cases as cases
from vitzoo.ops import OPERATORS

# Large maps and small ones take different ways.
CASES = {
    "window": cases.window(13, 30, batch=2),
    "window-biased": cases.window(13, 30, batch=2, biased=True, filled=True),
    "halo": cases.halo(13, 30, batch=2),
    "neighborhood": cases.neighborhood(13, 30, batch=2),
    "routed-picked": cases.routed(24, grid=3, chosen=2, heads=3),
    "routed-masked": cases.routed(12, grid=3, chosen=4, heads=3),
    "attention": cases.attention(50, batch=2),
    "channel": cases.channel(50, batch=2),
}


def forms(name: str) -> list[str]:
    """The operator's own backends on a CPU."""
    known = OPERATORS[CASES[name].operator].backends
    return ["auto", *(form for form in ("products", "portable", "reference") if form in known)]


@pytest.mark.parametrize(("name", "form"), [(name, form) for name in CASES for form in forms(name)])
@pytest.mark.parametrize("trained", [False, True])
def test_an_empty_batch(name: str, form: str, trained: bool) -> None:
    case = CASES[name]
    case = replace(
        case, settings={n: s[:0] if n == "regions" else s for n, s in case.settings.items()}
    )
    leaves = {
        n: t.detach()[: 0 if n in ("q", "k", "v") else None].requires_grad_(trained)
        for n, t in case.leaves(torch.float32).items()
    }
    try:
        out = case.run(leaves, form)
    except ValueError as error:
        if "cannot serve" not in str(error):
            raise
        pytest.skip(str(error))
    assert out.shape == leaves["v"].shape
    if trained:
        out.sum().backward()
        assert all(t.grad is not None and not t.grad.any() for t in leaves.values())

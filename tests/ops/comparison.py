"""One way to compare a backend with the reference: outputs and every gradient, each by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def random_tensors(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list:
    """Normal tensors that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes
    ]


def assert_backend_agrees(
    operator: Callable[..., Tensor],
    backend: str,
    tensors: dict[str, Tensor],
    call: Callable[..., dict[str, Any]] | None = None,
    *,
    bound: float = 1e-5,
    **arguments: Any,
) -> None:
    """Compare a backend with the reference.

    Args:
        operator: public function of `vitzoo.ops`.
        backend: the backend to compare.
        tensors: leaves by name; positional arguments first to last unless `call` arranges them.
        call: tensors -> keyword arguments of the operator; all are passed by name if None.
        bound: largest difference, relative to max(1, largest value of the reference).
        **arguments: passed on to the operator.
    """
    results = {}
    for which in ("reference", backend):
        given = call(**tensors) if call else tensors
        out = operator(**given, backend=which, **arguments)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        leaves = {name: t for name, t in tensors.items() if t.requires_grad}
        gradients = torch.autograd.grad(
            (out * weight).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        results[which] = {
            "out": out,
            **{f"d{n}": g for n, g in zip(leaves, gradients, strict=True)},
        }
    for name, expected in results["reference"].items():
        found = results[backend][name]
        assert found.shape == expected.shape, name
        if not expected.numel():
            continue
        scale = max(1.0, expected.abs().max().item())
        worst = (found - expected).abs().max().item() / scale
        assert worst <= bound, f"{name} is off by {worst:.2e} of its scale"

"""Whether a form of an operator computes what the reference does, outputs and all gradients.

Nothing is reported as faster before that. Needs torch alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitzoo.engine.bench_cases import WRITTEN, Case

DIRECTIONS = ("forward", "both")
# Always granted, of max(1, largest value) of the reference in float64: in float32, and in roundings
# of a half-precision type (a yardstick can be exact by chance).
FLOAT32_BOUND = 1e-5
HALF_ROUNDINGS = 2.0
# Beyond that a form may err as far as plain arithmetic in the same dtype does, times this.
FACTOR = 2.0


def results(
    case: Case, leaves: Mapping[str, Tensor], form: str, *, backward: bool
) -> dict[str, Tensor]:
    """The output and, with `backward`, the gradient of every leaf as `d<name>`, in float64."""
    with torch.set_grad_enabled(backward):
        out = case.run(leaves, form)
        found = {"out": out}
        if backward:
            weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device)
            gradients = torch.autograd.grad(
                out, list(leaves.values()), weight.view(out.shape).to(out.dtype)
            )
            found |= {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}
    return {name: t.detach().double() for name, t in found.items()}


def errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest difference of each, of max(1, largest exact value); infinite if not finite."""
    worst = {}
    for name, expected in exact.items():
        if found[name].shape != expected.shape or not bool(found[name].isfinite().all()):
            worst[name] = float("inf")
            continue
        scale = max(1.0, expected.abs().max().item())
        worst[name] = (found[name] - expected).abs().max().item() / scale
    return worst


def compare(
    case: Case,
    form: str,
    dtype: torch.dtype,
    *,
    backward: bool,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """One form against the reference in float64 on the same numbers.

    Returns:
        `errors` by name, `bounds` by name, and `disagrees`: None or a sentence.
    """
    case = case.on(device)
    leaves = case.leaves(dtype, device)
    exact_leaves = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
    exact = results(case, exact_leaves, "reference", backward=backward)
    found = errors(results(case, leaves, form, backward=backward), exact)
    # A reference may compute in float32 inside; the yardstick does not.
    yardstick = "eager" if case.operator in WRITTEN else "reference"
    plain = errors(results(case, leaves, yardstick, backward=backward), exact)
    least = FLOAT32_BOUND
    if dtype != torch.float32:
        least = HALF_ROUNDINGS * torch.finfo(dtype).eps
    bounds = {name: max(FACTOR * plain[name], least) for name in exact}
    wrong = [name for name in exact if not found[name] <= bounds[name]]
    sentence = None
    if wrong:
        name = max(wrong, key=lambda n: found[n] / bounds[n])
        sentence = (
            f"{name} of {case.label} is off by {found[name]:.1e} of its scale in "
            f"{str(dtype).removeprefix('torch.')}, {bounds[name]:.1e} is allowed"
        )
    return {"errors": found, "bounds": bounds, "disagrees": sentence}

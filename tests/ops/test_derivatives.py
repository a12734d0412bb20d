"""Derivatives beyond the first in reverse mode: `auto` has them, or says that it has not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from vitzoo.engine import bench_cases as cases
from vitzoo.engine.bench_cases import Case
from vitzoo.ops import deformable_merge, topk_mask

CASES = {
    "window": cases.window(9, 10, batch=1, biased=True, filled=True),
    "halo": cases.halo(11, 13, heads=2, batch=1),
    "neighborhood": cases.neighborhood(9, 11, batch=1),
    # Masked over the whole map, and picked: the map is larger than the mask's limit.
    "routed": cases.routed(8, grid=2, chosen=2, heads=2, batch=1),
    "routed-picked": cases.routed(20, grid=5, chosen=2, heads=2, batch=1),
}
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def inputs(case: Case) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: t.detach() for name, t in case.leaves(torch.float64, "cpu").items()}


def of_queries(case: Case, given: dict[str, Tensor], form: str) -> Callable[[Tensor], Tensor]:
    return lambda q: case.run(given | {"q": q}, form).tanh().sum()


@each
def test_forward_mode(case: Case) -> None:
    given = inputs(case)
    q, tangent = given["q"], torch.randn_like(given["q"])
    found, expected = (
        jvp(of_queries(case, given, form), (q,), (tangent,))[1] for form in ("auto", "reference")
    )
    assert expected.abs() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@each
def test_functional_gradient(case: Case) -> None:
    given = inputs(case)
    found, expected = (
        grad(of_queries(case, given, form))(given["q"]) for form in ("auto", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@each
def test_vmap_over_models(case: Case) -> None:
    given = inputs(case)
    several = torch.stack([given["q"], 2 * given["q"]])
    run = of_queries(case, given, "auto")
    found = vmap(run)(several)
    torch.testing.assert_close(found, torch.stack([run(q) for q in several]), rtol=1e-8, atol=1e-8)


@each
def test_second_derivatives_are_right_or_refused(case: Case) -> None:
    given = inputs(case)

    def second(form: str) -> Tensor:
        q = given["q"].clone().requires_grad_()
        (first,) = torch.autograd.grad(of_queries(case, given, form)(q), q, create_graph=True)
        (found,) = torch.autograd.grad(first.square().sum(), q)
        return found

    expected = second("reference")
    if case.operator == "neighborhood_attention":
        with pytest.raises(RuntimeError, match="neighborhood_tiles_backward"):
            second("auto")
    else:
        torch.testing.assert_close(second("auto"), expected, rtol=1e-7, atol=1e-7)


def test_forward_mode_through_a_merging() -> None:
    torch.manual_seed(0)
    x, offset = torch.randn(1, 5, 6, 3).double(), torch.randn(1, 2, 3, 8).double()
    weight, tangent = torch.randn(4, 3, 2, 2).double(), torch.randn_like(x)
    found, expected = (
        jvp(lambda x: deformable_merge(x, offset, weight, backend=form), (x,), (tangent,))[1]  # noqa: B023
        for form in ("auto", "reference")
    )
    torch.testing.assert_close(found, expected)


def test_a_selection_is_a_constant_of_a_functional_gradient() -> None:
    scores = torch.tensor([0.3, -1.0, 2.0, 0.1])
    found = grad(lambda s: (s * topk_mask(s, 2)).sum())(scores)
    assert found.tolist() == [1.0, 0.0, 1.0, 0.0]

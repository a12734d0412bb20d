"""Which backend serves a call, and what a user is told when one cannot."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from torch import Tensor

from vitzoo.ops import OPERATORS, Backend, Operator, _dispatch, attention, use_backend
from vitzoo.ops._sides import traced_by_export


@pytest.fixture
def operator():
    def too_big(x: Tensor, **_: object) -> str | None:
        return None if x.numel() < 3 else f"takes fewer than 3 numbers, got {x.numel()}."

    made = Operator(
        "test_double",
        [
            Backend("fast", lambda x: x + x, too_big),
            Backend("reference", lambda x: 2 * x),
        ],
    )
    yield made
    del OPERATORS["test_double"]
    _dispatch._reported.clear()


def test_auto_takes_the_first_that_serves(operator: Operator) -> None:
    assert operator.select(torch.zeros(2)).name == "fast"
    assert operator.select(torch.zeros(3)).name == "reference"


def test_forced_backend_that_cannot_serve_gives_its_sentence(operator: Operator) -> None:
    with pytest.raises(ValueError, match="takes fewer than 3 numbers, got 5"):
        operator(torch.zeros(5), backend="fast")
    assert operator.why_not("fast", torch.zeros(2)) is None


def test_unknown_backend_names_the_known_ones(operator: Operator) -> None:
    with pytest.raises(ValueError, match="fast, reference"):
        operator(torch.zeros(2), backend="warp")


def test_fallback_is_logged_once(operator: Operator, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vitzoo.ops"):
        operator(torch.zeros(4))
        operator(torch.zeros(4))
    assert [r.message for r in caplog.records] == [
        "test_double: fast is passed over: takes fewer than 3 numbers, got 4."
    ]


def test_context_forces_one_operator_or_all(operator: Operator) -> None:
    x = torch.zeros(2)
    with use_backend("reference", operator="test_double"):
        assert operator.select(x).name == "reference"
        assert OPERATORS["attention"].select(*[torch.zeros(1, 2, 1, 2)] * 3).name == "portable"
    with use_backend("reference"):
        assert operator.select(x).name == "reference"
        with use_backend("auto"):
            assert operator.select(x).name == "fast"
    assert operator.select(x).name == "fast"


def test_context_turns_down_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown operator"), use_backend("x", operator="nope"):
        pass
    with pytest.raises(ValueError, match="no backend 'warp'"), use_backend("warp"):
        pass


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "portable"),
        ({"VITZOO_BACKEND": "reference"}, "reference"),
        ({"VITZOO_BACKEND_ATTENTION": "reference"}, "reference"),
        ({"VITZOO_BACKEND": "reference", "VITZOO_BACKEND_ATTENTION": "auto"}, "portable"),
        ({"VITZOO_BACKEND_WINDOW_ATTENTION": "reference"}, "portable"),
    ],
)
def test_environment(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in [key for key in os.environ if key.startswith("VITZOO_")]:
        monkeypatch.delenv(key)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(_dispatch, "_environment", None)
    x = torch.zeros(1, 2, 1, 2)
    assert OPERATORS["attention"].select(x, x, x).name == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"VITZOO_BACKEND": "refrence"}, "no backend 'refrence'"),
        ({"VITZOO_BACKEND_ATTENTION": "warp"}, "VITZOO_BACKEND_ATTENTION: no backend 'warp'"),
        ({"VITZOO_BACKEND_WINDOWATTENTION": "reference"}, "WINDOWATTENTION: no such operator"),
    ],
)
def test_environment_turns_down_unknown_names(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(_dispatch, "_environment", None)
    x = torch.zeros(1, 2, 1, 2)
    with pytest.raises(ValueError, match=message):
        OPERATORS["attention"].select(x, x, x)
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=message):
        torch.compile(attention, backend="eager")(x, x, x)


def test_context_goes_ahead_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 2, 1, 2)
    for variable in ("VITZOO_BACKEND", "VITZOO_BACKEND_ATTENTION"):
        monkeypatch.setenv(variable, "reference")
        monkeypatch.setattr(_dispatch, "_environment", None)
        for name in ("auto", "portable"):
            with use_backend(name):
                assert OPERATORS["attention"].select(x, x, x).name == "portable"
        assert OPERATORS["attention"].select(x, x, x).name == "reference"
        monkeypatch.delenv(variable)


def test_public_function_takes_a_backend() -> None:
    x = torch.randn(1, 4, 2, 8)
    torch.testing.assert_close(
        attention(x, x, x, backend="reference"), attention(x, x, x, backend="portable")
    )


def test_operators_compile_as_one_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 4, 2, 8)
    torch.testing.assert_close(compiled(x, x, x), attention(x, x, x))


def test_a_compiler_is_not_taken_for_an_export() -> None:
    def mark(x: torch.Tensor) -> torch.Tensor:
        return x + int(traced_by_export())

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return mark(x)

    x = torch.zeros(1)
    assert torch.compile(mark, fullgraph=True, backend="eager")(x).item() == 0
    for strict in (False, True):
        exported = torch.export.export(Module(), (x,), strict=strict).module()
        assert exported(x).item() == 1

"""Window attention: the portable path against the definition, and the definition itself."""

from __future__ import annotations

import pytest
import torch

from tests.ops.comparison import assert_backend_agrees, random_tensors
from vitzoo.ops import OPERATORS, _products, attention, window_attention

MAPS = [(1, 1), (7, 9), (13, 30), (8, 8)]


@pytest.mark.parametrize("size", MAPS)
@pytest.mark.parametrize("window_size", [1, 4, 7, 16])
@pytest.mark.parametrize("fill", [False, True])
def test_portable_agrees(size: tuple[int, int], window_size: int, fill: bool) -> None:
    tokens = window_size**2
    q, k, v, bias, k_fill, v_fill = random_tensors(
        0, *[(2, *size, 3, 4)] * 3, (3, tokens, tokens), (3, 4), (3, 4)
    )

    def call(**t: torch.Tensor) -> dict:
        given = {name: t[name] for name in ("q", "k", "v", "bias")}
        return given | ({"fill": (t["k_fill"], t["v_fill"])} if fill else {})

    tensors = {"q": q, "k": k, "v": v, "bias": bias}
    if fill:
        tensors |= {"k_fill": k_fill, "v_fill": v_fill}
    assert_backend_agrees(window_attention, "portable", tensors, call, window_size=window_size)


@pytest.mark.parametrize("size", MAPS)
@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("fill", [False, True])
def test_shifted_windows(size: tuple[int, int], shift: int, fill: bool) -> None:
    q, k, v, k_fill, v_fill = random_tensors(1, *[(2, *size, 2, 4)] * 3, (2, 4), (2, 4))
    assert_backend_agrees(
        window_attention,
        "portable",
        {"q": q, "k": k, "v": v},
        window_size=4,
        shift=shift,
        fill=(k_fill.detach(), v_fill.detach()) if fill else None,
    )


@pytest.mark.parametrize("size", MAPS)
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("piece", [1, 2 << 20])
@torch.no_grad()
def test_products_are_the_definition(
    size: tuple[int, int], shift: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_products, "_PIECE_BYTES", piece)
    q, k, v, k_fill, v_fill = random_tensors(
        5, *[(3, *size, 2, 4)] * 2, (3, *size, 2, 6), (2, 4), (2, 6)
    )
    found, expected = (
        window_attention(
            q, k, v, window_size=4, shift=shift, fill=(k_fill, v_fill), scale=0.3, backend=backend
        )
        for backend in ("products", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_what_products_refuse() -> None:
    q, bias = torch.randn(1, 8, 8, 1, 4), torch.zeros(16, 16)
    learned = torch.zeros(1, 4, requires_grad=True)
    for given, options, sentence in (
        (q, {"bias": bias}, "no bias"),
        (q, {"shift": 1}, "need a mask"),
        (q.clone().requires_grad_(), {}, "no backward"),
        (q, {"shift": 1, "fill": (learned, learned)}, "no backward"),
    ):
        with pytest.raises(ValueError, match=sentence):
            window_attention(given, q, q, window_size=4, backend="products", **options)


@pytest.mark.parametrize(("window_size", "taken"), [(14, "products"), (28, "portable")])
def test_products_are_for_short_windows(window_size: int, taken: str) -> None:
    q = torch.randn(1, 28, 28, 1, 4)
    options = {"window_size": window_size}
    assert OPERATORS["window_attention"].select(q, q, q, **options).name == taken


@torch.no_grad()
def test_products_propagate_nan_and_take_empty_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    # One window after the other: what the scores of the first leave behind must not be read.
    monkeypatch.setattr(_products, "_PIECE_BYTES", 1)
    q = torch.randn(2, 8, 8, 1, 4)
    q[0, 0, 0] = float("nan")
    out = window_attention(q, q, q, window_size=4, backend="products")
    assert out[0, :4, :4].isnan().all()
    assert not out[0, 4:].isnan().any()
    assert not out[1].isnan().any()
    assert window_attention(q[:0], q[:0], q[:0], window_size=4, backend="products").shape[0] == 0


def test_value_width_may_differ() -> None:
    q, k, v = random_tensors(2, (1, 5, 6, 2, 4), (1, 5, 6, 2, 4), (1, 5, 6, 2, 7))
    assert window_attention(q, k, v, window_size=3).shape == v.shape
    assert_backend_agrees(window_attention, "portable", {"q": q, "k": k, "v": v}, window_size=3)


def test_one_window_is_full_attention() -> None:
    q, k, v = random_tensors(3, *[(2, 6, 5, 2, 4)] * 3)
    expected = attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2))
    found = window_attention(q, k, v, window_size=6, backend="reference")
    torch.testing.assert_close(found.flatten(1, 2), expected)


def test_fill_is_what_padding_before_the_projection_computes() -> None:
    """Zeros appended to a map and projected give the projection's bias."""
    torch.manual_seed(0)
    project = torch.nn.Linear(8, 24)
    x = torch.randn(1, 5, 6, 8)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 2, 0, 3))
    q, k, v = project(padded).unflatten(-1, (3, 2, 4)).unbind(-3)
    expected = window_attention(q, k, v, window_size=4)[:, :5, :6]
    q, k, v = project(x).unflatten(-1, (3, 2, 4)).unbind(-3)
    _, k_bias, v_bias = project.bias.view(3, 2, 4)
    torch.testing.assert_close(
        window_attention(q, k, v, window_size=4, fill=(k_bias, v_bias)), expected
    )


def test_reference_gradients() -> None:
    q, k, v, bias, k_fill, v_fill = random_tensors(
        4, *[(1, 3, 4, 1, 2)] * 3, (1, 4, 4), (1, 2), (1, 2), dtype=torch.float64
    )

    def call(q, k, v, bias, k_fill, v_fill):
        return window_attention(
            q, k, v, window_size=2, bias=bias, fill=(k_fill, v_fill), backend="reference"
        )

    assert torch.autograd.gradcheck(call, (q, k, v, bias, k_fill, v_fill))


@pytest.mark.parametrize("shift", [-1, 4])
def test_bad_shift_says_the_range(shift: int) -> None:
    x = torch.zeros(1, 4, 4, 1, 2)
    with pytest.raises(ValueError, match=r"\[0, 4\)"):
        window_attention(x, x, x, window_size=4, shift=shift)


def test_nan_spreads_inside_its_window_only() -> None:
    q, k, v = (t.detach() for t in random_tensors(5, *[(1, 4, 4, 1, 4)] * 3))
    v[0, 0, 0] = float("nan")
    out = window_attention(q, k, v, window_size=2)
    assert out[0, :2, :2].isnan().all()
    assert not out[0, 2:].isnan().any()


def test_empty_batch() -> None:
    x = torch.zeros(0, 5, 5, 2, 4)
    assert window_attention(x, x, x, window_size=4).shape == x.shape

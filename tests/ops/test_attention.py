"""Dense and channel attention: the portable path against the definition."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops.comparison import assert_backend_agrees, random_tensors
from vitzoo.ops import attention, channel_attention


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 13), (50, 9)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_portable_agrees(queries: int, keys: int, scale: float | None) -> None:
    q, k, v, bias = random_tensors(
        0, (2, queries, 3, 4), (2, keys, 3, 4), (2, keys, 3, 6), (3, queries, keys)
    )
    mask = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(1)) > 0.5
    tensors = {"q": q, "k": k, "v": v}
    assert_backend_agrees(attention, "portable", tensors, scale=scale)
    assert_backend_agrees(attention, "portable", tensors | {"bias": bias}, scale=scale)
    assert_backend_agrees(attention, "portable", tensors, mask=mask, scale=scale)


@pytest.mark.parametrize("batch_of_bias", [1, 8])
def test_a_batch_over_what_cuda_can_number(
    batch_of_bias: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("vitzoo.ops.attention")
    monkeypatch.setattr(module, "_LARGEST_BATCH", 3)
    q, k, v, bias = random_tensors(5, *[(8, 5, 2, 4)] * 3, (batch_of_bias, 2, 5, 5))
    mask = torch.rand(8, 1, 5, 5, generator=torch.Generator().manual_seed(1)) > 0.2
    found = module._in_pieces(q, k, v, bias, mask, 0.3)
    whole = attention(q, k, v, bias=bias, mask=mask, scale=0.3, backend="reference")
    torch.testing.assert_close(found, whole)
    for a, b in zip(
        *(torch.autograd.grad(x.sum(), (q, k, v)) for x in (found, whole)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_pieces_are_for_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("vitzoo.ops.attention")
    monkeypatch.setattr(module, "_LARGEST_BATCH", 3)
    monkeypatch.setattr(module, "_in_pieces", lambda *given: "pieces")
    with FakeTensorMode():
        q = torch.empty(8, 5, 2, 4, device="cuda")
        assert attention(q, q, q) == "pieces"
        assert attention(q[:3], q[:3], q[:3]).shape == (3, 5, 2, 4)
    x = torch.zeros(8, 5, 2, 4)
    assert attention(x, x, x).shape == x.shape


def test_a_query_without_keys_gives_zeros() -> None:
    q, k, v = random_tensors(1, *[(1, 4, 2, 8)] * 3)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 2, :] = False
    for backend in ("reference", "portable"):
        out = attention(q, k, v, mask=mask, backend=backend)
        assert out[0, 2].abs().max() == 0
        assert out[0, 1].abs().max() > 0
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("axis_scale", ["head_dim", "tokens"])
@pytest.mark.parametrize("tokens", [1, 63])
def test_channel_attention_portable_agrees(axis_scale: str, tokens: int) -> None:
    q, k, v = random_tensors(2, *[(2, tokens, 3, 8)] * 3)
    assert_backend_agrees(
        channel_attention, "portable", {"q": q, "k": k, "v": v}, axis_scale=axis_scale
    )


def test_channel_attention_is_the_loop_over_channels() -> None:
    q, k, v = (t.detach() for t in random_tensors(3, *[(1, 5, 1, 3)] * 3))
    out = channel_attention(q, k, v, axis_scale="head_dim", backend="reference")
    for i in range(3):
        logits = torch.stack([(q[0, :, 0, i] * k[0, :, 0, j]).sum() for j in range(3)])
        weights = (logits * 3**-0.5).softmax(0)
        expected = sum(weights[j] * v[0, :, 0, j] for j in range(3))
        torch.testing.assert_close(out[0, :, 0, i], expected)


def test_channel_attention_sums_half_precision_in_float32() -> None:
    x = torch.full((1, 70_000, 1, 2), 1.0, dtype=torch.float16)
    out = channel_attention(x, x, x, axis_scale="head_dim", backend="portable")
    assert out.isfinite().all()


@pytest.mark.parametrize("operator", [attention, channel_attention])
def test_reference_gradients(operator) -> None:
    q, k, v = random_tensors(4, *[(1, 3, 2, 2)] * 3, dtype=torch.float64)
    extra = {"axis_scale": "tokens"} if operator is channel_attention else {}
    assert torch.autograd.gradcheck(
        lambda *t: operator(*t, backend="reference", **extra), (q, k, v)
    )


def test_unknown_axis_scale() -> None:
    x = torch.zeros(1, 2, 1, 2)
    with pytest.raises(ValueError, match="'head_dim' or 'tokens'"):
        channel_attention(x, x, x, axis_scale="keys")

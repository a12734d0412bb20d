"""The two directions of LookupViT's cross-attention over one similarity."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.ops import lookup_gather, lookup_infuse, lookup_similarity


def tensors(m: int, n: int, *, dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
    """q of m tokens, k and v of n tokens, values of m tokens."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, length, 3, 8, generator=generator, dtype=dtype, requires_grad=True)
        for length in (m, n, n, m)
    ]


def both(q: Tensor, k: Tensor, v: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    similarity = lookup_similarity(q, k)
    return lookup_gather(similarity, v), lookup_infuse(similarity, values)


def two_attentions(q: Tensor, k: Tensor, v: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The same as two separate attentions with exchanged roles."""
    q, k, v, values = (t.transpose(1, 2) for t in (q, k, v, values))
    gathered = F.scaled_dot_product_attention(q, k, v)
    infused = F.scaled_dot_product_attention(k, q, values)
    return gathered.transpose(1, 2), infused.transpose(1, 2)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (25, 196), (63, 63), (100, 390)])
def test_equals_two_attentions_forward_and_backward(m: int, n: int) -> None:
    inputs = tensors(m, n)
    found, expected = both(*inputs), two_attentions(*inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    cotangents = [torch.randn_like(t) for t in found]
    grads = torch.autograd.grad(found, inputs, cotangents)
    for a, b in zip(grads, torch.autograd.grad(expected, inputs, cotangents), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_both_softmaxes_send_gradient_to_the_similarity() -> None:
    q, k, v, values = tensors(4, 9)
    similarity = lookup_similarity(q, k).detach().requires_grad_()
    for out in (lookup_gather(similarity, v), lookup_infuse(similarity, values)):
        (grad,) = torch.autograd.grad(out.square().sum(), similarity)
        assert grad.abs().max() > 1e-3


@pytest.mark.parametrize("reuse", ["logits", "weights"])
def test_gradcheck(reuse: str) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        similarity = lookup_similarity(q, k)
        return lookup_gather(similarity, v), lookup_infuse(similarity, values, reuse=reuse)

    assert torch.autograd.gradcheck(run, tensors(2, 5, batch=1))


def test_weights_sum_to_one_in_their_own_direction() -> None:
    q, k, _, _ = tensors(6, 20)
    similarity = lookup_similarity(q, k)
    ones_n, ones_m = torch.ones(2, 20, 3, 1).double(), torch.ones(2, 6, 3, 1).double()
    torch.testing.assert_close(lookup_gather(similarity, ones_n), torch.ones(2, 6, 3, 1).double())
    torch.testing.assert_close(lookup_infuse(similarity, ones_m), torch.ones(2, 20, 3, 1).double())


def test_reused_weights_are_the_gathering_weights_transposed() -> None:
    q, k, _, values = tensors(6, 20)
    similarity = lookup_similarity(q, k)
    # Values that pick out one lookup token each: the result is the weight matrix itself.
    pick = torch.eye(20).double()[None, :, None].expand(2, 20, 3, 20)
    weights = lookup_gather(similarity, pick)
    expected = torch.einsum("bmhn,bmhd->bnhd", weights, values)
    torch.testing.assert_close(lookup_infuse(similarity, values, reuse="weights"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    exact = tensors(25, 196, dtype=torch.float32)
    half = [t.detach().to(dtype) for t in exact]
    for a, plain, b in zip(both(*half), two_attentions(*half), both(*exact), strict=True):
        assert a.dtype == dtype
        assert (a.float() - b).abs().max() <= 2 * (plain.float() - b).abs().max() + 1e-3


def test_unknown_reuse_is_refused() -> None:
    q, k, _, values = tensors(2, 3)
    with pytest.raises(ValueError, match="'sum'"):
        lookup_infuse(lookup_similarity(q, k), values, reuse="sum")

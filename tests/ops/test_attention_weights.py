"""The weights alone are what `attention` multiplies the values with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitzoo.ops import attention, attention_weights


def inputs(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 3, 5), (1, 30, 2, 8)])
def test_they_are_those_of_attention(shape: tuple[int, ...]) -> None:
    q, k, v = inputs(*shape)
    B, N, heads, _ = shape
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(heads, N, N, generator=generator, dtype=torch.float64)
    mask = torch.rand(B, heads, N, N, generator=generator) < 0.5
    mask[:, :, 0] = False
    for options in ({}, {"bias": bias}, {"mask": mask}, {"bias": bias, "mask": mask}):
        weights = attention_weights(q, k, scale=0.3, **options)
        out = (weights @ v.transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(out, attention(q, k, v, scale=0.3, **options))


def test_gradients_where_a_query_has_no_key() -> None:
    q, k, _ = inputs(1, 4, 2, 3)
    q, k = q.requires_grad_(), k.requires_grad_()
    mask = torch.ones(1, 2, 4, 4, dtype=torch.bool).tril(-1)
    assert torch.autograd.gradcheck(lambda q, k: attention_weights(q, k, mask=mask), (q, k))

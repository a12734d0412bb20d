"""Attention inside groups of points."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitzoo.ops import grouped_attention
from vitzoo.ops.grouped import group_tables

COUNTS = [(12,), (7,), (1,), (13, 5), (0, 9, 4), (3, 0, 8, 0), (4, 4), (0, 0), (2, 1, 17, 0)]


def offsets_of(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def draw(tokens: int, heads: int = 2, dim: int = 4, **kwargs: object) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(tokens, heads, d, generator=generator, **kwargs) for d in (dim, dim, dim + 1)
    ]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("group_size", [1, 4, 9])
def test_portable_agrees_with_the_reference(counts: tuple[int, ...], group_size: int) -> None:
    results = []
    for backend in ("reference", "portable"):
        inputs = [t.requires_grad_() for t in draw(sum(counts))]
        out = grouped_attention(
            *inputs, group_size=group_size, frame_offsets=offsets_of(counts), backend=backend
        )
        if sum(counts):
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
            results.append([out, *(t.grad for t in inputs)])
        else:
            assert out.shape == (0, 2, 5)
    for expected, found in zip(*(results or [(), ()]), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_last_group_attends_to_the_last_tokens_of_its_frame() -> None:
    q, k, v = draw(11)
    out = grouped_attention(q, k, v, group_size=4, frame_offsets=offsets_of((11,)))
    weights = (torch.einsum("qhd,khd->hqk", q[8:], k[7:]) / 2).softmax(-1)
    torch.testing.assert_close(out[8:], torch.einsum("hqk,khd->qhd", weights, v[7:]))


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_a_frame_does_not_see_its_neighbours(backend: str) -> None:
    counts = (6, 2, 0, 13)
    offsets = offsets_of(counts)
    inputs = draw(sum(counts))
    whole = grouped_attention(*inputs, group_size=5, frame_offsets=offsets, backend=backend)
    for i, count in enumerate(counts):
        frame = slice(int(offsets[i]), int(offsets[i + 1]))
        alone = grouped_attention(
            *(t[frame] for t in inputs),
            group_size=5,
            frame_offsets=offsets_of((count,)),
            backend=backend,
        )
        torch.testing.assert_close(whole[frame], alone, atol=1e-6, rtol=0)


def test_tables_are_inverse_and_cover_every_token() -> None:
    counts = (10, 0, 3, 8)
    token_of_slot, holds, slot_of_token = group_tables(offsets_of(counts), 21, 4)
    assert token_of_slot.flatten()[slot_of_token].tolist() == list(range(21))
    assert holds.flatten()[slot_of_token].all()


def test_reference_gradients() -> None:
    inputs = [t.double().requires_grad_() for t in draw(7, heads=1, dim=2)]

    def run(*qkv: Tensor) -> Tensor:
        return grouped_attention(
            *qkv, group_size=3, frame_offsets=offsets_of((5, 2)), scale=0.3, backend="reference"
        )

    assert torch.autograd.gradcheck(run, inputs)


def test_compiles_without_a_break() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
        return grouped_attention(q, k, v, group_size=4, frame_offsets=offsets)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for counts in ((9, 2), (3, 12), (5, 0)):
        inputs = draw(sum(counts))
        expected = run(*inputs, offsets_of(counts))
        torch.testing.assert_close(compiled(*inputs, offsets_of(counts)), expected)


def test_arguments_are_checked() -> None:
    q, k, v = draw(4)
    with pytest.raises(ValueError, match="group_size must be positive, got 0"):
        grouped_attention(q, k, v, group_size=0, frame_offsets=offsets_of((4,)))
    with pytest.raises(ValueError, match="same tokens"):
        grouped_attention(q[None], k, v, group_size=2, frame_offsets=offsets_of((4,)))
    with pytest.raises(ValueError, match="got 2 dimensions"):
        grouped_attention(q[0], k[0], v[0], group_size=2, frame_offsets=offsets_of((4,)))
    with pytest.raises(ValueError, match="frame_offsets"):
        grouped_attention(q, k, v, group_size=2, frame_offsets=torch.tensor([4]))


@pytest.mark.parametrize("B", [0, 1, 3])
def test_sequences_that_are_cut_alike(B: int) -> None:
    offsets = offsets_of((5, 0, 9))
    q, k, v = (t.expand(B, *t.shape) * torch.arange(1, B + 1).view(-1, 1, 1, 1) for t in draw(14))
    out = grouped_attention(q, k, v, group_size=4, frame_offsets=offsets)
    assert out.shape == (B, 14, 2, 5)
    for found, *sequence in zip(out, q, k, v, strict=True):
        expected = grouped_attention(*sequence, group_size=4, frame_offsets=offsets)
        torch.testing.assert_close(found, expected)

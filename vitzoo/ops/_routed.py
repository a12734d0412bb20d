"""Routed attention from batched products, for inference on CPUs without AVX-512."""

from __future__ import annotations

import torch
from torch import Tensor

# Picked keys at a time, so that they and their scores stay in the cache.
_PIECE_BYTES = 2 << 20


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """All tokens against all, one image at a time: its scores stay in the cache.

    Args:
        q, k, v: (B, N, heads, head_dim), in any layout that keeps head_dim together.
        mask: (B, N, M), 0 or -inf.
        scale: factor on q k^T.

    Returns:
        (B, N, heads, head_dim of v).
    """
    B, N, heads, _ = q.shape
    out = v.new_empty(B, N, heads, v.shape[-1])
    scores = q.new_empty(heads, N, k.shape[1])
    q = q * scale
    for image in range(B):
        torch.bmm(q[image].transpose(0, 1), k[image].permute(1, 2, 0), out=scores)
        torch.softmax(scores.add_(mask[image]), -1, out=scores)
        out[image].copy_(torch.bmm(scores, v[image].transpose(0, 1)).transpose(0, 1))
    return out


def attend_picked(
    q: Tensor, k: Tensor, v: Tensor, numbers: Tensor, grid: tuple[int, int], scale: float
) -> Tensor:
    """Each region of q against its picked regions of k and v, a few regions at a time.

    Args:
        q, k, v: (B, H, W, heads, head_dim); the grid divides every H and W.
        numbers: of the picked regions in the whole batch (B * regions, chosen).
        grid: rows and columns of regions.
        scale: factor on q k^T.

    Returns:
        (B, H, W, heads, head_dim of v).
    """
    B, H, W, heads, _ = q.shape
    queries, keys, values = (_heads_first(x, grid) for x in (q * scale, k, v))
    # The same regions of every head: numbers of rows (region, head) -> (regions, heads, chosen).
    picks = numbers[:, None] * heads + torch.arange(heads, device=q.device)[:, None]
    out = values.new_empty(*queries.shape[:2], values.shape[-1])
    size = max(1, _PIECE_BYTES // (keys[0].numel() * keys.element_size() * picks[0].numel()))
    pieces = (x.split(size * heads) for x in (queries, out))
    for part, results, rows in zip(*pieces, picks.split(size), strict=True):
        seen_keys, seen_values = (
            x.flatten(1).index_select(0, rows.flatten()).view(len(part), -1, x.shape[-1])
            for x in (keys, values)
        )
        scores = torch.bmm(part, seen_keys.transpose(1, 2))
        torch.bmm(torch.softmax(scores, -1, out=scores), seen_values, out=results)
    down, across = grid
    by_region = out.view(B, down, across, heads, H // down, W // across, -1)
    return by_region.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, heads, -1)


def _heads_first(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, H, W, heads, d) -> (B * regions * heads, tokens of a region, d)."""
    B, H, W, heads, d = x.shape
    rows, cols = grid
    x = x.reshape(B, rows, H // rows, cols, W // cols, heads, d).permute(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(B * rows * cols * heads, -1, d)

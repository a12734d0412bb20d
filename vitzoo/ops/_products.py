"""Attention inside the cells of a map from batched products, for inference on the CPU.

torch's fused kernel calls the BLAS for 32 queries of one head at a time. On short sequences one
batched product over many cells and heads, and a softmax over all of them, is up to twice as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops._onednn import records_gradient, why_not_onednn

Grid = tuple[int, int]

# Keys, values and scores of one thread at a time, so that they stay in the cache with the softmax.
_PIECE_BYTES = 2 << 20
# Beyond so many queries of a cell torch's fused kernel has enough to do at a time.
_MANY_QUERIES = 200


def why_not_products(*tensors: Tensor) -> str | None:
    """Why an attention on these tensors must not be taken apart into products, or None."""
    if records_gradient(*tensors):
        return "They have no backward pass."
    # The same steps stay torch's own that must not become a call into oneDNN.
    if why_not_onednn(*tensors) is not None:
        return "They are for plain float32 tensors in eager mode on the CPU."
    return None


def products_lose(q: Tensor, grid: Grid) -> str | None:
    """Why torch's fused kernel is the better choice for cells of q (B, H, W, ...), or None."""
    if q.shape[1] * q.shape[2] > _MANY_QUERIES * grid[0] * grid[1]:
        return "torch's fused kernel is as fast on cells of many queries."
    return None


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
    weights = torch.empty_like(scores)
    # Views of all images at once: made one by one they take as long as a small product.
    queries, values, results = (x.transpose(1, 2).unbind() for x in (q, v, out))
    keys = k.permute(0, 2, 3, 1).unbind()
    for image in zip(mask.unbind(), queries, keys, values, results, strict=True):
        of_image, one_q, one_k, one_v, result = image
        torch.baddbmm(of_image, one_q, one_k, alpha=scale, out=scores)
        torch.softmax(scores, -1, out=weights)
        result.copy_(torch.bmm(weights, one_v))
    return out


def attend_cells(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, scale: float, chosen: Tensor | None = None
) -> Tensor:
    """Each cell of q against itself, or against the cells of k and v that were chosen for it.

    Args:
        q, k, v: (B, H, W, heads, head_dim); the grid divides every H and W.
        grid: rows and columns of cells.
        scale: factor on q k^T.
        chosen: numbers (B, cells, chosen) of the cells that a cell sees, or None.

    Returns:
        (B, H, W, heads, head_dim of v).
    """
    rows, cols = grid
    out = v.new_empty(*q.shape[:4], v.shape[-1])
    tokens, seen = (x.shape[1] * x.shape[2] // (rows * cols) for x in (q, k))
    if chosen is not None:
        seen *= chosen.shape[2]
    per_cell = q.shape[3] * seen * (tokens + k.shape[-1] + v.shape[-1]) * q.element_size()
    budget = max(1, _PIECE_BYTES * torch.get_num_threads() // max(1, per_cell))
    images = max(1, min(len(q), budget // (rows * cols)))
    # Scores and their softmax: in place it takes half as long again on rows of 49.
    buffers = q.new_empty(2, min(budget, images * rows * cols) * q.shape[3], tokens, seen)
    for start in range(0, len(q), images):
        some = slice(start, start + images)
        of_some = None if chosen is None else chosen[some]
        _attend_images(q[some], k[some], v[some], grid, scale, of_some, buffers, out[some])
    return out


def _attend_images(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    scale: float,
    chosen: Tensor | None,
    buffers: Tensor,
    out: Tensor,
) -> None:
    """Write to `out` the attention of a few images, as many cells at a time as `buffers` hold."""
    B, H, W, heads, _ = q.shape
    queries, keys, values = (_heads_first(x, grid) for x in (q, k, v))
    numbers = None if chosen is None else _numbers_of_heads(chosen, heads)
    results = values.new_empty(*queries.shape[:2], values.shape[-1])
    for start in range(0, len(queries), buffers.shape[1]):
        piece = slice(start, start + buffers.shape[1])
        if numbers is None:
            seen_keys, seen_values = keys[piece], values[piece]
        else:
            seen_keys, seen_values = (pick(x, numbers[piece]) for x in (keys, values))
        scores, weights = buffers[:, : len(seen_keys)]
        # With beta 0 what the buffer holds is not read.
        torch.baddbmm(
            scores, queries[piece], seen_keys.transpose(1, 2), beta=0, alpha=scale, out=scores
        )
        torch.softmax(scores, -1, out=weights)
        torch.bmm(weights, seen_values, out=results[piece])
    rows, cols = grid
    by_cell = results.view(B, rows, cols, heads, H // rows, W // cols, -1)
    by_cell = by_cell.permute(0, 1, 4, 2, 5, 3, 6)
    out.view(by_cell.shape).copy_(by_cell)


def _heads_first(x: Tensor, grid: Grid) -> Tensor:
    """(B, H, W, heads, d) -> (B * cells * heads, tokens of a cell, d)."""
    B, H, W, heads, d = x.shape
    rows, cols = grid
    x = x.reshape(B, rows, H // rows, cols, W // cols, heads, d).permute(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(B * rows * cols * heads, -1, d)


def flat_numbers(chosen: Tensor) -> Tensor:
    """Cells (B, cells, chosen), numbered in an image -> in the batch, (B * cells, chosen)."""
    first = torch.arange(chosen.shape[0], device=chosen.device) * chosen.shape[1]
    return (chosen + first[:, None, None]).flatten(0, 1)


def _numbers_of_heads(chosen: Tensor, heads: int) -> Tensor:
    """The same of every head of the cells, heads first: (B * cells * heads, chosen)."""
    of_heads = torch.arange(heads, device=chosen.device)[:, None]
    return (flat_numbers(chosen)[:, None] * heads + of_heads).flatten(0, 1)


def pick(x: Tensor, numbers: Tensor) -> Tensor:
    """Whole cells of x (cells, tokens, ...) by (n, chosen) -> (n, chosen * tokens, ...)."""
    picked = x.flatten(1).index_select(0, numbers.flatten())
    return picked.view(numbers.shape[0], numbers.shape[1] * x.shape[1], *x.shape[2:])

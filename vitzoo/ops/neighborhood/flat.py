"""Neighborhood attention with all tiles in one batch: no loop, no memory written in place.

For exported graphs, which must stay small at any size of the map. It gathers the keys of every tile
(4.6 copies of the map), so it is not the fastest in eager mode.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vitzoo.ops.neighborhood._tiles import Axis, Pair, axes, classes


def neighborhood_attention_flat(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: Pair,
    dilation: Pair,
    scale: float,
) -> Tensor:
    """Maps (B, H, W, heads, head_dim); differentiable by autograd."""
    out = v.new_empty(*q.shape[:-1], v.shape[-1])
    for q_maps, k_maps, v_maps, out_maps in zip(
        *(classes(t, dilation) for t in (q, k, v, out)), strict=True
    ):
        y, x = axes(q_maps, kernel_size)
        queries = _query_tiles(q_maps * scale, y, x)
        keys, values = _key_tiles(k_maps, y, x), _key_tiles(v_maps, y, x)
        logits = queries @ keys.transpose(-2, -1) + _spread(bias, y, x, q)
        attended = _join(logits.softmax(-1) @ values, y, x)
        if min(dilation) == max(dilation) == 1:
            return attended[:, 0, 0]
        out_maps.copy_(attended)
    return out


def _query_tiles(maps: Tensor, y: Axis, x: Axis) -> Tensor:
    """(..., H, W, heads, d) -> (..., heads, rows of tiles, strips, queries of a tile, d)."""
    below, right = y.count * y.tile - y.length, x.count * x.tile - x.length
    if below or right:
        maps = F.pad(maps, (0, 0, 0, 0, 0, right, 0, below))
    return _split(maps, (y.count, y.tile), (x.count, x.tile))


def _key_tiles(maps: Tensor, y: Axis, x: Axis) -> Tensor:
    """(..., H, W, heads, d) -> (..., heads, rows of tiles, strips, keys of a tile, d)."""
    for axis, dim in ((y, -4), (x, -3)):
        if axis.count > 1:
            maps = maps.index_select(dim, axis.keys(maps.device))
    return _split(maps, (y.count, y.span), (x.count, x.span))


def _split(maps: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    tiles = maps.unflatten(-3, columns).unflatten(-5, rows)
    return tiles.movedim((-2, -6, -4), (-6, -5, -4)).flatten(-3, -2)


def _join(tiles: Tensor, y: Axis, x: Axis) -> Tensor:
    """The inverse of `_query_tiles`, without what hangs over the end."""
    maps = tiles.unflatten(-2, (y.tile, x.tile)).movedim((-6, -5, -4), (-2, -6, -4))
    maps = maps.flatten(-4, -3).flatten(-5, -4)
    return maps[..., : y.length, : x.length, :, :]


def _spread(bias: Tensor | None, y: Axis, x: Axis, like: Tensor) -> Tensor:
    """The bias of every (query, key) of every tile, -inf outside the neighborhood."""
    rows_y = y.rows(like.device)[:, None, :, None, :, None]
    rows_x = x.rows(like.device)[None, :, None, :, None, :]
    sides = (2 * y.kernel_size - 1, 2 * x.kernel_size - 1)
    table = like.new_zeros(1, *sides) if bias is None else bias.to(like.dtype)
    table = F.pad(table, (0, 1, 0, 1), value=float("-inf"))
    where = rows_y * (2 * x.kernel_size) + rows_x
    return (
        table.flatten(1)
        .index_select(1, where.flatten())
        .unflatten(1, (y.count, x.count, y.tile * x.tile, y.span * x.span))
    )

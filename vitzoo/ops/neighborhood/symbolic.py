"""Neighborhood attention of maps whose sides are unknown: for one exported graph of every size.

Tiles as in `flat`, but what `flat` works out while tracing is arithmetic on positions here: the
graph computes it from the sides it meets. Kernel size, dilation and tile stay numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.ops._sides import pieces
from vitzoo.ops.neighborhood._tiles import COLUMNS, ROWS, Pair


class Lookup(NamedTuple):
    """Where the tiles of an axis find their queries, keys and bias, and a position its query.

    `queries` (tiles * tile,) and `keys` (tiles * span,) are positions; `rows` (tiles, tile, span)
    rows of the bias table, 2 * kernel_size - 1 for keys outside a neighborhood; `back` (side,)
    places among the queries. `tiles` is their number, dilation classes one after the other.
    """

    queries: Tensor
    keys: Tensor
    rows: Tensor
    back: Tensor
    tiles: int
    tile: int
    span: int


def lookup(side: int, kernel_size: int, dilation: int, tile: int, device: torch.device) -> Lookup:
    """The tiles of an axis of `side` positions, and of padding up to kernel_size * dilation.

    All positions past the end are one, number `side`.
    """
    count = pieces(pieces(side, dilation), tile)
    span = tile + kernel_size - 1
    # Of the axis with its padding: a value, never a shape.
    length = (torch.arange(1, device=device) + side).clamp(min=kernel_size * dilation)
    remainder = torch.arange(dilation, device=device)[:, None, None]
    members = (length - 1 - remainder) // dilation + 1
    at = torch.arange(count, device=device)[None, :, None] * tile
    # Past the end, queries of no account repeat the last one.
    query = torch.minimum(at + torch.arange(tile, device=device), members - 1)
    start = at - kernel_size // 2
    start = torch.minimum(start.clamp(min=0), (members - span).clamp(min=0))
    key = start + torch.arange(span, device=device)
    first = torch.minimum((query - kernel_size // 2).clamp(min=0), members - kernel_size)
    offset = key[:, :, None] - first[..., None]
    inside = (offset >= 0) & (offset < kernel_size)
    rows = key[:, :, None] - query[..., None] + kernel_size - 1
    rows = torch.where(inside, rows, 2 * kernel_size - 1)
    position = torch.arange(side, device=device)
    back = position % dilation * (count * tile) + position // dilation
    return Lookup(
        (remainder + dilation * query).clamp(max=side).flatten(),
        (remainder + dilation * key).clamp(max=side).flatten(),
        rows.flatten(0, 1),
        back,
        dilation * count,
        tile,
        span,
    )


def neighborhood_attention_symbolic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sides: Pair,
    kernel_size: Pair,
    dilation: Pair,
    bias: Tensor,
    scale: float | None = None,
) -> Tensor:
    """What `neighborhood_attention` computes of a map padded to kernel_size * dilation, cropped.

    Args:
        q, k, v: (B, H + 1, W + 1, heads, head_dim); the last row and the last column stand for all
            padding.
        sides: H and W.
        kernel_size, dilation: one per axis.
        bias: (heads, 2 * kernel_size - 1, 2 * kernel_size - 1).
        scale: factor on q k^T; head_dim ** -0.5 if None.

    Returns:
        (B, H, W, heads, head_dim).
    """
    tiles = (ROWS[0], COLUMNS[0])
    y, x = (
        lookup(*axis, q.device) for axis in zip(sides, kernel_size, dilation, tiles, strict=True)
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries = _tiles(q * scale, y.queries, x.queries, (y.tile, x.tile))
    keys, values = (_tiles(t, y.keys, x.keys, (y.span, x.span)) for t in (k, v))
    logits = queries @ keys.transpose(-2, -1) + _spread(bias.to(q.dtype), y, x)
    out = (logits.softmax(-1) @ values).unflatten(-2, (y.tile, x.tile))
    out = out.movedim((-6, -5, -4), (-2, -6, -4)).flatten(-4, -3).flatten(-5, -4)
    return out.index_select(-4, y.back).index_select(-3, x.back)


def _tiles(maps: Tensor, rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, H, W, heads, d) -> (B, heads, tiles down, tiles across, positions of a tile, d)."""
    maps = maps.index_select(1, rows).index_select(2, columns)
    tiles = maps.unflatten(2, (-1, shape[1])).unflatten(1, (-1, shape[0]))
    return tiles.movedim((-2, -6, -4), (-6, -5, -4)).flatten(-3, -2)


def _spread(bias: Tensor, y: Lookup, x: Lookup) -> Tensor:
    """The bias of every (query, key) of every tile, -inf outside the neighborhood."""
    table = F.pad(bias, (0, 1, 0, 1), value=float("-inf"))
    where = y.rows[:, None, :, None, :, None] * table.shape[-1] + x.rows[None, :, None, :, None, :]
    found = table.flatten(1).index_select(1, where.flatten())
    return found.view(-1, y.tiles, x.tiles, y.tile * x.tile, y.span * x.span)

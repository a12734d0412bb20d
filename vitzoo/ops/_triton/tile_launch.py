"""What a launch of the `tiles` kernels consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitzoo.ops._kernels import lanes
from vitzoo.ops._triton.launch import Launch, blocks, power_of_two, schedule

Cell = tuple[int, int, int]


@dataclass(frozen=True)
class Tiles:
    """Cells of one call: (rows, columns, tokens) of a cell, and the numbers of cells.

    Attributes:
        q_cell, k_cell: with `ragged`, the most that a cell holds.
        columns: of the grid.
        cells: of an image.
        length: cells of keys that a cell of queries attends to, at most.
        ragged: whether cells are runs of one row, with bounds from a table.
    """

    q_cell: Cell
    k_cell: Cell
    columns: int
    cells: int
    length: int
    ragged: bool

    def sizes(self, q: Tensor, k: Tensor) -> tuple[int, ...]:
        """The kernels' `sizes`."""
        maps = (*q.shape[1:3], *k.shape[1:3])
        return (q.shape[3], *maps, self.cells, self.columns, self.length)


def inverse(lists: Tensor) -> tuple[Tensor, Tensor]:
    """Who attends to a cell: the lists' entries sorted by the cell of keys that they name.

    Args:
        lists: (B, cells, length), numbers of cells, -1 for none.

    Returns:
        Cells of queries, and for each cell of keys where its own begin, (B * cells + 1,); both
        count cells through the whole batch. The sort is stable, so sums repeat bit for bit.
    """
    B, cells, length = lists.shape
    first = torch.arange(B, device=lists.device, dtype=lists.dtype)[:, None, None] * cells
    named = torch.where(lists < 0, B * cells, lists + first).flatten()
    named, order = named.sort(stable=True)
    every = torch.arange(B * cells + 1, device=lists.device, dtype=named.dtype)
    begins = torch.searchsorted(named, every, out_int32=True)
    return (order // length).int(), begins


def _call(
    t: Tiles, kernel: str, maps: Sequence[Tensor], pointers: Any, tables: Any, scale: float,
    *, of_keys: bool = False,
) -> Launch:  # fmt: skip
    q, k, v = maps
    most = lanes(q.dtype)
    # Lanes run along the other side's list, so only the cell of a program's own bounds its tile.
    block_m = block_n = most
    if of_keys:
        block_n = min(most, power_of_two(t.k_cell[2]))
        tiles = -(-t.k_cell[2] // block_n)
    else:
        block_m = min(most, power_of_two(t.q_cell[2]))
        block_n = min(most, power_of_two(t.length * t.k_cell[2]))
        tiles = -(-t.q_cell[2] // block_m)
    strides = tuple(x.stride()[:4] for x in maps)
    arguments = (pointers, tables, *strides, t.sizes(q, k), t.q_cell, t.k_cell, scale)
    constants = {"RAGGED": t.ragged, **blocks(q, v), "BLOCK_M": block_m, "BLOCK_N": block_n}
    grid = (q.shape[0] * t.cells * tiles * q.shape[3],)
    options = schedule(q, kernel, constants, biased=False)
    return Launch("tiles", kernel, grid, arguments, constants, options)


def forward(
    t: Tiles, maps: Sequence[Tensor], tables: Sequence[Tensor], out: Tensor, lse: Tensor,
    scale: float,
) -> Launch:  # fmt: skip
    """Launch of `tiles.forward`; maps are q, k, v, tables lists, bounds and reach."""
    return _call(t, "forward", maps, (*maps, out, lse), tuple(tables), scale)


def queries(
    t: Tiles, maps: Sequence[Tensor], tables: Sequence[Tensor], saved: Sequence[Tensor],
    d_q: Tensor, delta: Tensor, scale: float,
) -> Launch:  # fmt: skip
    """Launch of `tiles.queries`; saved are out, lse and the two gradients."""
    pointers = (tuple(maps), tuple(saved), (d_q, delta))
    return _call(t, "queries", maps, pointers, tuple(tables), scale)


def keys(
    t: Tiles, maps: Sequence[Tensor], tables: Sequence[Tensor], saved: Sequence[Tensor],
    d_k: Tensor, d_v: Tensor, scale: float,
) -> Launch:  # fmt: skip
    """Launch of `tiles.keys`; saved are lse, d_out and delta."""
    lists, *limits = tables
    pointers = (tuple(maps), tuple(saved), (d_k, d_v))
    inverted = (*inverse(lists), *limits)
    return _call(t, "keys", maps, pointers, inverted, scale, of_keys=True)

"""What a launch of the `tiles` kernels consists of; plans are kept as in `launch.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vitzoo.ops._kernels import lanes
from vitzoo.ops._triton.launch import (
    Launch,
    Layout,
    Plan,
    blocks,
    layout,
    power_of_two,
    schedule,
)

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

    def sizes(self, q: Layout, k: Layout) -> tuple[int, ...]:
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


class TileCall:
    """One attention: its cells and tensors.

    Args:
        t: the cells.
        maps: q, k and v.
        tables: lists, bounds and reach.
        scale: of the logits.
    """

    def __init__(
        self, t: Tiles, maps: Sequence[Tensor], tables: Sequence[Tensor], scale: float
    ) -> None:
        self.t, self.maps, self.tables, self.scale = t, tuple(maps), tuple(tables), scale
        self.layouts = tuple(layout(x) for x in maps)

    def forward(self, out: Tensor, lse: Tensor) -> Launch:
        """Launch of `tiles.forward`."""
        return self._launch("forward", (*self.maps, out, lse), self.tables)

    def queries(self, saved: Sequence[Tensor], d_q: Tensor, delta: Tensor) -> Launch:
        """Launch of `tiles.queries`; saved are out, lse and the two gradients."""
        return self._launch("queries", (self.maps, tuple(saved), (d_q, delta)), self.tables)

    def keys(self, saved: Sequence[Tensor], d_k: Tensor, d_v: Tensor) -> Launch:
        """Launch of `tiles.keys`; saved are lse, d_out and delta."""
        lists, *limits = self.tables
        pointers = (self.maps, tuple(saved), (d_k, d_v))
        return self._launch("keys", pointers, (*inverse(lists), *limits))

    def _launch(self, kernel: str, pointers: tuple, tables: tuple[Tensor, ...]) -> Launch:
        return Launch(_plan(kernel, self.t, *self.layouts, self.scale), (pointers, tables))


@lru_cache(maxsize=4096)
def _plan(kernel: str, t: Tiles, q: Layout, k: Layout, v: Layout, scale: float) -> Plan:
    # A cell that 64 divides fills its tiles; lanes run along the other side's list, so only the
    # cell of a program's own bounds its tile.
    full = not t.ragged and t.q_cell[2] % 64 == t.k_cell[2] % 64 == 0
    block_m = block_n = lanes(q.dtype, plain=full)
    own = t.k_cell[2] if kernel == "keys" else t.q_cell[2]
    if kernel == "keys":
        block_n = min(block_n, power_of_two(own))
    else:
        block_m = min(block_m, power_of_two(own))
        block_n = min(block_n, power_of_two(t.length * t.k_cell[2]))
    programs = -(-own // (block_n if kernel == "keys" else block_m))
    strides = tuple(x.strides[:4] for x in (q, k, v))
    numbers = (*strides, t.sizes(q, k), t.q_cell, t.k_cell, scale)
    constants = {"RAGGED": t.ragged, **blocks(q, v), "BLOCK_M": block_m, "BLOCK_N": block_n}
    grid = (q.shape[0] * t.cells * programs * q.shape[3],)
    return Plan("tiles", kernel, grid, numbers, constants, schedule(q, kernel, constants))

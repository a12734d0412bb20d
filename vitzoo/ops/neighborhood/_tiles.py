"""How a map is cut: into dilation classes, and each class into tiles of queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

Pair = Sequence[int]

# Rows and columns of a tile, each with the length up to which one tile takes the whole axis
# (docs/decisions.md, "Tiles over strips").
ROWS = (4, 7)
COLUMNS = (7, 14)
# Rows of a tile, for kernels up to that one, where a caller prefers fewer keys a query to larger
# products.
FEW_ROWS = 2
FEW_ROWS_KERNEL = 7


@dataclass(frozen=True)
class Axis:
    """Tiles of an undilated axis of `length` positions."""

    length: int
    kernel_size: int
    tile: int

    @property
    def count(self) -> int:
        """Number of tiles; the last may hang over the end."""
        return -(-self.length // self.tile)

    @property
    def span(self) -> int:
        """Keys that the queries of a tile attend to together."""
        return min(self.tile + self.kernel_size - 1, self.length)

    def start(self, i: int) -> int:
        """First key of tile i."""
        return min(max(i * self.tile - self.kernel_size // 2, 0), self.length - self.span)

    def like(self, i: int) -> int:
        """The first tile whose table rows equal those of tile i: all inner tiles are alike."""
        reach = self.kernel_size // 2
        inner = i * self.tile >= reach and (i + 1) * self.tile + reach <= self.length
        return -(-reach // self.tile) if inner else i

    def keys(self, device: torch.device) -> Tensor:
        """Positions of the keys of all tiles, (count * span,)."""
        starts = [self.start(i) for i in range(self.count)]
        return torch.tensor([s + j for s in starts for j in range(self.span)], device=device)

    def rows(self, device: torch.device) -> Tensor:
        """Table rows (count, tile, span); 2 * kernel_size - 1 for keys outside a neighborhood."""
        # From lists: a constant in an exported graph.
        return torch.tensor(_rows(self), device=device)


@lru_cache(maxsize=64)
def _rows(axis: Axis) -> list[list[list[int]]]:
    k, outside = axis.kernel_size, 2 * axis.kernel_size - 1
    tiles = []
    for i in range(axis.count):
        tile = []
        for query in range(i * axis.tile, (i + 1) * axis.tile):
            # Past the end, queries of no account repeat the last one.
            query = min(query, axis.length - 1)
            first = min(max(query - k // 2, 0), axis.length - k)
            keys = range(axis.start(i), axis.start(i) + axis.span)
            tile.append([j - query + k - 1 if 0 <= j - first < k else outside for j in keys])
        tiles.append(tile)
    return tiles


def axes(maps: Tensor, kernel_size: Pair, *, few_rows_up_to: int = 0) -> tuple[Axis, Axis]:
    """Rows and columns of maps (B, classes, classes, H, W, heads, d), cut into tiles.

    Args:
        maps: what is cut.
        kernel_size: keys per axis.
        few_rows_up_to: number of rows of a map up to which its tiles have `FEW_ROWS`.
    """
    y = _axis(maps.shape[3], kernel_size[0], *ROWS)
    if y.count > 1 and y.length <= few_rows_up_to and y.kernel_size <= FEW_ROWS_KERNEL:
        y = replace(y, tile=FEW_ROWS)
    return y, _axis(maps.shape[4], kernel_size[1], *COLUMNS)


def _axis(length: int, kernel_size: int, tile: int, whole: int) -> Axis:
    tile = max(tile, kernel_size // 2)
    return Axis(length, kernel_size, length if length <= max(whole, tile) else tile)


def classes(x: Tensor, dilation: Pair) -> Iterator[Tensor]:
    """Views (B, classes, classes, H', W', heads, d) of the maps that (B, H, W, heads, d) holds.

    Where the dilation does not divide a side, the first classes have one member more.
    """
    for y0, many_y in _groups(x.shape[1], dilation[0]):
        for x0, many_x in _groups(x.shape[2], dilation[1]):
            windows = x[:, y0:, x0:].unfold(1, many_y, dilation[0]).unfold(2, many_x, dilation[1])
            yield windows.permute(0, 5, 6, 1, 2, 3, 4)


def _groups(length: int, dilation: int) -> list[tuple[int, int]]:
    longer = length % dilation
    groups = [(0, longer), (longer, dilation - longer)]
    return [group for group in groups if group[1]]

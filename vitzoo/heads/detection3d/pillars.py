"""From points to pillars and their features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NORM: dict[str, Any] = {"eps": 1e-3, "momentum": 0.01}


@dataclass(frozen=True)
class PillarGrid:
    """The volume that a detector sees and its pillars.

    Attributes:
        point_range: (x0, y0, z0, x1, y1, z1) in metres; points outside are dropped.
        pillar_size: (x, y) in metres.

    Raises:
        ValueError: the range is empty or does not hold a pillar.
    """

    point_range: tuple[float, float, float, float, float, float]
    pillar_size: tuple[float, float]

    def __post_init__(self) -> None:
        low, high = self.point_range[:3], self.point_range[3:]
        if len(high) != 3 or any(a >= b for a, b in zip(low, high, strict=True)):
            raise ValueError(f"point_range must be (x0, y0, z0, x1, y1, z1), got {low + high}")
        if len(self.pillar_size) != 2 or min(self.pillar_size) <= 0 or min(self.size) < 1:
            raise ValueError(f"pillar_size {self.pillar_size} does not fit {self.point_range}")

    @property
    def size(self) -> tuple[int, int]:
        """Pillars along y and along x: (ny, nx)."""
        x0, y0, _, x1, y1, _ = self.point_range
        # Rounded: 149.76 / 0.32 is 468 only up to a float's last digit.
        return round((y1 - y0) / self.pillar_size[1]), round((x1 - x0) / self.pillar_size[0])

    def cells(self, points: Tensor) -> Tensor:
        """Points (N, 2 or more) -> (N, 2) integers as (y, x), clamped to the grid."""
        origin = points.new_tensor(self.point_range[:2])
        cells = ((points[:, :2] - origin) / points.new_tensor(self.pillar_size)).floor()
        ny, nx = self.size
        return cells.clamp(cells.new_zeros(2), cells.new_tensor([nx - 1, ny - 1])).long().flip(-1)

    def inside(self, points: Tensor) -> Tensor:
        """(N,) True where all numbers of a point are finite and it lies in the range."""
        low = points.new_tensor(self.point_range[:3])
        high = points.new_tensor(self.point_range[3:])
        within = (points[:, :3] >= low) & (points[:, :3] < high)
        return within.all(-1) & points.isfinite().all(-1)


def join_frames(frames: Sequence[Tensor], columns: int, grid: PillarGrid) -> tuple[Tensor, ...]:
    """Points of a batch in one tensor, without those that the detector cannot use.

    Args:
        frames: per frame (N, columns): x, y, z in metres, then the sensor's features.
        columns: numbers per point.
        grid: its range decides.

    Returns:
        Points (N', columns) in float32; frame of each (N',); points dropped per frame (B,): not
        finite, or outside the range.

    Raises:
        ValueError: no frame, or a frame that is not (N, columns).
    """
    if not frames:
        raise ValueError("a batch needs at least one frame")
    for i, points in enumerate(frames):
        if points.dim() != 2 or points.shape[1] != columns:
            raise ValueError(f"frame {i}: points must be (N, {columns}), got {tuple(points.shape)}")
    counts = torch.tensor([len(points) for points in frames])
    joined = torch.cat([points.float() for points in frames])
    frame = torch.arange(len(frames)).repeat_interleave(counts).to(joined.device)
    good = grid.inside(joined)
    dropped = torch.zeros(len(frames), dtype=torch.int64, device=joined.device)
    dropped = dropped.index_add(0, frame, (~good).long())
    return joined[good], frame[good], dropped


class PillarLayer(nn.Module):
    """Linear, BatchNorm, ReLU on points; then the maximum over each pillar."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, dim, bias=False)
        self.norm = nn.BatchNorm1d(dim, **_NORM)

    def forward(self, x: Tensor, pillar: Tensor, pillars: int) -> tuple[Tensor, Tensor]:
        """Points (N, C) and the pillar of each (N,) -> points (N, dim), pillars (P, dim)."""
        x = self.linear(x)
        if self.training and len(x) < 2:
            # One point has no variance: the running statistics serve.
            norm = self.norm
            x = F.batch_norm(
                x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
        else:
            x = self.norm(x)
        x = F.relu(x)
        highest = x.new_zeros(pillars, x.shape[1]).scatter_reduce(
            0, pillar[:, None].expand_as(x), x, "amax", include_self=False
        )
        return x, highest


class PillarEncoder(nn.Module):
    """Features of pillars from the points in them (the dynamic encoder of mmdet3d).

    A point is described by its own numbers, by its offset from the mean of its pillar's points and
    from the pillar's centre. Each layer takes the maximum over a pillar; all but the last hand it
    back to the points. Always in float32: half precision overflows.

    Args:
        grid: the pillars.
        point_features: numbers per point, x, y and z among them.
        dims: width of each layer; the last is the pillars'.
    """

    def __init__(self, grid: PillarGrid, point_features: int = 5, dims: Sequence[int] = (64, 128)):
        super().__init__()
        self.grid = grid
        self.point_features = point_features
        inputs = [point_features + 6, *(2 * dim for dim in dims[:-1])]
        self.layers = nn.ModuleList(
            PillarLayer(in_dim, dim) for in_dim, dim in zip(inputs, dims, strict=True)
        )
        self.num_features = dims[-1]

    def forward(self, points: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Features and places of the pillars that hold points.

        Args:
            points: (N, point_features), inside the grid's range (`join_frames`).
            frame: (N,) frame of each point.

        Returns:
            (P, C) and (P, 3) as (frame, y, x), sorted.
        """
        with torch.autocast(points.device.type, enabled=False):
            ny, nx = self.grid.size
            cells = self.grid.cells(points)
            key = (frame * ny + cells[:, 0]) * nx + cells[:, 1]
            keys, pillar, counts = key.unique(return_inverse=True, return_counts=True)
            x = self._describe(points.float(), cells, pillar, counts)
            highest = x.new_zeros(len(keys), self.num_features)
            for i, layer in enumerate(self.layers):
                if i:
                    x = torch.cat([x, highest.index_select(0, pillar)], dim=-1)
                x, highest = layer(x, pillar, len(keys))
        frame_and_row = keys // nx
        coords = torch.stack([frame_and_row // ny, frame_and_row % ny, keys % nx], dim=-1)
        return highest, coords

    def _describe(self, points: Tensor, cells: Tensor, pillar: Tensor, counts: Tensor) -> Tensor:
        xyz = points[:, :3]
        sums = xyz.new_zeros(len(counts), 3).index_add(0, pillar, xyz)
        mean = (sums / counts[:, None]).index_select(0, pillar)
        x0, y0, z0, _, _, z1 = self.grid.point_range
        size = xyz.new_tensor([*self.grid.pillar_size, z1 - z0])
        cells_xyz = F.pad(cells.flip(-1), (0, 1))
        centre = cells_xyz * size + (size / 2 + xyz.new_tensor([x0, y0, z0]))
        return torch.cat([points, xyz - mean, xyz - centre], dim=-1)

    def init_weights(self) -> None:
        """torch's own initialisation of a linear layer."""
        for layer in self.layers:
            nn.init.kaiming_uniform_(layer.linear.weight, a=math.sqrt(5))  # type: ignore[union-attr, arg-type]

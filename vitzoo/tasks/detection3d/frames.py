"""One LiDAR frame with its boxes, whatever data set it is from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vitzoo.errors import InputError
from vitzoo.heads.detection3d.boxes import BOX_SIZE, points_in_boxes


@dataclass(frozen=True)
class LidarFrame:
    """Points and boxes in the vehicle's axes: x ahead, y to the left, z up, in metres.

    Attributes:
        points: (N, C) float32: x, y, z, then the sensor's features.
        boxes: (M, 7) centre, length, width, height, heading counter-clockwise from +x.
        labels: (M,) classes from 0.
        point_counts: (M,) points inside each box, as the data set states or as counted.
        name: of the frame.
    """

    points: Tensor
    boxes: Tensor = field(default_factory=lambda: torch.zeros(0, BOX_SIZE))
    labels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    point_counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    name: str = ""

    def keep_boxes(self, rows: Tensor) -> LidarFrame:
        """The frame with some of its boxes; `rows` is a mask or an index."""
        return replace(
            self,
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            point_counts=self.point_counts[rows],
        )

    def targets(self) -> dict[str, Tensor]:
        """`boxes` and `labels`, as the detector takes them."""
        return {"boxes": self.boxes, "labels": self.labels}


def count_points(points: Tensor, boxes: Tensor) -> Tensor:
    """Points (N, C) inside each of the boxes (M, 7) -> (M,)."""
    counts = [points_in_boxes(points, box[None]).sum() for box in boxes]
    return torch.stack(counts) if counts else torch.zeros(0, dtype=torch.int64)


def check_pose(pose: Tensor) -> Tensor:
    """The pose itself.

    Raises:
        ValueError: it is no (4, 4) of finite numbers, or has no inverse.
    """
    if pose.shape != (4, 4):
        raise ValueError(f"a pose must be (4, 4), not {tuple(pose.shape)}")
    if not pose.isfinite().all() or torch.linalg.inv_ex(pose.double()).info:
        raise ValueError("its pose is not finite or has no inverse")
    return pose


def check_steps(sweeps: int, every: int) -> None:
    """Check two settings of the readers of sequences.

    Raises:
        InputError: one is below 1.
    """
    for name, value in (("sweeps", sweeps), ("every", every)):
        if value < 1:
            raise InputError(f"data.{name} must be at least 1, got {value}")


def merge_sweeps(sweeps: Sequence[Tensor], poses: Sequence[Tensor], *, near: float = 5.0) -> Tensor:
    """The current sweep and past ones in the current vehicle's axes.

    As in FlatFormer's multi-frame recipes: the last column becomes the sweep's age (0, -1, -2), and
    points of past sweeps close to the vehicle, which are the vehicle itself, are removed. Close
    where the sweep was taken, before it is moved, as in the reference's loader.

    Args:
        sweeps: (N, C) each, newest first; missing ones are given as the current sweep.
        poses: (4, 4) vehicle to world, one per sweep.
        near: metres from above within which points of past sweeps are removed.

    Returns:
        (N', C).

    Raises:
        ValueError: not as many poses as sweeps, or a pose that is no (4, 4) or has no inverse.
    """
    if len(sweeps) != len(poses):
        raise ValueError(f"{len(sweeps)} sweeps need as many poses, got {len(poses)}")
    for pose in poses:
        check_pose(pose)
    to_vehicle = torch.linalg.inv(poses[0].double())
    merged = []
    for age, (given, pose) in enumerate(zip(sweeps, poses, strict=True)):
        sweep = given.clone()
        if given is not sweeps[0]:
            sweep = sweep[sweep[:, :2].norm(dim=-1) > near]
            move = to_vehicle @ pose.double()
            sweep[:, :3] = (sweep[:, :3].double() @ move[:3, :3].T + move[:3, 3]).float()
        sweep[:, -1] = -age
        merged.append(sweep)
    return torch.cat(merged)

"""Argoverse 2's sensor data set, read with pyarrow alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitzoo.errors import InputError
from vitzoo.tasks.contract import UnreadableSample
from vitzoo.tasks.detection3d.files import pose_matrix, read_feather, read_points, unreadable
from vitzoo.tasks.detection3d.frames import LidarFrame, check_pose, check_steps, merge_sweeps

CLASSES = (
    "REGULAR_VEHICLE", "PEDESTRIAN", "BICYCLIST", "MOTORCYCLIST", "WHEELED_RIDER", "BOLLARD",
    "CONSTRUCTION_CONE", "SIGN", "CONSTRUCTION_BARREL", "STOP_SIGN",
    "MOBILE_PEDESTRIAN_CROSSING_SIGN", "LARGE_VEHICLE", "BUS", "BOX_TRUCK", "TRUCK",
    "VEHICULAR_TRAILER", "TRUCK_CAB", "SCHOOL_BUS", "ARTICULATED_BUS", "MESSAGE_BOARD_TRAILER",
    "BICYCLE", "MOTORCYCLE", "WHEELED_DEVICE", "WHEELCHAIR", "STROLLER", "DOG",
)  # fmt: skip

_BOX_COLUMNS = (
    "timestamp_ns", "category", "length_m", "width_m", "height_m", "qw", "qx", "qy", "qz",
    "tx_m", "ty_m", "tz_m", "num_interior_pts",
)  # fmt: skip
_POSE_COLUMNS = ("timestamp_ns", "qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m")


class Argoverse2(Dataset[LidarFrame]):
    """Annotated sweeps of a split, in the vehicle's axes.

    Points are x, y, z, intensity in [0, 1], and the sweep's age (0, -1, ...).

    Args:
        root: folder with the splits' folders, each with a folder per log.
        split: `train`, `val` or `test`.
        classes: categories that count, in the order of the labels.
        sweeps: the current sweep and how many before it.
        every: take every n-th annotated sweep.

    Raises:
        InputError: no log there, or `sweeps` or `every` below 1.
    """

    point_features = 5

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        classes: Sequence[str] = CLASSES,
        sweeps: int = 1,
        every: int = 1,
    ) -> None:
        check_steps(sweeps, every)
        folder = Path(root).expanduser() / split
        self.classes, self.sweeps = tuple(classes), sweeps
        self.samples: list[tuple[Path, int]] = []
        for log in sorted(path.parent for path in folder.glob("*/annotations.feather")):
            times = _read(log / "annotations.feather", ("timestamp_ns",))["timestamp_ns"]
            annotated = sorted({int(time) for time in times})[::every]
            self.samples += [(log, time) for time in annotated if _sweep(log, time).exists()]
        if not self.samples:
            raise InputError(
                f"no annotated sweeps under {folder} (expected {folder}/LOG/annotations.feather "
                "and LOG/sensors/lidar/TIMESTAMP.feather)"
            )
        self._tables: dict[Path, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> LidarFrame:
        log, time = self.samples[index]
        table = self._table(log / "annotations.feather", _BOX_COLUMNS)
        rows = [
            row
            for row in np.flatnonzero(table["timestamp_ns"] == time).tolist()
            if table["category"][row] in self.classes
        ]
        boxes = torch.tensor([_box(table, row) for row in rows]).reshape(-1, 7)
        return LidarFrame(
            self._points(log, time),
            boxes,
            torch.tensor([self.classes.index(table["category"][row]) for row in rows]).long(),
            torch.tensor([int(table["num_interior_pts"][row]) for row in rows]).long(),
            name=f"{log.name}/{time}",
        )

    def _points(self, log: Path, time: int) -> Tensor:
        current = read_points(_sweep(log, time), columns=self.point_features)
        if self.sweeps == 1:
            return current
        times = sorted(int(path.stem) for path in _sweep(log, time).parent.glob("*.feather"))
        place = times.index(time)
        table = self._table(log / "city_SE3_egovehicle.feather", _POSE_COLUMNS)
        sweeps, poses = [current], [_pose(table, time)]
        for back in range(1, self.sweeps):
            if back > place:
                sweeps.append(current)
                poses.append(poses[0])
                continue
            before = times[place - back]
            sweeps.append(read_points(_sweep(log, before), columns=self.point_features))
            poses.append(_pose(table, before))
        return merge_sweeps(sweeps, poses)

    def _table(self, path: Path, columns: tuple[str, ...]) -> dict[str, Any]:
        if path not in self._tables:
            if len(self._tables) > 8:
                self._tables.clear()
            self._tables[path] = _read(path, columns)
        return self._tables[path]


def _sweep(log: Path, time: int) -> Path:
    return log / "sensors" / "lidar" / f"{time}.feather"


def _read(path: Path, columns: tuple[str, ...]) -> dict[str, Any]:
    with unreadable(path):
        return read_feather(path, columns)


def _pose(table: dict[str, Any], time: int) -> Tensor:
    rows = np.flatnonzero(table["timestamp_ns"] == time)
    if not len(rows):
        raise UnreadableSample("city_SE3_egovehicle.feather", f"no pose at {time}")
    quaternion, place = (
        [table[name][rows[0]] for name in names]
        for names in (_POSE_COLUMNS[1:5], _POSE_COLUMNS[5:])
    )
    with unreadable("city_SE3_egovehicle.feather"):
        return check_pose(pose_matrix(quaternion, place))


def _box(table: dict[str, Any], row: int) -> list[float]:
    pose = pose_matrix([table[name][row] for name in ("qw", "qx", "qy", "qz")], (0, 0, 0))
    names = ("tx_m", "ty_m", "tz_m", "length_m", "width_m", "height_m")
    return [
        *(float(table[name][row]) for name in names),
        torch.atan2(pose[1, 0], pose[0, 0]).item(),
    ]

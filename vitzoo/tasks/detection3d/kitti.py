"""KITTI's object benchmark, read with numpy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitzoo.errors import InputError
from vitzoo.heads.detection3d.boxes import wrap_angle
from vitzoo.tasks.contract import UnreadableSample
from vitzoo.tasks.detection3d.files import read_points
from vitzoo.tasks.detection3d.frames import LidarFrame, check_pose, count_points

CLASSES = ("Car", "Pedestrian", "Cyclist")
# Left colour camera; only what it sees is annotated.
IMAGE_SIZE = (1242, 375)


class Kitti(Dataset[LidarFrame]):
    """Sweeps cut to the camera's view, with the boxes in LiDAR axes.

    Points are x, y, z and reflectance.

    Args:
        root: folder that holds `training/velodyne`, `training/label_2` and `training/calib`.
        split: name of a list in `ImageSets/` (or directly under `root`), one frame number a line;
            without that file, `train` and `val` are the even and the odd frames.
        classes: types that count, in the order of the labels.

    Raises:
        InputError: no sweeps there, or no such list.
    """

    point_features = 4

    def __init__(self, root: str | Path, split: str, *, classes: Sequence[str] = CLASSES) -> None:
        self.root = Path(root).expanduser()
        self.classes = tuple(classes)
        self.names = _names(self.root, split)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> LidarFrame:
        name = self.names[index]
        folder = self.root / "training"
        points = read_points(folder / "velodyne" / f"{name}.bin", columns=self.point_features)
        to_camera, projection = _calibration(folder / "calib" / f"{name}.txt")
        points = points[_in_view(points, to_camera, projection)]
        boxes, labels = self._boxes(folder / "label_2" / f"{name}.txt", to_camera)
        return LidarFrame(points, boxes, labels, count_points(points, boxes), name=name)

    def _boxes(self, path: Path, to_camera: Tensor) -> tuple[Tensor, Tensor]:
        """Type, then 14 numbers a line: the last seven are h, w, l, x, y, z (bottom), turn."""
        boxes, labels = [], []
        to_lidar = torch.linalg.inv(to_camera)
        for line in _lines(path):
            kind, *values = line.split()
            if kind not in self.classes:
                continue
            try:
                height, width, length, x, y, z, turn = (float(v) for v in values[7:14])
            except ValueError:
                raise UnreadableSample(str(path), f"not a label: {line!r}") from None
            place = to_lidar @ torch.tensor([x, y, z, 1], dtype=torch.float64)
            # The camera's y points down, so its turn runs the other way from another axis.
            yaw = wrap_angle(torch.tensor(-turn - math.pi / 2))
            centre = [*place[:2].tolist(), place[2].item() + height / 2]
            boxes.append([*centre, length, width, height, yaw.item()])
            labels.append(self.classes.index(kind))
        return torch.tensor(boxes).reshape(-1, 7), torch.tensor(labels).long()


def _names(root: Path, split: str) -> list[str]:
    for path in (root / "ImageSets" / f"{split}.txt", root / f"{split}.txt"):
        if path.is_file():
            return path.read_text().split()
    names = sorted(path.stem for path in (root / "training" / "velodyne").glob("*.bin"))
    if not names:
        raise InputError(f"no sweeps in {root}/training/velodyne (expected NUMBER.bin)")
    if split not in ("train", "val"):
        raise InputError(f"{root}/ImageSets/{split}.txt is not there: use train, val, or make it")
    return names[0::2] if split == "train" else names[1::2]


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableSample(str(path), str(error)) from None


def _calibration(path: Path) -> tuple[Tensor, Tensor]:
    """LiDAR to rectified camera (4, 4), and camera to image (3, 4)."""
    rows = {}
    for line in _lines(path):
        name, _, values = line.partition(":")
        rows[name] = values.split()
    try:
        rectify, to_camera = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
        rectify[:3, :3] = _matrix(rows["R0_rect"], 3)
        to_camera[:3] = _matrix(rows["Tr_velo_to_cam"], 4)
        projection = _matrix(rows["P2"], 4)
        return check_pose(rectify @ to_camera), projection
    except (KeyError, ValueError, RuntimeError) as error:
        raise UnreadableSample(str(path), f"not a calibration: {error}") from None


def _matrix(values: list[str], columns: int) -> Tensor:
    return torch.tensor([float(v) for v in values], dtype=torch.float64).view(3, columns)


def _in_view(points: Tensor, to_camera: Tensor, projection: Tensor) -> Tensor:
    """(N,) whether the left colour camera sees a point."""
    ones = torch.ones(len(points), 1, dtype=torch.float64)
    camera = torch.cat([points[:, :3].double(), ones], 1) @ to_camera.T
    u, v, depth = (camera @ projection.T).unbind(1)
    width, height = IMAGE_SIZE
    ahead = depth > 0
    return ahead & (u >= 0) & (u < width * depth) & (v >= 0) & (v < height * depth)

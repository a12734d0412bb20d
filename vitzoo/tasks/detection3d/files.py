"""LiDAR points from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from vitzoo.errors import InputError, missing_extra
from vitzoo.tasks.contract import UnreadableSample

# Argoverse 2's intensity is a byte.
_BYTE = 255.0
# What numpy raises for files that are no arrays: wrong, cut off, empty, or of another suffix.
DAMAGED = (OSError, ValueError, EOFError, BadZipFile, AttributeError)


def read_points(path: str | Path, *, columns: int | None = None) -> Tensor:
    """The points of one sweep.

    Args:
        path: `.bin` (KITTI: float32 x 4), `.pcd.bin` (nuScenes: float32 x 5), `.feather`
            (Argoverse 2), `.npy`, or `.npz` with an array `points`.
        columns: wanted numbers per point; missing ones, such as the sweep's age, are 0.

    Returns:
        (N, columns) float32: x, y, z, intensity, ...

    Raises:
        UnreadableSample: missing, damaged, of another format or with too many columns.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise UnreadableSample(str(path), f"not one of {', '.join(_READERS)}")
    try:
        points = np.asarray(_READERS[path.suffix](path))
    except InputError:
        # A ValueError too, but about this machine: a package is missing.
        raise
    except FileNotFoundError:
        raise UnreadableSample(str(path), "no such file") from None
    except KeyError as error:
        raise UnreadableSample(str(path), f"it holds no array {error}") from None
    except DAMAGED as error:
        raise UnreadableSample(str(path), str(error)) from None
    if points.dtype.kind not in "fiu":
        raise UnreadableSample(str(path), f"points must be real numbers, not {points.dtype}")
    if points.ndim != 2 or points.shape[1] < 3:
        raise UnreadableSample(str(path), f"points must be (N, 3 or more), not {points.shape}")
    found = torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32))
    if columns is None or columns == found.shape[1]:
        return found
    if columns < found.shape[1]:
        raise UnreadableSample(
            str(path), f"points have {found.shape[1]} columns where {columns} are wanted"
        )
    return torch.nn.functional.pad(found, (0, columns - found.shape[1]))


def _bin(path: Path) -> Any:
    values = np.fromfile(path, dtype=np.float32)
    width = 5 if path.name.endswith(".pcd.bin") else 4
    if values.size % width:
        raise ValueError(f"{values.size} numbers are no rows of {width}")
    return values.reshape(-1, width)


def _npz(path: Path) -> Any:
    with np.load(path) as arrays:
        if "points" not in arrays:
            raise KeyError("points")
        return arrays["points"]


def _feather(path: Path) -> Any:
    table = read_feather(path, ("x", "y", "z", "intensity"))
    points = np.stack([table[name].astype(np.float32) for name in ("x", "y", "z", "intensity")], 1)
    points[:, 3] /= _BYTE
    return points


_READERS: dict[str, Callable[[Path], Any]] = {
    ".bin": _bin,
    ".feather": _feather,
    ".npy": np.load,
    ".npz": _npz,
}
POINT_FILES = tuple(_READERS)


def read_feather(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray[Any, Any]]:
    """Columns of a feather file as arrays.

    Raises:
        KeyError: a column is missing.
        ValueError: not a feather file.
        InputError: pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowInvalid, feather
    except ImportError:
        raise missing_extra("lidar", "pyarrow") from None
    try:
        table = feather.read_table(path)
    except ArrowInvalid as error:
        raise ValueError(str(error)) from None
    return {name: table.column(name).to_numpy() for name in names}


def pose_matrix(quaternion: Any, translation: Any) -> Tensor:
    """Quaternion (w, x, y, z) and translation -> (4, 4) float64."""
    w, x, y, z = (float(v) for v in quaternion)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )
    pose[:3, 3] = torch.tensor([float(v) for v in translation], dtype=torch.float64)
    return pose

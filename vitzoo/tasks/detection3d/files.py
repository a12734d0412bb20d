"""LiDAR points from files."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    with unreadable(path):
        found = as_points(_READERS[path.suffix](path))
    if columns is None or columns == found.shape[1]:
        return found
    if columns < found.shape[1]:
        raise UnreadableSample(
            str(path), f"points have {found.shape[1]} columns where {columns} are wanted"
        )
    return torch.nn.functional.pad(found, (0, columns - found.shape[1]))


@contextmanager
def unreadable(path: str | Path) -> Iterator[None]:
    """Turn what a damaged or foreign file makes its reader raise into `UnreadableSample`."""
    try:
        yield
    except InputError:
        # A missing package is no fault of the file's.
        raise
    except FileNotFoundError:
        raise UnreadableSample(str(path), "no such file") from None
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error, RuntimeError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UnreadableSample(str(path), reason or "damaged or empty") from None


def as_points(values: Any) -> Tensor:
    """An array of numbers -> float32 points (N, 3 or more).

    Raises:
        ValueError: no real numbers, or of another shape.
    """
    array = as_numbers(np.asarray(values), "points")
    if array.ndim != 2 or array.shape[1] < 3:
        raise ValueError(f"points must be (N, 3 or more), not {array.shape}")
    with np.errstate(over="ignore"):
        # What float32 cannot hold is infinite, and dropped with a count like any such point.
        return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def as_numbers(array: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """The array itself.

    Raises:
        ValueError: it is not of real numbers.
    """
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be real numbers, not of type {array.dtype}")
    return array


def read_arrays(path: Path, names: Sequence[str]) -> list[np.ndarray[Any, Any]]:
    """Arrays of an `.npz` file.

    Raises:
        ValueError: no such archive, or an array is missing; what numpy raises on a torn one.
    """
    arrays = np.load(path)
    if isinstance(arrays, np.ndarray):
        raise ValueError("it holds a single array: name it .npy")
    with arrays:
        missing = [name for name in names if name not in arrays]
        if missing:
            has = ", ".join(arrays.files) or "none"
            raise ValueError(f"it holds no array {missing[0]!r} (it has: {has})")
        return [arrays[name] for name in names]


def _bin(path: Path) -> Any:
    values = np.fromfile(path, dtype=np.float32)
    width = 5 if path.name.endswith(".pcd.bin") else 4
    if values.size % width:
        raise ValueError(f"{values.size} numbers are no rows of {width}")
    return values.reshape(-1, width)


def _npy(path: Path) -> Any:
    array = np.load(path)
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError("it is an archive of arrays: name it .npz")
    return array


def _npz(path: Path) -> Any:
    return read_arrays(path, ("points",))[0]


def _feather(path: Path) -> Any:
    table = read_feather(path, ("x", "y", "z", "intensity"))
    points = np.stack([table[name].astype(np.float32) for name in ("x", "y", "z", "intensity")], 1)
    points[:, 3] /= _BYTE
    return points


_READERS: dict[str, Callable[[Path], Any]] = {
    ".bin": _bin,
    ".feather": _feather,
    ".npy": _npy,
    ".npz": _npz,
}
POINT_FILES = tuple(_READERS)


def read_feather(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray[Any, Any]]:
    """Columns of a feather file as arrays.

    Raises:
        ValueError: not a feather file, or a column is missing.
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
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise ValueError(f"it has no column {missing[0]!r}")
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

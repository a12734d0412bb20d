"""Frames in numpy files, for data that was converted (Waymo, nuScenes, one's own)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitzoo.errors import InputError
from vitzoo.tasks.detection3d.files import as_numbers, read_arrays, read_points, unreadable
from vitzoo.tasks.detection3d.frames import (
    LidarFrame,
    check_pose,
    check_steps,
    count_points,
    merge_sweeps,
)


class NpzFrames(Dataset[LidarFrame]):
    """`ROOT/SPLIT/SEQUENCE/FRAME.npz`, frames of a sequence in the order of their names.

    Each file holds `points` (N, C) float32: x, y, z, then features, scaled as the network shall see
    them (Waymo: the hyperbolic tangent of intensity and elongation); `boxes` (M, 7): centre,
    length, width, height, heading counter-clockwise from +x; `names` (M,): class names; and, for
    several sweeps, `pose` (4, 4): vehicle to world.

    Args:
        root, split: folders.
        classes: names that count, in the order of the labels.
        sweeps: the current sweep and how many before it; with more than one the last column
            becomes the sweep's age.
        every: take every n-th frame of a sequence.
        point_features: columns of `points`.

    Raises:
        InputError: no file there, or `sweeps` or `every` below 1.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        classes: Sequence[str],
        sweeps: int = 1,
        every: int = 1,
        point_features: int = 5,
    ) -> None:
        folder = Path(root).expanduser() / split
        check_steps(sweeps, every)
        self.classes, self.sweeps, self.point_features = tuple(classes), sweeps, point_features
        self.files: list[list[Path]] = []
        for sequence in sorted(path for path in folder.glob("*") if path.is_dir()):
            frames = sorted(sequence.glob("*.npz"))
            starts = range(0, len(frames), every)
            self.files += [frames[max(0, i - sweeps + 1) : i + 1][::-1] for i in starts]
        if not self.files:
            raise InputError(f"no frames under {folder} (expected {folder}/SEQUENCE/FRAME.npz)")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> LidarFrame:
        files = self.files[index]
        points = read_points(files[0], columns=self.point_features)
        with unreadable(files[0]):
            boxes, labels = _boxes(files[0], self.classes)
        if self.sweeps > 1:
            # Where the sequence starts, the current sweep stands for the missing ones.
            files = files + [files[0]] * (self.sweeps - len(files))
            sweeps = [points] + [
                points if file == files[0] else read_points(file, columns=self.point_features)
                for file in files[1:]
            ]
            points = merge_sweeps(sweeps, [_pose(file) for file in files])
        return LidarFrame(
            points,
            boxes,
            labels,
            count_points(points, boxes),
            name=f"{files[0].parent.name}/{files[0].stem}",
        )


def _boxes(path: Path, classes: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Boxes (M, 7) and labels (M,) of the classes that count."""
    given, names = read_arrays(path, ("boxes", "names"))
    boxes = as_numbers(given, "boxes") if given.size else np.zeros((0, 7))
    if boxes.shape != (names.size, 7) or names.ndim != 1:
        raise ValueError(f"boxes must be (N, 7) beside N names, not {given.shape} and {names.size}")
    # Names may be bytes.
    kinds = names.astype(str).tolist()
    rows = [i for i, name in enumerate(kinds) if name in classes]
    labels = torch.tensor([classes.index(kinds[i]) for i in rows]).long()
    return torch.from_numpy(boxes[rows].astype(np.float32)), labels


def _pose(path: Path) -> Tensor:
    with unreadable(path):
        (pose,) = read_arrays(path, ("pose",))
        return check_pose(torch.from_numpy(as_numbers(pose, "pose").astype(np.float64)))

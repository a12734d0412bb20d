"""Frames in numpy files, for data that was converted (Waymo, nuScenes, one's own)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from vitzoo.errors import InputError
from vitzoo.tasks.contract import UnreadableSample
from vitzoo.tasks.detection3d.files import DAMAGED, read_points
from vitzoo.tasks.detection3d.frames import LidarFrame, count_points, merge_sweeps


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
        InputError: no file there.
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
        arrays = _read(files[0], ("boxes", "names"))
        names = [str(name) for name in arrays["names"]]
        if arrays["boxes"].size != 7 * len(names):
            shape = arrays["boxes"].shape
            reason = f"boxes must be (N, 7) beside N names, not {shape} and {len(names)}"
            raise UnreadableSample(str(files[0]), reason)
        rows = [i for i, name in enumerate(names) if name in self.classes]
        boxes = torch.from_numpy(arrays["boxes"][rows].astype(np.float32)).reshape(-1, 7)
        if self.sweeps > 1:
            # Where the sequence starts, the current sweep stands for the missing ones.
            files = files + [files[0]] * (self.sweeps - len(files))
            sweeps = [points] + [
                points if file == files[0] else read_points(file, columns=self.point_features)
                for file in files[1:]
            ]
            poses = [torch.from_numpy(_read(file, ("pose",))["pose"]) for file in files]
            points = merge_sweeps(sweeps, poses)
        return LidarFrame(
            points,
            boxes,
            torch.tensor([self.classes.index(names[i]) for i in rows]).long(),
            count_points(points, boxes),
            name=f"{files[0].parent.name}/{files[0].stem}",
        )


def _read(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as arrays:
            missing = [name for name in names if name not in arrays]
            if missing:
                raise UnreadableSample(str(path), f"it holds no array {missing[0]!r}")
            return {name: arrays[name] for name in names}
    except DAMAGED as error:
        raise UnreadableSample(str(path), str(error)) from None

"""Random changes of a LiDAR frame and its boxes, from torch's global generator."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vitzoo.heads.detection3d.boxes import (
    intersection_from_above,
    points_in_boxes,
    rotate,
    wrap_angle,
)
from vitzoo.heads.detection3d.pillars import PillarGrid
from vitzoo.tasks.detection3d.frames import LidarFrame


@dataclass(kw_only=True)
class AugmentOptions:
    """The recipe's `augment` section; FlatFormer's values.

    Attributes:
        flip_x, flip_y: probability of mirroring x, and y.
        rotate: largest turn in degrees, either way.
        scale: smallest and largest factor of all lengths.
        paste: objects of a class that are added to a frame, by class name; see `PasteBank`.
        paste_min_points: points that a pasted object of a class has at least.
        paste_frames: training frames that objects are cut from; all if None.
    """

    flip_x: float = 0.5
    flip_y: float = 0.5
    rotate: float = 45.0
    scale: tuple[float, float] = (0.95, 1.05)
    paste: dict[str, int] = field(default_factory=dict)
    paste_min_points: dict[str, int] = field(default_factory=dict)
    paste_frames: int | None = None


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def mirror(frame: LidarFrame, axis: int) -> LidarFrame:
    """Mirror x (axis 0) or y (axis 1)."""
    points, boxes = frame.points.clone(), frame.boxes.clone()
    points[:, axis] *= -1
    boxes[:, axis] *= -1
    boxes[:, 6] = wrap_angle(math.pi - boxes[:, 6] if axis == 0 else -boxes[:, 6])
    return replace(frame, points=points, boxes=boxes)


def turn(frame: LidarFrame, angle: float) -> LidarFrame:
    """Turn everything counter-clockwise by `angle` radians."""
    points, boxes = frame.points.clone(), frame.boxes.clone()
    by = torch.tensor(angle)
    points[:, :2] = rotate(points[:, :2], by)
    boxes[:, :2] = rotate(boxes[:, :2], by)
    boxes[:, 6] = wrap_angle(boxes[:, 6] + angle)
    return replace(frame, points=points, boxes=boxes)


def scale(frame: LidarFrame, factor: float) -> LidarFrame:
    """Multiply all lengths."""
    points, boxes = frame.points.clone(), frame.boxes.clone()
    points[:, :3] *= factor
    boxes[:, :6] *= factor
    return replace(frame, points=points, boxes=boxes)


def crop(frame: LidarFrame, grid: PillarGrid) -> LidarFrame:
    """Without points outside the grid's range, and boxes centred outside it or not finite."""
    x0, y0, _, x1, y1, _ = grid.point_range
    x, y = frame.boxes[:, 0], frame.boxes[:, 1]
    within = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
    frame = frame.keep_boxes(within & frame.boxes.isfinite().all(-1))
    return replace(frame, points=frame.points[grid.inside(frame.points)])


class PasteBank:
    """Objects cut from training frames, to be put into others at the same place.

    Args:
        frames: to cut from.
        labels: class names.
        counts: objects to add per class name.
        min_points: that an object of a class has at least; 5 where it is not named.

    Raises:
        ValueError: a class that is not among `labels`.
    """

    def __init__(
        self,
        frames: Iterable[LidarFrame],
        labels: tuple[str, ...],
        counts: Mapping[str, int],
        *,
        min_points: Mapping[str, int] | None = None,
    ) -> None:
        unknown = [name for name in (*counts, *(min_points or {})) if name not in labels]
        if unknown:
            raise ValueError(f"class {unknown[0]!r} is not among {', '.join(labels)}")
        self.counts = {labels.index(name): count for name, count in counts.items()}
        self.objects: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in self.counts}
        least = {labels.index(name): count for name, count in (min_points or {}).items()}
        for frame in frames:
            for box, label in zip(frame.boxes, frame.labels.tolist(), strict=True):
                if label not in self.objects:
                    continue
                points = frame.points[points_in_boxes(frame.points, box[None])[:, 0]]
                if len(points) >= least.get(label, 5):
                    self.objects[label].append((box, points))

    def __call__(self, frame: LidarFrame) -> LidarFrame:
        """The frame with objects that overlap none of its own, and without what stood there."""
        boxes, labels, added = [frame.boxes], [frame.labels], []
        counts = [frame.point_counts]
        for label, wanted in self.counts.items():
            objects = self.objects[label]
            for i in torch.randperm(len(objects))[:wanted].tolist():
                box, points = objects[i]
                if (intersection_from_above(box, torch.cat(boxes)) > 0).any():
                    continue
                boxes.append(box[None])
                labels.append(torch.tensor([label]))
                counts.append(torch.tensor([len(points)]))
                added.append(points)
        if not added:
            return frame
        clear = ~points_in_boxes(frame.points, torch.cat(boxes[1:])).any(1)
        return replace(
            frame,
            points=torch.cat([frame.points[clear], *added]),
            boxes=torch.cat(boxes),
            labels=torch.cat(labels),
            point_counts=torch.cat(counts),
        )


def augment(
    frame: LidarFrame, options: AugmentOptions, grid: PillarGrid, bank: PasteBank | None = None
) -> LidarFrame:
    """Paste, mirror, turn, scale, and cut to the grid, in this order."""
    if bank is not None:
        frame = bank(frame)
    for axis, probability in ((0, options.flip_x), (1, options.flip_y)):
        if torch.rand(()).item() < probability:
            frame = mirror(frame, axis)
    if options.rotate:
        limit = math.radians(options.rotate)
        frame = turn(frame, _uniform(-limit, limit))
    if tuple(options.scale) != (1.0, 1.0):
        frame = scale(frame, _uniform(*options.scale))
    return crop(frame, grid)

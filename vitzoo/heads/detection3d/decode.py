"""From the head's maps to boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, get_args

import torch
from torch import Tensor

from vitzoo.heads.detection3d.nms import NmsKind, suppress
from vitzoo.heads.detection3d.pillars import PillarGrid


@dataclass(frozen=True)
class Detections3D:
    """Boxes found in one frame.

    Attributes:
        boxes: (N, 7) x, y, z of the centre, length, width, height in metres, heading in radians.
        scores: (N,).
        labels: (N,) classes from 0.
        velocities: (N, 2) in metres per second, if asked for.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    velocities: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, rows: Any) -> Detections3D:
        velocities = None if self.velocities is None else self.velocities[rows]
        return Detections3D(self.boxes[rows], self.scores[rows], self.labels[rows], velocities)

    def cpu(self) -> Detections3D:
        """The same on the CPU."""
        velocities = None if self.velocities is None else self.velocities.cpu()
        return Detections3D(self.boxes.cpu(), self.scores.cpu(), self.labels.cpu(), velocities)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How maps become boxes; the defaults are the paper's on Waymo.

    Attributes:
        score_threshold: lower scores are dropped.
        max_candidates: cells per class, and then over all classes, that are looked at.
        iou_power: the score is heat * iou ** power; a value per class p gives
            heat ** (1 - p) * iou ** p.
        centre_range: (x0, y0, z0, x1, y1, z1) that centres must lie in; the grid's x and y and
            10 m up and down if None.
        nms: `rotated` or `circle`.
        nms_thresholds: per class, or one for all, see `suppress`.
        nms_before, nms_after: most boxes per class before and after suppression, per class or one
            for all.

    Raises:
        ValueError: an unknown kind of suppression, or a setting that is no number.
    """

    score_threshold: float = 0.1
    max_candidates: int = 4096
    iou_power: float | Sequence[float] = 2.0
    centre_range: tuple[float, float, float, float, float, float] | None = None
    nms: NmsKind = "rotated"
    nms_thresholds: float | Sequence[float] = (0.8, 0.55, 0.55)
    nms_before: int | Sequence[int] = (2048, 1024, 1024)
    nms_after: int | Sequence[int] = (300, 100, 100)

    def __post_init__(self) -> None:
        if self.nms not in get_args(NmsKind):
            raise ValueError(f"nms={self.nms!r} is not one of {', '.join(get_args(NmsKind))}")
        for field in fields(self):
            value = getattr(self, field.name)
            numbers = value if isinstance(value, list | tuple) else [value]
            if field.name == "nms" or value is None:
                continue
            if not all(isinstance(n, Real) for n in numbers):
                raise ValueError(f"{field.name}={value!r} is not of numbers")
        if self.centre_range is not None and len(self.centre_range) != 6:
            raise ValueError(f"centre_range={self.centre_range} is not (x0, y0, z0, x1, y1, z1)")

    def per_class(self, name: str, num_classes: int) -> list[float]:
        """A setting for every class.

        Raises:
            ValueError: as many values as classes are needed.
        """
        value = getattr(self, name)
        values = list(value) if isinstance(value, Sequence) else [value] * num_classes
        if len(values) != num_classes:
            raise ValueError(f"{name} has {len(values)} values for {num_classes} classes")
        return values


def scores_of(maps: dict[str, Tensor], iou_power: float | Sequence[float]) -> Tensor:
    """(B, classes, H, W) in float32: heat, corrected by the expected overlap where there is one."""
    heat = maps["heatmap"].float().sigmoid()
    if "iou" not in maps:
        return heat
    iou = maps["iou"].float().clamp(0, 1)
    if isinstance(iou_power, Sequence):
        power = heat.new_tensor(list(iou_power))[:, None, None]
        return heat ** (1 - power) * iou**power
    return heat * iou**iou_power


def decode(
    maps: dict[str, Tensor], *, grid: PillarGrid, stride: int = 1, config: DecodeConfig
) -> list[Detections3D]:
    """Boxes of every frame by falling score, before suppression.

    Args:
        maps: outputs of `CenterHead`.
        grid: the pillars.
        stride: pillars per cell of the maps, along each side.
        config: thresholds and ranges.
    """
    scores = scores_of(maps, config.iou_power)
    H, W = scores.shape[2:]
    per_class, cells = scores.flatten(2).topk(min(config.max_candidates, H * W))
    scores, best = per_class.flatten(1).topk(min(config.max_candidates, per_class[0].numel()))
    labels = best // per_class.shape[2]
    cells = cells.flatten(1).gather(1, best)

    def at_cells(name: str) -> Tensor:
        values = maps[name].float().flatten(2)
        return values.gather(2, cells[:, None].expand(-1, values.shape[1], -1)).transpose(1, 2)

    x0, y0, _, x1, y1, _ = grid.point_range
    place = torch.stack([cells % W, cells // W], dim=-1) + at_cells("reg")
    centre = place * (place.new_tensor(grid.pillar_size) * stride) + place.new_tensor([x0, y0])
    rot = at_cells("rot")
    yaw = torch.atan2(rot[..., :1], rot[..., 1:])
    boxes = torch.cat([centre, at_cells("height"), at_cells("dim").exp(), yaw], dim=-1)
    bounds = boxes.new_tensor(config.centre_range or (x0, y0, -10, x1, y1, 10))
    good = ((boxes[..., :3] >= bounds[:3]) & (boxes[..., :3] <= bounds[3:])).all(-1)
    good &= (scores > config.score_threshold) & boxes.isfinite().all(-1)
    velocities = at_cells("vel") if "vel" in maps else None
    return [
        Detections3D(boxes[i], scores[i], labels[i], None if velocities is None else velocities[i])[
            keep
        ]
        for i, keep in enumerate(good)
    ]


def apply_nms(found: Detections3D, num_classes: int, config: DecodeConfig) -> Detections3D:
    """Suppression within each class; the result is class by class, each by falling score.

    Args:
        found: boxes of one frame by falling score.
        num_classes: object classes.
        config: thresholds and limits.
    """

    def setting(name: str) -> Tensor:
        return torch.tensor(config.per_class(name, num_classes), device=found.labels.device)

    found = found[found.labels.argsort(stable=True)]
    found = found[_rank(found.labels) < setting("nms_before")[found.labels]]
    thresholds = setting("nms_thresholds").float()[found.labels]
    found = found[suppress(found.boxes, thresholds, groups=found.labels, kind=config.nms)]
    return found[_rank(found.labels) < setting("nms_after")[found.labels]]


def _rank(labels: Tensor) -> Tensor:
    """Place of every row within its class, from sorted labels."""
    return torch.arange(len(labels), device=labels.device) - torch.searchsorted(labels, labels)

"""The recipe's sections for detection in LiDAR sweeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vitzoo.tasks.contract import DataOptions
from vitzoo.tasks.detection3d.augment import AugmentOptions


@dataclass(kw_only=True)
class DetectorOptions:
    """The recipe's `model` section; the defaults are the paper's on Waymo.

    Attributes:
        name: a backbone of modality `points`.
        checkpoint: start from this file, the zoo's or the authors'.
        point_range: x0, y0, z0, x1, y1, z1 in metres.
        pillar_size: x, y in metres.
        pillar_dims: widths of the pillar encoder; the last is the backbone's.
        args: the backbone's arguments (`depth`, `num_heads`, `window_size`, `group_size`).
        neck, head: arguments of `BevNeck` and `CenterHead`.
        decode: fields of `DecodeConfig`.
        velocity_weight: of the velocity's error in the box loss.
        grad_checkpointing: recompute activations in backward.
    """

    name: str = "vz_flatformer"
    checkpoint: str | None = None
    point_range: list[float] = field(
        default_factory=lambda: [-74.88, -74.88, -1.999, 74.88, 74.88, 3.999]
    )
    pillar_size: list[float] = field(default_factory=lambda: [0.32, 0.32])
    pillar_dims: list[int] = field(default_factory=lambda: [64, 128])
    args: dict[str, Any] = field(default_factory=dict)
    neck: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    decode: dict[str, Any] = field(default_factory=dict)
    velocity_weight: float = 0.0
    grad_checkpointing: bool = False


@dataclass(kw_only=True)
class LidarDataOptions(DataOptions):
    """The recipe's `data` section.

    Attributes:
        name: `synthetic`, `av2`, `kitti`, or `npz` for converted data.
        train_split, val_split: names of the two halves.
        train_first, val_first: keep only the first n frames; of the synthetic ones, how many.
        classes: that count, in the order of the labels; the data set's own if empty.
        sweeps: the current sweep and how many before it (`av2`, `npz`).
        every: take every n-th frame of a sequence for training (`av2`, `npz`).
        point_features: numbers per point (`npz`; the others know theirs).
        min_points: boxes with fewer points are not learnt from.
    """

    name: Literal["synthetic", "av2", "kitti", "npz"] = "synthetic"
    train_split: str = "train"
    val_split: str = "val"
    train_first: int | None = None
    val_first: int | None = None
    classes: list[str] = field(default_factory=list)
    sweeps: int = 1
    every: int = 1
    point_features: int = 5
    min_points: int = 1
    batch_size: int = 4


@dataclass(kw_only=True)
class MetricsOptions:
    """The recipe's `metrics` section; see `MetricOptions`.

    Attributes:
        overlaps: 3-D overlap of a hit, per class, or one for all.
        max_range: metres.
        max_per_frame: boxes per class.
        min_points: true boxes with fewer points are left out.
    """

    overlaps: list[float] = field(default_factory=lambda: [0.7, 0.5, 0.5])
    max_range: float = 150.0
    max_per_frame: int = 100
    min_points: int = 1


@dataclass(kw_only=True)
class Detection3DOptions:
    """The recipe's sections of this task."""

    model: DetectorOptions = field(default_factory=DetectorOptions)
    data: LidarDataOptions = field(default_factory=LidarDataOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    metrics: MetricsOptions = field(default_factory=MetricsOptions)

"""A seeded generator of LiDAR frames: rays cast from a roof onto ground, traffic and clutter.

For tests, demonstrations and the small recipe. Nothing here is measured from a real sensor, but
what makes the task hard is there: objects are seen from one side, hide each other, and get points
in inverse proportion to the square of their distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from vitzoo.heads.detection3d.boxes import intersection_from_above, wrap_angle
from vitzoo.tasks.detection3d.frames import LidarFrame, count_points

CLASSES = ("car", "pedestrian", "cyclist")
HALF_SIDE = 25.6
POINT_RANGE = (-HALF_SIDE, -HALF_SIDE, -1.0, HALF_SIDE, HALF_SIDE, 5.0)
# Held-out frames are drawn from seeds that no training set of sensible size reaches.
HELD_OUT_SEED = 1_000_000

_SENSOR_HEIGHT = 1.9
_ELEVATIONS = np.deg2rad(np.concatenate([np.linspace(-24, -8, 10), np.linspace(-7.2, 3, 18)]))
_AZIMUTHS = 600
_RANGE_NOISE = 0.02
_GROUND_NOISE = 0.03
_LOST = 0.08
_STRAY = 0.004


@dataclass(frozen=True)
class _Kind:
    """Mean and deviation of length, width and height, share of the traffic, and solid parts.

    A part is (along, length, width, bottom, top) as fractions of the box: its middle along the
    heading, its extents, and the heights where it starts and ends.
    """

    size: tuple[float, float, float]
    deviation: tuple[float, float, float]
    share: float
    parts: tuple[tuple[float, float, float, float, float], ...]
    reflectivity: float


_KINDS = (
    _Kind(
        size=(4.5, 1.85, 1.6),
        deviation=(0.35, 0.1, 0.12),
        share=0.5,
        parts=((0.0, 1.0, 1.0, 0.12, 0.6), (-0.08, 0.55, 0.88, 0.6, 1.0)),
        reflectivity=0.5,
    ),
    _Kind(
        size=(0.65, 0.65, 1.75),
        deviation=(0.08, 0.08, 0.12),
        share=0.3,
        parts=((0.0, 0.5, 0.95, 0.0, 0.82), (0.1, 0.4, 0.4, 0.82, 1.0)),
        reflectivity=0.3,
    ),
    _Kind(
        size=(1.8, 0.65, 1.75),
        deviation=(0.1, 0.06, 0.1),
        share=0.2,
        parts=((0.0, 1.0, 0.2, 0.0, 0.5), (-0.05, 0.35, 0.95, 0.45, 1.0)),
        reflectivity=0.35,
    ),
)
# Clutter: lower and upper length, width and height; roughness of the surface in metres.
_CLUTTER = (
    ((5.0, 0.25, 1.8), (14.0, 0.4, 3.2), 0.02),  # walls
    ((6.5, 1.2, 1.2), (14.0, 2.0, 1.8), 0.08),  # hedges: a car's flank, but for their length
    ((0.2, 0.2, 2.5), (0.4, 0.4, 5.0), 0.02),  # poles
    ((1.5, 1.0, 0.8), (4.5, 2.2, 1.9), 0.15),  # bushes, of a car's size
    ((0.4, 0.4, 0.7), (0.8, 0.8, 1.4), 0.02),  # bins
)


def draw_frame(seed: int) -> LidarFrame:
    """The frame of a seed: 5 to 25 objects that do not overlap, clutter, and a sweep of points.

    The square is 51.2 m wide, the ground lies around z = 0. Points are x, y, z and intensity in
    [0, 1). Boxes that no ray reaches are kept, with `point_counts` 0.
    """
    rng = np.random.default_rng(np.random.PCG64(seed))
    road = rng.uniform(0, math.pi / 2)
    wanted = rng.integers(5, 26)
    labels = rng.choice(len(_KINDS), size=wanted, p=[kind.share for kind in _KINDS])
    sizes = [rng.normal(_KINDS[k].size, _KINDS[k].deviation) for k in labels]
    yaws = np.array([_heading(rng, int(label), road) for label in labels])
    objects = _place(rng, np.array(sizes), yaws, np.zeros((0, 7)))
    labels = labels[: len(objects)]

    kinds = rng.integers(0, len(_CLUTTER), size=rng.integers(12, 25))
    sizes = [rng.uniform(*_CLUTTER[k][:2]) for k in kinds]
    yaws = road + rng.integers(0, 2, len(kinds)) * math.pi / 2 + rng.normal(0, 0.1, len(kinds))
    clutter = _place(rng, np.array(sizes), yaws, objects)

    solids = [_parts(box, _KINDS[k]) for box, k in zip(objects, labels, strict=True)]
    reflect = [
        np.full(len(s), _KINDS[k].reflectivity * rng.uniform(0.6, 1.4))
        for s, k in zip(solids, labels, strict=True)
    ]
    rough = [np.full(len(s), 0.02) for s in solids]
    for box, kind in zip(clutter, kinds, strict=False):
        solids.append(box[None])
        reflect.append(rng.uniform(0.1, 0.9, 1))
        rough.append(np.array([_CLUTTER[kind][2]]))
    points = torch.from_numpy(
        _cast(rng, np.concatenate(solids), np.concatenate(reflect), np.concatenate(rough))
    )
    boxes = torch.from_numpy(objects.astype(np.float32))
    boxes[:, 6] = wrap_angle(boxes[:, 6])
    return LidarFrame(
        points,
        boxes,
        torch.from_numpy(labels.astype(np.int64)),
        count_points(points, boxes),
        name=f"synthetic-{seed}",
    )


def _heading(rng: np.random.Generator, label: int, road: float) -> float:
    """Cars and cyclists keep to two crossing roads, cars more strictly; pedestrians do not."""
    if label == 1:
        return rng.uniform(-math.pi, math.pi)
    return road + rng.integers(0, 4) * math.pi / 2 + rng.normal(0, 0.08 if label == 0 else 0.3)


def _place(
    rng: np.random.Generator, sizes: np.ndarray, yaws: np.ndarray, taken: np.ndarray
) -> np.ndarray:
    """Boxes on the ground that overlap neither each other, nor `taken`, nor the vehicle."""
    boxes = np.concatenate([[[0, 0, 0.8, 5.0, 2.4, 1.6, 0]], taken])
    for size, yaw in zip(sizes, yaws, strict=True):
        for _ in range(200):
            x, y = rng.uniform(-HALF_SIDE + 1, HALF_SIDE - 1, 2)
            box = np.array([[x, y, size[2] / 2, *size, yaw]])
            if not _overlap(box, boxes):
                boxes = np.concatenate([boxes, box])
                break
    return boxes[1 + len(taken) :]


def _overlap(box: np.ndarray, others: np.ndarray, *, margin: float = 0.4) -> bool:
    """Whether a box, widened by `margin` metres, meets any other from above."""
    wide = box + np.array([0, 0, 0, margin, margin, 0, 0])
    reach = np.hypot(wide[:, 3], wide[:, 4]) + np.hypot(others[:, 3], others[:, 4])
    near = others[np.hypot(*(others - wide)[:, :2].T) < reach / 2]
    if not len(near):
        return False
    shared = intersection_from_above(torch.from_numpy(wide), torch.from_numpy(near))
    return bool((shared > 0).any())


def _parts(box: np.ndarray, kind: _Kind) -> np.ndarray:
    """The solid parts of an object as boxes (parts, 7)."""
    x, y, _, length, width, height, yaw = box
    return np.array(
        [
            [
                x + along * length * math.cos(yaw),
                y + along * length * math.sin(yaw),
                (bottom + top) / 2 * height,
                part_length * length,
                part_width * width,
                (top - bottom) * height,
                yaw,
            ]
            for along, part_length, part_width, bottom, top in kind.parts
        ]
    )


def _cast(
    rng: np.random.Generator, solids: np.ndarray, reflect: np.ndarray, rough: np.ndarray
) -> np.ndarray:
    """First hit of every ray: (N, 4) float32 of x, y, z, intensity."""
    azimuth = (np.arange(_AZIMUTHS) + rng.uniform()) * (2 * math.pi / _AZIMUTHS)
    elevation = _ELEVATIONS[:, None]
    direction = np.stack(
        [
            np.cos(elevation) * np.cos(azimuth),
            np.cos(elevation) * np.sin(azimuth),
            np.broadcast_to(np.sin(elevation), (len(_ELEVATIONS), _AZIMUTHS)),
        ],
        axis=-1,
    )
    with np.errstate(divide="ignore"):
        distance = np.where(direction[..., 2] < 0, -_SENSOR_HEIGHT / direction[..., 2], np.inf)
    hit = np.full(distance.shape, -1)
    for i, box in enumerate(solids):
        columns = _columns(box, azimuth[0])
        nearest = _enter(box, direction[:, columns])
        closer = nearest < distance[:, columns]
        distance[:, columns] = np.where(closer, nearest, distance[:, columns])
        hit[:, columns] = np.where(closer, i, hit[:, columns])

    noise = rng.normal(0, 1, distance.shape)
    on_ground = hit < 0
    spread = np.where(on_ground, 0.0, np.append(rough, 0.0)[hit])
    far = distance + noise * np.hypot(spread, _RANGE_NOISE)
    bright = np.where(on_ground, 0.15, np.append(reflect, 0.0)[hit])
    bright = bright * rng.uniform(0.7, 1.3, distance.shape)
    stray = rng.uniform(size=distance.shape) < _STRAY
    far = np.where(stray, rng.uniform(3, 30, distance.shape), far)
    seen = np.isfinite(far) & (rng.uniform(size=distance.shape) > _LOST)

    points = direction[seen] * far[seen][:, None]
    points[:, 2] += _SENSOR_HEIGHT
    points[:, 2] += _terrain(rng, points) + on_ground[seen] * rng.normal(
        0, _GROUND_NOISE, len(points)
    )
    found = np.concatenate([points, np.tanh(bright[seen])[:, None]], axis=1).astype(np.float32)
    return found[(np.abs(found[:, :2]) < HALF_SIDE).all(1)]


def _terrain(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    """A gentle swell under everything, in metres."""
    waves = rng.normal(0, 0.08, (3, 2))
    phases = rng.uniform(0, 2 * math.pi, 3)
    return 0.04 * np.sin(points[:, :2] @ waves.T + phases).sum(1)


def _columns(box: np.ndarray, first: float) -> np.ndarray:
    """Azimuth steps whose rays can meet a box, seen from the sensor."""
    distance = math.hypot(box[0], box[1])
    reach = math.hypot(box[3], box[4]) / 2
    if distance <= reach:
        return np.arange(_AZIMUTHS)
    step = 2 * math.pi / _AZIMUTHS
    middle = (math.atan2(box[1], box[0]) - first) / step
    half = math.asin(reach / distance) / step + 1
    return np.arange(math.floor(middle - half), math.ceil(middle + half) + 1) % _AZIMUTHS


def _enter(box: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Distance at which rays from the sensor enter a box, infinite where they miss it."""
    cos, sin = math.cos(box[6]), math.sin(box[6])
    to_local = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    start = to_local @ (np.array([0, 0, _SENSOR_HEIGHT]) - box[:3])
    along = direction @ to_local.T
    along = np.where(np.abs(along) < 1e-9, 1e-9, along)
    sides = np.stack([(-box[3:6] / 2 - start) / along, (box[3:6] / 2 - start) / along])
    enter, leave = sides.min(0).max(-1), sides.max(0).min(-1)
    return np.where((enter <= leave) & (enter > 0), enter, np.inf)


class SyntheticLidar(Dataset[LidarFrame]):
    """Frames of consecutive seeds, drawn when first asked for and kept.

    Args:
        count: frames.
        held_out: draw from seeds that no training set reaches.
        first_seed: added to all seeds.

    Raises:
        ValueError: the training seeds would reach the held-out ones.
    """

    classes = CLASSES
    point_features = 4

    def __init__(self, count: int, *, held_out: bool = False, first_seed: int = 0) -> None:
        if count < 0 or first_seed < 0 or first_seed + count > HELD_OUT_SEED:
            raise ValueError(f"seeds must lie in [0, {HELD_OUT_SEED}), got {first_seed} + {count}")
        self.first_seed = first_seed + (HELD_OUT_SEED if held_out else 0)
        self.frames: list[LidarFrame | None] = [None] * count

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> LidarFrame:
        frame = self.frames[index]
        if frame is None:
            frame = self.frames[index] = draw_frame(self.first_seed + index)
        return frame
